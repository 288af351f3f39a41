"""Pause, resume and run_for().

Each pause and resume takes effect as a whole or not at all, and records an event.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from pvclock._transaction import attempt, finish
from pvclock.arguments import whole
from pvclock.clock.follower import Follower
from pvclock.clock.host_trust import HostTrust, slept_ns
from pvclock.clock.live_clock import vcpu_hold
from pvclock.clock.timekeeper import PausePoint, Timekeeper, TimeState
from pvclock.clock.vcpu_tscs import VcpuTscs
from pvclock.errors import RangeError, StateError
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, shown
from pvclock.readings import HostStamps, RunReport
from pvclock.timekeeping import catchup
from pvclock.timekeeping.catchup import Policy, SlewPolicy
from pvclock.timekeeping.events import Event, EventKind
from pvclock.timekeeping.timeline import Timeline

__all__ = ["PauseResume"]


class TimedRun:
    """One run_for(): guest time at its start and the guest time that ran, both in ns."""

    def __init__(self) -> None:
        self.begin_ns = self.ran_ns = Fraction(0)


class NamedPolicy(NamedTuple):
    """A policy and the words for it in events: the caller's, if given by name."""

    policy: Policy
    words: str


class PauseResume:
    """Pauses and resumes one VM's time, and applies the catch-up policy to the time missed."""

    def __init__(self, keeper: Timekeeper, host: HostTrust, tscs: VcpuTscs, follower: Follower) -> None:
        self._keeper, self._host, self._tscs, self._follower = keeper, host, tscs, follower
        self._policy: Policy = catchup.Freeze()
        self._run: TimedRun | None = None  # the run_for() under way

    @property
    def policy(self) -> Policy:
        """The default catch-up policy of resume(); settable, also by name.  Saved with the clock."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy | str) -> None:
        self._policy = catchup.as_policy(policy)

    def pause(self) -> None:
        """See GuestClock.pause()."""
        with self._keeper.changing:
            self._check_idle("pause")
            self._keeper.with_vcpus_out(None, self._pause)

    def resume(self, policy: Policy | str | None = None, *, guest_stopped: bool = True) -> catchup.CatchUp:
        """See GuestClock.resume()."""
        chosen = _choose(policy, self._policy)
        with self._keeper.changing:
            self._check_idle("resume")
            self._paused_at("resume")
            resume = partial(self._resume, chosen, guest_stopped=guest_stopped)
            return self._keeper.with_vcpus_out(None, resume)

    def run_for(self, ns: int, policy: Policy | str | None = None) -> RunReport:
        """See GuestClock.run_for()."""
        ns = whole("ns", ns)
        if ns <= 0:
            raise RangeError(f"run_for({shown(ns)}); ns of guest time, more than 0")
        chosen = _choose(policy, self._policy)
        run = TimedRun()
        finish(partial(self._run_for, run, ns, chosen), partial(self._end, run))
        return RunReport(run.ran_ns, run.ran_ns - ns)

    def _run_for(self, run: TimedRun, ns: int, policy: NamedPolicy) -> None:
        keeper = self._keeper
        with keeper.changing:
            self._check_idle("run_for")
            self._paused_at("run_for")
            _check_reach(keeper, ns)
            self._run = run
            paused_ns = keeper.timeline.at(keeper.timeline.begin_tsc)
            settled = keeper.with_vcpus_out(None, partial(self._resume, policy, guest_stopped=False))
            run.begin_ns = paused_ns + settled.step_ns
        self._run_until(run.begin_ns + ns)

    def _end(self, run: TimedRun) -> None:
        """Pause, if `run` started time.  If that fails, time runs on, and the VMM may call pause()."""
        keeper = self._keeper
        with keeper.changing:
            if self._run is not run:
                return
            try:
                if not keeper.is_paused:
                    keeper.with_vcpus_out(None, self._pause)
            except Exception:
                self._run = None
                raise
            run.ran_ns = keeper.timeline.at(keeper.timeline.begin_tsc) - run.begin_ns
            self._run = None

    # Inside

    def _check_idle(self, operation: str) -> None:
        if self._run is not None:
            raise StateError(operation, "a run_for() is under way", "wait until it returns")

    def _paused_at(self, operation: str) -> PausePoint:
        paused_at = self._keeper.state.paused_at
        if paused_at is None:
            raise StateError(operation, "guest time is running", "pause() it first")
        return paused_at

    def _pause(self) -> None:
        keeper = self._keeper
        if keeper.is_paused:
            raise StateError("pause", "guest time stands still already", "resume() it first")
        keeper.check_vcpus_out("pause")
        stamps = self._host.require("pause")
        at = stamps._replace(boot_id=keeper.backend.boot_id)
        hold = ExitStack()

        def stop(reached: Callable[[], None]) -> None:
            old = keeper.state
            terms = self._follower.holdover(old.timeline.terms)

            def change(tsc: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
                reached()
                keeper.live.pause(hold)
                stopped = old.timeline.copy()
                stopped.begin_segment(tsc, terms)
                last = TimeState.of(stopped.copy())
                stopped.stop(tsc)
                paused_at = PausePoint(at._replace(tsc=tsc), keeper.backend.tsc_hz, terms.dilation)
                new = TimeState.of(stopped, paused_at)
                event = partial(keeper.event, stamps=stamps, tsc=tsc)
                events = [event(EventKind.PAUSE, "pause()", before=last, after=new)]
                if terms != old.timeline.terms:
                    events.insert(0, event(EventKind.RATE, "pause()", before=old, after=last))
                return new, tuple(events)

            keeper.stop(change)

        attempt(lambda: hold.enter_context(vcpu_hold(keeper.backend)), hold.close, stop)

    def _resume(self, policy: NamedPolicy, *, guest_stopped: bool) -> catchup.CatchUp:
        """Apply `policy` to the time missed, and publish; call it inside with_vcpus_out()."""
        keeper = self._keeper
        stamps = self._host.require("resume")
        old, paused_at = keeper.state, self._paused_at("resume")
        tsc = keeper.host_tsc()
        now = stamps._replace(boot_id=keeper.backend.boot_id)
        missed_ns = _missed_ns(old.timeline, paused_at, now, tsc)
        settled = catchup.settle(policy.policy, missed_ns if keeper.backend.counter_follows_host else Fraction(0))
        started = _start(old.timeline, tsc, settled)
        shown = TimeState.of(started)
        terms = started.terms._replace(slew=started.plan(stamps.tsc))
        scale = started.scale(terms.rate)
        gain_ticks = int(settled.step_ns / started.terms.dilation * keeper.backend.tsc_hz / NS_PER_S)
        tscs = self._tscs.plan_start(tsc, gain_ticks)
        why = f"{policy.words}; {settled.why}".removesuffix("; ")
        refused = partial(tscs.refusal, stamps, old)

        def publish(reached: Callable[[], None]) -> catchup.CatchUp:
            def change(break_tsc: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
                reached()
                self._tscs.start()
                going = started.copy()
                going.begin_segment(break_tsc, terms)
                new = TimeState(going, going.line(), scale)
                event = partial(keeper.event, stamps=stamps)
                resumed = event(EventKind.RESUME, why, tsc=tsc, before=old, after=shown, policy=policy.words)
                events = [*refused(), resumed]
                if settled.slew is not None or terms != started.terms:
                    left = f"{round(started.skew_at(tsc))} ns are left"
                    owed = left if settled.slew is None else f"{round(settled.slew_ns)} ns were missed"
                    events.append(event(EventKind.SLEW, owed, tsc=break_tsc, before=shown, after=new))
                return new, tuple(events)

            keeper.resume(change, shown, scale, step_ns=int(settled.step_ns), guest_stopped=guest_stopped)
            return settled

        resume = partial(attempt, tscs.apply_honoured, tscs.undo, publish)
        return finish(resume, partial(_release_vcpus, keeper))

    def _run_until(self, end_ns: Fraction) -> None:
        """Let the vCPUs run until guest time reaches end_ns; the rate may change while they run."""
        keeper = self._keeper
        before: HostTsc | None = None
        while keeper.timeline.at(now := keeper.host_tsc()) < end_ns:
            if now == before:
                state = "the backend returned early, and its TSC stands still"
                raise StateError("run_for", state, "fix the backend's run_until()")
            before = now
            keeper.backend.run_until(keeper.timeline.tsc_at(end_ns))


def _release_vcpus(keeper: Timekeeper) -> None:
    """Let vCPUs in if time runs."""
    if not keeper.is_paused:
        keeper.live.resume()


def _choose(policy: Policy | str | None, own: Policy) -> NamedPolicy:
    """The policy given, or `own` for None."""
    found = own if policy is None else catchup.as_policy(policy)
    return NamedPolicy(found, policy if isinstance(policy, str) else str(found))


def _check_reach(keeper: Timekeeper, ns: int) -> None:
    """RangeError if `ns` of guest time needs more than 2^62 ticks; checked before anything changes."""
    ticks = ns * keeper.backend.tsc_hz / (NS_PER_S * keeper.timeline.rate)
    if ticks > U64_MASK // 4:
        raise RangeError(
            f"run_for({shown(ns)}): {shown(int(ticks))} ticks of the host's TSC; up to 2^62 can be waited for"
        )


def _missed_ns(timeline: Timeline, paused_at: PausePoint, stamps: HostStamps, tsc: HostTsc) -> Fraction:
    """Guest time missed since the pause, in ns, by the best clock that ran throughout.

    Within one boot that is the TSC at the known rate; the raw clock plus time asleep if the host slept or the clock was
    restored.  Across boots and hosts it is UTC.
    """
    then = paused_at.stamps
    same_boot = stamps.boot_id is not None and stamps.boot_id == then.boot_id
    if paused_at.elsewhere and not same_boot:
        host_ns = Fraction(stamps.real_ns - then.real_ns)
    elif paused_at.elsewhere or slept_ns(then, stamps):
        host_ns = Fraction(stamps.raw_ns - then.raw_ns + slept_ns(then, stamps))
    else:
        host_ns = timeline.missed_at(tsc)
    return host_ns * paused_at.dilation


def _start(stopped: Timeline, tsc: HostTsc, settled: catchup.CatchUp) -> Timeline:
    """The timeline started at `tsc`, with the catch-up's step and slew."""
    going = stopped.copy()
    going.start(tsc)
    going.jump(settled.step_ns)
    if isinstance(settled.slew, SlewPolicy):
        going.slew(tsc, settled.slew_ns, settled.slew)
    return going
