"""A stock Linux's clocks as it reads them itself, against the engine's timeline: at boot, and through pauses.

Only where KVM runs a stock Linux; elsewhere `make test-lab` does it.  All tests have one guest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import pytest

from pvclock import Reference
from pvclock.clock.guest_clock import GuestClock
from pvclock.lab.kernel import Kernel
from pvclock.quantities import NS_PER_S
from pvclock.timekeeping.events import Event, EventKind
from tests.guest_programs import Triple
from tests.kvm.guest_clocks import ROUNDING_NS, ClockSampler, Offsets, SampledClock, Span, common
from tests.kvm.stock_linux import COMPLAINTS, StockLinux
from tests.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.row("E1", "E2", "E22")]

PAUSE_NS: Final = 5 * NS_PER_S
TIMER_MS: Final = 4000
"""Timers are due within the pause, by the host's clock."""
INTERVAL_MS: Final = 500
AHEAD_NS: Final = 1_000_000
BEHIND_NS: Final = 10**10
"""What the guest's time of day may be off.

Its kernel takes it, and some us later its sched_clock, for one instant: behind by so long as its vCPU has no CPU there.
"""
LEFT_NS: Final = 100_000_000
"""So little of a slew is left when the guest is looked at; the rest takes some seconds more."""
EXACT_NS: Final = 100
"""Each new anchor takes 0 or 1 ns."""
POLICIES: Final = ("freeze", "advance", "slew:max_ppm=1000000")
PAUSED_CLOCKS: Final = ("monotonic", "boottime", "realtime")
on_each_policy = pytest.mark.parametrize("paused_run", POLICIES, indirect=True)


@pytest.fixture(scope="module")
def guest(kernel: Kernel) -> Iterator[StockLinux]:
    """One that has booted to its shell."""
    with StockLinux(kernel) as running:
        yield running


def clock_of(guest: StockLinux) -> GuestClock:
    """The engine's."""
    assert guest.machine.clock is not None
    return guest.machine.clock


def test_what_the_time_of_day_lacks_is_what_the_ticks_lost(guest: StockLinux) -> None:
    """It is right when the wall-clock page is read; until it is on kvm-clock, the kernel counts only ticks it gets."""
    clock = clock_of(guest)
    said = guest.run("dmesg | grep 'using sched offset of'")
    sched_clock_began_ns = int(re.findall(r"offset of (\d+) cycles", said)[0])
    clocks = ClockSampler(guest, INTERVAL_MS, timer_ms=0).finish()
    utc, offsets = clock.backend.sample(Reference.REALTIME), Offsets(clock)
    monotonic, realtime = (offsets.ahead_ns(clocks[name].points[0]).low for name in ("monotonic", "realtime"))
    boot_offset_ns = realtime + clock.at(utc.tsc) - utc.ns
    lost_ns = -monotonic - sched_clock_began_ns
    assert lost_ns > 0
    assert -BEHIND_NS < boot_offset_ns + lost_ns < AHEAD_NS


class PausedRun(NamedTuple):
    """A pause of the guest while it read its clocks.

    clocks: what it saw.  ahead: how far each clock was ahead of the engine's timeline, by each reading.  paused,
    resumed: the events.  made_up_ns: of the time missed, what guest time has had since; left_ns: what is to come.
    """

    policy: str
    clocks: dict[str, SampledClock]
    ahead: dict[str, list[Span]]
    paused: Event
    resumed: Event
    made_up_ns: float
    left_ns: float

    @property
    def missed_ns(self) -> float:
        """How long the pause was."""
        return host_ns(self.paused, self.resumed.host_tsc)


@pytest.fixture(scope="module")
def paused_run(guest: StockLinux, request: pytest.FixtureRequest) -> PausedRun:
    """A pause of 5 s of the host's, and most of the time that it takes to make up for it."""
    clock, offsets, last = clock_of(guest), Offsets(clock_of(guest)), clock_of(guest).events.last
    sampler = ClockSampler(guest, INTERVAL_MS, TIMER_MS)
    guest.machine.pause()
    offsets.note_pause()
    end_ns = clock.backend.stamps().raw_ns + PAUSE_NS
    wait_until(lambda: clock.backend.stamps().raw_ns >= end_ns)
    guest.machine.resume(request.param)
    wait_until(lambda: abs(clock.skew_ns) < LEFT_NS)
    clocks = sampler.finish()
    ahead = {name: [offsets.ahead_ns(triple) for triple in triples_of(each)] for name, each in clocks.items()}
    events = {event.kind: event for event in clock.events.read(last).events}
    paused, resumed = events[EventKind.PAUSE], events[EventKind.RESUME]
    made_up_ns, left_ns = made_up(guest, paused, resumed)
    return PausedRun(request.param, clocks, ahead, paused, resumed, made_up_ns, left_ns)


def made_up(guest: StockLinux, paused: Event, resumed: Event) -> tuple[float, float]:
    """Of the time that was missed, what guest time has had, and what is left of a slew: in another, short pause."""
    clock = clock_of(guest)
    guest.machine.pause()
    left_ns = float(clock.skew_ns)
    lacks_ns = host_ns(paused, clock.line.tsc) - float(clock.now() - paused.guest_ns_after)
    guest.machine.resume("freeze")
    return host_ns(paused, resumed.host_tsc) - lacks_ns, left_ns


def host_ns(since: Event, host_tsc: int | None) -> float:
    """How long after an event the host's TSC was that."""
    assert host_tsc is not None
    assert since.host_tsc is not None
    assert since.tsc_hz is not None
    return (host_tsc - since.host_tsc) * NS_PER_S / since.tsc_hz


def triples_of(clock: SampledClock) -> list[Triple]:
    """All readings that are known: those around the largest gap, too."""
    expired = [] if clock.expired is None else [clock.expired]
    return [*clock.points, clock.older, clock.newer, *expired]


@on_each_policy
def test_a_gap_is_as_declared(paused_run: PausedRun) -> None:
    """Each clock keeps one distance to the timeline, by readings before, around and after it; none goes back."""
    for name in (*PAUSED_CLOCKS, "raw"):
        known = common(paused_run.ahead[name])
        assert known.low <= known.high + ROUNDING_NS, name
        assert paused_run.clocks[name].backs == 0, name
    assert paused_run.missed_ns >= PAUSE_NS
    step_ns = float(paused_run.resumed.jump_ns)
    assert step_ns == pytest.approx(paused_run.missed_ns if paused_run.policy == "advance" else 0, abs=1)
    owed_ns = 0 if paused_run.policy == "freeze" else paused_run.missed_ns
    assert paused_run.made_up_ns + paused_run.left_ns == pytest.approx(owed_ns, abs=EXACT_NS)
    for name in PAUSED_CLOCKS:
        largest_ns = paused_run.clocks[name].newer.ns - paused_run.clocks[name].older.ns
        assert (largest_ns >= PAUSE_NS) == (paused_run.policy == "advance"), name


@on_each_policy
def test_timers_end_as_declared(paused_run: PausedRun) -> None:
    """One that is set before a pause ends by guest time: at once if that has stepped over its end, or not before it."""
    for name in PAUSED_CLOCKS:
        clock, ahead = paused_run.clocks[name], common(paused_run.ahead[name])
        assert clock.due_ns is not None
        assert clock.expired is not None
        assert clock.expired.ns >= clock.due_ns
        due_ns, expired_ns = clock.due_ns - ahead.high, clock.expired.ns - ahead.high
        left_ns = due_ns - paused_run.paused.guest_ns_after
        assert left_ns > 0
        late_ns = expired_ns - max(due_ns, paused_run.resumed.guest_ns_after)
        assert late_ns < left_ns / 2, name  # it would be late by all of it, had its deadline not been moved along


@on_each_policy
def test_pauses_leave_no_complaint(paused_run: PausedRun, guest: StockLinux) -> None:
    """No watchdog, no lockup, no clock that is marked unstable."""
    assert paused_run.resumed.policy == paused_run.policy
    assert guest.run(COMPLAINTS) == ""
