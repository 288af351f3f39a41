"""Stress: a VM's pages published over and over in C, as no clock does, to see what its readers make of it."""

cimport cython
from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint64_t
from libc.stdlib cimport calloc, free

from pvclock._core cimport KINDS, TimePages, as_line
from pvclock._math cimport pvclock_line, pvclock_line_at, pvclock_line_turn
from pvclock._memory cimport as_u64
from pvclock._publish cimport (
    pvclock_anchor, pvclock_anchor_params, pvclock_anchor_params_of, pvclock_anchor_read, pvclock_counter_read,
    pvclock_publish_at
)
from pvclock._scale cimport ClockScale

from pvclock.errors import ConfigError, RangeError, StateError
from pvclock.readings import ClockLine


def republish_in_turn(TimePages pages not None, line, rates, publishes: int, max_ticks: int = 2**63 - 1) -> tuple:
    """Publish `line` over and over in one call without the GIL, at the rates in turn; the clock never steps.

    rates: (num, den, scale) with num/den ns a tick.  Ends after `publishes`, or after `max_ticks` of the counter, or
    when the counter goes back (pages.counter_went_back), but not before the first.  Returns the line at the last break
    point, at the last rate, and five numbers: publishes, the least and the greatest step at a break point (new line
    minus old line), and how far the new line was behind and ahead of the timeline there at most, in ns.
    """
    cdef pvclock_line timeline = as_line(line)
    cdef Republishing republishing
    cdef uint64_t limit = as_u64(max_ticks, "max_ticks")
    cdef uint64_t most = as_u64(publishes, "publishes")
    turns = tuple(rates)
    if not turns or most < 1:
        raise ConfigError("republish_in_turn: give at least one rate and one publish")
    republishing = Republishing(turns)
    pages._prepare(<ClockScale?>turns[0][2], 0, ())
    if pages._changed:
        raise StateError("republish_in_turn", "a page, an offset or the memory was changed", "publish first")
    pages.memory.pin()
    with nogil:
        pages.counter_went_back = republishing.run(pages, &timeline, most, limit)
    pages.memory.unpin()
    return ClockLine(timeline.tsc, timeline.ns, timeline.rem, timeline.num, timeline.den), republishing.totals()


@cython.final
@cython.internal
cdef class Republishing:
    """The loop behind republish_in_turn(), and what it counts."""

    cdef pvclock_anchor_params *_params
    cdef uint64_t *_nums
    cdef uint64_t *_dens
    cdef size_t _count
    cdef uint64_t _publishes
    cdef int64_t _least_step, _most_step, _most_behind, _most_ahead

    def __cinit__(self, rates: tuple) -> None:
        self._count = len(rates)
        self._params = <pvclock_anchor_params *>calloc(self._count, sizeof(pvclock_anchor_params))
        self._nums = <uint64_t *>calloc(self._count, sizeof(uint64_t))
        self._dens = <uint64_t *>calloc(self._count, sizeof(uint64_t))
        if not (self._params and self._nums and self._dens):
            raise MemoryError
        for i, (num, den, scale) in enumerate(rates):
            self._params[i] = pvclock_anchor_params_of((<ClockScale?>scale).c)
            self._nums[i], self._dens[i] = as_u64(num, "num"), as_u64(den, "den")
            if num < 1 or den < 1:
                raise RangeError(f"a rate of {num}/{den} ns a tick; both must be at least 1")
        self._least_step, self._most_step = INT64_MAX, INT64_MIN
        self._most_behind, self._most_ahead = INT64_MIN, INT64_MIN

    def __dealloc__(self) -> None:
        free(self._params)
        free(self._nums)
        free(self._dens)

    cdef bint run(self, TimePages pages, pvclock_line *timeline, uint64_t publishes, uint64_t max_ticks) noexcept nogil:
        """Returns whether the counter went back, which ends it."""
        cdef uint64_t begin = pvclock_counter_read(&pages.counter.c)
        cdef uint64_t last_tsc, break_tsc = begin
        cdef pvclock_anchor old
        cdef bint went_back = False
        cdef size_t turn = 0
        while self._publishes == 0 or (
            self._publishes < publishes and break_tsc - begin < max_ticks and not went_back
        ):
            old, last_tsc = pages._anchor, break_tsc
            pages.reference.set_rate(self._nums[turn], self._dens[turn])
            went_back = pvclock_publish_at(
                pages._sets, KINDS, timeline, &self._params[turn], &pages.counter.c, &pages._anchor, &break_tsc,
                False,
            ) != 0 or <int64_t>(break_tsc - last_tsc) < 0
            timeline[0] = pvclock_line_at(timeline[0], break_tsc)
            self._tally(&old, &pages._anchor, timeline)
            timeline[0] = pvclock_line_turn(timeline[0], self._nums[turn], self._dens[turn])
            turn = turn + 1 if turn + 1 < self._count else 0
        pages.break_tsc = break_tsc
        return went_back

    cdef void _tally(self, pvclock_anchor *old, pvclock_anchor *new, pvclock_line *timeline) noexcept nogil:
        cdef uint64_t shown = pvclock_anchor_read(new, timeline.tsc)
        cdef int64_t behind = <int64_t>(timeline.ns - shown)
        cdef int64_t step = <int64_t>(shown - pvclock_anchor_read(old, timeline.tsc))
        self._publishes += 1
        if old.scale.mul != 0:
            self._least_step = min(self._least_step, step)
            self._most_step = max(self._most_step, step)
        self._most_behind = max(self._most_behind, behind)
        self._most_ahead = max(self._most_ahead, -behind)

    cdef tuple totals(self):
        return self._publishes, self._least_step, self._most_step, self._most_behind, self._most_ahead
