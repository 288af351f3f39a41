"""The clock of a VM that runs already, read from outside as a guest would read it: by vCPU 0's page and TSC."""

from __future__ import annotations

import time
from fractions import Fraction
from functools import partial
from itertools import count
from typing import Final

from pvclock.errors import PvclockError, StateError
from pvclock.host.this_host import measured_tsc_hz
from pvclock.meter.guest import GuestReading
from pvclock.meter.watch.changes import Change, PageLost, Step, TscBasis
from pvclock.meter.watch.lines import Line, TscRates, ns_per_tick, value_at
from pvclock.meter.watch.page_finder import PageFinder, Progress
from pvclock.meter.watch.page_search import is_legal
from pvclock.meter.watch.poll import Poll, take_poll
from pvclock.meter.watch.vm import WatchedVm, paused_after, wait_for_end
from pvclock.meter.watch.watcher import Watcher
from pvclock.quantities import NS_PER_S, GuestNs, GuestTsc
from pvclock.readings import TimeInfo

__all__ = ["OutsideClock"]

POLL_S: Final = 0.01
LIMIT_S: Final = 2.0
"""For a page that is being changed, a TSC that is being written, and a VMM that has hung up and ends."""
LOOKS_LEAST: Final = 10
"""A watch that gets no CPU has looked too seldom by then to say that something changes all the time."""
OPERATION: Final = "read a running guest's clock"
AGAIN: Final = "begin again when the guest runs"


class OutsideClock:
    """A ReadableGuest that is somebody else's: nothing of it is stopped or written.

    progress: of the search for its pages.  A TSC offset that cannot be read is taken to be constant.  PagesNotFound;
    StateError where its page is of no use or lost, or the TSC behind it was changed; VmEnded.
    """

    def __init__(self, vm: WatchedVm, progress: Progress) -> None:
        host_tsc_hz = measured_tsc_hz()
        self._vm = vm
        self._finder = PageFinder(vm, host_tsc_hz, (), progress)
        self.found = self._finder.find()
        """Where its pages are, and why there."""
        self._rates = TscRates(host_tsc_hz, vm.tsc_hz)
        self._watcher = Watcher(
            1,
            host_tsc_hz=host_tsc_hz,
            interval_ns=int(POLL_S * NS_PER_S),
            guest_tsc_hz=vm.tsc_hz,
            is_paused=bool(vm.is_paused),
            tells_events=vm.why_no_events is None,
            is_legal=partial(is_legal, terms=self._finder.terms),
        )
        self.is_stopped = vm.is_paused
        """Is the guest stopped, as far as its VMM told?  None if it does not tell."""
        self._slope: Fraction | None = None
        line, poll = self._line()
        self._slope = ns_per_tick(line.info)
        self._assumed_offset = line.info.tsc_timestamp - poll.middle  # as if the line began now

    @property
    def doubt(self) -> str | None:
        """Why that may be no page of the guest's clock, for people."""
        return self._finder.doubt

    def reading(self) -> GuestReading:
        """What the guest reads at this moment."""
        line, poll = self._line()
        tsc = GuestTsc(poll.middle + (self._assumed_offset if line.offset is None else line.offset))
        return GuestReading(tsc, GuestNs(value_at(line.info, tsc)), poll.middle, 0)

    def pages(self) -> list[TimeInfo]:
        """vCPU 0's page alone."""
        return [self._line()[0].info]

    def check_running(self) -> None:
        """VmEnded, or an error of its monitor, if it does not run any more."""
        self._vm.check_running()

    # Inside

    def _line(self) -> tuple[Line, Poll]:
        """The line by which the guest reads, and the look that saw it."""
        deadline_s = time.monotonic() + LIMIT_S
        for looks in count(1):
            poll = self._look()
            for change in self._watcher.take(poll):
                _refuse(change)
            line = self._watcher.lines[0]
            if line is not None and (line.offset is not None or self._vm.why_no_offsets is not None):
                self._refuse_line(line)
                return line, poll
            if looks >= LOOKS_LEAST and time.monotonic() > deadline_s:
                break
            time.sleep(POLL_S)
        raise StateError(OPERATION, "vCPU 0's page, or its TSC, changes all the time", AGAIN)

    def _look(self) -> Poll:
        """A poll of vCPU 0; VmEnded, if that is why it fails."""
        try:
            poll = take_poll(self._vm, [gpa for gpa in self.found.pages[:1] if gpa is not None])
        except PvclockError as error:
            raise wait_for_end(self._vm, LIMIT_S) or error from None
        self.is_stopped = paused_after(poll.events, self.is_stopped)
        return poll._replace(tsc_offsets=poll.tsc_offsets[:1])

    def _refuse_line(self, line: Line) -> None:
        khz = line.info.shown_khz
        if self._rates.is_scaled(line.info):
            said = f"vCPU 0's page is for a TSC of {khz} kHz, and the host's may be scaled for it by an unknown ratio"
            raise StateError(OPERATION, said, "take a guest whose TSC runs as its host's")
        if line.offset is None and self._slope not in {None, ns_per_tick(line.info)}:
            raise StateError(OPERATION, "its page's rate changed, and its TSC offset cannot be read", AGAIN)


def _refuse(change: Change) -> None:
    """StateError after what leaves nothing to go on from."""
    if isinstance(change, PageLost):
        raise StateError(OPERATION, f"vCPU 0's page is lost: {change.why}", AGAIN)
    if isinstance(change, Step) and change.basis is TscBasis.CHANGED:
        said = "its TSC was changed, or may have been, by an unknown number of ticks, as by a reset or a migration"
        raise StateError(OPERATION, said, AGAIN)
