"""A published timeline under the VMM's hand: dilated, slewed, put forward, paused and resumed, exactly.

Each operation is done as a whole or not at all, and leaves an event.
"""

from __future__ import annotations

from fractions import Fraction
from operator import index

from pvclock import catchup
from pvclock._core import GUEST_STOPPED
from pvclock._memory import GuestMemory
from pvclock.backend import Backend
from pvclock.catchup import CatchUpTable, Policy, Slew
from pvclock.errors import RangeError, StateError
from pvclock.events import EventKind
from pvclock.published import PublishedTimeline
from pvclock.quantities import U64_MASK, HostTsc
from pvclock.readings import HostStamps, RunReport

__all__ = ["ControlledTimeline"]


class ControlledTimeline(PublishedTimeline):
    """The time of one VM, with all that a VMM does to it."""

    def __init__(self, memory: GuestMemory, vcpus: int, backend: Backend) -> None:
        super().__init__(memory, vcpus, backend)
        self._stopped_at: HostStamps | None = None  # while paused
        self._came_from_elsewhere = False  # paused on another host, or before its reboot
        self._policy: Policy = catchup.Freeze()

    @property
    def policy(self) -> Policy:
        """What becomes of missed time where resume() is not told; settable, by name too.  Saved with the clock."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy | str) -> None:
        self._policy = catchup.as_policy(policy)

    # Rates, which never step

    def dilate(self, numerator: int, denominator: int = 1) -> None:
        """Let guest time run at numerator/denominator of host time from now on, without a step.

        RangeError if no page can show that rate, or what a slew may make of it.
        """
        if numerator < 1 or denominator < 1:
            raise RangeError(f"dilation {numerator}/{denominator}; two whole numbers from 1 on: dilate(1, 2) halves")
        dilation = Fraction(numerator, denominator)
        self._timeline.check(dilation)
        with self._changing():
            tempo = self._timeline.tempo._replace(dilation=dilation)
            self._turn(tempo, EventKind.DILATE, f"dilate({numerator}, {denominator})")

    def slew(self, target_ns: int, max_ppm: int = 500) -> None:
        """Give guest time `target_ns` more than it would have (less, if negative), by running max_ppm off its pace.

        Adds to what is still being slewed; call refresh() at least every 2 s of host time until it is done.
        RangeError if all of it is 2^64 ns or more.
        """
        policy = Slew(max_ppm)
        catchup.as_policy(policy)
        with self._changing():
            if abs(self.skew_ns + target_ns) > U64_MASK:
                raise RangeError(f"slew({target_ns}): with what is still to be slewed it is 2^64 ns or more")
            self._slew(Fraction(target_ns), policy, f"slew({target_ns}, {max_ppm})")

    # Steps, all forward

    def skip(self, ns: int) -> None:
        """Put guest time forward by `ns` at once."""
        if index(ns) < 0:
            raise RangeError(f"skip({ns}): guest time goes forward only; slew({ns}) makes it later without a step back")
        with self._changing():
            self._check_end(ns, f"skip({ns})")
            self._jump(ns, EventKind.SKIP, f"skip({ns})")

    def offset(self, ns: int) -> None:
        """Add `ns` to guest time at once; a negative one only while no page was published, so that nobody saw it.

        RangeError if it would take back what a guest may have read, or make guest time negative.
        """
        with self._changing():
            now = self._check_end(index(ns), f"offset({ns})")
            if ns < 0 and (self._pages.was_published or now + ns < 0):
                raise RangeError(
                    f"offset({ns}) at guest time {round(now)} ns: time that was read is not taken back, nor is there "
                    f"any before 0; slew({ns}) makes it later without a step back"
                )
            self._jump(ns, EventKind.OFFSET, f"offset({ns})")

    # Standing still

    def pause(self) -> None:
        """Stop guest time at this instant.  For a VM whose vCPUs have left the guest and stay out until resume().

        StateError if it is paused.
        """
        with self._changing():
            if self._stopped_at is not None:
                raise StateError("pause", "guest time stands still already", "resume() it first")
            self._mend()
            stamps = self.backend.stamps()
            tsc = HostTsc(self.backend.counter.read())
            before = self._moment(tsc)
            self._timeline.stop(tsc)
            self._stopped_at = stamps._replace(tsc=tsc)
            self._record(EventKind.PAUSE, "pause()", tsc, before)

    def resume(self, policy: Policy | str | None = None, *, guest_stopped: bool = True) -> catchup.Settlement:
        """Let guest time go on; `policy` says what becomes of the time missed, the clock's own if it is not given.

        Pages are published before this returns, so let vCPUs in afterwards.  guest_stopped: tell guests that they were
        stopped, which keeps their watchdogs quiet.  StateError if it is not paused.
        """
        chosen = self._policy if policy is None else catchup.as_policy(policy)
        with self._changing():
            if self._stopped_at is None:
                raise StateError("resume", "guest time is running", "pause() it first")
            with self.backend.quiesce(None):
                tsc = HostTsc(self.backend.counter.read())
                before = self._moment(tsc)
                settled = catchup.settle(chosen, self._missed_ns(tsc))
                self._prepare_to_resume(tsc, settled.gain_ns)
                self._pages.move((tsc - self._stopped_at.tsc) & U64_MASK, int(settled.gain_ns))
                self._timeline.start(tsc)
                self._timeline.jump(settled.gain_ns)
                self._stopped_at, self._came_from_elsewhere = None, False
                self._take_segment()
                self._publish_to(range(self.vcpus), self._flags | (GUEST_STOPPED if guest_stopped else 0), None)
            self._pages.mark_dirty()
            self._record(EventKind.RESUME, f"{chosen}; {settled.why}".removesuffix("; "), tsc, before)
            if settled.slew is not None:
                self._slew(settled.slew_ns, settled.slew, f"{round(settled.slew_ns)} ns were missed")
            return settled

    def run_for(self, ns: int) -> RunReport:
        """Let a paused VM run for `ns` of guest time, and pause it: at that time or later.

        The overshoot stays in guest time and is reported; on a simulated backend it is below a tick.
        """
        if ns <= 0:
            raise RangeError(f"run_for({ns}); ns of guest time, more than 0")
        if self._stopped_at is None:
            raise StateError("run_for", "guest time is running", "pause() it first")
        begin = self._timeline.at(self._stopped_at.tsc)
        self.resume(catchup.Freeze(), guest_stopped=False)
        try:
            self.backend.run_until(self._timeline.tsc_at(begin + ns))
        finally:
            self.pause()
        ran = self._timeline.at(self._stopped_at.tsc) - begin
        return RunReport(ran, ran - ns)

    # Inside

    def _prepare_to_resume(self, tsc: HostTsc, gain_ns: Fraction) -> None:
        """Do what must be done before pages are published again; guest time gains gain_ns over the pause."""

    def _missed_ns(self, tsc: HostTsc) -> Fraction:
        """Guest time that would have passed since the pause, by the best clock that ran through it."""
        assert self._stopped_at is not None  # noqa: S101  # the caller's condition
        host_ns = self._timeline.missed_at(tsc)
        if self._came_from_elsewhere:
            now = self.backend.stamps()
            if now.boot_id is not None and now.boot_id == self._stopped_at.boot_id:
                host_ns = Fraction(now.raw_ns - self._stopped_at.raw_ns)
            else:
                host_ns = Fraction(now.real_ns - self._stopped_at.real_ns)
        return host_ns * self._timeline.tempo.dilation

    def _check_end(self, ns: int, operation: str) -> Fraction:
        """Guest time now; RangeError if `ns` more is beyond what a page can show."""
        now = self._timeline.at(HostTsc(self.backend.counter.read()))
        if now + ns > U64_MASK:
            raise RangeError(f"{operation} at guest time {round(now)} ns: a guest's clock ends at 2^64 ns")
        return now

    def _jump(self, ns: int, kind: EventKind, why: str) -> None:
        tsc = HostTsc(self.backend.counter.read())
        before = self._moment(tsc)
        self._timeline.jump(Fraction(ns))
        self._pages.move(0, ns & U64_MASK)
        self._take_segment()
        self._republish(None)
        self._record(kind, why, tsc, before)

    def _slew(self, ns: Fraction, policy: Slew | CatchUpTable, why: str) -> None:
        self._republish(None)  # what can fail, fails here: vCPUs that do not leave the guest
        self._timeline.slew(HostTsc(self.backend.counter.read()), ns, policy)
        self._take_segment()
        self._go_on_slewing(EventKind.SLEW, why)
