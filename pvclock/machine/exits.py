"""What becomes of a guest's exits: MSRs go to the clock, ports and MMIO to the bus, and some end the run."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from pvclock._memory import GuestMemory
from pvclock.errors import GuestCrashed, GuestPanicked, MsrFault, StateError
from pvclock.kvm import Vcpu
from pvclock.kvm._gate import Gate
from pvclock.kvm.exits import Exit, IoIn, IoOut, Mmio, RdmsrExit, WrmsrExit
from pvclock.kvm.runner import ExitHandler
from pvclock.machine.bus import Bus
from pvclock.machine.clock_service import ClockService
from pvclock.machine.crash import find_site
from pvclock.machine.hypercall_port import HypercallPort

__all__ = ["Ending", "GuestExits", "Outcome", "observed"]


def observed(handle: ExitHandler, observer: Callable[[int, Exit], object] | None) -> ExitHandler:
    """An exit handler that tells `observer` first, if there is one."""
    if observer is None:
        return handle

    def tell_and_handle(vcpu: int, reason: Exit) -> bool:
        observer(vcpu, reason)
        return handle(vcpu, reason)

    return tell_and_handle


class Ending(StrEnum):
    """What a guest ended its run by, if not by a crash.  All names but the first are those of QMP's SHUTDOWN event."""

    EXIT_CODE = "guest-exit"
    """It wrote to the exit port."""
    POWER_OFF = "guest-shutdown"
    RESET = "guest-reset"
    PANIC = "guest-panic"
    """Its kernel said that it cannot go on (pvpanic)."""


class Outcome:
    """How a guest ended its run: by one of the Endings, by a crash, or not yet.

    What came first stays, because the other vCPUs go on until they are kicked.
    """

    def __init__(self) -> None:
        self.is_known = False
        self.ending: Ending | None = None
        self.exit_code: int | None = None
        self.crash: GuestCrashed | None = None

    def exit(self, exit_code: int) -> None:
        """Take the guest's exit code."""
        self.end(Ending.EXIT_CODE, exit_code)

    def end(self, ending: Ending, exit_code: int = 0) -> None:
        """Take what the guest ends its run by."""
        if not self.is_known:
            self.is_known, self.ending, self.exit_code = True, ending, exit_code

    def fail(self, crash: GuestCrashed) -> None:
        """Take why the guest cannot go on."""
        if not self.is_known:
            self.is_known, self.crash = True, crash

    def forget(self) -> None:
        """Begin again."""
        self.is_known, self.ending, self.exit_code, self.crash = False, None, None, None

    def result(self) -> int:
        """The exit code: the guest's own, or 0 of a power-off or a reset.

        GuestCrashed or GuestPanicked if it cannot go on, StateError if it has not ended its run.
        """
        if self.crash is not None:
            raise self.crash
        if self.ending is Ending.PANIC:
            raise GuestPanicked
        if self.exit_code is None:
            raise StateError("wait", "the machine was stopped", "there is no exit code")
        return self.exit_code


class GuestExits:
    """Answers the exits of `vcpus`: `clock_service`, which is set before they run, serves their MSRs.

    vCPU threads have this and not their Machine, so that one that is dropped can end them.

    Thread-safety: handle() is called by each vCPU's thread.
    """

    clock_service: ClockService

    def __init__(self, vcpus: list[Vcpu], memory: GuestMemory, bus: Bus, outcome: Outcome) -> None:
        self._vcpus = vcpus
        self._memory = memory
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
                self._outcome.fail(GuestCrashed(vcpu, reason, find_site(self._vcpus[vcpu], self._memory)))
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
