"""Devices: objects that are configured, realized, reset in phases and unrealized.

What a device does is its class's, what it does it with is its model's.  Source: QEMU's hw/core/qdev.c and resettable.c,
docs/devel/reset.rst.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from pvclock import StateError
from qemu_glue.errors import QmpRefusal
from qemu_glue.face.objects import OBJECT, Object, ObjectType
from qemu_glue.face.properties import BOOL, Property
from qemu_glue.face.vmstate import VmState

__all__ = ["DEVICE", "Device", "DeviceClass"]


def _nothing(_model: Any) -> None:  # noqa: ANN401  # whatever the class's devices have
    """Where a class has nothing to do."""


class DeviceClass(NamedTuple):
    """What devices of `type`, which descends from "device", do; each function is called with the device's model.

    realize: makes the device work, by its configuration; what it raises leaves it unrealized.  unrealize: ends that.
    reset_enter: brings the device's own state to that after power-on, and touches nothing outside.  reset_hold: does
    what others notice, once all have entered.  reset_exit: begins to work, once all are held.
    vmstate: what a stream has of the model; None where it has no state.
    """

    type: ObjectType
    realize: Callable[[Any], object] = _nothing
    unrealize: Callable[[Any], object] = _nothing
    reset_enter: Callable[[Any], object] = _nothing
    reset_hold: Callable[[Any], object] = _nothing
    reset_exit: Callable[[Any], object] = _nothing
    is_hotpluggable: bool = True
    vmstate: VmState | None = None


class Device:
    """A device of `device_class` with `model`; `object` is what stands in the tree.

    is_hotplugged: did it come after its machine had been made?
    """

    def __init__(self, device_class: DeviceClass, model: object, *, is_hotplugged: bool = False) -> None:
        self.device_class, self.model = device_class, model
        self.is_hotplugged = is_hotplugged
        self.is_realized = False
        self.resets = 0
        """How often it is in reset: see resets.py."""

        self.object = Object(device_class.type, self, self._check_writable)

    def realize(self) -> None:
        """Make it work; again without effect.  Raises what its class does."""
        if not self.is_realized:
            self.device_class.realize(self.model)
            self.is_realized = True

    def unrealize(self) -> None:
        """End that; again without effect.  Raises what its class does."""
        if self.is_realized:
            self.device_class.unrealize(self.model)
            self.is_realized = False
            self.resets = 0  # nobody releases it from now on

    def set_realized(self, is_wanted: bool) -> None:
        """realize() or unrealize()."""
        if is_wanted:
            self.realize()
        else:
            self.unrealize()

    def check_realized(self, operation: str) -> None:
        """StateError if it is not."""
        if not self.is_realized:
            raise StateError(operation, f"the device {self.object.type.name} is not realized", "realize() it first")

    def _check_writable(self, changed: Property) -> None:
        if changed.is_configuration and self.is_realized:
            name = f"device '{self.object.name}'" if self._has_id else "anonymous device"
            kind = self.object.type.name
            raise QmpRefusal(
                f"Attempt to set property '{changed.name}' on {name} (type '{kind}') after it was realized"
            )

    @property
    def _has_id(self) -> bool:
        """Was it given a name?  Those that were not are called device[N]."""
        return self.object.parent is not None and not self.object.name.endswith("]")


DEVICE: Final = ObjectType(
    "device",
    OBJECT,
    "What has a life: it is configured, realized, reset and unrealized.",
    (
        Property("realized", BOOL, "Does it work?", lambda it: it.is_realized, Device.set_realized),
        Property("hotplugged", BOOL, "Did it come after its machine was made?", lambda it: it.is_hotplugged),
        Property(
            "hotpluggable",
            BOOL,
            "Could it come, or go, while the machine is there?",
            lambda it: it.device_class.is_hotpluggable,
        ),
    ),
    is_abstract=True,
)
