"""Reference time in the one publish: the page, the counter and the pvclock pages of a guest that has all of them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from fractions import Fraction
from itertools import count, pairwise
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ExecutionTimeBackend, GuestClock, GuestMemory, HostBackend, SimulatedBackend
from pvclock.meter.stress import republish
from tests import oracle
from tests.unit.clocks import guest_tsc

pytestmark = pytest.mark.row("E4", "H-50", "H-51", "H-54")

HZ: Final = 2_596_132_000
NS_PER_S: Final = 10**9
OLD: Final = 1 << 50
"""A host TSC of five days: a simulated counter waits for no break point, so a young page may have to stay invalid."""
TSC_OFFSET: Final = 987_654_321
SYSTEM_TIME: Final = 0x4B564D01
WALL_CLOCK: Final = 0x4B564D00
REFERENCE_TSC: Final = 0x40000021
TIME_REF_COUNT: Final = 0x40000020
WALL_GPA: Final = 0x1000
PVCLOCK_GPAS: Final = (0x2000, 0x2040)
REFERENCE_GPA: Final = 0x3000

UNIT_NS: Final = 100
BOUND_UNITS: Final = 2
BOUND_NS: Final = 2


class Guest:
    """A guest of two vCPUs that reads every clock it can have, in its own arithmetic; `host` is simulated."""

    def __init__(self, tsc: int = OLD, hz: int = HZ) -> None:
        self.host = SimulatedBackend(hz, tsc)
        self.memory = GuestMemory(bytearray(1 << 16))
        self.clock = GuestClock(self.memory, 2, "HyperV+KVM", backend=self.host, tsc_offset=TSC_OFFSET)
        self.clock.write_msr(0, WALL_CLOCK, WALL_GPA)
        for vcpu, gpa in enumerate(PVCLOCK_GPAS):
            self.clock.write_msr(vcpu, SYSTEM_TIME, gpa | 1)
        self.clock.write_msr(0, REFERENCE_TSC, REFERENCE_GPA | 1)

    def pvclock_ns(self, vcpu: int) -> int:
        """What vCPU computes from its pvclock page."""
        page = oracle.TimeInfo.parse(self.memory.read(PVCLOCK_GPAS[vcpu], 32))
        return page.read(self.guest_tsc(vcpu))

    def utc_ns(self) -> int:
        """What it computes from its wall clock and system time."""
        record = self.memory.read(WALL_GPA, 12)
        seconds, ns = (int.from_bytes(record[at : at + 4], "little") for at in (4, 8))
        return seconds * 10**9 + ns + self.pvclock_ns(0)

    def page(self) -> oracle.ReferenceTscPage:
        """Its reference TSC page."""
        return oracle.ReferenceTscPage.parse(self.memory.read(REFERENCE_GPA, 24))

    def page_units(self) -> int:
        """What it computes from the reference TSC page."""
        return self.page().read(self.guest_tsc(1))

    def counter_units(self) -> int:
        """What it reads from the counter."""
        return self.clock.read_msr(1, TIME_REF_COUNT)

    def guest_tsc(self, vcpu: int) -> int:
        """RDTSC on vCPU."""
        return guest_tsc(self.host, vcpu)

    def timeline_ns(self) -> Fraction:
        """Guest time, exactly."""
        return self.clock.at(self.clock.backend.counter.read())  # type: ignore[arg-type]  # a HostTsc

    def refresh(self) -> None:
        """Publish anew."""
        self.clock.refresh()


def an_operation(guest: Guest, choice: random.Random) -> None:
    """Any that a VMM does to a clock that runs, and a pause of any length, in which it does others."""
    clock = guest.clock
    anything: list[Callable[[], object]] = [
        clock.refresh,
        clock.tick,
        lambda: clock.dilate(choice.randrange(1, 1000), choice.randrange(1, 1000)),
        lambda: clock.slew(choice.randrange(-(10**6), 10**6), 500),
        lambda: clock.skip(choice.randrange(10**9)),
        lambda: clock.write_msr(0, REFERENCE_TSC, REFERENCE_GPA | 1),
    ]
    if choice.randrange(4):
        choice.choice(anything)()
        return
    clock.pause()
    for _ in range(choice.randrange(3)):
        guest.host.advance(ns=choice.randrange(10**9))
        choice.choice(anything)()
    clock.resume(choice.choice(["freeze", "advance", "slew"]))


@pytest.mark.row("H-35", "H-56", "K-10")
@pytest.mark.parametrize("instants", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_all_clocks_of_a_guest_agree(instants: int) -> None:
    """pvclock pages, UTC, reference TSC page and counter differ by 2 units and 2 ns at most, whatever is done."""
    choice = random.Random(14)  # noqa: S311  # repeatable
    guest = Guest()
    epoch_ns = guest.utc_ns() - guest.pvclock_ns(0)
    last = valid = 0
    for instant in range(instants):
        guest.host.advance(ns=choice.randrange(1 << choice.randrange(31)))
        if instant % 20 == 0:
            an_operation(guest, choice)
        now = guest.timeline_ns()
        pvclock = [guest.pvclock_ns(vcpu) for vcpu in range(2)]
        counter = guest.counter_units()
        if guest.page().is_valid:
            valid += 1
            assert guest.page_units() == counter
        age_ns = now - guest.clock.at(guest.clock.line.tsc)
        drift_ns = Fraction(47, 10**11) * age_ns
        assert pvclock[0] == pvclock[1] == guest.utc_ns() - epoch_ns
        assert counter >= last
        assert abs(counter * UNIT_NS - now) <= BOUND_UNITS * UNIT_NS
        assert abs(counter * UNIT_NS - pvclock[0]) <= BOUND_UNITS * UNIT_NS + BOUND_NS + drift_ns + guest.clock.rate
        last = counter
    assert valid > instants * 0.9


@given(
    begin=st.integers(0, 1 << 62),
    hz=st.integers(10**8, 8 * 10**9),
    steps=st.lists(st.tuples(st.integers(0, 1 << 34), st.integers(1, 10**6), st.integers(1, 10**6)), max_size=30),
)
def test_a_rate_change_moves_a_reading_by_0_or_1_unit(begin: int, hz: int, steps: list[tuple[int, int, int]]) -> None:
    """At the break point the new page shows what the old one did, or one more, and its sequence is a new one."""
    guest = Guest(begin, hz)
    for ns, numerator, denominator in steps:
        guest.host.advance(ns=ns)
        old, counted = guest.page(), guest.counter_units()
        guest.clock.dilate(numerator, denominator)
        new, tsc = guest.page(), guest.guest_tsc(1)
        if old.is_valid and new.is_valid:
            assert new.read(tsc) - old.read(tsc) in (0, 1)
            assert new.sequence == old.sequence + (new != old)
        assert 0 <= guest.counter_units() - counted <= 1


def test_republish_is_many_publishes_of_the_page_too() -> None:
    """republish() changes the rate of page and counter with pvclock's: its last rate stays, within 2 units."""
    guest = Guest()
    guest.host.advance(ns=NS_PER_S)
    sequence = guest.page().sequence
    for last in (Fraction(1, 10), Fraction(1)):
        republish(guest.clock, 10, [Fraction(4, 3), last])
        guest.host.advance(ns=NS_PER_S)
        exact = guest.clock.at(guest.host.tsc) / UNIT_NS
        assert abs(guest.page_units() - exact) <= BOUND_UNITS
        assert abs(guest.clock.read_msr(0, TIME_REF_COUNT) - exact) <= BOUND_UNITS
    assert guest.page().sequence - sequence >= 18  # some publishes meet the rate that there is


def test_a_refresh_leaves_the_page_alone() -> None:
    """Neither rate nor offset changes, so readers need not begin again."""
    guest = Guest()
    before = guest.memory.read(REFERENCE_GPA, 4096)
    versions = []
    for _ in range(100):
        guest.host.advance(ns=NS_PER_S)
        guest.refresh()
        versions.append(int.from_bytes(guest.memory.read(PVCLOCK_GPAS[0], 4), "little"))
        assert guest.memory.read(REFERENCE_GPA, 4096) == before
    assert all(later > earlier for earlier, later in pairwise(versions))


def test_a_page_is_not_used_where_vcpus_disagree() -> None:
    """With different TSC offsets the sequence is 0, and guests read the counter; afterwards it is one never seen."""
    guest = Guest()
    seen = [guest.page().sequence]
    for ticks in (10**6, 10**9):
        guest.host.advance(ns=NS_PER_S)
        guest.clock.host_write_msr(1, 0x10, ticks)
        assert not guest.page().is_valid
        before = guest.counter_units()
        guest.host.advance(ns=NS_PER_S)
        assert guest.counter_units() - before == pytest.approx(10**7, abs=1)
        guest.clock.repair_tsc()
        seen.append(guest.page().sequence)
        assert abs(guest.page_units() * UNIT_NS - guest.timeline_ns()) <= BOUND_UNITS * UNIT_NS
    assert sorted(set(seen)) == seen


def test_the_counter_stands_still_in_a_pause() -> None:
    """It is what the page showed at the pause, moves by what is skipped, and goes on from there."""
    guest = Guest()
    guest.host.advance(ns=NS_PER_S + 1)
    guest.clock.pause()
    stood, tsc = guest.counter_units(), guest.guest_tsc(0)
    guest.host.advance(ns=NS_PER_S)
    assert guest.counter_units() == stood == guest.page().read(tsc)
    for _ in range(10):
        guest.clock.skip(150)
    assert guest.counter_units() == pytest.approx(stood + 15, abs=1)
    stood = guest.counter_units()
    guest.clock.resume("freeze")
    assert guest.counter_units() - stood in (0, 1)


def test_a_rate_changed_in_a_pause_holds_from_the_resume_on() -> None:
    """Not from the break point on: the margin at 1000 times the rate would be 4000 units ahead of guest time."""
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 1, "HyperV", backend=HostBackend())
    clock.write_msr(0, REFERENCE_TSC, REFERENCE_GPA | 1)
    for _ in range(20):
        clock.dilate(1000)
        clock.pause()
        clock.dilate(1)
        clock.resume("freeze")
        tsc = clock.backend.counter.read()
        page = oracle.ReferenceTscPage.parse(memory.read(REFERENCE_GPA, 24))
        assert abs(page.read(clock.guest_tsc(0, tsc)) * UNIT_NS - clock.at(tsc)) <= BOUND_UNITS * UNIT_NS  # type: ignore[arg-type]


def test_a_page_comes_in_with_its_memory() -> None:
    """A page in no slot is left out, and written by the first publish after a slot has it."""
    guest = Guest()
    gpa = 1 << 20
    guest.clock.write_msr(0, REFERENCE_TSC, gpa | 1)
    guest.refresh()
    guest.memory.add_slot(gpa, bytearray(b"\xa5" * 4096))
    guest.refresh()
    page = oracle.ReferenceTscPage.parse(guest.memory.read(gpa, 24))
    assert page.is_valid
    assert page.reserved == 0
    assert page.read(guest.guest_tsc(0)) == guest.counter_units()
    assert guest.memory.read(gpa + 24, 4072) == b"\xa5" * 4072


def test_a_page_is_written_into_other_memory_at_the_same_address() -> None:
    """A slot that was taken away and put back with other content: the page is written, under a sequence never seen."""
    guest, gpa, buffer = Guest(), 1 << 20, bytearray(4096)
    guest.memory.add_slot(gpa, buffer)
    guest.clock.write_msr(0, REFERENCE_TSC, gpa | 1)
    before = oracle.ReferenceTscPage.parse(guest.memory.read(gpa, 24))
    guest.memory.remove_slot(gpa)
    buffer[:] = bytes(4096)
    guest.memory.add_slot(gpa, buffer)
    guest.refresh()
    after = oracle.ReferenceTscPage.parse(guest.memory.read(gpa, 24))
    assert after.sequence > before.sequence
    assert after.read(guest.guest_tsc(0)) == guest.counter_units()


def test_a_cpu_that_is_behind_does_not_take_the_counter_back() -> None:
    """What a guest registers there is published at the last break point, and the line goes on as other CPUs read it."""
    choice = random.Random(3)  # noqa: S311  # repeatable
    for _ in range(200):
        guest = Guest()
        for _ in range(choice.randrange(1, 12)):
            guest.host.advance(ns=choice.randrange(10**5))
            guest.clock.dilate(choice.randrange(1, 1000), choice.randrange(1, 1000))
        guest.clock.dilate(1)
        guest.host.advance(ns=choice.randrange(5000))
        before, tsc, lag = guest.counter_units(), guest.host.tsc, HZ // 1000
        guest.host.tsc, guest.host.cpu_lag_ticks = tsc - lag, lag
        guest.clock.write_msr(0, SYSTEM_TIME, PVCLOCK_GPAS[1] | 1)
        guest.host.tsc, guest.host.cpu_lag_ticks = tsc, 0
        assert guest.counter_units() >= before


@pytest.mark.parametrize("hours", [1, 10])
def test_a_page_comes_back_after_a_long_time_without_a_publish(hours: int) -> None:
    """What its scale has carried meanwhile is worked off by the next publishes, a second apart, without a step back."""
    choice = random.Random(5)  # noqa: S311  # repeatable
    furthest = Fraction(0)
    for _ in range(20):
        guest = Guest((1 << 39) + choice.randrange(1 << 37))
        for _ in range(5):
            guest.clock.dilate(choice.randrange(1, 1000), choice.randrange(1, 1000))
            guest.host.advance(ns=choice.randrange(10**6))
        guest.clock.dilate(1)
        guest.host.advance(ns=hours * 3600 * NS_PER_S)
        off = (guest.counter_units() * UNIT_NS - guest.timeline_ns()) / UNIT_NS
        furthest = max(furthest, abs(off))
        last, refreshes = guest.counter_units(), 0
        while abs(off) > BOUND_UNITS:
            guest.refresh()
            guest.host.advance(ns=NS_PER_S)
            units, refreshes = guest.counter_units(), refreshes + 1
            assert 10**7 - 1 <= units - last <= 10**7 + 1
            last, off = units, (units * UNIT_NS - guest.timeline_ns()) / UNIT_NS
            assert refreshes <= hours * 3600
    assert furthest > BOUND_UNITS


def test_an_offset_before_anything_was_shown_is_taken_whole() -> None:
    """Also in a pause: nobody has read a time that page and counter must not be less than."""
    host, memory = SimulatedBackend(HZ, OLD), GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 1, "HyperV", backend=host)
    host.advance(ns=10 * NS_PER_S)
    clock.pause()
    clock.offset(-5 * NS_PER_S)
    clock.resume("freeze")
    clock.write_msr(0, REFERENCE_TSC, REFERENCE_GPA | 1)
    host.advance(ns=NS_PER_S)
    assert abs(clock.read_msr(0, TIME_REF_COUNT) * UNIT_NS - 6 * NS_PER_S) <= BOUND_UNITS * UNIT_NS


def test_the_counter_counts_execution_time_during_a_run() -> None:
    """On a backend whose counter stands still until it is asked, as on any other: the page has gone on, too."""
    inner, memory = SimulatedBackend(HZ, OLD), GuestMemory(bytearray(1 << 16))
    backend = ExecutionTimeBackend(inner)
    clock = GuestClock(memory, 2, "HyperV", backend=backend)
    inner.advance(ns=NS_PER_S)
    clock.write_msr(0, REFERENCE_TSC, REFERENCE_GPA | 1)
    backend.enter()
    inner.advance(ns=10**6)
    page = oracle.ReferenceTscPage.parse(memory.read(REFERENCE_GPA, 24))
    assert clock.read_msr(1, TIME_REF_COUNT) == page.read(guest_tsc(inner, 1)) > 0
    backend.leave()


def test_a_page_is_not_used_where_the_guests_tsc_wraps() -> None:
    """A guest that sets its TSC to 2^63 or more reads the counter, which goes on."""
    guest = Guest()
    guest.host.advance(ns=NS_PER_S)
    before = guest.counter_units()
    for vcpu in range(2):
        guest.clock.write_msr(vcpu, 0x10, 2**64 - 1000)
    guest.clock.repair_tsc()
    assert not guest.page().is_valid
    guest.host.advance(ns=NS_PER_S)
    assert guest.counter_units() - before in (10**7, 10**7 + 1)


@given(
    tsc=st.integers(1 << 31, 1 << 34), less=st.integers(1, 3 * 10**8), others=st.lists(st.integers(1, 999), max_size=6)
)
def test_a_rate_just_below_a_unit_a_tick(tsc: int, less: int, others: list[int]) -> None:
    """The scale's carry does not make it wrap: a valid page is near guest time, a second later, too."""
    guest = Guest(tsc, 10**7)
    for other in others:
        guest.host.advance(ns=other * 997)
        guest.clock.dilate(other, 1000)
    guest.clock.dilate(10**18 - less, 10**18)
    guest.host.advance(ns=NS_PER_S)
    units = guest.counter_units()
    assert abs(units * UNIT_NS - guest.timeline_ns()) <= BOUND_UNITS * UNIT_NS
    assert not guest.page().is_valid or guest.page_units() == units


def test_what_is_written_is_told() -> None:
    """The memory's on_dirty hears of the page's 24 bytes at each publish that changes them, and at no other."""
    guest = Guest()
    told: list[tuple[int, int]] = []
    guest.memory.on_dirty = lambda gpa, length: told.append((gpa, length))
    guest.refresh()
    assert (REFERENCE_GPA, 24) not in told
    guest.clock.dilate(2)
    assert told.count((REFERENCE_GPA, 24)) == 1


def test_a_restored_guest_reads_on() -> None:
    """Its counter does not go back, the page goes on from where it stood, and the sequence is one never seen."""
    guest = Guest()
    for step in range(50):
        guest.host.advance(ns=NS_PER_S // 7 + step)
        guest.clock.dilate(step + 1, 50)
        before, sequence = guest.counter_units(), guest.page().sequence
        guest.clock.pause()
        guest.clock = GuestClock.restore(guest.clock.save(), guest.memory, backend=guest.host)
        assert guest.counter_units() - before in (0, 1)
        guest.host.advance(ns=NS_PER_S)
        guest.clock.resume("freeze")
        assert guest.page().sequence == sequence + 1
        assert guest.page_units() - before in (0, 1, 2)
        assert abs(guest.page_units() * UNIT_NS - guest.timeline_ns()) <= BOUND_UNITS * UNIT_NS


def test_the_counter_never_goes_back_while_the_rate_changes() -> None:
    """A thread that reads it all the time waits for each window, and finds no reading below the one before."""
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 1, "HyperV", backend=HostBackend())
    readings: list[int] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            readings.append(clock.reference_time.units())

    reader = threading.Thread(target=read)
    reader.start()
    for step in count():
        if step >= 2000 and len(readings) > 100:
            break
        clock.dilate(1 + step % 3)
    is_over.set()
    reader.join()
    assert all(earlier <= later for earlier, later in pairwise(readings))
