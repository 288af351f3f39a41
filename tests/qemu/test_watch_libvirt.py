"""A domain of libvirt as a WatchedVm, through virsh; and one test with a real libvirt, where that is installed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvclock.errors import MemoryNotReadable, VmEnded
from pvclock.meter.watch.vm import VmEventKind, WatchedVm
from qemu_glue import QemuExited, QemuMissing, VirshFailed
from qemu_glue.watch.ram import Means
from qemu_glue.watch.target import open_vm
from qemu_glue.watch.virsh import Virsh
from tests.qemu import virsh_standin
from tests.qemu.real_libvirt import real_domain, virsh
from tests.qemu.running_qemu import PRIVATE_RAM, RunningQemu, running_qemu
from tests.qemu.test_watch_targets import await_events, check_against_qemu, check_pages, check_ranges, pages
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.qemu, pytest.mark.row("E3")]

UUID = "5929c972-76c3-4881-a597-66711ab2dd29"
DOMAIN = "a domain"


@pytest.fixture
def domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningQemu]:
    """A QEMU that a stand-in for virsh reaches as DOMAIN."""
    events = tmp_path / "events"
    arguments = ("-uuid", UUID, "-qmp", f"unix:{events},server=on,wait=off", *PRIVATE_RAM)
    with running_qemu(tmp_path, arguments=arguments) as running:
        install_standin(tmp_path / "bin", monkeypatch)
        monkeypatch.setenv("STANDIN_QMP", str(running.qmp))
        monkeypatch.setenv("STANDIN_EVENTS", str(events))
        monkeypatch.setenv("STANDIN_DOMAIN", DOMAIN)
        monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu:///system")
        yield running


def install_standin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put it on the PATH, before any real virsh."""
    install(folder, f'exec {sys.executable} -S -I {virsh_standin.__file__} "$@"', monkeypatch)


def install(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the virsh on the PATH be a script."""
    folder.mkdir()
    (folder / "virsh").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "virsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_domain(domain: RunningQemu) -> None:
    """QEMU's process is found by the domain's UUID, and its memory read there; events come through virsh."""
    with open_vm(libvirt=DOMAIN) as vm:
        check_against_qemu(vm, domain)
        assert vm.ram.means == "process_vm_readv"
        assert vm.tsc_hz == domain.qemu.tsc_hz()
        assert vm.why_no_events is None
        await_listening(domain)
        begin_us = time.time_ns() // 1000
        domain.qemu.pause()
        domain.qemu.resume()
        events = await_events(vm, VmEventKind.STOP, VmEventKind.RESUME)
    assert [event.utc_ns // 1000 > begin_us for event in events] == [True, True]
    assert domain.qemu.execute("query-fdsets") == []


def await_listening(domain: RunningQemu) -> None:
    """Return when the stand-in hears events."""
    deadline = time.monotonic() + HANG_S
    while not (domain.place / "events.listening").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_domain_by_pmemsave(domain: RunningQemu) -> None:
    """Where its process cannot be read, virsh passes QEMU the file to write to; its end is an error."""
    with open_vm(libvirt=DOMAIN, ram=Means.PMEMSAVE) as vm:
        check_pages(vm, domain)
        os.kill(domain.qemu.pid, signal.SIGKILL)
        with pytest.raises(QemuExited):
            domain.qemu.wait(HANG_S)
        with pytest.raises(VmEnded):
            vm.check_running()
        with pytest.raises(MemoryNotReadable):
            pages(vm)


def test_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain of another host has another TSC."""
    install(tmp_path / "bin", "echo qemu+ssh://root@another/system", monkeypatch)
    with pytest.raises(VirshFailed, match=r"qemu\+ssh://root@another/system is another host"):
        Virsh(DOMAIN).close()


def test_no_virsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without virsh, how to get it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QemuMissing, match="apt-get install libvirt-clients"):
        open_vm(libvirt=DOMAIN)


def answering(answer: str, otherwise: str) -> str:
    """A virsh that gives QEMU's answer to every command, and does something else where that is not asked for."""
    return f"case $1 in uri) echo qemu:///system;; qemu-monitor-command) echo '{answer}';; *) {otherwise};; esac"


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (
            answering('{"error": {"class": "CommandNotFound", "desc": "no such command"}, "id": "libvirt-7"}', ":"),
            "virsh query-uuid: refused: no such command",
        ),
        (
            "printf 'error: failed to connect to the hypervisor\\nerror: Failed to connect socket to X\\n' >&2; exit 1",
            "virsh uri: failed to connect to the hypervisor; Failed to connect socket to X",
        ),
        (
            "case $1 in uri) echo qemu:///system;; *) echo 'error: domain is not running' >&2; exit 1; esac",
            "virsh query-uuid: domain is not running (libvirt: qemu:///system; LIBVIRT_DEFAULT_URI chooses another)",
        ),
        ("exit 3", "virsh uri: exit status 3"),
    ],
)
def test_what_virsh_complains_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, complaint: str) -> None:
    """virsh's own words, in one line."""
    install(tmp_path / "bin", script, monkeypatch)
    with pytest.raises(VirshFailed) as caught:
        open_vm(libvirt=DOMAIN)
    assert str(caught.value) == complaint


def test_virsh_hears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virsh that may not listen for events says why, and is no reason not to watch."""
    refusal = "echo 'error: operation forbidden' >&2; exit 1"
    install(tmp_path / "bin", answering('{"return": {"UUID": ""}}', refusal), monkeypatch)
    session = Virsh(DOMAIN)
    try:
        deadline = time.monotonic() + HANG_S
        while session.why_no_events is None:
            assert time.monotonic() < deadline
        assert session.why_no_events == "virsh qemu-monitor-event has ended: operation forbidden"
        with pytest.raises(VirshFailed, match="operation forbidden"):
            session.take_events()
    finally:
        session.close()


@pytest.mark.long
def test_real_libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it with libvirt's own daemon and virsh."""
    with real_domain(tmp_path, monkeypatch) as name:
        for means, description in ((None, "process_vm_readv"), (Means.PMEMSAVE, "QMP pmemsave")):
            with open_vm(libvirt=name, ram=means) as vm:
                assert vm.ram.means == description
                assert vm.vcpus == 2
                assert vm.why_no_events is None
                await_pages(vm)
                check_ranges(vm)
                virsh("suspend", name)
                virsh("resume", name)
                await_events(vm, VmEventKind.STOP, VmEventKind.RESUME)
        with pytest.raises(VirshFailed, match="failed to get domain 'b'"):
            open_vm(libvirt="b")


def await_pages(vm: WatchedVm) -> None:
    """Return when clockprobe runs on all vCPUs."""
    deadline = time.monotonic() + HANG_S
    while not all(page.tsc_to_system_mul for page in pages(vm)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
