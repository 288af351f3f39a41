"""What a clock did during the run that no clock may do: offsets that move, and a rate that changes."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from pvclock.meter.inside.advice import Remedies
from pvclock.meter.inside.apart import Windows
from pvclock.meter.inside.drift import Drift, drift_of
from pvclock.meter.inside.majority import outliers
from pvclock.meter.inside.rates import rate_change
from pvclock.meter.inside.record import ClockRecord, PairRecord, ProbeRecord
from pvclock.meter.inside.references import may_have_lost_time
from pvclock.meter.inside.symptoms import sees_drift, title
from pvclock.meter.inside.verdict import Finding, FindingCode, Weight
from pvclock.meter.inside.words import at_least, cpus_in_words, ppm_between

__all__ = ["DISCIPLINED", "drift_findings", "rate_findings"]

DISCIPLINED = frozenset({"monotonic"})
"""Clocks whose rate the guest's own NTP changes, which is no fault."""
NTP_SLEWS_PPB = 1_001_000
"""From one end of NTP's 500 ppm to the other: what a host's may do to devices that it emulates."""


def drift_findings(record: ProbeRecord, clock: ClockRecord, windows: Windows, remedies: Remedies) -> list[Finding]:
    """One finding of the pair that moved most, which names the CPU that moved if it did against most others."""
    moves = {(min(pair.a, pair.b), max(pair.a, pair.b)): pair for pair in clock.pairs if _is_moved(windows, pair)}
    drifts = {both: drift for both, pair in moves.items() if (drift := drift_of(pair, clock, record.tsc_hz))}
    proven = [both for both, drift in drifts.items() if drift.moved_ns]
    torn = [pair for pair in clock.pairs if _is_torn(windows, pair)]
    found = [_torn(record, clock, torn[0], remedies)] if torn else []
    if proven:
        both = max(proven, key=lambda each: abs(drifts[each].moved_ns))
        who = [cpu for cpu in both if cpu in _who_moved(moves, drifts, len(record.cpus))]
        return [_drift_told(record, clock, moves[both], drifts[both], who, remedies), *found]
    return [_unsteady(record, clock, next(iter(moves.values())), remedies), *found] if moves else found


def rate_findings(record: ProbeRecord, clock: ClockRecord, remedies: Remedies) -> list[Finding]:
    """The rate against the TSC changed, and no step explains it, nor that a timer was not read for long."""
    if may_have_lost_time(record, clock):
        return []
    change = rate_change(clock)
    if clock.name in DISCIPLINED or change is None or clock.steps.forward or clock.steps.backward:
        return []
    if (proven := max(change.ppb.low, -change.ppb.high)) <= 0:
        return []
    began = clock.samples[0].tsc_before
    times = [_seconds(each - began, record.tsc_hz) for each in (*change.earlier, *change.later)]
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


def _is_torn(windows: Windows, pair: PairRecord) -> bool:
    window = windows.get((min(pair.a, pair.b), max(pair.a, pair.b)))
    return window is not None and window.is_torn


def _who_moved(
    moves: Mapping[tuple[int, int], PairRecord], drifts: Mapping[tuple[int, int], Drift], cpus: int
) -> set[int]:
    """The CPUs that moved one way against a majority, of which none did against another."""

    def side(a: int, b: int) -> int:
        both = min(a, b), max(a, b)
        moved = drifts[both].moved_ns if both in drifts else Fraction(0)
        way = (moved > 0) - (moved < 0)
        return way if both in moves and moves[both].b == b else -way

    return {cpu for each in outliers(cpus, side, lambda a, b: side(a, b) != 0) for cpu in each.cpus}


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
        what += (
            f"; it is {named} that moved, against most others, of which none is proven to have moved against another"
        )
    elif len(record.cpus) == 2:
        what += "; two CPUs cannot tell which of them moved"
    else:
        what += "; which of the two moved is open, for neither is proven to have moved against most CPUs"
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


def _torn(record: ProbeRecord, clock: ClockRecord, pair: PairRecord, remedies: Remedies) -> Finding:
    why = (
        ": within an eighth of the run their readings did not stand still to each other; which it was, and which of "
        "them was ahead, they do not tell"
    )
    how = "moved, or both clocks went back"
    return _not_still(record, clock, pair, remedies, FindingCode.UNSTEADY, how, why)


def _unsteady(record: ProbeRecord, clock: ClockRecord, pair: PairRecord, remedies: Remedies) -> Finding:
    return _not_still(record, clock, pair, remedies, FindingCode.DRIFT, "did not stand still during the run")


def _not_still(
    record: ProbeRecord,
    clock: ClockRecord,
    pair: PairRecord,
    remedies: Remedies,
    code: FindingCode,
    how: str,
    why: str = "",
) -> Finding:
    """The offset of two CPUs was not one all the time, and which of them it was is not known."""
    a, b = (record.cpus[place].cpu for place in (pair.a, pair.b))
    headline = f"the offset of CPU {b}'s {title(clock.name)} from CPU {a}'s {how}"
    sees, change = sees_drift(clock.name), remedies.for_offset()
    return Finding(code, Weight.FAULT, clock.name, headline, headline + why, sees, change, (a, b), "max_drift")


def _seconds(ticks: int, tsc_hz: int) -> str:
    return f"{ticks / tsc_hz:.2f} s"
