"""What a Machine can be made of: its arguments, checked before anything is made."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Final

from pvclock.boot.layout import RAM_END
from pvclock.clockstate import ClockState
from pvclock.errors import ConfigError
from pvclock.guestclock import MAX_AGE_S
from pvclock.kvm import Kvm
from pvclock.kvm.capabilities import value_of
from pvclock.quantities import shown
from pvclock.ticker import SHORTEST_S

__all__ = ["check_arguments", "check_vcpus"]

VCPUS_ANYWHERE: Final = 64
"""So many a machine may have even where KVM recommends fewer, as it does by the host's CPUs."""

RESTORE_OPTIONS: Final = ("policy", "reference", "any_tsc_hz", "vmm")
"""GuestClock.restore()'s: all else is in the state."""


def check_arguments(arguments: Mapping[str, object], clock_options: Mapping[str, object]) -> None:
    """ConfigError if no machine can be made of these on any host; it names what is wanted.

    arguments: Machine's, but for the options of its clock.
    """
    _check_type(arguments, "image", bytes, "the bytes of a multiboot-1 ELF or of a flat real-mode image")
    _check_type(arguments, "vcpus", int, "a whole number from 1 on")
    _check_memory(arguments)
    _check_type(arguments, "cmdline", str, "text")
    _check_type(arguments, "kvm", Kvm | None, "a Kvm, as open_kvm() gives it, or None for one of the machine's own")
    _check_interval(arguments)
    _check_clock(arguments, clock_options)


def check_vcpus(count: int, kvm: Kvm) -> None:
    """ConfigError for a number of vCPUs that this host does not run."""
    most = max(value_of(kvm, "KVM_CAP_NR_VCPUS"), VCPUS_ANYWHERE)
    if not 1 <= count <= most:
        raise ConfigError(f"{shown(count)} vCPUs; choose 1 to {most}")


def _check_memory(arguments: Mapping[str, object]) -> None:
    wanted = f"a positive multiple of {mmap.PAGESIZE}, up to {RAM_END}"
    _check_type(arguments, "memory_bytes", int, wanted)
    length = arguments["memory_bytes"]
    assert isinstance(length, int)  # noqa: S101  # for type checkers
    if not 0 < length <= RAM_END or length % mmap.PAGESIZE:
        raise ConfigError(f"RAM of {shown(length)} bytes; give {wanted}")


def _check_interval(arguments: Mapping[str, object]) -> None:
    wanted = f"from {SHORTEST_S:g} to {MAX_AGE_S:g} seconds, or None for no ticker"
    _check_type(arguments, "tick_interval_s", float | int | None, wanted)
    interval_s = arguments["tick_interval_s"]
    if isinstance(interval_s, float | int) and not SHORTEST_S <= interval_s <= MAX_AGE_S:
        raise ConfigError(f"tick_interval_s is {interval_s!r}; it must be {wanted}")


def _check_clock(arguments: Mapping[str, object], options: Mapping[str, object]) -> None:
    clock, backend, restore = (arguments[name] for name in ("clock", "backend", "restore"))
    if clock not in ("engine", "kernel"):
        raise ConfigError(f'clock {clock!r}; choose "engine" or "kernel"')
    given = [name for name in ("backend", "restore") if arguments[name] is not None]
    if clock == "kernel" and (unknown := [*given, *(name for name in options if name != "features")]):
        raise ConfigError(f"the kernel's clock takes no options but features: {', '.join(unknown)}")
    if backend is not None and not callable(backend):
        raise ConfigError(
            f"backend is {_described(backend)}; it must be a function from the backend of the machine's vCPUs to that "
            "of its clock, such as UnslavedBackend"
        )
    if restore is not None:
        _check_type(arguments, "restore", ClockState, "a ClockState, as save() or clockstate.read() gives it")
        assert isinstance(restore, ClockState)  # noqa: S101  # for type checkers
        if len(restore.vcpus) != arguments["vcpus"]:
            raise ConfigError(
                f"the saved clock has {len(restore.vcpus)} vCPUs and the machine {arguments['vcpus']!r}; "
                f"give vcpus={len(restore.vcpus)}"
            )
        if unknown := [name for name in options if name not in RESTORE_OPTIONS]:
            raise ConfigError(
                f"a restored clock has its options in the state, so it takes none but {', '.join(RESTORE_OPTIONS)}: "
                f"{', '.join(unknown)}"
            )


def _check_type(arguments: Mapping[str, object], name: str, kind: object, wanted: str) -> None:
    value = arguments[name]
    if not isinstance(value, kind) or isinstance(value, bool):  # type: ignore[arg-type]  # to Python, True is an int
        raise ConfigError(f"{name} is {_described(value)}; it must be {wanted}")


def _described(value: object) -> str:
    """Plain values with their type, others by that alone: their repr may be long."""
    kind = type(value).__name__
    return f"{value!r} ({kind})" if isinstance(value, int | float) else f"of type {kind}"
