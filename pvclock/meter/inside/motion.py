"""What a clock did during the run that no clock may do: offsets that move, steps, and a rate that changes."""

from __future__ import annotations

from fractions import Fraction

from pvclock.meter.inside.apart import Windows, groups_of
from pvclock.meter.inside.drift import Drift, drift_of
from pvclock.meter.inside.rates import rate_change
from pvclock.meter.inside.record import ClockRecord, PairRecord, ProbeRecord, StepRecord
from pvclock.meter.inside.remedies import Remedies
from pvclock.meter.inside.symptoms import sees_drift, sees_step, title
from pvclock.meter.inside.verdict import Finding, FindingCode, Weight
from pvclock.meter.inside.windows import Window, unit_ns
from pvclock.meter.inside.words import at_least, between, cpus_in_words, ppm_between

__all__ = ["DISCIPLINED", "drift_findings", "rate_findings", "step_findings"]

DISCIPLINED = frozenset({"monotonic"})
"""Clocks whose rate the guest's own NTP changes, which is no fault."""
NTP_SLEWS_PPB = 1_001_000
"""From one end of NTP's 500 ppm to the other: what a host's may do to devices that it emulates."""


def drift_findings(record: ProbeRecord, clock: ClockRecord, windows: Windows, remedies: Remedies) -> list[Finding]:
    """One finding of the pair that moved most, which names the CPU that moved if most others stood still."""
    moved = [pair for pair in clock.pairs if _is_moved(windows, pair)]
    drifts = [(pair, drift) for pair in moved if (drift := drift_of(pair, clock, record.tsc_hz))]
    proven = [(pair, drift) for pair, drift in drifts if drift.moved_ns]
    if proven:
        pair, drift = max(proven, key=lambda each: abs(each[1].moved_ns))
        return [_drift_told(record, clock, pair, drift, _who_moved(windows, len(record.cpus)), remedies)]
    return [_unsteady(record, clock, moved[0], remedies)] if moved else []


def step_findings(clock: ClockRecord, tsc_hz: int, remedies: Remedies) -> list[Finding]:
    """The largest step each way: proven, also where the floor, which is of the widest readings, is above it."""
    steps = clock.steps
    return [
        _step_told(clock, step, tsc_hz, remedies, is_back=is_back)
        for step, is_back in ((steps.backward, True), (steps.forward, False))
        if step
    ]


def rate_findings(clock: ClockRecord, tsc_hz: int, remedies: Remedies) -> list[Finding]:
    """The rate against the TSC changed, and no step explains it."""
    change = rate_change(clock)
    if clock.name in DISCIPLINED or change is None or clock.steps.forward or clock.steps.backward:
        return []
    if (proven := max(change.ppb.low, -change.ppb.high)) <= 0:
        return []
    began = clock.samples[0].tsc_before
    times = [_seconds(each - began, tsc_hz) for each in (*change.earlier, *change.later)]
    headline = f"{title(clock.name)} changed its rate against the TSC by {ppm_between(*change.ppb)}"
    what = (
        f"{headline}: from {times[2]} to {times[3]} of the run it was another than from {times[0]} to {times[1]}; one "
        "of the two clocks did it"
    )
    is_fault = proven > NTP_SLEWS_PPB
    if not is_fault:
        what += ", and a host whose NTP slews does as much to what it emulates by its own clock"
    return [
        Finding(
            FindingCode.RATE_CHANGED,
            Weight.FAULT if is_fault else Weight.NOTE,
            clock.name,
            headline,
            what,
            "what converts ticks to time by one factor is wrong from then on; NTP has to find the new rate.",
            remedies.for_rate(),
            budget="max_drift",
        )
    ]


# Inside


def _is_moved(windows: Windows, pair: PairRecord) -> bool:
    window = windows.get((min(pair.a, pair.b), max(pair.a, pair.b)))
    return window is not None and window.moved


def _who_moved(windows: Windows, cpus: int) -> list[int]:
    """The CPUs that moved against a majority, in which none did against another; none if there is no majority."""
    still = groups_of({pair: _only_moved(window) for pair, window in windows.items()}, cpus)
    if cpus < 3 or len(still) < 2 or len(still[0]) * 2 <= cpus:
        return []
    return sorted(cpu for group in still[1:] for cpu in group)


def _only_moved(window: Window | None) -> Window | None:
    """A window that is apart if, and only if, that one is a pair's own and moved."""
    if window is None or not (window.moved and window.is_direct):
        return None
    return window._replace(low=Fraction(1), high=Fraction(2))


def _drift_told(
    record: ProbeRecord, clock: ClockRecord, pair: PairRecord, drift: Drift, who: list[int], remedies: Remedies
) -> Finding:
    a, b = (record.cpus[place].cpu for place in (pair.a, pair.b))
    way = "ahead of" if drift.moved_ns > 0 else "behind"
    headline = (
        f"CPU {b}'s {title(clock.name)} went {at_least(drift.moved_ns)} or more further {way} CPU {a}'s during the run"
    )
    what = headline + _rate_told(drift)
    if who:
        named = cpus_in_words([record.cpus[place].cpu for place in who])
        what += f"; it is {named} that moved: the others stood still to each other"
    elif len(record.cpus) == 2:
        what += "; two CPUs cannot tell which of them moved"
    return Finding(
        FindingCode.DRIFT,
        Weight.FAULT,
        clock.name,
        headline,
        what,
        sees_drift(clock.name),
        remedies.for_offset(),
        tuple(record.cpus[place].cpu for place in who) or (a, b),
        "max_drift",
        abs(drift.moved_ns),
    )


def _rate_told(drift: Drift) -> str:
    if drift.low is not None and drift.high is not None and drift.low <= drift.high:
        return f", at a rate of {ppm_between(drift.low, drift.high)}"
    return ", and not at one rate: it was changed"


def _unsteady(record: ProbeRecord, clock: ClockRecord, pair: PairRecord, remedies: Remedies) -> Finding:
    a, b = (record.cpus[place].cpu for place in (pair.a, pair.b))
    headline = f"the offset of CPU {b}'s {title(clock.name)} from CPU {a}'s did not stand still during the run"
    return Finding(
        FindingCode.DRIFT,
        Weight.FAULT,
        clock.name,
        headline,
        headline,
        sees_drift(clock.name),
        remedies.for_offset(),
        (a, b),
        "max_drift",
    )


def _step_told(clock: ClockRecord, step: StepRecord, tsc_hz: int, remedies: Remedies, *, is_back: bool) -> Finding:
    unit = unit_ns(clock)
    low, high = sorted((abs(step.low) * unit, abs(step.high) * unit))
    samples = clock.samples
    when = (
        _seconds(step.at_tsc - samples[0].tsc_before, tsc_hz)
        if samples and samples[0].tsc_before
        else "an unknown time"
    )
    way, times = ("back" if is_back else "forward"), clock.steps.beyond_floor
    more = f"; it was the largest of {times:,} steps" if times > 1 else ""
    headline = f"{title(clock.name)} stepped {way} by {between(low, high)} against the TSC, {when} into the run"
    return Finding(
        FindingCode.STEP_BACK if is_back else FindingCode.STEP_FORWARD,
        Weight.FAULT,
        clock.name,
        headline,
        headline + more,
        sees_step(clock.name, between(low, high), is_back=is_back),
        remedies.for_step(),
        budget="max_step",
        low_ns=low,
        high_ns=high,
    )


def _seconds(ticks: int, tsc_hz: int) -> str:
    return f"{ticks / tsc_hz:.2f} s"
