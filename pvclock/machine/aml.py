"""ACPI Machine Language, as much of it as our DSDT needs: each function encodes one term.

Source: ACPI Specification 6.5, chapter 20 (AML) and section 6.4 (resource descriptors).
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = [
    "ARG0",
    "buffer",
    "call",
    "device",
    "eisa_id",
    "equal",
    "field",
    "if_then",
    "increment",
    "integer",
    "interrupt",
    "io_ports",
    "io_region",
    "less",
    "level_interrupt",
    "method",
    "name",
    "notify",
    "package",
    "reference",
    "resources",
    "return_value",
    "scope",
    "store",
    "text",
    "while_loop",
]

ZERO_OP: Final = b"\x00"
ONE_OP: Final = b"\x01"
NAME_OP: Final = b"\x08"
BYTE_PREFIX: Final = b"\x0a"
WORD_PREFIX: Final = b"\x0b"
DWORD_PREFIX: Final = b"\x0c"
STRING_PREFIX: Final = b"\x0d"
SCOPE_OP: Final = b"\x10"
BUFFER_OP: Final = b"\x11"
PACKAGE_OP: Final = b"\x12"
METHOD_OP: Final = b"\x14"
ARG0: Final = b"\x68"
"""The first argument of the present method."""
STORE_OP: Final = b"\x70"
INCREMENT_OP: Final = b"\x75"
NOTIFY_OP: Final = b"\x86"
EQUAL_OP: Final = b"\x93"
LESS_OP: Final = b"\x95"
IF_OP: Final = b"\xa0"
WHILE_OP: Final = b"\xa2"
RETURN_OP: Final = b"\xa4"
REGION_OP: Final = b"\x5b\x80"
FIELD_OP: Final = b"\x5b\x81"
DEVICE_OP: Final = b"\x5b\x82"

ONE_BYTE_LENGTH_MAX: Final = 0x3F

IO_PORTS: Final = 0x47
"""A small descriptor, type 8 (I/O port), with 7 bytes behind it."""
DECODES_16_BITS: Final = 1
INTERRUPT: Final = 0x89
"""A large descriptor, type 9 (extended interrupt)."""
CONSUMER_EDGE_HIGH_EXCLUSIVE: Final = 0b0011
"""Bit 0: the device consumes it; bit 1: edge-triggered; bit 2: active low, not set; bit 3: shared, not set."""
CONSUMER_LEVEL_HIGH_EXCLUSIVE: Final = 0b0001
SYSTEM_IO: Final = 1
WORD_ACCESS: Final = 2
"""Of a field; also: no lock, and the other bits of the word are preserved."""
SERIALIZED: Final = 1 << 3
"""Of a method: one call at a time."""
END_TAG: Final = b"\x79\x00"
"""A small descriptor, type 15; a checksum of 0 is not looked at."""


def integer(value: int) -> bytes:
    """A number of up to 32 bits, in its shortest form, as iasl writes it."""
    if value < 2:  # the two numbers that have opcodes
        return ONE_OP if value else ZERO_OP
    if value <= 0xFF:  # what fits into each kind
        return BYTE_PREFIX + value.to_bytes(1, "little")
    if value <= 0xFFFF:
        return WORD_PREFIX + value.to_bytes(2, "little")
    return DWORD_PREFIX + value.to_bytes(4, "little")


def text(value: str) -> bytes:
    """A string of ASCII."""
    return STRING_PREFIX + value.encode("ascii") + b"\0"


def eisa_id(identifier: str) -> bytes:
    """EisaId("PNP0501"): three letters of 5 bits, then four hexadecimal digits, highest bits first."""
    letters = 0
    for letter in identifier[:3]:
        letters = letters << 5 | ord(letter) - ord("@")
    return DWORD_PREFIX + struct.pack(">HH", letters, int(identifier[3:], 16))


def name(path: str, value: bytes) -> bytes:
    """Name(path, value)."""
    return NAME_OP + _path(path) + value


def package(*elements: bytes) -> bytes:
    """Package(){elements}."""
    return PACKAGE_OP + _with_length(bytes([len(elements)]) + b"".join(elements))


def scope(path: str, *terms: bytes) -> bytes:
    """Scope(path){terms}."""
    return SCOPE_OP + _with_length(_path(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device(path){terms}."""
    return DEVICE_OP + _with_length(_path(path) + b"".join(terms))


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate(){descriptors}: a buffer with the end tag behind them."""
    return buffer(b"".join(descriptors) + END_TAG)


def buffer(content: bytes) -> bytes:
    """Buffer(){content}."""
    return BUFFER_OP + _with_length(integer(len(content)) + content)


def io_ports(first: int, count: int) -> bytes:
    """IO(Decode16, first, first, 1, count): these ports and no others."""
    return struct.pack("<BBHHBB", IO_PORTS, DECODES_16_BITS, first, first, 1, count)


def interrupt(gsi: int) -> bytes:
    """Interrupt(ResourceConsumer, Edge, ActiveHigh, Exclusive){gsi}."""
    return _interrupt(CONSUMER_EDGE_HIGH_EXCLUSIVE, gsi)


def level_interrupt(gsi: int) -> bytes:
    """Interrupt(ResourceConsumer, Level, ActiveHigh, Exclusive){gsi}."""
    return _interrupt(CONSUMER_LEVEL_HIGH_EXCLUSIVE, gsi)


def io_region(path: str, first: int, count: int) -> bytes:
    """OperationRegion(path, SystemIO, first, count)."""
    return REGION_OP + _path(path) + bytes([SYSTEM_IO]) + integer(first) + integer(count)


def field(region: str, path: str) -> bytes:
    """Field(region, WordAcc, NoLock, Preserve){path, 16}: the first word of a region."""
    return FIELD_OP + _with_length(_path(region) + bytes([WORD_ACCESS]) + _path(path) + bytes([16]))


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """Method(path, arguments, Serialized){terms}."""
    return METHOD_OP + _with_length(_path(path) + bytes([arguments | SERIALIZED]) + b"".join(terms))


def reference(path: str) -> bytes:
    """What has that name here or in a scope around."""
    return _path(path)


def call(path: str, *arguments: bytes) -> bytes:
    """path(arguments), of a method that stands before it."""
    return _path(path) + b"".join(arguments)


def store(value: bytes, target: bytes) -> bytes:
    """Store(value, target)."""
    return STORE_OP + value + target


def increment(target: bytes) -> bytes:
    """Increment(target)."""
    return INCREMENT_OP + target


def notify(path: str, event: int) -> bytes:
    """Notify(path, event)."""
    return NOTIFY_OP + _path(path) + integer(event)


def less(first: bytes, second: bytes) -> bytes:
    """LLess(first, second)."""
    return LESS_OP + first + second


def equal(first: bytes, second: bytes) -> bytes:
    """LEqual(first, second)."""
    return EQUAL_OP + first + second


def if_then(condition: bytes, *terms: bytes) -> bytes:
    """If(condition){terms}."""
    return IF_OP + _with_length(condition + b"".join(terms))


def while_loop(condition: bytes, *terms: bytes) -> bytes:
    """While(condition){terms}."""
    return WHILE_OP + _with_length(condition + b"".join(terms))


def return_value(value: bytes) -> bytes:
    """Return(value)."""
    return RETURN_OP + value


def _interrupt(flags: int, gsi: int) -> bytes:
    content = struct.pack("<BBI", flags, 1, gsi)
    return struct.pack("<BH", INTERRUPT, len(content)) + content


def _path(path: str) -> bytes:
    """A name in the present scope: four characters, filled up with underscores."""
    return path.ljust(4, "_").encode("ascii")


def _with_length(content: bytes) -> bytes:
    """PkgLength, which counts itself, and the content.

    Of up to 63 bytes it is one byte.  Else bits 6 and 7 of the first say how many follow, its low 4 bits are the
    length's lowest, and the others follow, the lowest first.
    """
    if len(content) + 1 <= ONE_BYTE_LENGTH_MAX:
        return bytes([len(content) + 1]) + content
    more = next(count for count in (1, 2, 3) if len(content) + 1 + count < 1 << 4 + 8 * count)
    length = len(content) + 1 + more
    return bytes([more << 6 | length & 0xF]) + (length >> 4).to_bytes(more, "little") + content
