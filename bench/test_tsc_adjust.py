"""A guest's write of IA32_TSC_ADJUST: the engine's, with its page and such events as it may have, beside the kernel's.

The same real-mode code runs on both, and each write moves the TSC.  Where KVM honours no TSC offsets the engine refuses
each, and records that.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import pytest

from bench.comparison import Comparison
from pvclock import Machine
from pvclock.kvm import Kvm
from pvclock.machine import EXIT_PORT

WRITES: Final = 500
"""In a run: a Machine's start and end (0.3 ms) are then 0.6 us of each."""
ROUNDS: Final = 15
MSR_TSC_ADJUST: Final = 0x3B


def payload() -> bytes:
    """Code that writes WRITES values, each one less, then the exit port, and begins again if the vCPU is run on."""
    begin = b"\x66\xbe" + WRITES.to_bytes(4, "little")  # mov $WRITES, %esi
    begin += b"\x66\xb9" + MSR_TSC_ADJUST.to_bytes(4, "little") + b"\x66\x31\xd2"  # mov $0x3b, %ecx; xor %edx, %edx
    loop = b"\x66\x89\xf0\x0f\x30\x66\x4e"  # mov %esi, %eax; wrmsr; dec %esi
    loop += b"\x75" + (256 - len(loop) - 2).to_bytes(1, "little")  # jnz loop
    end = b"\xb0\x00\xe6" + bytes([EXIT_PORT])
    return begin + loop + end + b"\xeb" + (256 - len(begin + loop + end) - 2).to_bytes(1, "little")


def run(machine: Machine) -> None:
    """From the first write to the last."""
    machine.start()
    machine.wait()


@pytest.mark.kvm
def test_writes_of_tsc_adjust(comparison: Comparison, kvm: Kvm) -> None:
    """Each machine is run again and again: the engine may record 64 events at first, and 8 a second then."""
    with (
        Machine(payload(), kvm=kvm, clock="kernel") as kernel,
        Machine(payload(), kvm=kvm, tick_interval_s=None) as engine,
    ):
        comparison.measure(
            "guest's write of IA32_TSC_ADJUST",
            partial(run, engine),
            ("the kernel's own", partial(run, kernel)),
            operations=WRITES,
            rounds=ROUNDS,
        )
