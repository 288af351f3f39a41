"""Real-mode guests that take interrupts from their local APIC."""

from __future__ import annotations

from typing import Final

from tests.kvm.guests import write_msr

APIC_BASE: Final = 0x1B
X2APIC_ENABLED: Final = 0xFEE00000 | 1 << 11 | 1 << 10
"""IA32_APIC_BASE: where it is, enabled, in x2APIC mode: its registers are MSRs, which real mode can reach."""
X2APIC_SVR: Final = 0x80F
X2APIC_EOI: Final = 0x80B
SPURIOUS: Final = 0x1FF
"""The APIC is enabled by software, and spurious interrupts have vector 0xFF."""

COUNT: Final = 0x5000
"""Where ON_INTERRUPT counts."""
READY: Final = COUNT + 4
SET_READY: Final = bytes.fromhex("c606045001")
"""movb $1, READY: for a guest whose APIC is enabled."""
IMAGE: Final = 0x7C00

ENABLE_APIC: Final = write_msr(APIC_BASE, X2APIC_ENABLED) + write_msr(X2APIC_SVR, SPURIOUS)
WAIT: Final = bytes.fromhex("fb f4 ebfc")  # sti; 1: hlt; jmp 1b
ON_INTERRUPT: Final = bytes.fromhex("66 60 66ff060050") + write_msr(X2APIC_EOI, 0)  # pushal; incl COUNT; EOI
RETURN: Final = bytes.fromhex("66 61 cf")  # popal; iret


def counting(vector: int, setup: bytes, then: bytes = b"") -> bytes:
    """A flat image: enables its APIC, does `setup`, and counts the interrupts of `vector`, with `then` after each."""
    handler = IMAGE + 12 + len(ENABLE_APIC) + len(setup) + len(WAIT)
    return set_vector(vector, handler) + ENABLE_APIC + setup + WAIT + ON_INTERRUPT + then + RETURN


def set_vector(vector: int, handler: int) -> bytes:
    """Twelve bytes of code that put the handler into the vector table."""
    place = (4 * vector).to_bytes(2, "little"), (4 * vector + 2).to_bytes(2, "little")
    return b"\xc7\x06" + place[0] + handler.to_bytes(2, "little") + b"\xc7\x06" + place[1] + bytes(2)


def unless_count(count: int, otherwise: bytes) -> bytes:
    """`otherwise` once COUNT is `count`."""
    return b"\x83\x3e\x00\x50" + bytes([count]) + b"\x75" + bytes([len(otherwise)]) + otherwise  # cmpw; jne
