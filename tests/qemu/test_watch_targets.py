"""A real QEMU as a WatchedVm: what is read of it is what it has, and it is left as it was."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pvclock import ConfigError, Gpa
from pvclock.errors import MemoryNotReadable, VmEnded, VmNotObservable
from pvclock.meter.findings import TIME_INFO, time_info
from pvclock.meter.watch.vm import VmEvent, VmEventKind, WatchedVm
from pvclock.payloads import probe
from pvclock.readings import TimeInfo
from qemu_glue import NotKvm, QemuExited, QmpFailed
from qemu_glue.peer import qmp_socket
from qemu_glue.peer.launch import find_program
from qemu_glue.watch import events
from qemu_glue.watch.ram import Means
from qemu_glue.watch.target import QemuVm, open_vm
from tests.command_line import ROOT
from tests.qemu.another_user import as_another_user
from tests.qemu.running_qemu import PRIVATE_RAM, RunningQemu, running_qemu
from tests.qemu.test_qmp_socket import listener
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.qemu, pytest.mark.row("E3")]

REBOOTS = ("-action", "reboot=reset")
"""A reset resets, where Qemu has QEMU end at it."""
SHARED_RAM = ("-object", "memory-backend-ram,id=both,size=16M,share=on", "-machine", "memory-backend=both")
"""In no file, but shared all the same."""
PREALLOCATED = ("-object", "memory-backend-memfd,id=full,size=16M,prealloc=on", "-machine", "memory-backend=full")

IMAGE_GPA, LOW_GPA, COMPARED_BYTES = Gpa(0x100000), Gpa(0x6000), 1 << 15
"""Where clockprobe's code is, which does not change, and empty memory."""
FREE_GPA, FREE_BYTES = Gpa(0x800000), 4 << 20
OFFSETS, PIECE_BYTES = (4096, 64, 0, 64, 9000), 32


@pytest.fixture(scope="module")
def long_lived_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningQemu]:
    """A QEMU whose RAM is in a file."""
    with running_qemu(tmp_path_factory.mktemp("shared")) as running:
        running.qemu.pause()
        yield running


@pytest.fixture(scope="module")
def long_lived_private() -> Iterator[RunningQemu]:
    """One whose RAM is its own, in a folder that every user can enter."""
    with TemporaryDirectory(dir="/run") as name, running_qemu(Path(name), arguments=PRIVATE_RAM) as running:
        running.qemu.pause()
        yield running


@pytest.fixture
def shared(long_lived_shared: RunningQemu) -> Iterator[RunningQemu]:
    """The same, running; for tests that leave it as it was."""
    with while_running(long_lived_shared) as running:
        yield running


@pytest.fixture
def private(long_lived_private: RunningQemu) -> Iterator[RunningQemu]:
    """The same, running; for tests that leave it as it was."""
    with while_running(long_lived_private) as running:
        yield running


@contextmanager
def while_running(paused: RunningQemu) -> Iterator[RunningQemu]:
    """A guest that takes no CPU from other tests."""
    paused.qemu.resume()
    yield paused
    paused.qemu.pause()


@pytest.fixture
def preallocated(tmp_path: Path) -> Iterator[RunningQemu]:
    """One that has all of its RAM from the beginning."""
    with running_qemu(tmp_path, arguments=PREALLOCATED) as running:
        yield running


def open_qmp(running: RunningQemu, means: Means | None = None) -> QemuVm:
    """Watch it by its QMP socket."""
    return open_vm(qmp=str(running.qmp), ram=means)


def pages(vm: WatchedVm) -> list[TimeInfo]:
    """Each vCPU's page as the VM's RAM has it."""
    addresses = [Gpa(probe.time_page_address(vcpu)) for vcpu in range(vm.vcpus)]
    return [time_info(page) for page in vm.ram.read_many(addresses, TIME_INFO.size)]


def check_pages(vm: WatchedVm, running: RunningQemu) -> None:
    """Its pages are what QEMU reads, between two looks of QEMU's that agree: KVM may have changed them meanwhile."""
    while True:
        before, found, after = running.pages(), pages(vm), running.pages()
        if before == after:
            break
    assert found == before


def check_against_qemu(vm: QemuVm, running: RunningQemu) -> None:
    """What the VM says of itself and what it reads is what QEMU says."""
    assert vm.vcpus == running.qemu.vcpus
    assert vm.name.endswith(f", process {running.qemu.pid}, {vm.vcpus} vCPUs")
    check_pages(vm, running)
    for gpa in (IMAGE_GPA, LOW_GPA):
        whole = running.qemu.read_by_monitor(gpa, COMPARED_BYTES)
        assert vm.ram.read(gpa, COMPARED_BYTES) == whole
        pieces = vm.ram.read_many([Gpa(gpa + offset) for offset in OFFSETS], PIECE_BYTES)
        assert pieces == [whole[offset:][:PIECE_BYTES] for offset in OFFSETS]


def check_ranges(vm: QemuVm) -> None:
    """The ranges are in order, apart, and have clockprobe's code and pages in them."""
    ranges = vm.ram.ranges()
    assert all(one.gpa + one.length <= other.gpa for one, other in itertools.pairwise(ranges))
    for gpa in (IMAGE_GPA, *map(probe.time_page_address, range(vm.vcpus))):
        assert any(each.gpa <= gpa < each.gpa + each.length for each in ranges)


def state(running: RunningQemu) -> list[object]:
    """What a watch might change of QEMU."""
    return [running.qemu.execute(f"query-{what}") for what in ("status", "fdsets", "migrate-capabilities")]


@pytest.mark.parametrize(
    ("kind", "works", "best"),
    [
        ("shared", (Means.SHARED, Means.PROCESS), "shared memory"),
        ("preallocated", (Means.SHARED, Means.PROCESS, Means.PMEMSAVE), "shared memory"),
        ("private", (Means.PROCESS, Means.PMEMSAVE), "process_vm_readv"),
    ],
)
@pytest.mark.usefixtures("long_lived_shared", "long_lived_private")  # before what counts processes
def test_each_means_reads_the_same(
    request: pytest.FixtureRequest, kind: str, works: tuple[Means, ...], best: str
) -> None:
    """Whatever reads the RAM finds what QEMU does; the best means is the default, and QEMU is left as it was."""
    running: RunningQemu = request.getfixturevalue(kind)
    before = state(running)
    for means in (None, *works):
        with open_qmp(running, means) as vm:
            assert vm.tsc_hz == running.qemu.tsc_hz()
            assert means is not None or vm.ram.means == best
            check_against_qemu(vm, running)
            check_ranges(vm)
            vm.check_running()
        assert state(running) == before


def test_by_process(shared: RunningQemu) -> None:
    """A process alone shows vCPUs and RAM, but neither events nor the guest's TSC frequency."""
    with open_vm(pid=shared.qemu.pid) as vm:
        check_against_qemu(vm, shared)
        assert vm.tsc_hz is None
        assert vm.why_no_events is not None
        shared.qemu.pause()
        shared.qemu.resume()
        assert vm.take_events() == []
        with pytest.raises(MemoryNotReadable, match="no monitor"):
            open_vm(pid=shared.qemu.pid, ram=Means.PMEMSAVE)


@pytest.mark.long
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_pc_and_q35(tmp_path: Path, machine: str) -> None:
    """The same on machines with firmware, whose RAM is in more pieces."""
    with running_qemu(tmp_path, machine=machine, arguments=PRIVATE_RAM) as running:
        for means in (Means.PROCESS, Means.PMEMSAVE):
            with open_qmp(running, means) as vm:
                check_against_qemu(vm, running)
                check_ranges(vm)
        with open_vm(pid=running.qemu.pid) as vm:
            check_pages(vm, running)


@pytest.mark.parametrize(("arguments", "name"), [((), "ram"), (SHARED_RAM, "both")], ids=["file", "anonymous"])
def test_reading_fills_no_holes(tmp_path: Path, arguments: tuple[str, ...], name: str) -> None:
    """Shared memory that QMP would fill by reading is not searched by it, and no other way allocates any."""
    with running_qemu(tmp_path, arguments=arguments) as running:
        before = shared_kib(running)
        with open_qmp(running, Means.PMEMSAVE) as vm:
            check_pages(vm, running)
            with pytest.raises(MemoryNotReadable, match=f"{name} is shared memory with holes"):
                vm.ram.ranges()
        for means in (Means.SHARED, Means.PROCESS):
            with open_qmp(running, means) as vm:
                for found in vm.ram.ranges():
                    vm.ram.read(found.gpa, found.length)
        assert shared_kib(running) == before
        running.qemu.read_by_monitor(FREE_GPA, FREE_BYTES)
        assert shared_kib(running) > before, "reading by QMP does fill them"


def shared_kib(running: RunningQemu) -> int:
    """What QEMU has of shared memory."""
    status = Path(f"/proc/{running.qemu.pid}/status").read_text(encoding="utf-8")
    return int(status.partition("RssShmem:")[2].split()[0])


def await_events(vm: WatchedVm, *kinds: VmEventKind) -> list[VmEvent]:
    """All events until they are of these kinds, one after the other."""
    told: list[VmEvent] = []
    deadline = time.monotonic() + HANG_S
    while tuple(kind for kind, _ in itertools.groupby(event.kind for event in told)) != kinds:
        assert time.monotonic() < deadline, told
        told += vm.take_events()
    return told


def test_events(tmp_path: Path) -> None:
    """What is done to the guest is told in order, with QEMU's stamps; what was done before the watch is not."""
    with running_qemu(tmp_path, arguments=REBOOTS) as running:
        running.qemu.pause()
        running.qemu.resume()
        with open_qmp(running) as vm:
            begin_us = time.time_ns() // 1000
            running.qemu.pause()
            running.qemu.resume()
            running.qemu.execute("system_reset")
            told = await_events(vm, VmEventKind.STOP, VmEventKind.RESUME, VmEventKind.RESET)
            stamps_us = [begin_us, *(event.utc_ns // 1000 for event in told), time.time_ns() // 1000]
    assert stamps_us == sorted(stamps_us)


def test_a_migration_is_told(tmp_path: Path) -> None:
    """QEMU is asked to tell of it, which it does not do by itself; and of its guest's end."""
    with running_qemu(tmp_path) as running, open_qmp(running) as vm:
        assert tells_of_migrations(running)
        running.qemu.execute("migrate", uri=f"exec:cat >{os.devnull}")
        await_events(vm, VmEventKind.MIGRATION, VmEventKind.STOP, VmEventKind.MIGRATION)
        running.qemu.execute("system_reset")  # Qemu has QEMU end at it
        await_events(vm, VmEventKind.SHUTDOWN)


def test_a_watch_that_begins_during_a_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU refuses to tell of it then, and is asked again: what comes of the migration after this one is told."""
    monkeypatch.setattr(events, "AGAIN_S", 0.0)
    with running_qemu(tmp_path) as running, listener(tmp_path / "nobody reads"):
        running.qemu.memory.write(FREE_GPA, os.urandom(FREE_BYTES))  # more than a socket holds, so it does not end
        running.qemu.execute("migrate", uri=f"unix:{tmp_path / 'nobody reads'}")
        with open_qmp(running) as vm:
            assert vm.take_events() == []
            assert not tells_of_migrations(running)
            running.qemu.execute("migrate_cancel")
            await_told(vm, running)
            running.qemu.execute("migrate", uri=f"exec:cat >{os.devnull}")
            await_events(vm, VmEventKind.MIGRATION, VmEventKind.STOP, VmEventKind.MIGRATION)
        assert not tells_of_migrations(running)


def tells_of_migrations(running: RunningQemu) -> bool:
    """Does QEMU?"""
    return {"capability": "events", "state": True} in running.qemu.execute("query-migrate-capabilities")


def await_told(vm: WatchedVm, running: RunningQemu) -> None:
    """Return when QEMU tells of migrations; it tells nothing before."""
    deadline = time.monotonic() + HANG_S
    while not tells_of_migrations(running):
        assert time.monotonic() < deadline
        assert vm.take_events() == []


def test_a_second_client(shared: RunningQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second is told so, and how to watch all the same; the first goes on, and --pid works beside it."""
    with open_qmp(shared) as first:
        monkeypatch.setattr(qmp_socket, "GREETING_LIMIT_S", 0.2)
        with pytest.raises(QmpFailed, match=r"no greeting within 0\.2 s; another client .* second -qmp, or use --pid"):
            open_qmp(shared)
        with open_vm(pid=shared.qemu.pid) as beside:
            check_pages(beside, shared)
        shared.qemu.pause()
        shared.qemu.resume()
        await_events(first, VmEventKind.STOP, VmEventKind.RESUME)


@pytest.mark.parametrize("means", [Means.SHARED, Means.PMEMSAVE])
def test_killed_while_watched(tmp_path: Path, means: Means) -> None:
    """A QEMU that ends is an error that says so, whatever is asked then; and letting go of it works."""
    with running_qemu(tmp_path, arguments=PREALLOCATED) as running, open_qmp(running, means) as vm:
        os.kill(running.qemu.pid, signal.SIGKILL)
        with pytest.raises(QemuExited):
            running.qemu.wait(HANG_S)
        for ask in (vm.take_events, vm.check_running):
            with pytest.raises(VmEnded, match=f"process {running.qemu.pid}: the process has ended"):
                ask()
        with pytest.raises(MemoryNotReadable, match=r"the process has ended|the session has ended"):
            pages(vm)
        assert len(vm.tsc_offsets()) == vm.vcpus


def test_one_who_has_the_socket_only(private: RunningQemu) -> None:
    """Another user than QEMU's cannot look at its process, and reads by QMP."""
    open_to_all(private)
    with as_another_user(), open_qmp(private) as vm:
        assert vm.ram.means == "QMP pmemsave"
        assert vm.why_no_offsets is not None
        assert vm.tsc_offsets() == (None, None)
        check_ranges(vm)
        check_pages(vm, private)
        vm.check_running()


def open_to_all(running: RunningQemu) -> None:
    """Let every user connect to its socket."""
    running.place.chmod(0o755)
    running.qmp.chmod(0o777)


def test_through_a_proxy(private: RunningQemu, tmp_path: Path) -> None:
    """Where descriptors are not passed on, and who listens is no QEMU, one line says what does not work."""
    with proxy(private.qmp, tmp_path / "proxy"):
        with pytest.raises(MemoryNotReadable, match=r"runs no KVM guest.*; and by QMP: .*file descriptor") as caught:
            open_vm(qmp=str(tmp_path / "proxy"))
        assert "\n" not in str(caught.value)


@contextmanager
def proxy(target: Path, path: Path) -> Iterator[None]:
    """A process that listens at `path`, and passes one client's bytes to `target` and back.

    Not this one: it may have a guest of another test's, and so be a VMM itself.
    """
    command = [sys.executable, "-m", "tests.qemu.socket_proxy", str(target), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        yield
        assert process.wait(HANG_S) == 0


def test_without_kvm(tmp_path: Path) -> None:
    """A QEMU that emulates has no kvmclock, and is told apart at once, by its socket and by its process."""
    qmp = tmp_path / "qmp"
    with emulating_qemu(qmp) as pid:
        with pytest.raises(NotKvm, match="without KVM: its guests have no kvmclock"):
            open_vm(qmp=str(qmp))
        with pytest.raises(VmNotObservable, match="runs no KVM guest"):
            open_vm(pid=pid)


def is_listened_at(path: Path) -> bool:
    """Does somebody accept connections there?  A socket is bound, and so a file, before that."""
    accepts = "00010000"  # __SO_ACCEPTCON
    sockets = (line.split() for line in Path("/proc/net/unix").read_text(encoding="utf-8").splitlines())
    return any(fields[3] == accepts and fields[-1] == str(path) for fields in sockets)


@contextmanager
def emulating_qemu(qmp: Path) -> Iterator[int]:
    """The process of a QEMU without KVM, and without a guest, that listens at `qmp`."""
    options = ("-nodefaults", "-display", "none", "-machine", "none", "-accel", "tcg")
    process = subprocess.Popen([find_program(), *options, "-qmp", f"unix:{qmp},server=on,wait=off"])
    try:
        deadline = time.monotonic() + HANG_S
        while not is_listened_at(qmp):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def test_named_in_one_way() -> None:
    """None of the three ways, or two of them, is an error of the caller."""
    with pytest.raises(ConfigError, match="in one way"):
        open_vm()
    with pytest.raises(ConfigError, match="in one way"):
        open_vm(qmp="a", libvirt="b")
