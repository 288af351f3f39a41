"""What docs/embedding.md says of a VMM on real vCPUs beyond its example, and of an image that a Machine enters."""

from __future__ import annotations

import mmap
import runpy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pvclock import GuestClock, GuestMemory, HostTsc, Machine, MsrFault, guest_cpuid, set_guest_cpuid
from pvclock.kvm import (
    Exit,
    Interrupted,
    IoOut,
    Kvm,
    RdmsrExit,
    Runner,
    TscOffsets,
    Vcpu,
    Vm,
    WrmsrExit,
    exit_on_msrs,
    kvm_backend,
    open_kvm,
)
from pvclock.payloads import clockprobe
from pvclock.quantities import U64_MASK
from pvclock.state import clock_state
from tests.kvm.test_examples import BOUND_NS, STEERED_BOUND_NS, VMM
from tests.test_docs import PYTHON_BLOCK
from tests.waiting import HANG_S

pytestmark = pytest.mark.kvm

EXAMPLE = runpy.run_path(str(VMM))
CODE, PAGES, READINGS = EXAMPLE["CODE"], EXAMPLE["PAGES"], EXAMPLE["READINGS"]
RAM_BYTES = 1 << 20
VCPUS = 2
SYSTEM_TIME = 0x4B564D01
RUNNABLE = 0
PACE_S = 0.005


class Reading(NamedTuple):
    """What a guest made of its clock, and how far that is from the timeline, in ns."""

    ns: int
    apart_ns: float


class Vmm(NamedTuple):
    """A VM of the example's kind, whose clock is still to be made; `readings` are its vCPUs' newest."""

    vm: Vm
    vcpus: list[Vcpu]
    runner: Runner
    memory: GuestMemory
    clocks: list[GuestClock]
    readings: dict[int, Reading]

    def wait_until_read(self) -> None:
        """Return once each vCPU's guest has read its clock anew."""
        self.readings.clear()
        deadline = time.monotonic() + HANG_S
        while len(self.readings) < len(self.vcpus):
            assert time.monotonic() < deadline, self.runner.failure
            time.sleep(PACE_S)


@contextmanager
def a_vmm(kvm: Kvm) -> Iterator[Vmm]:
    """A VM with the example's guest in it."""
    ram = mmap.mmap(-1, RAM_BYTES)
    memory, vm = GuestMemory(ram), kvm.create_vm()
    memory.write(CODE, EXAMPLE["GUEST"])
    vm.set_tss_addr(0xFFFBD000)
    vm.set_user_memory_region(0, 0, ram)
    vm.create_irqchip()
    vcpus = [vm.create_vcpu(number) for number in range(VCPUS)]
    clocks: list[GuestClock] = []
    readings: dict[int, Reading] = {}

    def handle(vcpu: int, reason: Exit) -> bool:
        try:
            match reason:
                case WrmsrExit(msr, value):
                    clocks[-1].write_msr(vcpu, msr, value)
                    vcpus[vcpu].complete_msr()
                case RdmsrExit(msr):
                    vcpus[vcpu].complete_msr(clocks[-1].read_msr(vcpu, msr))
                case IoOut():
                    readings[vcpu] = reading(memory, clocks[-1], vcpu)
                    time.sleep(PACE_S)
                case _:
                    raise RuntimeError(reason)
        except MsrFault:
            vcpus[vcpu].complete_msr(fault=True)
        return True

    runner = Runner(vcpus, handle)
    try:
        yield Vmm(vm, vcpus, runner, memory, clocks, readings)
    finally:
        runner.stop()
        for vcpu in vcpus:
            vcpu.close()
        vm.close()


def reading(memory: GuestMemory, clock: GuestClock, vcpu: int) -> Reading:
    """vCPU's reading at its OUT."""
    tsc, ns = (int.from_bytes(memory.read(READINGS + 16 * vcpu + at, 8), "little") for at in (0, 8))
    return Reading(ns, float(ns - clock.at(HostTsc((tsc - clock.tsc(vcpu).offset) & U64_MASK))))


def begin(vcpu: Vcpu) -> None:
    """Put a vCPU to the beginning of the example's guest."""
    sregs, page = vcpu.get_sregs(), PAGES + 64 * vcpu.vcpu_id
    sregs["cs"].update(base=0, selector=0)
    vcpu.set_sregs(sregs)
    start = {"rip": CODE, "rflags": 2, "rax": page | 1, "rbx": page, "rdi": READINGS + 16 * vcpu.vcpu_id}
    vcpu.set_regs({**vcpu.get_regs(), **start})
    vcpu.set_mp_state(RUNNABLE)


@pytest.mark.row("P-25")
def test_a_clock_moves_to_another_vm(tsc_offsets: TscOffsets) -> None:
    """Restored in the guide's order, its guest reads on, right and never back; KVM knows none of its clock's MSRs."""
    bound_ns = STEERED_BOUND_NS if tsc_offsets is TscOffsets.STEERED else BOUND_NS
    with open_kvm() as kvm, a_vmm(kvm) as here, a_vmm(kvm) as there:
        backend = kvm_backend(kvm, here.vcpus, here.runner)
        clock = GuestClock(here.memory, VCPUS, backend=backend, vcpu_host="kvm", tsc_offset=backend.initial_tsc_offset)
        here.clocks.append(clock)
        exit_on_msrs(here.vm, clock.msr_ranges)
        set_guest_cpuid(kvm, here.vcpus, clock)
        for vcpu in here.vcpus:
            begin(vcpu)
        with here.runner:
            here.wait_until_read()
            here.runner.pause()
            clock.pause()
        before = dict(here.readings)

        there.memory.write(0, here.memory.read(0, RAM_BYTES))
        state = clock_state.from_json(clock_state.to_json(clock.save()))
        backend = kvm_backend(kvm, there.vcpus, there.runner)
        restored = GuestClock.restore(state, there.memory, backend=backend, vcpu_host="kvm")
        there.clocks.append(restored)
        exit_on_msrs(there.vm, restored.msr_ranges)
        set_guest_cpuid(kvm, there.vcpus, restored)
        for old, new in zip(here.vcpus, there.vcpus, strict=True):
            old.request_exit()
            assert old.run() == Interrupted()  # its last exit is completed, and no instruction executed
            new.set_sregs(old.get_sregs())
            new.set_regs(old.get_regs())
            new.set_mp_state(RUNNABLE)
        restored.resume("freeze")
        with there.runner:
            there.wait_until_read()
            there.runner.pause()
        assert all(there.readings[vcpu].ns > before[vcpu].ns for vcpu in range(VCPUS))
        assert all(abs(each.apart_ns) <= bound_ns for each in (*before.values(), *there.readings.values()))
        assert [vcpu.get_msr(SYSTEM_TIME) for vcpu in there.vcpus] == [0] * VCPUS


@pytest.mark.row("E9")
def test_a_paused_clock_keeps_vcpus_out() -> None:
    """Let in by the runner too early, the guest reads nothing before the clock is resumed."""
    with open_kvm() as kvm, a_vmm(kvm) as vmm:
        clock = GuestClock(vmm.memory, VCPUS, backend=kvm_backend(kvm, vmm.vcpus, vmm.runner), vcpu_host="kvm")
        vmm.clocks.append(clock)
        exit_on_msrs(vmm.vm, clock.msr_ranges)
        for vcpu in vmm.vcpus:
            begin(vcpu)
        with vmm.runner:
            vmm.wait_until_read()
            vmm.runner.pause()
            clock.pause()
            stood = vmm.memory.read(READINGS, 16 * VCPUS)
            vmm.runner.resume()
            time.sleep(10 * PACE_S)
            assert vmm.memory.read(READINGS, 16 * VCPUS) == stood
            clock.resume()
            vmm.wait_until_read()


@pytest.mark.row("E13")
def test_a_vmm_may_change_the_cpuid() -> None:
    """The list has each leaf of the clock once and its own APIC id, and KVM takes it, changed."""
    with open_kvm() as kvm, a_vmm(kvm) as vmm:
        clock = GuestClock(vmm.memory, VCPUS, backend=kvm_backend(kvm, vmm.vcpus, vmm.runner), vcpu_host="kvm")
        for vcpu in vmm.vcpus:
            entries = guest_cpuid(kvm, vcpu.vcpu_id, clock)
            leaves = {entry["function"]: entry for entry in entries}
            assert [entry["function"] for entry in entries if entry["function"] >> 28 == 4] == list(clock.cpuid_leaves)
            assert leaves[1]["ebx"] >> 24 == vcpu.vcpu_id
            assert leaves[1]["ecx"] >> 31
            leaves[1]["ecx"] &= ~(1 << 30)  # RDRAND
            vcpu.set_cpuid(entries)
            vcpu.enable_cap("KVM_CAP_ENFORCE_PV_FEATURE_CPUID", 1)


# Images


@pytest.mark.row("style")
def test_how_a_flat_image_is_entered() -> None:
    """Real mode at 0:7C00, interrupts off, no stack."""
    with Machine(b"\xf4") as machine:
        registers, sregs = machine.vcpus[0].get_regs(), machine.vcpus[0].get_sregs()
    assert (registers["rip"], registers["rflags"], registers["rsp"]) == (0x7C00, 2, 0)
    assert (sregs["cr0"] & 1, sregs["cs"]["base"], sregs["cs"]["selector"], sregs["ds"]["base"]) == (0, 0, 0, 0)


@pytest.mark.row("style")
def test_how_a_multiboot_image_is_entered() -> None:
    """32-bit protected mode without paging, flat segments, the loader's two registers, interrupts off."""
    with Machine(clockprobe(), cmdline="cpus=1") as machine:
        registers, sregs = machine.vcpus[0].get_regs(), machine.vcpus[0].get_sregs()
        (at,) = [int.from_bytes(machine.memory.read(0x9000 + 16, 4), "little")]
        assert machine.memory.read(at, 7) == b"cpus=1\0"
    assert (registers["rax"], registers["rbx"], registers["rflags"]) == (0x2BADB002, 0x9000, 2)
    assert (sregs["cr0"] & 0x80000001, sregs["cs"]["selector"], sregs["cs"]["db"]) == (1, 8, 1)
    assert [sregs[name]["selector"] for name in ("ds", "es", "fs", "gs", "ss")] == [16] * 5
    assert {(sregs[name]["base"], sregs[name]["limit"]) for name in ("cs", "ds", "ss")} == {(0, 0xFFFFFFFF)}


@pytest.mark.row("style")
def test_the_guides_device() -> None:
    """Its guest writes 5 and 3 to it, and exits with their sum."""
    guide = (Path(__file__).parents[2] / "docs/embedding.md").read_text(encoding="utf-8")
    (block,) = [each for each in PYTHON_BLOCK.findall(guide) if "class Adder" in each]
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102 - our own document
    assert names["add_on_a_guest"]() == 8
