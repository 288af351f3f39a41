"""A system call made in another process's name, by ptrace(2): KVM takes a vCPU's ioctls from its own process only.

The process must be one that sleeps in a system call, as QEMU's main thread does while nothing happens: it is
interrupted as soon as it sleeps, makes the call by the same `syscall` instruction, and goes back to sleep as if nothing
had been.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.waiting import HANG_S

__all__ = ["Injection", "injected"]

PTRACE_CONT: Final = 7
PTRACE_SINGLESTEP: Final = 9
PTRACE_GETREGS: Final = 12
PTRACE_SETREGS: Final = 13
PTRACE_DETACH: Final = 17
PTRACE_SEIZE: Final = 0x4206
PTRACE_INTERRUPT: Final = 0x4207

REGISTERS: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
"""struct user_regs_struct of <sys/user.h>."""
SYSCALL: Final = b"\x0f\x05"
LOOK_AGAIN_S: Final = 0.01
NO_SYSTEM_CALL: Final = 2**64 - 1
BELOW_THE_STACK: Final = 4096
"""Out of the red zone, and of what the interrupted call may have put there."""


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in REGISTERS]


_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_ptrace.restype = ctypes.c_long


def _trace(request: int, pid: int, data: object = None) -> None:
    if _ptrace(request, pid, None, data) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Injection:
    """A process that stands still meanwhile.  scratch: an address in it with room for what calls point to."""

    def __init__(self, pid: int, registers: _Registers) -> None:
        self._pid = pid
        self._registers = registers
        self._memory = Path(f"/proc/{pid}/mem")
        self.scratch: int = registers.rsp - BELOW_THE_STACK

    @property
    def is_in_system_call(self) -> bool:
        """Did the process stop there?"""
        return self.read(self._registers.rip - len(SYSCALL), len(SYSCALL)) == SYSCALL

    def write(self, address: int, content: bytes) -> None:
        """Put `content` there."""
        with self._memory.open("r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), content, address)

    def read(self, address: int, length: int) -> bytes:
        """Read what is there."""
        with self._memory.open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), length, address)

    def call(self, number: int, *arguments: int) -> int:
        """Make the system call, and return what it does; OSError if it fails."""
        registers = _Registers.from_buffer_copy(self._registers)
        registers.rip -= len(SYSCALL)
        registers.rax, registers.orig_rax = number, NO_SYSTEM_CALL
        for name, argument in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(registers, name, argument)
        _trace(PTRACE_SETREGS, self._pid, ctypes.byref(registers))
        _trace(PTRACE_SINGLESTEP, self._pid)
        _wait_until_stopped(self._pid)
        _trace(PTRACE_GETREGS, self._pid, ctypes.byref(registers))
        result = ctypes.c_long(registers.rax).value
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result))
        return result


@contextmanager
def injected(pid: int) -> Iterator[Injection]:
    """Stop process `pid` in its system call, and let it go on afterwards as it was."""
    registers = _Registers()
    _trace(PTRACE_SEIZE, pid)
    try:
        end_s = time.monotonic() + HANG_S
        while not (injection := _stopped(pid, registers)).is_in_system_call:
            assert time.monotonic() < end_s, f"process {pid} does not fall asleep"
            _trace(PTRACE_CONT, pid)
            time.sleep(LOOK_AGAIN_S)  # what it does at this moment, such as after an answer, it may do slowly
        try:
            yield injection
        finally:
            _trace(PTRACE_SETREGS, pid, ctypes.byref(registers))
    finally:
        _trace(PTRACE_DETACH, pid)


def _stopped(pid: int, registers: _Registers) -> Injection:
    _trace(PTRACE_INTERRUPT, pid)
    _wait_until_stopped(pid)
    _trace(PTRACE_GETREGS, pid, ctypes.byref(registers))
    return Injection(pid, registers)


def _wait_until_stopped(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    assert os.WIFSTOPPED(status), f"process {pid} ended: {status:#x}"
    assert os.WSTOPSIG(status) == signal.SIGTRAP, f"process {pid} got signal {os.WSTOPSIG(status)}"
