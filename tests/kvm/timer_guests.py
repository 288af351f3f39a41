"""Guests that sleep by their local APIC's timer, and do something each time that they wake."""

from __future__ import annotations

from typing import Final

from tests.kvm.guests import out, write_msr
from tests.kvm.interrupt_guests import counting

__all__ = ["LONGEST_S", "ticking", "waking", "waking_once"]

VECTOR: Final = 0x61
LVT_TIMER, INITIAL_COUNT, DIVIDE_CONFIGURATION = 0x832, 0x838, 0x83E
BY_128: Final = 0b1010
DIVIDER: Final = 128
COUNT_BYTES: Final = bytes.fromhex("813e0050")  # cmpw $..., COUNT
LONGEST_S: Final = 549
"""For a count of 32 bits of 128 ns each."""


PERIODIC: Final = 1 << 17
SET_UP: Final = write_msr(DIVIDE_CONFIGURATION, BY_128) + write_msr(LVT_TIMER, VECTOR)


def waking(seconds: int, times: int, each: bytes = b"") -> bytes:
    """A flat image that sleeps `times` times for so many seconds, does `each` after each, and ends with exit code 0."""
    sleep = _sleep(seconds)
    setup = SET_UP + sleep
    end = out(0xF4, 0)
    ends = COUNT_BYTES + times.to_bytes(2, "little") + b"\x75" + bytes([len(end)]) + end  # jne
    return counting(VECTOR, setup, each + ends + sleep)


def waking_once(seconds: int) -> bytes:
    """A flat image that sleeps once for so many seconds, counts that, and then halts for good."""
    return counting(VECTOR, SET_UP + _sleep(seconds))


def ticking(seconds: int) -> bytes:
    """A flat image that has an interrupt every so many seconds, counts them, and else is halted."""
    return counting(VECTOR, SET_UP + write_msr(LVT_TIMER, VECTOR | PERIODIC) + _sleep(seconds))


def _sleep(seconds: int) -> bytes:
    return write_msr(INITIAL_COUNT, seconds * 10**9 // DIVIDER)
