"""pvclock's own machine in another process, seen from outside: its VM, its RAM and its TSC offsets."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pvclock.errors import VmNotObservable
from pvclock.host.kvm_debugfs import TscOffsetFiles
from pvclock.host.vmm_process import VmmProcess, open_vmm
from pvclock.kvm import open_kvm
from pvclock.meter.watch.process_ram import ProcessRam
from pvclock.meter.watch.ram_blocks import blocks_of
from pvclock.meter.watch.ram_means import open_ram
from pvclock.meter.watch.vm import GuestRam
from pvclock.payloads import probe
from pvclock.quantities import Gpa
from tests.kvm.watched_machine import WatchedMachine, watched_machine

pytestmark = [pytest.mark.kvm, pytest.mark.row("E3")]

PAGES = [Gpa(probe.time_page_address(vcpu)) for vcpu in range(2)]
RAM_BYTES = 16 << 20


@pytest.fixture(scope="module")
def machine() -> Iterator[WatchedMachine]:
    """Return a process with a machine, whose guest reads its clock."""
    with watched_machine() as running:
        yield running


@pytest.fixture
def vmm(machine: WatchedMachine) -> Iterator[VmmProcess]:
    """Return it as it is seen from outside."""
    with open_vmm(machine.pid) as found:
        yield found


@pytest.fixture(params=["shared memory", "process_vm_readv"])
def ram(vmm: VmmProcess, request: pytest.FixtureRequest) -> GuestRam:
    """Return its RAM, by each means; the first is the one that is chosen."""
    blocks = blocks_of(vmm.process)
    found = open_ram(vmm.process, blocks) if request.param == "shared memory" else ProcessRam(vmm.process, blocks)
    assert found.means == request.param
    return found


def test_the_vm_is_found(vmm: VmmProcess) -> None:
    """Two vCPUs, and RAM that is one shared mapping."""
    assert vmm.vcpu_ids == (0, 1)
    assert vmm.process.descriptors()[vmm.vm_fd] == "anon_inode:kvm-vm"
    (block,) = blocks_of(vmm.process)
    assert (block.gpa, block.length) == (0, RAM_BYTES)


def test_pages_are_as_they_are_there(machine: WatchedMachine, ram: GuestRam) -> None:
    """What is read here is what the process has in its own memory; and the guest goes on."""
    before = machine.ask("reads")
    for _ in range(2):  # a resume writes them anew, and a guest that runs clears their flags
        machine.ask("pause")
        assert [page.hex() for page in ram.read_many(PAGES, 32)] == machine.ask("pages")
        machine.ask("resume")
    while min(now - then for now, then in zip(machine.ask("reads"), before, strict=True)) == 0:
        pass


def test_a_whole_search_finds_the_pages_and_allocates_nothing(
    machine: WatchedMachine, vmm: VmmProcess, ram: GuestRam
) -> None:
    """Each page lies in a range, at its address, and the RAM's file has as many blocks as before."""
    fd = next(fd for fd, name in vmm.process.descriptors().items() if "pvclock-ram" in name)
    machine.ask("pause")
    before = vmm.process.stat(f"fd/{fd}").st_blocks
    found = b"".join(ram.read(*each) for each in ram.ranges())
    assert vmm.process.stat(f"fd/{fd}").st_blocks == before == len(found) // 512
    assert all(bytes.fromhex(page) in found for page in machine.ask("pages"))
    assert sum(each.gpa <= page < each.gpa + each.length for each in ram.ranges() for page in PAGES) == len(PAGES)
    machine.ask("resume")


@pytest.mark.usefixtures("debugfs")
def test_tsc_offsets_are_those_that_kvm_has(machine: WatchedMachine, vmm: VmmProcess) -> None:
    """Each vCPU's by debugfs is the one that the process gets from KVM."""
    files = TscOffsetFiles(vmm)
    assert files.why is None
    assert [None if offset is None else offset % 2**64 for offset in files.read()] == machine.ask("offsets")


def test_vms_that_cannot_be_told_apart() -> None:
    """Of a process with two VMs nothing tells which vCPUs are whose; one without vCPUs does not run."""
    with open_kvm() as kvm, kvm.create_vm():
        with pytest.raises(VmNotObservable, match=r"the VM of .* has no vCPUs yet; try again"):
            open_vmm(os.getpid())
        with (
            kvm.create_vm(),
            pytest.raises(VmNotObservable, match=r"has 2 VMs \(descriptors \d+, \d+\); only a process"),
        ):
            open_vmm(os.getpid())
