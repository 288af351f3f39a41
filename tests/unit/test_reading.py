"""What a clock says it was, is and shows: past instants exactly, a page only where it is, one time while it stands."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Final, Literal

import pytest

from pvclock import GuestClock, GuestMemory, HostTsc, RangeError, SimulatedBackend, StateError
from pvclock.timekeeping.history import SEGMENTS_KEPT
from tests.unit.clocks import NS_PER_S, PAGES, SYSTEM_TIME, a_clock, page_of

HZ: Final = 2_596_132_000

STEPS: Final[list[Callable[[GuestClock], object]]] = [
    lambda clock: clock.dilate(355, 113),
    lambda clock: clock.skip(12345),
    lambda clock: clock.slew(10**6, 500),
    lambda clock: clock.pause(),
    lambda clock: clock.resume("freeze"),
    lambda clock: clock.dilate(1, 3),
    lambda clock: clock.pause(),
    lambda clock: clock.skip(5),
    lambda clock: clock.resume("advance"),
    lambda clock: clock.refresh(),
]


@pytest.mark.row("E9", "E11")
@pytest.mark.parametrize("tsc", [0, 10**13, 2**64 - 1])
def test_the_past_is_as_exact_as_the_present(tsc: int) -> None:
    """at() an instant before the present segment says what it said then, through every operation."""
    clock, backend, _ = a_clock(HZ, tsc)
    said: list[tuple[HostTsc, Fraction]] = []
    for step in STEPS:
        for _ in range(3):
            backend.advance(ns=333_333_333)
            said.append((backend.tsc, clock.at(backend.tsc)))
        backend.advance(ns=1000)  # at the very instant of a step it is what the step made of it
        step(clock)
    for then, ns in said:
        assert clock.at(then) == ns
    assert len({ns for _, ns in said}) > 20


@pytest.mark.row("E9", "E11")
def test_before_the_oldest_segment_it_is_an_error() -> None:
    """Before the clock was made, and before the last 256 segments: RangeError, never a constant."""
    clock, backend, _ = a_clock(HZ, 10**12)
    with pytest.raises(RangeError, match="1 ticks before the oldest segment that is kept"):
        clock.at(HostTsc(10**12 - 1))
    assert clock.at(HostTsc(10**12)) == 0
    marks = []
    for rate in range(2, SEGMENTS_KEPT + 10):
        marks.append((backend.tsc, clock.at(backend.tsc)))
        backend.advance(ns=10_000)
        clock.dilate(rate)
        backend.advance(ns=10_000)
    gone, kept = marks[:-SEGMENTS_KEPT], marks[-SEGMENTS_KEPT:]
    assert len(gone) == 8
    for then, ns in kept:
        assert clock.at(then) == ns
    for then, _ in gone:
        with pytest.raises(RangeError, match="the last 256 are"):
            clock.at(then)


@pytest.mark.row("E9", "E11")
def test_the_past_before_a_step_of_the_tsc_cannot_be_told() -> None:
    """A TSC that began anew names other instants: RangeError."""
    clock, backend, _ = a_clock(HZ, 10**15)
    backend.advance(ns=NS_PER_S)
    clock.tick()
    then = backend.tsc
    backend.tsc = HostTsc(5)
    clock.tick()
    assert clock.at(backend.tsc) == NS_PER_S
    backend.advance(ns=NS_PER_S)
    assert clock.at(HostTsc(5)) == NS_PER_S
    with pytest.raises(RangeError):
        clock.at(HostTsc(4))
    assert clock.at(then) > 10**14


# Where the page is

BAD: Final = {"just beyond memory": 1 << 16, "far beyond memory": 1 << 40, "at the end of 2^64": 2**64 - 32}


@pytest.mark.row("E9")
@pytest.mark.parametrize("where", BAD)
@pytest.mark.parametrize("paused", [False, True])
def test_a_page_that_is_moved_to_a_bad_address_is_not_read_where_it_was(where: str, paused: bool) -> None:
    """read() is a StateError, also if the guest has put something else there; back at a good one it reads again."""
    clock, backend, memory = a_clock(HZ, 10**13)
    backend.advance(ns=NS_PER_S)
    clock.refresh()
    if paused:
        clock.pause()
    clock.write_msr(0, SYSTEM_TIME, BAD[where] & ~1 | 1)
    memory.write(PAGES[0], bytes(range(2, 34)))
    with pytest.raises(StateError, match="vCPU 0 has no page in guest memory"):
        clock.read(0)
    clock.refresh()
    with pytest.raises(StateError, match="vCPU 0 has no page in guest memory"):
        clock.reading(0)
    assert memory.read(PAGES[0], 32) == bytes(range(2, 34))
    clock.write_msr(0, SYSTEM_TIME, 0x3001)
    assert abs(clock.read(0) - NS_PER_S) <= 1


# While it stands


@pytest.mark.row("E9")
def test_read_and_now_agree_while_paused() -> None:
    """However long, and by how much the page's own line would have gone on; the guest's TSC is that of the pause."""
    clock, backend, _ = a_clock(HZ, 10**13, vcpus=2)
    backend.advance(ns=1_234_567_891)
    clock.refresh()
    clock.pause()
    stood_at, tsc = 1_234_567_891, int(backend.tsc)
    for _ in range(3):
        backend.advance(ns=3600 * NS_PER_S)
        assert abs(clock.now() - stood_at) <= 1
        assert [abs(clock.read(vcpu) - stood_at) for vcpu in range(2)] <= [1, 1]
        assert clock.reading(0).tsc == tsc


@pytest.mark.row("E9")
def test_read_and_now_agree_after_a_skip_while_paused() -> None:
    """Both are ahead by as much at once, though no page was published."""
    clock, backend, memory = a_clock(HZ, 10**13)
    backend.advance(ns=NS_PER_S)
    clock.pause()
    page = memory.read(PAGES[0], 32)
    before = clock.read(0)
    for ns in (5 * NS_PER_S, 0, 1):
        clock.skip(ns)
        backend.advance(ns=NS_PER_S)
        assert abs(clock.read(0) - clock.now()) <= 1
    assert clock.read(0) - before == 5 * NS_PER_S + 1
    assert memory.read(PAGES[0], 32) == page
    clock.resume("freeze")
    assert abs(clock.read(0) - clock.now()) <= 1
    assert clock.now() == 6 * NS_PER_S + 1


@pytest.mark.row("E9", "P-25")
def test_read_and_now_agree_for_a_restored_clock() -> None:
    """One that was not resumed reads what a page may have shown, with the TSC that it was saved with, on any host."""
    clock, backend, memory = a_clock(HZ, 10**13, vcpus=2)
    clock.write_msr(1, 0x3B, 1000)
    backend.advance(ns=NS_PER_S)
    clock.pause()
    state = clock.save()
    host = SimulatedBackend(10**9, tsc=77)
    restored = GuestClock.restore(state, GuestMemory(bytearray(memory.read(0, 1 << 16))), backend=host)
    for _ in range(2):
        for vcpu in range(2):
            assert restored.read(vcpu) == restored.now() + 1 == NS_PER_S + 1
            assert restored.reading(vcpu).tsc == restored.read_msr(vcpu, 0x10) == state.vcpus[vcpu].guest_tsc
        host.advance(ns=NS_PER_S)
    restored.host_write_msr(0, 0x10, 5)
    assert restored.reading(0).tsc == restored.read_msr(0, 0x10) == 5
    restored.skip(10)
    assert restored.read(0) == restored.now() + 1 == NS_PER_S + 11
    restored.resume("freeze")
    assert 0 <= restored.read(0) - restored.now() <= 2
    assert restored.reading(0).tsc == 5


@pytest.mark.row("E9")
def test_a_clock_that_was_paused_before_it_had_a_page() -> None:
    """A page that comes while it is paused is written at resume(); until then it has the version of none."""
    backend = SimulatedBackend(HZ, 10**13)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend)
    backend.advance(ns=NS_PER_S)
    clock.pause()
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    assert page_of(clock).version == 0
    assert clock.read(0) == clock.now() == NS_PER_S
    clock.resume("freeze")
    assert clock.read(0) == clock.now() == NS_PER_S


@pytest.mark.row("E9")
@pytest.mark.parametrize("tsc", ["stops", "restarts", "restarts, continued"])
@pytest.mark.parametrize("is_restored", [False, True])
def test_a_tsc_that_restarts_leaves_the_reading_of_a_pause(
    tsc: Literal["stops", "restarts", "restarts, continued"], is_restored: bool
) -> None:
    """The host sleeps while the clock is paused, or restored and not resumed: guest time and TSC stand as before."""
    clock, backend, memory = a_clock(HZ, 10**13)
    backend.advance(ns=NS_PER_S)
    clock.tick()
    clock.pause()
    if is_restored:
        backend = SimulatedBackend(HZ, 10**15)
        clock = GuestClock.restore(clock.save(), memory, backend=backend)
    before = clock.reading(0)
    backend.sleep(ns=NS_PER_S, tsc=tsc)
    clock.tick()
    assert clock.reading(0) == before
    backend.advance(ns=NS_PER_S)
    clock.tick()
    assert clock.reading(0) == before
    clock.resume("freeze")
    assert abs(clock.reading(0).ns - before.ns) <= 1
    assert clock.reading(0).tsc == clock.guest_tsc(0, backend.tsc)
