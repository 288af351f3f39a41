"""A guest's console as output: all of it, to a reader that may be slow, or gone; and a kernel's panic in it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pvclock.commands.guest_console import LINE_KEPT_BYTES, GuestConsole
from tests.waiting import HANG_S, alarm_after

pytestmark = pytest.mark.row("E22")

"""For what takes some ms: less than mutants have, so that one that waits for ever fails here."""
MORE_THAN_A_PIPE_HOLDS = bytes(range(256)) * 300


class Piped(NamedTuple):
    """A console, and the end of a pipe from which its output is read."""

    console: GuestConsole
    reads: int


@pytest.fixture
def piped() -> Iterator[Piped]:
    """One whose test is over after a while, whatever happens."""
    reads, writes = os.pipe()
    with alarm_after(HANG_S), GuestConsole(writes) as console:
        yield Piped(console, reads)
    for end in (reads, writes):
        with contextlib.suppress(OSError):  # the test has closed it
            os.close(end)


def test_a_slow_reader_gets_all_of_it(piped: Piped) -> None:
    """The guest waits meanwhile."""
    writing = threading.Thread(target=piped.console.write, args=(MORE_THAN_A_PIPE_HOLDS,))
    writing.start()
    got = b""
    while len(got) < len(MORE_THAN_A_PIPE_HOLDS):
        got += os.read(piped.reads, 1 << 16)
    writing.join()
    assert got == MORE_THAN_A_PIPE_HOLDS


def test_a_reader_that_does_not_read_holds_nobody_up(piped: Piped) -> None:
    """After give_up() the guest goes on at once, and what has no place is lost."""
    piped.console.give_up()
    piped.console.write(MORE_THAN_A_PIPE_HOLDS)
    got = os.read(piped.reads, 1 << 20)
    assert 0 < len(got) < len(MORE_THAN_A_PIPE_HOLDS)
    assert got == MORE_THAN_A_PIPE_HOLDS[: len(got)]


def test_giving_up_ends_a_wait(piped: Piped) -> None:
    """That of another thread."""
    writing = threading.Thread(target=piped.console.write, args=(MORE_THAN_A_PIPE_HOLDS,), daemon=True)
    writing.start()
    os.read(piped.reads, 1)
    piped.console.give_up()
    writing.join()


def test_what_a_reader_takes_after_that(piped: Piped) -> None:
    """Where there is room nothing is lost."""
    piped.console.give_up()
    piped.console.write(b"the end")
    assert os.read(piped.reads, 100) == b"the end"


def test_a_reader_that_is_gone(piped: Piped) -> None:
    """An error, which ends the run."""
    os.close(piped.reads)
    with pytest.raises(BrokenPipeError):
        piped.console.write(b"text")


def test_a_file(tmp_path: Path) -> None:
    """It always takes all."""
    path = tmp_path / "console"
    with path.open("wb") as file, GuestConsole(file.fileno()) as console:
        console.write(MORE_THAN_A_PIPE_HOLDS)
    assert path.read_bytes() == MORE_THAN_A_PIPE_HOLDS


@pytest.mark.parametrize(
    ("said", "panic"),
    [
        (b"[ 1.0] Kernel panic - not syncing: VFS\r\nmore\n", "Kernel panic - not syncing: VFS"),
        (b"Kernel panic - one\nKernel panic - two\n", "Kernel panic - two"),
        (b"Kernel panic - not ended", ""),
        (b"Kernel\n panic - \n", ""),
        (b"x" * (2 * LINE_KEPT_BYTES) + b"Kernel panic - late\n", "Kernel panic - late"),
        (b"Kernel panic - \xff\n", "Kernel panic - \ufffd"),
    ],
    ids=["a-panic", "two", "no-end", "two-lines", "a-long-line", "no-text"],
)
def test_a_panic_is_found(said: bytes, panic: str, piped: Piped) -> None:
    """The last line that tells of one, from its words on, in whatever pieces it comes."""
    for byte in said:
        piped.console.write(bytes([byte]))
    assert piped.console.panic == panic


@pytest.mark.row("E17")
def test_lines_are_told() -> None:
    """Each once it has ended, with its end; of a long one the last bytes."""
    lines: list[bytes] = []
    reads, writes = os.pipe()
    with GuestConsole(writes, lines.append) as console:
        for byte in b"one\r\ntwo\n" + bytes(2 * LINE_KEPT_BYTES) + b"!\nnot":
            console.write(bytes([byte]))
    os.close(reads)
    os.close(writes)
    assert lines[:2] == [b"one\r\n", b"two\n"]
    assert lines[2].endswith(b"\0!\n")
    assert len(lines) == 3
