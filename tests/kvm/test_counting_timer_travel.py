"""Time travel of guests whose local APIC's timer counts, once or again and again: no interrupt of it is passed over.

KVM requests its interrupt in KVM_RUN: of a timer that runs out while the vCPU is out no register tells.
"""

from __future__ import annotations

from typing import Final

import pytest

from pvclock import Machine
from pvclock.kvm import Vcpu
from pvclock.machine.time_travel import Look
from pvclock.machine.traveller import _snapshots
from pvclock.timekeeping.lapic import register
from pvclock.timekeeping.travel import TMCCT, Decision, Skip, Stay, StayReason, VcpuSnapshot, decide, expired
from tests.kvm.interrupt_guests import COUNT
from tests.kvm.timer_guests import ticking, waking, waking_once
from tests.waiting import HANG_S, wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.row("E17")]

HZ: Final = 10**9
"""About a TSC's frequency."""


def test_a_timer_that_runs_out_while_the_vcpu_is_out() -> None:
    """Its guest is not idle for ever: the interrupt comes when the vCPU goes in."""
    with Machine(waking(1, 2)) as machine:

        def decided() -> Decision:
            return decide(_snapshots(machine.vcpus), HZ)

        def has_run_out() -> bool:
            with machine.runner.quiesce():
                if not isinstance(decided(), Skip):
                    return False
                wait_until(lambda: expired(_snapshots(machine.vcpus)[0]))
                assert decided() == Stay(StayReason.PENDING, 0)
                return True

        machine.start()
        wait_until(has_run_out)
        assert machine.wait(HANG_S) == 0


def test_a_tick_that_comes_while_the_vcpu_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not lost: a look that takes so long that a periodic timer runs out within it skips nothing."""
    looks: list[Look] = []
    slow: list[int] = []
    counts: list[int] = []

    def has_ticked(vcpus: list[Vcpu]) -> bool:
        counts.append(register(_snapshots(vcpus)[0].lapic, TMCCT))
        return counts[-1] > counts[-2]

    def snapshots_later(vcpus: list[Vcpu]) -> list[VcpuSnapshot]:
        found = _snapshots(vcpus)
        if not slow and isinstance(decide(found, HZ), Skip):
            slow.append(len(looks))
            counts.append(register(found[0].lapic, TMCCT))
            wait_until(lambda: has_ticked(vcpus))
            found = _snapshots(vcpus)
        return found

    monkeypatch.setattr("pvclock.machine.traveller._snapshots", snapshots_later)
    with Machine(ticking(2), tick_interval_s=None) as machine:
        machine.time_travel.on_look = looks.append
        machine.time_travel.enable()
        machine.start()
        wait_until(lambda: slow != [] and len(looks) > slow[0])
        assert looks[slow[0]].decision == Stay(StayReason.PENDING, 0)
        wait_until(lambda: machine.time_travel.log.skips > 10)
        assert machine.time_travel.failure is None


def test_a_timer_that_is_not_armed_again() -> None:
    """Its guest is idle for ever once it has had the interrupt, and not before."""
    with Machine(waking_once(500), time_travel=True) as machine:
        machine.start()
        wait_until(lambda: machine.time_travel.log.is_idle_forever)
        assert machine.memory.read(COUNT, 1) == b"\1"
        assert machine.clock_service.now_ns() >= 499 * 10**9
