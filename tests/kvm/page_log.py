"""A real-mode guest that reads its clock over and over, and keeps what it read: its TSC, and the page with it.

It registers its page once: booted again on the same memory it goes on reading where that page is.
"""

from __future__ import annotations

import time
from typing import Final

from pvclock import Machine
from tests import oracle
from tests.waiting import HANG_S

MEMORY_BYTES: Final = 1 << 20
COUNT: Final = 0x5004
ENTRIES: Final = 0x8000
ENTRY_BYTES: Final = 64
KEPT: Final = 64

PAGE_LOG: Final = bytes.fromhex(
    "803e005000 7516"  # cmpb $0, 0x5000; jne 1f: it was booted before
    "c606005001"  # movb $1, 0x5000
    "66b9014d564b 66b801600000 6631d2 0f30"  # wrmsr of 0x6000 | 1 to MSR_KVM_SYSTEM_TIME_NEW
    "668b1e0450"  # 1: mov COUNT, %ebx
    "89df 83e73f c1e706 81c70080"  # %di = ENTRIES + (count & 63) * 64
    "668b2e0060 f7c50100 75e4"  # mov 0x6000, %ebp; its version; test $1; jne 1b
    "0f31 668905 66895504"  # rdtsc; the TSC to the entry
    "83c708 be0060 b90800 fc 66f3a5"  # and the page after it
    "66392e0060 75c7"  # cmp %ebp, 0x6000; jne 1b: it has changed meanwhile
    "6643 66891e0450"  # inc %ebx; mov %ebx, COUNT
    "ebbe"  # jmp 1b
)


def entries(machine: Machine) -> int:
    """How often the guest has read its clock."""
    return int.from_bytes(machine.memory.read(COUNT, 4), "little")


def wait_until_it_reads_on(machine: Machine, more: int = KEPT) -> None:
    """Return once the guest has read its clock `more` times again."""
    goal, deadline = entries(machine) + more, time.monotonic() + HANG_S
    while entries(machine) < goal:
        assert time.monotonic() < deadline, "the guest reads no more"
        assert not machine.runner.join(0.001), machine.wait()


def readings(machine: Machine) -> list[tuple[int, int]]:
    """What a paused guest read last, oldest first: its TSC, and the ns that it makes of the page at that."""
    count = entries(machine)
    kept = []
    for number in range(max(count - KEPT + 1, 0), count):  # the oldest may have been begun anew
        entry = machine.memory.read(ENTRIES + number % KEPT * ENTRY_BYTES, 40)
        tsc = int.from_bytes(entry[:8], "little")
        kept.append((tsc, oracle.TimeInfo.parse(entry[8:]).read(tsc)))
    return kept
