"""What becomes of a guest's exits: MSRs go to the clock, ports and MMIO to the bus, and some end the run."""

from __future__ import annotations

from pvclock.errors import GuestCrashed, MsrFault, StateError
from pvclock.kvm import Vcpu
from pvclock.kvm._gate import Gate
from pvclock.kvm.exits import Exit, IoIn, IoOut, Mmio, RdmsrExit, WrmsrExit
from pvclock.machine.bus import Bus
from pvclock.machine.clock_service import ClockService
from pvclock.machine.hypercall_port import HypercallPort

__all__ = ["GuestExits", "Outcome"]


class Outcome:
    """How a guest ended its run: by an exit code, by a crash, or not yet.

    What came first stays, because the other vCPUs go on until they are kicked.
    """

    def __init__(self) -> None:
        self.is_known = False
        self.exit_code: int | None = None
        self.crash: GuestCrashed | None = None

    def exit(self, exit_code: int) -> None:
        """Take the guest's exit code."""
        if not self.is_known:
            self.is_known, self.exit_code = True, exit_code

    def fail(self, crash: GuestCrashed) -> None:
        """Take why the guest cannot go on."""
        if not self.is_known:
            self.is_known, self.crash = True, crash

    def forget(self) -> None:
        """Begin again."""
        self.is_known, self.exit_code, self.crash = False, None, None


class GuestExits:
    """Answers the exits of `vcpus`: `clock_service`, which is set before they run, serves their MSRs.

    vCPU threads have this and not their Machine, so that one that is dropped can end them.

    Thread-safety: handle() is called by each vCPU's thread.
    """

    clock_service: ClockService

    def __init__(self, vcpus: list[Vcpu], bus: Bus, outcome: Outcome) -> None:
        self._vcpus = vcpus
        self._bus = bus
        self._outcome = outcome
        self._hypercall_port: int | None = None

    def take_hypercalls(self, port: int, gate: Gate) -> None:
        """Answer hypercalls, which write to that port, from now on; gate: by which the vCPUs enter the guest."""
        self._hypercalls, self._hypercall_port = HypercallPort(self._vcpus, gate), port

    def handle(self, vcpu: int, reason: Exit) -> bool:
        """Answer vCPU's exit; False if the run ends by it."""
        # The frequent ones by their type: a match statement takes several times as long.
        if type(reason) is WrmsrExit:
            self._write_msr(vcpu, reason)
            return True
        if type(reason) is RdmsrExit:
            self._read_msr(vcpu, reason)
            return True
        if type(reason) is IoOut:
            if reason[0] == self._hypercall_port:
                self._serve_hypercall(vcpu, reason)
            else:
                self._bus.write_port(reason[0], reason[1], reason[2])
            return not self._outcome.is_known
        match reason:
            case IoIn(port, size, repeats):
                items = [self._bus.read_port(port, size) for _ in range(repeats)]
                self._vcpus[vcpu].complete_io(b"".join(items))
            case Mmio(gpa, length, None):
                self._vcpus[vcpu].complete_mmio(self._bus.read_mmio(gpa, length))
            case Mmio(gpa, _, data) if data is not None:
                self._bus.write_mmio(gpa, data)
            case _:
                self._outcome.fail(GuestCrashed(vcpu, reason))
        return not self._outcome.is_known

    def _write_msr(self, vcpu: int, reason: WrmsrExit) -> None:
        write = self.clock_service.write_msr
        try:
            write(vcpu, reason[0], reason[1])
        except MsrFault:
            self._vcpus[vcpu].complete_msr(fault=True)
        except StateError:
            if write == self.clock_service.write_msr:
                raise
            self._write_msr(vcpu, reason)  # it waited while the machine was rolled back to another clock
        else:
            self._vcpus[vcpu].complete_msr()

    def _read_msr(self, vcpu: int, reason: RdmsrExit) -> None:
        read = self.clock_service.read_msr
        try:
            value = read(vcpu, reason[0])
        except MsrFault:
            self._vcpus[vcpu].complete_msr(fault=True)
        except StateError:
            if read == self.clock_service.read_msr:
                raise
            self._read_msr(vcpu, reason)
        else:
            self._vcpus[vcpu].complete_msr(value)

    def _serve_hypercall(self, vcpu: int, reason: IoOut) -> None:
        hypercall = self.clock_service.hypercall
        try:
            if len(reason.data) == 1:  # else it is no hypercall, but some other OUT, which finds no device
                self._hypercalls.serve(vcpu, hypercall)
        except StateError:
            if hypercall == self.clock_service.hypercall:
                raise
            self._serve_hypercall(vcpu, reason)
