"""Reads clockprobe's findings, and the pages that it reads, from guest memory; the same for every VMM that runs it."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Final

from pvclock._memory import GuestMemory
from pvclock._scale import ClockScale
from pvclock.errors import StateError
from pvclock.payloads import probe
from pvclock.payloads.probe import ProbeRecord
from pvclock.quantities import NS_PER_S, U64_MASK
from pvclock.readings import TimeInfo

__all__ = [
    "EXIT_LIMIT_S",
    "READS_PER_FLUSH",
    "READING_LIMIT_S",
    "TIME_INFO",
    "await_reading",
    "failures",
    "newest_ns",
    "read_pages",
    "read_records",
    "shown_by",
    "time_info",
    "vcpu0_reading",
    "wall_clock_ns",
]

BOOT_LIMIT_S: Final = 60.0
EXIT_LIMIT_S: Final = 60.0
READING_LIMIT_S: Final = 60.0
"""For a vCPU that a busy host gives no CPU for a while, or a slow one that takes long from one flush to the next."""
READING_PAUSE_S: Final = 0.002

READS_PER_FLUSH: Final = 1 << 14
"""clockprobe updates `reads` of a record every so many reads."""

TIME_INFO: Final = struct.Struct("<I4xQQIbB2x")
"""The page by the document (K-11), not by the engine that is under test."""


def await_reading(memory: GuestMemory, vcpus: int, has_ended: Callable[[], bool], console: Callable[[], str]) -> None:
    """Return when all `vcpus` of a booting clockprobe read their clock; StateError if they do not.

    has_ended: waits for about 1 ms for the guest's end, and raises the reason if it ended badly.  console: its output.
    """
    deadline = time.monotonic() + BOOT_LIMIT_S
    while (block := probe.read_block(memory)) is None or block.phase < probe.Phase.READING:
        if has_ended():
            block = probe.read_block(memory)
            break
        if time.monotonic() > deadline:
            said = console().strip() or "nothing"
            raise StateError(
                "observe", f"clockprobe has not begun after {BOOT_LIMIT_S:g} s, and said {said}", "try again"
            )
    if block is None or block.cpus_arrived != vcpus:
        raise StateError("observe", f"not all {vcpus} vCPUs of clockprobe began: {block}", "try again")


def read_records(memory: GuestMemory, vcpus: int) -> list[ProbeRecord]:
    """The findings so far, a record for each vCPU."""
    return [probe.read_record(memory, vcpu) for vcpu in range(vcpus)]


def read_pages(memory: GuestMemory, vcpus: int) -> list[TimeInfo]:
    """Each vCPU's page as it lies there; torn if it is being changed."""
    return [_read_page(memory, vcpu) for vcpu in range(vcpus)]


def time_info(page: bytes) -> TimeInfo:
    """A page's 32 bytes as its fields."""
    return TimeInfo._make(TIME_INFO.unpack(page))


def newest_ns(memory: GuestMemory) -> int:
    """The newest time that any vCPU has read; StateError without a clockprobe in `memory`."""
    block = probe.read_block(memory)
    if block is None:
        raise StateError("observe", "clockprobe's block is gone from its memory", "is another guest running there?")
    return block.shared_last


def wall_clock_ns(memory: GuestMemory, gpa: int = probe.WALL_CLOCK) -> int:
    """UTC at guest time 0, in ns, as the wall clock record at `gpa` has it."""
    _, sec, nsec = struct.unpack("<III", memory.read(gpa, 12))
    return int(sec * NS_PER_S + nsec)


def vcpu0_reading(memory: GuestMemory, stopped: Callable[[], AbstractContextManager[object]]) -> tuple[int, int]:
    """vCPU 0's newest reading, its TSC and ns, by the page that it has now; StateError if it does not read.

    stopped: keeps the vCPUs out of the guest meanwhile, or does nothing.  A reading is taken only if the page gives its
    ns for its TSC: so neither half of two readings counts, nor one by an older page.
    """
    deadline = time.monotonic() + READING_LIMIT_S
    while time.monotonic() < deadline:
        with stopped():
            record, page = probe.read_record(memory, 0), _read_page(memory, 0)
        if shown_by(page, record.last_tsc) == record.last_ns:
            return record.last_tsc, record.last_ns
        time.sleep(READING_PAUSE_S)
    raise StateError("observe", "vCPU 0 of clockprobe does not read", "give it a CPU, and its own memory")


def shown_by(page: TimeInfo, tsc: int) -> int:
    """The time in ns that a guest computes from `page` at its TSC `tsc`."""
    scale = ClockScale(page.tsc_to_system_mul, page.tsc_shift)
    return (page.system_time + scale.to_ns((tsc - page.tsc_timestamp) & U64_MASK)) & U64_MASK


def failures(records: Iterable[ProbeRecord]) -> dict[str, int]:
    """Backward, wild and torn readings, summed over `records`: a correct clock gives none."""
    kinds = ("backward_own", "backward_cross", "wild", "torn")
    found = list(records)
    return {kind: sum(getattr(record, kind) for record in found) for kind in kinds}


def _read_page(memory: GuestMemory, vcpu: int) -> TimeInfo:
    return time_info(memory.read(probe.time_page_address(vcpu), TIME_INFO.size))
