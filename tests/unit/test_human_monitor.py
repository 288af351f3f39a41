"""Lines of QEMU's monitor for people: expressions and dumps as QEMU 7.2 has them, and what would be too much.

tests/qemu/test_qmp_as_qemus.py holds the same against a real QEMU.
"""

from __future__ import annotations

import random

import pytest

from qemu_glue.errors import QmpRefusal
from qemu_glue.face.hmp_expression import evaluate
from qemu_glue.face.memory_dump import DumpFormat, dump, parse_format

pytestmark = pytest.mark.row("E15")

MEMORY = bytes(range(0xF0, 0x100)) + bytes(16) + b"ab'\\\n\r\t~\x7f"


@pytest.mark.parametrize(
    ("text", "value", "rest"),
    [
        ("0x10", 16, ""),
        ("010", 8, ""),
        ("089", 0, "89"),
        ("0x", 0, "x"),
        ("12 34", 12, "34"),
        ("1+2*3&1", 1, ""),
        ("6&2+1", 3, ""),
        ("6|2*4", 14, ""),
        ("7^2", 5, ""),
        ("5 + 3", 8, ""),
        ("(16*2-8)/2%7", 5, ""),
        ("-8", 2**64 - 8, ""),
        ("+-+8", 2**64 - 8, ""),
        ("~0", 2**64 - 1, ""),
        ("1-2", 2**64 - 1, ""),
        ("'a'", 97, ""),
        ("0xffffffffffffffff+2", 1, ""),
        ("8)", 8, ")"),
        ("1 + 1 7", 2, "7"),
    ],
)
def test_expressions(text: str, value: int, rest: str) -> None:
    """Numbers in C's spelling, operators by QEMU's ranks; what is behind stays."""
    assert evaluate(text) == (value, rest)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "unexpected end of expression"),
        ("5+", "unexpected end of expression"),
        ("x", "invalid char 'x' in expression"),
        ("5/0", "division by zero"),
        ("5%(1-1)", "division by zero"),
        ("(5", r"'\)' expected"),
        ("$rip", "unknown register"),
        ("'a", "missing terminating ' character"),
        ("0x10000000000000000", "number too large"),
        ("9" * 400, "number too large"),
        ("9" * 5000, "number too large"),
        ("(" * 5000 + "1", "too deep"),
        ("~" * 5000 + "1", "too deep"),
    ],
)
def test_what_is_no_expression(text: str, why: str) -> None:
    """QEMU's words; nothing makes Python give up."""
    with pytest.raises(QmpRefusal, match=why):
        evaluate(text)


def test_any_text_is_an_expression_or_refused() -> None:
    """Nothing else is raised, and a value has 64 bits."""
    chance = random.Random(20)  # noqa: S311  # no secret
    for _ in range(3000):
        text = "".join(chance.choices("0189afx+-*/%&|^~()'$ \t\xb2٣", k=chance.randint(0, 12)))
        try:
            value, _ = evaluate(text)
        except QmpRefusal:
            continue
        assert 0 <= value < 1 << 64


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("3xb", ["0000000000000000: 0xf0 0xf1 0xf2"]),
        ("2xg", ["0000000000000000: 0xf7f6f5f4f3f2f1f0 0xfffefdfcfbfaf9f8"]),
        ("5h", ["0000000000000000: 0xf1f0 0xf3f2 0xf5f4 0xf7f6 0xf9f8"]),
        ("w", ["0000000000000000: 0xf3f2f1f0"]),
        ("1ob", ["0000000000000000: 0360"]),
        ("1dw", ["0000000000000000: 4092785136"]),
        ("1dg", ["0000000000000000:  -579005069656919568"]),
        ("1ug", ["0000000000000000: 17867739004052632048"]),
        ("0x", []),
        ("9xb", ["0000000000000000: 0xf0 0xf1 0xf2 0xf3 0xf4 0xf5 0xf6 0xf7", "0000000000000008: 0xf8"]),
    ],
)
def test_dumps(text: str, lines: list[str]) -> None:
    """Widths, bases and lines of 16 bytes, or 8 by bytes."""
    chosen = parse_format(text, DumpFormat())
    assert list(dump(chosen, 0, lambda at, length: MEMORY[at : at + length])) == lines


def test_characters_are_dumped() -> None:
    """Those that have a shape as they are, the others escaped."""
    (line, last) = dump(parse_format("9cb", DumpFormat()), 32, lambda at, length: MEMORY[at : at + length])
    assert line == r"0000000000000020: 'a' 'b' '\'' '\\' '\n' '\r' '\x09' '~'"
    assert last == r"0000000000000028: '\x7f'"


def test_a_dump_ends_where_there_is_no_memory() -> None:
    """With the address, as of the line's beginning."""
    lines = list(dump(DumpFormat("x", 8, 4), 0x10, lambda at, _length: None if at >= 0x20 else bytes(16)))
    assert lines == [
        "0000000000000010: 0x0000000000000000 0x0000000000000000",
        "0000000000000020: Cannot access memory",
    ]


def test_a_format_that_leaves_out_takes_the_last_one_s() -> None:
    """But for how many."""
    last = parse_format("7ug", DumpFormat())
    assert parse_format("", last) == DumpFormat("u", 8, 1)
    assert parse_format("b", last) == DumpFormat("u", 1, 1)
    assert parse_format("2x", last) == DumpFormat("x", 8, 2)


@pytest.mark.parametrize("text", ["q", "x8", "-3x", "65537x", "9" * 5000 + "x", "5i", "٣x"])
def test_what_is_no_format(text: str) -> None:
    """A mistake, more than is sensible, and instructions, which are not disassembled."""
    with pytest.raises(QmpRefusal):
        parse_format(text, DumpFormat())
