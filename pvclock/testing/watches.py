"""A guest's clock watched during a test, and held against its budgets at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from math import inf
from typing import Final, Protocol, TypeAlias

from pvclock._memory import GuestMemory
from pvclock.errors import StateError
from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.budgets import Budgets, Verdict, judge
from pvclock.meter.watch.host_troubles import HostTrouble
from pvclock.meter.watch.lines import Line
from pvclock.meter.watch.loop import WatchLoop
from pvclock.meter.watch.poll import Poll, take_poll
from pvclock.meter.watch.rate import PageRate, RateMeter
from pvclock.meter.watch.verdict import judged
from pvclock.meter.watch.vm import WatchedVm
from pvclock.meter.watch.watcher import Watcher
from pvclock.quantities import NS_PER_S, Gpa
from pvclock.readings import Reference, Sample, TimeInfo
from pvclock.testing.local_vm import LocalVm
from pvclock.threads import begin

__all__ = ["ClockWatch", "EngineWatch", "Findings", "ForeignWatch", "KernelWatch"]

INTERVAL_S: Final = 0.01
PAGES_LIMIT_S: Final = 10.0
PAGES_POLL_S: Final = 0.005
Pages: TypeAlias = list[Gpa]
"""Each vCPU's."""
OPERATION: Final = "clock_budget"
MOVED: Final = "the guest registered other pages for its clock meanwhile, which were not watched"


class ClockWatch(Protocol):
    """A watch of one guest's clock."""

    def begin(self) -> None:
        """Begin to look; returns once the first look was taken.  StateError if there are no pages."""

    def finish(self) -> Verdict:
        """Take the last look and end; how the budgets fared."""


class EngineWatch:
    """Looks at an engine's clock whenever it has written its pages, so that no line is missed.

    It takes the place of the memory's on_dirty meanwhile, and calls that.  poll: takes a look at pages.  wait_s: how
    long the guest may take to register them.
    """

    def __init__(
        self,
        vm: LocalVm,
        memory: GuestMemory,
        findings: Findings,
        poll: Callable[[Pages], Poll],
        wait_s: float = PAGES_LIMIT_S,
    ) -> None:
        self._vm, self._memory, self._findings, self._poll, self._wait_s = vm, memory, findings, poll, wait_s
        self._last: Poll | None = None
        self._looking = threading.Lock()

    def begin(self) -> None:
        """See ClockWatch: waits for the guest to have its pages."""
        self._pages = _pages_once_there(self._vm.pages, self._wait_s)
        self._before = self._memory.on_dirty
        self._look()
        self._memory.on_dirty = self._on_dirty

    def finish(self) -> Verdict:
        """See ClockWatch."""
        self._memory.on_dirty = self._before
        self._look()
        return self._findings.verdict(_doubts(self._vm, self._pages))

    def _on_dirty(self, gpa: int, length: int) -> None:
        self._look()
        if self._before is not None:
            self._before(gpa, length)

    def _look(self) -> None:
        with self._looking:
            poll = self._poll(self._pages)
            at = self._vm.take_break_point()
            if self._last is not None and at is not None and self._last.middle < at < poll.middle:
                # Lines of two rates meet there alone: the old one counts until then, and the new one from then on.
                self._findings.take(self._last._replace(begin=at, middle=at, end=at, events=(), utc=None))
                self._findings.take(poll._replace(begin=at, middle=at, end=at))
                poll = poll._replace(events=())
            self._findings.take(poll)
            self._findings.sample()
            self._last = poll


class KernelWatch:
    """Looks at the kernel's clock of a machine every 10 ms, on a thread of its own: KVM tells of no write."""

    def __init__(self, vm: LocalVm, findings: Findings) -> None:
        self._vm, self._findings, self._thread = vm, findings, _WatchThread()

    def begin(self) -> None:
        """See ClockWatch: waits for the guest to have its pages."""
        self._pages = _pages_once_there(self._vm.pages, PAGES_LIMIT_S)
        self._findings.sample()
        self._thread.begin(self._run)

    def finish(self) -> Verdict:
        """See ClockWatch."""
        self._thread.end()
        self._findings.sample()
        return self._findings.verdict(_doubts(self._vm, self._pages))

    def _run(self, thread: _WatchThread) -> None:
        while True:
            self._findings.take(take_poll(self._vm, self._pages))
            if thread.is_over(INTERVAL_S):
                return


class ForeignWatch:
    """A watch of a VM of another process, as `pvclock watch` has it: its memory is searched for the pages."""

    def __init__(self, vm: WatchedVm, budgets: Budgets, reference: Reference) -> None:
        self._budgets, self._thread = budgets, _WatchThread()
        self._loop = WatchLoop(vm, reference, wait=self._thread.is_over)

    def begin(self) -> None:
        """See ClockWatch; errors of WatchLoop."""
        self._loop.begin()
        self._thread.begin(self._run)

    def finish(self) -> Verdict:
        """See ClockWatch; errors of the VM while it was watched."""
        self._thread.end()
        verdict = judged(self._budgets, self._loop)
        assert verdict is not None  # noqa: S101  # there is a budget
        return verdict

    def _run(self, _thread: _WatchThread) -> None:
        for _ in self._loop.looks():
            pass


class _WatchThread:
    """The thread of a watch."""

    def __init__(self) -> None:
        self._is_over, self._has_looked = threading.Event(), threading.Event()
        self._is_last = False  # the next look begins after the end was asked for
        self._error: Exception | None = None

    def begin(self, run: Callable[[_WatchThread], None]) -> None:
        """Run it; returns once it has looked, or ended."""

        def watch() -> None:
            try:
                run(self)
            except Exception as error:  # noqa: BLE001  # end() raises it
                self._error = error
            finally:
                self._has_looked.set()

        self._thread = threading.Thread(target=watch, name="pvclock-budget", daemon=True)
        begin(self._thread, OPERATION)
        self._has_looked.wait()

    def is_over(self, seconds: float) -> bool:
        """For the thread itself, which has looked: sleep for so long, or until it is to end.

        True once it has looked since it was to end.
        """
        self._has_looked.set()
        was_last, self._is_last = self._is_last, self._is_over.wait(seconds)
        return was_last

    def end(self) -> None:
        """Have it take a last look, and end; raises the error that ended it before."""
        self._is_over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error


class Findings:
    """What looks at a VM of this process found.

    sample: takes a sample of the reference.  troubles: what is wrong with the host's clocks since it was asked last.
    """

    def __init__(
        self,
        vm: LocalVm,
        budgets: Budgets,
        host_tsc_hz: int,
        sample: Callable[[], Sample],
        troubles: Callable[[], list[HostTrouble]] = list,
    ) -> None:
        self._budgets, self._slopes, self._troubles = budgets, _Slopes(), troubles
        self._rates = RateMeter(sample, host_tsc_hz, vm.tsc_hz)
        self._watcher = Watcher(
            vm.vcpus,
            host_tsc_hz=host_tsc_hz,
            interval_ns=NS_PER_S,
            guest_tsc_hz=vm.tsc_hz,
            is_paused=bool(vm.is_paused),
            tells_events=vm.why_no_events is None,
            is_legal=_is_whole,
        )

    def take(self, poll: Poll) -> None:
        """Take one more look."""
        self._watcher.take(poll)
        self._slopes.note(self._watcher.lines)

    def sample(self) -> None:
        """Sample the reference."""
        self._rates.take()

    def verdict(self, doubts: list[str]) -> Verdict:
        """How the budgets fared.  doubts: what leaves that open beside the findings."""
        self._watcher.finish()
        summary = self._watcher.summary_as_seen if self._budgets.allow_pauses else self._watcher.summary
        found = judge(self._budgets, summary, self._slopes.worst(self._rates.rate_of))
        doubts = [*doubts, *(f"the host's TSC could not be trusted: {each.why}" for each in self._troubles())]
        if found.status is VerdictStatus.BROKEN or not doubts:
            return found
        return Verdict(VerdictStatus.UNDECIDED, [*found.findings, *doubts])


class _Slopes:
    """The lines by which a guest has read its clock, one for each vCPU and slope."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int, int], TimeInfo] = {}

    def note(self, lines: Iterable[Line | None]) -> None:
        """Take each vCPU's line as it is now."""
        for vcpu, line in enumerate(lines):
            if line is not None:
                self._seen.setdefault((vcpu, line.info.tsc_to_system_mul, line.info.tsc_shift), line.info)

    def worst(self, rate_of: Callable[[TimeInfo], PageRate]) -> dict[int, PageRate]:
        """Each vCPU's rate that is furthest from the reference's; an unknown one before all others."""
        worst: dict[int, PageRate] = {}
        for (vcpu, *_), info in self._seen.items():
            rate = rate_of(info)
            if vcpu not in worst or _off_ppb(rate) > _off_ppb(worst[vcpu]):
                worst[vcpu] = rate
        return worst


def _doubts(vm: LocalVm, pages: Pages) -> list[str]:
    """What is to be said of the pages that were looked at, at the end."""
    return [] if vm.pages() == pages else [MOVED]


def _off_ppb(rate: PageRate) -> float:
    return inf if rate.ppb is None else abs(rate.ppb)


def _is_whole(info: TimeInfo) -> bool:
    """Is it a page that is not being written?  Its rate may be any: the guest may be dilated."""
    return info.version % 2 == 0 and info.tsc_to_system_mul > 0


def _pages_once_there(find: Callable[[], list[Gpa | None]], wait_s: float) -> Pages:
    """The pages, as soon as each vCPU has one; StateError if they do not come."""
    end_s = time.monotonic() + wait_s
    while True:
        found = find()
        pages = [gpa for gpa in found if gpa is not None]
        if len(pages) == len(found):
            return pages
        if time.monotonic() >= end_s:
            raise _no_pages()
        time.sleep(PAGES_POLL_S)


def _no_pages() -> StateError:
    return StateError(
        OPERATION, "the guest has not registered its clock's pages", "begin it once the guest reads its clock"
    )
