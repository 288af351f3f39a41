"""Budgets of a test for the clock of a real machine: the engine's, looked at with each publish, and the kernel's."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pvclock import GuestAddressError
from pvclock.machine import Machine
from pvclock.meter.findings import read_pages
from pvclock.testing.clock_budget import ClockBudget
from pvclock.testing.machines import made
from tests.waiting import HANG_S, alarm_after

pytestmark = [pytest.mark.kvm, pytest.mark.row("E3")]

HOUR_NS = 3600 * 10**9
"""A step that is one forward, however long this thread has no CPU before it makes it."""


def told_by(budget: ClockBudget, change: Callable[[], object]) -> str:
    """What it fails with; empty if it is kept."""
    try:
        with budget:
            change()
    except AssertionError as failure:
        return str(failure)
    return ""


def pause(machine: Machine, policy: str) -> None:
    """A pause that is longer than any step that is allowed here."""
    machine.pause()
    time.sleep(0.05)
    machine.resume(policy)


def test_what_the_engine_s_clock_does() -> None:
    """Refreshes, a slew and a dilation are no steps; a skip is one."""
    with made(None, vcpus=2, tick_interval_s=None) as machine:
        clock = machine.clock
        assert clock is not None

        def live() -> None:
            for _ in range(20):
                clock.refresh()
            clock.dilate(1, 2)
            clock.dilate(1)
            clock.slew(10_000, 500)

        assert told_by(ClockBudget(machine, step="100us"), live) == ""
        assert "stepped by +1.00" in told_by(ClockBudget(machine, step="100us"), lambda: clock.skip(1_000_000))


def test_a_pause_of_the_engine_s_clock() -> None:
    """Frozen it is none that its guest saw; advanced it is none against its TSC."""
    with made(None) as machine:
        frozen = ClockBudget(machine, step="100us", allow_pauses=True)
        assert told_by(frozen, lambda: pause(machine, "freeze")) == ""
        by_tsc = ClockBudget(machine, step="100us")
        assert "stepped by -" in told_by(by_tsc, lambda: pause(machine, "freeze"))
        assert told_by(ClockBudget(machine, step="100us"), lambda: pause(machine, "advance")) == ""


def test_the_kernel_s_clock() -> None:
    """It is looked at by a thread; KVM_SET_CLOCK is a step."""
    with made(None, clock="kernel") as machine:

        def set_clock() -> None:
            before = read_pages(machine.memory, 1)
            machine.vm.set_clock(machine.vm.get_clock()["clock"] + HOUR_NS)
            with alarm_after(HANG_S):
                while read_pages(machine.memory, 1)[0].version in {before[0].version, before[0].version + 1}:
                    time.sleep(0.001)  # KVM writes the page when the vCPU enters the guest

        def leave_alone() -> None:
            looked = machine.vm.get_clock()["clock"]
            while machine.vm.get_clock()["clock"] < looked + 30_000_000:
                time.sleep(0.001)

        def budget() -> ClockBudget:
            return ClockBudget(machine, step="1ms", tsc_unchanged=True)

        assert told_by(budget(), leave_alone) == ""
        assert "stepped by +" in told_by(budget(), set_clock)


@pytest.mark.parametrize("clock", ["engine", "kernel"])
def test_a_machine_that_is_closed_meanwhile(clock: str) -> None:
    """What the body raised is not hidden by the look that cannot be taken any more; which is told where it did not."""
    for error in (KeyError, None):
        with made(None, clock=clock) as machine:

            def close(machine: Machine = machine, error: type[Exception] | None = error) -> None:
                machine.close()
                if error is not None:
                    raise error

            with pytest.raises(error or GuestAddressError):
                told_by(ClockBudget(machine, step="1ms", tsc_unchanged=True), close)


def test_a_guest_that_boots() -> None:
    """It begins as soon as the guest has registered its page."""
    with made(None) as machine:
        machine.reset()  # it boots anew
        assert told_by(ClockBudget(machine, step="1ms"), lambda: None) == ""
