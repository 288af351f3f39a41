"""hvprobe in QEMU, whose Hyper-V clock and timers are the kernel's: it finds what it finds on the engine's."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import pytest

from pvclock import ClockScale
from pvclock.payloads import hvprobe, probe
from pvclock.payloads.hyperv_probe import (
    REFERENCE_PAGE,
    Expiry,
    HvBlock,
    HvRecord,
    TimerMode,
    read_block,
    read_expiries,
    read_record,
    violations,
)
from pvclock.providers.hyperv.features import Feature, Privilege
from pvclock.providers.hyperv.scales import kvm_scale
from qemu_glue.peer.launch import Qemu
from tests.kvm.hyperv_script import skip_without_kernel_hyperv
from tests.oracle import REFERENCE_TSC_PAGE, ReferenceTscPage
from tests.waiting import HANG_S

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.usefixtures("_kernel_serves_hyperv")]

FLAGS: Final = ("hv-vpindex", "hv-time", "hv-synic", "hv-stimer", "hv-stimer-direct", "hv-frequencies", "hv-reset")
PRIVILEGES: Final = (Privilege.TIME_REF_COUNT | Privilege.REFERENCE_TSC | Privilege.FREQUENCY) | (
    Privilege.SYNIC | Privilege.SYNTHETIC_TIMERS | Privilege.HYPERCALL | Privilege.VP_INDEX | Privilege.RESET
)
EXPIRIES: Final = 10
PERIOD: Final = 50_000
"""5 ms, in units of 100 ns."""


@pytest.fixture(scope="module")
def _kernel_serves_hyperv() -> None:
    """Skip where QEMU has no Hyper-V clock to offer."""
    skip_without_kernel_hyperv()


def run_hvprobe(cmdline: str, vcpus: int = 1) -> tuple[HvBlock, list[HvRecord], list[list[Expiry]], bytes]:
    """What hvprobe found in QEMU: block, a record and the timer's interrupts of each vCPU, and the reference page."""
    cmdline = f"cpus={vcpus} {cmdline}"
    stopped = ("-S",)  # the guest could end before there is a connection to QEMU
    with Qemu(hvprobe(), features=0, cpu_flags=FLAGS, vcpus=vcpus, cmdline=cmdline, arguments=stopped) as qemu:
        qemu.resume()
        assert qemu.wait(HANG_S) == probe.EXIT_FINE
        block, page = read_block(qemu.memory), qemu.memory.read(REFERENCE_PAGE, REFERENCE_TSC_PAGE.size)
        assert block is not None
        records = [read_record(qemu.memory, vcpu) for vcpu in range(vcpus)]
        return block, records, [read_expiries(qemu.memory, vcpu) for vcpu in range(vcpus)], page


@pytest.mark.row("H-11", "H-20", "H-36", "H-37", "H-50", "H-51", "E13")
def test_reference_time_of_qemu() -> None:
    """Two vCPUs agree by page and counter; identity, frequencies and the page's scale are those that are expected."""
    block, records, _, data = run_hvprobe("rounds=100", vcpus=2)
    page = ReferenceTscPage.parse(data)
    assert (block.guest_os_id, block.reference_tsc) == (1 << 63 | 1, REFERENCE_PAGE | 1)
    assert page.is_valid
    for record in records:
        assert not any(violations(record).values()), record
        assert record.triples > 0
        assert record.max_leaf >= 0x40000005
        assert PRIVILEGES & ~record.privileges == 0
        assert Feature.FREQUENCY & record.features
        assert record.vp_index == record.apic_id
        assert record.page_units == page.read(record.page_tsc)
        assert page.scale == kvm_scale(ClockScale.from_hz(record.tsc_hz))
    assert records[0].apic_hz == records[1].apic_hz == 10**9


@pytest.mark.row("H-40", "H-41", "H-42", "E13")
@pytest.mark.parametrize("mode", [TimerMode(0), TimerMode.ONE_SHOT, TimerMode.DIRECT | TimerMode.ONE_SHOT])
def test_timers_of_qemu(mode: TimerMode) -> None:
    """KVM's timers keep the rules that hold for the engine's: none is early, and a periodic one keeps its grid."""
    _, _, (expiries,), _ = run_hvprobe(f"expiries={EXPIRIES} period={PERIOD} timer={int(mode)}")
    assert len(expiries) == EXPIRIES
    for expiry in expiries:
        assert expiry.expiration <= expiry.seen
        if not mode & TimerMode.DIRECT:
            assert expiry.message_type == 0x80000010
            assert expiry.expiration <= expiry.delivery <= expiry.seen
    for before, after in pairwise(expiries):
        if mode & TimerMode.ONE_SHOT:
            assert after.expiration >= before.seen + PERIOD
        else:
            assert (after.expiration - before.expiration) % PERIOD == 0
            assert after.expiration > before.expiration
