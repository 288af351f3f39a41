"""What a machine is made of: a VM of KVM's with RAM, vCPUs and their threads, and a board with devices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from mmap import mmap
from typing import Final, Protocol, TypeVar

from pvclock._memory import GuestMemory
from pvclock._transaction import commit
from pvclock.boot import BootSource, enter
from pvclock.errors import StateError
from pvclock.guest_layout import IDENTITY_MAP, TSS
from pvclock.kvm import Kvm, KvmBackend, Runner, Vcpu, Vm, exit_on_msrs, kvm_backend, open_kvm
from pvclock.kvm.backend import SteeredTscBackend
from pvclock.kvm.exits import Exit
from pvclock.machine.arguments import Platform, check_vcpus
from pvclock.machine.board import Board
from pvclock.machine.clock_service import ClockService
from pvclock.machine.cpuid import CpuidChange, GuestCpuid
from pvclock.machine.exits import GuestExits, Outcome, observed
from pvclock.machine.guest_time import guest_time
from pvclock.machine.power_on import PowerOnState
from pvclock.machine.ram import Ram
from pvclock.machine.run_state import RunStates
from pvclock.machine.time_travel import TimeTravel
from pvclock.machine.travel_options import Travel, as_travel
from pvclock.msr_ranges import MsrRange

__all__ = ["Hardware"]

KERNELS: Final = ("bzimage", "linux64", "pvh")
"""How kernels are entered; others are payloads of somebody's own."""


class Resource(Protocol):
    """What can be closed, and then again without harm."""

    def close(self) -> None:
        """Give it back."""


ResourceT = TypeVar("ResourceT", bound=Resource)


class Hardware:
    """A VM with `memory_bytes` of RAM, `vcpus` and a board, and what close() gives back.

    max_vcpus: how many vCPUs there can be, by add_vcpu().  kvm: the caller's, or None for one of its own.
    msr_ranges: what its clock is to serve most likely.  outcome: is told what the guest ends its run by.
    serial_output, on_exit: Machine's.  on_end: Runner's.
    The errors are Machine's; nothing is left behind if it cannot be made.

    vCPUs' threads have parts of this and never the Machine, so that one that is dropped can end them.
    """

    def __init__(  # noqa: PLR0913  # a machine's facts, all but two by keyword
        self,
        kvm: Kvm | None,
        outcome: Outcome,
        *,
        vcpus: int,
        max_vcpus: int,
        memory_bytes: int,
        platform: Platform,
        msr_ranges: tuple[MsrRange, ...],
        serial_output: Callable[[bytes], object] | None,
        on_exit: Callable[[int, Exit], object] | None,
        on_end: Callable[[BaseException | None], object],
    ) -> None:
        self.max_vcpus = max_vcpus
        self._msr_ranges = msr_ranges
        self._late: Vcpu | None = None  # made by add_vcpu(), and not yet among `vcpus`
        self._backends: list[KvmBackend | SteeredTscBackend] = []  # of the clock; none where the kernel serves it
        self._resources: list[Resource] = []  # to be given back, the last one first
        try:
            self.kvm = kvm or self.owned(open_kvm())
            check_vcpus(vcpus, max_vcpus, platform, self.kvm)
            self._make_vm(memory_bytes, vcpus)
            self.board = Board(self.vm, self.vcpus, memory_bytes, outcome)
            self.board.become(platform, serial_output, max_vcpus)
            self._exits = GuestExits(self.vcpus, self.memory, self.board.bus, outcome)
            handle = observed(self._exits.handle, on_exit)
            sees_every_exit = on_exit is not None
            self.runner = Runner(
                self.vcpus, handle, max_vcpus=max_vcpus, on_end=on_end, sees_every_exit=sees_every_exit
            )
        except BaseException:
            self.abandon()
            raise

    def _make_vm(self, memory_bytes: int, vcpus: int) -> None:
        self.ram = Ram(memory_bytes)
        self._resources.insert(0, self.ram)  # given back last: another view of it may still be open
        self.memory = self.owned(GuestMemory(self.ram.buffer))
        self.vm: Vm = self.owned(self.kvm.create_vm())
        _furnish(self.vm, self.ram.buffer, self._msr_ranges)
        self.vcpus: list[Vcpu] = [self.owned(self.vm.create_vcpu(i)) for i in range(vcpus)]

    def backend(self) -> KvmBackend | SteeredTscBackend:
        """The host's time for a clock of these vCPUs."""
        backend = kvm_backend(self.kvm, self.vcpus, self.runner)
        self._backends.append(backend)
        return backend

    def take_clock(self, service: ClockService, change: CpuidChange | None, *, limits_rates: bool) -> None:
        """Let the guest find the clock of `service`, and its exits reach it.  change: the last word on its CPUID.

        limits_rates: are there rates that its timers may not follow?  See DilationLimits.
        Before the vCPUs run: it also keeps the state in which they come out of reset.
        """
        self._exits.clock_service = self.owned(service)
        if service.msr_ranges not in ((), self._msr_ranges):
            exit_on_msrs(self.vm, service.msr_ranges)
        if service.hypercall_port is not None:
            self.board.bus.reserve_ports(service.hypercall_port, 1, "the clock interface's hypercalls")
            self._exits.take_hypercalls(service.hypercall_port, self.runner.gate)
        self._cpuid = GuestCpuid(self.kvm, self.vcpus, service.cpuid, change)
        service.take_cpuid(self._cpuid, limits_rates=limits_rates)
        self._power_on = PowerOnState(self.vm, self.vcpus)

    def time_travel(
        self, service: ClockService, run_states: RunStates, source: BootSource, wanted: Travel | bool
    ) -> TimeTravel:
        """What skips its guest's idle time, once the clock of `service` is there; enabled if that is `wanted`."""
        needs_tsc = source.entered_by in KERNELS
        find_time = partial(guest_time, self.kvm, self.vm, self.vcpus, service, needs_tsc=needs_tsc)
        travel = self.owned(TimeTravel(self.runner, self.vcpus, self.board.bus, run_states, find_time))
        if wanted is not False:
            travel.enable(as_travel(wanted))
        return travel

    def add_vcpu(self) -> int:
        """Another vCPU, the others kept out meanwhile; it runs if they do, and waits for its guest's INIT and SIPI.

        StateError if there are max_vcpus already.  After an error or an interrupt, call it again: KVM makes a vCPU of
        each number once, so one that was made is kept.
        """
        number = len(self.vcpus)
        if number == self.max_vcpus:
            raise StateError("add_vcpu", f"all {number} vCPUs are there", "make the machine with a larger max_vcpus")
        if self._late is None or self._late.vcpu_id != number:
            commit(partial(self.vm.create_vcpu, number), lambda vcpu: (vcpu, ()), self._keep_late)
        late: Vcpu = self._late  # type: ignore[assignment]  # just made
        if late not in self.runner.gate.vcpus:  # then it has not run
            late.set_lapic(late.get_lapic())  # for KVM to look at all APICs anew: its map of them lacks a late one
            self._cpuid.add(late)
            self._power_on.add(late)
            for backend in self._backends:
                backend.add_vcpu(late)
            self._exits.clock_service.add_vcpu(number, late)
        self.runner.add_vcpu(late)
        self.vcpus.append(late)
        self.board.tell_of_vcpus()
        return number

    def _keep_late(self, vcpu: Vcpu) -> None:
        """Keep what commit() has made.  close() gives it back with the other vCPUs, after the clock."""
        self._late = vcpu
        self._resources.insert(self._resources.index(self.vcpus[0]), vcpu)

    def boot(self, source: BootSource) -> None:
        """Put `source` into RAM, and let the first vCPU stand at its entry."""
        enter(self.vcpus[0], self.board.load(source, self.memory))

    def boot_anew(self, source: BootSource) -> None:
        """boot(), with vCPUs, interrupt controllers and RAM as after power-on; for vCPUs without threads."""
        self._power_on.restore()
        self.ram.clear()
        self.boot(source)
        if (on_dirty := self.memory.on_dirty) is not None:  # clear() wrote past the memory
            on_dirty(0, len(self.ram.buffer))

    # Giving back

    def owned(self, resource: ResourceT) -> ResourceT:
        """Keep what close() is to give back, before all that is kept already."""
        self._resources.append(resource)
        return resource

    def close(self) -> None:
        """Give everything back; for vCPUs without threads.  May be called again, as after an error or an interrupt."""
        _give_back(self._resources)

    def abandon(self) -> None:
        """close(), of what could not be made."""
        with suppress(BufferError):  # of an interrupt, whose traceback has the memory until it goes
            self.close()


def _furnish(vm: Vm, ram: mmap, msr_ranges: tuple[MsrRange, ...]) -> None:
    """What a VM has before its vCPUs.

    Filter and memory before the interrupt controllers: from Linux 6.18 on these leave a grace period behind that the
    other two would wait for, 4 to 20 ms each.
    """
    if msr_ranges:
        exit_on_msrs(vm, msr_ranges)
    vm.set_tss_addr(TSS)
    vm.set_identity_map_addr(IDENTITY_MAP)
    vm.set_user_memory_region(0, 0, ram)
    vm.create_irqchip()


def _give_back(resources: list[Resource]) -> None:
    """Close them all, the last one first.  Each can be closed again, so after an interrupt begin anew."""
    for place in reversed(range(len(resources))):
        try:
            resources[place].close()
        except StateError:  # a tick that does not return
            _give_back(resources[:place])
            raise
