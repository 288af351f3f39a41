"""Clocks that tell the TSC's frequency, and which of them are told by the TSC's own promises and so prove nothing."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Final, NamedTuple

from pvclock.meter.inside.promises import FrequencyClaim, page_hz
from pvclock.meter.inside.rates import Interval, rate_change, tsc_hz_by
from pvclock.meter.inside.record import ClockRecord, ProbeRecord
from pvclock.meter.inside.symptoms import title

__all__ = ["Reference", "independent_references", "may_have_lost_time", "off_ppb", "references"]

UNSLEWED: Final = ("acpi_pm", "pit", "hyperv", "monotonic_raw", "pvclock")
"""Clocks whose rate the guest's NTP does not change."""
OWN_OSCILLATORS: Final = frozenset({"acpi_pm", "pit"})
PIT_PERIOD: Final = Fraction(1 << 16, 1_193_182)
"""Seconds in which the PIT counts once round: after half of it, its reading may stand for two times."""
SLOW_SOURCES: Final = frozenset({"acpi_pm", "hpet"})
"""Clock sources of Linux that make its clocks independent of the TSC."""


class Reference(NamedTuple):
    """The TSC's frequency by a clock, in words by which.

    is_independent: that clock does not go by a frequency of the TSC that the guest is told.
    """

    name: str
    words: str
    hz: Interval
    is_independent: bool


def references(record: ProbeRecord) -> list[Reference]:
    """What the TSC's frequency is by the clocks measured, and by the pvclock pages."""
    found = [
        Reference(clock.name, f"{title(clock.name)} over this run", hz, _is_independent(record, clock))
        for clock in record.clocks
        if clock.name in UNSLEWED and _is_sound(record, clock) and (hz := tsc_hz_by(clock))
    ]
    return found + _by_page(record)


def independent_references(record: ProbeRecord) -> list[Reference]:
    """Those that a frequency can be held against, the one that tells it best first."""
    found = [each for each in references(record) if each.is_independent]
    return sorted(found, key=lambda each: each.hz.high - each.hz.low)


def may_have_lost_time(record: ProbeRecord, clock: ClockRecord) -> bool:
    """A timer that counts round loses whole rounds where the VM, or the CPU that reads it, stood still."""
    if clock.name not in OWN_OSCILLATORS:
        return False
    return any(_has_stepped(each) for each in record.clocks) or _has_gap(record)


def off_ppb(claim: FrequencyClaim, hz: Interval) -> Interval:
    """By how much a claim is above the TSC's frequency: claim over measured, minus 1."""
    low, high = claim.hz - claim.grain_hz, claim.hz + claim.grain_hz
    return Interval((low / hz.high - 1) * 10**9, (high / hz.low - 1) * 10**9)


# Inside


def _is_independent(record: ProbeRecord, clock: ClockRecord) -> bool:
    """Linux scales CLOCK_MONOTONIC_RAW by the frequency told, where it counts the TSC; hpet and acpi_pm do not."""
    if clock.name == "monotonic_raw":
        return record.kernel is not None and record.kernel.clocksource in SLOW_SOURCES
    return clock.name in OWN_OSCILLATORS


def _by_page(record: ProbeRecord) -> list[Reference]:
    """mul is rounded, so the scale is that of any number between its neighbours; of 1, that is any at all."""
    page = record.pages[0] if record.pages else None
    if page is None or page.mul < 2:
        return []
    exact = page_hz(page) * page.mul
    words = f"the pvclock page of CPU {page.cpu} (mul {page.mul}, shift {page.shift})"
    return [Reference("pvclock", words, Interval(exact / (page.mul + 1), exact / (page.mul - 1)), is_independent=False)]


def _is_sound(record: ProbeRecord, clock: ClockRecord) -> bool:
    """Its samples measure the TSC; PIT and ACPI PM timer lose time where the VM, or this CPU, stood still."""
    if clock.name not in OWN_OSCILLATORS:
        return not _has_stepped(clock)
    if may_have_lost_time(record, clock):
        return False
    change = rate_change(clock)
    return change is None or change.ppb.low <= 0 <= change.ppb.high


def _has_gap(record: ProbeRecord) -> bool:
    """Was there a time without a reading in which the PIT may have gone half round, as far as samples tell?

    They are taken as each eighth of the run begins, which is late where the CPU was held up.
    """
    most = record.tsc_hz * PIT_PERIOD / 2
    for clock in record.clocks:
        taken = [each for each in clock.samples if each.tsc_after]
        apart = [after.tsc_before - before.tsc_before for before, after in pairwise(taken)]
        if any(each.tsc_after - each.tsc_before > most for each in taken):
            return True
        if apart and (max(apart) - min(apart) > most or min(apart) < 0):
            return True
    return False


def _has_stepped(clock: ClockRecord) -> bool:
    """Of the TSC itself only its going back is told."""
    return clock.steps.backward is not None or (clock.name != "tsc" and clock.steps.forward is not None)
