"""A clock that follows its host, by the eyes of a guest on real vCPUs."""

from __future__ import annotations

import time

import pytest

from pvclock import Reference
from pvclock.clock.ticker import Ticker
from pvclock.meter.findings import failures, shown_by
from pvclock.meter.machine_guest import MachineGuest, finish, newest_reading, probe_machine, wait_until_reading
from pvclock.meter.observe import observe_following
from pvclock.payloads import probe
from pvclock.timekeeping.discipline import SteeringState
from pvclock.timekeeping.events import EventKind
from tests import oracle
from tests.kvm.reading import wait_until_all_read_on

pytestmark = pytest.mark.kvm

TICKS = 60
TICK_S = 0.05
ROUNDS = 30


@pytest.mark.stress
@pytest.mark.row("E11", "K-08", "K-12")
@pytest.mark.parametrize("reference", list(Reference))
def test_guests_see_no_step(reference: Reference) -> None:
    """Two vCPUs read while their clock is ticked 20 times a second: nothing back, wild or torn, steps of 0 or 1 ns."""
    with probe_machine("engine", 2) as machine:
        clock = machine.clock
        assert clock is not None
        machine.start()
        wait_until_reading(machine)
        clock.follow(reference)
        for _ in range(TICKS):
            before = oracle.TimeInfo.parse(machine.memory.read(probe.time_page_address(0), 32))
            rate, tick_ns = clock.rate, time.monotonic_ns()
            clock.tick()
            tsc, ns = newest_reading(machine)
            # The reading comes some time after the break, so the two pages' rates are in it, too.
            turned_ns = abs(clock.rate - rate) * (time.monotonic_ns() - tick_ns)
            assert abs(ns - before.read(tsc)) <= 2 + turned_ns
            assert not machine.runner.join(TICK_S)
        wait_until_all_read_on(machine)
        records = finish(machine)
    assert not any(failures(records).values())
    kinds = {event.kind for event in clock.events.read().events}
    assert kinds <= {EventKind.START, EventKind.PAGE, EventKind.RATE, EventKind.TSC}
    assert clock.steering is not None
    assert clock.steering.state in (SteeringState.LOCKED, SteeringState.SLEWING)


@pytest.mark.usefixtures("tsc_is_trusted")  # else KVM moves guests' TSCs: a reading's TSC is no instant of the host
@pytest.mark.row("E11", "E3")
def test_a_guest_keeps_step_with_the_host() -> None:
    """Over 4 s the guest's own readings keep step with CLOCK_MONOTONIC_RAW, within the bound of the samples."""
    with MachineGuest("engine", 1) as guest:
        seen = observe_following(guest, 4.0)
    assert abs(seen.steered_ppb) <= seen.bound_ppb


@pytest.mark.row("E11", "E13")
def test_the_ticker_serves_a_running_guest() -> None:
    """The thread ticks a machine's clock while its guest reads: it locks, and no reading is wrong."""
    with probe_machine("engine", 1) as machine:
        clock = machine.clock
        assert clock is not None
        clock.follow("monotonic")
        machine.start()
        wait_until_reading(machine)
        with Ticker(clock, interval_s=0.1) as ticker:
            while ticker.rounds <= ROUNDS:
                assert not machine.runner.join(0.1)
        assert ticker.failures == ()
        assert clock.steering is not None
        assert clock.steering.state in (SteeringState.LOCKED, SteeringState.SLEWING)
        assert not any(failures(finish(machine)).values())


@pytest.mark.row("E3")
def test_a_step_is_seen() -> None:
    """What measures steps sees one: a clock that is put forward by 5 us between two looks is found out."""
    with probe_machine("engine", 1) as machine:
        clock = machine.clock
        assert clock is not None
        machine.start()
        wait_until_reading(machine)
        tsc, ns = newest_reading(machine)
        page = clock.page(0)
        assert page is not None
        assert shown_by(page, tsc) == ns
        clock.skip(5000)
        tsc, ns = newest_reading(machine)
        assert 4990 <= ns - shown_by(page, tsc) <= 5010
        finish(machine)
