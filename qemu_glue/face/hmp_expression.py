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
BLANKS: Final = re.compile(r"\s*")
OCTAL: Final = re.compile("[0-7]+")
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
    """Takes an expression from the front of `text`."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._depth = 0

    @property
    def rest(self) -> str:
        """What is not taken."""
        return self._text[self._at :]

    def level(self, level: int) -> int:
        """Terms between operators of that level."""
        if level == len(LEVELS):
            return self._unary()
        value = self.level(level + 1)
        while (operator := self._next()) and operator in LEVELS[level]:
            self._take(1)
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
        first = self._next()
        if not first:
            raise QmpRefusal("unexpected end of expression")
        if first in "+-~":
            self._take(1)
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
        self._take(1)
        value = self.level(0)
        if self._next() != ")":
            raise QmpRefusal("')' expected")
        self._take(1)
        return value

    def _character(self) -> int:
        character = self._text[self._at + 1 : self._at + 3]
        if character[1:] != "'":
            raise QmpRefusal("missing terminating ' character")
        self._take(3)
        return ord(character[0]) & 0xFF

    def _number(self, first: str) -> int:
        found = NUMBER.match(self._text, self._at)
        if found is None:
            raise QmpRefusal(f"invalid char '{first}' in expression")
        digits = found[0]
        is_octal = digits.startswith("0") and digits.isdigit()
        if is_octal:  # as C's, it ends before an 8 or a 9
            digits = OCTAL.match(digits)[0]  # type: ignore[index]  # it begins with one
        self._take(len(digits))
        if not is_octal and digits.isdigit() and len(digits) > len(str(U64)):  # Python refuses thousands of digits
            raise QmpRefusal("number too large")
        value = int(digits, 8 if is_octal else 0)
        if value >= U64:
            raise QmpRefusal("number too large")
        return value

    def _next(self) -> str:
        """The next character; "" at the end."""
        return self._text[self._at : self._at + 1]

    def _take(self, characters: int) -> None:
        """Take so many, and blanks behind them."""
        self._at = BLANKS.match(self._text, self._at + characters).end()  # type: ignore[union-attr]  # may be none
