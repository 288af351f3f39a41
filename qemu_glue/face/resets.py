"""A reset in three phases: all below an object enter it, then all are held in it, then all leave it.

In each phase children come before their parent.  A device that is in reset twice is entered and held once, and leaves
it when it has been released as often.  Source: QEMU's hw/core/resettable.c, docs/devel/reset.rst.
"""

from __future__ import annotations

from collections.abc import Iterator

from pvclock import StateError
from qemu_glue.face.devices import Device
from qemu_glue.face.objects import Object

__all__ = ["assert_reset", "release_reset", "reset"]


def reset(root: Object) -> None:
    """Reset all realized devices at and below `root`; what a phase raises ends it there, and none stays in reset."""
    assert_reset(root)
    release_reset(root)


def assert_reset(root: Object) -> None:
    """Bring them into reset, and keep them there until release_reset(); unless a phase raises."""
    devices = list(_devices(root))
    for device in devices:
        device.resets += 1
    entering = [device for device in devices if device.resets == 1]
    try:
        for device in entering:
            device.device_class.reset_enter(device.model)
        for device in entering:
            device.device_class.reset_hold(device.model)
    except BaseException:
        for device in devices:
            device.resets -= 1
        raise


def release_reset(root: Object) -> None:
    """Let them leave it.  StateError, before any does, for one that is not in reset."""
    devices = list(_devices(root))
    for device in devices:
        if not device.resets:
            raise StateError("release_reset", f"{device.object.path} is not in reset", "assert_reset() it first")
    for device in devices:
        device.resets -= 1
    for device in devices:
        if not device.resets:
            device.device_class.reset_exit(device.model)


def _devices(root: Object) -> Iterator[Device]:
    """The realized devices, children before their parents."""
    for child in root.children.values():
        yield from _devices(child)
    if isinstance(root.subject, Device) and root.subject.is_realized:
        yield root.subject
