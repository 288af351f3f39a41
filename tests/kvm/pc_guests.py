"""Guests of a PC, of a few bytes each: one that echoes what is typed, one that sends by interrupts, and a kernel."""

from __future__ import annotations

import struct
from typing import Final

from tests.kvm.guests import out
from tests.unit.kernel_images import bzimage

__all__ = ["ALPHABET", "ECHO", "WAIT_FOREVER", "driver", "first_module_sender", "kernel", "module_lister", "out_dx"]

WAIT_FOREVER: Final = bytes.fromhex("ebfe")
COM1_VECTOR: Final = 0x0C
"""IRQ 4 of a PIC whose vectors begin at 8, as a PC's do."""


def out_dx(port: int, value: int) -> bytes:
    """`out` of one byte to any port."""
    return b"\xba" + port.to_bytes(2, "little") + bytes([0xB0, value]) + b"\xee"


def driver(enable: int, handler: bytes, *, at: int = 0) -> bytes:
    """A guest that has `handler` called for COM1's interrupts, enables some of these, and waits; BL is 'a'.

    at: how many bytes of the image come before it.
    """
    # xor %ax, %ax; mov %ax, %ds; mov %ax, %ss; mov $0x7000, %sp; mov $'a', %bl
    start = bytes.fromhex("31c0 8ed8 8ed0 bc0070 b361")
    pics = out(0x20, 0x11) + out(0x21, 8) + out(0x21, 4) + out(0x21, 1) + out(0x21, 0xEF)
    wait = bytes.fromhex("fb f4 ebfc")  # 1: sti; hlt; jmp 1b
    enabled = out_dx(0x3F9, enable)
    handler_at = 0x7C00 + at + len(start) + 12 + len(pics) + len(enabled) + len(wait)
    vector = b"".join(
        b"\xc7\x06" + (4 * COM1_VECTOR + place).to_bytes(2, "little") + value.to_bytes(2, "little")  # movw
        for place, value in ((0, handler_at), (2, 0))
    )
    return start + vector + pics + enabled + wait + handler


END_OF_INTERRUPT: Final = out(0x20, 0x20) + b"\xcf"  # iret

ECHO: Final = (
    bytes.fromhex("bafd03 ec a801 740b")  # 1: mov $0x3fd, %dx; in %dx, %al; test $1, %al; jz 2f
    + bytes.fromhex("baf803 ec ee")  # mov $0x3f8, %dx; in %dx, %al; out %al, %dx
    + bytes.fromhex("3c71 75ef e6f4")  # cmp $'q', %al; jne 1b; out %al, $EXIT_PORT
    + END_OF_INTERRUPT  # 2:
)

ALPHABET: Final = (
    bytes.fromhex("bafa03 ec 3c02 750e")  # mov $0x3fa, %dx; in %dx, %al; cmp $2, %al; jne 1f
    + bytes.fromhex("baf803 88d8 ee fec3")  # mov $0x3f8, %dx; mov %bl, %al; out %al, %dx; inc %bl
    + bytes.fromhex("3c7a 7502 e6f4")  # cmp $'z', %al; jne 1f; out %al, $EXIT_PORT
    + END_OF_INTERRUPT  # 1:
)


KERNEL_CODE: Final = bytes.fromhex(
    "66baf803 8b9e28020000"  # mov $0x3f8, %dx; mov 0x228(%rsi), %ebx: the command line
    "8a03 84c0 7406 ee 48ffc3 ebf4"  # 1: mov (%rbx), %al; test %al, %al; jz 2f; out %al, %dx; inc %rbx; jmp 1b
    "488b5e70 b908000000"  # 2: mov 0x70(%rsi), %rbx: the RSDP; mov $8, %ecx
    "8a03 ee 48ffc3 ffc9 75f6"  # 3: mov (%rbx), %al; out %al, %dx; inc %rbx; dec %ecx; jnz 3b
    "8b9e18020000 8b8e1c020000"  # mov 0x218(%rsi), %ebx; mov 0x21c(%rsi), %ecx: the initrd
    "8a03 ee 48ffc3 ffc9 75f6"  # 4: as 3
    "66ba0006 b034 ee ebfe"  # mov $0x600, %dx; mov $0x34, %al; out %al, %dx; jmp .: power-off
)


def kernel() -> bytes:
    """A bzImage of this code, at its 64-bit entry."""
    image = bytearray(bzimage(pref_address=1 << 20, kernel_alignment=1 << 20, init_size=1 << 20))
    entry = len(image) - 2048 + 0x200
    image[entry : entry + len(KERNEL_CODE)] = KERNEL_CODE
    return bytes(image)


LIST_MODULES: Final = bytes.fromhex(
    "8b4b14 8b7318 66baf803"  # mov 20(%ebx), %ecx: mods_count; mov 24(%ebx), %esi: mods_addr; mov $0x3f8, %dx
    "8d4130 ee"  # lea '0'(%ecx), %eax; out %al, %dx
    "85c9 7426"  # 1: test %ecx, %ecx; jz 6f
    "8b3e 3b7e04 7306 8a07 ee 47 ebf5"  # mov (%esi), %edi; 2: cmp 4(%esi), %edi; jae 3f; ...: the module
    "b05b ee 8b7e08"  # 3: mov $'[', %al; out %al, %dx; mov 8(%esi), %edi
    "8a07 84c0 7404 ee 47 ebf6"  # 4: ...: its string
    "b05d ee 83c610 49 ebd6"  # 5: mov $']', %al; out %al, %dx; add $16, %esi; dec %ecx; jmp 1b
    "66ba0006 b034 ee ebfe"  # 6: mov $0x600, %dx; mov $0x34, %al; out %al, %dx; jmp .: power-off
)


def module_lister() -> bytes:
    """A multiboot image that sends how many modules it finds, and of each the content and, in brackets, the string."""
    return _multiboot(LIST_MODULES)


def first_module_sender(length: int) -> bytes:
    """A multiboot image that sends so many bytes of the first module, and powers off."""
    return _multiboot(
        bytes.fromhex("8b7318 8b3e 66baf803 b9")  # mov 24(%ebx), %esi: mods_addr; mov (%esi), %edi; mov $0x3f8, %dx
        + length.to_bytes(4, "little")  # mov $length, %ecx
        + bytes.fromhex("8a07 ee 47 49 75f9")  # 1: mov (%edi), %al; out %al, %dx; inc %edi; dec %ecx; jnz 1b
        + bytes.fromhex("66ba0006 b034 ee ebfe")
    )


def _multiboot(code: bytes) -> bytes:
    magic, flags, at = 0x1BADB002, 1 << 16, 1 << 20
    return struct.pack("<8I", magic, flags, -(magic + flags) % (1 << 32), at, at, 0, 0, at + 32) + code
