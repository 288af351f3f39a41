"""A VMM's operations on guest time: refresh, dilate, slew, skip, travel, offset.

Each takes effect as a whole or not at all; all but a plain refresh record an event.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Protocol

from pvclock._scale import ClockScale
from pvclock._transaction import attempt
from pvclock.arguments import flag, serving, text, whole
from pvclock.clock.host_trust import HostTrust
from pvclock.clock.timekeeper import Timekeeper, TimeState, nothing
from pvclock.clock.vcpu_tscs import VcpuTscs
from pvclock.errors import RangeError, StateError
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, shown
from pvclock.readings import HostStamps
from pvclock.timekeeping import catchup
from pvclock.timekeeping.catchup import Slew
from pvclock.timekeeping.events import Event, EventKind
from pvclock.timekeeping.timeline import RateTerms, Timeline

__all__ = ["DilationLimit", "Operations"]


class DilationLimit(Protocol):
    """What a VMM knows of the rates at which its guest can live."""

    def admit(self, dilation: Fraction, scale: ClockScale, *, force: bool) -> None:
        """Called before each change, with the scale that pages will show; RangeError to refuse it, unless `force`.

        All vCPUs are out of the guest, and the clock's lock is held.
        """


class Operations:
    """Refreshes, dilates, slews and steps one VM's time."""

    def __init__(self, keeper: Timekeeper, host: HostTrust, tscs: VcpuTscs) -> None:
        self._keeper, self._host, self._tscs = keeper, host, tscs
        self._limit: DilationLimit | None = None

    def limit_dilation(self, limit: DilationLimit | None) -> None:
        """See GuestClock.limit_dilation()."""
        self._limit = None if limit is None else serving("limit", limit, "admit", wanted="a DilationLimit, or None")

    # Rate changes, which never step time

    def refresh(self, vcpu: int | None = None) -> None:
        """See GuestClock.refresh()."""
        with self._keeper.changing:
            if not self._host.check(vcpu):
                return
            if self._keeper.timeline.is_slewing and not self._keeper.is_paused:
                self._continue_slew()
            else:
                self._keeper.republish(vcpu, is_checked=True)

    def dilate(self, numerator: int, denominator: int = 1, *, force: bool = False) -> None:
        """See GuestClock.dilate()."""
        numerator, denominator = whole("numerator", numerator), whole("denominator", denominator)
        flag("force", force)
        if numerator < 1 or denominator < 1:
            raise RangeError(
                f"dilation {shown(numerator)}/{shown(denominator)}; two whole numbers from 1 on: dilate(1, 2) halves"
            )
        dilation = Fraction(numerator, denominator)
        if max(dilation.as_integer_ratio()) > U64_MASK:
            raise RangeError(f"dilation {shown(dilation)} in terms of more than 64 bits; use a nearby fraction")
        with self._keeper.changing:
            self._keeper.timeline.check(dilation)
            stamps = self._host.require("dilate")
            if self._limit is not None:
                scale = self._keeper.timeline.scale(dilation)
                self._keeper.with_vcpus_out(None, partial(self._limit.admit, dilation, scale, force=force))
            terms = self._keeper.timeline.terms._replace(dilation=dilation)
            self._keeper.change_rate(
                terms, stamps, EventKind.DILATE, f"dilate({shown(numerator)}, {shown(denominator)})"
            )

    def slew(self, target_ns: int, max_ppm: int = 500) -> None:
        """See GuestClock.slew()."""
        target_ns = whole("target_ns", target_ns)
        policy = catchup.as_policy(Slew(whole("max_ppm", max_ppm)))
        assert isinstance(policy, Slew)  # noqa: S101  # for type checkers
        keeper = self._keeper
        with keeper.changing:
            stamps = self._host.require("slew")
            if abs(keeper.timeline.skew_at(stamps.tsc) + target_ns) > U64_MASK:
                raise RangeError(f"slew({shown(target_ns)}): with what is still to be slewed it is 2^64 ns or more")
            slewed = keeper.timeline.copy()
            slewed.slew(stamps.tsc, Fraction(target_ns), policy)
            self._continue_slew(slewed, stamps, f"slew({target_ns}, {max_ppm})")

    # Steps

    def skip(self, ns: int) -> None:
        """See GuestClock.skip()."""
        ns = whole("ns", ns)
        if ns < 0:
            raise RangeError(
                f"skip({shown(ns)}): guest time goes forward only; slew({shown(ns)}) makes it later without a step back"
            )
        with self._keeper.changing:
            stamps = self._host.require("skip")
            self._check_end(ns, f"skip({shown(ns)})")
            self._jump(Fraction(ns), EventKind.SKIP, f"skip({ns})", stamps)

    def travel(self, ticks: int, why: str = "") -> None:
        """See GuestClock.travel()."""
        ticks, why = whole("ticks", ticks), text("why", why)
        if not 0 <= ticks < 1 << 63:
            raise RangeError(f"travel({shown(ticks)}): guest time goes forward only, by less than 2^63 ticks")
        keeper = self._keeper
        with keeper.changing:
            stamps = self._host.require("travel")
            if keeper.is_paused:
                raise StateError("travel", "guest time stands still", "resume() it first")
            ns = Fraction(ticks * NS_PER_S, keeper.timeline.tsc_hz) * _unslewed(keeper.timeline.terms)
            self._check_end(ns.__ceil__(), f"travel({shown(ticks)})")
            tscs = self._tscs.plan_move(ticks)
            told = partial(self._jump, ns, EventKind.SKIP, f"travel({ticks}){why and ': '}{why}", stamps)
            keeper.with_vcpus_out(None, partial(attempt, tscs.apply_all, tscs.undo, told))

    def offset(self, ns: int) -> None:
        """See GuestClock.offset()."""
        ns = whole("ns", ns)
        with self._keeper.changing:
            stamps = self._host.require("offset")
            now = self._check_end(ns, f"offset({shown(ns)})")
            if ns < 0 and (self._keeper.was_shown or now + ns < 0):
                raise RangeError(
                    f"offset({shown(ns)}) at guest time {round(now)} ns: time that was read is not taken back, and "
                    f"guest time is never below 0; slew({shown(ns)}) makes it later without a step back"
                )
            self._jump(Fraction(ns), EventKind.OFFSET, f"offset({ns})", stamps)

    # Inside

    def _check_end(self, ns: int, operation: str) -> Fraction:
        """Guest time now, in ns; RangeError if `ns` more exceeds the 2^64 ns that a page can show."""
        now = self._keeper.timeline.at(self._keeper.host_tsc())
        if now + ns > U64_MASK:
            raise RangeError(f"{operation} at guest time {round(now)} ns: a guest's clock ends at 2^64 ns")
        return now

    def _jump(
        self,
        ns: Fraction,
        kind: EventKind,
        why: str,
        stamps: HostStamps,
        reached: Callable[[], object] = nothing,
    ) -> None:
        """Step guest time; reached: called when it can no longer fail, once or more."""
        keeper, old = self._keeper, self._keeper.state
        jumped = old.timeline.copy()
        jumped.begin_segment(stamps.tsc, old.timeline.terms)
        jumped.jump(ns)
        new = TimeState(jumped, jumped.line(), old.scale, old.paused_at)
        event = keeper.event(kind, why, stamps, before=old, after=new)

        def change(_: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
            reached()
            return new, (event,)

        keeper.step(change, new, (0, ns.__floor__() & U64_MASK))

    def _continue_slew(self, slewed: Timeline | None = None, stamps: HostStamps | None = None, why: str = "") -> None:
        """Apply the slew's plan for the next stretch.  slewed: the timeline with a slew newly added at `stamps`."""
        keeper, old = self._keeper, self._keeper.state
        stamps = stamps or keeper.backend.stamps()
        planned = slewed or old.timeline.copy()
        slew = planned.plan(stamps.tsc)
        is_new = slewed is not None or slew != old.timeline.terms.slew
        why = why or f"{round(planned.skew_at(stamps.tsc))} ns are left"

        def events(tsc: HostTsc, new: TimeState) -> tuple[Event, ...]:
            found = [keeper.event(EventKind.SLEW, why, stamps, tsc=tsc, before=old, after=new)] if is_new else []
            if new.timeline.is_slewing or slew:
                return tuple(found)
            left = planned.skew_at(tsc)
            ended = f"{float(left):.3f} ns of it are left undone"
            return *found, keeper.event(EventKind.SLEW_END, ended, stamps, tsc=tsc, before=new)

        self._begin_segment(planned, planned.terms._replace(slew=slew), events)

    def _begin_segment(
        self, timeline: Timeline, terms: RateTerms, events: Callable[[HostTsc, TimeState], tuple[Event, ...]]
    ) -> None:
        """Publish, and begin a segment of `terms` at the break point if they differ from the present ones."""
        keeper, old = self._keeper, self._keeper.state
        same_scale = terms.rate == old.timeline.rate
        scale = old.scale if same_scale else timeline.scale(terms.rate)

        def change(tsc: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
            changed = timeline.copy()
            if terms != timeline.terms:
                changed.begin_segment(tsc, terms)
            if terms.slew == 0 and changed.skew_is_worked_off:  # the break, some us after the plan, may overshoot
                changed.end_slew()
            line = changed.line()
            new = TimeState(changed, line, scale, old.paused_at)
            return new, events(tsc, new)

        keeper.begin_segment(change, scale)


def _unslewed(terms: RateTerms) -> Fraction:
    """The rate without a slew: what is to be made up for is so in time that passes."""
    return terms._replace(slew=Fraction(0)).rate if terms.slew else terms.rate
