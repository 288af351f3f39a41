"""Another process's memory, read in few system calls; and errors that say what helps."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from mmap import PAGESIZE
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import _process_memory
from pvclock._process_memory import present_pages, read_files, read_process, read_process_range
from pvclock.errors import MemoryNotReadable, RangeError, VmEnded
from tests.unit.known_memory import CONTENT, LENGTH
from tests.unit.known_process import KnownProcess, as_nobody, known_process, needs_root

pytestmark = pytest.mark.row("E3")

NO_PID = 2**22 + 1
"""Beyond Linux's largest."""


@pytest.fixture(scope="module")
def known() -> Iterator[KnownProcess]:
    """Return a process with known memory."""
    with known_process() as process:
        yield process


@given(st.data(), st.integers(1, 3 * PAGESIZE))
def test_any_places_are_read(known: KnownProcess, data: st.DataObject, length: int) -> None:
    """Each place's bytes come back in order, however long and wherever they are."""
    places = data.draw(st.lists(st.integers(0, LENGTH - length), max_size=20))
    for begin in (known.private, known.shared):
        found = read_process(known.pid, [begin + place for place in places], length)
        assert found == [CONTENT[place : place + length] for place in places]


def test_more_places_than_one_call_takes(known: KnownProcess) -> None:
    """IOV_MAX is 1024: the rest comes by further calls, in order."""
    places = range(0, LENGTH - 32, 97)
    assert len(places) > 10_000
    found = read_process(known.pid, [known.private + place for place in places], 32)
    assert found == [CONTENT[place : place + 32] for place in places]


def test_a_long_piece_is_read(known: KnownProcess) -> None:
    """All of a mapping in one call."""
    assert read_process_range(known.pid, known.shared, LENGTH) == CONTENT


def test_places_of_files_are_read_in_order(known: KnownProcess) -> None:
    """Of several files; what is beyond the end of one, or not open, is an error that says so."""
    files = [os.open(f"/proc/{known.pid}/fd/{known.shared_fd}", os.O_RDONLY), os.memfd_create("other")]
    os.write(files[1], b"0123456789")
    places = [(files[0], LENGTH - 4), (files[1], 3), (files[0], PAGESIZE)]
    assert read_files(places, 4) == [CONTENT[-4:], b"3456", CONTENT[PAGESIZE : PAGESIZE + 4]]
    with pytest.raises(OSError, match="No data available"):
        read_files([(files[1], 3), (files[1], 7)], 4)
    for fd in files:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_files([(files[0], 0)], 4)


@pytest.mark.parametrize("before", [0, 1, 1023, 1024, 3000])
def test_the_address_that_cannot_be_read_is_named(known: KnownProcess, before: int) -> None:
    """However many were read before it, in this batch or in another."""
    with pytest.raises(MemoryNotReadable, match=rf"process {known.pid}: nothing can be read at its address 0x8$") as it:
        read_process(known.pid, [*[known.private] * before, 8, known.private], 32)
    assert it.value.pid == known.pid


def test_a_piece_that_ends_beyond_memory_names_where(known: KnownProcess) -> None:
    """The first byte that is not there, not the first of the piece."""
    with pytest.raises(MemoryNotReadable, match="nothing can be read at its address 0x") as caught:
        read_process_range(known.pid, known.private, 1 << 30)
    place = int(str(caught.value).rpartition("0x")[2], 16)
    assert place >= known.private + LENGTH
    assert place % PAGESIZE == 0


def test_a_process_that_is_not_there() -> None:
    """Is one that has ended."""
    with pytest.raises(VmEnded, match=f"process {NO_PID}: the process has ended"):
        read_process(NO_PID, [PAGESIZE], 8)


@pytest.mark.parametrize("length", [0, -1, 1 << 31])
def test_lengths_that_cannot_be_read(length: int) -> None:
    """Nothing is no length, and Linux reads less than 2 GiB at once."""
    with pytest.raises(RangeError, match=f"length is {length}; it must be from 1 to"):
        read_process_range(NO_PID, PAGESIZE, length)


@pytest.mark.parametrize(
    ("scope", "says"),
    [
        (None, "run as root, or .*cap_sys_ptrace=ep.*, or run as the process's own user; or use --qmp"),
        ("0", "run as root, or .*cap_sys_ptrace=ep.*, or run as the process's own user; or use --qmp"),
        ("1", "run as root, .*as the process's own user, write 0 to {file}, which is 1; or use --qmp"),
        ("2", "run as root, .*; {file} is 2, which forbids it to all others; or use --qmp"),
        ("3", "not permitted; {file} is 3, which forbids it to all until the next boot; --qmp reads by pmemsave"),
    ],
)
@needs_root
def test_who_may_not_read_is_told_what_helps(
    known: KnownProcess, monkeypatch: pytest.MonkeyPatch, scope: str | None, says: str
) -> None:
    """By this host's ptrace_scope, if it has one."""
    with NamedTemporaryFile() as file:  # in a folder that others may look into, unlike pytest's
        file.write((scope or "").encode())
        file.flush()
        Path(file.name).chmod(0o644)
        monkeypatch.setattr(_process_memory, "PTRACE_SCOPE", file.name if scope else file.name + "-not-there")
        with pytest.raises(MemoryNotReadable, match="process_vm_readv is not permitted; ") as caught:
            as_nobody(lambda: read_process(known.pid, [known.private], 32))
    assert caught.match(says.format(file=file.name))


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 2**62 - 1)), max_size=40))
def test_present_pages_are_those_with_either_bit(entries: list[tuple[bool, bool, int]]) -> None:
    """Present or swapped out: the runs are longest ones, in order, and hold these pages and no others."""
    pagemap = b"".join(struct.pack("<Q", here << 63 | swapped << 62 | rest) for here, swapped, rest in entries)
    runs = present_pages(pagemap)
    assert [page for first, count in runs for page in range(first, first + count)] == [
        page for page, (here, swapped, _) in enumerate(entries) if here or swapped
    ]
    assert all(one[0] + one[1] < other[0] for one, other in pairwise(runs))
