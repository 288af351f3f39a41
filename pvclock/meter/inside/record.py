"""The measurement from inside a guest as values: `pvclock.probe-record/1`, whose keys docs/probe.md explains.

All numbers are whole, and a clock's are in its own units, of which `hz` make a second.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = [
    "CPUS_MAX",
    "FLOOR_UNKNOWN",
    "SCHEMA",
    "SLICES",
    "ClockRecord",
    "ConsoleRecord",
    "Cpu",
    "KernelRecord",
    "Leaf",
    "PageRecord",
    "PairRecord",
    "ProbeRecord",
    "Sample",
    "Slice",
    "StepRecord",
    "StepsRecord",
    "WarpRecord",
]

SCHEMA: Final = "pvclock.probe-record/1"
CPUS_MAX: Final = 64
SLICES: Final = 8
"""The run, cut: an offset that moves shows between the first and the last."""
FLOOR_UNKNOWN: Final = (1 << 63) - 1
"""A step's floor where the probe did not learn the clock's rate in the time."""


class Cpu(NamedTuple):
    """cpu: the operating system's number, or the order of arrival."""

    cpu: int
    apic_id: int | None


class Leaf(NamedTuple):
    """What CPUID returned for one leaf."""

    leaf: int
    subleaf: int
    eax: int
    ebx: int
    ecx: int
    edx: int


class PageRecord(NamedTuple):
    """A vCPU's pvclock record; its GUEST_STOPPED flag was set at `stopped_looks` of `looks`."""

    cpu: int
    version: int
    mul: int
    shift: int
    flags: int
    looks: int
    stopped_looks: int


class Sample(NamedTuple):
    """A clock between two readings of the first CPU's TSC."""

    tsc_before: int
    clock: int
    tsc_after: int


class Slice(NamedTuple):
    """An eighth of the run: low <= b's reading - a's <= high, if that stood still; None where no round ended."""

    at_tsc: int
    low: int | None
    high: int | None


class PairRecord(NamedTuple):
    """An exchange of two CPUs, by their places in ProbeRecord.cpus."""

    a: int
    b: int
    rounds: int
    slices: tuple[Slice, ...]


class WarpRecord(NamedTuple):
    """CPU `reader` read less than `writer` had read before it, so many `times`, and by up to `largest`."""

    writer: int
    reader: int
    times: int
    largest: int


class StepRecord(NamedTuple):
    """A step of `low` to `high` units, both of its sign."""

    low: int
    high: int
    at_tsc: int


class StepsRecord(NamedTuple):
    """The largest steps each way, or None, and how many were `beyond_floor`."""

    reads: int
    floor: int
    forward: StepRecord | None
    backward: StepRecord | None
    beyond_floor: int


class ClockRecord(NamedTuple):
    """A clock, compared with itself on other CPUs and with the first CPU's TSC."""

    name: str
    hz: int
    samples: tuple[Sample, ...]
    pairs: tuple[PairRecord, ...]
    warps: tuple[WarpRecord, ...]
    cell_reads: int
    steps: StepsRecord


class KernelRecord(NamedTuple):
    """Linux: its clock sources, and what it complained of; complaints: None if they may not be read."""

    release: str
    clocksource: str
    available: tuple[str, ...]
    command_line: str
    complaints: tuple[str, ...] | None


class ConsoleRecord(NamedTuple):
    """Bare: the consoles that it found, and by which MSRs the clocks were enabled."""

    com1: object
    debug_port: object
    pvclock_msr: object
    hyperv_msr: object


class ProbeRecord(NamedTuple):
    """One measurement; clocks[0] is the TSC.  added_ns: a fault that was put in, one number a CPU.

    cpus_present: how many CPUs the system has, measured or not; None: an older probe, which does not say.
    """

    version: str
    form: str
    tsc_hz: int
    tsc_hz_from: str
    milliseconds: int
    cpus: tuple[Cpu, ...]
    added_ns: tuple[int, ...]
    cpuid: tuple[Leaf, ...]
    pages: tuple[PageRecord, ...]
    clocks: tuple[ClockRecord, ...]
    kernel: KernelRecord | None
    console: ConsoleRecord | None
    cpus_present: int | None

    @property
    def tsc(self) -> ClockRecord:
        """The TSC's own comparison."""
        return self.clocks[0]
