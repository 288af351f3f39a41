"""The tables of a measurement from inside a guest: its clocks in numbers, and what it was promised beside the facts."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Final, NamedTuple

from rich.text import Text

from pvclock.commands.tables import Table
from pvclock.meter.inside import ProbeRecord, Verdict
from pvclock.meter.inside.advice import STOPPED_CLEARED
from pvclock.meter.inside.promises import FrequencyClaim
from pvclock.meter.inside.rates import Interval, tsc_hz_by
from pvclock.meter.inside.record import FLOOR_UNKNOWN, ClockRecord, StepRecord
from pvclock.meter.inside.references import independent_references, off_ppb
from pvclock.meter.inside.windows import Window, all_windows, unit_ns
from pvclock.meter.inside.words import at_least, between, floor_in_words, hz_in_words, ppm_between, signed_between
from pvclock.meter.watch.words import counted

__all__ = ["ClockRow", "clock_rows", "clocks_table", "promises_table"]

PPB: Final = 10**9


class ClockRow(NamedTuple):
    """One clock in numbers.

    apart_cpus: the two CPUs that are furthest apart for sure, or else whose window is the widest; b's reading minus a's
    is from apart_low_ns to apart_high_ns.  None: no two CPUs were compared; low above high: it moved.
    rate_low_ppb, rate_high_ppb: against the first CPU's TSC and its frequency as it was taken; None for the TSC, of
    which there are no steps either: step_reads is 0.
    """

    name: str
    apart_cpus: tuple[int, int] | None
    apart_low_ns: float | None
    apart_high_ns: float | None
    warps: int
    largest_warp_ns: float | None
    largest_warp_cpus: tuple[int, int] | None
    cell_reads: int
    steps: int
    step_floor_ns: float
    largest_forward_ns: float | None
    largest_backward_ns: float | None
    step_reads: int
    rate_low_ppb: float | None
    rate_high_ppb: float | None


def clock_rows(record: ProbeRecord) -> list[ClockRow]:
    """Each clock of a record in numbers."""
    return [_row(record, clock) for clock in record.clocks]


def clocks_table(record: ProbeRecord) -> Table:
    """A row a clock: how far CPUs are apart by it, where it went back, its steps and its rate."""
    table = Table("clock", "CPUs apart by", "went back between CPUs", "steps against the TSC", "rate against the TSC")
    for clock in record.clocks:
        table.add_row(
            clock.name, _apart(record, clock), _warps(record, clock), _steps(record, clock), _rate(record, clock)
        )
    return table


def promises_table(record: ProbeRecord, verdict: Verdict) -> Table:
    """What this guest is told, beside what was found of it."""
    table = Table("promise", "what the guest is told", "what was found")
    for promise, told, found in _promises(record, verdict):
        table.add_row(promise, told, found)
    return table


# The clocks, in numbers


def _row(record: ProbeRecord, clock: ClockRecord) -> ClockRow:
    apart = _furthest(clock, len(record.cpus))
    warp = max(clock.warps, key=lambda each: each.largest, default=None)
    rate = None if clock is record.tsc else _rate_ppb(record, clock)
    return ClockRow(
        name=clock.name,
        apart_cpus=apart and _numbers(record, *apart.cpus),
        apart_low_ns=apart and float(apart.window.low),
        apart_high_ns=apart and float(apart.window.high),
        warps=sum(each.times for each in clock.warps),
        largest_warp_ns=warp and _ns(warp.largest, clock),
        largest_warp_cpus=warp and _numbers(record, warp.writer, warp.reader),
        cell_reads=clock.cell_reads,
        steps=clock.steps.beyond_floor,
        step_floor_ns=_ns(clock.steps.floor, clock),
        largest_forward_ns=_step_ns(clock.steps.forward, clock),
        largest_backward_ns=_step_ns(clock.steps.backward, clock),
        step_reads=0 if clock is record.tsc else clock.steps.reads,
        rate_low_ppb=rate and float(rate.low),
        rate_high_ppb=rate and float(rate.high),
    )


class _Apart(NamedTuple):
    cpus: tuple[int, int]
    window: Window


def _furthest(clock: ClockRecord, cpus: int) -> _Apart | None:
    """The two CPUs that are furthest apart for sure, else those that may be."""
    windows = [_Apart(pair, window) for pair, window in all_windows(clock, cpus).items() if window is not None]
    return max(windows, key=lambda each: _how_far(each.window), default=None)


def _how_far(window: Window) -> tuple[Fraction, Fraction]:
    return max(window.low, -window.high, Fraction(0)), max(map(abs, window.edges))


def _numbers(record: ProbeRecord, a: int, b: int) -> tuple[int, int]:
    return record.cpus[a].cpu, record.cpus[b].cpu


def _rate_ppb(record: ProbeRecord, clock: ClockRecord) -> Interval | None:
    """How much faster than its frequency the clock runs by the TSC's."""
    hz = tsc_hz_by(clock)
    return hz and Interval(_ppb(record.tsc_hz, hz.high), _ppb(record.tsc_hz, hz.low))


def _ppb(hz: int | Fraction, of_hz: int | Fraction) -> Fraction:
    return (Fraction(hz) / of_hz - 1) * PPB


def _step_ns(step: StepRecord | None, clock: ClockRecord) -> float | None:
    """A step's least size, with its sign."""
    return step and _ns(min(step.low, step.high, key=abs), clock)


def _ns(units: int, clock: ClockRecord) -> float:
    return float(units * unit_ns(clock))


# The clocks, in words


def _apart(record: ProbeRecord, clock: ClockRecord) -> str:
    apart = _furthest(clock, len(record.cpus))
    if apart is None:
        return "not compared"
    first, second = _numbers(record, *apart.cpus)
    pair, window = f"CPU {second} minus CPU {first}", apart.window
    if window.low > window.high:
        return f"{pair}: moves, by {at_least(window.low - window.high)} or more"
    return f"{pair}: {signed_between(window.low, window.high)}"


def _warps(record: ProbeRecord, clock: ClockRecord) -> str:
    if not clock.cell_reads:
        return "not compared"
    largest = max(clock.warps, key=lambda each: each.largest, default=None)
    if largest is None:
        return f"never, in {counted(clock.cell_reads, 'reading')}"
    earlier, later = _numbers(record, largest.writer, largest.reader)
    times, size = sum(each.times for each in clock.warps), at_least(largest.largest * unit_ns(clock))
    return f"{counted(times, 'time')}, by up to {size}: CPU {later} after CPU {earlier}"


def _steps(record: ProbeRecord, clock: ClockRecord) -> str:
    steps = clock.steps
    if clock is record.tsc or not steps.reads:
        return "-"
    largest = [
        f"{way} by {between(abs(step.low) * unit_ns(clock), abs(step.high) * unit_ns(clock))}"
        for way, step in (("forward", steps.forward), ("back", steps.backward))
        if step
    ]
    if largest:
        return f"{steps.beyond_floor:,}, the largest {' and '.join(largest)}"
    if steps.floor >= FLOOR_UNKNOWN:
        return "the run was too short to tell"
    return f"none beyond {floor_in_words(steps.floor * unit_ns(clock))}"


def _rate(record: ProbeRecord, clock: ClockRecord) -> str:
    rate = None if clock is record.tsc else _rate_ppb(record, clock)
    return ppm_between(*rate) if rate else "-"


# Promises and facts


def _promises(record: ProbeRecord, verdict: Verdict) -> Iterator[tuple[str, str, str | Text]]:
    told = verdict.promises
    yield "STABLE: vCPUs' clocks agree", _stable(verdict), _kept(verdict, "stable", told.kvm_stable)
    yield "invariant TSC", _invariant(verdict), _kept(verdict, "invariant-tsc", told.invariant_tsc)
    for claim in told.frequencies:
        yield f"TSC frequency by {claim.source}", hz_in_words(claim.hz), _off(record, claim)
    for page in record.pages:
        if page.stopped_looks:
            looks = f"set at {page.stopped_looks} of {counted(page.looks, 'look')}"
            yield f"GUEST_STOPPED, vCPU {page.cpu}", STOPPED_CLEARED, looks


def _invariant(verdict: Verdict) -> str:
    if verdict.promises.invariant_tsc:
        return "offered"
    return "not offered, but constant" if verdict.promises.constant_tsc else "not offered"


def _stable(verdict: Verdict) -> str:
    in_pages = {None: "", True: "; set in every page", False: "; not set in every page"}
    offered = "offered" if verdict.promises.kvm_stable else "not offered"
    return offered + in_pages[verdict.promises.has_stable_pages]


def _kept(verdict: Verdict, promise: str, is_offered: bool) -> str | Text:
    if any(finding.promise == promise for finding in verdict.findings):
        return Text("NOT kept", "red")
    if verdict.is_added:
        return "not judged with --add"
    if len(verdict.cpus) == 1:
        return "one CPU cannot tell"
    return "nothing against it" if is_offered else "-"


def _off(record: ProbeRecord, claim: FrequencyClaim) -> str:
    """Against a clock that does not go by what the guest is told of the TSC."""
    best = next(iter(independent_references(record)), None)
    if best is None:
        return "nothing independent here"
    return f"{ppm_between(*off_ppb(claim, best.hz))} by {best.words}"
