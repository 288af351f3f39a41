"""The `pvclock` device: a guest's clock by the device model, plugged in by a VMM, or that of a machine of ours.

It is configured by properties, `provider` and `features`, and makes its GuestClock as it is realized; what a running
clock can change, its reference, its policy and its rate, stays writable.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from typing import Any, Final, TypeAlias

from pvclock import Backend, ConfigError, GuestClock, GuestMemory, StateError
from pvclock.machine import RunState
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState
from qemu_glue.face.devices import DEVICE, DeviceClass
from qemu_glue.face.objects import ObjectType
from qemu_glue.face.properties import STRING, UINT64, Property, enumeration
from qemu_glue.face.vmstate import BYTES, UINT32, Field, VmState

__all__ = ["PVCLOCK", "PVCLOCK_STATE", "PvclockModel"]

PROVIDER: Final = enumeration("PvclockProvider", "None", "Minimal", "HyperV", "KVM", "HyperV+KVM")
REFERENCE: Final = enumeration("PvclockReference", "off", "raw", "monotonic", "realtime")

RATE: Final = re.compile(r"[0-9]{1,20}(/[0-9]{1,20}|\.[0-9]{1,20})?")

Find: TypeAlias = Callable[[], GuestClock]
"""Finds the clock, which a VMM may replace by another one."""


class PvclockModel:
    """What a pvclock device works with: how its clock is made, and that clock.

    make: called with the options of a GuestClock that were configured: `provider`, `features`, `reference`.
    restore: called with a saved clock, which is to take the place of this one.  Each returns what finds the clock.
    For a VMM's own GuestClock: of_clock().

    state: the saved clock, a JSON document of `state_bytes`; as a stream has it.
    """

    def __init__(self, make: Callable[[dict[str, Any]], Find], restore: Callable[[ClockState], Find]) -> None:
        self._make, self._restore = make, restore
        self._find: Find | None = None
        self.state, self.state_bytes = b"", 0
        self._options: dict[str, Any] = {"provider": "KVM", "reference": "off"}
        self._policy: str | None = None
        self._rate: Fraction | None = None

    @classmethod
    def of_clock(
        cls,
        memory: GuestMemory,
        vcpus: int = 1,
        *,
        backend: Backend,
        vcpu_host: str = "emulator",
        vmm: Any = None,  # noqa: ANN401  # GuestClock's
    ) -> PvclockModel:
        """One that makes a GuestClock with these arguments."""
        how: dict[str, Any] = {"backend": backend, "vcpu_host": vcpu_host, "vmm": vmm}

        def make(chosen: dict[str, Any]) -> Find:
            clock = GuestClock(memory, vcpus, **how, **chosen)
            return lambda: clock

        def restore(state: ClockState) -> Find:
            clock = GuestClock.restore(state, memory, **how)
            return lambda: clock

        return cls(make, restore)

    @property
    def clock(self) -> GuestClock:
        """The clock; StateError before the device is realized."""
        if self._find is None:
            raise StateError("clock", "the pvclock device is not realized", "realize() it first")
        return self._find()

    # As its class calls it

    def realize(self) -> None:
        """Make the clock, as it was configured; errors of GuestClock."""
        find = self._make(self._options)
        clock = find()
        if self._policy is not None:
            clock.policy = self._policy
        if self._rate is not None:
            clock.dilate(*self._rate.as_integer_ratio())
        self._find = find

    def unrealize(self) -> None:
        """The guest's clock stops being served: its MSRs are as after a reset, and its pages are dropped."""
        self.clock.reset()
        self._find = None

    def reset(self) -> None:
        """The clock's MSRs as after power-on; guest time goes on."""
        self.clock.reset()

    def save(self) -> None:
        """Keep the clock in `state`."""
        self.state = clock_state.to_json(self.clock.save()).encode()
        self.state_bytes = len(self.state)

    def load(self) -> None:
        """Go on with the clock in `state`, which is paused; errors of GuestClock.restore()."""
        self._find = self._restore(clock_state.from_json(self.state))

    # As its VMM calls it

    def change_run_state(self, before: RunState, now: RunState) -> None:
        """A RunStates' handler: guest time stands still while the VM does not run, and goes on by the policy."""
        if now is RunState.RUNNING:
            if self.clock.is_paused:
                self.clock.resume()
        elif before is RunState.RUNNING and not self.clock.is_paused:
            self.clock.pause()

    # As its properties show it

    def get_option(self, name: str) -> object:
        """What was configured, or what the clock made of it."""
        if self._find is None:
            return self._options.get(name, 0)
        if name == "provider":
            return self.clock.interface.name
        if name == "reference":
            return str(self.clock.reference)
        return self.clock.interface.config.get(name, 0)

    def set_option(self, name: str, value: object) -> None:
        """Configure it, or change the clock."""
        if self._find is None:
            self._options[name] = value
        elif name == "reference":
            self.clock.follow(str(value))

    def get_policy(self) -> str:
        """By its name."""
        return self._policy or "freeze" if self._find is None else str(self.clock.policy)

    def set_policy(self, policy: str) -> None:
        """ConfigError for none."""
        if self._find is None:
            self._policy = policy
        else:
            self.clock.policy = policy

    def get_rate(self) -> str:
        """As a fraction."""
        return str(self._rate or 1 if self._find is None else self.clock.dilation)

    def set_rate(self, rate: str) -> None:
        """RangeError or ConfigError for what no guest's clock can have."""
        ratio = _ratio(rate)
        if self._find is None:
            self._rate = ratio
        else:
            self.clock.dilate(*ratio.as_integer_ratio())


def _ratio(rate: str) -> Fraction:
    if RATE.fullmatch(rate):
        with suppress(ZeroDivisionError):
            return Fraction(rate)
    raise ConfigError(f"rate {rate!r}; give guest seconds in a host second, such as 1/2")


def _option(name: str) -> dict[str, Any]:
    return {
        "get": lambda device: device.model.get_option(name),
        "set": lambda device, value: device.model.set_option(name, value),
    }


PVCLOCK_STATE: Final = VmState(
    "pvclock",
    1,
    1,
    (Field("state_bytes", UINT32), Field("state", BYTES, "state_bytes")),
    pre_save=PvclockModel.save,
    post_load=PvclockModel.load,
)
PVCLOCK: Final = DeviceClass(
    ObjectType(
        "pvclock",
        DEVICE,
        "A guest's clock, served by pvclock's engine.",
        (
            Property(
                "provider",
                PROVIDER,
                "The guest's clock interface.",
                **_option("provider"),
                is_configuration=True,
                default="KVM",
            ),
            Property(
                "features",
                UINT64,
                "What CPUID offers of it, as bits of EAX; unset for what the engine serves best.",
                **_option("features"),
                is_configuration=True,
            ),
            Property("reference", REFERENCE, "What guest time follows.", **_option("reference"), default="off"),
            Property(
                "resume-policy",
                STRING,
                "What becomes of the time that a pause missed: freeze, advance, slew:max_ppm=..., ...",
                lambda device: device.model.get_policy(),
                lambda device, value: device.model.set_policy(value),
                default="freeze",
            ),
            Property(
                "rate",
                STRING,
                "Guest seconds in a host second, as a fraction such as 1/2.",
                lambda device: device.model.get_rate(),
                lambda device, value: device.model.set_rate(value),
                default="1",
            ),
            Property(
                "guest-ns",
                UINT64,
                "Guest time in ns, now; once it is realized.",
                lambda device: int(device.model.clock.now()),
            ),
            Property(
                "tsc-frequency",
                UINT64,
                "The TSC frequency that the guest was told, in Hz; once it is realized.",
                lambda device: device.model.clock.tsc_hz,
            ),
        ),
    ),
    realize=PvclockModel.realize,
    unrealize=PvclockModel.unrealize,
    reset_hold=PvclockModel.reset,
    vmstate=PVCLOCK_STATE,
)
