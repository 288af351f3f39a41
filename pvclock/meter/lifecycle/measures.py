"""What an observed operation comes to: steps, time that passed, readings that went back; and the bounds of each.

Pure.  All times are ns; bounds go by the host's clocks, not by what the server says.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pvclock.meter.comparison import EARLY_EPOCH_LIMIT_NS, RAW_LIMIT_PPM, STABLE, WALL_CLOCK_LIMIT_NS
from pvclock.meter.lifecycle.observe import Observed
from pvclock.meter.lifecycle.operations import Kind
from pvclock.meter.watch.lines import step_between
from pvclock.readings import TimeInfo

__all__ = [
    "Span",
    "StepsBack",
    "apart_ns",
    "gaps_ns",
    "is_set_at_cont",
    "is_stable",
    "largest_gaps_ns",
    "offset_changes",
    "steps_back",
    "steps_ns",
    "stood_still",
    "tolerance_ns",
    "wall_clock_span",
    "went_on",
]

NTP_LIMIT_PPM: Final = 500
LINES_BOUND_NS: Final = 2
"""Each of two lines is cut to whole ns."""


class Span(NamedTuple):
    """From `least` to `most`, in ns."""

    least: int
    most: int

    def has(self, ns: int) -> bool:
        """Is it within?"""
        return self.least <= ns <= self.most

    def plus(self, ns: int) -> Span:
        """The same, `ns` later."""
        return Span(self.least + ns, self.most + ns)

    def wider(self, ns: int) -> Span:
        """The same, and `ns` more on either side."""
        return Span(self.least - ns, self.most + ns)


class StepsBack(NamedTuple):
    """Readings below an earlier one: of the same vCPU, of any vCPU; and the longest way back."""

    own: int
    cross: int
    worst_ns: int


def is_stable(seen: Observed) -> bool:
    """Do the guest's pages say that TSCs agree?  Else KVM moves them, and a line tells little of another."""
    return all(page.flags & STABLE for look in (seen.before, seen.after) for page in look.pages)


def is_set_at_cont(seen: Observed) -> bool:
    """Is it KVM's clock, of another VMM that sets it back at cont: QEMU's?"""
    return seen.server.is_kvm and seen.server.stops_when_paused


def stood_still(seen: Observed) -> Span:
    """For how long the server's clock is to have stood still."""
    if seen.server.stops_when_paused:
        return Span(seen.stopped.least_ns, seen.stopped.most_ns)
    return Span(0, 0)


def tolerance_ns(seen: Observed) -> int:
    """What KVM may be off when it anchors its clock anew: the drift between its rate and its host's since boot."""
    if not seen.server.is_kvm:
        return LINES_BOUND_NS
    return LINES_BOUND_NS + (seen.after.reading.ns + seen.stopped.most_ns) * RAW_LIMIT_PPM // 10**6


def steps_ns(seen: Observed) -> list[int | None]:
    """Each page's step against the TSC: the new line less the old one, at the new tsc_timestamp.

    None where the guest's TSC may have been changed and its offset cannot be read.
    """
    before, after = seen.before, seen.after
    each = zip(before.pages, after.pages, before.tsc_offsets, after.tsc_offsets, strict=True)
    return [_step_ns(seen.kind, *of_vcpu) for of_vcpu in each]


def _step_ns(kind: Kind, before: TimeInfo, after: TimeInfo, offset: int | None, offset_after: int | None) -> int | None:
    is_known = kind is Kind.STOP or None not in (offset, offset_after)  # stop and cont leave the TSC alone
    return step_between(before, offset, after, offset_after)[0] if is_known else None


def apart_ns(seen: Observed) -> int:
    """How far the vCPUs' lines are apart afterwards, at most; a TSC that all have, whatever it is by now, shows it."""
    first, *others = seen.after.pages
    return max((abs(step_between(first, None, other, None)[0]) for other in others), default=0)


def went_on(seen: Observed) -> Span:
    """How far guest time went on while no vCPU ran, by the guest's readings before and after."""
    left_out = Span(-seen.left_out_ns, -seen.left_out_ns).wider(seen.left_out_bound_ns)
    return Span(left_out.least + seen.stopped.least_ns, left_out.most + seen.stopped.most_ns)


def gaps_ns(seen: Observed) -> list[int]:
    """Each vCPU's largest progress between two readings since it was stopped.

    Of vCPUs that booted anew: from the last reading before to the first one after, the boot included.
    """
    after = seen.after.records
    if not seen.booted_anew:
        return [record.largest_gap_ns for record in after]
    return [now.first_ns - then.last_ns for then, now in zip(seen.before.records, after, strict=True)]


def largest_gaps_ns(seen: Observed) -> list[int]:
    """What each vCPU's gap can be: what it counted in all, and in QEMU the stop, by which a late page may be ahead."""
    ahead_ns = seen.stopped.most_ns if is_set_at_cont(seen) else 0
    pairs = zip(seen.before.records, seen.after.records, strict=True)
    return [after.last_ns - before.last_ns + ahead_ns + tolerance_ns(seen) for before, after in pairs]


def steps_back(seen: Observed) -> StepsBack:
    """As clockprobe counted them since it booted."""
    records = seen.after.records
    return StepsBack(
        sum(record.backward_own for record in records),
        sum(record.backward_cross for record in records),
        max(record.worst_back_ns for record in records),
    )


def offset_changes(seen: Observed) -> list[int | None]:
    """Ticks by which each vCPU's TSC was moved; None where that cannot be read."""
    each = zip(seen.before.tsc_offsets, seen.after.tsc_offsets, strict=True)
    return [None if None in (old, new) else new - old for old, new in each]  # type: ignore[operator]  # none is None


def wall_clock_span(seen: Observed) -> Span:
    """Where the wall clock record plus guest time is to be against the host's time of day, afterwards.

    Where the guest did not register its record anew it is as wrong as before, and by the time that was left out; where
    QEMU did it, at the load, it shows the beginning of the new VM's clock, which cont then sets to the saved time.
    """
    early_ns = EARLY_EPOCH_LIMIT_NS if seen.server.is_kvm else WALL_CLOCK_LIMIT_NS
    fresh = Span(-early_ns, WALL_CLOCK_LIMIT_NS)
    if seen.kind is Kind.STOP:
        right = fresh.plus(-seen.left_out_ns)
    elif seen.booted_anew:
        right = fresh
    else:
        saved_ns = seen.before.reading.ns + seen.stopped.most_ns
        right = Span(fresh.least - seen.stopped.most_ns, fresh.most + saved_ns)
    return right.wider(seen.left_out_bound_ns + seen.stopped.most_ns * NTP_LIMIT_PPM // 10**6)
