"""A watch from beginning to end, of a VM that is made by hand: its pages, again after a reset, and its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import Self

import pytest

from pvclock import ClockScale, Gpa, GuestNs, GuestTsc, Reference, TimeInfo, read_tsc
from pvclock.commands.screen import _drawn
from pvclock.commands.tables import Table
from pvclock.errors import ConfigError, MemoryNotReadable, PagesNotFound, PvclockError, VmEnded
from pvclock.host.watch import TroubleKind
from pvclock.meter.findings import TIME_INFO
from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.budgets import Budgets, Verdict
from pvclock.meter.watch.changes import Disagreement, PageLost, Step, TscBasis
from pvclock.meter.watch.host_troubles import HostTrouble
from pvclock.meter.watch.loop import Finding, Look, WatchLoop
from pvclock.meter.watch.loop import VmEnded as Ended
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.verdict import NEVER_RAN, judged
from pvclock.meter.watch.vm import GuestRam, VmEvent, VmEventKind
from qemu_glue.watch.instants import Instants
from qemu_glue.watch.views import LiveView
from tests.guest_ram import MemoryRam, made_of
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("E3")

TSC_HZ = 2_000_000_000
SCALE = ClockScale.from_hz(TSC_HZ)
FIRMWARE, ARRAY, ELSEWHERE = Gpa(0xE8C20), Gpa(0x20_1000), Gpa(0x30_0000)
RESET = VmEvent(VmEventKind.RESET, 0)


class HandMadeVm:
    """A WatchedVm whose memory, events and end are a test's to make."""

    name = "a VM"
    tsc_hz: int | None = TSC_HZ
    is_paused: bool | None = False
    ram: GuestRam
    why_no_offsets: str | None = "by hand"
    why_no_events: str | None = None
    offset: int | None = None

    def __init__(self, vcpus: int = 1) -> None:
        self.vcpus = vcpus
        self.ram = self.contents = made_of({}, 4 << 20)
        self.events: list[VmEvent] = []
        self.fault: PvclockError | None = None
        self.has_ended = False

    def put(self, gpa: Gpa, version: int = 2, step_ns: int = 0) -> None:
        """Have a page there, with a line that begins now, and gives so much more than those without a step."""
        tsc = read_tsc() & ~1  # whole ns
        info = TimeInfo(version, GuestTsc(tsc), GuestNs(tsc // 2 + step_ns), SCALE.mul, SCALE.shift, 1)
        self.contents.memory.write(gpa, TIME_INFO.pack(*info))

    def wipe(self, gpa: Gpa) -> None:
        """Have nothing there."""
        self.contents.memory.write(gpa, bytes(TIME_INFO.size))

    def tsc_offsets(self) -> tuple[int | None, ...]:
        """None can be read, unless a test gives one."""
        if self.fault is not None:
            raise self.fault
        return (self.offset,) * self.vcpus

    def take_events(self) -> list[VmEvent]:
        """Those that a test has put there."""
        events, self.events = self.events, []
        return events

    def check_running(self) -> None:
        """VmEnded if it has."""
        if self.has_ended:
            raise VmEnded(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


@pytest.fixture(autouse=True)
def on_tsc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is, as its verdicts want it; that of a CI's VM may be on kvm-clock."""
    monkeypatch.setattr("pvclock.host.linux.host_clocksource", lambda: "tsc")


def no_wait(_seconds: float) -> bool:
    """Look again at once, for ever."""
    return False


def loop_of(vm: HandMadeVm, given: Sequence[Gpa] = ()) -> tuple[WatchLoop, Iterator[Look]]:
    """A watch that has begun, and its looks."""
    loop = WatchLoop(vm, Reference.RAW, wait=no_wait, given=given)
    loop.begin()
    return loop, loop.looks()


def until(looks: Iterator[Look], wanted: Callable[[Finding], bool]) -> Finding:
    """The first finding that is wanted."""
    deadline = time.monotonic() + HANG_S
    for look in looks:
        assert time.monotonic() < deadline
        if found := [finding for finding in look.findings if wanted(finding)]:
            return found[0]
    raise AssertionError("the watch has ended")


def is_found(finding: Finding) -> bool:
    """Were pages found?"""
    return isinstance(finding, PagesFound)


def test_old_pages_are_not_found_after_a_reset() -> None:
    """They lie there still, and are not taken for the guest's; its new ones are, wherever they are."""
    vm = HandMadeVm()
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    next(looks)
    vm.events = [RESET]
    next(looks)
    assert loop.finder.is_searching
    vm.contents.reads.clear()
    while len(vm.contents.reads) < 8:  # until it has searched twice
        assert not any(map(is_found, next(looks).findings))
    assert loop.finder.is_searching
    vm.put(ELSEWHERE)
    found = until(looks, is_found)
    assert isinstance(found, PagesFound)
    assert (found.pages, loop.finder.pages, loop.finder.is_searching) == ((ELSEWHERE,), (ELSEWHERE,), False)
    assert loop.watcher.summary.restarts == 1


def test_a_reboot_that_nobody_tells_of() -> None:
    """Another TSC beside the old line: that step is unknown, and pages are searched as after a reset."""
    vm = HandMadeVm()
    vm.why_no_events, vm.offset = "by hand", 0
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    next(looks)
    vm.offset = -read_tsc()
    found = until(looks, lambda it: isinstance(it, Step))
    assert isinstance(found, Step)
    assert (found.basis, found.lines, loop.finder.is_searching) == (TscBasis.CHANGED, 0, True)
    vm.offset = 0  # where put() begins its lines
    vm.put(ELSEWHERE)
    found_again = until(looks, is_found)
    assert isinstance(found_again, PagesFound)
    assert found_again.pages == (ELSEWHERE,)


def test_a_guest_that_is_paused_from_the_beginning() -> None:
    """What its VMM does to its TSC meanwhile counts with the line that it continues with."""
    vm = HandMadeVm()
    vm.is_paused, vm.offset = True, 0
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    next(looks)
    vm.offset = -(10**12)
    for _ in range(20):
        next(looks)
    assert loop.watcher.summary.steps == 0
    vm.events = [VmEvent(VmEventKind.RESUME, 0)]
    assert any(isinstance(each, Step) for _ in range(3) for each in next(looks).findings)


def test_new_pages_where_the_old_ones_were() -> None:
    """They are seen without a search, and their step is not known; the same line after something else is new, too."""
    vm = HandMadeVm()
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    next(looks)
    same = vm.contents.memory.read(ARRAY, TIME_INFO.size)
    newer: Callable[[], None] = partial(vm.put, ARRAY, 4)
    for change in (partial(vm.contents.memory.write, ARRAY, same), newer):
        vm.events = [RESET]
        next(looks)
        assert loop.finder.is_searching
        vm.wipe(ARRAY)
        next(looks)
        change()
        assert PagesFound((ARRAY,), "in the same places as before") in next(looks).findings
    assert loop.watcher.summary.restarts == 0
    assert loop.watcher.summary.unknown == loop.watcher.summary.steps > 0


def test_what_firmware_left_gives_way_to_an_array() -> None:
    """A page that does not lie as Linux's do is watched, and others are searched for meanwhile."""
    vm = HandMadeVm(vcpus=2)
    vm.put(FIRMWARE)
    loop, looks = loop_of(vm)
    assert loop.finder.pages == (FIRMWARE, None)
    vm.put(ARRAY)
    vm.put(Gpa(ARRAY + 64))
    found = until(looks, is_found)
    assert isinstance(found, PagesFound)
    assert found.pages == (ARRAY, ARRAY + 64)
    vm.contents.reads.clear()
    for _ in range(100):
        next(looks)
    assert vm.contents.reads == []


def test_the_live_view_goes_over_to_other_pages() -> None:
    """One row for the page that firmware left, and then one for each vCPU's own, with what was found below them."""
    vm = HandMadeVm(vcpus=2)
    vm.put(FIRMWARE)
    loop, looks = loop_of(vm)
    drawn: list[tuple[object, ...]] = []
    view = LiveView(loop, Instants(loop.host_tsc_hz), lambda *parts: drawn.append(parts))
    view.show(next(looks))
    vm.put(ARRAY)
    vm.put(Gpa(ARRAY + 64))
    for look in looks:
        view.show(look)
        if loop.finder.pages == (ARRAY, ARRAY + 64):
            break
    view.show(next(looks))
    vm.put(ARRAY, 4, 5_000_000)
    view.show(next(looks))
    tables = [_drawn(table, None) for table, *_ in (drawn[0], drawn[-1]) if isinstance(table, Table)]
    assert ["0xe8c20" in table for table in tables] == [True, False]
    assert ["0x201040" in table for table in tables] == [False, True]
    assert "+5.000 ms" in tables[-1]
    told = [str(part) for part in drawn[-1][1:]]
    assert any("2 pages 64 bytes apart from 0x201000" in each for each in told)
    assert any("vCPU 0 stepped by +5.000 " in each and "the TSC" in each for each in told)
    assert told[-1].endswith("; Ctrl-C ends")


def test_the_place_that_moves() -> None:
    """Where the likeliest place stays as it is and another moves, the watch goes over to that."""
    vm = HandMadeVm()
    vm.put(ARRAY)
    vm.put(FIRMWARE)
    loop, looks = loop_of(vm)
    assert loop.finder.places == (ARRAY, FIRMWARE)
    next(looks)
    vm.put(FIRMWARE, 4)
    found = until(looks, is_found)
    assert isinstance(found, PagesFound)
    assert found.pages == (FIRMWARE,)
    assert loop.finder.doubt is None


def test_a_page_that_is_lost_is_searched() -> None:
    """Until there is one again."""
    vm = HandMadeVm()
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    next(looks)
    vm.wipe(ARRAY)
    assert until(looks, lambda it: isinstance(it, PageLost))
    assert loop.finder.is_searching
    vm.put(ELSEWHERE)
    found = until(looks, is_found)
    assert isinstance(found, PagesFound)
    assert found.pages == (ELSEWHERE,)


@pytest.mark.parametrize("bit", range(31))
def test_a_line_of_another_rate_is_no_line(bit: int) -> None:
    """As when one bit of mul has flipped: beyond 300 ppm of the guest's TSC the page is lost, and makes no step."""
    vm = HandMadeVm()
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    next(looks)
    flipped = SCALE.mul ^ 1 << bit
    vm.contents.memory.write(ARRAY, TIME_INFO.pack(4, read_tsc(), 10**18, flipped, SCALE.shift, 1))
    seen = passes(looks, 12)
    is_near = abs(flipped - SCALE.mul) * 10**6 <= 300 * SCALE.mul
    assert [type(it) for it in seen if isinstance(it, PageLost | Step)] == [Step if is_near else PageLost]
    assert loop.finder.is_searching != is_near


def passes(looks: Iterator[Look], count: int) -> list[Finding]:
    """What so many looks find."""
    return [finding for _ in range(count) for finding in next(looks).findings]


def test_vcpus_that_come_later_after_a_reset() -> None:
    """What lies in their places is of before, and not held against vCPU 0's new page; theirs are taken as they come."""
    vm = HandMadeVm(vcpus=2)
    vm.put(ARRAY)
    vm.put(Gpa(ARRAY + 64))
    vm.put(ARRAY, 4)
    loop, looks = loop_of(vm)
    passes(looks, 2)
    vm.events = [RESET]
    next(looks)
    vm.put(ARRAY, 2, 6_081 * 10**9)
    seen = passes(looks, 20)
    assert [it.pages for it in seen if isinstance(it, PagesFound)] == [(ARRAY, ARRAY + 64)]
    assert loop.finder.absent == {1}
    assert not any(isinstance(it, Disagreement | PageLost) for it in seen)
    vm.put(Gpa(ARRAY + 64), 2, 6_081 * 10**9)
    seen = passes(looks, 20)
    assert not any(isinstance(it, Disagreement | PageLost | PagesFound) for it in seen)
    assert (loop.finder.absent, loop.watcher.summary.restarts) == (frozenset(), 0)


def test_a_vcpu_that_is_off_is_searched_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others keep their numbers; the watch looks at the pages and asks whether it is to end meanwhile."""
    monkeypatch.setattr("pvclock.meter.watch.page_finder.SEARCHES_MAX", 2)
    monkeypatch.setattr("pvclock.meter.watch.paced_search.PAUSE_S", 0)
    monkeypatch.setattr("pvclock.meter.watch.paced_search.SEARCH_SHARE", 0)
    vm = HandMadeVm(vcpus=3)
    vm.contents.chunk_bytes = 1 << 18
    vm.put(ARRAY)
    vm.put(Gpa(ARRAY + 128))
    loop, looks = loop_of(vm)
    assert loop.finder.pages == (ARRAY, None, ARRAY + 128)
    vm.contents.reads.clear()
    for _ in range(200):
        before = len(vm.contents.reads)
        look = next(looks)
        assert look.poll.absent == {1}
        assert not any(isinstance(it, PageLost | PagesFound) for it in look.findings)
        assert len(vm.contents.reads) <= before + 1  # piece by piece
    assert len(vm.contents.reads) == 2 * 17
    verdict = judged(Budgets(Fraction(1000)), loop)
    assert verdict == Verdict(VerdictStatus.PASSED, [])


def test_a_vcpu_that_comes_late() -> None:
    """Its page is taken, and the watch of the others goes on."""
    vm = HandMadeVm(vcpus=2)
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    next(looks)
    vm.put(ARRAY, 4)
    next(looks)
    vm.put(Gpa(ARRAY + 64))
    found = until(looks, is_found)
    assert isinstance(found, PagesFound)
    assert found.pages == (ARRAY, ARRAY + 64)
    assert (loop.watcher.summary.restarts, loop.finder.doubt) == (0, None)


def test_a_kernel_that_gave_way_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages stay as they are when the VM goes on after a stop: they are dead, and those of the other are found."""
    monkeypatch.setattr("pvclock.meter.watch.due_move.LIMIT_S", 0.3)
    vm = HandMadeVm()
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    next(looks)
    vm.put(ELSEWHERE)  # by kexec
    vm.events = [VmEvent(VmEventKind.STOP, 1), VmEvent(VmEventKind.RESUME, 2)]
    vm.put(ELSEWHERE, 4)
    next(looks)
    assert loop.finder.doubt is not None
    verdict = judged(Budgets(Fraction(1000)), loop)
    assert verdict is not None
    assert verdict.status is VerdictStatus.UNDECIDED
    found = until(looks, is_found)
    assert isinstance(found, PagesFound)
    assert found.pages == (ELSEWHERE,)
    assert loop.watcher.summary.restarts == 1


def test_two_arrays_of_which_none_has_moved() -> None:
    """One is of the boot before, and a verdict is open until a move tells which."""
    vm = HandMadeVm()
    vm.put(ARRAY, 6)
    vm.put(ELSEWHERE)
    loop, looks = loop_of(vm)
    passes(looks, 2)
    verdict = judged(Budgets(Fraction(1000)), loop)
    assert verdict is not None
    assert verdict.status is VerdictStatus.UNDECIDED
    assert "0x201000 looks like Linux's pages, too" in verdict.findings[0]
    vm.put(ELSEWHERE, 4)
    next(looks)
    assert loop.finder.doubt is None


def test_given_pages_are_not_searched() -> None:
    """Not at first, and not after a reset; they must be pages, one of each vCPU."""
    vm = HandMadeVm()
    with pytest.raises(PagesNotFound):
        loop_of(vm)
    with pytest.raises(ConfigError, match="no pvclock page at 0x201000"):
        loop_of(vm, [ARRAY])
    with pytest.raises(ConfigError, match="1 page of 2 vCPUs"):
        loop_of(HandMadeVm(vcpus=2), [ARRAY])
    with pytest.raises(ConfigError, match="2 pages of 1 vCPU; give each vCPU's, or none"):
        loop_of(vm, [ARRAY, ELSEWHERE])
    vm.put(ARRAY)
    vm.contents.reads.clear()
    loop, looks = loop_of(vm, [ARRAY])
    other = HandMadeVm()
    other.put(ARRAY)
    _, others_looks = loop_of(other)
    other.contents.reads.clear()
    vm.events, other.events = [RESET], [RESET]
    while len(other.contents.reads) < 8:  # two searches of its 4 MiB
        assert not any(map(is_found, [*next(looks).findings, *next(others_looks).findings]))
    assert loop.finder.is_searching
    assert vm.contents.reads == []


def test_the_end_of_the_vm() -> None:
    """An error of a VM that has ended is its end; what had not ended so far is told then."""
    vm = HandMadeVm(vcpus=2)
    vm.put(ARRAY)
    vm.put(Gpa(ARRAY + 64))
    vm.put(ARRAY, 4, 5000)
    loop, looks = loop_of(vm)
    next(looks)
    assert loop.watcher.open_disagreements
    vm.fault, vm.has_ended = MemoryNotReadable(1, "gone"), True
    (last,) = looks
    assert [type(finding) for finding in last.findings] == [Disagreement, Ended]


def test_the_end_of_the_vm_is_known_however_late_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that has no CPU until its patience is over asks once all the same."""
    monkeypatch.setattr("pvclock.meter.watch.loop.END_LIMIT_S", 0)
    vm = HandMadeVm(vcpus=1)
    vm.put(ARRAY)
    _, looks = loop_of(vm)
    next(looks)
    vm.fault, vm.has_ended = MemoryNotReadable(1, "gone"), True
    (last,) = looks
    assert [type(finding) for finding in last.findings] == [Ended]


def test_an_error_of_a_vm_that_runs_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What had not ended so far is told before it; one before the first look is one, too."""
    monkeypatch.setattr("pvclock.meter.watch.loop.END_LIMIT_S", 0.05)
    vm = HandMadeVm(vcpus=2)
    vm.put(Gpa(ARRAY + 64))
    vm.put(ARRAY, 2, 5000)
    _, looks = loop_of(vm)
    next(looks)
    vm.fault = MemoryNotReadable(1, "gone")
    assert [type(finding) for finding in next(looks).findings] == [Disagreement]
    with pytest.raises(MemoryNotReadable):
        next(looks)
    vm.fault = None
    _, looks = loop_of(vm)
    vm.fault, vm.has_ended = MemoryNotReadable(1, "gone"), True
    with pytest.raises(MemoryNotReadable):
        next(looks)


def test_looks_that_are_expensive_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look takes a twentieth of the time at most, unless the user says how often; by a clock that this test moves."""
    now_s = 0.0

    def slow(ram: MemoryRam, addresses: Sequence[Gpa], length: int) -> list[bytes]:
        nonlocal now_s
        now_s += 1 / 256
        return [ram.memory.read(gpa, length) for gpa in addresses]

    monkeypatch.setattr("pvclock.meter.watch.loop.time", SimpleNamespace(monotonic=lambda: now_s))
    vm = HandMadeVm()
    vm.put(ARRAY)
    cheap, _ = loop_of(vm)
    assert cheap.interval_s < 0.08
    monkeypatch.setattr(MemoryRam, "read_many", slow)
    dear, _ = loop_of(vm)
    assert dear.interval_s >= 0.08
    asked = WatchLoop(vm, Reference.RAW, wait=no_wait, interval_s=0.001)
    asked.begin()
    assert asked.interval_s == 0.001


def test_the_watch_is_as_long_as_it_is_wanted() -> None:
    """It waits for the interval between looks, and ends after the seconds, or when the wait says so."""
    vm = HandMadeVm()
    vm.put(ARRAY)
    waits: list[float] = []

    def third(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 3

    loop = WatchLoop(vm, Reference.RAW, wait=third, interval_s=50.0)
    loop.begin()
    assert len(list(loop.looks())) == 4  # and what is left to tell
    assert [-(-seconds // 50) for seconds in waits] == [1, 2, 3]  # nothing has passed meanwhile
    waits.clear()
    assert len(list(loop.looks(1.0))) == 2
    assert len(waits) == 1
    assert waits[0] <= 1


def test_what_firmware_may_have_left_is_no_verdict() -> None:
    """Until it moves, which only a page that KVM knows does, or is given."""
    vm = HandMadeVm()
    vm.put(FIRMWARE)
    loop, looks = loop_of(vm)
    for _ in range(2):
        next(looks)
    verdict = judged(Budgets(Fraction(1000)), loop)
    assert verdict is not None
    assert verdict.status is VerdictStatus.UNDECIDED
    assert "--page 0xe8c20" in verdict.findings[0]
    assert loop_of(vm, [FIRMWARE])[0].finder.doubt is None
    vm.put(FIRMWARE, 4)
    next(looks)
    assert loop.finder.doubt is None
    verdict = judged(Budgets(Fraction(1000), tsc_unchanged=True), loop)
    assert verdict == Verdict(VerdictStatus.PASSED, [])


def test_a_host_whose_tsc_is_not_trusted_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its verdict is undecided, too, though nothing changed."""
    monkeypatch.setattr("pvclock.host.linux.host_clocksource", lambda: "hpet")
    vm = HandMadeVm()
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    for _ in range(2):
        next(looks)
    why = "the host's TSC could not be trusted: the host's clocksource is hpet, not tsc"
    assert judged(Budgets(Fraction(1000)), loop) == Verdict(VerdictStatus.UNDECIDED, [why])


def test_a_guest_that_is_stopped_all_the_while_is_no_verdict() -> None:
    """Until it runs; where the VMM tells nothing of that, it is taken to run."""
    vm = HandMadeVm()
    vm.put(ARRAY)
    vm.is_paused = True
    loop, looks = loop_of(vm)
    for _ in range(2):
        next(looks)
    told = [loop.is_paused]
    assert judged(Budgets(Fraction(1000)), loop) == Verdict(VerdictStatus.UNDECIDED, [NEVER_RAN])
    vm.events = [VmEvent(VmEventKind.RESUME, 0)]
    vm.put(ARRAY, 4)
    next(looks)
    assert [*told, loop.is_paused] == [True, False]
    assert judged(Budgets(Fraction(1000), tsc_unchanged=True), loop) == Verdict(VerdictStatus.PASSED, [])
    vm.is_paused = None
    assert loop_of(vm)[0].is_paused is None


@pytest.mark.parametrize("doubt", ["searching", "unstable"])
def test_what_leaves_a_verdict_open(doubt: str) -> None:
    """Pages that were not found again, or a host's TSC that was wrong; what is broken is broken all the same."""
    vm = HandMadeVm()
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    for _ in range(2):
        next(looks)
    within = Budgets(Fraction(1000))
    assert judged(Budgets(), loop) is None
    passed = judged(within, loop)
    assert passed is not None
    assert passed.status is VerdictStatus.PASSED
    if doubt == "searching":
        vm.events = [RESET]
        next(looks)
    else:
        loop.troubles.append(HostTrouble(TroubleKind.TSC_STEP, True, "it went back"))
    undecided = judged(within, loop)
    assert undecided is not None
    assert undecided.status.exit_status == 2
    assert len(undecided.findings) == 1
    vm.put(ARRAY, 4, 5000)
    next(looks)
    broken = judged(Budgets(Fraction(1000), tsc_unchanged=True), loop)
    assert broken is not None
    assert broken.status.exit_status == (1 if doubt == "unstable" else 2)
