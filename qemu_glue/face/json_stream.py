"""A stream of JSON values as QEMU's monitor reads one: over any number of lines, several on one, in pieces of any size.

What is no JSON costs its client an error, and the stream goes on behind it.  As QEMU's it takes strings in single
quotes, and a byte 0xff to begin anew; a key may come once in an object.  Source: qobject/json-lexer.c,
json-streamer.c, json-parser.c.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from qemu_glue.errors import QmpRefusal

__all__ = ["MESSAGE_BYTES_MAX", "NESTING_MAX", "JsonStream"]

MESSAGE_BYTES_MAX: Final = 1 << 20
"""Of one value: QEMU takes 64 MiB, and no command of ours needs so much."""
NESTING_MAX: Final = 256
"""QEMU takes 1024, which Python's parser does not."""

# Possessive (++, *+): what is a string so far is not tried again character by character where its end is not there yet.
TOKEN: Final = re.compile(
    rb"""(?P<space>[ \t\r\n]+) | (?P<open>[{\[]) | (?P<close>[}\]]) | (?P<between>[,:])
       | (?P<string>"(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+" | '(?:[^'\\\x00-\x1f]++|\\[^\x00-\x1f])*+')
       | (?P<word>[-+.0-9A-Za-z_]+)""",
    re.VERBOSE,
)
UNENDED_STRING: Final = re.compile(
    rb"""(?:"(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+\\? | '(?:[^'\\\x00-\x1f]++|\\[^\x00-\x1f])*+\\?)\Z""", re.VERBOSE
)
ESCAPED_QUOTE: Final = re.compile(rb"""\\' | " | \\.""", re.VERBOSE | re.DOTALL)
RECOVERED: Final = re.compile(rb"[\n\xff{}\[\],:]")
BEGIN_ANEW: Final = 0xFF


class JsonStream:
    """Takes bytes, and gives the values that are whole; a QmpRefusal in place of what is none."""

    def __init__(self) -> None:
        self._begin_anew()
        self._unread = b""
        self._is_lost = False
        """Is what comes next left out, as what belongs to a broken token?"""

    def feed(self, data: bytes) -> Iterator[object]:
        """The values and the errors that these bytes bring to an end; to be run to its end."""
        text = self._unread + data
        at = self._recovered(text, 0) if self._is_lost else 0
        while at < len(text):
            match = TOKEN.match(text, at)
            if _may_go_on(text, at, match):
                break
            if match is not None:
                yield from self._take(match)
                at = match.end()
            else:
                self._begin_anew()
                yield _parse_error(f"stray {_shown(text[at])}")
                at = self._recovered(text, at + 1) if text[at] != BEGIN_ANEW else at + 1
        self._unread = text[at:]

    # Inside

    def _begin_anew(self) -> None:
        self._tokens: list[bytes] = []
        self._bytes = self._depth = 0

    def _recovered(self, text: bytes, begin: int) -> int:
        """Where to go on after a byte that began no token, as QEMU's lexer recovers."""
        found = RECOVERED.search(text, begin)
        self._is_lost = found is None
        return len(text) if found is None else found.start()

    def _take(self, match: re.Match[bytes]) -> Iterator[object]:
        """Take a token; the value that ends with it."""
        kind, token = match.lastgroup, match[0]
        if kind == "space":
            return
        self._tokens.append(_double_quoted(token) if token[:1] == b"'" else token)
        self._bytes += len(token)
        self._depth += {"open": 1, "close": -1}.get(kind or "", 0)
        if self._depth > NESTING_MAX or self._bytes > MESSAGE_BYTES_MAX:
            what = "nesting depth" if self._depth > NESTING_MAX else "token size"
            self._begin_anew()
            yield QmpRefusal(f"JSON {what} limit exceeded")
        elif self._depth <= 0:
            tokens = self._tokens
            self._begin_anew()
            yield _value(tokens)


def _may_go_on(text: bytes, at: int, token: re.Match[bytes] | None) -> bool:
    """Does the text end amid a token, for all that is known?"""
    if len(text) - at > MESSAGE_BYTES_MAX:
        return False
    if token is None:
        return UNENDED_STRING.match(text, at) is not None
    return token.lastgroup == "word" and token.end() == len(text)


def _shown(byte: int) -> str:
    return f"'{chr(byte)}'" if 0x20 <= byte < 0x7F else "'\\uFFFD'"


def _value(tokens: list[bytes]) -> object:
    """What the tokens of one value are; a QmpRefusal if they are none."""
    try:
        text = b" ".join(tokens).decode()
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_word)
    except UnicodeDecodeError:
        return _parse_error("invalid UTF-8 sequence in string")
    except json.JSONDecodeError as error:
        return _parse_error(error.msg[:1].lower() + error.msg[1:])
    except ValueError as error:  # of the functions below, or a number of thousands of digits
        return _parse_error(str(error))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")  # _value() takes it
    return found


def _refuse_word(word: str) -> object:
    raise ValueError(f"invalid keyword '{word}'")  # _value() takes it


def _double_quoted(token: bytes) -> bytes:
    """A string in single quotes, as JSON has it."""
    return b'"' + ESCAPED_QUOTE.sub(lambda it: {b"\\'": b"'", b'"': b'\\"'}.get(it[0], it[0]), token[1:-1]) + b'"'


def _parse_error(why: str) -> QmpRefusal:
    return QmpRefusal(f"JSON parse error, {why}")
