"""TSC offsets of a QEMU's vCPUs, set by hand: the probe names the vCPU of three, and the pair of two.

QEMU has no option for it, so its own process makes the ioctl: KVM_VCPU_TSC_OFFSET, before the guest's first
instruction.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

import pytest

from pvclock.kvm import open_kvm
from pvclock.kvm.tsc_offset import TscOffsets, probe_tsc_offsets
from pvclock.probe import bootable_image
from qemu_glue.peer.launch import Qemu
from tests.probe_line import ONE_CPU, Line, one_line, vcpus_named, vcpus_off, windows
from tests.qemu.injected_call import injected
from tests.qemu.running_qemu import FEATURES

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.kvm,
    pytest.mark.row("E18"),
    pytest.mark.usefixtures("_offsets_are_honoured"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason=ONE_CPU),
]

LIMIT_S: Final = 240.0
SYS_IOCTL: Final = 16
KVM_SET_DEVICE_ATTR: Final = 0x4018AEE1
KVM_GET_DEVICE_ATTR: Final = 0x4018AEE2
DEVICE_ATTR: Final = struct.Struct("<IIQQ")
"""struct kvm_device_attr: flags, group, attr, addr.  KVM_VCPU_TSC_CTRL is group 0, KVM_VCPU_TSC_OFFSET its 0."""
OFFSET_MS: Final = 200
"""An exchange of vCPUs that share a CPU takes some time slices of 4 ms, and more where a busy host takes that CPU away;
this is beyond what the best of a second's exchanges leave open."""


@pytest.fixture(scope="module")
def _offsets_are_honoured() -> None:
    """Skip where a guest's TSC is not as it is set."""
    with open_kvm() as kvm:
        if probe_tsc_offsets(kvm) is not TscOffsets.HONOURED:
            pytest.skip("this host's KVM does not honour TSC offsets; `make test-lab` runs it on one that does")


def put_forward(pid: int, vcpu: int, ticks: int) -> None:
    """Add `ticks` to the TSC offset of a vCPU of that QEMU."""
    fd = vcpu_fd(pid, vcpu)
    with injected(pid) as qemu:
        attribute, value = qemu.scratch, qemu.scratch + DEVICE_ATTR.size
        qemu.write(attribute, DEVICE_ATTR.pack(0, 0, 0, value))
        qemu.call(SYS_IOCTL, fd, KVM_GET_DEVICE_ATTR, attribute)
        offset = int.from_bytes(qemu.read(value, 8), "little")
        qemu.write(value, ((offset + ticks) % 2**64).to_bytes(8, "little"))
        qemu.call(SYS_IOCTL, fd, KVM_SET_DEVICE_ATTR, attribute)


def vcpu_fd(pid: int, vcpu: int) -> int:
    """That process's descriptor of the vCPU."""
    (fd,) = [
        int(each.name)
        for each in Path(f"/proc/{pid}/fd").iterdir()
        if str(each.readlink()) == f"anon_inode:kvm-vcpu:{vcpu}"
    ]
    return fd


def measured(vcpus: int, moved: int) -> tuple[Line, int]:
    """What the probe prints where vCPU `moved` was put forward, and by how many ticks."""
    stopped = ("-S",)
    with Qemu(bootable_image(), features=FEATURES, vcpus=vcpus, cmdline="seconds=1", arguments=stopped) as qemu:
        ticks = qemu.tsc_hz() // 1000 * OFFSET_MS
        put_forward(qemu.pid, moved, ticks)
        qemu.resume()
        assert qemu.wait(LIMIT_S) == 0
        return one_line(qemu.console), ticks


@pytest.mark.parametrize("moved", [0, 2])
def test_of_three_the_vcpu_is_named(moved: int) -> None:
    """200 ms on one vCPU: both its pairs exclude 0 and hold that offset, and the third pair does neither."""
    line, ticks = measured(3, moved)
    assert vcpus_off(line) == vcpus_named(line) == {moved}
    for (a, b), window in windows(line).items():
        assert ticks * ((b == moved) - (a == moved)) in window, (a, b)


def test_of_two_the_pair_is_named() -> None:
    """200 ms between two vCPUs: they differ, by so much and that way."""
    line, ticks = measured(2, 1)
    assert vcpus_off(line) == vcpus_named(line) == {0, 1}
    assert ticks in windows(line)[0, 1]
