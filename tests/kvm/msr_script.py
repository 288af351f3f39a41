"""A guest that makes a list of MSR accesses and writes down, after each, what it got and what its page holds.

Real mode, one vCPU, everything below 64 KiB.  A #GP is counted and its instruction skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

from pvclock import Machine
from pvclock.readings import TimeInfo

FAULTS: Final = 0x600
HANDLER: Final = 0x700
LOG: Final = 0x1000
LOG_END: Final = 0x5000
RECORD: Final = struct.Struct("<III4xI4xQQIbB2x")
GP_VECTOR: Final = 13
MEMORY_BYTES: Final = 1 << 20

COUNT_AND_SKIP: Final = bytes.fromhex(
    "66ff060006"  # incl FAULTS
    "558bec"  # push %bp; mov %sp, %bp
    "83460202"  # addw $2, 2(%bp): RDMSR and WRMSR are 2 bytes
    "5dcf"  # pop %bp; iret
)


class Access(NamedTuple):
    """WRMSR of `value` to `msr`, or RDMSR if it is None; `page` is looked at afterwards, and holds `before` first."""

    msr: int
    value: int | None = None
    page: int = 0x6000
    before: bytes = b""


class Outcome(NamedTuple):
    """Did it fault, what RDMSR gave, and the page after it."""

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
    code = b"".join(_step(access, LOG + RECORD.size * i) for i, access in enumerate(accesses)) + b"\xb0\x00\xe6\xf4"
    assert LOG + RECORD.size * len(accesses) <= LOG_END, "too long a script"
    options = {"memory_bytes": MEMORY_BYTES, "clock": clock, "tick_interval_s": None, **options}  # pages are compared
    with Machine(b"\xbc\x00\x05" + code, **options) as machine:  # type: ignore[arg-type]
        machine.memory.write(4 * GP_VECTOR, HANDLER.to_bytes(4, "little"))
        machine.memory.write(HANDLER, COUNT_AND_SKIP)
        machine.start()
        machine.wait(30)
        yield machine


def outcomes_of(machine: Machine, count: int) -> list[Outcome]:
    """What became of each of `count` accesses."""
    outcomes, faults_before = [], 0
    for faults, low, high, *page in RECORD.iter_unpack(machine.memory.read(LOG, RECORD.size * count)):
        outcomes.append(Outcome(faults > faults_before, high << 32 | low, TimeInfo._make(page)))
        faults_before = faults
    return outcomes


def _step(access: Access, log: int) -> bytes:
    prepare = b"".join(_store(access.page + at, _word(access.before, at)) for at in range(0, len(access.before), 4))
    copies = b"".join(_copy(access.page + at, log + 16 + at) for at in range(0, 32, 4))
    return prepare + _access(access) + _save_registers(log) + copies


def _access(access: Access) -> bytes:
    index = b"\x66\xb9" + access.msr.to_bytes(4, "little")
    if access.value is None:
        return index + b"\x66\x31\xc0\x66\x31\xd2\x0f\x32"  # a read that faults leaves 0
    low, high = (access.value & 0xFFFFFFFF).to_bytes(4, "little"), (access.value >> 32).to_bytes(4, "little")
    return index + b"\x66\xb8" + low + b"\x66\xba" + high + b"\x0f\x30"


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
