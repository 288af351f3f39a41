"""GuestClock.travel(): guest time and all vCPUs' TSCs move forward as one, and the events say so."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

import pytest

from pvclock import GuestClock, GuestMemory, RangeError, SimulatedBackend, StateError, TscOffsetNotHonoured, WrongType
from pvclock.timekeeping.event_timeline import EventTimeline
from pvclock.timekeeping.events import EventKind
from tests.unit.clocks import a_clock, guest_ns, guest_tsc

pytestmark = pytest.mark.row("E17")

HZ: Final = 2_596_132_000
DAY: Final = 86400 * HZ


@pytest.mark.parametrize("ticks", [0, 1, HZ // 3 + 1, 400 * HZ + 7])
def test_page_and_tsc_move_together(ticks: int) -> None:
    """Each vCPU's RDTSC moves by the ticks, and its page by what they are in ns, at the same host instant."""
    clock, backend, memory = a_clock(HZ, 10**12, vcpus=2)
    before = [(guest_tsc(backend, vcpu), guest_ns(backend, memory, vcpu)) for vcpu in (0, 1)]
    host_tsc = backend.tsc
    clock.travel(ticks)
    passed = backend.tsc - host_tsc
    for vcpu, (tsc, ns) in enumerate(before):
        moved = guest_tsc(backend, vcpu) - tsc
        assert moved == ticks + passed
        assert abs(guest_ns(backend, memory, vcpu) - ns - Fraction(moved * 10**9, HZ)) <= 2
        assert clock.guest_tsc(vcpu, backend.tsc) == guest_tsc(backend, vcpu)


def test_errors_do_not_add_up() -> None:
    """After a thousand skips of odd lengths, a day in all, clock and TSC are within 2 ns of each other."""
    clock, backend, memory = a_clock(HZ, 10**12)
    tsc, ns = guest_tsc(backend), guest_ns(backend, memory)
    for number in range(1000):
        clock.travel(DAY // 1000 + number)
        backend.advance(ns=12_345)
    moved = guest_tsc(backend) - tsc
    assert moved >= DAY
    assert abs(guest_ns(backend, memory) - ns - Fraction(moved * 10**9, HZ)) <= 2
    assert abs(clock.now() - guest_ns(backend, memory)) <= 2


def test_events_are_the_timeline() -> None:
    """Each skip is one event, which says how far and why; the events alone give guest time at any host TSC."""
    clock, backend, _ = a_clock(HZ, 10**12)
    first = clock.events.last
    for why in ("to vCPU 0's TSC deadline", ""):
        clock.travel(5 * HZ, why)
        backend.advance(ns=10**9)
    events = clock.events.read(first).events
    assert [event.kind for event in events] == [EventKind.SKIP] * 2
    assert [event.why for event in events] == [f"travel({5 * HZ}): to vCPU 0's TSC deadline", f"travel({5 * HZ})"]
    assert [event.jump_ns for event in events] == [5 * 10**9] * 2
    timeline = EventTimeline(clock.events.read(0).events)
    for event in events:
        assert event.host_tsc is not None
        assert timeline.at(event.host_tsc) == clock.at(event.host_tsc)
    assert timeline.at(backend.tsc) == clock.at(backend.tsc)


def test_the_clocks_own_rate() -> None:
    """A dilated clock goes by what the ticks are at its rate; a slew has still to do what it had to do."""
    clock, backend, _ = a_clock(HZ, 10**12)
    clock.dilate(1, 4)
    before = clock.now()
    clock.travel(8 * HZ)
    assert clock.now() - before == pytest.approx(2 * 10**9, abs=10**6)
    clock.dilate(1)
    clock.slew(10**6)
    owed_ns, slewing = clock.skew_ns, clock.at(backend.tsc)
    clock.travel(1000 * HZ)
    assert float(owed_ns - clock.skew_ns) == pytest.approx(0, abs=10)
    assert float(clock.at(backend.tsc) - slewing) == pytest.approx(1000 * 10**9, abs=10**6)


def test_all_or_nothing() -> None:
    """Where a vCPU's TSC does not move, nothing does: neither time nor the TSC of another, and there is no event."""
    clock, backend, memory = a_clock(HZ, 10**12, vcpus=2)
    before, last = [guest_tsc(backend, vcpu) - backend.tsc for vcpu in (0, 1)], clock.events.last
    honoured = backend.set_tsc_offset

    def only_the_first(vcpu: int, offset: int) -> None:
        if vcpu == 1 and offset >= HZ:
            raise TscOffsetNotHonoured(offset)
        honoured(vcpu, offset)

    backend.set_tsc_offset = only_the_first  # type: ignore[method-assign]
    begin = clock.now()
    with pytest.raises(TscOffsetNotHonoured):
        clock.travel(HZ)
    assert [guest_tsc(backend, vcpu) - backend.tsc for vcpu in (0, 1)] == before
    assert clock.events.last == last
    assert clock.now() - begin < 10**9
    assert abs(guest_ns(backend, memory) - clock.now()) <= 2


def test_what_is_refused() -> None:
    """Backward, beyond 2^63 ticks or the end of time, in a pause, or by what is no number."""
    clock, _, _ = a_clock(HZ, 10**12)
    before = clock.events.last
    for ticks in (-1, 1 << 63):
        with pytest.raises(RangeError, match="travel"):
            clock.travel(ticks)
    with pytest.raises(WrongType):
        clock.travel(1.5)  # type: ignore[arg-type]
    clock.pause()
    with pytest.raises(StateError, match="stands still"):
        clock.travel(HZ)
    clock.resume()
    clock.skip(2**64 - 1 - 10**12)
    with pytest.raises(RangeError, match="ends at"):
        clock.travel(2000 * HZ)
    assert [event.kind for event in clock.events.read(before).events if event.why.startswith("travel")] == []


def test_without_pages() -> None:
    """Before the guest has a page, too: the first one shows the time after it."""
    backend = SimulatedBackend(HZ, 10**12)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 1, backend=backend)
    clock.travel(7 * HZ)
    assert clock.now() >= 7 * 10**9
    assert guest_tsc(backend) >= backend.tsc + 7 * HZ
