"""A watch from beginning to end: pages are found, looked at, and found again after a reset."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

from pvclock.errors import PvclockError
from pvclock.host.this_host import bracketed, measure_tsc_hz
from pvclock.host.watch import HostWatch, TroubleKind
from pvclock.meter.findings import TIME_INFO
from pvclock.meter.watch.changes import Change, PageLost
from pvclock.meter.watch.lines import is_legal
from pvclock.meter.watch.page_finder import PageFinder, PagesFound, Progress
from pvclock.meter.watch.poll import Poll, take_poll
from pvclock.meter.watch.rate import PageRate, RateMeter
from pvclock.meter.watch.vm import VmEvent, WatchedVm
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
"""A VMM that ends hangs up before its process is gone."""
SAMPLE_S: Final = 1.0
"""How often the reference is sampled, and the host is looked at."""


class HostTrouble(NamedTuple):
    """Something was wrong with the host's clocks.  unstable: its TSC cannot be trusted.  why: for people."""

    kind: TroubleKind
    unstable: bool
    why: str


class VmEnded(NamedTuple):
    """The VM has ended; `why` for people."""

    why: str


Finding: TypeAlias = PagesFound | Change | VmEvent | HostTrouble | VmEnded


class Look(NamedTuple):
    """One turn of a watch: a poll of the vCPUs' pages, and what it found, in order."""

    poll: Poll
    findings: tuple[Finding, ...]


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
        self.host_tsc_hz = measure_tsc_hz()
        self.finder = PageFinder(vm, self.host_tsc_hz, given, progress)
        self.troubles: list[HostTrouble] = []
        """Those of the host so far."""
        self.interval_s = 0.0
        """As it is chosen when the pages are found."""
        self.infos: dict[int, TimeInfo] = {}
        """Each vCPU's page as it was last seen, where there was one."""
        self._wait, self._wanted_s = wait, interval_s
        self._host = HostWatch(self.host_tsc_hz, interval_ns=int(SAMPLE_S * NS_PER_S))
        self._meter = RateMeter(lambda: bracketed(reference, self.host_tsc_hz), self.host_tsc_hz, vm.tsc_hz)
        self._sampled_s = 0.0

    def begin(self) -> PagesFound:
        """Find the pages; once.  PagesNotFound, ConfigError if there are none; errors of the VM and its RAM."""
        found = self.finder.find()
        self.interval_s = self._wanted_s or self._affordable_s()
        self.watcher = Watcher(
            len(self.finder.pages),
            host_tsc_hz=self.host_tsc_hz,
            interval_ns=int(self.interval_s * NS_PER_S),
            guest_tsc_hz=self.vm.tsc_hz,
        )
        return found

    def looks(self, seconds: float | None = None) -> Iterator[Look]:
        """Look at the pages for `seconds` (None: for ever), until `wait` says so or the VM ends.

        Errors of the VM and its RAM while it runs.
        """
        end_s = None if seconds is None else time.monotonic() + seconds
        due_s = time.monotonic()
        look = None
        while True:
            try:
                look = self._look()
            except PvclockError as error:
                if look is None:
                    raise
                yield look._replace(findings=(*self.watcher.finish(), self._ended(error)))
                return
            yield look
            due_s = max(due_s + self.interval_s, time.monotonic())
            until_s = due_s if end_s is None else min(due_s, end_s)
            if self._wait(until_s - time.monotonic()) or until_s == end_s:
                break
        self._meter.take()
        yield look._replace(findings=tuple(self.watcher.finish()))

    def rates(self) -> dict[int, PageRate]:
        """Each vCPU's, of its page as it was last seen."""
        return {vcpu: self._meter.rate_of(info) for vcpu, info in self.infos.items()}

    # Inside

    def _look(self) -> Look:
        whole = take_poll(self.vm, self.finder.places)
        pages = self.finder.pages
        poll = whole._replace(pages=whole.pages[: len(pages)], tsc_offsets=whole.tsc_offsets[: len(pages)])
        self.infos |= {vcpu: info for vcpu, info in enumerate(poll.pages) if info is not None and is_legal(info)}
        changes = self.watcher.take(poll)
        findings: list[Finding] = [*poll.events, *changes, *self._look_at_host()]
        is_lost = any(isinstance(change, PageLost) for change in changes)
        elsewhere = self.finder.take(whole, is_lost=is_lost) or self.finder.search_if_due()
        if elsewhere is not None:
            findings += [*self._moved_from(pages), elsewhere]
        return Look(poll, tuple(findings))

    def _moved_from(self, pages: Sequence[Gpa]) -> list[Change]:
        if self.finder.pages == pages:
            return []
        self.infos = {}
        return self.watcher.restart(len(self.finder.pages))

    def _look_at_host(self) -> list[HostTrouble]:
        """Sample the reference and look at the host, if it is time to."""
        if time.monotonic() < self._sampled_s + SAMPLE_S:
            return []
        self._sampled_s = time.monotonic()
        self._meter.take()
        found = [each for each in self._host.check() if each.kind is not TroubleKind.STALL]  # polls tell of these
        troubles = [HostTrouble(each.kind, each.unstable, each.why) for each in found]
        self.troubles += troubles
        return troubles

    def _ended(self, error: PvclockError) -> VmEnded:
        """The VM's end, if that is why `error` came; else that error."""
        limit_s = time.monotonic() + END_LIMIT_S
        while time.monotonic() < limit_s:
            try:
                self.vm.check_running()
            except PvclockError as end:
                return VmEnded(str(end))
            time.sleep(INTERVAL_S)
        raise error

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
