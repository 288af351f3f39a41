"""One VM's timeline, its pages and its log of events, and the one way in which they change together.

An operation computes what guest time becomes as a new `TimeState`; the pages are published, the state is replaced and
the event is recorded as one step, which no error of a callback and no interrupt can leave half done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from typing import Final, NamedTuple, TypeAlias, TypeVar

from pvclock._core import GUEST_STOPPED, TSC_STABLE_BIT, TimePages, read_time_info
from pvclock._memory import GuestMemory
from pvclock._scale import ClockScale
from pvclock._transaction import Transaction, attempt, commit
from pvclock.arguments import whole
from pvclock.clock.event_log import EventLog
from pvclock.clock.live_clock import LiveClock
from pvclock.errors import ConfigError, GuestAddressError, RangeError, StateError
from pvclock.host.backend import Backend
from pvclock.quantities import NS_PER_S, U64_MASK, GuestNs, HostTsc, shown, signed64
from pvclock.readings import ClockLine, HostStamps, TimeInfo
from pvclock.timekeeping.events import Event, EventCause, EventKind
from pvclock.timekeeping.history import History
from pvclock.timekeeping.timeline import RateTerms, Timeline

__all__ = ["MAX_AGE_S", "VCPUS_MAX", "TimeState", "Timekeeper", "checked_vcpus"]

MAX_AGE_S: Final = 2.0
"""Refresh pages at least this often, in seconds of guest time.  mul is up to 0.47 ppb slow, so an older page has lost
more than the 1 ns that a refresh can give back; the rest comes back at the next ones."""

VCPUS_MAX: Final = 4096
"""As many as KVM takes on x86 (KVM_MAX_VCPUS), and as many as can be saved."""


T = TypeVar("T")


class PausePoint(NamedTuple):
    """Where guest time stands still since.

    stamps: the host then.  tsc_hz: that host's.  dilation: that of the time missed, whatever dilate() says meanwhile.
    elsewhere: it was another host, or this one before a restore.
    """

    stamps: HostStamps
    tsc_hz: int
    dilation: Fraction
    elsewhere: bool = False


class TimeState(NamedTuple):
    """What guest time is and how it goes on; nothing in it changes, it is replaced as a whole.

    line, scale: the timeline's segment in C's form, and what pages show of its rate.
    """

    timeline: Timeline
    line: ClockLine
    scale: ClockScale
    paused_at: PausePoint | None = None

    @staticmethod
    def of(timeline: Timeline, paused_at: PausePoint | None = None) -> TimeState:
        """The state with that timeline, which must not change any more."""
        return TimeState(timeline, timeline.line(), timeline.scale(timeline.rate), paused_at)

    @property
    def rate(self) -> Fraction:
        """Guest seconds in a nominal host second; 0 while paused."""
        return self.timeline.rate if self.timeline.is_running else Fraction(0)


Change: TypeAlias = Callable[[HostTsc], tuple[TimeState, tuple[Event, ...]]]
"""What guest time becomes, and what is recorded of it, if the change is at that host TSC.

It is asked when nothing can fail any more, and sets what changes beside time.  Asked twice, it sets the same again.
"""


def nothing(*_: object) -> None:
    """For what needs no more done."""


class Timekeeper:
    """The time of one VM with `vcpus` in `memory`; guest time 0 is now.

    provider: the name of the guest's clock interface, which events say.
    stable: may pages say that all vCPUs' TSCs are in step?  Asked at every publish.
    look: is the host's TSC good, here and now?  Asked before a publish that no operation has looked for; its argument
    is the vCPU of republish().

    All that changes is changed within `with changing`: one thread at a time, and callbacks are called when it ends.
    """

    def __init__(
        self,
        memory: GuestMemory,
        vcpus: int,
        backend: Backend,
        provider: str,
        *,
        stable: Callable[[], bool],
        tsc_is_good: Callable[[int | None], bool],
    ) -> None:
        self.memory = memory
        self.vcpus = vcpus
        self.backend = backend
        self.provider = provider
        self.events = EventLog()
        self.changing = Transaction(memory, self.events.deliver)
        self.live = LiveClock()
        self.pages = TimePages(memory, vcpus, backend.counter)
        begin = self.host_tsc()
        timeline = Timeline(begin, backend.tsc_hz)
        timeline.check(Fraction(1))
        self.state = TimeState.of(timeline)
        self._stable = stable
        self._tsc_is_good = tsc_is_good
        self.time_changed: Callable[[bool], object] = nothing
        """Hooks.time_changed of the guest's provider."""

        self._history = History()
        self._shown_flags: int | None = 0  # None: a publish was broken off that may have shown others
        self._all_out = False  # are all vCPUs out of the guest?
        self._was_shown_before = False  # by the clock that this one was saved of

    def take_over(self) -> None:
        """Be the clock of the memory; the one before changes nothing any more, and keeps no vCPU out."""
        before = self.changing.take_over(self.live)
        if isinstance(before, LiveClock):
            before.give_way()

    # What time it is

    @property
    def timeline(self) -> Timeline:
        """The present segment; not to be changed in place."""
        return self.state.timeline

    @property
    def is_paused(self) -> bool:
        """Does guest time stand still?"""
        return self.state.paused_at is not None

    @property
    def was_shown(self) -> bool:
        """May a guest have read the time: from a page of this clock, or of the one that it was saved of?"""
        return self._was_shown_before or self.pages.was_published

    def host_tsc(self) -> HostTsc:
        """The host's TSC now."""
        return HostTsc(self.backend.counter.read())

    def now(self) -> GuestNs:
        """Guest time at this instant by the timeline itself, page or no page."""
        return GuestNs(self.timeline.at(self.host_tsc()).__floor__() & U64_MASK)

    def at(self, host_tsc: HostTsc) -> Fraction:
        """Guest time in ns at `host_tsc`, exactly: by the present segment, or the one of that time.

        RangeError before the oldest of the segments that are kept (history.SEGMENTS_KEPT).
        """
        with self.changing.lock:  # the segment and those before it are read together
            return self._history.at(host_tsc, self.timeline)

    def shown_at(self, host_tsc: HostTsc) -> GuestNs:
        """What a guest computes at `host_tsc` from the pages as published last, in ns."""
        with self.changing.lock:
            return GuestNs(self.pages.shown_at(host_tsc))

    def page(self, vcpu: int) -> TimeInfo | None:
        """vCPU's page as it lies in guest memory; None if it has none there."""
        gpa = self.pages.registered(vcpu)
        try:
            return None if gpa is None else read_time_info(self.memory, gpa)
        except GuestAddressError:
            return None

    def check_end(self, ns: int, operation: str) -> Fraction:
        """Guest time now; RangeError if `ns` more is beyond what a page can show."""
        now = self.timeline.at(self.host_tsc())
        if now + ns > U64_MASK:
            raise RangeError(f"{operation} at guest time {round(now)} ns: a guest's clock ends at 2^64 ns")
        return now

    def check_vcpu(self, vcpu: int) -> int:
        """The vCPU's number; RangeError if this VM has none of it."""
        if type(vcpu) is not int:
            vcpu = whole("vcpu", vcpu)
        if not 0 <= vcpu < self.vcpus:
            raise RangeError(f"vCPU {shown(vcpu)}; this VM has vCPUs 0 to {self.vcpus - 1}")
        return vcpu

    def check_vcpus_out(self, operation: str) -> None:
        """StateError where the backend's vCPUs would go on in the guest; for with_vcpus_out()."""
        if self.backend.vcpus_are_out() is False:
            allowed = "hold them first: Machine.pause(), Runner.pause(), or what your backend's vcpus_are_out() goes by"
            raise StateError(operation, "the vCPUs run", allowed)

    # What changes it; within `with changing`

    def republish(self, vcpu: int | None = None) -> None:
        """Publish the present segment anew; while paused that is left to resume().

        On a CPU whose TSC is behind, at the last break point, so that guests on other CPUs see no difference.
        vcpu: one that is out of the guest, the caller's own, whose flags can be written too.
        """
        if not self.is_paused:
            again = not self._tsc_is_good(vcpu)
            self._publish(_unchanged, self.state, vcpu=vcpu, again=again)

    def adopt(
        self,
        begin: Callable[[], object],
        undo: Callable[[], object],
        told: Callable[[], tuple[Event, ...]],
        vcpu: int | None = None,
    ) -> None:
        """Publish what begin() changes beside time, and record what told() says then; by undo() none of it, if not.

        told: asked when nothing can fail any more, as a Change is.  vcpu, and while paused: as republish().
        """
        again = not self.is_paused and not self._tsc_is_good(vcpu)

        def publish(reached: Callable[[], None]) -> None:
            def change(_: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
                reached()
                return self.state, told()

            if self.is_paused:
                commit(partial(self.pages.write_own_pages, self._flags), change, self.take, self.events)
            else:
                self._publish(change, self.state, vcpu=vcpu, again=again)

        attempt(begin, undo, publish)

    def with_vcpus_out(self, vcpu: int | None, operation: Callable[[], T]) -> T:
        """Call `operation` with all vCPUs out of the guest; what it publishes writes all vCPUs' flags.

        vcpu: the caller's own, which is out already.
        """
        if self._all_out:
            return operation()
        with self.backend.quiesce(vcpu):
            try:
                self._all_out = True
                return operation()
            finally:
                self._all_out = False

    def beside_guests(self, vcpu: int | None, publish: Callable[[], T]) -> T:
        """Call `publish`, which leaves flags alone, while vCPUs may be in the guest.

        Those of an unslaved VM are kept out: its counter is told what they have executed once they are out, and a break
        point before that would be in their past.
        """
        return publish() if self.backend.counter_follows_host else self.with_vcpus_out(vcpu, publish)

    def begin_segment(self, change: Change, scale: ClockScale) -> None:
        """End the present segment at the break point of a publish: `change` says how time goes on there, at `scale`."""
        if self.is_paused:
            self.replace(change)
        else:
            self._publish(change, self.state._replace(scale=scale))

    def change_rate(
        self,
        terms: RateTerms,
        stamps: HostStamps,
        kind: EventKind,
        why: str,
        *,
        events: tuple[Event, ...] = (),
        taking: Callable[[], object] = nothing,
    ) -> None:
        """Go on at another rate from the next break point on, with an event after `events`.

        taking: sets what changes with it, as a Change does.
        """
        old = self.state
        scale = old.scale if terms.rate == old.timeline.rate else old.timeline.scale(terms.rate)

        def change(tsc: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
            turned = old.timeline.copy()
            turned.begin_segment(tsc, terms)
            new = TimeState(turned, turned.line(), scale, old.paused_at)
            taking()
            return new, (*events, self.event(kind, why, stamps, tsc=tsc, before=old, after=new))

        self.begin_segment(change, scale)

    def step(self, change: Change, shown: TimeState, moved: tuple[int, int]) -> None:
        """Change time by a declared step to `shown`, and publish; `moved`: see TimePages.move()."""
        if self.is_paused:
            self.replace(change, moved)
        else:
            self._publish(change, shown, moved=moved)

    def resume(self, change: Change, shown: TimeState, scale: ClockScale, *, step_ns: int, guest_stopped: bool) -> None:
        """Let time go on where `shown` begins, `step_ns` ahead: at its rate until the break, at `scale` after it.

        For with_vcpus_out(): no vCPU is in the guest until all pages are published.
        """
        flags = self._flags | (GUEST_STOPPED if guest_stopped else 0)
        going_on = shown.timeline.begin_tsc, step_ns, shown.scale
        self._publish_to(range(self.vcpus), flags, change, shown._replace(scale=scale), going_on=going_on)

    def replace(self, change: Change, moved: tuple[int, int] = (0, 0), *, of_one_numbering: bool = True) -> None:
        """Change what no page is to show yet, as of now; of_one_numbering: do TSCs name the same instants as before?"""
        now = self.host_tsc()
        take = self.take if of_one_numbering else self._take_anew
        commit(partial(self.pages.move, *moved), lambda _: change(now), take, self.events)

    def stop(self, change: Change) -> None:
        """Stop time at the instant from which on readers in this process see it stand, so that they see no step."""
        commit(self.pages.stop, change, self._take_stopped, self.events)

    def be_restored(self, state: TimeState, events: tuple[Event, ...]) -> None:
        """Stand still as another clock was saved, whose guest may have read the time up to then."""
        tsc = state.timeline.begin_tsc
        stood_ns = state.timeline.at(tsc).__floor__() & U64_MASK
        self._was_shown_before = True
        commit(partial(self.pages.stand_still, tsc, stood_ns), lambda _: (state, events), self.take, self.events)
        self.forget_past()

    def take(self, state: TimeState) -> None:
        """Let `state` be the present one.  Asked twice, it does nothing the second time."""
        if state.timeline.begin_tsc != self.state.timeline.begin_tsc:
            self._history.add(self.state.timeline)
        self.state = state
        self.time_changed(state.paused_at is not None)

    def forget_past(self) -> None:
        """The host's TSC stepped: it does not name the instants before that any more."""
        self._history.clear()

    def _take_anew(self, state: TimeState) -> None:
        self.take(state)
        self.forget_past()

    # Events

    def event(
        self,
        kind: EventKind,
        why: str,
        stamps: HostStamps,
        *,
        tsc: HostTsc | None = None,
        before: TimeState | None = None,
        after: TimeState | None = None,
        cause: EventCause = EventCause.VMM,
        policy: str | None = None,
    ) -> Event:
        """What happened at `tsc`, shortly after `stamps`, and what it did to guest time: nothing, if not said.

        policy: what settled missed time by it.
        """
        before = before or self.state
        after = after or before
        tsc = stamps.tsc if tsc is None else tsc
        if signed64(tsc - after.timeline.begin_tsc) < 0:  # the stamps are older than what the clock has just found
            tsc = after.timeline.begin_tsc
        later_ns = signed64(tsc - stamps.tsc) * NS_PER_S // self.backend.tsc_hz
        return Event(
            kind,
            why,
            tsc,
            stamps.raw_ns + later_ns,
            stamps.real_ns + later_ns,
            before.timeline.at(tsc),
            after.timeline.at(tsc),
            before.rate,
            after.rate,
            cause=cause,
            tsc_hz=self.backend.tsc_hz,
            provider=self.provider,
            policy=policy,
        )

    def tell(self, kind: EventKind, why: str, cause: EventCause = EventCause.VMM) -> None:
        """Record what leaves guest time alone, as of now."""
        self.events.record(self.event(kind, why, self.backend.stamps(), cause=cause))

    def record(self, events: tuple[Event, ...], taking: Callable[[], object]) -> None:
        """Record what leaves guest time alone in one step with what changes by it; taking: sets that, as a Change."""
        commit(self.host_tsc, lambda _: (None, events), lambda _: taking(), self.events)

    # Inside

    def _take_stopped(self, state: TimeState) -> None:
        if not self.pages.was_published:
            tsc = state.timeline.begin_tsc
            self.pages.stand_still(tsc, state.timeline.at(tsc).__floor__() & U64_MASK)
        self.take(state)

    @property
    def _flags(self) -> int:
        return TSC_STABLE_BIT if self.backend.tsc_stable and self._stable() else 0

    def _publish(
        self,
        change: Change,
        shown: TimeState,
        *,
        moved: tuple[int, int] = (0, 0),
        vcpu: int | None = None,
        again: bool = False,
    ) -> None:
        """Flags, and pages that newly came, take all vCPUs out of the guest; all else is published beside them."""
        flags = self._flags
        if not self._all_out and flags == self._shown_flags and not self.pages.lacks_flags(vcpu):
            one = () if vcpu is None else (vcpu,)
            self.beside_guests(vcpu, partial(self._publish_to, one, flags, change, shown, moved=moved, again=again))
        else:
            every = range(self.vcpus)
            self.with_vcpus_out(vcpu, partial(self._publish_to, every, flags, change, shown, moved=moved, again=again))

    def _publish_to(
        self,
        out_of_guest: Iterable[int],
        flags: int,
        change: Change,
        shown: TimeState,
        *,
        moved: tuple[int, int] = (0, 0),
        going_on: tuple[int, int, ClockScale] | None = None,
        again: bool = False,
    ) -> None:
        """Publish the line and the scale of `shown` in one step with what changes by that."""
        self._shown_flags = None
        publish = partial(
            self.pages.publish,
            shown.line,
            shown.scale,
            flags=flags,
            out_of_guest=out_of_guest,
            moved=moved,
            going_on=going_on,
            again=again,
        )
        if change is _unchanged:
            publish()
        else:
            commit(publish, change, self.take, self.events)
        self._shown_flags = flags & ~GUEST_STOPPED


def checked_vcpus(vcpus: int) -> int:
    """How many vCPUs a VM has; ConfigError if no VM has that many."""
    count = whole("vcpus", vcpus)
    if not 1 <= count <= VCPUS_MAX:
        raise ConfigError(f"a VM with {shown(count)} vCPUs; choose 1 to {VCPUS_MAX}")
    return count


def _unchanged(_: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
    """For a publish that changes nothing."""
    raise NotImplementedError
