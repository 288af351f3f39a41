"""Files of saved states: kept ones load for ever, and a save leaves the old file or the new one, whatever happens."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pvclock import StateFileError
from pvclock.state import clock_state
from pvclock.state.clock_state import SavedPolicy
from pvclock.state.json_schema import BYTES_MAX
from tests.saved_states import EXTREME, KEPT, LEAST, TYPICAL
from tests.unit.killed_saves import Report

ROOT = Path(__file__).parents[2]
STATES = ROOT / "tests" / "states"
NOBODY = 65534


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file with a state, alone in a folder."""
    path = tmp_path / "clock.json"
    clock_state.write(path, TYPICAL)
    return path


def assert_untouched(path: Path) -> None:
    """The old state is there, and nothing beside it."""
    assert clock_state.read(path) == TYPICAL
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.row("P-25", "E9")
@pytest.mark.parametrize("name", KEPT)
def test_kept_files_load_for_ever(name: str, tmp_path: Path) -> None:
    """Each file that was ever released holds the state that it held then, and it survives being saved anew."""
    state = clock_state.read(STATES / name)
    assert state == KEPT[name]
    clock_state.write(tmp_path / name, state)
    assert clock_state.read(tmp_path / name) == state


@pytest.mark.row("P-25")
def test_every_kept_file_is_tested() -> None:
    """tests/states holds just the files that KEPT names, and what is written today is what was kept."""
    assert {file.name for file in STATES.iterdir()} == set(KEPT)
    for name in KEPT.keys() - {"v1-by-hand.json"}:
        assert clock_state.to_json(KEPT[name]) == (STATES / name).read_text()


def kill_saves(folder: Path, kills: int, writer: str) -> Report:
    """Run tests/unit/killed_saves.py."""
    command = [sys.executable, "-m", "tests.unit.killed_saves", str(folder), str(kills), "20261121", writer]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return Report(**json.loads(done.stdout))


@pytest.mark.row("P-25", "E9")
def test_two_hundred_killed_saves(tmp_path: Path) -> None:
    """After SIGKILL at 200 random moments: the last saved state or the next one, whole, and at most one more file."""
    report = kill_saves(tmp_path, 200, "product")
    assert report.wrong == 0
    assert report.old + report.new == report.kills >= 200
    assert report.with_leftover >= 20, "the kills did not hit saves"
    assert report.most_files == 2
    assert [file.name for file in tmp_path.iterdir()] == ["clock.json"]


@pytest.mark.row("style")
def test_killed_saves_find_a_writer_that_is_not_atomic(tmp_path: Path) -> None:
    """The same kills find files that are neither old nor new where the file is written in place."""
    assert kill_saves(tmp_path, 50, "in_place").wrong > 0


@pytest.mark.row("P-25")
def test_a_leftover_is_taken_over(saved: Path) -> None:
    """What a killed save left is not read, not in the way, and gone after the next save, its mode with it."""
    leftover = saved.with_name(".clock.json.new")
    leftover.write_text("half a state, and longer than the new one" * 1000)
    leftover.chmod(0o666)
    clock_state.write(saved, TYPICAL)
    assert_untouched(saved)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


@pytest.mark.row("P-25")
def test_savers_take_turns(tmp_path: Path) -> None:
    """Threads that save to one file at once: whoever loads meanwhile gets one of their states, whole."""
    path = tmp_path / "clock.json"
    states = [TYPICAL, LEAST, EXTREME]
    clock_state.write(path, states[0])
    failures: list[BaseException] = []
    found: set[int] = set()

    def save(state: clock_state.ClockState) -> None:
        try:
            for _ in range(30):
                clock_state.write(path, state)
        except BaseException as error:  # noqa: BLE001  # shown below
            failures.append(error)

    threads = [threading.Thread(target=save, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found.add(states.index(clock_state.read(path)))
    assert not failures
    assert len(found) >= 2, "nothing was saved while it was loaded"
    assert [file.name for file in tmp_path.iterdir()] == ["clock.json"]


@pytest.mark.row("P-25")
def test_what_is_on_the_disk_when(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is on the disk before the name is given to it, and the folder after that."""
    steps: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(file: int) -> None:
        steps.append("fsync folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "fsync file")
        fsync(file)

    def logged_rename(path: Path, target: Path) -> Path:
        steps.append(f"rename to {target.name}")
        assert clock_state.read(path) == LEAST
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    clock_state.write(saved, LEAST)
    assert steps == ["fsync file", "rename to clock.json", "fsync folder"]


@pytest.mark.row("P-25")
def test_a_full_disk(saved: Path) -> None:
    """A file that may not grow as long as the state is an error with the reason, and the old state stays."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(StateFileError, match="File too large") as caught:
            clock_state.write(saved, LEAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (caught.value.field, caught.value.path) == ("file", str(saved))
    assert_untouched(saved)


@pytest.mark.row("P-25")
@pytest.mark.parametrize("call", ["ftruncate", "fchmod", "write", "fchown", "removexattr", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_failing_half_way(call: str, error: BaseException, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever system call fails before the rename, or is interrupted by ^C, nothing is changed or left."""

    def fail(*_arguments: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises((StateFileError, KeyboardInterrupt)) as caught:
            clock_state.write(saved, LEAST)
    assert "No space left on device" in str(caught.value) or error is caught.value
    assert_untouched(saved)
    clock_state.write(saved, LEAST)
    assert clock_state.read(saved) == LEAST


@pytest.mark.row("P-25")
def test_a_write_that_takes_a_byte_at_a_time(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call that writes less than it was given is called again."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data[:1])))
    clock_state.write(saved, LEAST)
    assert clock_state.read(saved) == LEAST


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights, which no folder's mode stops."""
    euid = os.geteuid()
    if euid:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(euid)


@pytest.mark.row("P-25")
def test_a_folder_that_cannot_be_written() -> None:
    """Without the right to write in the folder there is an error with path and reason, and the old state stays."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # others can get there, too
        path = Path(name) / "clock.json"
        clock_state.write(path, TYPICAL)
        path.chmod(0o644)
        path.parent.chmod(0o555)
        with as_nobody(), pytest.raises(StateFileError, match=f"{path}: file: found Permission denied"):
            clock_state.write(path, LEAST)
        path.parent.chmod(0o755)
        assert_untouched(path)


@pytest.mark.row("P-25")
@pytest.mark.parametrize(
    "path", ["/nonexistent/clock.json", "/proc/clock.json", "/dev/null", "/dev/null/x", "/", "", "\0"]
)
def test_places_that_take_no_state(path: str) -> None:
    """A missing folder, a device, a folder's name and no name at all are errors with path and reason."""
    with pytest.raises(StateFileError) as caught:
        clock_state.write(path, TYPICAL)
    assert (caught.value.field, caught.value.path) == ("file", path)
    assert caught.value.found
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def put_fifo(leftover: Path) -> None:
    """A FIFO in the way."""
    os.mkfifo(leftover)


def put_link(leftover: Path) -> None:
    """A symbolic link in the way, to a file of somebody else's choice."""
    leftover.symlink_to(leftover.parent / "other")


def put_second_name(leftover: Path) -> None:
    """A second name of another file in the way."""
    leftover.hardlink_to(leftover.parent / "other")


@pytest.mark.row("P-25")
@pytest.mark.parametrize("put", [put_fifo, put_link, put_second_name])
def test_what_is_no_leftover_of_ours(put: Callable[[Path], None], saved: Path) -> None:
    """Where somebody has put something else under the leftover's name, nothing is written through it."""
    other = saved.with_name("other")
    other.write_text("not to be touched")
    put(saved.with_name(".clock.json.new"))
    with pytest.raises(StateFileError, match=r"\.clock\.json\.new"):
        clock_state.write(saved, LEAST)
    assert clock_state.read(saved) == TYPICAL
    assert other.read_text() == "not to be touched"


@pytest.mark.row("P-25")
def test_modes_and_links(saved: Path) -> None:
    """A new file is its owner's only, an old one keeps its mode, and a symbolic link still points where it did."""
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    saved.chmod(0o640)
    link = saved.with_name("latest")
    link.symlink_to(saved.name)
    clock_state.write(link, LEAST)
    assert link.is_symlink()
    assert clock_state.read(saved) == LEAST
    assert stat.S_IMODE(saved.stat().st_mode) == 0o640


@pytest.mark.row("P-25")
def test_an_unsound_state_touches_no_file(saved: Path) -> None:
    """A state that cannot be saved is refused before the file is looked at."""
    with pytest.raises(StateFileError, match="policy"):
        clock_state.write(saved, TYPICAL._replace(policy=SavedPolicy("", None)))
    assert_untouched(saved)


@pytest.mark.row("P-25")
def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    """What cannot be read, is too long, or is wrong inside, is an error with the path."""
    long = tmp_path / "long.json"
    long.write_bytes(b" " * (BYTES_MAX + 1))
    wrong = tmp_path / "wrong.json"
    wrong.write_text(clock_state.to_json(TYPICAL).replace('"tsc_aux": 1', '"tsc_aux": -1'))
    for path, field, found in (
        (tmp_path / "none.json", "file", "No such file or directory"),
        (tmp_path, "file", "a directory"),
        (Path("\0"), "file", "embedded null byte"),
        (Path("/dev/zero"), "file", "a character device"),
        (long, "file", f"{BYTES_MAX + 1} bytes or more"),
        (wrong, "vcpus[1].tsc_aux", "-1"),
    ):
        with pytest.raises(StateFileError) as caught:
            clock_state.read(path)
        assert (caught.value.field, caught.value.found, caught.value.path) == (field, found, str(path))
        assert str(caught.value).startswith(f"{path}: {field}: found {found}; supported: ")
