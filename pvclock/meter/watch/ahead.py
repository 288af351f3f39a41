"""How far each vCPU's clock is ahead of a reference clock of the host, from its page's line and its TSC's offset.

Both are taken at the very TSC of a sample of the reference, so nothing is left to the time between two looks.  Where
the offset cannot be read it is taken to be constant: then it drops out, unless lines of two rates are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from typing import Final, NamedTuple

from pvclock.meter.watch.changes import Change, Step, TscBasis
from pvclock.meter.watch.lines import BACKDATED_TICKS, Line, TscRates, floor_ns, ns_per_tick, value_at
from pvclock.meter.watch.poll import Poll
from pvclock.quantities import signed64
from pvclock.readings import Sample, TimeInfo

__all__ = ["Ahead", "AheadMeter"]

ABSENT: Final = "it has no page, as far as is known"
CHANGING: Final = "its page was being changed"
NO_OFFSET: Final = "its TSC offset was being changed"
NO_LINE: Final = "its page, or its TSC, is not known for sure at the moment"
BASIS_LOST: Final = "its TSC was changed, or may have been, by an unknown number of ticks: readings begin anew"
OFFSET_COMES: Final = "its TSC offset, which was assumed so far, can be read: readings begin anew"


class Ahead(NamedTuple):
    """By how much vCPU `vcpu`'s clock is ahead of the reference, less what that was at its first reading.

    Two readings differ truly by what they say, to the sum of their bounds.  Both None where that is unknown, and `why`.
    """

    vcpu: int
    ahead_ns: int | None
    bound_ns: float | None
    why: str | None = None


class _Origin(NamedTuple):
    """A vCPU's first reading.  is_assumed: its offset could not be read, and any would do."""

    sample: Sample
    line: TimeInfo
    offset: int
    is_assumed: bool


class AheadMeter:
    """Reads the clocks of a VM's vCPUs against the reference; each begins with 0."""

    def __init__(self, rates: TscRates) -> None:
        self._rates = rates
        self._origins: dict[int, _Origin] = {}
        self._offsets: dict[int, int] = {}
        """As it was last read, or is assumed."""
        self._lost: set[int] = set()
        """Those that had an origin, until they were told of."""

    def restart(self) -> None:
        """Begin anew: other pages were found."""
        self._origins.clear()
        self._lost.clear()

    def note(self, changes: Iterable[Change]) -> None:
        """Take what a watcher found: after a TSC was changed by an unknown number of ticks, readings begin anew."""
        changed = {it.vcpu for it in changes if isinstance(it, Step) and it.basis is TscBasis.CHANGED}
        for vcpu in changed & self._origins.keys():
            del self._origins[vcpu]
            self._lost.add(vcpu)

    def take(self, sample: Sample, poll: Poll, lines: Sequence[Line | None]) -> tuple[Ahead, ...]:
        """Each vCPU's reading at the sample's TSC, by the lines that counted at the poll just before."""
        return tuple(self._reading(sample, vcpu, line, poll) for vcpu, line in enumerate(lines))

    # Inside

    def _reading(self, sample: Sample, vcpu: int, line: Line | None, poll: Poll) -> Ahead:
        why = self._why_not(vcpu, line, poll)
        if why is not None or line is None:
            return Ahead(vcpu, None, None, why)
        if line.offset is not None:
            self._offsets[vcpu] = line.offset
        origin = self._origins.get(vcpu)
        if origin is None:
            origin = self._origins[vcpu] = self._begin_with(sample, vcpu, line)
        shown_ns = value_at(line.info, sample.tsc + self._offsets[vcpu])
        first_ns = value_at(origin.line, origin.sample.tsc + origin.offset)
        passed_ns = sample.ns - origin.sample.ns
        bound_ns = sample.bound_ns + floor_ns(line.info) + _unknown_ns(origin, line.info)
        return Ahead(vcpu, signed64(shown_ns - first_ns) - passed_ns, bound_ns)

    def _why_not(self, vcpu: int, line: Line | None, poll: Poll) -> str | None:
        if vcpu in self._lost:
            self._lost.remove(vcpu)
            return BASIS_LOST
        if line is None:
            return _why_no_line(vcpu, poll)
        if self._rates.is_scaled(line.info):
            return f"its line is for a TSC of {line.info.shown_khz} kHz, and the host's may be scaled for it"
        origin = self._origins.get(vcpu)
        if origin is not None and origin.is_assumed and line.offset is not None:
            del self._origins[vcpu]
            return OFFSET_COMES
        return None

    def _begin_with(self, sample: Sample, vcpu: int, line: Line) -> _Origin:
        if line.offset is None:
            self._offsets[vcpu] = line.info.tsc_timestamp - sample.tsc  # as if the line began now
        return _Origin(sample, line.info, self._offsets[vcpu], line.offset is None)


def _why_no_line(vcpu: int, poll: Poll) -> str:
    if vcpu in poll.absent:
        return ABSENT
    if poll.pages[vcpu] is None:
        return CHANGING
    return NO_OFFSET if poll.tsc_offsets[vcpu] is None else NO_LINE


def _unknown_ns(origin: _Origin, line: TimeInfo) -> int:
    """What an assumed offset leaves open: lines of two rates differ by it.

    The first line began, by the host's TSC, between 0 and its first reading, but for what this engine dates it back.
    """
    if not origin.is_assumed:
        return 0
    bend = abs(ns_per_tick(line) - ns_per_tick(origin.line))
    return ceil(bend * (origin.sample.tsc + BACKDATED_TICKS))
