"""The tables of a measurement from inside a guest: its clocks in numbers, and what it was promised beside the facts."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import ceil, floor
from typing import Final, NamedTuple

from rich.text import Text

from pvclock.commands.tables import Table
from pvclock.meter.inside import FindingCode, ProbeRecord, Verdict
from pvclock.meter.inside.rates import Interval, tsc_hz_by
from pvclock.meter.inside.record import ClockRecord, StepRecord
from pvclock.meter.inside.windows import Window, all_windows, unit_ns
from pvclock.meter.inside.words import at_least, floor_in_words, ppm_between
from pvclock.meter.watch.words import about_ns, counted, exact_ns

__all__ = ["ClockRow", "clock_rows", "clocks_table", "promises_table"]

PPB: Final = 10**9


class ClockRow(NamedTuple):
    """One clock in numbers.

    apart_cpus: the two CPUs that are furthest apart for sure, or else whose window is the widest; b's reading less a's
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
    for row in clock_rows(record):
        table.add_row(row.name, _apart(row), _warps(row), _steps(row), _rate(row))
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


def _apart(row: ClockRow) -> str:
    if row.apart_cpus is None or row.apart_low_ns is None or row.apart_high_ns is None:
        return "not compared"
    pair = f"CPU {row.apart_cpus[1]} less CPU {row.apart_cpus[0]}"
    if row.apart_low_ns > row.apart_high_ns:
        return f"{pair}: moves, by {_plain(row.apart_low_ns - row.apart_high_ns)} or more"
    low_ns, high_ns = floor(row.apart_low_ns), ceil(row.apart_high_ns)
    grain_ns = (high_ns - low_ns) // 100
    return f"{pair}: {exact_ns(low_ns, grain_ns)} to {exact_ns(high_ns, grain_ns)}"


def _warps(row: ClockRow) -> str:
    if not row.cell_reads:
        return "not compared"
    if row.largest_warp_cpus is None or row.largest_warp_ns is None:
        return f"never, in {counted(row.cell_reads, 'reading')}"
    earlier, later = row.largest_warp_cpus
    return f"{counted(row.warps, 'time')}, by up to {_plain(row.largest_warp_ns)}: CPU {later} after CPU {earlier}"


def _steps(row: ClockRow) -> str:
    if not row.step_reads:
        return "-"
    if not row.steps:
        return f"none beyond {floor_in_words(Fraction(row.step_floor_ns))}"
    greatest = [about_ns(round(each)) for each in (row.largest_forward_ns, row.largest_backward_ns) if each is not None]
    return f"{row.steps:,}, the greatest {' and '.join(greatest)}"


def _rate(row: ClockRow) -> str:
    if row.rate_low_ppb is None or row.rate_high_ppb is None:
        return "-"
    return ppm_between(Fraction(row.rate_low_ppb), Fraction(row.rate_high_ppb))


def _plain(ns: float) -> str:
    return at_least(Fraction(ns))


# Promises and facts


def _promises(record: ProbeRecord, verdict: Verdict) -> Iterator[tuple[str, str, str | Text]]:
    told = verdict.promises
    yield "hypervisor", told.hypervisor, ", ".join(f"{it.signature} at {it.leaf:#x}" for it in told.hypervisors) or "-"
    yield "clocks", "; ".join(told.clocks) or "none", _taken(record)
    yield "STABLE: vCPUs' clocks agree", _stable(verdict), _kept(verdict, "STABLE", told.kvm_stable)
    yield "invariant TSC", _offered(told.invariant_tsc), _kept(verdict, "invariant", told.invariant_tsc)
    for claim in told.frequencies:
        yield f"TSC frequency by {claim.source}", _mhz(claim.hz), _off(record, claim.hz)
    for page in record.pages:
        if page.stopped_looks:
            looks = f"set at {page.stopped_looks} of {counted(page.looks, 'look')}"
            yield f"GUEST_STOPPED, vCPU {page.cpu}", "cleared by the kernel once it has seen it", looks
    if record.kernel is not None and record.kernel.complaints is None:
        yield "the kernel's complaints", "-", "may not be read (kernel.dmesg_restrict); look with: sudo dmesg"


def _taken(record: ProbeRecord) -> str:
    if record.kernel is None:
        return f"read by the probe: {', '.join(clock.name for clock in record.clocks)}"
    return f"the kernel took {record.kernel.clocksource} of {', '.join(record.kernel.available)}"


def _offered(is_offered: bool) -> str:
    return "offered" if is_offered else "not offered"


def _stable(verdict: Verdict) -> str:
    in_pages = {None: "", True: "; set in every page", False: "; not set in every page"}
    return _offered(verdict.promises.kvm_stable) + in_pages[verdict.promises.has_stable_pages]


def _kept(verdict: Verdict, promise: str, is_offered: bool) -> str | Text:
    broken = [it for it in verdict.findings if it.code is FindingCode.BROKEN_PROMISE and promise in it.what]
    if broken:
        return Text("NOT kept", "red")
    return "nothing against it" if is_offered else "-"


def _off(record: ProbeRecord, hz: Fraction) -> str:
    return (
        f"{float(_ppb(hz, record.tsc_hz)) / 1000:+.2f} ppm of {_mhz(Fraction(record.tsc_hz))} by {record.tsc_hz_from}"
    )


def _mhz(hz: Fraction) -> str:
    return f"{float(hz / 10**6):.3f} MHz"
