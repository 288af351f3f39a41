"""A local APIC's registers, as KVM_GET_LAPIC gives them: those of its timer.

Source: Intel's SDM, volume 3, "APIC timer".
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "LVT_TIMER",
    "ONE_SHOT_MODE",
    "PERIODIC_MODE",
    "TSC_DEADLINE_MODE",
    "register",
    "timer_mode",
    "with_register",
]

LVT_TIMER: Final = 0x320
ONE_SHOT_MODE, PERIODIC_MODE, TSC_DEADLINE_MODE = 0b00, 0b01, 0b10
"""The timer's modes; the first two count down, once and again and again."""


def register(lapic: bytes, at: int) -> int:
    """The 32 bits of the register there."""
    return int.from_bytes(lapic[at : at + 4], "little")


def with_register(lapic: bytes, at: int, value: int) -> bytes:
    """The same registers, but for that one."""
    return lapic[:at] + value.to_bytes(4, "little") + lapic[at + 4 :]


def timer_mode(lapic: bytes) -> int:
    """Bits 17 and 18 of its LVT timer register."""
    return register(lapic, LVT_TIMER) >> 17 & 0b11
