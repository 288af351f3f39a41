"""Clocks that tell the TSC's frequency, and which of them are told by the TSC's own promises and so prove nothing."""

from __future__ import annotations

from typing import Final, NamedTuple

from pvclock.meter.inside.promises import FrequencyClaim, page_hz
from pvclock.meter.inside.rates import Interval, tsc_hz_by
from pvclock.meter.inside.record import ClockRecord, ProbeRecord
from pvclock.meter.inside.symptoms import title

__all__ = ["Reference", "independent_references", "off_ppb", "references"]

UNSLEWED: Final = ("acpi_pm", "pit", "hyperv", "monotonic_raw", "pvclock")
"""Clocks whose rate the guest's NTP does not change."""
OWN_OSCILLATORS: Final = frozenset({"acpi_pm", "pit"})
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
        if clock.name in UNSLEWED and not _has_stepped(clock) and (hz := tsc_hz_by(clock))
    ]
    return found + _by_page(record)


def independent_references(record: ProbeRecord) -> list[Reference]:
    """Those that a frequency can be held against, the one that tells it best first."""
    found = [each for each in references(record) if each.is_independent]
    return sorted(found, key=lambda each: each.hz.high - each.hz.low)


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
    page = record.pages[0] if record.pages else None
    if page is None or not page.mul:
        return []
    scaled = page_hz(page)
    words = f"the pvclock page of CPU {page.cpu} (mul {page.mul}, shift {page.shift})"
    grain = scaled / page.mul
    return [Reference("pvclock", words, Interval(scaled - grain, scaled + grain), is_independent=False)]


def _has_stepped(clock: ClockRecord) -> bool:
    return clock.steps.forward is not None or clock.steps.backward is not None
