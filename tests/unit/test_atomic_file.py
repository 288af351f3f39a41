"""Files that are replaced as a whole, chunk by chunk."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvclock.state import atomic_file

CHUNK = bytes(range(256)) * 4096  # 1 MiB
CHUNKS = 64


@pytest.mark.row("P-25")
def test_a_file_far_larger_than_what_is_held_of_it(tmp_path: Path) -> None:
    """64 MiB go out and come back by chunks of 1 MiB, and never are more than a few of them in memory."""
    path = tmp_path / "ram"
    tracemalloc.start()
    try:
        atomic_file.replace(path, (CHUNK for _ in range(CHUNKS)))
        with atomic_file.reading(path) as chunks:
            assert sum(chunk == CHUNK for chunk in chunks) == CHUNKS
        assert tracemalloc.get_traced_memory()[1] < 4 * len(CHUNK)
    finally:
        tracemalloc.stop()


@pytest.mark.row("P-25")
def test_content_that_fails_leaves_the_file(tmp_path: Path) -> None:
    """The error of a chunk comes out; the file is as it was, nothing is left beside it, and the next write works."""
    path = tmp_path / "ram"
    atomic_file.replace(path, [b"before"])

    def failing() -> Iterator[bytes]:
        yield CHUNK
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        atomic_file.replace(path, failing())
    assert [file.name for file in tmp_path.iterdir()] == ["ram"]
    assert atomic_file.read(path, 100) == b"before"
    atomic_file.replace(path, [b"", b"af", b"ter"])
    assert atomic_file.read(path, 3) == b"aft"
