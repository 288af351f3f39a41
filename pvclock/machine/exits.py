"""What a machine does when its guest exits: MSRs of the clock, the exit port, the debug console."""

from __future__ import annotations

import threading
from typing import Final

from pvclock.clock.guest_clock import GuestClock
from pvclock.errors import GuestCrashed, MissingCapability, MsrFault
from pvclock.kvm import Vcpu
from pvclock.kvm.exits import Exit, IoIn, IoOut, Mmio, RdmsrExit, WrmsrExit

__all__ = ["CONSOLE_KEPT_BYTES", "CONSOLE_PORT", "EXIT_PORT", "GuestExits"]

EXIT_PORT: Final = 0xF4
"""A write ends the run; the byte is the exit code.  QEMU's isa-debug-exit is mostly put there."""

CONSOLE_PORT: Final = 0xE9
"""Bytes written here are the console; Bochs' and QEMU's debug console."""

CONSOLE_KEPT_BYTES: Final = 1 << 20
"""A guest may write for ever; the newest bytes are kept."""

NOBODY_ANSWERS: Final = b"\xff"


class GuestExits:
    """The exits of `vcpus` and what became of them: exit code or crash, and the console.

    vCPU threads hold this and not their Machine, so that one that is dropped can end them.

    Thread-safety: handle() is called by each vCPU's thread; the rest by any.
    """

    def __init__(self, vcpus: list[Vcpu]) -> None:
        self.clock: GuestClock | None = None
        self.exit_code: int | None = None
        self.crash: GuestCrashed | None = None
        self._vcpus = vcpus
        self._console = bytearray()
        self._console_lock = threading.Lock()

    def handle(self, vcpu: int, reason: Exit) -> bool:
        """Answer vCPU's exit; False if the run ends by it."""
        match reason:
            case WrmsrExit(msr, value, _):
                self._write_msr(vcpu, msr, value)
            case RdmsrExit(msr, _):
                self._read_msr(vcpu, msr)
            case IoOut(port, _, data):
                return self._out(vcpu, port, data)
            case IoIn(_, size, repeats):
                self._vcpus[vcpu].complete_io(NOBODY_ANSWERS * size * repeats)
            case Mmio(_, length, None):
                self._vcpus[vcpu].complete_mmio(NOBODY_ANSWERS * length)
            case Mmio():
                pass
            case _:
                self._end_by(crash=GuestCrashed(vcpu, reason))
                return False
        return True

    def console(self) -> str:
        """What the guest wrote to the console port up to now: all of it, or the last CONSOLE_KEPT_BYTES."""
        for vcpu in self._vcpus:
            self.append_to_console(vcpu)
        return self._console.decode(errors="replace")

    def append_to_console(self, vcpu: Vcpu, data: bytes = b"") -> None:
        """Append what `vcpu` has kept, and then `data`, which it wrote later."""
        with self._console_lock:
            self._console += vcpu.take_console() + data
            del self._console[:-CONSOLE_KEPT_BYTES]

    def engine_clock(self) -> GuestClock:
        """The engine's clock; MissingCapability if the kernel serves this guest."""
        if self.clock is None:
            raise MissingCapability("KVM_CAP_X86_MSR_FILTER", "by nobody: the kernel serves this guest's clock")
        return self.clock

    def _out(self, vcpu: int, port: int, data: bytes) -> bool:
        if port == EXIT_PORT:
            self._end_by(exit_code=data[0])
        elif port == CONSOLE_PORT:
            self.append_to_console(self._vcpus[vcpu], data)
        return port != EXIT_PORT

    def _end_by(self, *, exit_code: int | None = None, crash: GuestCrashed | None = None) -> None:
        """Keep how the run ended: by what came first, for the other vCPUs go on until they are kicked."""
        if self.exit_code is None and self.crash is None:
            self.exit_code, self.crash = exit_code, crash

    def _write_msr(self, vcpu: int, index: int, value: int) -> None:
        try:
            self.engine_clock().write_msr(vcpu, index, value)
        except MsrFault:
            self._vcpus[vcpu].complete_msr(fault=True)
        else:
            self._vcpus[vcpu].complete_msr()

    def _read_msr(self, vcpu: int, index: int) -> None:
        try:
            self._vcpus[vcpu].complete_msr(self.engine_clock().read_msr(vcpu, index))
        except MsrFault:
            self._vcpus[vcpu].complete_msr(fault=True)
