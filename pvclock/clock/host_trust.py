"""Checks whether the host's TSC is reliable, and handles TSC steps, a CPU that is behind, and suspends.

Every publish compares the TSC with the last break point.  Ticks and operations also compare it with CLOCK_MONOTONIC_RAW
if it has stepped before, the host has slept or the clock is paused.  A TSC below the last break point is read on all
CPUs first.  If all show it, the step is a renumbering of the host's instants: timeline, pages, vCPU offsets and the
followed reference move along, so that guest time and guest TSCs advance by the time that passed on the raw clock.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from pvclock._transaction import attempt
from pvclock.clock.follower import Follower
from pvclock.clock.timekeeper import Timekeeper, TimeState
from pvclock.clock.vcpu_tscs import VcpuTscs
from pvclock.errors import StateError
from pvclock.host.watch import RATE_BOUND_PPM, RAW_GRAIN_NS, Trouble, TroubleKind
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, signed64
from pvclock.readings import HostStamps, Reference, Sample
from pvclock.timekeeping import catchup
from pvclock.timekeeping.catchup import Policy
from pvclock.timekeeping.events import Event, EventKind

__all__ = ["HostTrust", "slept_ns"]

SLEPT_LEAST_NS: Final = 1_000_000
"""A shorter sleep is noise: two bracketed readings of CLOCK_BOOTTIME - CLOCK_MONOTONIC differ by some 100 ns."""

RETURN_TOLERANCE: Final = 100
"""A TSC has returned if it jumped ahead by as much as it stepped back, to 1 part in this."""


class HostTrust:
    """Tracks whether a clock can rely on its host's TSC, and re-bases it when the TSC steps or the host sleeps."""

    def __init__(self, keeper: Timekeeper, tscs: VcpuTscs, follower: Follower) -> None:
        self.sleep_policy: Policy = catchup.Freeze()
        """The catch-up policy for a host suspend during which the VM ran."""
        self._keeper = keeper
        self._tscs = tscs
        self._follower = follower
        self._tsc_trusted = True  # by the last apply_host_findings()
        self._tsc_failed = False  # it stepped, or one CPU's is behind: no later check clears it
        self._last_good = keeper.backend.stamps()  # at the last check that passed
        self._step_back_ticks: int | None = None  # by the last step; the TSC may return by as much
        self._is_behind = False  # this CPU's TSC, and an event was recorded
        self._is_examining = False
        self._recorded: set[EventKind] = set()  # troubles, since the last apply_host_findings()

    def check(self, vcpu: int | None = None) -> bool:
        """Check the TSC before a publish; False if this CPU's TSC is behind the others'.

        Costs one TSC read, unless the TSC is below the last break point or far enough ahead to have returned from a
        step.
        """
        if self._is_examining:  # this publish is part of an examination
            return True
        ahead = signed64(self._keeper.host_tsc() - self._least_tsc)
        may_have_returned = self._step_back_ticks is not None and ahead >= self._step_back_ticks // 2
        if ahead >= 0 and not may_have_returned:
            self._is_behind = False
            return True
        return self.examine(vcpu) is not None

    def require(self, operation: str) -> HostStamps:
        """The host's clocks now, for an operation that needs a reliable TSC; StateError if this CPU's TSC is behind."""
        stamps = self.examine()
        if stamps is None:
            raise StateError(operation, "this CPU's TSC is behind the others'", "try again on another CPU")
        return stamps

    def examine(self, vcpu: int | None = None) -> HostStamps | None:
        """Compare the host's clocks with the last good instant; handle a step or a sleep.

        vcpu: the caller's own, which is out of the guest.  Returns None if this CPU's TSC is behind.
        """
        stamps = self._keeper.backend.stamps()
        if not self._keeper.backend.counter_follows_host:  # an execution-time counter is unrelated to these clocks
            return stamps
        try:
            self._is_examining = True
            return self._examine(stamps, vcpu)
        finally:
            self._is_examining = False

    def _examine(self, stamps: HostStamps, vcpu: int | None) -> HostStamps | None:
        keeper, least = self._keeper, self._least_tsc
        if signed64(stamps.tsc - least) < 0:
            readings = keeper.backend.tsc_readings()
            if any(signed64(reading - least) >= 0 for reading in readings):
                return self._report_cpu_behind(least, stamps, readings)
            stamps = self._recover_from_step_back(stamps, vcpu)
        elif self._has_returned(stamps):
            stamps = self._recover_from_return(stamps, vcpu)
        elif self._stepped_back_unseen(stamps):
            stamps = self._recover_from_step_back(stamps, vcpu)
        if slept_ns(self._last_good, stamps):
            self._take_sleep(self._last_good, stamps, vcpu)
        self._is_behind, self._last_good = False, stamps
        return stamps

    @property
    def is_trusted(self) -> bool:
        """True if the host allows TSC_STABLE: its clocksource is trusted and its TSC has never failed."""
        return self._tsc_trusted and not self._tsc_failed

    @property
    def has_tscs_in_step(self) -> bool:
        """Do the vCPUs' TSCs run with each other, at one offset to a TSC of the host that is trusted?"""
        return self._keeper.backend.tsc_stable and self._tscs.agree and self.is_trusted

    def apply_host_findings(self, troubles: list[Trouble], *, tsc_trusted: bool) -> None:
        """Apply one host check: record each trouble as an event, and drop TSC_STABLE if one calls for it.

        Call it inside `with changing`.  Troubles that this class has found itself are not recorded again.
        """
        keeper, was_trusted = self._keeper, self.is_trusted
        good_here = self.examine() is not None
        stamps = keeper.backend.stamps()
        new = [trouble for trouble in troubles if EventKind(trouble.kind) not in self._recorded]
        events = tuple(keeper.event(EventKind(trouble.kind), trouble.why, stamps) for trouble in new)
        failed = any(trouble.unstable and trouble.kind is not TroubleKind.CLOCKSOURCE for trouble in troubles)
        before, after = (self._tsc_trusted, self._tsc_failed), (tsc_trusted, self._tsc_failed or failed)

        def record() -> tuple[Event, ...]:
            self._set_trust(after)
            self._recorded = set()
            return events

        if good_here and (after[0] and not after[1]) != was_trusted:  # otherwise the next publish drops STABLE
            keeper.publish_with(partial(self._set_trust, after), partial(self._set_trust, before), record)
        else:
            keeper.record(events, record)

    def _set_trust(self, trust: tuple[bool, bool]) -> None:
        self._tsc_trusted, self._tsc_failed = trust

    def utc_sample(self, vcpu: int | None = None) -> Sample:
        """One instant in UTC and on the TSC; if this CPU's TSC is behind, the TSC is computed from the raw clock."""
        if self.check(vcpu):
            return self._keeper.backend.sample(Reference.REALTIME)
        stamps = self._keeper.backend.stamps()
        return Sample(self._expected_tsc(stamps), stamps.real_ns, SLEPT_LEAST_NS)

    @property
    def least_tsc_in_order(self) -> HostTsc | None:
        """From which TSC on check() has nothing to find, until the next transaction; None if it has to look closer."""
        if self._step_back_ticks is not None or self._is_behind:
            return None
        return self._least_tsc

    # Steps of the TSC

    def _report_cpu_behind(
        self, least: HostTsc, stamps: HostStamps, readings: tuple[HostTsc, ...]
    ) -> HostStamps | None:
        """Record it, and drop STABLE at the next publish.  Pages stay: vCPUs on other CPUs would see a step."""
        keeper, behind = self._keeper, signed64(least - stamps.tsc)
        again = keeper.backend.stamps()
        read_low_once = all(signed64(tsc - least) >= 0 for tsc in (readings[0], again.tsc))

        def take() -> None:
            self._tsc_failed, self._is_behind = True, not read_low_once
            self._recorded.add(EventKind.TSC_STEP)

        if not self._is_behind:
            what = "read low once" if read_low_once else "is behind other CPUs'"
            why = f"this CPU's TSC {what}, by {behind} ticks or more; pages stay as they are, without STABLE"
            keeper.record((keeper.event(EventKind.TSC_STEP, why, stamps._replace(tsc=least)),), take)
        take()
        return again if read_low_once else None

    def _recover_from_step_back(self, stamps: HostStamps, vcpu: int | None) -> HostStamps:
        """The TSC went back on all CPUs: re-base guest time by the raw clock since the last good instant."""
        passed_ns = stamps.raw_ns - self._last_good.raw_ns
        before = self._expected_tsc_from_least(stamps)
        back = signed64(before - stamps.tsc)
        passed = (
            f"{max(passed_ns, 0)} ns passed by CLOCK_MONOTONIC_RAW"
            if passed_ns > 0
            else "CLOCK_MONOTONIC_RAW did not go on either, so nobody can tell how much time passed"
        )
        why = f"the host's TSC went back by {back} ticks on all CPUs; {passed}; guests may read some time again"
        began_anew = bool(slept_ns(self._last_good, stamps))  # a TSC that restarted in a sleep does not return
        return self._renumber(before, stamps, why, vcpu, None if began_anew else back)

    def _has_returned(self, stamps: HostStamps) -> bool:
        """True if a TSC that stepped back has since jumped ahead by as much."""
        if self._step_back_ticks is None:
            return False
        ahead, tolerated = self._ticks_ahead(stamps), self._tolerated_ticks(stamps)
        slept_ticks = slept_ns(self._last_good, stamps) * self._keeper.backend.tsc_hz // NS_PER_S
        off = abs(ahead - self._step_back_ticks)
        if slept_ticks and abs(ahead - slept_ticks) < off:  # it counted through a sleep of about that length
            return False
        return ahead > tolerated and off <= self._step_back_ticks // RETURN_TOLERANCE + tolerated

    def _stepped_back_unseen(self, stamps: HostStamps) -> bool:
        """True if in a sleep or a pause the TSC stepped back, and passed the last good instant before this check."""
        may_have = self._keeper.is_paused or bool(slept_ns(self._last_good, stamps))
        return may_have and self._ticks_ahead(stamps) < -self._tolerated_ticks(stamps)

    @property
    def _least_tsc(self) -> HostTsc:
        """The least value of a TSC that has not stepped: the last break point or the last good instant, if later."""
        break_tsc = HostTsc(self._keeper.pages.break_tsc)
        return self._last_good.tsc if signed64(self._last_good.tsc - break_tsc) > 0 else break_tsc

    def _expected_tsc(self, stamps: HostStamps) -> HostTsc:
        """The TSC computed from the raw clock since the last good instant."""
        passed_ns = max(stamps.raw_ns - self._last_good.raw_ns, 0)
        return HostTsc((self._last_good.tsc + passed_ns * self._keeper.backend.tsc_hz // NS_PER_S) & U64_MASK)

    def _expected_tsc_from_least(self, stamps: HostStamps) -> HostTsc:
        """As _expected_tsc(), but at least _least_tsc: a segment cannot end before it began."""
        expected, least = self._expected_tsc(stamps), self._least_tsc
        return expected if signed64(expected - least) > 0 else least

    def _tolerated_ticks(self, stamps: HostStamps) -> int:
        passed_ns = max(stamps.raw_ns - self._last_good.raw_ns, 0)
        return (passed_ns * RATE_BOUND_PPM // 10**6 + RAW_GRAIN_NS) * self._keeper.backend.tsc_hz // NS_PER_S

    def _ticks_ahead(self, stamps: HostStamps) -> int:
        """Ticks by which the TSC outran the raw clock since the last good instant; negative if it fell behind."""
        passed_ns = stamps.raw_ns - self._last_good.raw_ns
        return signed64(stamps.tsc - self._last_good.tsc) - passed_ns * self._keeper.backend.tsc_hz // NS_PER_S

    def _recover_from_return(self, stamps: HostStamps, vcpu: int | None) -> HostStamps:
        """The TSC returned: re-base by the raw clock.  Only here may guest time go back, by what it gained since."""
        before = self._expected_tsc_from_least(stamps)
        ahead = signed64(stamps.tsc - before)
        why = (
            f"the host's TSC came back: {ahead} ticks ahead of CLOCK_MONOTONIC_RAW, which decides; "
            "guests that read the time meanwhile read it again"
        )
        return self._renumber(before, stamps, why, vcpu, None)

    def _renumber(
        self, before: HostTsc, stamps: HostStamps, why: str, vcpu: int | None, went_back: int | None
    ) -> HostStamps:
        """With vCPUs out, make host TSC `before` equal to the stamps' TSC in all that refers to it."""
        self._keeper.with_vcpus_out(vcpu, partial(self._renumber_all, before, stamps, why, went_back))
        return stamps

    def _renumber_all(self, before: HostTsc, stamps: HostStamps, why: str, went_back: int | None) -> None:
        keeper, after = self._keeper, stamps.tsc
        tscs, following = self._tscs.plan_renumbering(before, after), self._follower.plan_renumbering(before, after)
        timeline = keeper.timeline.copy()
        timeline.rebase(before, after)
        paused_at = keeper.state.paused_at
        if paused_at is not None and not paused_at.elsewhere:
            tsc = HostTsc((paused_at.stamps.tsc + after - before) & U64_MASK)
            paused_at = paused_at._replace(stamps=paused_at.stamps._replace(tsc=tsc))
        state = TimeState.of(timeline, paused_at)
        step = keeper.event(EventKind.TSC_STEP, why, stamps, before=state)
        mark = stamps._replace(asleep_ns=self._last_good.asleep_ns)  # _take_sleep() comes next

        def renumber(reached: Callable[[], None]) -> None:
            def change(_: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
                reached()
                self._tsc_failed, self._step_back_ticks, self._last_good = True, went_back, mark
                self._recorded.add(EventKind.TSC_STEP)
                self._follower.take(following)
                return state, (step, *tscs.refusal(stamps, state))

            keeper.replace(change, ((after - before) & U64_MASK, 0), tsc_stepped=True)

        attempt(tscs.apply_honoured, tscs.undo, renumber)
        keeper.republish()

    # Sleep

    def _take_sleep(self, before: HostStamps, stamps: HostStamps, vcpu: int | None) -> None:
        """The host slept since the last good instant: apply sleep_policy; resume() does it for a paused clock."""
        keeper, slept = self._keeper, slept_ns(before, stamps)
        self._tscs.read_back(vcpu)
        ahead_ns = signed64(stamps.tsc - before.tsc) * NS_PER_S // keeper.backend.tsc_hz - stamps.raw_ns + before.raw_ns
        tsc_counted_on = 2 * ahead_ns > slept
        leave_out = self._follower.leave_out_sleep(slept, tsc_counted_on=tsc_counted_on)

        def take() -> None:
            leave_out()
            self._last_good = stamps
            self._recorded.add(EventKind.SUSPEND)

        if keeper.is_paused or tsc_counted_on:
            settled = "its TSC counted on, so guests had that time, and nothing is taken back"
            why = f"the host slept for {slept} ns; {'guest time stood still' if keeper.is_paused else settled}"
            keeper.record((keeper.event(EventKind.SUSPEND, why, stamps),), take)
        else:
            self._settle(slept, stamps, take)

    def _settle(self, slept: int, stamps: HostStamps, on_commit: Callable[[], object]) -> None:
        keeper, policy = self._keeper, self.sleep_policy
        settled = catchup.settle(policy, slept * keeper.timeline.terms.dilation)
        timeline = keeper.timeline.copy()
        timeline.begin_segment(stamps.tsc, timeline.terms)  # keep the past segment in the history
        timeline.jump(settled.step_ns)
        terms = timeline.terms
        if settled.slew is not None:
            timeline.slew(stamps.tsc, settled.slew_ns, settled.slew)
            terms = terms._replace(slew=timeline.plan(stamps.tsc))
        jumped = TimeState.of(timeline)
        scale = jumped.scale if terms == timeline.terms else timeline.scale(terms.rate)
        why = f"the host slept for {slept} ns while vCPUs ran; {policy}"
        slept_event = keeper.event(EventKind.SUSPEND, why, stamps, after=jumped, policy=str(policy))

        def change(break_tsc: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
            on_commit()
            if terms == timeline.terms:
                return jumped, (slept_event,)
            slewing = timeline.copy()
            slewing.begin_segment(break_tsc, terms)  # guests read the old rate up to the break
            new = TimeState(slewing, slewing.line(), scale)
            owed = f"{round(settled.slew_ns)} ns were slept"
            event = keeper.event(EventKind.SLEW, owed, stamps, tsc=break_tsc, before=jumped, after=new)
            return new, (slept_event, event)

        keeper.step(change, jumped._replace(scale=scale), (0, int(settled.step_ns)))


def slept_ns(before: HostStamps, after: HostStamps) -> int:
    """How long the host slept between two instants of one boot, in ns; 0 below SLEPT_LEAST_NS."""
    slept = after.asleep_ns - before.asleep_ns
    return slept if slept >= SLEPT_LEAST_NS else 0
