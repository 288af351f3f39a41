"""The hypercall instructions: which one a CPU has, which one is at RIP, and how the other vendor's is replaced.

Source: AMD APM volume 3 (VMMCALL), Intel SDM volume 3 (VMCALL); Linux em_hypercall() and emulator_fix_hypercall().
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from pvclock._memory import GuestMemory
from pvclock.errors import ConfigError, GuestAddressError, RangeError
from pvclock.quantities import Gpa, quoted

__all__ = [
    "NATIVE_OPCODES",
    "OPCODE_BYTES",
    "VMCALL",
    "VMMCALL",
    "native_opcode",
    "patch",
    "put_native_opcode",
    "recognized_length",
    "should_trap_ud",
]

VMCALL: Final = b"\x0f\x01\xc1"
VMMCALL: Final = b"\x0f\x01\xd9"
OPCODE_BYTES: Final = 3
PAGE_BYTES: Final = 4096
INSTRUCTION_BYTES_MAX: Final = 15

NATIVE_OPCODES: Final[Mapping[str, bytes]] = {
    "AuthenticAMD": VMMCALL,
    "HygonGenuine": VMMCALL,
    "GenuineIntel": VMCALL,
    "CentaurHauls": VMCALL,
    "  Shanghai  ": VMCALL,
}
"""By the vendor string of CPUID leaf 0 (EBX, EDX, ECX)."""

# Segment overrides and address size do not change a hypercall.  LOCK makes it #UD; F2 and F3 turn VMMCALL into VMGEXIT;
# 66 is reserved.
IDLE_PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x67")
REX_PREFIXES: Final = frozenset(range(0x40, 0x50))


def native_opcode(vendor: str) -> bytes:
    """The 3 bytes of the hypercall instruction of a CPU by `vendor`; ConfigError for a vendor that has none."""
    if vendor not in NATIVE_OPCODES:
        raise ConfigError(f"CPU vendor {quoted(vendor)} has no hypercall; {', '.join(map(repr, NATIVE_OPCODES))} have")
    return NATIVE_OPCODES[vendor]


def put_native_opcode(vendor: str, buffer: bytearray | memoryview) -> int:
    """Put native_opcode() at the beginning of `buffer`; returns its length.  RangeError if that is too small."""
    opcode = native_opcode(vendor)
    if len(buffer) < len(opcode):
        raise RangeError(f"a buffer of {len(buffer)} bytes; the hypercall instruction has {len(opcode)}")
    buffer[: len(opcode)] = opcode
    return len(opcode)


def recognized_length(code: bytes, *, long_mode: bool) -> int | None:
    """Length of the VMCALL or VMMCALL at the beginning of `code`, the bytes at RIP; None for other instructions.

    3 bytes, or up to 15 with prefixes that have no effect here.
    """
    idle = IDLE_PREFIXES | REX_PREFIXES if long_mode else IDLE_PREFIXES
    prefixes = next((at for at, byte in enumerate(code) if byte not in idle), len(code))
    length = prefixes + OPCODE_BYTES
    is_hypercall = code[prefixes:length] in (VMCALL, VMMCALL)
    return length if is_hypercall and length <= INSTRUCTION_BYTES_MAX else None


def should_trap_ud(vendor: str, opcodes: Iterable[bytes]) -> bool:
    """Must #UD exit to the VMM on a CPU by `vendor`, for guests that execute `opcodes` on any CPU?"""
    native = NATIVE_OPCODES.get(vendor, VMCALL)
    return any(opcode != native for opcode in opcodes)


def patch(memory: GuestMemory, gpa: Gpa, seen: bytes, vendor: str) -> bool:
    """Replace the hypercall instruction at `gpa` by the CPU's own, if it still is `seen`; True if it was written.

    Left alone: the native instruction, one with prefixes, one across two pages (which need not be contiguous), and one
    that is not in memory.

    The two instructions differ in the last byte, the only one written: a vCPU that fetches meanwhile sees the old
    instruction or the new one.  Another vCPU may write between the check and the write, and the architecture requires
    each vCPU to serialize before it runs changed code: a VMM that must exclude both keeps the other vCPUs out of the
    guest meanwhile.  Linux and VirtualBox do not.
    """
    native = native_opcode(vendor)
    if len(seen) != OPCODE_BYTES or seen == native or gpa % PAGE_BYTES > PAGE_BYTES - OPCODE_BYTES:
        return False
    try:
        if memory.read(gpa, OPCODE_BYTES) != seen:
            return False
        memory.write(gpa + OPCODE_BYTES - 1, native[-1:])
    except GuestAddressError:
        return False
    return True
