"""A real QEMU seen from outside: its VM, and its RAM, shared or private, as QEMU itself and its guest have it."""

from __future__ import annotations

import pytest

from pvclock.errors import VmEnded, VmNotObservable
from pvclock.host.kvm_debugfs import TscOffsetFiles
from pvclock.host.process import Process
from pvclock.host.vmm_process import open_vmm
from pvclock.meter.watch.process_ram import ProcessRam
from pvclock.meter.watch.ram_blocks import blocks_of
from pvclock.meter.watch.ram_means import open_ram
from pvclock.meter.watch.vm import GuestRam
from pvclock.payloads import probe
from pvclock.quantities import Gpa
from qemu_glue.guest import qemu_guest
from tests.qemu.private_qemu import RAM_BYTES, private_qemu
from tests.waiting import HANG_S, alarm_after

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.row("E3")]

FEATURES = 0x0100_0009
PAGES = [Gpa(probe.time_page_address(vcpu)) for vcpu in range(2)]


def whole(ram: GuestRam) -> bytes:
    """Return all that holds something."""
    return b"".join(ram.read(*each) for each in ram.ranges())


def test_qemu_with_shared_ram() -> None:
    """Pages as the guest's own memory and QEMU have them, by both means, and no block of the RAM's file more."""
    with qemu_guest(FEATURES) as guest, open_vmm(guest.vmm.pid) as vmm:
        guest.start()
        guest.pause()
        blocks = blocks_of(vmm.process)
        rams = [open_ram(vmm.process, blocks), ProcessRam(vmm.process, blocks)]
        assert [ram.means for ram in rams] == ["shared memory", "process_vm_readv"]
        assert (vmm.vcpu_ids, [block.length for block in blocks]) == ((0, 1), [16 << 20])
        ram_fd = next(fd for fd, name in vmm.process.descriptors().items() if "pvclock-ram" in name)
        allocated = vmm.process.stat(f"fd/{ram_fd}").st_blocks
        for ram in rams:
            pages = ram.read_many(PAGES, 32)
            assert pages == [guest.vmm.memory.read(page, 32) for page in PAGES]
            assert pages == [guest.vmm.read_by_monitor(page, 32) for page in PAGES]
            found = whole(ram)
            assert all(page in found for page in pages)
            assert len(found) == allocated * 512
        assert vmm.process.stat(f"fd/{ram_fd}").st_blocks == allocated


def test_qemu_with_its_default_ram() -> None:
    """Private anonymous memory: as QEMU itself reads it; and what the guest has not touched stays untouched."""
    with private_qemu() as qemu, open_vmm(qemu.pid) as vmm:
        (block,) = blocks_of(vmm.process)
        assert block.length == RAM_BYTES
        ram = open_ram(vmm.process, [block])
        assert ram.means == "process_vm_readv"
        await_reading(ram, vmm.process)
        qemu.execute("stop")
        assert ram.read_many(PAGES, 32) == [qemu.read(page, 32) for page in PAGES]
        ranges = ram.ranges()
        assert sum(each.length for each in ranges) < RAM_BYTES
        assert len(whole(ram)) == sum(each.length for each in ranges)
        assert ram.ranges() == ranges
        records = [probe.read_record(ram, vcpu) for vcpu in range(2)]  # type: ignore[arg-type]  # units
        assert [(record.backward_own, record.torn) for record in records] == [(0, 0)] * 2


def await_reading(ram: GuestRam, process: Process) -> None:
    """Return once its clockprobe reads."""
    with alarm_after(HANG_S):
        phase = probe.Phase.BOOTING
        while phase < probe.Phase.READING:
            process.check_running()
            block = probe.read_block(ram)  # type: ignore[arg-type]  # units
            phase = probe.Phase(block.phase if block else 0)


@pytest.mark.usefixtures("debugfs")
def test_vcpus_whose_numbers_have_a_gap() -> None:
    """Two sockets of three cores: APIC ids 3 and 7 are none's, and each vCPU has its TSC offset all the same."""
    with private_qemu("-S", smp="6,sockets=2,cores=3,threads=1") as qemu, open_vmm(qemu.pid) as vmm:
        assert vmm.vcpu_ids == (0, 1, 2, 4, 5, 6)
        offsets = TscOffsetFiles(vmm)
        assert offsets.why is None
        assert None not in offsets.read()


def test_a_qemu_without_kvm() -> None:
    """Is told from one with KVM: its guest has no kvmclock."""
    with (
        private_qemu("-S", accel="tcg") as qemu,
        pytest.raises(VmNotObservable, match=r"qemu.* runs no KVM guest here; a QEMU without KVM \(-accel tcg\)"),
    ):
        open_vmm(qemu.pid)


def test_a_qemu_that_is_killed() -> None:
    """Whatever is asked of it says so then, and there are no offsets."""
    with private_qemu() as qemu, open_vmm(qemu.pid) as vmm:
        offsets = TscOffsetFiles(vmm)
        ram = open_ram(vmm.process, blocks_of(vmm.process))
        qemu.process.kill()
        qemu.process.wait()
        with pytest.raises(VmEnded, match=f"process {qemu.pid}: the process has ended"):
            ram.read_many(PAGES, 32)
        with pytest.raises(VmEnded):
            blocks_of(vmm.process)
        assert offsets.read() == (None, None)
