"""All that a migration stream says of its guest's clock."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Final, NamedTuple

from pvclock import StateFileError
from qemu_glue.migration.cpu_sections import VcpuRegisters, read_vcpus
from qemu_glue.migration.description import read_description
from qemu_glue.migration.kvmclock_section import CLOCK, RELIABLE, KvmclockSection, find_kvmclock
from qemu_glue.migration.sections import Sections, find_sections
from qemu_glue.migration.stream_file import StreamFile

__all__ = ["QemuClock", "patches", "read_clock"]

CONFIGURATION: Final = struct.Struct(">BI")
QEMU_VM_CONFIGURATION: Final = 0x07
CONFIGURATION_AT: Final = 8
NAME_BYTES_MAX: Final = 255


class QemuClock(NamedTuple):
    """A guest's clock in a stream.

    machine: the machine type, None for those up to 2.3, which do not name themselves.  clock_ns: guest time, as QEMU
    gives it to KVM.  is_reliable: may it be relied on?  None where the stream does not say, which QEMU takes for no.
    vcpus: none where they cannot be read, and why_no_vcpus says why.
    """

    machine: str | None
    section: KvmclockSection
    clock_ns: int
    is_reliable: bool | None
    vcpus: tuple[VcpuRegisters, ...]
    why_no_vcpus: str

    @property
    def is_taken(self) -> bool:
        """Does QEMU set the guest's clock to clock_ns, rather than to what vCPU 0's page shows?"""
        shows_time = not self.vcpus or bool(self.vcpus[0].system_time_msr & 1)
        return bool(self.is_reliable) or not shows_time


def read_clock(stream: StreamFile) -> QemuClock:
    """The clock in a stream; StateFileError if that cannot be told for sure."""
    description = read_description(stream)
    sections = Sections({}, None) if description is None else find_sections(stream, description)
    section = find_kvmclock(stream, description, sections)
    vcpus = read_vcpus(stream, sections)
    return QemuClock(
        _machine(stream),
        section,
        stream.number(CLOCK.kind.form, section.clock_at, "kvmclock.clock"),
        _is_reliable(stream, section),
        vcpus,
        "" if vcpus else _why_no_vcpus(sections, is_described=description is not None),
    )


def patches(section: KvmclockSection, clock_ns: int) -> dict[int, bytes]:
    """The bytes that make `clock_ns` the guest's time, by their offset in the file.

    StateFileError if the stream has no place to say that it may be relied on.
    """
    if section.reliable_at is None:
        raise StateFileError(
            "kvmclock/clock_is_reliable",
            "no such subsection (machine types up to 2.8), so QEMU takes the time from vCPU 0's page in guest RAM",
            "a stream of a machine type from 2.9 on, saved with x-mach-use-reliable-get-clock=on",
        )
    return {section.clock_at: CLOCK.kind.form.pack(clock_ns), section.reliable_at: RELIABLE.kind.form.pack(True)}


def _is_reliable(stream: StreamFile, section: KvmclockSection) -> bool | None:
    if section.reliable_at is None:
        return None
    byte = stream.read(section.reliable_at, 1, "kvmclock/clock_is_reliable")[0]
    if byte > 1:
        raise StateFileError("kvmclock/clock_is_reliable", f"{byte:#x}", "0 or 1")
    return bool(byte)


def _machine(stream: StreamFile) -> str | None:
    with suppress(StateFileError):
        at = stream.begin + CONFIGURATION_AT
        kind, length = CONFIGURATION.unpack(stream.read(at, CONFIGURATION.size, "configuration"))
        if kind == QEMU_VM_CONFIGURATION and 1 <= length <= NAME_BYTES_MAX:
            name = stream.read(at + CONFIGURATION.size, length, "configuration")
            return name.decode("ascii") if name.isascii() and name.decode("ascii").isprintable() else None
    return None


def _why_no_vcpus(sections: Sections, *, is_described: bool) -> str:
    if not is_described:
        return "the stream does not end with QEMU's description of its devices"
    if sections.missed is None:
        return "the stream describes no vCPUs"
    missed = sections.missed
    return f"{missed.name} {missed.instance} is not where the stream's description puts it"
