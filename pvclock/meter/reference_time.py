"""Hyper-V's reference time as a guest reads it, left alone: hvprobe in a `Machine`, and rows to compare it with others.

Rates are by the page's scale, which is exact; what a guest reads is judged by hvprobe itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from pvclock.clock.guest_clock import GuestClock
from pvclock.errors import StateError
from pvclock.machine.machine import Machine
from pvclock.meter.comparison import Check
from pvclock.meter.figure import Figure
from pvclock.meter.findings import EXIT_LIMIT_S
from pvclock.payloads import hvprobe, probe
from pvclock.payloads.hyperv_probe import HvRecord, read_record, violations
from pvclock.payloads.probe import GuestReader
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc

__all__ = ["ReferenceObservation", "compare_reference_time", "observe_engine", "records_of", "wait_until_reading"]

UNITS_PER_S: Final = 10_000_000
START_LIMIT_S: Final = 60.0
UNIT_NS: Final = 100
AGREEMENT_NS: Final = 2 * UNIT_NS
"""What a page may be off the timeline after any number of changes: see hyperv_publish.h."""
RATE_LIMIT_PPB: Final = 1.0
"""KVM's scale has the 32 bits of kvmclock's, 0.47 ppb; the engine's may carry a remainder of 2^-31 for a while."""
INVALID_SEQUENCES: Final = (0, 2**32 - 1)


class ReferenceObservation(NamedTuple):
    """One VM's reference time, as its guest saw it.

    server: "engine" or "qemu".  ahead_ns: of the last readings of the page against the same VM's guest time, the one
    that is furthest off; None where the server does not tell guest time.
    """

    server: str
    tsc_hz: int
    records: list[HvRecord]
    ahead_ns: int | None = None

    @property
    def rate_error_ppb(self) -> float:
        """How much faster than the TSC's nominal frequency says."""
        exact = UNITS_PER_S << 64
        return (self.records[0].scale * self.tsc_hz - exact) * NS_PER_S / exact


def observe_engine(vcpus: int, seconds: float) -> ReferenceObservation:
    """The engine's, for `seconds` beside the pvclock pages of one VM; StateError if the guest does not read."""
    command = f"cpus={vcpus}"
    with Machine(hvprobe(), vcpus=vcpus, cmdline=command, provider="HyperV+KVM") as machine:
        machine.start()
        wait_until_reading(machine.memory, vcpus, lambda: machine.runner.join(0.001))
        time.sleep(seconds)
        clock = machine.clock
        assert clock is not None  # noqa: S101  # the engine's, by default
        probe.stop(machine.memory)
        if machine.wait(EXIT_LIMIT_S) != probe.EXIT_FINE:
            raise StateError("observe", f"hvprobe ended badly, and said {machine.console.strip()}", "try again")
        records = records_of(machine.memory, vcpus)
        return ReferenceObservation("engine", clock.tsc_hz, records, _most_ahead_ns(clock, records))


def wait_until_reading(memory: GuestReader, vcpus: int, has_ended: Callable[[], bool]) -> None:
    """Return when all vCPUs of a started hvprobe read; StateError if they do not.  has_ended: waits for 1 ms, too."""
    deadline = time.monotonic() + START_LIMIT_S
    while any(record.rounds == 0 for record in records_of(memory, vcpus)):
        if has_ended() or time.monotonic() > deadline:
            raise StateError("observe", "hvprobe does not read on all vCPUs", "try again")


def records_of(memory: GuestReader, vcpus: int) -> list[HvRecord]:
    """What the vCPUs have found so far."""
    return [read_record(memory, vcpu) for vcpu in range(vcpus)]


def _most_ahead_ns(clock: GuestClock, records: list[HvRecord]) -> int:
    """How far the vCPUs' last readings of the page are from guest time at those TSCs, at most."""
    offset = clock.tsc(0).offset
    return max(
        (
            record.page_units * UNIT_NS - int(clock.at(HostTsc((record.page_tsc - offset) & U64_MASK)))
            for record in records
        ),
        key=abs,
    )


class Subjects(NamedTuple):
    """What is compared, by server: "engine" and "qemu"."""

    observed: dict[str, ReferenceObservation]

    def row(
        self,
        name: str,
        key: str,
        value: Callable[[ReferenceObservation], object],
        show: str,
        is_right: Callable[[ReferenceObservation], bool],
        why: str,
    ) -> Check:
        """A row of each server's `value`, as `show` formats it; "-" where there is none."""
        figures = {server: Figure("-") for server in ("engine", "qemu")}
        for server, each in self.observed.items():
            found = value(each)
            figures[server] = Figure("-") if found is None else Figure(show.format(found), {key: found})
        return Check(name, figures, all(map(is_right, self.observed.values())), why)


def compare_reference_time(observed: Sequence[ReferenceObservation]) -> list[Check]:
    """All rows; of "engine", and of "qemu", which has "-" where it was not observed."""
    subjects = Subjects({each.server: each for each in observed})
    return [*_page_rows(subjects), *_reading_rows(subjects), _agreement_row(subjects)]


def _page_rows(subjects: Subjects) -> Iterator[Check]:
    yield subjects.row(
        "page: scale",
        "scale",
        lambda it: it.records[0].scale,
        "{:#018x}",
        lambda it: len({each.scale for each in it.records}) == 1,
        "units of 100 ns in 2^64 ticks, the same on all vCPUs; KVM's has 32 bits of kvmclock's, the engine's all 64",
    )
    yield subjects.row(
        "page: rate by the TSC",
        "rate_error_ppb",
        lambda it: it.rate_error_ppb,
        "{:+.6f} ppb",
        lambda it: abs(it.rate_error_ppb) <= RATE_LIMIT_PPB,
        f"against the TSC's nominal frequency, within {RATE_LIMIT_PPB:g} ppb: KVM's has the error of kvmclock's pair",
    )
    yield subjects.row(
        "page: sequence",
        "sequence",
        lambda it: it.records[0].sequence,
        "{}",
        lambda it: all(each.sequence not in INVALID_SEQUENCES for each in it.records),
        "not 0 and not 2^32 - 1: the page is valid",
    )


def _reading_rows(subjects: Subjects) -> Iterator[Check]:
    yield subjects.row(
        "readings of the page",
        "reads",
        lambda it: sum(each.reads - each.fallbacks for each in it.records),
        "{:,}",
        lambda it: all(each.reads > each.fallbacks for each in it.records),
        "every vCPU read it, in Linux's order and in the TLFS's",
    )
    yield subjects.row(
        "page, counter, page",
        "triples",
        lambda it: sum(each.triples for each in it.records),
        "{:,}",
        lambda it: all(each.triples > 0 for each in it.records),
        "how often every vCPU read the counter between two readings of the page",
    )
    yield subjects.row(
        "backward, torn or out of order",
        "wrong_reads",
        lambda it: sum(sum(violations(each).values()) for each in it.records),
        "{}",
        lambda it: not any(sum(violations(each).values()) for each in it.records),
        "by the guests' own count: page <= counter <= page, on one vCPU and across vCPUs, and sequences that go on",
    )


def _agreement_row(subjects: Subjects) -> Check:
    return subjects.row(
        "page against guest time",
        "ahead_ns",
        lambda it: it.ahead_ns,
        "{:+} ns",
        lambda it: it.ahead_ns is None or abs(it.ahead_ns) <= AGREEMENT_NS,
        f"the last readings against the same VM's time, as its pvclock pages have it, within 2 units ({AGREEMENT_NS} "
        "ns); QEMU does not tell",
    )
