"""hvprobe in a QEMU whose KVM serves Hyper-V's reference time and timers: the same guest finds nothing wrong there."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pvclock.kvm import open_kvm
from pvclock.payloads import hvprobe, probe
from pvclock.payloads.hyperv_probe import (
    EXPIRIES_MAX,
    REFERENCE_PAGE,
    TimerMode,
    read_block,
    read_expiries,
    read_record,
    violations,
)
from qemu_glue.peer.launch import CPU_MODEL, Qemu
from tests import oracle
from tests.waiting import HANG_S

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.row("E13")]

ENLIGHTENMENTS = "hv-time,hv-vpindex,hv-synic,hv-stimer,hv-stimer-direct,hv-frequencies"
TRIPLES = 1000
EXPIRIES = 10
PERIOD = 200_000
"""20 ms: that many interrupts as there is room for take longer than QEMU takes until it can be asked."""


@pytest.fixture(autouse=True)
def kvm_has_hyperv() -> None:
    """Skip where the kernel serves no Hyper-V guests."""
    with open_kvm() as kvm:
        if not kvm.check_extension("KVM_CAP_HYPERV_TIME"):
            pytest.skip("this host's KVM has no Hyper-V clock; `make test-lab` runs it on one that does")


def launch(cmdline: str, vcpus: int) -> Qemu:
    """A QEMU with hvprobe and all that it looks for."""
    cpu = ("-cpu", f"{CPU_MODEL},{ENLIGHTENMENTS}")
    return Qemu(hvprobe(), features=0, vcpus=vcpus, cmdline=f"cpus={vcpus} {cmdline}", arguments=cpu)


def finish(qemu: Qemu, has_enough: Callable[[], bool]) -> None:
    """Let the guest go on until it has done enough, and then end."""
    deadline = time.monotonic() + HANG_S
    while not has_enough():
        assert time.monotonic() < deadline
        qemu.check_running()
        time.sleep(0.01)
    probe.stop(qemu.memory)
    assert qemu.wait(HANG_S) == probe.EXIT_FINE


def test_kvms_reference_time() -> None:
    """KVM's page and counter agree on two vCPUs, and the guest reads the page as its layout says."""
    with launch("call=1", 2) as qemu:
        finish(qemu, lambda: all(read_record(qemu.memory, vcpu).triples >= TRIPLES for vcpu in range(2)))
        block = read_block(qemu.memory)
        records = [read_record(qemu.memory, vcpu) for vcpu in range(2)]
        page = oracle.ReferenceTscPage.parse(qemu.memory.read(REFERENCE_PAGE, 24))
    assert block is not None
    assert block.call_result & 0xFFFF == 0
    for record in records:
        assert not any(violations(record).values())
        assert (record.sequence, record.scale, record.offset) == (page.sequence, page.scale, page.offset)
        assert record.page_units == page.read(record.page_tsc)


@pytest.mark.parametrize("mode", [TimerMode(0), TimerMode.ONE_SHOT, TimerMode.ONE_SHOT | TimerMode.DIRECT])
def test_kvms_synthetic_timers(mode: TimerMode) -> None:
    """KVM's timers interrupt, and none before it is due."""
    with launch(f"expiries={EXPIRIES_MAX} period={PERIOD} timer={int(mode)}", 1) as qemu:
        finish(qemu, lambda: read_record(qemu.memory, 0).expiries >= EXPIRIES)
        expiries = read_expiries(qemu.memory, 0)
    assert len(expiries) >= EXPIRIES
    assert all(expiry.seen >= expiry.expiration > 0 for expiry in expiries)
