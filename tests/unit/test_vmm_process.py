"""A process seen from outside, and whether it runs a KVM guest: clear errors, and no other process taken for it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import NoReturn

import pytest

from pvclock.errors import VmEnded, VmNotObservable
from pvclock.host.process import Mapping, Process
from pvclock.host.vmm_process import open_vmm
from tests.kvm.leaks import open_descriptors
from tests.unit.known_process import as_nobody, needs_last_pid, needs_root, with_pid
from tests.waiting import HANG_S, alarm_after

pytestmark = pytest.mark.row("E3")

LOOKS: dict[str, Callable[[Process], object]] = {
    "read": lambda process: process.read("maps"),
    "open": lambda process: process.open("pagemap"),
    "stat": lambda process: process.stat("exe"),
    "descriptors": Process.descriptors,
    "threads": Process.threads,
    "mappings": Process.mappings,
    "check_running": Process.check_running,
}


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Return a process of another program, to be ended."""
    with subprocess.Popen(["sleep", "600"]) as process:
        while Path(f"/proc/{process.pid}/comm").read_text(encoding="utf-8") != "sleep\n":
            pass  # Linux tells of the exec before it changes the name
        yield process
        process.kill()


def test_what_proc_tells() -> None:
    """Of this very process, for which the truth is known: its name, user, threads, descriptors."""
    released = threading.Event()
    thread = threading.Thread(target=released.wait)
    thread.start()
    read_end, write_end = os.pipe()
    try:
        with Process(os.getpid()) as process:
            assert process.is_running
            assert process.name == Path("/proc/self/comm").read_text(encoding="utf-8").strip()
            assert process.uid == os.getuid()
            assert process.threads().keys() >= {os.getpid(), thread.native_id}
            found = process.descriptors()
            assert found[read_end] == found[write_end] == f"pipe:[{os.fstat(read_end).st_ino}]"
    finally:
        released.set()
        thread.join()
        os.close(read_end)
        os.close(write_end)


def test_mappings() -> None:
    """A file's mapping is found with its place, rights, file and offset; its path without what Linux adds to it."""
    fd = os.memfd_create("some ram")
    os.ftruncate(fd, 4 * PAGESIZE)
    with mmap(fd, 2 * PAGESIZE, offset=PAGESIZE) as ram, Process(os.getpid()) as process:
        place = ctypes.c_char.from_buffer(ram)
        found = next(each for each in process.mappings() if each.start == ctypes.addressof(place))
        file = os.fstat(fd)
        assert found == Mapping(
            ctypes.addressof(place),
            2 * PAGESIZE,
            True,
            True,
            True,
            PAGESIZE,
            file.st_dev,
            file.st_ino,
            "/memfd:some ram",
        )
        del place
    os.close(fd)


@pytest.mark.parametrize("pid", [2**22 + 1, 0, -5, 1 << 70])
def test_no_such_process(pid: int) -> None:
    """Whatever number it is."""
    with pytest.raises(VmNotObservable, match=f"process {pid}: (there is no such process|it is no process)"):
        open_vmm(pid)


def test_a_thread_is_no_process() -> None:
    """Its id is not taken for its process's."""
    released = threading.Event()
    thread = threading.Thread(target=released.wait)
    thread.start()
    try:
        with pytest.raises(VmNotObservable, match=f"process {thread.native_id}: it is no process, or a thread of one"):
            Process(thread.native_id or 0)
    finally:
        released.set()
        thread.join()


def test_a_process_without_a_vm(other: subprocess.Popen[bytes]) -> None:
    """Is told from a guest, and nothing stays open."""
    before = open_descriptors()
    with pytest.raises(VmNotObservable, match=f"process {other.pid}: sleep runs no KVM guest here; a QEMU without KVM"):
        open_vmm(other.pid)
    assert open_descriptors() == before


@needs_root
def test_who_may_not_look_is_told_what_helps(other: subprocess.Popen[bytes]) -> None:
    """Another user's process: its descriptors are hidden, its name is not."""
    with pytest.raises(VmNotObservable, match=rf"/proc/{other.pid}/fd may not be looked at; do it as root") as caught:
        as_nobody(lambda: open_vmm(other.pid))
    assert caught.value.pid == other.pid
    assert as_nobody(lambda: Process(other.pid).name) == "sleep"


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_process_that_has_ended(
    other: subprocess.Popen[bytes], look: Callable[[Process], object], *, reaped: bool
) -> None:
    """Whatever is asked of it then, the answer is that."""
    with Process(other.pid) as process:
        look(process)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        if reaped:
            other.wait()
        assert not process.is_running
        with pytest.raises(VmEnded, match=f"guest memory of process {other.pid}: the process has ended") as caught:
            look(process)
        assert caught.value.pid == other.pid


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_process_that_ends_while_it_is_looked_at(
    other: subprocess.Popen[bytes], look: Callable[[Process], object]
) -> None:
    """At whatever moment: that it has ended, and no other error; and nothing stays open."""
    before = open_descriptors()
    with Process(other.pid) as process, alarm_after(HANG_S):
        killer = threading.Timer(0.01, other.kill)
        killer.start()
        with pytest.raises(VmEnded):
            look_for_ever(process, look)
        killer.join()
    assert open_descriptors() == before


def ends_when_opened(monkeypatch: pytest.MonkeyPatch, other: subprocess.Popen[bytes], name: str) -> None:
    """Have the process end as soon as that name is opened."""
    really_open = os.open

    def open_and_end(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        fd = really_open(path, flags, dir_fd=dir_fd)
        if path == name:
            other.kill()
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        return fd

    monkeypatch.setattr(os, "open", open_and_end)


def test_a_file_of_a_process_that_has_just_ended(
    other: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor was had, and is closed with the others."""
    before = open_descriptors()
    with Process(other.pid) as process:
        ends_when_opened(monkeypatch, other, "pagemap")
        with pytest.raises(VmEnded):
            process.open("pagemap")
    assert open_descriptors() == before


def test_the_folder_of_a_process_that_has_just_ended(
    other: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was had, and is closed."""
    before = open_descriptors()
    ends_when_opened(monkeypatch, other, f"/proc/{other.pid}")
    with pytest.raises(VmEnded):
        Process(other.pid)
    assert open_descriptors() == before


def look_for_ever(process: Process, look: Callable[[Process], object]) -> NoReturn:
    """Go on until that raises something."""
    while True:
        look(process)


@needs_root
@needs_last_pid
def test_a_reused_pid_is_no_running_process(other: subprocess.Popen[bytes]) -> None:
    """Another process that gets the pid is not taken for the one that was opened."""
    with Process(other.pid) as process:
        other.kill()
        other.wait()
        with with_pid(other.pid), Process(other.pid) as later:
            assert later.is_running
            for look in LOOKS.values():
                with pytest.raises(VmEnded):
                    look(process)


def test_what_was_opened_goes_with_the_process(other: subprocess.Popen[bytes]) -> None:
    """close() closes it, a second time too."""
    before = open_descriptors()
    with Process(other.pid) as process:
        assert os.pread(process.open("pagemap"), 8, 0) == bytes(8)
        assert open_descriptors() != before
    process.close()
    assert open_descriptors() == before
