"""May a clock go by its host's TSC?  What is done when the TSC steps, when one CPU is behind, and when the host slept.

The TSC is compared with where it was at the last publish, always, and with CLOCK_MONOTONIC_RAW in ticks and once it
has stepped.  A step is confirmed on the other CPUs first.  What all CPUs show is taken as a renumbering of the host's
instants: timeline, pages, the vCPUs' offsets and what is known of a reference are moved along, so that guest time and
the guests' TSCs go on by as much as the raw clock says has passed.
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
from pvclock.host.watch import Trouble, TroubleKind
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, signed64
from pvclock.readings import HostStamps, Reference, Sample
from pvclock.timekeeping import catchup
from pvclock.timekeeping.catchup import Policy
from pvclock.timekeeping.events import Event, EventKind

__all__ = ["HostTrust", "slept_ns"]

SLEPT_LEAST_NS: Final = 1_000_000
"""CLOCK_BOOTTIME - CLOCK_MONOTONIC is read by brackets, so it differs by some 100 ns where nobody slept."""

RETURN_TOLERANCE: Final = 100
"""A TSC that comes back does so by as much as it went, to 1 part in this."""

RATE_BOUND_PPM: Final = 1000
RAW_GRAIN_NS: Final = 1000
"""What TSC and raw clock may differ by where none has stepped; see host/watch.py, which has the same bounds."""


class HostTrust:
    """What is known of the host's TSC, and what follows from it for one clock."""

    def __init__(self, keeper: Timekeeper, tscs: VcpuTscs, follower: Follower) -> None:
        self.sleep_policy: Policy = catchup.Freeze()
        """What becomes of a host's sleep that a running VM went through."""
        self._keeper = keeper
        self._tscs = tscs
        self._follower = follower
        self._clocksource_trusted = True  # by the last look that was noted
        self._tsc_failed = False  # did it step, or one CPU's fall behind?  No later look makes that good
        self._mark = keeper.backend.stamps()  # the last instant at which all was well
        self._went_back_ticks: int | None = None  # by the last step, which may be taken back
        self._is_behind = False  # this CPU, and it was told
        self._is_examining = False
        self._told: set[EventKind] = set()  # of trouble, since the last note()

    def check(self, vcpu: int | None = None) -> bool:
        """Before a publish: is the TSC good here and now?  False if it is this CPU that is behind.

        Costs one reading of the TSC, unless there is a suspicion: it is below the last break point, or so far beyond it
        that it may have come back.
        """
        if self._is_examining:  # and publishes what follows from that
            return True
        ahead = signed64(self._keeper.host_tsc() - self._least)
        may_have_returned = self._went_back_ticks is not None and ahead >= self._went_back_ticks // 2
        if ahead >= 0 and not may_have_returned:
            self._is_behind = False
            return True
        return self.examine(vcpu) is not None

    def require(self, operation: str) -> HostStamps:
        """The host's clocks now, for an operation that needs a good TSC; StateError if this CPU's is behind."""
        stamps = self.examine()
        if stamps is None:
            raise StateError(
                operation, "this CPU's TSC is behind the others'", "try again, where the thread runs on another CPU"
            )
        return stamps

    def examine(self, vcpu: int | None = None) -> HostStamps | None:
        """Compare all host clocks with what they were, and do what follows; None if this CPU's TSC is behind.

        vcpu: the caller's own, which is out of the guest.
        """
        stamps = self._keeper.backend.stamps()
        if (
            not self._keeper.backend.counter_follows_host
        ):  # a counter of executed ticks has nothing to do with these clocks
            return stamps
        try:
            self._is_examining = True
            return self._examine(stamps, vcpu)
        finally:
            self._is_examining = False

    def _examine(self, stamps: HostStamps, vcpu: int | None) -> HostStamps | None:
        keeper, least = self._keeper, self._least
        if signed64(stamps.tsc - least) < 0:
            readings = keeper.backend.tsc_readings()
            if any(signed64(reading - least) >= 0 for reading in readings):
                return self._one_cpu_is_behind(least, stamps, readings)
            stamps = self._stepped_back(stamps, vcpu)
        elif self._has_returned(stamps):
            stamps = self._came_back(stamps, vcpu)
        elif self._fell_behind(stamps):
            stamps = self._stepped_back(stamps, vcpu)
        if slept_ns(self._mark, stamps):
            self._take_sleep(self._mark, stamps, vcpu)
        self._is_behind, self._mark = False, stamps
        return stamps

    @property
    def is_trusted(self) -> bool:
        """May pages promise that all vCPUs' TSCs are in step, as far as the host goes?"""
        return self._clocksource_trusted and not self._tsc_failed

    def apply_host_findings(self, troubles: list[Trouble], *, clocksource_trusted: bool) -> None:
        """Apply what a look at the host has found: each trouble is an event, and takes STABLE if it must.

        For `with changing`.  What is found here, too, was recorded, and settled: it is not told again.
        """
        keeper, was_trusted = self._keeper, self.is_trusted
        good_here = self.examine() is not None
        stamps = keeper.backend.stamps()
        new = [trouble for trouble in troubles if EventKind(trouble.kind) not in self._told]
        events = tuple(keeper.event(EventKind(trouble.kind), trouble.why, stamps) for trouble in new)
        failed = any(trouble.unstable and trouble.kind is not TroubleKind.CLOCKSOURCE for trouble in troubles)
        before, after = (self._clocksource_trusted, self._tsc_failed), (clocksource_trusted, self._tsc_failed or failed)

        def told() -> tuple[Event, ...]:
            self._take_trust(after)
            self._told = set()
            return events

        if good_here and (after[0] and not after[1]) != was_trusted:  # else STABLE goes with the next publish
            keeper.adopt(partial(self._take_trust, after), partial(self._take_trust, before), told)
        else:
            keeper.record(events, told)

    def _take_trust(self, trust: tuple[bool, bool]) -> None:
        self._clocksource_trusted, self._tsc_failed = trust

    def utc_sample(self, vcpu: int | None = None) -> Sample:
        """One instant in UTC and on the TSC; on a CPU that is behind, on the others' TSC, as the raw clock has it."""
        if self.check(vcpu):
            return self._keeper.backend.sample(Reference.REALTIME)
        stamps = self._keeper.backend.stamps()
        return Sample(self._would_be(stamps), stamps.real_ns, SLEPT_LEAST_NS)

    # Steps of the TSC

    def _one_cpu_is_behind(
        self, least: HostTsc, stamps: HostStamps, readings: tuple[HostTsc, ...]
    ) -> HostStamps | None:
        """Pages do not move: vCPUs on the other CPUs would see that.  STABLE goes with the next publish."""
        keeper, behind = self._keeper, signed64(least - stamps.tsc)
        again = keeper.backend.stamps()
        read_low_once = all(signed64(tsc - least) >= 0 for tsc in (readings[0], again.tsc))

        def take() -> None:
            self._tsc_failed, self._is_behind = True, not read_low_once
            self._told.add(EventKind.TSC_STEP)

        if not self._is_behind:
            what = "read low once" if read_low_once else "is behind other CPUs'"
            why = f"this CPU's TSC {what}, by {behind} ticks or more; pages stay as they are, without STABLE"
            keeper.record((keeper.event(EventKind.TSC_STEP, why, stamps._replace(tsc=least)),), take)
        take()
        return again if read_low_once else None

    def _stepped_back(self, stamps: HostStamps, vcpu: int | None) -> HostStamps:
        """All CPUs' TSC went back: guest time goes on by what passed on the raw clock since the last good instant."""
        passed_ns = stamps.raw_ns - self._mark.raw_ns
        before = self._would_have_been(stamps)
        back = signed64(before - stamps.tsc)
        told = (
            f"{max(passed_ns, 0)} ns passed by CLOCK_MONOTONIC_RAW"
            if passed_ns > 0
            else "CLOCK_MONOTONIC_RAW did not go on either, so nobody can tell how much time passed"
        )
        why = f"the host's TSC went back by {back} ticks on all CPUs; {told}; guests may read some time again"
        began_anew = bool(slept_ns(self._mark, stamps))  # then it does not come back
        return self._renumbered(before, stamps, why, vcpu, None if began_anew else back)

    def _has_returned(self, stamps: HostStamps) -> bool:
        """Did a TSC that had stepped back jump ahead by as much?"""
        if self._went_back_ticks is None:
            return False
        ahead, tolerated = self._ticks_ahead(stamps), self._tolerated_ticks(stamps)
        slept_ticks = slept_ns(self._mark, stamps) * self._keeper.backend.tsc_hz // NS_PER_S
        off = abs(ahead - self._went_back_ticks)
        if slept_ticks and abs(ahead - slept_ticks) < off:  # it counted on in a sleep that was about as long
            return False
        return ahead > tolerated and off <= self._went_back_ticks // RETURN_TOLERANCE + tolerated

    def _fell_behind(self, stamps: HostStamps) -> bool:
        """Did the TSC step back, and get beyond the last good instant before anybody looked: in a sleep or a pause?"""
        may_have = self._keeper.is_paused or bool(slept_ns(self._mark, stamps))
        return may_have and self._ticks_ahead(stamps) < -self._tolerated_ticks(stamps)

    @property
    def _least(self) -> HostTsc:
        """What the TSC is at least, if it has not stepped: the last break point, or the last good instant."""
        break_tsc = HostTsc(self._keeper.pages.break_tsc)
        return self._mark.tsc if signed64(self._mark.tsc - break_tsc) > 0 else break_tsc

    def _would_be(self, stamps: HostStamps) -> HostTsc:
        """What the TSC would be by the raw clock, had it gone on since the last good instant."""
        passed_ns = max(stamps.raw_ns - self._mark.raw_ns, 0)
        return HostTsc((self._mark.tsc + passed_ns * self._keeper.backend.tsc_hz // NS_PER_S) & U64_MASK)

    def _would_have_been(self, stamps: HostStamps) -> HostTsc:
        """The same, but no less than it was already: a segment of time does not end before it began."""
        would_be, least = self._would_be(stamps), self._least
        return would_be if signed64(would_be - least) > 0 else least

    def _tolerated_ticks(self, stamps: HostStamps) -> int:
        passed_ns = max(stamps.raw_ns - self._mark.raw_ns, 0)
        return (passed_ns * RATE_BOUND_PPM // 10**6 + RAW_GRAIN_NS) * self._keeper.backend.tsc_hz // NS_PER_S

    def _ticks_ahead(self, stamps: HostStamps) -> int:
        """How far the TSC went beyond the raw clock since the last good instant."""
        passed_ns = stamps.raw_ns - self._mark.raw_ns
        return signed64(stamps.tsc - self._mark.tsc) - passed_ns * self._keeper.backend.tsc_hz // NS_PER_S

    def _came_back(self, stamps: HostStamps, vcpu: int | None) -> HostStamps:
        """The one time that guest time may go back: what guests read since the TSC came back was never so."""
        before = self._would_have_been(stamps)
        ahead = signed64(stamps.tsc - before)
        why = (
            f"the host's TSC came back: {ahead} ticks ahead of CLOCK_MONOTONIC_RAW, which decides; "
            "guests that read the time meanwhile read it again"
        )
        return self._renumbered(before, stamps, why, vcpu, None)

    def _renumbered(
        self, before: HostTsc, stamps: HostStamps, why: str, vcpu: int | None, went_back: int | None
    ) -> HostStamps:
        """Take host TSC `before` as what the stamps now say, everywhere."""
        self._keeper.with_vcpus_out(vcpu, partial(self._renumber_all, before, stamps, why, went_back))
        return stamps

    def _renumber_all(self, before: HostTsc, stamps: HostStamps, why: str, went_back: int | None) -> None:
        keeper, after = self._keeper, stamps.tsc
        tscs, following = self._tscs.renumbering(before, after), self._follower.renumbered(before, after)
        timeline = keeper.timeline.copy()
        timeline.rebase(before, after)
        paused_at = keeper.state.paused_at
        if paused_at is not None and not paused_at.elsewhere:
            tsc = HostTsc((paused_at.stamps.tsc + after - before) & U64_MASK)
            paused_at = paused_at._replace(stamps=paused_at.stamps._replace(tsc=tsc))
        state = TimeState.of(timeline, paused_at)
        step = keeper.event(EventKind.TSC_STEP, why, stamps, before=state)
        mark = stamps._replace(asleep_ns=self._mark.asleep_ns)  # a sleep is still to be settled

        def renumber(reached: Callable[[], None]) -> None:
            def change(_: HostTsc) -> tuple[TimeState, tuple[Event, ...]]:
                reached()
                self._tsc_failed, self._went_back_ticks, self._mark = True, went_back, mark
                self._told.add(EventKind.TSC_STEP)
                self._follower.take(following)
                return state, (step, *tscs.refusal(stamps, state))

            keeper.replace(change, ((after - before) & U64_MASK, 0), of_one_numbering=False)

        attempt(tscs.give_what_it_takes, tscs.give_back, renumber)
        keeper.republish()

    # Sleep

    def _take_sleep(self, before: HostStamps, stamps: HostStamps, vcpu: int | None) -> None:
        """The host slept since the last look: settled by sleep_policy, or at resume() if the clock is paused."""
        keeper, slept = self._keeper, slept_ns(before, stamps)
        self._tscs.read_back(vcpu)
        ahead_ns = signed64(stamps.tsc - before.tsc) * NS_PER_S // keeper.backend.tsc_hz - stamps.raw_ns + before.raw_ns
        tsc_counted_on = 2 * ahead_ns > slept
        leave_out = self._follower.leave_out_sleep(slept, tsc_counted_on=tsc_counted_on)

        def take() -> None:
            leave_out()
            self._mark = stamps
            self._told.add(EventKind.SUSPEND)

        if keeper.is_paused or tsc_counted_on:
            settled = "its TSC counted on, so guests had that time, and nothing is taken back"
            why = f"the host slept for {slept} ns; {'guest time stood still' if keeper.is_paused else settled}"
            keeper.record((keeper.event(EventKind.SUSPEND, why, stamps),), take)
        else:
            self._settle(slept, stamps, take)

    def _settle(self, slept: int, stamps: HostStamps, taking: Callable[[], object]) -> None:
        keeper, policy = self._keeper, self.sleep_policy
        settled = catchup.settle(policy, slept * keeper.timeline.terms.dilation)
        timeline = keeper.timeline.copy()
        timeline.begin_segment(stamps.tsc, timeline.terms)  # what was before stays as it was
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
            taking()
            if terms == timeline.terms:
                return jumped, (slept_event,)
            slewing = timeline.copy()
            slewing.begin_segment(break_tsc, terms)  # up to there guests read the old rate
            new = TimeState(slewing, slewing.line(), scale)
            owed = f"{round(settled.slew_ns)} ns were slept"
            event = keeper.event(EventKind.SLEW, owed, stamps, tsc=break_tsc, before=jumped, after=new)
            return new, (slept_event, event)

        keeper.step(change, jumped._replace(scale=scale), (0, int(settled.step_ns)))


def slept_ns(before: HostStamps, after: HostStamps) -> int:
    """How long the host slept between two instants of one boot."""
    slept = after.asleep_ns - before.asleep_ns
    return slept if slept >= SLEPT_LEAST_NS else 0
