"""QMP's stream of JSON: values over lines and pieces, and what becomes of what is none."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_glue.errors import QmpRefusal
from qemu_glue.face.json_stream import MESSAGE_BYTES_MAX, NESTING_MAX, JsonStream

pytestmark = pytest.mark.row("E15")

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
OBJECTS = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5)
PIECES = (
    b'{}[],:"',
    b"'\\",
    b"true",
    b"12",
    b"-",
    b" ",
    b"\n",
    b"\x00",
    b"\xff",
    b"\xc3\xa9",
    b'"x"',
    b'{"execute":"q"}',
)
SOUP = st.lists(st.sampled_from([*PIECES, *(bytes([each]) for each in b'{}[],:"')]), max_size=30).map(b"".join)


def fed(*pieces: bytes) -> list[object]:
    """What comes of these pieces; errors by their text."""
    stream = JsonStream()
    found = [value for piece in pieces for value in stream.feed(piece)]
    return [str(value) if isinstance(value, QmpRefusal) else value for value in found]


@given(values=OBJECTS, cuts=st.lists(st.integers(0, 200)), indent=st.sampled_from([None, 1]))
def test_values_come_whole_however_they_are_cut(values: list[Any], cuts: list[int], indent: int | None) -> None:
    """Over several lines, several on one, and in pieces of any size."""
    text = "".join(json.dumps(value, indent=indent) for value in values).encode()
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    assert fed(*(text[begin:end] for begin, end in pairwise(places))) == values


@given(soup=SOUP)
def test_pieces_make_no_difference(soup: bytes) -> None:
    """Any bytes give byte by byte what they give at once."""
    assert fed(*(bytes([each]) for each in soup)) == fed(soup)


@given(soup=SOUP)
def test_after_any_bytes_a_client_can_begin_anew(soup: bytes) -> None:
    """A byte 0xff, sent as often as strings may be open, and what follows is taken."""
    *_, last = fed(soup, b"\xff\n\xff\n", b'{"execute":"query-status"}\n')
    assert last == {"execute": "query-status"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"a"\n:\n1}{"b":2}', [{"a": 1}, {"b": 2}]),
        (b"{'it\\'s': 'a \"word\"'}", [{"it's": 'a "word"'}]),
        (b'[] 3 "x" null ', [[], 3, "x", None]),
        (b'{"a":1', []),
        (b'"unended', []),
        (b"}", ["JSON parse error, expecting value"]),
        (b'{"a" 3}', ["JSON parse error, expecting ':' delimiter"]),
        (b'{"a":1,"a":2}', ["JSON parse error, duplicate key"]),
        (b'{"a":NaN}', ["JSON parse error, invalid keyword 'NaN'"]),
        (b'{"a":"\xff"}', ["JSON parse error, invalid UTF-8 sequence in string"]),
        (b"\x01\x02 abc\n{}", ["JSON parse error, stray '\\uFFFD'", {}]),
        (b"%garbage, {}", ["JSON parse error, stray '%'", "JSON parse error, expecting value", {}]),
    ],
)
def test_what_is_taken_and_what_is_not(text: bytes, expected: list[object]) -> None:
    """Each broken value is one error, and the next one is taken."""
    assert fed(text) == expected


def test_limits() -> None:
    """What nests too deep or is too long is an error, before it is in the memory as a whole."""
    assert fed(b"[" * NESTING_MAX + b"]" * NESTING_MAX + b"{}")[1:] == [{}]
    assert fed(b"[" * (NESTING_MAX + 1))[0] == "JSON nesting depth limit exceeded"
    stream = JsonStream()
    errors = [value for _ in range(20) for value in stream.feed(b"x" * (MESSAGE_BYTES_MAX // 4))]
    assert 1 <= len(errors) <= 20
    assert len(stream._unread) <= MESSAGE_BYTES_MAX  # that it is bounded is what is claimed
    assert fed(b'{"a":"' + b"x" * MESSAGE_BYTES_MAX + b'"}')[0] == "JSON token size limit exceeded"
