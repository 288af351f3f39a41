"""A QEMU migration stream as a format of `pvclock state`: shown, checked, and its clock replaced in a copy of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from pvclock.commands.state_formats import Given, Row, as_number
from pvclock.commands.state_units import in_mhz, in_seconds, in_ticks
from pvclock.commands.whole_file import named_error
from pvclock.state import atomic_file
from pvclock.state.clock_state import ClockState, Mark
from qemu_glue.migration import conversion
from qemu_glue.migration.cpu_sections import MEANINGS, VcpuRegisters
from qemu_glue.migration.kvmclock_section import FoundBy
from qemu_glue.migration.saved_clock import QemuClock, patches, read_clock
from qemu_glue.migration.stream_file import is_of_qemu, opened

__all__ = ["IS_MADE_ANEW", "SavedStream", "read", "recognises", "write"]

IS_MADE_ANEW: Final = False

CLOCK_MEANING: Final = (
    "Guest time in ns: when the VM was paused, else when its devices were saved. QEMU gives it to KVM_SET_CLOCK at"
    " cont, and adds nothing for the time between."
)
RELIABLE_MEANING: Final = (
    "Does KVM_GET_CLOCK of the saving host agree with the guest's pages? If not, or if the stream does not say (machine"
    " types up to 2.8), QEMU takes the time from vCPU 0's page in guest RAM and its TSC instead."
)
NOT_SAVED: Final = {
    "cpuid": "The CPU that the guest sees, KVM's features in it: -cpu of the QEMU that loads the stream.",
    "host.real_ns": "When it was saved, and so for how long the guest has stood still.",
    "host.tsc_offset": "KVM makes it anew from each vCPU's TSC, which is written at load, before the clock.",
    "pages": "Time pages, wall clock and steal time are in guest RAM; KVM writes the time pages anew.",
}
YEARS_292_NS: Final = 1 << 63


class SavedStream(NamedTuple):
    """A stream's clock that was read.  modified_ns: when its file was written, UTC since 1970."""

    clock: QemuClock
    modified_ns: int

    @property
    def summary(self) -> str:
        """Machine, vCPUs, guest time and whether it is taken."""
        clock = self.clock
        machine = f" of {clock.machine}" if clock.machine else ""
        vcpus = f", {len(clock.vcpus)} vCPU{'s' * (len(clock.vcpus) > 1)}" if clock.vcpus else ""
        reliable = "reliable" if clock.is_reliable else "not reliable"
        return f"QEMU stream{machine}{vcpus}, guest time {in_seconds(clock.clock_ns)}, {reliable}"

    @property
    def notes(self) -> Sequence[str]:
        """What QEMU would make of it that one might not expect."""
        clock = self.clock
        notes = []
        if not clock.is_taken:
            notes.append("QEMU will take the time from vCPU 0's page in guest RAM, not this one")
        if clock.section.found_by is FoundBy.SEARCH:
            notes.append("found by a search, for the stream does not end with a description that leads to it")
        if not clock.vcpus:
            notes.append(f"vCPUs are not read: {clock.why_no_vcpus}")
        if clock.clock_ns >= YEARS_292_NS:
            notes.append("guest time is beyond 292 years: guests that take ns for a signed number will see it negative")
        if len({vcpu.tsc_khz for vcpu in clock.vcpus}) > 1:
            notes.append("the vCPUs' TSCs do not have one frequency")
        return notes

    def rows(self) -> Iterator[Row]:
        """The section's fields, the vCPUs', where the section is, and what is not there."""
        clock = self.clock
        yield as_number("kvmclock.clock", clock.clock_ns, CLOCK_MEANING, in_seconds(clock.clock_ns))
        reliable = {True: "true", False: "false", None: "not in the stream"}[clock.is_reliable]
        yield Row("kvmclock.clock_is_reliable", Mark.SAVED, clock.is_reliable, reliable, "", RELIABLE_MEANING)
        for vcpu in clock.vcpus:
            yield from _vcpu_rows(vcpu)
        by = f"Where the section begins in the file, found by {clock.section.found_by}."
        yield Row("kvmclock", Mark.DERIVED, clock.section.begin, str(clock.section.begin), "", by)
        for field, meaning in NOT_SAVED.items():
            yield Row(field, Mark.NOT_SAVED, None, "", "", meaning)

    def as_json(self) -> Mapping[str, Any]:
        """Its numbers."""
        clock = self.clock
        return {
            "machine": clock.machine,
            "clock_ns": clock.clock_ns,
            "is_reliable": clock.is_reliable,
            "section": clock.section._asdict(),
            "vcpus": [vcpu._asdict() for vcpu in clock.vcpus],
        }

    def check(self) -> None:
        """All that read() has taken can be used."""

    def clock_state(self, given: Given) -> tuple[ClockState, list[str]]:
        """The same as a clock's state; errors of conversion.to_clock_state()."""
        return conversion.to_clock_state(self.clock, given, self.modified_ns)


def recognises(head: bytes) -> bool:
    """Does a stream begin like that, an image of `virsh save`, or what read() can say more of than that it is none?"""
    return is_of_qemu(head)


def read(path: str) -> SavedStream:
    """The clock in stream `path`; StateFileError."""
    with opened(path) as stream:
        return SavedStream(read_clock(stream), Path(path).stat().st_mtime_ns)


def write(state: ClockState, path: str, into: str | None) -> list[str]:
    """Copy stream `into` to `path`, with the state's guest time in it, as one to be relied on.

    StateFileError if that is before the stream's, or the stream has no place to say so.
    """
    with opened(str(into)) as stream:
        clock = read_clock(stream)
        changed = patches(clock.section, conversion.check_forward(state, clock))
        try:
            atomic_file.replace(path, stream.chunks(changed))
        except OSError as error:
            raise named_error(path, error) from None
    return conversion.not_held(state, clock)


def _vcpu_rows(vcpu: VcpuRegisters) -> Iterator[Row]:
    hz = vcpu.tsc_khz * 1000 if vcpu.tsc_khz else None
    units = {"tsc": in_ticks(vcpu.tsc, hz), "tsc_khz": in_mhz(hz) if hz else ""}
    for name, meaning in MEANINGS.items():
        value = getattr(vcpu, name)
        field = f"cpu[{vcpu.vcpu}].{name}"
        if value is None:
            yield Row(field, Mark.SAVED, None, "not in the stream", "", meaning)
        else:
            yield as_number(field, value, meaning, units.get(name, ""))
