"""Host trouble reaches the clock: an event for each, and STABLE goes and comes back with the host's TSC."""

from __future__ import annotations

import pytest

from pvclock import GuestClock
from pvclock.clock.guest_clock import TSC_STABLE_BIT
from pvclock.timekeeping.events import EventKind
from tests.unit.clocks import a_clock, page_of
from tests.unit.test_host_watch import INTERVAL_NS, a_watch

AT_START = 2  # events before anything was done: the interface, and the page


def kinds(clock: GuestClock) -> list[str]:
    """What happened, in order."""
    return [str(event.kind) for event in clock.events.read(since=AT_START).events if event.kind is not EventKind.PAGE]


@pytest.mark.row("E15", "K-16", "E9")
def test_stable_goes_with_the_hosts_clocksource() -> None:
    """When the host leaves clocksource tsc every page loses STABLE; when it comes back, so does the bit."""
    clock, _, _ = a_clock(2_596_132_000, vcpus=2)
    watch, host = a_watch()
    for clocksource, flags in (("hpet", 0), ("tsc", TSC_STABLE_BIT)):
        host.run(INTERVAL_NS)
        host.change_clocksource(clocksource)
        assert len(clock.check_host(watch)) == 1
        assert [page_of(clock, vcpu).flags for vcpu in range(2)] == [flags, flags]
    assert kinds(clock) == ["clocksource", "clocksource"]


@pytest.mark.row("E15", "K-16", "E9")
@pytest.mark.parametrize("ticks", [-(10**6), 10**9])
def test_stable_goes_at_once_with_a_tsc_that_steps(ticks: int) -> None:
    """A look that finds a TSC step takes STABLE from every page by itself, and no later look gives it back."""
    clock, _, _ = a_clock(2_596_132_000, vcpus=2)
    watch, host = a_watch()
    host.run(INTERVAL_NS)
    host.step_tsc(ticks - INTERVAL_NS * 2_596_132_000 // 10**9 if ticks < 0 else ticks)
    (trouble,) = clock.check_host(watch)
    assert trouble.unstable
    assert [page_of(clock, vcpu).flags for vcpu in range(2)] == [0, 0]
    clock.apply_host_findings([], tsc_trusted=True)
    assert [page_of(clock, vcpu).flags for vcpu in range(2)] == [0, 0]


@pytest.mark.row("E15", "E9")
def test_a_stall_is_an_event_and_no_more() -> None:
    """A VMM that did not run for a while says so; its guests' clocks and their pages stay as they are."""
    clock, _, memory = a_clock(2_596_132_000)
    before = memory.read(0, 1 << 16)
    watch, host = a_watch()
    host.run(100 * INTERVAL_NS)
    (trouble,) = clock.check_host(watch)
    assert not trouble.unstable
    (event,) = clock.events.read(since=AT_START).events
    assert event.kind is EventKind.STALL
    assert event.jump_ns == 0
    assert memory.read(0, 1 << 16) == before


@pytest.mark.row("E15", "E12")
def test_every_operation_leaves_its_event() -> None:
    """What was done, in order, each with what it did to guest time, and a subscriber hears it without the lock."""
    clock, backend, _ = a_clock(10**9)
    heard: list[int] = []
    clock.events.subscribe(lambda event: heard.append(int(clock.now()) * 0 + event.sequence))
    backend.advance(ns=1000)
    clock.skip(5)
    clock.dilate(1, 2)
    clock.slew(10**6, 500)
    clock.pause()
    backend.advance(ns=1000)
    clock.resume("advance:max_ns=100")
    assert kinds(clock) == ["skip", "dilate", "slew", "pause", "resume"]
    jumps = [event.jump_ns for event in clock.events.read(since=AT_START).events]
    assert jumps == [5, 0, 0, 0, 100]
    assert clock.events.flush()
    assert heard == [AT_START + number for number in (1, 2, 3, 4, 5)]
