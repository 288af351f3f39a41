"""Budgets held against a measurement from inside: broken, kept, or left open, each with its reason in words.

A budget is broken only by what is proven at the better end of its bound, and kept only where the worse end keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from typing import Final, NamedTuple

from pvclock.meter.inside.apart import Windows
from pvclock.meter.inside.drift import drift_of
from pvclock.meter.inside.motion import DISCIPLINED
from pvclock.meter.inside.rates import Interval, rate_change
from pvclock.meter.inside.record import FLOOR_UNKNOWN, ClockRecord, ProbeRecord
from pvclock.meter.inside.symptoms import title
from pvclock.meter.inside.verdict import Budgets, OpenQuestion, OpenReason
from pvclock.meter.inside.windows import unit_ns
from pvclock.meter.inside.words import at_least, between, floor_in_words, ppm_between, rate_in_words

__all__ = ["BudgetsOutcome", "check_budgets"]

COARSE: Final = frozenset({"pit", "acpi_pm"})
"""Clocks that others are measured by: their units leave a budget open, and only what they prove counts."""
UNDISCIPLINED: Final = "monotonic_raw"
"""Linux makes it and CLOCK_MONOTONIC of the same counter: a step of that is in both, and told better in this."""


class BudgetsOutcome(NamedTuple):
    """What broke a budget, and what leaves one open."""

    broken: list[str]
    open: list[OpenQuestion]

    def leave_open(self, reason: OpenReason, what: str, seconds: int | None = None) -> None:
        """Note one more open question."""
        self.open.append(OpenQuestion(reason, what, seconds))

    def note(self, worst: _Worst, what: str, reason: OpenReason, seconds: int | None = None) -> None:
        """Note what broke the budget, or, if that is not proven, what leaves it open and why."""
        if worst.is_broken:
            self.broken.append(what)
        else:
            self.leave_open(reason, what, seconds)


class _Range(NamedTuple):
    """A quantity without its sign: `least` is proven, `most` is possible (None: anything), of `whose`."""

    whose: str
    least: Fraction
    most: Fraction | None


class _Worst(NamedTuple):
    """The worst range of a budget, proven to be beyond it or not."""

    range: _Range
    is_broken: bool


def check_budgets(record: ProbeRecord, windows: Mapping[str, Windows], budgets: Budgets) -> BudgetsOutcome:
    """Hold the measurement against all three budgets."""
    found = BudgetsOutcome([], [])
    if budgets.max_warp_ns is not None:
        _check_warps(found, record, windows, budgets.max_warp_ns)
    if budgets.max_step_ns is not None:
        _check_steps(found, record, budgets.max_step_ns)
    if budgets.max_drift_ppb is not None:
        _check_drifts(found, record, budgets.max_drift_ppb)
    return found


# Warps


def _check_warps(found: BudgetsOutcome, record: ProbeRecord, windows: Mapping[str, Windows], most_ns: Fraction) -> None:
    if len(record.cpus) == 1 and record.cpus_present != 1:
        only = f"only CPU {record.cpus[0].cpu} was measured, and --max-warp is for two or more"
        found.leave_open(OpenReason.ONE_CPU, only)
    elif len(record.cpus) > 1 and not windows:
        found.leave_open(OpenReason.NOT_COMPARED, "no clock was compared between CPUs, so --max-warp is open")
    for clock in record.clocks:
        if worst := _worst(_apart_ranges(record, clock, windows.get(clock.name, {})), most_ns):
            told = worst.range
            apart = f"{title(clock.name)}: {told.whose} {_span_ns(told, 'are', 'may be')} apart"
            reason = OpenReason.NOT_COMPARED if told.most is None else OpenReason.FLOOR_BETWEEN_CPUS
            found.note(worst, f"{apart}; the budget is {floor_in_words(most_ns)}", reason)


def _apart_ranges(record: ProbeRecord, clock: ClockRecord, windows: Windows) -> list[_Range]:
    """Of every two CPUs: a warp proves what it is, and the window alone bounds what may be."""
    largest: dict[tuple[int, int], Fraction] = {}
    for warp in clock.warps:
        pair = min(warp.writer, warp.reader), max(warp.writer, warp.reader)
        if warp.times:
            largest[pair] = max(largest.get(pair, Fraction(0)), warp.largest * unit_ns(clock))
    ranges = []
    for pair, window in windows.items():
        least = largest.pop(pair, Fraction(0))
        if window is None:
            ranges.append(_Range(_both(record, *pair), least, None))
        else:
            least = max(least, window.low, -window.high)
            ranges.append(_Range(_both(record, *pair), least, max(least, *(abs(edge) for edge in window.edges))))
    return ranges + [_Range(_both(record, *pair), size, None) for pair, size in largest.items()]


def _both(record: ProbeRecord, a: int, b: int) -> str:
    first, second = record.cpus[a].cpu, record.cpus[b].cpu
    return f"two readings of CPU {first}" if a == b else f"CPUs {first} and {second}"


# Steps


def _check_steps(found: BudgetsOutcome, record: ProbeRecord, most_ns: Fraction) -> None:
    searched = [clock for clock in record.clocks if clock.steps.reads and clock is not record.tsc]
    blunt = COARSE | (DISCIPLINED if any(clock.name == UNDISCIPLINED for clock in searched) else frozenset())
    if not any(clock.name not in blunt for clock in searched):
        found.leave_open(OpenReason.SHORT_RUN, "no clock was searched for steps, so --max-step is open")
    for clock in searched:
        if worst := _worst(_step_ranges(clock, is_blunt=clock.name in blunt), most_ns):
            told = worst.range
            stepped = f"{title(clock.name)} {_span_ns(told, 'stepped by', 'may have stepped by')}"
            reason = OpenReason.SHORT_RUN if told.most is None else OpenReason.FLOOR_OF_STEPS
            found.note(worst, f"{stepped}; the budget is {floor_in_words(most_ns)}", reason)


def _step_ranges(clock: ClockRecord, *, is_blunt: bool) -> list[_Range]:
    """The steps found, and the one that the floor can hide, unless another clock says more of that."""
    unit, steps = unit_ns(clock), clock.steps
    hidden = steps.floor * unit if steps.floor < FLOOR_UNKNOWN else None
    ranges = [] if is_blunt else [_Range(clock.name, Fraction(0), hidden)]
    for step in (steps.forward, steps.backward):
        if step:
            low, high = sorted((abs(step.low) * unit, abs(step.high) * unit))
            ranges.append(_Range(clock.name, low, high))
    return ranges


# Drifts


def _check_drifts(found: BudgetsOutcome, record: ProbeRecord, most_ppb: Fraction) -> None:
    bounds = 0
    for clock in record.clocks:
        ranges = [*_drift_ranges(record, clock), *_rate_ranges(clock)]
        bounds += len(ranges)
        if worst := _worst(ranges, most_ppb):
            told, budget = worst.range, rate_in_words(most_ppb)
            seconds = _seconds_enough(record, told, most_ppb)
            enough = f"; a run of {seconds:,} s can tell" if seconds else ""
            what = f"{title(clock.name)}, {told.whose}: {_span_ppb(told)}; the budget is {budget}{enough}"
            found.note(worst, what, OpenReason.SHORT_RUN, seconds)
    if not bounds:
        found.leave_open(OpenReason.SHORT_RUN, "no drift was measured, so --max-drift is open")


def _drift_ranges(record: ProbeRecord, clock: ClockRecord) -> list[_Range]:
    ranges = []
    for pair in clock.pairs:
        whose = f"CPU {record.cpus[pair.b].cpu} against CPU {record.cpus[pair.a].cpu}"
        drift = drift_of(pair, clock, record.tsc_hz)
        if drift is None or drift.low is None or drift.high is None:
            ranges.append(_Range(whose, Fraction(0), None))
        else:
            ranges.append(_without_sign(whose, Interval(drift.low, drift.high)))
    return ranges


def _rate_ranges(clock: ClockRecord) -> list[_Range]:
    """The change of rate between the run's halves, where neither the guest's NTP nor coarse units make one."""
    if clock.name in DISCIPLINED | COARSE | {"tsc"}:
        return []
    change = rate_change(clock, halves=True)
    whose = "the run's halves against each other, by the TSC"
    return [_without_sign(whose, change.ppb) if change else _Range(whose, Fraction(0), None)]


def _without_sign(whose: str, span: Interval) -> _Range:
    """Bounds that contradict each other come of a rate that was changed; then the outer ones stand."""
    low, high = min(span), max(span)
    least = max(low, -high, Fraction(0))
    return _Range(whose, least, max(abs(low), abs(high)))


def _seconds_enough(record: ProbeRecord, told: _Range, most_ppb: Fraction) -> int | None:
    """A bound goes down as the run's length goes up, if nothing really drifts."""
    if told.most is None or not most_ppb or told.least or not record.milliseconds:
        return None
    return ceil(Fraction(record.milliseconds, 1000) * told.most / most_ppb)


# All


def _worst(ranges: list[_Range], most: Fraction) -> _Worst | None:
    """The worst that is proven beyond the budget; else the worst that may be; None if all are within."""
    proven = [each for each in ranges if each.least > most]
    if proven:
        return _Worst(max(proven, key=lambda each: each.least), is_broken=True)
    unknown = [each for each in ranges if each.most is None]
    if unknown:
        return _Worst(unknown[0], is_broken=False)
    possible = [each for each in ranges if each.most is not None and each.most > most]
    if not possible:
        return None
    return _Worst(max(possible, key=lambda each: each.most or Fraction(0)), is_broken=False)


def _span_ns(told: _Range, is_so: str, may_be: str) -> str:
    if told.most is None:
        return f"{may_be} any time" if not told.least else f"{is_so} {at_least(told.least)} or more"
    if told.most == told.least:
        return f"{is_so} {at_least(told.least)} or more"
    if not told.least:
        return f"{may_be} up to {floor_in_words(told.most)}"
    return f"{is_so} {between(told.least, told.most)}"


def _span_ppb(told: _Range) -> str:
    if told.most is None:
        return "a drift that is not known"
    if not told.least:
        return f"a drift of up to {rate_in_words(told.most)}"
    return f"a drift of {ppm_between(told.least, told.most).replace('+', '')}"
