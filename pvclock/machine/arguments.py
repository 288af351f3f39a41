"""Checks of a Machine's arguments, before it makes anything."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Final, Literal

from pvclock.arguments import instance, number, sequence, text, whole
from pvclock.boot import PROTOCOLS, BootModule, BootSource
from pvclock.clock.guest_clock import MAX_AGE_S
from pvclock.clock.ticker import SHORTEST_S
from pvclock.errors import ConfigError, WrongType
from pvclock.guest_layout import FIRMWARE_AREA, RAM_END
from pvclock.kvm import Kvm
from pvclock.machine.travel_options import as_travel
from pvclock.quantities import shown
from pvclock.state.clock_state import ClockState

__all__ = ["PLATFORMS", "Platform", "check_arguments", "check_restore_options", "check_vcpus", "choose_platform"]

Platform = Literal["bare", "pc"]
PLATFORMS: Final[tuple[Platform, ...]] = ("bare", "pc")
"""See Machine."""

FUNCTIONS: Final = {
    "serial_output": "bytes",
    "cpuid": "a vCPU's number and a list of CPUID entries",
    "on_exit": "a vCPU's number and an exit",
}
"""Of Machine's arguments, and what they take."""

PC_MAX_VCPUS: Final = 255
"""Of a PC to which vCPUs can be added: those whose APIC ids have 8 bits, so that each has one kind of MADT entry."""

RESTORE_OPTIONS: Final = ("policy", "reference", "any_tsc_hz", "vmm")
"""The options of GuestClock.restore(); the state has all others."""


def check_arguments(arguments: Mapping[str, object], clock_options: Mapping[str, object]) -> None:
    """WrongType or ConfigError, which says what can be given, if no host can make a machine of these.

    arguments: Machine's, but for the options of its clock.
    """
    _check_boot_source(arguments["image"], arguments["cmdline"])
    _check_max_vcpus(whole("vcpus", arguments["vcpus"]), arguments["max_vcpus"])
    _check_memory(arguments["memory_bytes"])
    if arguments["kvm"] is not None:
        instance("kvm", arguments["kvm"], Kvm, "a Kvm, as open_kvm() gives it, or None for one of the machine's own")
    if arguments["platform"] is not None and text("platform", arguments["platform"]) not in PLATFORMS:
        raise ConfigError(f"platform {arguments['platform']!r}; choose {', '.join(PLATFORMS)}, or None by the image")
    for name, takes in FUNCTIONS.items():
        if arguments[name] is not None and not callable(arguments[name]):
            raise WrongType(name, arguments[name], f"a function of {takes}, or None")
    _check_interval(arguments["tick_interval_s"])
    if arguments["time_travel"] is not False:
        as_travel(arguments["time_travel"])
    _check_clock(arguments, clock_options)


def _check_max_vcpus(vcpus: int, given: object) -> None:
    if given is not None and (most := whole("max_vcpus", given)) < vcpus:
        raise ConfigError(f"max_vcpus is {shown(most)} of a machine with {vcpus} vCPUs; give {vcpus} or more, or None")


def _check_boot_source(image: object, cmdline: object) -> None:
    text("cmdline", cmdline)
    if isinstance(image, BootSource):
        if cmdline:
            raise ConfigError("a BootSource has its own command line; leave out: cmdline")
        _check_modules(image.modules)
        image, cmdline, initrd, protocol, _ = image
        text("image.cmdline", cmdline)
        instance("image.initrd", initrd, bytes, "the bytes of an initrd")
        if protocol is not None and text("image.protocol", protocol) not in PROTOCOLS:
            raise ConfigError(f"image.protocol {protocol!r}; choose {', '.join(PROTOCOLS)}, or None by its content")
    instance("image", image, bytes, "the bytes of a multiboot-1, PVH or Linux image or of a flat one, or a BootSource")


def _check_modules(modules: object) -> None:
    for module in sequence("image.modules", modules, "a tuple of BootModules"):
        instance("image.modules", module, BootModule, "a tuple of BootModules")
        instance("image.modules: content", module.content, bytes, "the bytes of a module")
        text("image.modules: string", module.string)


def choose_platform(source: BootSource, wanted: Platform | None, memory_bytes: int, serial_output: object) -> Platform:
    """The platform that is wanted, or by default a PC for a bzImage, which cannot do without.

    ConfigError for what it does not have or has no room for; ImageError for an ELF file that no protocol enters.
    """
    source.check()
    platform: Platform = wanted or ("pc" if source.entered_by == "bzimage" else "bare")
    if platform == "bare" and serial_output is not None:
        raise ConfigError('a bare machine has no serial port: give platform="pc", or leave out: serial_output')
    if platform == "pc" and memory_bytes < FIRMWARE_AREA.stop:
        raise ConfigError(f"RAM of {memory_bytes} bytes; a PC, whose ACPI tables are in it, needs {FIRMWARE_AREA.stop}")
    return platform


def check_vcpus(count: int, max_vcpus: int, platform: Platform, kvm: Kvm) -> None:
    """ConfigError for more vCPUs than KVM takes; KVM_CAP_NR_VCPUS, the host's CPUs, is its recommendation only.

    And for more than a PC has room to declare, if some are to come later.
    """
    most = kvm.check_extension("KVM_CAP_MAX_VCPUS")
    if not 1 <= count <= max_vcpus <= most:
        raise ConfigError(f"{shown(max_vcpus if count > 0 else count)} vCPUs; choose 1 to {most}")
    if platform == "pc" and count < max_vcpus > PC_MAX_VCPUS:
        raise ConfigError(f"max_vcpus is {max_vcpus}; a PC whose vCPUs come later can have {PC_MAX_VCPUS}")


def _check_memory(given: object) -> None:
    length = whole("memory_bytes", given)
    if not 0 < length <= RAM_END or length % mmap.PAGESIZE:
        raise ConfigError(f"RAM of {shown(length)} bytes; give a positive multiple of {mmap.PAGESIZE}, up to {RAM_END}")


def _check_interval(given: object) -> None:
    if given is None:
        return
    interval_s = number("tick_interval_s", given)
    if not SHORTEST_S <= interval_s <= MAX_AGE_S:
        raise ConfigError(
            f"tick_interval_s is {shown(interval_s)}; it can be {SHORTEST_S:g} to {MAX_AGE_S:g} seconds, "
            "or None for no ticker"
        )


def _check_clock(arguments: Mapping[str, object], options: Mapping[str, object]) -> None:
    clock, backend, restore = (arguments[name] for name in ("clock", "backend", "restore"))
    if text("clock", clock) not in ("engine", "kernel"):
        raise ConfigError(f'clock {clock!r}; choose "engine" or "kernel"')
    given = [name for name in ("backend", "restore") if arguments[name] is not None]
    if clock == "kernel" and (unknown := [*given, *(name for name in options if name != "features")]):
        raise ConfigError(f"the kernel's clock takes no options but features: {', '.join(unknown)}")
    if taken := [name for name in ("vcpu_host", "memory", "vcpus_present") if name in options]:
        raise ConfigError(f"a machine runs on /dev/kvm, in memory of its own; leave out: {', '.join(taken)}")
    if backend is not None and not callable(backend):
        wanted = "a function from the backend of the machine's vCPUs to that of its clock, such as ExecutionTimeBackend"
        raise WrongType("backend", backend, wanted)
    if restore is None:
        if early := [name for name in ("policy", "any_tsc_hz") if name in options]:
            raise ConfigError(
                f"only a restored clock has options for its return; give restore, too: {', '.join(early)}"
            )
    else:
        state = instance("restore", restore, ClockState, "a ClockState, as save() or clock_state.read() gives it")
        name = "vcpus" if arguments["max_vcpus"] is None else "max_vcpus"
        if len(state.vcpus) != arguments[name]:
            raise ConfigError(
                f"the saved clock has {len(state.vcpus)} vCPUs and the machine {arguments[name]!r}; "
                f"give {name}={len(state.vcpus)}"
            )
        check_restore_options(options)


def check_restore_options(options: Mapping[str, object]) -> None:
    """ConfigError for what GuestClock.restore() does not take, or a machine gives it."""
    if unknown := [name for name in options if name not in RESTORE_OPTIONS]:
        raise ConfigError(
            f"a restored clock has its options in the state, so it takes none but {', '.join(RESTORE_OPTIONS)}: "
            f"{', '.join(unknown)}"
        )
