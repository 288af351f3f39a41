"""Where the time from Machine() to its guest's first exit goes: each step, beside the same ioctls in C.

    python -m bench.start_phases [ROUNDS]

The steps are made here from the parts that a Machine is made of, in its order; the last line is a Machine as a whole.
Medians of rounds in turn, in one process; a young VM's close() waits for what KVM_CREATE_IRQCHIP has left behind.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench.c_twins import BareVm, Step, Twins, compile_twins
from bench.comparison import Figure, readable, table
from bench.test_start import WRITE_PORT_AND_HALT, StartedMachine
from pvclock import GuestClock, GuestMemory
from pvclock.boot import BootSource, enter
from pvclock.clock.guest_side import usual_msr_ranges
from pvclock.guest_layout import IDENTITY_MAP, TSS
from pvclock.kvm import Exit, Kvm, Runner, Vcpu, Vm, exit_on_msrs, kvm_backend, open_kvm
from pvclock.machine.cpuid import set_guest_cpuid
from pvclock.machine.power_on import PowerOnState
from pvclock.machine.ram import Ram

ROUNDS = 60
RAM_BYTES = 16 << 20
TITLES = {
    Step.OPEN: "open /dev/kvm, ask for its capabilities",
    Step.RAM: "RAM: a memfd of 16 MiB, the image in it",
    Step.VM: "KVM_CREATE_VM",
    Step.FILTER: "the MSR filter",
    Step.SLOT: "TSS, identity map, memory slot",
    Step.IRQCHIP: "KVM_CREATE_IRQCHIP",
    Step.VCPU: "KVM_CREATE_VCPU, kvm_run",
    Step.CPUID: "CPUID: asked of KVM, changed, set",
    Step.REGISTERS: "power-on state kept, registers set",
    Step.FIRST_EXIT: "a vCPU's thread, to the first exit",
}
CLOCK, YOUNG_CLOSE, WHOLE = "the backend and the GuestClock", "close() at once", "in all, as a Machine with a ticker"

Times = dict[object, list[int]]


class Steps:
    """Takes the steps that a Machine takes, and the time of each."""

    def __init__(self, times: Times) -> None:
        self._times = times

    @contextmanager
    def timed(self, step: object) -> Iterator[None]:
        """Add what passes meanwhile."""
        begun_ns = time.perf_counter_ns()
        yield
        self._times[step].append(time.perf_counter_ns() - begun_ns)

    def take(self) -> None:
        """All of them, and close what they have made."""
        with self.timed(Step.OPEN):
            kvm = open_kvm()
        with self.timed(Step.RAM):
            ram = Ram(RAM_BYTES)
            memory = GuestMemory(ram.buffer)
            entry = BootSource(WRITE_PORT_AND_HALT).load(memory)
        with kvm, memory, self._vm(kvm, ram) as vm, self._vcpu(vm) as vcpu:
            self._clock_and_cpuid(kvm, vm, vcpu, memory)
            with self.timed(Step.REGISTERS):
                PowerOnState(vm, [vcpu])
                enter(vcpu, entry)
            self._first_exit(vcpu)
        ram.close()

    def _vm(self, kvm: Kvm, ram: Ram) -> Vm:
        with self.timed(Step.VM):
            vm = kvm.create_vm()
        with self.timed(Step.FILTER):
            exit_on_msrs(vm, usual_msr_ranges())
        with self.timed(Step.SLOT):
            vm.set_tss_addr(TSS)
            vm.set_identity_map_addr(IDENTITY_MAP)
            vm.set_user_memory_region(0, 0, ram.buffer)
        with self.timed(Step.IRQCHIP):
            vm.create_irqchip()
        return vm

    def _vcpu(self, vm: Vm) -> Vcpu:
        with self.timed(Step.VCPU):
            return vm.create_vcpu(0)

    def _clock_and_cpuid(self, kvm: Kvm, vm: Vm, vcpu: Vcpu, memory: GuestMemory) -> None:
        with self.timed(CLOCK):
            backend = kvm_backend(kvm, [vcpu], Runner([vcpu], lambda _vcpu, _exit: False))
            clock = GuestClock(memory, backend=backend, vcpu_host="kvm", tsc_offset=backend.initial_tsc_offset)
        with self.timed(Step.CPUID):
            set_guest_cpuid(kvm, [vcpu], clock)
        assert clock.msr_ranges == usual_msr_ranges()

    def _first_exit(self, vcpu: Vcpu) -> None:
        exited = threading.Lock()
        exited.acquire()

        def handler(_vcpu: int, _exit: Exit) -> bool:
            exited.release()
            return False

        runner = Runner([vcpu], handler)
        with self.timed(Step.FIRST_EXIT):
            runner.start()
            exited.acquire()
        runner.close()


def take_turns(twins: Twins, rounds: int) -> tuple[Times, Times]:
    """What each step took, ours and in C."""
    ours: Times = defaultdict(list)
    bare: Times = defaultdict(list)
    steps = Steps(ours)
    for _ in range(rounds):
        begun_ns = time.perf_counter_ns()
        vm = BareVm(twins.library, WRITE_PORT_AND_HALT)
        bare[WHOLE].append(time.perf_counter_ns() - begun_ns)
        for step, ns in vm.ns.items():
            bare[step].append(ns)
        begun_ns = time.perf_counter_ns()
        vm.close()
        bare[YOUNG_CLOSE].append(time.perf_counter_ns() - begun_ns)
        steps.take()
        with steps.timed(WHOLE):
            machine = StartedMachine().machine
        with steps.timed(YOUNG_CLOSE):
            machine.close()
    return ours, bare


def main(rounds: int = ROUNDS) -> int:
    """Take turns, and print both medians of each step and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = take_turns(compile_twins(Path(folder)), rounds)
    figures = [Figure(TITLES[step], median(ours[step]), "C", median(bare[step])) for step in Step]
    for line in table(figures):
        print(line)
    print(f"{CLOCK}: {readable(median(ours[CLOCK]))}")
    for line in table([Figure(title, median(ours[title]), "C", median(bare[title])) for title in (WHOLE, YOUNG_CLOSE)]):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
