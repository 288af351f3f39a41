"""A hundred thousand damaged states: each is refused by StateFileError, or is another state that can be saved."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pytest

from pvclock import StateFileError
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState, ProviderState
from pvclock.state.json_schema import parse
from tests.saved_states import LEAST, TYPICAL

pytestmark = pytest.mark.stress

MUTATIONS: Final = (20_000, pytest.param(100_000, marks=pytest.mark.long))
FILE_EVERY: Final = 20
"""So many of them go through a file; the rest save the time."""

TOKEN: Final = re.compile(rb'"[^"]*"|-?\d+|true|false|null|[\[\]{}:,]')
NAMES: Final = re.compile(rb'"(\w+)":')
EXTREMES: Final = (
    *(b"0", b"-0", b"-1", b"1", b"2", b"9007199254740993", b"4294967296", b"18446744073709551615"),
    *(b"18446744073709551616", b"-9223372036854775809", b"1e3", b"1.5", b"1e999", b"NaN", b"-Infinity", b"9" * 700),
    *(b"9" * 5000, b"true", b"false", b"null", b'""', b'"\\ud800"', b'"\\u0000"', b"[]", b"{}", b"[1, 0]", b"[1, 3]"),
    *(b"[[[[]]]]", b'{"a": 1, "a": 2}', b'"' + b"x" * 300 + b'"', b"[" * 2000, b"\xff"),
)

Mutation = Callable[[random.Random, bytes], bytes]
Edit = Callable[[random.Random, Any], None]


def flip_bytes(source: random.Random, text: bytes) -> bytes:
    """Change one to four bytes."""
    damaged = bytearray(text)
    for _ in range(source.randint(1, 4)):
        damaged[source.randrange(len(damaged))] ^= (
            1 << source.randrange(8) if source.random() < 0.5 else source.randrange(1, 256)
        )
    return bytes(damaged)


def truncate(source: random.Random, text: bytes) -> bytes:
    """Keep the beginning, or the end."""
    at = source.randrange(len(text))
    return text[:at] if source.random() < 0.7 else text[at:]


def cut_and_repeat(source: random.Random, text: bytes) -> bytes:
    """Leave a piece out, or have it twice."""
    begin = source.randrange(len(text))
    end = min(begin + source.randint(1, 200), len(text))
    return text[:begin] + text[end:] if source.random() < 0.5 else text[:end] + text[begin:]


def swap_tokens(source: random.Random, text: bytes) -> bytes:
    """Let two tokens change places."""
    one, other = sorted(source.sample(list(TOKEN.finditer(text)), 2), key=re.Match.start)
    return b"".join((text[: one.start()], other[0], text[one.end() : other.start()], one[0], text[other.end() :]))


def put_extremes(source: random.Random, text: bytes) -> bytes:
    """Put something extreme in the place of one to three values."""
    for _ in range(source.randint(1, 3)):
        token = source.choice(list(TOKEN.finditer(text)))
        text = text[: token.start()] + source.choice(EXTREMES) + text[token.end() :]
    return text


def rename(source: random.Random, text: bytes) -> bytes:
    """Give a field another name, one that is somewhere else or nowhere."""
    name = source.choice(list(NAMES.finditer(text)))
    names: list[bytes] = NAMES.findall(text)
    other = source.choice([*names, name[1].upper(), name[1] + b"s", name[1][1:], b"", b"\\u0000"])
    return text[: name.start(1)] + other + text[name.end(1) :]


def container_in(source: random.Random, value: Any) -> Any:  # noqa: ANN401  # an object or a list
    """The document, or an object or list in it that is not empty."""
    while source.random() < 0.8:
        members = value.values() if isinstance(value, dict) else value
        within = [each for each in members if isinstance(each, dict | list) and each]
        if not within:
            break
        value = source.choice(within)
    return value


def place(source: random.Random, container: Any) -> Any:  # noqa: ANN401  # a name or a number
    """A member of a container."""
    return source.choice(list(container)) if isinstance(container, dict) else source.randrange(len(container))


def retype(source: random.Random, document: object) -> None:
    """Let a value be of another type, about the same."""
    container = container_in(source, document)
    at = place(source, container)
    value = container[at]
    wrap: list[Callable[[Any], object]] = [str, bool, lambda each: [each], lambda each: {"a": each}, lambda _: None]
    wrap += (
        [float, lambda each: each + 0.5, lambda each: each * 2**64, lambda each: -each]
        if isinstance(value, int)
        else []
    )
    container[at] = source.choice(wrap)(value)


def transplant(source: random.Random, document: object) -> None:
    """Put a value from one place into another."""
    giver, taker = container_in(source, document), container_in(source, document)
    taker[place(source, taker)] = json.loads(json.dumps(giver[place(source, giver)]))


def remove(source: random.Random, document: object) -> None:
    """Leave a field or an element out."""
    container = container_in(source, document)
    del container[place(source, container)]


def edited(edit: Edit) -> Mutation:
    """One or two edits of the parsed document, as text again."""

    def mutate(source: random.Random, text: bytes) -> bytes:
        document = json.loads(text)
        for _ in range(source.randint(1, 2)):
            edit(source, document)
        return json.dumps(document).encode()

    return mutate


KINDS: Final[dict[str, Mutation]] = {
    "flip bytes": flip_bytes,
    "truncate": truncate,
    "cut and repeat": cut_and_repeat,
    "swap tokens": swap_tokens,
    "put extremes": put_extremes,
    "rename": rename,
    "retype": edited(retype),
    "transplant": edited(transplant),
    "remove": edited(remove),
}


def damaged_states(states: list[ClockState]) -> Iterator[tuple[str, bytes]]:
    """Damaged documents for ever, the same ones each time, and how each was damaged."""
    source = random.Random(20_261_121)  # noqa: S311  # a sample, no secret
    texts = [clock_state.to_json(state).encode() for state in states]
    while True:
        kind = source.choice(list(KINDS))
        yield kind, KINDS[kind](source, source.choice(texts))


def outcome(read: Callable[[Any], ClockState], damaged: object) -> ClockState | StateFileError:
    """The state, or why there is none; nothing else may be raised."""
    try:
        return read(damaged)
    except StateFileError as error:
        return error


@pytest.mark.row("E9")
@pytest.mark.parametrize("mutations", MUTATIONS)
def test_damaged_states(tmp_path: Path, mutations: int) -> None:
    """Damaged states raise StateFileError that names a field, or load as a state that saves and loads the same."""
    damage = damaged_states([TYPICAL, LEAST, TYPICAL._replace(slew=None)])
    path = tmp_path / "damaged.json"
    outcomes: Counter[tuple[str, bool]] = Counter()
    fields: set[str] = set()
    with path.open("wb", buffering=0) as file:  # opened once: to empty a file at its opening takes ext4 a millisecond
        for number, (kind, damaged) in enumerate(islice(damage, mutations)):
            if number % FILE_EVERY:
                found = outcome(clock_state.from_json, damaged)
            else:
                file.seek(0)
                file.truncate(file.write(damaged))
                found = outcome(clock_state.read, path)
            outcomes[kind, isinstance(found, ClockState)] += 1
            if isinstance(found, ClockState):
                assert clock_state.from_json(clock_state.to_json(found)) == found
            else:
                assert all((found.field, found.found, found.supported))
                fields.add(found.field)
    assert sum(outcomes.values()) == mutations
    assert all(outcomes[kind, False] > mutations // 50 for kind in KINDS)
    assert sum(outcomes[kind, True] for kind in KINDS) > mutations // 100
    saved = {field.path.replace("[]", "[0]") for field in clock_state.FIELDS if field.kind}
    assert saved <= fields, "the damage did not reach every field"


@pytest.mark.row("style")
def test_damage_finds_a_reader_that_checks_too_little() -> None:
    """The same damage makes a reader fail that checks names, but not what they stand for."""

    def careless(damaged: Any) -> ClockState:  # noqa: ANN401  # bytes
        document = parse(damaged)
        if not isinstance(document, dict) or set(document) != set(ClockState._fields):
            raise StateFileError("file", "other names", "those of ClockState")
        provider = ProviderState(**document["provider"])
        return clock_state.from_mapping(document)._replace(provider=provider)

    damage = [damaged for _, damaged in islice(damaged_states([TYPICAL]), 1000)]
    with pytest.raises((TypeError, AttributeError, KeyError)):
        list(map(partial(outcome, careless), damage))
