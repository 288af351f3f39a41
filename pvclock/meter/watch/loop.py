"""A watch from beginning to end: pages are found, looked at, and found again after a reset."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple, TypeAlias

from pvclock.errors import PvclockError
from pvclock.host.this_host import bracketed, measured_tsc_hz
from pvclock.meter.findings import TIME_INFO
from pvclock.meter.watch.ahead import Ahead, AheadMeter
from pvclock.meter.watch.changes import Change, PageLost, Step
from pvclock.meter.watch.host_troubles import HostTrouble, HostTroubles
from pvclock.meter.watch.lines import TscRates
from pvclock.meter.watch.page_finder import PageFinder, PagesFound, Progress
from pvclock.meter.watch.page_layout import Pages
from pvclock.meter.watch.page_search import is_legal
from pvclock.meter.watch.poll import Poll, take_poll
from pvclock.meter.watch.rate import PageRate, RateMeter
from pvclock.meter.watch.vm import VmEvent, WatchedVm, paused_after, wait_for_end
from pvclock.meter.watch.watcher import Watcher
from pvclock.quantities import NS_PER_S, Gpa
from pvclock.readings import Reference, TimeInfo

__all__ = ["Finding", "HostTrouble", "Look", "VmEnded", "WatchLoop"]

INTERVAL_S: Final = 0.01
INTERVAL_MAX_S: Final = 1.0
POLL_SHARE: Final = 20
"""Polls take at most this part of the time, unless the user says how often."""
COST_TRIES: Final = 3
END_LIMIT_S: Final = 2.0
SAMPLE_S: Final = 1.0
"""How often the reference is sampled, and the host is looked at."""


class VmEnded(NamedTuple):
    """The VM has ended; `why` for people."""

    why: str


Finding: TypeAlias = PagesFound | Change | VmEvent | HostTrouble | VmEnded


class Look(NamedTuple):
    """One turn of a watch: a poll of the vCPUs' pages, and what it found, in order.

    readings: each vCPU's, at a turn that sampled the reference; else empty.
    """

    poll: Poll
    findings: tuple[Finding, ...]
    readings: tuple[Ahead, ...] = ()


class WatchLoop:
    """Watches `vm`, and holds the rate of its clock against `reference`.

    interval_s: how often the pages are looked at; None: every 10 ms, less often where a look is expensive.  given: the
    pages' addresses, if they are known.  progress: of a search.  wait: sleeps for some seconds; True if the watch is to
    end.
    """

    def __init__(
        self,
        vm: WatchedVm,
        reference: Reference,
        *,
        wait: Callable[[float], bool],
        interval_s: float | None = None,
        given: Sequence[Gpa] = (),
        progress: Progress = lambda _done_bytes, _total_bytes: None,
    ) -> None:
        self.vm, self.reference = vm, reference
        self.host_tsc_hz = measured_tsc_hz()
        self.finder = PageFinder(vm, self.host_tsc_hz, given, progress)
        self.interval_s = 0.0
        """As it is chosen when the pages are found."""
        self.infos: dict[int, TimeInfo] = {}
        """Each vCPU's page as it was last seen, where there was one."""
        self.is_paused = vm.is_paused
        """Is the guest stopped, as far as its VMM told?  None if it does not tell."""
        self.has_run = False
        """Was there a look at a guest that ran, or may have?"""
        self._wait, self._wanted_s = wait, interval_s
        self._host = HostTroubles(self.host_tsc_hz, SAMPLE_S)
        self.troubles = [*self._host.at_begin]
        """Those of the host so far."""
        self._meter = RateMeter(lambda: bracketed(reference, self.host_tsc_hz), self.host_tsc_hz, vm.tsc_hz)
        self._ahead = AheadMeter(TscRates(self.host_tsc_hz, vm.tsc_hz))
        self._sampled_s = 0.0

    def begin(self) -> PagesFound:
        """Find the pages; once.  PagesNotFound, ConfigError if there are none; errors of the VM and its RAM."""
        found = self.finder.find()
        self.interval_s = self._wanted_s or self._affordable_s()
        self.watcher = Watcher(
            self.vm.vcpus,
            host_tsc_hz=self.host_tsc_hz,
            interval_ns=int(self.interval_s * NS_PER_S),
            guest_tsc_hz=self.vm.tsc_hz,
            is_legal=partial(is_legal, terms=self.finder.terms),
            is_paused=bool(self.vm.is_paused),
            tells_events=self.vm.why_no_events is None,
        )
        return found

    def looks(self, seconds: float | None = None) -> Iterator[Look]:
        """Look at the pages for `seconds` (None: for ever), until `wait` says so or the VM ends.

        Errors of the VM and its RAM while it runs, after what is left to tell.
        """
        end_s = None if seconds is None else time.monotonic() + seconds
        due_s = time.monotonic()
        look = None
        while True:
            try:
                look = self._look()
            except PvclockError:
                if look is None:
                    raise
                end = self._end()
                yield Look(look.poll, (*self.watcher.finish(), *([end] if end else [])))
                if end is None:
                    raise
                return
            yield look
            pause_s = min(self.vm.ram.pause_s, self.interval_s) if self.finder.is_amid_search else self.interval_s
            due_s = max(due_s + pause_s, time.monotonic())
            until_s = due_s if end_s is None else min(due_s, end_s)
            if self._wait(until_s - time.monotonic()) or until_s == end_s:
                break
        self._meter.take()
        yield Look(look.poll, tuple(self.watcher.finish()))

    def rates(self) -> dict[int, PageRate]:
        """Each vCPU's, of its page as it was last seen."""
        return {vcpu: self._meter.rate_of(info) for vcpu, info in self.infos.items()}

    # Inside

    def _look(self) -> Look:
        before = self.finder.pages
        elsewhere = self.finder.search_on()
        places = self.finder.places
        whole = take_poll(self.vm, places)
        elsewhere = self.finder.take(whole) or elsewhere
        told = [*self._moved_from(before), elsewhere] if elsewhere is not None else []
        if elsewhere is not None and not _only_adds(before, elsewhere.pages):
            self._ahead.restart()
        poll = self._of_vcpus(whole, dict(zip(places, whole.pages, strict=True)))
        self._note_state(poll.events)
        changes = self.watcher.take(poll)
        self._ahead.note(changes)
        is_reset = self.vm.why_no_events is not None and any(map(_may_be_reset, changes))
        if is_reset or any(isinstance(change, PageLost) for change in changes):
            self.finder.lose(is_reset=is_reset)
        found = *poll.events, *told, *changes
        if time.monotonic() < self._sampled_s + SAMPLE_S:
            return Look(poll, found)
        self._sampled_s = time.monotonic()
        readings = self._ahead.take(self._meter.take(), poll, self.watcher.lines)
        troubles = self._host.check()
        self.troubles += troubles
        return Look(poll, (*found, *troubles), readings)

    def _of_vcpus(self, whole: Poll, seen: Mapping[Gpa, TimeInfo | None]) -> Poll:
        """The poll, of the vCPUs' pages alone."""
        absent = self.finder.absent
        pages = tuple(
            None if gpa is None or vcpu in absent else seen[gpa] for vcpu, gpa in enumerate(self.finder.pages)
        )
        for vcpu, info in enumerate(pages):
            if info is not None and info != self.infos.get(vcpu) and is_legal(info, self.finder.terms):
                self.infos[vcpu] = info
        return whole._replace(pages=pages, absent=absent)

    def _moved_from(self, pages: Pages) -> list[Change]:
        """What is left to tell of the old pages, if a vCPU has another than it had."""
        both = zip(pages, self.finder.pages, strict=True)
        if all(old in {None, new} for old, new in both):
            return []
        self.infos = {}
        return self.watcher.restart()

    def _note_state(self, events: Iterable[VmEvent]) -> None:
        self.is_paused = paused_after(events, self.is_paused)
        self.has_run |= not self.is_paused

    def _end(self) -> VmEnded | None:
        """The VM's end, if that is why an error came; None if it runs."""
        end = wait_for_end(self.vm, END_LIMIT_S)
        return None if end is None else VmEnded(str(end))

    def _affordable_s(self) -> float:
        """As often as polls of these pages leave the VM and this host alone."""
        costs_s = [self._cost_s() for _ in range(COST_TRIES)]
        return min(max(INTERVAL_S, POLL_SHARE * min(costs_s)), INTERVAL_MAX_S)

    def _cost_s(self) -> float:
        """What a poll takes; it is not taken here, for it would take events, too."""
        begin_s = time.monotonic()
        for _ in range(2):
            self.vm.tsc_offsets()
            self.vm.ram.read_many(self.finder.places, TIME_INFO.size)
        return time.monotonic() - begin_s


def _only_adds(before: Pages, pages: Pages) -> bool:
    """Are these pages those of before, and some of vCPUs that had none?"""
    return pages != before and all(old in {None, new} for old, new in zip(before, pages, strict=True))


def _may_be_reset(change: Change) -> bool:
    """Was the TSC written, and the page's line is still the old one?"""
    return isinstance(change, Step) and change.lines == 0 and change.step_ns is None
