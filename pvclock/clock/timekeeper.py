"""One VM's time state, pages and event log, and the transaction that changes all three together.

An operation computes a new `TimeState`.  Publishing the pages, replacing the state and recording the event are one
step: neither a callback's error nor a signal handler's exception leaves it half done.
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
from pvclock._tsc_writes import follow_tsc, shows_line_alone
from pvclock.arguments import vcpu_number, whole
from pvclock.clock.event_log import EventLog
from pvclock.clock.live_clock import LiveClock
from pvclock.errors import ConfigError, GuestAddressError, StateError
from pvclock.host.backend import Backend
from pvclock.quantities import NS_PER_S, U64_MASK, GuestNs, HostTsc, shown, signed64
from pvclock.readings import ClockLine, HostStamps, TimeInfo
from pvclock.timekeeping.events import Event, EventCause, EventKind
from pvclock.timekeeping.history import History
from pvclock.timekeeping.timeline import RateTerms, Timeline

__all__ = ["MAX_AGE_S", "VCPUS_MAX", "TimeState", "Timekeeper", "checked_vcpus"]

MAX_AGE_S: Final = 2.0
"""Refresh pages at least this often, in seconds of guest time.  mul is up to 0.47 ppb slow, so an older page has lost
more than the 1 ns that one refresh gives back; later refreshes give back the rest."""

VCPUS_MAX: Final = 4096
"""KVM_MAX_VCPUS on x86, and the most that the state format holds."""

AHEAD_NS_MAX: Final = 1
"""How far ahead of the timeline a page may be."""

T = TypeVar("T")


class PausePoint(NamedTuple):
    """The instant at which guest time stopped.

    stamps: the host's clocks at that instant.  tsc_hz: that host's TSC frequency.  dilation: applies to the time
    missed, whatever dilate() sets while paused.  elsewhere: the pause was on another host, or on this one before a
    restore.
    """

    stamps: HostStamps
    tsc_hz: int
    dilation: Fraction
    elsewhere: bool = False


class TimeState(NamedTuple):
    """Guest time and its rate.  Immutable: an operation replaces it as a whole.

    line: the timeline's present segment as C reads it.  scale: the (mul, shift) that pages show for its rate.
    """

    timeline: Timeline
    line: ClockLine
    scale: ClockScale
    paused_at: PausePoint | None = None

    @staticmethod
    def of(timeline: Timeline, paused_at: PausePoint | None = None) -> TimeState:
        """The state of that timeline, which the caller must not change afterwards."""
        return TimeState(timeline, timeline.line(), timeline.scale(timeline.rate), paused_at)

    @property
    def rate(self) -> Fraction:
        """Guest seconds in a nominal host second; 0 while paused."""
        return self.timeline.rate if self.timeline.is_running else Fraction(0)


Take: TypeAlias = Callable[[TimeState], object]
ChangeFrom: TypeAlias = Callable[[T], tuple[TimeState, tuple[Event, ...]]]
Change: TypeAlias = ChangeFrom[HostTsc]
"""Called with the host TSC of the change; returns the new state and the events to record.

Runs past the point where anything can fail, and sets what else changes with time.  Idempotent: an interrupt may cause a
second call.
"""


def nothing(*_: object) -> None:
    """Do nothing: the default for optional callables."""


class Timekeeper:
    """The time of one VM with `vcpus` vCPUs in `memory`; guest time 0 is now.

    provider: the name of the guest's clock interface, for events.
    in_step: returns True if the host's TSC is trusted, and all vCPUs' TSCs have one offset to it.  allows_stable:
    returns True if pages may say so.  Both are called at every publish.
    tsc_is_good: returns True if this CPU's TSC is not behind; called with republish()'s vcpu before a publish whose
    operation has not checked the host itself.

    Thread-safety: change state only inside `with changing`, which admits one thread at a time and calls the callbacks
    when it ends.
    """

    def __init__(
        self,
        memory: GuestMemory,
        vcpus: int,
        backend: Backend,
        provider: str,
        *,
        in_step: Callable[[], bool],
        allows_stable: Callable[[], bool],
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
        timeline = Timeline(self.host_tsc(), backend.tsc_hz)
        timeline.check(Fraction(1))
        self.state = TimeState.of(timeline)
        self._in_step, self._allows_stable, self._tsc_is_good = in_step, allows_stable, tsc_is_good
        self.time_changed: Callable[[bool], object] = nothing
        """Hooks.time_changed of the guest's provider."""

        self._history = History()
        self._shown_flags: int | None = 0  # None: an interrupted publish may have shown others
        self._all_out = False  # with_vcpus_out() is on the stack
        self._was_shown_before = False  # by the clock from which this one was restored

    def take_over(self) -> None:
        """Become the live clock of `memory`.  The previous one can change nothing more and releases its vCPUs."""
        before = self.changing.take_over(self.live)
        if isinstance(before, LiveClock):
            before.hand_over()

    # What time it is

    @property
    def timeline(self) -> Timeline:
        """The present segment; do not change it in place."""
        return self.state.timeline

    @property
    def is_paused(self) -> bool:
        """True while guest time is stopped."""
        return self.state.paused_at is not None

    @property
    def was_shown(self) -> bool:
        """True if a guest may have read the time from a page of this clock or of the one it was restored from."""
        return self._was_shown_before or self.pages.was_published

    def host_tsc(self) -> HostTsc:
        """The host's TSC now."""
        return HostTsc(self.backend.counter.read())

    def now(self) -> GuestNs:
        """Guest time now, in ns, from the timeline rather than a page."""
        return GuestNs(self.timeline.at(self.host_tsc()).__floor__() & U64_MASK)

    def at(self, host_tsc: HostTsc) -> Fraction:
        """Guest time in ns at `host_tsc`, exact, from the segment in effect then.

        RangeError before the oldest segment kept (history.SEGMENTS_KEPT).
        """
        with self.changing.lock:  # read the present segment and the history consistently
            return self._history.at(host_tsc, self.timeline)

    def shown_at(self, host_tsc: HostTsc) -> GuestNs:
        """The ns that a guest computes at `host_tsc` from the pages last published."""
        with self.changing.lock:
            return GuestNs(self.pages.shown_at(host_tsc))

    def page(self, vcpu: int) -> TimeInfo | None:
        """vCPU's page as read from guest memory; None if there is none."""
        gpa = self.pages.registered(vcpu)
        try:
            return None if gpa is None else read_time_info(self.memory, gpa)
        except GuestAddressError:
            return None

    def check_vcpu(self, vcpu: int) -> int:
        """`vcpu`; RangeError if this VM has no vCPU of that number."""
        return vcpu_number(vcpu, self.vcpus)

    def check_vcpus_out(self, operation: str) -> None:
        """StateError if the backend reports running vCPUs; call it inside with_vcpus_out()."""
        if self.backend.vcpus_are_out() is False:
            allowed = "hold them first: Machine.pause(), Runner.pause(), or what your backend's vcpus_are_out() reports"
            raise StateError(operation, "the vCPUs run", allowed)

    # Changes, inside `with changing`

    def republish(self, vcpu: int | None = None, *, is_checked: bool = False) -> None:
        """Publish the present segment again; does nothing while paused, since resume() publishes.

        On a CPU whose TSC is behind, publishes at the last break point, so guests on other CPUs see no difference.
        vcpu: the caller's own, which is out of the guest, so that its flags can be written too.  is_checked: the caller
        has just found that the TSC is good.
        """
        if not self.is_paused:
            again = not (is_checked or self._tsc_is_good(vcpu))
            self._publish(_unchanged, self.state, vcpu=vcpu, again=again)

    def publish_with(
        self,
        begin: Callable[[], object],
        undo: Callable[[], object],
        events: Callable[[], tuple[Event, ...]],
        vcpu: int | None = None,
        *,
        tsc_only: bool = False,
    ) -> None:
        """Apply begin(), which changes something other than time, publish, and record events(); undo() on failure.

        events: called as a Change is, past the point where anything can fail.  vcpu: as republish().  While paused
        nothing is published.  tsc_only: begin() moves the TSC of `vcpu` alone: if nothing but its page follows from
        that, that page alone changes, and the line stays.
        """
        again = not self.is_paused and not self._tsc_is_good(vcpu)

        def publish(reached: Callable[[], None]) -> None:
            def change(_: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
                reached()
                return self.state, events()

            if self.is_paused:
                commit(partial(self.pages.write_own_pages, self._flags), change, self.take, self.events)
            elif tsc_only and vcpu is not None and self.keeps_line(vcpu):
                self.commit(partial(follow_tsc, self.pages, vcpu), change)
            else:
                self._publish(change, self.state, vcpu=vcpu, again=again)

        attempt(begin, undo, publish)

    def keeps_line(self, vcpu: int) -> bool:
        """Can vCPU's page alone follow its TSC: does nothing else depend on that, and is no other flag due?"""
        if not self.backend.counter_follows_host or self._flags != self._shown_flags:
            return False
        return not self.pages.lacks_flags(vcpu) and shows_line_alone(self.pages, vcpu)

    def with_vcpus_out(self, vcpu: int | None, operation: Callable[[], T]) -> T:
        """Call `operation` with all vCPUs out of the guest, so that its publishes write all vCPUs' flags.

        vcpu: the caller's own, which is already out.
        """
        if self._all_out:
            return operation()
        with self.backend.quiesce(vcpu):
            try:
                self._all_out = True
                return operation()
            finally:
                self._all_out = False

    def publish_while_vcpus_run(self, vcpu: int | None, publish: Callable[[], T]) -> T:
        """Call `publish`, which leaves flags alone, while vCPUs may be in the guest.

        On an execution-time counter vCPUs are kept out: it advances by what they executed only once they have exited,
        and a break point before that would be in their past.
        """
        return publish() if self.backend.counter_follows_host else self.with_vcpus_out(vcpu, publish)

    def begin_segment(self, change: Change, scale: ClockScale) -> None:
        """Publish, and begin a new segment at the break point: `change` gives it, and pages show it by `scale`."""
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
        on_commit: Callable[[], object] = nothing,
    ) -> None:
        """Change to the rate of `terms` at the next break point; record `events`, then an event of `kind`.

        on_commit: sets what else changes, under a Change's rules.
        """
        old = self.state
        scale = old.scale if terms.rate == old.timeline.rate else old.timeline.scale(terms.rate)

        def change(tsc: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
            changed = old.timeline.copy()
            changed.begin_segment(tsc, terms)
            new = TimeState(changed, changed.line(), scale, old.paused_at)
            on_commit()
            return new, (*events, self.event(kind, why, stamps, tsc=tsc, before=old, after=new))

        self.begin_segment(change, scale)

    def step(self, change: Change, shown: TimeState, moved: tuple[int, int]) -> None:
        """Step time to `shown`, and publish.  moved: see TimePages.move()."""
        if self.is_paused:
            self.replace(change, moved)
        else:
            self._publish(change, shown, moved=moved)

    def resume(self, change: Change, shown: TimeState, scale: ClockScale, *, step_ns: int, guest_stopped: bool) -> None:
        """Start time where `shown` begins, `step_ns` ahead; at its rate until the break point, at `scale` after it.

        Call it inside with_vcpus_out(): no vCPU may enter the guest before all pages are published.
        """
        flags = self._flags | (GUEST_STOPPED if guest_stopped else 0)
        start = shown.timeline.begin_tsc, step_ns, shown.scale
        self._publish_to(range(self.vcpus), flags, change, shown._replace(scale=scale), start=start)

    def replace(self, change: Change, moved: tuple[int, int] = (0, 0), *, tsc_stepped: bool = False) -> None:
        """Change time as of now without publishing.  tsc_stepped: the host TSC was renumbered; drop the history."""
        now = self.host_tsc()
        take = self._take_and_forget if tsc_stepped else self.take
        self.commit(partial(self.pages.move, *moved), lambda _: change(now), take)

    def stop(self, change: Change) -> None:
        """Stop time at the very instant at which readers in this process see it stop, so that they see no step."""
        self.commit(self.pages.stop, change, self._take_stopped)

    def restore_paused(self, state: TimeState, events: tuple[Event, ...]) -> None:
        """Take the paused `state` of a saved clock, whose guest may have read any time up to it, and 1 ns ahead."""
        tsc = state.timeline.begin_tsc
        stopped_ns = state.timeline.at(tsc).__floor__() + AHEAD_NS_MAX & U64_MASK
        self._was_shown_before = True
        self.commit(partial(self.pages.stand_still, tsc, stopped_ns), lambda _: (state, events), self._take_and_forget)

    def commit(self, publish: Callable[[], T], change: ChangeFrom[T], take: Take | None = None) -> None:
        """Publish, take `change`'s state and record its events as one step; then tell the provider, if time changed."""
        before = self.state
        commit(publish, change, take or self.take, self.events, lambda state: self._tell(before, state))

    def _tell(self, before: TimeState, state: TimeState) -> None:
        if state is not before:
            self.time_changed(state.paused_at is not None)

    def take(self, state: TimeState) -> None:
        """Make `state` the present one; idempotent."""
        if state.timeline.begin_tsc != self.state.timeline.begin_tsc:
            self._history.add(self.state.timeline)
        self.state = state

    def forget_past(self) -> None:
        """Drop the past segments: after a host TSC step, its old values no longer identify instants."""
        self._history.clear()

    def _take_and_forget(self, state: TimeState) -> None:
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
        """An event at `tsc`, shortly after `stamps`; `before` and `after` default to the present state.

        policy: the catch-up policy applied, in words.
        """
        before = before or self.state
        after = after or before
        tsc = stamps.tsc if tsc is None else tsc
        if signed64(tsc - after.timeline.begin_tsc) < 0:  # the stamps predate the present segment
            tsc = after.timeline.begin_tsc
        later_ns = signed64(tsc - stamps.tsc) * NS_PER_S // self.backend.tsc_hz
        return Event(
            kind,
            why,
            tsc,
            stamps.raw_ns + later_ns,
            stamps.real_ns + later_ns,
            *_times_and_rates(before, after, tsc),
            cause=cause,
            tsc_hz=self.backend.tsc_hz,
            provider=self.provider,
            policy=policy,
        )

    def tell(self, kind: EventKind, why: str, cause: EventCause = EventCause.VMM) -> None:
        """Record an event as of now that does not change guest time."""
        self.events.record(self.event(kind, why, self.backend.stamps(), cause=cause))

    def record(self, events: tuple[Event, ...], on_commit: Callable[[], object]) -> None:
        """Record events that do not change guest time, in one step with on_commit(); that follows a Change's rules."""
        commit(self.host_tsc, lambda _: (None, events), lambda _: on_commit(), self.events)

    # Inside

    def _take_stopped(self, state: TimeState) -> None:
        if not self.pages.was_published:
            tsc = state.timeline.begin_tsc
            self.pages.stand_still(tsc, state.timeline.at(tsc).__floor__() & U64_MASK)
        self.take(state)

    @property
    def _flags(self) -> int:
        return TSC_STABLE_BIT if self._in_step() and self._allows_stable() else 0

    def _publish(
        self,
        change: Change,
        shown: TimeState,
        *,
        moved: tuple[int, int] = (0, 0),
        vcpu: int | None = None,
        again: bool = False,
    ) -> None:
        """Publish; with all vCPUs out of the guest if flags change or a page is new, else while they run."""
        flags = self._flags
        if not self._all_out and flags == self._shown_flags and not self.pages.lacks_flags(vcpu):
            one = () if vcpu is None else (vcpu,)
            publish = partial(self._publish_to, one, flags, change, shown, moved=moved, again=again)
            self.publish_while_vcpus_run(vcpu, publish)
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
        start: tuple[int, int, ClockScale] | None = None,
        again: bool = False,
    ) -> None:
        """Publish `shown`'s line and scale in one step with `change`."""
        self._shown_flags = None
        publish = partial(
            self.pages.publish,
            shown.line,
            shown.scale,
            flags=flags,
            out_of_guest=out_of_guest,
            moved=moved,
            start=start,
            again=again,
            in_step=self.pages.reference.is_served and self._in_step(),
        )
        if change is _unchanged:
            publish()
        else:
            self.commit(publish, change)
        self._shown_flags = flags & ~GUEST_STOPPED


def _times_and_rates(
    before: TimeState, after: TimeState, tsc: HostTsc
) -> tuple[Fraction, Fraction, Fraction, Fraction]:
    """Guest time in ns and rate at `tsc` by each, as Event has them; most events change neither, and fractions cost."""
    ns, rate = before.timeline.at(tsc), before.rate
    return (ns, ns, rate, rate) if after is before else (ns, after.timeline.at(tsc), rate, after.rate)


def checked_vcpus(vcpus: int) -> int:
    """`vcpus`; ConfigError unless 1 to VCPUS_MAX."""
    count = whole("vcpus", vcpus)
    if not 1 <= count <= VCPUS_MAX:
        raise ConfigError(f"a VM with {shown(count)} vCPUs; choose 1 to {VCPUS_MAX}")
    return count


def _unchanged(_: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
    """Marks a publish that changes no state; never called."""
    raise NotImplementedError
