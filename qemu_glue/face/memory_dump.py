"""`xp /FORMAT ADDRESS`: guest-physical memory as QEMU's monitor for people prints it.

Source: QEMU's monitor/misc.c (memory_dump) and monitor/hmp.c (formats; what one leaves out is as in the last one).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from qemu_glue.errors import QmpRefusal

__all__ = ["DumpFormat", "dump", "parse_format"]

FORMAT: Final = re.compile(r"([0-9]*)([oxudicbhwgL]*)")
SIZES: Final = {"b": 1, "h": 2, "w": 4, "g": 8, "L": 8}
ITEMS_MAX: Final = 1 << 16
"""Ours: QEMU's monitor would be busy for as long as it takes."""
ESCAPES: Final = {ord(each): f"\\{name}" for each, name in {"'": "'", "\\": "\\", "\n": "n", "\r": "r"}.items()}


class DumpFormat(NamedTuple):
    """letter: o, x, u, d or c.  size: of an item in bytes.  items: how many."""

    letter: str = "x"
    size: int = 4
    items: int = 1


def parse_format(text: str, last: DumpFormat) -> DumpFormat:
    """What stands behind the slash; a QmpRefusal if it is no format."""
    found = FORMAT.match(text)
    assert found is not None  # noqa: S101  # it may be empty
    if found.end() < len(text):
        raise QmpRefusal(f"invalid char in format: '{text[found.end()]}'")
    letter, size = last.letter, last.size
    for each in found[2]:
        if each in SIZES:
            size = SIZES[each]
        else:
            letter = each
    if letter == "i":
        raise QmpRefusal("instructions are not disassembled here; dump them by /xb")
    digits = found[1].lstrip("0")
    if len(digits) > len(str(ITEMS_MAX)) or int(digits or 0) > ITEMS_MAX:
        raise QmpRefusal(f"too many items; dump {ITEMS_MAX} or fewer, or save them by pmemsave")
    count = int(digits or 0) if found[1] else 1
    return DumpFormat(letter, size, count)


def dump(chosen: DumpFormat, address: int, read: Callable[[int, int], bytes | None]) -> Iterator[str]:
    """Its lines.  read: called with an address and a length; None ends the dump there."""
    left = chosen.size * chosen.items
    line_bytes = 8 if chosen.size == 1 else 16
    size = 1 if chosen.letter == "c" else chosen.size
    while left > 0:
        length = min(left, line_bytes)
        data = read(address, length)
        if data is None:
            yield f"{address:016x}: Cannot access memory"
            return
        items = (int.from_bytes(data[at : at + size], "little") for at in range(0, length, size))
        yield " ".join((f"{address:016x}:", *(_shown(chosen.letter, size, item) for item in items)))
        address = (address + length) % (1 << 64)
        left -= length


def _shown(letter: str, size: int, item: int) -> str:
    """As QEMU has it: d is signed for items of 8 bytes alone."""
    bits = size * 8
    match letter:
        case "o":
            return (f"0{item:o}" if item else "0").rjust(-(-bits // 3))
        case "c":
            return f"'{_character(item)}'"
        case "u" | "d":
            value = item - (1 << 64) if letter == "d" and item >> 63 else item
            return str(value).rjust(-(-bits * 10 // 33))
    return f"0x{item:0{bits // 4}x}"


def _character(item: int) -> str:
    if item in ESCAPES:
        return ESCAPES[item]
    return chr(item) if 32 <= item <= 126 else f"\\x{item:02x}"
