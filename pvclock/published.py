"""One VM's timeline and the pages that show it: everything that a VMM does to time, exact and composable.

An operation changes the timeline, publishes all pages, and leaves an event that says what it did.  The lock is taken
for every change and held while vCPUs are kept out of the guest, never while waiting for a guest.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from operator import index
from typing import Final

from pvclock import catchup
from pvclock._core import GUEST_STOPPED, TSC_STABLE_BIT, ClockScale, GuestMemory, TimePages, read_time_info
from pvclock.backend import Backend
from pvclock.catchup import CatchUpTable, Policy, Slew
from pvclock.errors import GuestAddressError, RangeError, StateError
from pvclock.events import Event, EventKind, EventLog
from pvclock.quantities import U64_MASK, Gpa, GuestNs, HostTsc
from pvclock.readings import Churn, ClockLine, HostStamps, Reading, RunReport, TimeInfo
from pvclock.timeline import Tempo, Timeline

__all__ = ["MAX_AGE_S", "PublishedTimeline"]

MAX_AGE_S: Final = 2.0
"""Refresh pages at least this often, in seconds of guest time.  mul is up to 0.47 ppb slow, so an older page has lost
more than the 1 ns that a refresh can give back; the rest comes back at the next ones."""


class PublishedTimeline:
    """The time of one VM with `vcpus` in `memory`; guest time 0 is now.

    Thread-safety: all methods may be called from any thread, vCPU threads included.
    """

    def __init__(self, memory: GuestMemory, vcpus: int, backend: Backend) -> None:
        self.memory = memory
        self.vcpus = vcpus
        self.backend = backend
        self.events = EventLog()
        self._lock = threading.RLock()
        self._pages = TimePages(memory, vcpus, backend.counter)
        self._timeline = Timeline(HostTsc(backend.counter.read()), backend.tsc_hz)
        self._stopped_at: HostStamps | None = None  # while paused
        self._came_from_elsewhere = False  # paused on another host, or before its reboot
        self._policy: Policy = catchup.Freeze()
        self._shown_flags = 0
        self._line, self._scale = self._timeline.line(), self._timeline.scale(self._timeline.pace)

        # The compiled method itself: a Python one around it would cost as much again.
        self.read = self._pages.read
        """read(vcpu) -> GuestNs: what vCPU's guest would compute at this instant.

        StateError before it registered a page.
        """

    # What time it is

    def now(self) -> GuestNs:
        """Guest time at this instant by the timeline itself, page or no page."""
        return GuestNs(self.at(HostTsc(self.backend.counter.read())).__floor__() & U64_MASK)

    def at(self, host_tsc: HostTsc) -> Fraction:
        """Guest time in ns at `host_tsc` by the present segment, exactly."""
        with self._lock:  # several numbers make a segment
            return self._timeline.at(host_tsc)

    def reading(self, vcpu: int) -> Reading:
        """As `read`, with the guest TSC, the page's version and its flags."""
        return self._pages.reading(vcpu)

    def shown_at(self, host_tsc: HostTsc) -> GuestNs:
        """What a guest computes at `host_tsc` from the pages as published last, in ns."""
        with self._lock:
            return GuestNs(self._pages.shown_at(host_tsc))

    def page(self, vcpu: int) -> TimeInfo | None:
        """vCPU's page as it lies in guest memory; None if it has none there."""
        gpa = self._pages.registered(vcpu)
        try:
            return None if gpa is None else read_time_info(self.memory, gpa)
        except GuestAddressError:
            return None

    @property
    def line(self) -> ClockLine:
        """The timeline's present segment."""
        return self._line

    @property
    def scale(self) -> ClockScale:
        """The (mul, shift) that pages show."""
        return self._scale

    @property
    def dilation(self) -> Fraction:
        """Guest seconds in a host second, without any slew."""
        return self._timeline.tempo.dilation

    @property
    def pace(self) -> Fraction:
        """The same with what a slew and a discipline add or take now; in effect unless paused."""
        return self._timeline.pace

    @property
    def is_paused(self) -> bool:
        """Does guest time stand still?"""
        return self._stopped_at is not None

    @property
    def policy(self) -> Policy:
        """What becomes of missed time where resume() is not told; settable, by name too.  Saved with the clock."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy | str) -> None:
        self._policy = catchup.as_policy(policy)

    @property
    def skew_ns(self) -> Fraction:
        """What a slew still has to add to guest time, in ns; negative for a clock that is ahead."""
        with self._lock:
            return self._timeline.skew_at(HostTsc(self.backend.counter.read()))

    # Operations that never step

    def refresh(self, vcpu: int | None = None) -> None:
        """Re-anchor and publish all pages; the clock goes on by 0 or +1 ns at the break, and a slew by its plan.

        vcpu: a vCPU that is out of the guest, the caller's own, whose flags can be written too.  Nothing while paused.
        """
        with self._lock:
            if self._timeline.is_slewing and not self.is_paused:
                self._go_on_slewing()
            else:
                self._republish(vcpu)

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
        with self._changing():
            if self._stopped_at is None:
                raise StateError("resume", "guest time is running", "pause() it first")
            chosen = self._policy if policy is None else catchup.as_policy(policy)
            tsc = HostTsc(self.backend.counter.read())
            before = self._moment(tsc)
            settled = catchup.settle(chosen, self._missed_ns(tsc))
            self._prepare_to_resume(tsc, settled.gain_ns)
            self._pages.move((tsc - self._stopped_at.tsc) & U64_MASK, int(settled.gain_ns))
            self._timeline.start(tsc)
            self._timeline.jump(settled.gain_ns)
            self._stopped_at, self._came_from_elsewhere = None, False
            self._take_segment()
            with self.backend.quiesce(None):
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
        self.backend.run_until(self._timeline.tsc_at(begin + ns))
        self.pause()
        ran = self._timeline.at(self._stopped_at.tsc) - begin
        return RunReport(ran, ran - ns)

    def churn(self, publishes: int, dilations: list[Fraction], *, seconds: float = float("inf")) -> Churn:
        """Publish `publishes` times, or for `seconds`, as fast as it goes, taking `dilations` in turn.

        For stress, benchmarks and demonstration.  At least once; the last rate used stays.  A simulated counter stands
        still meanwhile, so `seconds` do not pass on it.
        """
        tempos = [self._timeline.tempo._replace(dilation=dilation) for dilation in dilations]
        rates = [(*self._timeline.rate(tempo.pace), self._timeline.scale(tempo.pace)) for tempo in tempos]
        max_ticks = min(seconds * self.backend.tsc_hz, 2**63 - 1)
        with self._lock:
            if self.is_paused or self._timeline.is_slewing:
                raise StateError("churn", "guest time stands still or is being slewed", "let it run at its pace first")
            self._publish(None)
            line, churn = self._pages.churn(self._line, rates, publishes, int(max_ticks))
            last = (churn.publishes - 1) % len(rates)
            self._timeline.resume_from(line, tempos[last])
            self._line, self._scale = line, rates[last][2]
            self._pages.mark_dirty()
        return churn

    # For those who derive from this

    @property
    def _offers_stable(self) -> bool:
        """May pages say that all vCPUs' TSCs are in step?"""
        return True

    def _prepare_to_resume(self, tsc: HostTsc, gain_ns: Fraction) -> None:
        """Do what must be done before pages are published again; guest time gains gain_ns over the pause."""

    def place_time_page(self, vcpu: int, gpa: Gpa | None) -> None:
        """Keep vCPU's pvclock page at `gpa` (None: nowhere) from now on, and publish."""
        self._pages.register(vcpu, gpa)
        self._republish(vcpu)

    def _republish(self, vcpu: int | None) -> None:
        """Publish the present segment; while paused that is left to resume()."""
        if not self.is_paused:
            self._publish(vcpu)
            self._pages.mark_dirty()

    # Inside

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; tell the subscribers of events when it has been let go."""
        try:
            with self._lock:
                yield
        finally:
            self.events.deliver()

    @property
    def _flags(self) -> int:
        return TSC_STABLE_BIT if self._offers_stable and self.backend.tsc_stable else 0

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
        self._timeline.slew(HostTsc(self.backend.counter.read()), ns, policy)
        self._take_segment()
        self._go_on_slewing(EventKind.SLEW, why)

    def _go_on_slewing(self, kind: EventKind | None = None, why: str = "") -> None:
        tsc = HostTsc(self.backend.counter.read())
        boost = self._timeline.plan(tsc)
        if kind is None and boost != self._timeline.tempo.boost:
            kind, why = EventKind.SLEW, f"{round(self._timeline.skew_at(tsc))} ns are left"
        self._turn(self._timeline.tempo._replace(boost=boost), kind, why)
        if boost == 0:
            left = self._timeline.end_slew()
            self._record(EventKind.SLEW_END, f"{float(left):.3f} ns of it are left undone", tsc, self._moment(tsc))

    def _turn(self, tempo: Tempo, kind: EventKind | None, why: str) -> None:
        """Go on at another rate; an unchanged one is only published."""
        unchanged = tempo == self._timeline.tempo
        scale = self._timeline.scale(tempo.pace)
        tsc = HostTsc(self.backend.counter.read()) if self.is_paused else self._publish(None, scale)
        before = self._moment(tsc)
        if not unchanged:
            self._timeline.turn(tsc, tempo)
            self._take_segment()
        if not self.is_paused:
            self._pages.mark_dirty()
        if kind is not None:
            self._record(kind, why, tsc, before)

    def _take_segment(self) -> None:
        """Have the timeline's segment in C's form."""
        self._line, self._scale = self._timeline.line(), self._timeline.scale(self._timeline.pace)

    def _moment(self, tsc: HostTsc) -> tuple[Fraction, Fraction]:
        """Guest time and pace at `tsc`, to be compared with what they become."""
        pace = self._timeline.pace if self._timeline.is_running else Fraction(0)
        return self._timeline.at(tsc), pace

    def _record(self, kind: EventKind, why: str, tsc: HostTsc, before: tuple[Fraction, Fraction]) -> None:
        stamps = self.backend.stamps()
        (ns_before, pace_before), (ns_after, pace_after) = before, self._moment(tsc)
        self.events.record(
            Event(kind, why, tsc, stamps.raw_ns, stamps.real_ns, ns_before, ns_after, pace_before, pace_after)
        )

    def _publish(self, vcpu: int | None, scale: ClockScale | None = None) -> HostTsc:
        """Publish the present segment, going on at `scale`; returns the break point.

        `vcpu`, if any, is known to be out of the guest.  Flags, and pages that newly came, take all vCPUs out of it.
        """
        flags = self._flags
        if flags == self._shown_flags and not self._pages.lacks_flags(vcpu):
            return self._publish_to(() if vcpu is None else (vcpu,), flags, scale)
        with self.backend.quiesce(vcpu):
            return self._publish_to(range(self.vcpus), flags, scale)

    def _publish_to(self, out_of_guest: Iterable[int], flags: int, scale: ClockScale | None) -> HostTsc:
        break_tsc = self._pages.publish(self._line, scale or self._scale, flags=flags, out_of_guest=out_of_guest)
        self._shown_flags = flags & ~GUEST_STOPPED
        return HostTsc(break_tsc)
