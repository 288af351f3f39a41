"""What holds for every test with a QEMU: it leaves nothing behind, and without a QEMU it is skipped with advice."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.kvm.leaks import held, is_others


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `qemu` where there is no QEMU."""
    if item.get_closest_marker("qemu") and not shutil.which("qemu-system-x86_64"):
        pytest.skip("no qemu-system-x86_64 on the PATH; to get it: apt-get install qemu-system-x86")


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever becomes of the test: no process, descriptor, thread, RAM or file is left of it."""
    place = tmp_path_factory.mktemp("stray")
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.chdir(place)
    before, files_before = children(), shared_memory_files()
    held_before = held()
    yield
    assert children() == before
    new_files = shared_memory_files() - files_before
    assert [file for file in new_files if not is_others(file, place) and file.exists()] == []
    now = held()  # less, where an error of an earlier test held something until pytest let go of it
    assert now.is_no_more_than(held_before), (now, held_before)
    assert list(place.iterdir()) == []


def children() -> list[str]:
    """The command lines of this process's children, zombies too."""
    pids: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that was joined may still be about to go
            pids += (task / "children").read_text().split()
    return [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]


def shared_memory_files() -> set[Path]:
    """Files in /dev/shm that could be a QEMU's or ours."""
    return {file for file in Path("/dev/shm").iterdir() if {"qemu", "pvclock"} & set(file.name.split("-"))}  # noqa: S108  # only looked at
