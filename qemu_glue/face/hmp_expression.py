"""Expressions for addresses, as QEMU's monitor for people takes them: numbers, + - * / % & | ^ ~, brackets, characters.

64 bits wide; * / % bind before & | ^, and these before + and -, from the left.  Source: QEMU's monitor/hmp.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from qemu_glue.errors import QmpRefusal

__all__ = ["evaluate"]

U64: Final = 1 << 64
DEPTH_MAX: Final = 32
NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F]+|[0-9]+")
LEVELS: Final = ("+-", "&|^", "*/%")
"""From those that bind last."""
OPERATIONS: Final[dict[str, Callable[[int, int], int]]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
    "%": lambda a, b: a % b,
}


def evaluate(text: str) -> tuple[int, str]:
    """The expression that `text` begins with, modulo 2^64, and what is behind it; a QmpRefusal in QEMU's words."""
    parser = _Parser(text.lstrip())
    return parser.level(0), parser.rest


class _Parser:
    """Takes an expression from the front of `rest`."""

    def __init__(self, text: str) -> None:
        self.rest = text
        self._depth = 0

    def level(self, level: int) -> int:
        """Terms between operators of that level."""
        if level == len(LEVELS):
            return self._unary()
        value = self.level(level + 1)
        while self.rest and self.rest[0] in LEVELS[level]:
            operator = self._take(self.rest[0])
            right = self.level(level + 1)
            if operator in "/%" and right == 0:
                raise QmpRefusal("division by zero")
            value = OPERATIONS[operator](value, right) % U64
        return value

    def _unary(self) -> int:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise QmpRefusal("the expression is too deep")
        value = self._term()
        self._depth -= 1
        return value % U64

    def _term(self) -> int:
        first = self.rest[:1]
        if not first:
            raise QmpRefusal("unexpected end of expression")
        if first in "+-~":
            self._take(first)
            value = self._unary()
            return {"+": value, "-": -value, "~": ~value}[first]
        if first == "(":
            return self._bracketed()
        if first == "'":
            return self._character()
        if first == "$":
            raise QmpRefusal("unknown register")
        return self._number(first)

    def _bracketed(self) -> int:
        self._take("(")
        value = self.level(0)
        if not self.rest.startswith(")"):
            raise QmpRefusal("')' expected")
        self._take(")")
        return value

    def _character(self) -> int:
        if len(self.rest) < 3 or self.rest[2] != "'":
            raise QmpRefusal("missing terminating ' character")
        return ord(self._take(self.rest[:3])[1]) & 0xFF

    def _number(self, first: str) -> int:
        found = NUMBER.match(self.rest)
        if found is None:
            raise QmpRefusal(f"invalid char '{first}' in expression")
        digits = found[0]
        if digits.startswith("0") and digits.isdigit():  # C's octal ends before an 8 or a 9
            digits = re.match("[0-7]+", digits)[0]  # type: ignore[index]  # it begins with one
        self._take(digits)
        value = int(digits, 8 if digits.startswith("0") and digits.isdigit() else 0)
        if value >= U64:
            raise QmpRefusal("number too large")
        return value

    def _take(self, text: str) -> str:
        self.rest = self.rest[len(text) :].lstrip()
        return text
