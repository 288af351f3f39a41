"""The search of a guest's memory for its pages, for each GiB, beside a sum of the same memory's words in C."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Final

import pytest

from bench.c_twins import Twins
from bench.comparison import Comparison
from pvclock._search import search_pages

MEMORY_BYTES: Final = 256 << 20
"""Far more than a cache holds."""
PASSES: Final = 4
"""Over that memory in an operation: 1 GiB."""
CHUNK_BYTES: Final = 4 << 20
MEMORY_PAGE: Final = 4096
ROUNDS: Final = 7


def files() -> Iterator[bytes]:
    """This machine's programs and libraries, each filled up to a page of memory, as a guest's page cache has them."""
    for folder in (Path("/usr/lib"), Path("/usr/bin")):
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not file.is_symlink() and os.access(file, os.R_OK):
                content = file.read_bytes()
                yield content + bytes(-len(content) % MEMORY_PAGE)


def zeros() -> bytearray:
    """Memory that a guest has cleared."""
    return bytearray(MEMORY_BYTES)


def random_bytes() -> bytearray:
    """Memory without any order."""
    return bytearray(os.urandom(MEMORY_BYTES))


def contents_of_files() -> bytearray:
    """So much of the files; zeros after their end."""
    memory = bytearray()
    for content in chain(files(), [zeros()]):
        memory.extend(content[: MEMORY_BYTES - len(memory)])
        if len(memory) == MEMORY_BYTES:
            break
    return memory


@pytest.mark.parametrize("kind", [zeros, random_bytes, contents_of_files])
def test_search_of_a_gib(comparison: Comparison, twins: Twins, tsc_hz: int, kind: Callable[[], bytearray]) -> None:
    """search_pages(), as find_pages() calls it."""
    memory = memoryview(kind())

    def search() -> None:
        for begin in [*range(0, MEMORY_BYTES, CHUNK_BYTES)] * PASSES:
            search_pages(memory[begin : begin + CHUNK_BYTES], tsc_hz, 300)

    comparison.measure(
        f"search of 1 GiB, {kind.__name__.replace('_', ' ')}",
        search,
        ("a sum of its words", lambda: [twins.sum_of_words(memory) for _ in range(PASSES)]),
        operations=1,
        rounds=ROUNDS,
        parts=("MiB", PASSES * MEMORY_BYTES >> 20),
    )
