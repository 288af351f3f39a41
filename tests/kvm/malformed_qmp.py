"""Inputs that are no QMP, or almost some: by a seed, as many as wanted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any, Final

__all__ = ["malformed"]

NAMES: Final = (
    *("query-status", "query-version", "query-cpus-fast", "query-commands", "stop", "cont", "system_reset"),
    *("x-pvclock-query", "x-pvclock-skip", "x-pvclock-set-rate", "x-pvclock-slew", "x-pvclock-set-policy"),
    *("x-pvclock-follow", "qom-list", "qom-get", "qom-list-types", "human-monitor-command", "qmp_capabilities"),
    *("pmemsave", "memsave", "query-qmp-schema", "quit", "migrate", "device_add", "", "\0", "🕰"),
)
KEYS: Final = (
    *("ns", "numerator", "denominator", "max-ppm", "policy", "reference", "path", "property", "command-line"),
    *("val", "size", "filename", "cpu-index", "typename", "implements", "enable", "value", "", "é"),
)
WRONG: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1.5, 1e308, 2**63, -(2**63) - 1, 2**64, 10**40, "", "x", "\0", "/", "🕰" * 50),
    *([], [[]], {}, {"a": {}}, [None], "a" * 5000, "xp /1000000x 0", "xp /x 1/0", "info registers 99", "\ud800"),
)
JUNK: Final = (*(bytes([each]) for each in b"{}[]:,\"'\\\xff\x00\n%-"), b"nul", b"1e")
WHOLE: Final = tuple(json.dumps({"execute": name}).encode() for name in NAMES if name not in ("pmemsave", "memsave"))
"""What may come out right when it is changed: nothing that writes a file."""


def malformed(seed: int, count: int) -> Iterator[bytes]:
    """So many inputs, of all kinds in turn."""
    generator = random.Random(seed)  # noqa: S311  # the same ones each time
    kinds: tuple[Callable[[random.Random], bytes], ...] = (_bytes, _junk, _changed, _no_command, _wrong_arguments)
    for number in range(count):
        yield kinds[number % len(kinds)](generator)


# Inside


def _bytes(generator: random.Random) -> bytes:
    """Any bytes."""
    return generator.randbytes(generator.randrange(40))


def _junk(generator: random.Random) -> bytes:
    """Pieces of JSON in any order."""
    return b"".join(generator.choices(JUNK, k=generator.randrange(20)))


def _changed(generator: random.Random) -> bytes:
    """A command with some bytes more, less or other."""
    text = bytearray(generator.choice(WHOLE))
    for _ in range(generator.randrange(1, 4)):
        at = generator.randrange(len(text))
        text[at : at + generator.randrange(3)] = generator.randbytes(generator.randrange(3))
        text = text or bytearray(b"x")
    return bytes(text)


def _no_command(generator: random.Random) -> bytes:
    """JSON that is no request, or has members that none has."""
    value = generator.choice(WRONG)
    shapes = (value, [value], {"execute": value}, {"exec": "stop"}, {"execute": "stop", generator.choice(KEYS): value})
    return json.dumps(generator.choice(shapes)).encode() + b" "


def _wrong_arguments(generator: random.Random) -> bytes:
    """A command with arguments of which one at least is not its own."""
    given = {generator.choice(KEYS): generator.choice(WRONG) for _ in range(generator.randrange(4))}
    request = {"execute": generator.choice(NAMES), "arguments": {**given, "no-such": 1}, "id": generator.choice(WRONG)}
    return json.dumps(request).encode()
