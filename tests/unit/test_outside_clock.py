"""The clock of a running VM as something that can be read: what it gives, and when it cannot."""

from __future__ import annotations

from fractions import Fraction

import pytest

from pvclock import Gpa, PvclockError, StateError, read_tsc
from pvclock.errors import MemoryNotReadable, PagesNotFound, VmEnded
from pvclock.meter.findings import TIME_INFO, time_info
from pvclock.meter.watch.lines import value_at
from pvclock.meter.watch.outside_clock import OutsideClock
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from tests.unit.test_watch_loop import ARRAY, RESET, SCALE, TSC_HZ, HandMadeVm

pytestmark = pytest.mark.row("E10")


@pytest.fixture(autouse=True)
def host_of_the_pages_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages are made for TSC_HZ, whatever this host's is; and what hangs is given up soon."""
    monkeypatch.setattr("pvclock.meter.watch.outside_clock.measured_tsc_hz", lambda: TSC_HZ)
    monkeypatch.setattr("pvclock.meter.watch.outside_clock.LIMIT_S", 0.3)


def clock_of(vm: HandMadeVm) -> OutsideClock:
    """Its clock."""
    return OutsideClock(vm, lambda _done, _total: None)


def made(offset: int | None = 0, vcpus: int = 1) -> HandMadeVm:
    """A VM with a page for each vCPU."""
    vm = HandMadeVm(vcpus)
    vm.offset, vm.why_no_offsets = offset, None if offset is not None else "by hand"
    for vcpu in range(vcpus):
        vm.put(Gpa(ARRAY + 64 * vcpu))
    return vm


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_reading_is_what_the_page_gives(vcpus: int) -> None:
    """At an instant of the host's TSC within the call, exactly, by vCPU 0's page and offset."""
    vm = made(-(10**9), vcpus)
    vm.put(ARRAY, 4)
    clock = clock_of(vm)
    begin = read_tsc()
    seen = clock.reading()
    assert begin <= seen.host_tsc <= read_tsc()
    page = time_info(vm.contents.memory.read(ARRAY, TIME_INFO.size))
    assert seen.tsc == seen.host_tsc - 10**9
    assert (seen.ns, seen.bound_ticks) == (value_at(page, seen.tsc), 0)
    assert clock.pages() == [page]
    assert clock.found.pages[0] == ARRAY


def test_an_unknown_offset_is_taken_for_constant() -> None:
    """The clock goes on as the host's TSC does."""
    clock = clock_of(made(None))
    first, second = clock.reading(), clock.reading()
    assert second.tsc - first.tsc == second.host_tsc - first.host_tsc > 0
    assert abs(second.ns - first.ns - Fraction(second.tsc - first.tsc, 2)) <= 1


def test_what_leaves_nothing_to_read() -> None:
    """No page; one that is lost; one of another rate than the host's; a TSC that was changed behind the line."""
    with pytest.raises(PagesNotFound):
        clock_of(HandMadeVm())
    lost = made()
    clock = clock_of(lost)
    lost.wipe(ARRAY)
    with pytest.raises(StateError, match="page is lost: no legal page"):
        clock.reading()
    scaled = made()
    scaled.tsc_hz = TSC_HZ - TSC_HZ // 4000
    with pytest.raises(StateError, match=f"TSC of {TSC_HZ // 1000} kHz"):
        clock_of(scaled)
    changed = made(None)
    clock = clock_of(changed)
    changed.events = [RESET]
    clock.reading()
    changed.put(ARRAY, 4)
    with pytest.raises(StateError, match="by an unknown number of ticks"):
        clock.reading()
    bent = made(None)
    clock = clock_of(bent)
    clock.reading()
    page = time_info(bent.contents.memory.read(ARRAY, TIME_INFO.size))
    bent.contents.memory.write(ARRAY, TIME_INFO.pack(*page._replace(version=4, tsc_to_system_mul=SCALE.mul + 1)))
    with pytest.raises(StateError, match="rate changed"):
        clock.reading()


def test_offsets_are_waited_for_where_they_can_be_read() -> None:
    """A reading without one would be of another TSC than the others."""
    vm = made(0)
    clock = clock_of(vm)
    vm.offset = None
    with pytest.raises(StateError, match="changes all the time"):
        clock.reading()
    vm.offset = 0
    assert clock.reading().tsc


def test_a_watch_that_has_no_cpu_looks_often_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TSC that was being written at its only look in two seconds is not written all the time."""
    vm = made(0)
    clock = clock_of(vm)
    offsets = [None, 0, *[0] * 20]  # at the first look it changes
    monkeypatch.setattr("pvclock.meter.watch.outside_clock.LIMIT_S", 0)
    monkeypatch.setattr(vm, "tsc_offsets", lambda: (offsets.pop(0),))
    assert clock.reading().tsc


def test_the_end_of_the_vm() -> None:
    """Is told as such, also where reading its memory fails first; another failure as what it is."""
    for has_ended, error in ((True, VmEnded), (False, MemoryNotReadable)):
        vm = made()
        clock = clock_of(vm)
        clock.check_running()
        vm.fault, vm.has_ended = MemoryNotReadable(1, "gone"), has_ended
        with pytest.raises(PvclockError) as raised:
            clock.reading()
        assert type(raised.value) is error


def test_a_stop_is_known_as_far_as_the_vmm_tells() -> None:
    """From the beginning, and by its events since; the page alone says nothing of it."""
    for at_first in (False, True, None):
        vm = made()
        vm.is_paused = at_first
        clock = clock_of(vm)
        seen = [clock.is_stopped]
        for kind in (VmEventKind.STOP, VmEventKind.MIGRATION, VmEventKind.RESUME):
            vm.events = [VmEvent(kind, 0)]
            clock.reading()
            seen.append(clock.is_stopped)
        assert seen == [at_first, True, True, False]
