"""A reference that steps beyond the panic threshold is refused, told once, and followed again when it is near."""

from __future__ import annotations

from typing import Final

import pytest

from pvclock import GuestClock, GuestMemory, SimulatedBackend
from pvclock.timekeeping.discipline import SteeringState
from pvclock.timekeeping.events import EventKind
from tests.unit.clocks import NS_PER_S, PAGES, SYSTEM_TIME, guest_ns

HZ: Final = 2_500_000_000
PANIC_NS: Final = 1000 * NS_PER_S  # ntpd's
TICKS: Final = 10


def following(panic_ns: int | None = PANIC_NS) -> tuple[GuestClock, SimulatedBackend]:
    """A clock that has followed its host's UTC for a while."""
    backend = SimulatedBackend(HZ, tsc=10**13, realtime_ns=1_800_000_000 * NS_PER_S)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend)
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    clock.follow("realtime", panic_ns=panic_ns)
    tick(clock, backend)
    return clock, backend


def tick(clock: GuestClock, backend: SimulatedBackend, times: int = TICKS) -> list[SteeringState]:
    """Tick once a second; returns the states."""
    states = []
    for _ in range(times):
        backend.advance(ns=NS_PER_S)
        steering = clock.tick()
        assert steering is not None
        states.append(steering.state)
    return states


def told(clock: GuestClock) -> list[str]:
    """What was told of it."""
    events = clock.events.read().events
    return [event.why for event in events if event.kind is EventKind.REFUSED]


@pytest.mark.row("E11", "E1")
@pytest.mark.parametrize("step_ns", [PANIC_NS + NS_PER_S, -PANIC_NS - NS_PER_S, 8 * 3600 * NS_PER_S])
def test_a_step_beyond_the_threshold_is_refused_and_told_once(step_ns: int) -> None:
    """Guest time goes on at the rate that is known, for as long as it lasts; one event names the threshold."""
    clock, backend = following()
    backend.realtime_ns += step_ns
    before, before_ns = clock.now(), guest_ns(backend, clock.memory)
    states = tick(clock, backend, 50)
    assert states[-1] is SteeringState.PANIC
    assert clock.now() - before == 50 * NS_PER_S
    assert abs(guest_ns(backend, clock.memory) - before_ns - 50 * NS_PER_S) <= 1
    assert clock.rate == 1
    (why,) = told(clock)
    assert f"{PANIC_NS} ns" in why
    assert clock.steering is not None
    assert abs(clock.steering.error_ns - step_ns) < 1000


@pytest.mark.row("E11", "E1")
@pytest.mark.parametrize("step_ns", [PANIC_NS - NS_PER_S, NS_PER_S - PANIC_NS])
def test_a_step_within_the_threshold_is_slewed_after(step_ns: int) -> None:
    """As without one."""
    clock, backend = following()
    backend.realtime_ns += step_ns
    before_ns = guest_ns(backend, clock.memory)
    assert tick(clock, backend, 50)[-1] is SteeringState.SLEWING
    gained_ns = guest_ns(backend, clock.memory) - before_ns - 50 * NS_PER_S
    assert 45 * 500_000 < (gained_ns if step_ns > 0 else -gained_ns) <= 50 * 500_000 + 1
    assert told(clock) == []


@pytest.mark.row("E11", "E1")
def test_a_reference_that_is_near_again_is_followed_again() -> None:
    """Set back to 1 ms off: that is worked off; stepping away a second time is told a second time."""
    clock, backend = following()
    before_ns = guest_ns(backend, clock.memory)
    backend.realtime_ns += 2 * PANIC_NS
    tick(clock, backend, 50)
    backend.realtime_ns += 10**6 - 2 * PANIC_NS
    states = tick(clock, backend, 50)
    assert states[-1] is SteeringState.LOCKED
    assert abs(guest_ns(backend, clock.memory) - before_ns - 100 * NS_PER_S - 10**6) <= 100
    backend.realtime_ns += 2 * PANIC_NS
    tick(clock, backend)
    assert len(told(clock)) == 2


@pytest.mark.row("E11", "E1")
def test_without_a_threshold_each_step_is_slewed_after() -> None:
    """None is the default: 8 h take 583 days at 500 ppm, and that is what the clock does."""
    clock, backend = following(None)
    backend.realtime_ns += 8 * 3600 * NS_PER_S
    assert tick(clock, backend, 50)[-1] is SteeringState.SLEWING
    assert told(clock) == []


@pytest.mark.row("E11", "E1", "P-25")
def test_a_restored_clock_panics_by_the_saved_threshold() -> None:
    """panic_ns is a part of what is followed."""
    clock, backend = following()
    clock.pause()
    restored = GuestClock.restore(clock.save(), clock.memory, backend=backend)
    restored.resume()
    tick(restored, backend)
    backend.realtime_ns += 2 * PANIC_NS
    assert tick(restored, backend)[-1] is SteeringState.PANIC
