"""Guests that are shown Hyper-V's interface and KVM's: each of them reads the one that it knows, on real vCPUs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pvclock import Machine
from pvclock.meter.findings import failures
from pvclock.meter.machine_guest import finish as finish_clockprobe
from pvclock.meter.machine_guest import wait_until_reading
from pvclock.payloads import clockprobe, hvprobe
from tests.kvm.hyperv_guest import OPERATIONS, assert_no_violations, finish, operate, wait_for

pytestmark = pytest.mark.kvm

KVM_MSRS = {0x4B564D01}


def machine_with_both(image: bytes, vcpus: int) -> Machine:
    """A machine whose guest is shown both, not started yet; nothing ticks its clock."""
    return Machine(image, vcpus=vcpus, cmdline=f"cpus={vcpus}", tick_interval_s=None, provider="HyperV+KVM")


@pytest.mark.row("K-34", "K-38", "X-01", "E4")
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_guest_of_kvms_finds_kvms_leaves(vcpus: int) -> None:
    """clockprobe looks for KVM's signature where Linux does, finds it at 0x40000100, and its clock never fails."""
    with machine_with_both(clockprobe(), vcpus) as machine:
        machine.start()
        wait_until_reading(machine)
        assert machine.clock is not None
        for _ in range(20):
            machine.clock.dilate(3, 2)
            machine.clock.dilate(1, 1)
        records = finish_clockprobe(machine)
    assert {record.signature_leaf for record in records} == {0x40000100}
    assert {record.msr for record in records} == KVM_MSRS
    assert not any(failures(records).values())


@pytest.mark.row("X-01", "E4")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_guest_of_hyper_vs_reads_hyper_vs_page(operation: Callable[[Machine], None]) -> None:
    """hvprobe reads page, counter, page on two vCPUs while its clock changes, and is restored, with KVM's beside it."""
    with machine_with_both(hvprobe(), 2) as machine:
        machine.start()
        wait_for(machine, "rounds", 10)
        operate(machine, operation, 200)
        records = finish(machine)
    assert_no_violations(records)
    assert {record.max_leaf for record in records} == {0x4000000A}
