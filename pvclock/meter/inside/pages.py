"""kvmclock's pages as a probe reads them by itself: which were never written, and what STABLE says of them."""

from __future__ import annotations

from pvclock.meter.inside.promises import Promises
from pvclock.meter.inside.record import ClockRecord, ProbeRecord
from pvclock.meter.inside.verdict import Finding, FindingCode, Weight
from pvclock.meter.inside.words import cpus_in_words

__all__ = ["no_page_findings", "stable_clocks", "without_unwritten_pages"]

KVMCLOCK = "pvclock"


def stable_clocks(told: Promises) -> set[str]:
    """The clocks that STABLE speaks for: with the flag in every page a vDSO reads one page with any CPU's TSC."""
    if told.has_stable_pages:
        return {KVMCLOCK, "tsc"}
    return {KVMCLOCK} if told.kvm_stable and told.has_stable_pages is None else set()


def no_page_findings(record: ProbeRecord) -> list[Finding]:
    """CPUs whose page was asked for, and never written."""
    places = _unwritten(record)
    if not places or not any(clock.name == KVMCLOCK for clock in record.clocks):
        return []
    cpus = tuple(record.cpus[place].cpu for place in sorted(places))
    headline = f"{cpus_in_words(cpus)} {'has' if len(cpus) == 1 else 'have'} no kvmclock"
    return [
        Finding(
            FindingCode.NO_PAGE,
            Weight.NOTE,
            KVMCLOCK,
            headline,
            f"{headline}: its page was never written (version 0 or mul 0), so the MSR that enables it was refused or "
            "ignored there; kvmclock is not compared with it",
            "a kernel has no kvmclock on that CPU.",
            (),
            cpus,
        )
    ]


def without_unwritten_pages(record: ProbeRecord) -> ProbeRecord:
    """The record without what was read of such pages; without kvmclock at all where the first CPU's is one."""
    places = _unwritten(record)
    if not places:
        return record
    clocks = [_without(clock, places) if clock.name == KVMCLOCK else clock for clock in record.clocks]
    return record._replace(clocks=tuple(clocks))


# Inside


def _unwritten(record: ProbeRecord) -> set[int]:
    cpus = {page.cpu for page in record.pages if not (page.version and page.mul)}
    return {place for place, cpu in enumerate(record.cpus) if cpu.cpu in cpus}


def _without(clock: ClockRecord, places: set[int]) -> ClockRecord:
    """The first CPU reads steps and samples; the others' readings are in pairs and warps alone."""
    pairs = tuple(pair for pair in clock.pairs if places.isdisjoint({pair.a, pair.b}))
    warps = tuple(warp for warp in clock.warps if places.isdisjoint({warp.writer, warp.reader}))
    clock = clock._replace(pairs=pairs, warps=warps)
    if 0 not in places:
        return clock
    nothing = clock.steps._replace(reads=0, forward=None, backward=None, beyond_floor=0)
    return clock._replace(samples=(), steps=nothing)
