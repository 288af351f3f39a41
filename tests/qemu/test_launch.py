"""A QEMU is launched, shared and ended, however it goes; the fixture of this folder sees that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pvclock import ConfigError, StateError
from pvclock.payloads import clockprobe, probe
from qemu_glue import QemuExited, QemuMissing, QmpFailed, cpu_property
from qemu_glue.peer import vmm
from qemu_glue.peer.launch import Qemu
from tests.kvm.leaks import is_others
from tests.waiting import HANG_S

pytestmark = [pytest.mark.qemu, pytest.mark.kvm]

FEATURES = 0x0100_0009
SPARE_GPA = 0x300000
"""Beyond all that clockprobe uses."""


def launch(cmdline: str = "", **options: object) -> Qemu:
    """A QEMU with clockprobe."""
    return Qemu(clockprobe(), features=FEATURES, cmdline=cmdline, **options)  # type: ignore[arg-type]


SHARES = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 4096):
    print(flush=True)
    input()
"""


@pytest.mark.row("style")
def test_what_another_session_shares_is_no_leak(tmp_path: Path) -> None:
    """A file in the memory of a process that was not started here is its own business; one of a child is not."""
    file = tmp_path / "pvclock-ram"
    file.write_bytes(bytes(4096))
    for place, is_a_leak in ((tmp_path, True), (Path("/elsewhere"), False)):
        environment = {**os.environ, "TMPDIR": str(place)}
        with subprocess.Popen(
            [sys.executable, "-c", SHARES, file], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            assert is_others(file, tmp_path) is not is_a_leak
            process.communicate(b"\n")
    assert not is_others(file, tmp_path)


@pytest.mark.row("E13")
def test_ram_is_shared_both_ways() -> None:
    """What is written here is what QEMU reads, and a guest's page is the same read by QMP and directly."""
    with launch() as qemu:
        qemu.memory.write(SPARE_GPA, b"from here")
        assert qemu.read_by_monitor(SPARE_GPA, 9) == b"from here"
        while (block := probe.read_block(qemu.memory)) is None or block.phase < probe.Phase.READING:
            qemu.check_running()
        qemu.pause()
        page = qemu.memory.read(probe.time_page_address(0), 32)
        assert any(page)
        assert qemu.read_by_monitor(probe.time_page_address(0), 32) == page
        assert qemu.execute("query-status")["status"] == "paused"
        qemu.resume()
        assert qemu.tsc_hz() % 1000 == 0
        with pytest.raises(QmpFailed, match="QMP eject: refused: "):
            qemu.execute("eject", device="none")


@pytest.mark.row("E13")
def test_guest_ends_by_itself() -> None:
    """A guest's exit code and console come back."""
    with launch("cpus=1 reads=1000") as qemu:
        assert qemu.wait(HANG_S) == probe.EXIT_FINE
        assert probe.read_record(qemu.memory, 0).reads == 1000
        assert "clockprobe: cpus=1" in qemu.console


@pytest.mark.row("E13")
def test_guest_that_does_not_end() -> None:
    """Waiting has an end; the guest goes on."""
    with launch() as qemu:
        with pytest.raises(StateError, match=r"not ended after 0\.1 s"):
            qemu.wait(0.1)
        qemu.check_running()


@pytest.mark.row("E13")
def test_killed() -> None:
    """A QEMU that is killed in mid-run: whatever is asked of it says by what, with its command."""
    with launch() as qemu:
        os.kill(qemu.pid, signal.SIGKILL)
        for ask in (lambda: qemu.execute("query-status"), qemu.pause, lambda: qemu.wait(1), qemu.check_running):
            with pytest.raises(QemuExited, match="SIGKILL") as caught:
                ask()
            assert caught.value.exit_code == -signal.SIGKILL
            assert "microvm,memory-backend=ram" in caught.value.command


@pytest.mark.row("E13")
def test_killed_and_not_gone_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs up has as long as the kernel takes to take it apart: however short the wait, it has ended."""
    monkeypatch.setattr(vmm, "STEP_LIMIT_S", 0)
    with launch() as qemu:
        os.kill(qemu.pid, signal.SIGKILL)
        with pytest.raises(QemuExited, match="SIGKILL"):
            qemu.execute("query-status")


@pytest.mark.row("E13")
def test_waited_for_by_another_thread() -> None:
    """A child of which nothing is left, for somebody has waited for it meanwhile, is one that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(HANG_S)
    assert vmm._is_exiting(process.pid)


@pytest.mark.row("E13")
def test_told_to_quit() -> None:
    """A QEMU that somebody else ends in order is no guest's end."""
    with launch() as qemu:
        qemu.execute("quit")
        with pytest.raises(QemuExited, match="exit code 0"):
            qemu.wait(HANG_S)


@pytest.mark.row("E13")
def test_stuck() -> None:
    """A QEMU that answers nothing any more is ended all the same."""
    with launch() as qemu:
        os.kill(qemu.pid, signal.SIGSTOP)
    assert qemu._process.returncode == -signal.SIGKILL


@pytest.mark.row("E13")
def test_closed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing again does nothing; the first time QEMU ends in order, and is not killed, if it is given the time."""
    monkeypatch.setattr(vmm, "STEP_LIMIT_S", HANG_S)
    qemu = launch()
    qemu.close()
    qemu.close()
    assert qemu._process.returncode == 0


@pytest.mark.row("E13")
def test_bad_argument() -> None:
    """A launch that fails carries QEMU's exit code, command and own words."""
    with pytest.raises(QemuExited) as caught:
        launch(arguments=("-nonsense",))
    assert caught.value.exit_code == 1
    assert caught.value.command[-1] == "-nonsense"
    assert "-nonsense: invalid option" in caught.value.output
    assert all(part in str(caught.value) for part in ("exit code 1", "invalid option", "qemu-system-x86_64"))


@pytest.mark.parametrize("missing", ["qemu-system-x86_64", "setpriv"])
@pytest.mark.row("E13")
def test_program_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is not on the PATH is named, with the package that has it."""
    monkeypatch.setattr("shutil.which", lambda name: None if name == missing else f"/usr/bin/{name}")
    with pytest.raises(QemuMissing, match=f"{missing} is not on the PATH; to get it: apt-get install"):
        launch()


@pytest.mark.row("E13")
def test_feature_without_a_name() -> None:
    """Features that this QEMU cannot offer are refused before it is started."""
    with pytest.raises(ConfigError, match="0x100"):
        Qemu(clockprobe(), features=FEATURES | 1 << 8)
    assert "pv-eoi" not in cpu_property(FEATURES, known={"kvmclock", "kvmclock-stable-bit"})


def fake_program(folder: Path, body: str) -> str:
    """A program that knows its CPU flags as QEMU does, and then does `body` with its end of the QMP connection."""
    source = f"""\
    #!{sys.executable}
    import re, socket, sys, time
    if "help" in sys.argv:
        sys.exit(print("kvmclock kvmclock-stable-bit"))
    qmp = socket.socket(fileno=int(re.search("fd=([0-9]+) -mon", " ".join(sys.argv)).group(1)))
    {body}
    """
    program = folder / "fake-qemu"
    program.write_text(textwrap.dedent(source))
    program.chmod(0o755)
    return str(program)


@pytest.mark.row("E13")
def test_program_that_talks_garbage(tmp_path: Path) -> None:
    """What answers garbage on QMP is no QEMU: a clear error, and it is ended."""
    program = fake_program(tmp_path, r"qmp.sendall(b'\xff\x00 220 mail.example ready\r\n'); time.sleep(60)")
    with pytest.raises(QmpFailed, match=r"QMP connect: not QMP: .*codec"):
        launch(program=program)


@pytest.mark.row("E13")
def test_program_without_flags(tmp_path: Path) -> None:
    """A program that fails at its first question: its exit code and words."""
    program = tmp_path / "broken-qemu"
    program.write_text("#!/bin/sh\necho no such library >&2\nexit 127\n")
    program.chmod(0o755)
    with pytest.raises(QemuExited, match=r"exit code 127\noutput: no such library"):
        launch(program=str(program))


@pytest.mark.row("E13")
def test_dies_with_us() -> None:
    """When the process that launched a QEMU is killed, the kernel ends QEMU."""
    program = f"""
        import time
        from pvclock.payloads import clockprobe
        from qemu_glue.peer.launch import Qemu
        with Qemu(clockprobe(), features={FEATURES}) as qemu:
            print(qemu.pid, flush=True)
            time.sleep(60)
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    ) as us:
        assert us.stdout is not None
        qemu = Path("/proc") / us.stdout.readline().strip()
        assert "microvm" in (qemu / "cmdline").read_text()
        us.kill()
    deadline = time.monotonic() + HANG_S
    while is_running(qemu):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process: Path) -> bool:
    """Is there such a process, and is it more than an entry that nobody has waited for?"""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
