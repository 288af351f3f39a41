"""One VM's timeline and the pages that show it: read, republished, and turned to another rate.

The lock is taken for every change and held while vCPUs are kept out of the guest, never while waiting for a guest.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Final

from pvclock._core import GUEST_STOPPED, TSC_STABLE_BIT, ClockScale, TimePages, read_time_info
from pvclock._memory import GuestMemory
from pvclock.backend import Backend
from pvclock.errors import GuestAddressError, StateError
from pvclock.event_log import EventLog
from pvclock.events import Event, EventKind
from pvclock.quantities import U64_MASK, Gpa, GuestNs, HostTsc
from pvclock.readings import Churn, ClockLine, Reading, TimeInfo
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
        self._break_tsc = HostTsc(backend.counter.read())  # of the last publish
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
        return not self._timeline.is_running

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

    def churn(self, publishes: int, dilations: list[Fraction], *, seconds: float = float("inf")) -> Churn:
        """Publish `publishes` times, or for `seconds`, as fast as it goes, taking `dilations` in turn.

        For stress, benchmarks and demonstration.  At least once; the last rate used stays.  A simulated counter stands
        still meanwhile, so `seconds` do not pass on it.
        """
        max_ticks = min(seconds * self.backend.tsc_hz, 2**63 - 1)
        with self._lock:
            tempos = [self._timeline.tempo._replace(dilation=dilation) for dilation in dilations]
            rates = [(*self._timeline.rate(tempo.pace), self._timeline.scale(tempo.pace)) for tempo in tempos]
            if self.is_paused or self._timeline.is_slewing:
                raise StateError("churn", "guest time stands still or is being slewed", "let it run at its pace first")
            self._publish(None)
            line, churn = self._pages.churn(self._line, rates, publishes, int(max_ticks))
            last = (churn.publishes - 1) % len(rates)
            self._timeline.resume_from(line, tempos[last])
            self._line, self._scale = line, rates[last][2]
            self._break_tsc = HostTsc(self.backend.counter.read())
            self._pages.mark_dirty()
        return churn

    # For those who derive from this

    @property
    def _offers_stable(self) -> bool:
        """May pages say that all vCPUs' TSCs are in step?"""
        return True

    def place_time_page(self, vcpu: int, gpa: Gpa | None) -> None:
        """Keep vCPU's pvclock page at `gpa` (None: nowhere) from now on, and publish."""
        with self._lock:  # no publish may be using the pages
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

    def _go_on_slewing(self, kind: EventKind | None = None, why: str = "") -> None:
        tsc = HostTsc(self.backend.counter.read())
        boost = self._timeline.plan(tsc)
        if kind is None and boost != self._timeline.tempo.boost:
            kind, why = EventKind.SLEW, f"{round(self._timeline.skew_at(tsc))} ns are left"
        self._turn(self._timeline.tempo._replace(boost=boost), kind, why)
        if boost == 0 and self._timeline.is_slewed:  # by the break, some us later, it may have overshot
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
        self._mend()
        flags = self._flags
        if flags == self._shown_flags and not self._pages.lacks_flags(vcpu):
            return self._publish_to(() if vcpu is None else (vcpu,), flags, scale)
        with self.backend.quiesce(vcpu):
            return self._publish_to(range(self.vcpus), flags, scale)

    def _publish_to(self, out_of_guest: Iterable[int], flags: int, scale: ClockScale | None) -> HostTsc:
        break_tsc = self._pages.publish(self._line, scale or self._scale, flags=flags, out_of_guest=out_of_guest)
        self._break_tsc, self._shown_flags = HostTsc(break_tsc), flags & ~GUEST_STOPPED
        return self._break_tsc

    def _mend(self) -> None:
        """Where the host's TSC went back behind the last publish, let guest time go on from there.

        What guests read since then they read again: nobody knows how much that was.
        """
        tsc = self.backend.counter.read()
        if (tsc - self._break_tsc) & U64_MASK <= U64_MASK // 2 or self.is_paused:
            return
        tsc = HostTsc(tsc)
        before = self._moment(tsc)
        self._pages.move((tsc - self._break_tsc) & U64_MASK, 0)
        self._timeline.stop(self._break_tsc)
        self._timeline.start(tsc)
        self._take_segment()
        went_back = (self._break_tsc - tsc) & U64_MASK
        self._record(EventKind.TSC_STEP, f"the host's TSC went back by {went_back} ticks or more", tsc, before)
