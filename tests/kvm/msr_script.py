"""A guest that makes a list of MSR accesses and writes down, after each, what it got and what its page holds.

Real mode, one vCPU, everything below 64 KiB.  A #GP is counted and its instruction skipped.  It can also wait for a
word of memory, and for interrupts, which are counted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

from pvclock import Machine
from pvclock.readings import TimeInfo
from tests.waiting import HANG_S

FAULTS: Final = 0x600
HANDLER: Final = 0x700
LOG: Final = 0x1000
LOG_END: Final = 0x5000
RECORD: Final = struct.Struct("<III4x32s")
PAGE: Final = struct.Struct("<I4xQQIbB2x")
GP_VECTOR: Final = 13
INTERRUPTS: Final = 0x604
INTERRUPT_HANDLER: Final = 0x740
INTERRUPT_VECTOR: Final = 0x40
X2APIC_EOI: Final = 0x80B
MEMORY_BYTES: Final = 1 << 20

COUNT_AND_SKIP: Final = bytes.fromhex(
    "66ff060006"  # incl FAULTS
    "558bec"  # push %bp; mov %sp, %bp
    "83460202"  # addw $2, 2(%bp): RDMSR and WRMSR are 2 bytes
    "5dcf"  # pop %bp; iret
)
COUNT_AND_END: Final = bytes.fromhex(
    "66ff060406"  # incl INTERRUPTS
    "6650 6651 6652"  # push %eax; push %ecx; push %edx
    "66b90b080000 6631c0 6631d2 0f30"  # wrmsr of 0 to X2APIC_EOI
    "665a 6659 6658 cf"  # pop %edx; pop %ecx; pop %eax; iret
)


class Access(NamedTuple):
    """WRMSR of `value` to `msr`, or RDMSR if it is None; `page` is looked at afterwards, and holds `before` first."""

    msr: int
    value: int | None = None
    page: int = 0x6000
    before: bytes = b""


class Await(NamedTuple):
    """Wait for the 32-bit word at `word`, which is the value, to become other than 0; interrupts come only then."""

    word: int
    page: int = 0x6000


class Trace(NamedTuple):
    """Did it fault, what RDMSR gave (else what WRMSR wrote), and 32 bytes at `page` after it."""

    faulted: bool
    value: int
    data: bytes


class Outcome(NamedTuple):
    """A Trace with its bytes as a pvclock page."""

    faulted: bool
    value: int
    page: TimeInfo


def run_script(accesses: Sequence[Access], clock: Literal["engine", "kernel"], **options: object) -> list[Outcome]:
    """Make the accesses on a real vCPU whose clock is `clock`'s."""
    with scripted(accesses, clock, **options) as machine:
        return outcomes_of(machine, len(accesses))


@contextmanager
def scripted(accesses: Sequence[Access], clock: Literal["engine", "kernel"], **options: object) -> Iterator[Machine]:
    """The machine of run_script() when its guest has made the accesses."""
    options = {"memory_bytes": MEMORY_BYTES, "clock": clock, "tick_interval_s": None, **options}  # pages are compared
    with Machine(code_of(accesses), **options) as machine:  # type: ignore[arg-type]
        install_handlers(machine.memory.write)
        machine.start()
        machine.wait(HANG_S)
        yield machine


def code_of(steps: Sequence[Access | Await]) -> bytes:
    """The guest's program; it ends with `out` to port 0xf4."""
    assert LOG + RECORD.size * len(steps) <= LOG_END, "too long a script"
    code = (_step(step, LOG + RECORD.size * place) for place, step in enumerate(steps))
    return b"\xbc\x00\x05" + b"".join(code) + b"\xb0\x00\xe6\xf4"


def install_handlers(write: Callable[[int, bytes], object]) -> None:
    """Put into guest memory what becomes of #GP and of INTERRUPT_VECTOR."""
    vectors = ((GP_VECTOR, HANDLER, COUNT_AND_SKIP), (INTERRUPT_VECTOR, INTERRUPT_HANDLER, COUNT_AND_END))
    for vector, address, code in vectors:
        write(4 * vector, address.to_bytes(4, "little"))
        write(address, code)


def traces_of(log: bytes) -> list[Trace]:
    """What became of each step, of the bytes from LOG on."""
    traces, faults_before = [], 0
    for faults, low, high, data in RECORD.iter_unpack(log):
        traces.append(Trace(faults > faults_before, high << 32 | low, data))
        faults_before = faults
    return traces


def outcomes_of(machine: Machine, count: int) -> list[Outcome]:
    """What became of each of `count` accesses."""
    traces = traces_of(machine.memory.read(LOG, RECORD.size * count))
    return [Outcome(faulted, value, TimeInfo._make(PAGE.unpack(data))) for faulted, value, data in traces]


def _step(access: Access | Await, log: int) -> bytes:
    copies = b"".join(_copy(access.page + at, log + 16 + at) for at in range(0, 32, 4))
    if isinstance(access, Await):
        return _await(access.word) + _save_registers(log) + copies
    prepare = b"".join(_store(access.page + at, _word(access.before, at)) for at in range(0, len(access.before), 4))
    return prepare + _access(access) + _save_registers(log) + copies


def _access(access: Access) -> bytes:
    index = b"\x66\xb9" + access.msr.to_bytes(4, "little")
    if access.value is None:
        return index + b"\x66\x31\xc0\x66\x31\xd2\x0f\x32"  # a read that faults leaves 0
    low, high = (access.value & 0xFFFFFFFF).to_bytes(4, "little"), (access.value >> 32).to_bytes(4, "little")
    return index + b"\x66\xb8" + low + b"\x66\xba" + high + b"\x0f\x30"


def _await(word: int) -> bytes:
    load = b"\x66\xa1" + _u16(word)
    return b"\xfb" + load + bytes.fromhex("6685c0 74f7 fa 6631d2")  # sti; 1: load; test; jz 1b; cli; xor %edx, %edx


def _save_registers(log: int) -> bytes:
    return b"\x66\xa3" + _u16(log + 4) + b"\x66\x89\x16" + _u16(log + 8) + _copy(FAULTS, log)


def _copy(source: int, target: int) -> bytes:
    return b"\x66\xa1" + _u16(source) + b"\x66\xa3" + _u16(target)


def _store(target: int, value: bytes) -> bytes:
    return b"\x66\xb8" + value + b"\x66\xa3" + _u16(target)


def _word(data: bytes, at: int) -> bytes:
    return data[at : at + 4].ljust(4, b"\0")


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "little")
