"""Steps of a clock against the first CPU's TSC, and the TSC's own backward ones: what they prove, and whose they are.

A clock that falls behind the TSC stood still while that ran, as after a pause, or the TSC jumped forward, as at a
restore.  Time went back for a reader only where the step is longer than what passed, which a step does not tell.
"""

from __future__ import annotations

from fractions import Fraction

from pvclock.meter.inside.advice import Remedies
from pvclock.meter.inside.record import FLOOR_UNKNOWN, ClockRecord, ProbeRecord, StepRecord, WarpRecord
from pvclock.meter.inside.symptoms import sees_behind, sees_step, title
from pvclock.meter.inside.verdict import Finding, FindingCode, StepFloor, Weight
from pvclock.meter.inside.windows import all_windows, unit_ns
from pvclock.meter.inside.words import at_least, between, floor_in_words

__all__ = ["step_findings", "step_floors"]

SLEWED = "monotonic"
UNSLEWED = "monotonic_raw"
"""Linux makes both of one counter: what that counter does is in both, and what the guest's NTP does in one alone."""
BEHIND_BY = (
    "it stood still while the TSC ran, as at a pause, a snapshot or a restore, or it was the TSC that jumped forward"
)


def step_findings(record: ProbeRecord, clock: ClockRecord, remedies: Remedies) -> list[Finding]:
    """The largest step each way: proven, also where the floor, which is of the widest readings, is above it."""
    steps, found = clock.steps, []
    if clock is record.tsc:
        return [_tsc_went_back(record, steps.backward, remedies)] if steps.backward else []
    if steps.backward:
        found.append(_behind(record, clock, steps.backward, remedies))
    if steps.forward:
        found.append(_forward(record, clock, steps.forward, remedies))
    return [_of_the_guest(each) if _is_ntps(record, each) else each for each in found]


def step_floors(record: ProbeRecord) -> list[StepFloor]:
    """How small a step of each clock was looked for."""
    return [_step_floor(clock) for clock in record.clocks if clock is not record.tsc]


# Inside


def _tsc_went_back(record: ProbeRecord, step: StepRecord, remedies: Remedies) -> Finding:
    """The first CPU read less of its TSC than before; no budget decides on that."""
    size, low, high = _size(record.tsc, step)
    headline = f"the TSC of CPU {record.cpus[0].cpu} went back by {size}{_when(record, step)}"
    return Finding(
        FindingCode.STEP_BACK,
        Weight.FAULT,
        record.tsc.name,
        headline,
        headline + _more(record.tsc),
        sees_step(record.tsc.name, size, is_back=True),
        remedies.for_step(),
        (record.cpus[0].cpu,),
        low_ns=low,
        high_ns=high,
    )


def _behind(record: ProbeRecord, clock: ClockRecord, step: StepRecord, remedies: Remedies) -> Finding:
    size, low, high = _size(clock, step)
    headline = f"{title(clock.name)} fell behind the TSC by {size}{_when(record, step)}"
    if warp := _backward_reading(record, clock):
        back = at_least(warp.largest * unit_ns(clock))
        remark = f"; and a reading was {back} less than an earlier one, so time went back"
        sees = sees_step(clock.name, f"{back} or more", is_back=True)
    else:
        remark, sees = f"; {BEHIND_BY}; whether time went back for a reader, this does not tell", sees_behind(size)
    return Finding(
        FindingCode.STEP_BACK,
        Weight.FAULT,
        clock.name,
        headline,
        headline + _more(clock) + remark,
        sees,
        remedies.for_step(),
        budget="max_step",
        low_ns=low,
        high_ns=high,
    )


def _forward(record: ProbeRecord, clock: ClockRecord, step: StepRecord, remedies: Remedies) -> Finding:
    size, low, high = _size(clock, step)
    headline = f"{title(clock.name)} stepped forward by {size} against the TSC{_when(record, step)}"
    return Finding(
        FindingCode.STEP_FORWARD,
        Weight.FAULT,
        clock.name,
        headline,
        headline + _more(clock),
        sees_step(clock.name, size, is_back=False),
        remedies.for_step(),
        budget="max_step",
        low_ns=low,
        high_ns=high,
    )


def _size(clock: ClockRecord, step: StepRecord) -> tuple[str, Fraction, Fraction]:
    low, high = sorted((abs(step.low) * unit_ns(clock), abs(step.high) * unit_ns(clock)))
    return between(low, high), low, high


def _when(record: ProbeRecord, step: StepRecord) -> str:
    began = next((clock.samples[0].tsc_before for clock in record.clocks if clock.samples), 0)
    if not began or step.at_tsc < began:
        return ""
    return f", {(step.at_tsc - began) / record.tsc_hz:.2f} s into the run"


def _more(clock: ClockRecord) -> str:
    times = clock.steps.beyond_floor
    return f"; it was the largest of {times:,} steps" if times > 1 else ""


def _backward_reading(record: ProbeRecord, clock: ClockRecord) -> WarpRecord | None:
    """The largest that an offset between two CPUs does not explain."""
    windows = all_windows(clock, len(record.cpus))
    apart = {frozenset(pair) for pair, window in windows.items() if window and window.is_apart}
    found = [warp for warp in clock.warps if warp.times and warp.largest and frozenset(warp[:2]) not in apart]
    return max(found, key=lambda warp: warp.largest, default=None)


# Whose it was


def _is_ntps(record: ProbeRecord, step: Finding) -> bool:
    """Did CLOCK_MONOTONIC step alone?"""
    raw = next((clock for clock in record.clocks if clock.name == UNSLEWED and clock.steps.reads), None)
    if step.clock != SLEWED or raw is None:
        return False
    return (raw.steps.backward if step.code is FindingCode.STEP_BACK else raw.steps.forward) is None


def _of_the_guest(step: Finding) -> Finding:
    remark = (
        f"; {title(UNSLEWED)}, which Linux makes of the same counter, did not: so it was this guest's own NTP or "
        "adjtimex(), and not its host"
    )
    return step._replace(weight=Weight.NOTE, what=step.headline + remark, change=())


# Floors


def _step_floor(clock: ClockRecord) -> StepFloor:
    if not clock.steps.reads or clock.steps.floor >= FLOOR_UNKNOWN:
        return StepFloor(clock.name, None, f"{title(clock.name)}: steps were not searched for, for want of time")
    floor = clock.steps.floor * unit_ns(clock)
    words = f"a step of less than {floor_in_words(floor)} may go unseen"
    return StepFloor(clock.name, floor, f"{title(clock.name)}: {words}")
