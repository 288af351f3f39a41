"""Stock clients of QMP drive `pvclock run --qmp` as they drive a QEMU: qmp-shell, and QEMU's Python clients."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.command_line import ROOT
from tests.waiting import HANG_S, wait_until

pytestmark = [pytest.mark.row("E15"), pytest.mark.kvm, pytest.mark.qemu]

LOOP: Final = bytes.fromhex("ebfe")
QEMU: Final = ("qemu-system-x86_64", "-M", "none", "-accel", "kvm", "-nodefaults", "-display", "none")
QMP_SHELL: Final = ("-c", "from qemu.qmp.qmp_shell import main; main()")
SHELL_LINES: Final = (
    *("query-status", "stop", "", "query-status", "nope", "stop a=1"),
    *("pmemsave val=0 size=x filename=a", "pmemsave val=0 size=1 filename=/none/a", "pmemsave val={'a':1} size=1"),
    *("stop", "cont", "", "system_reset", "", "query-kvm", "quit"),
)
STAMP: Final = re.compile(r"'timestamp': \{'seconds': \d+, 'microseconds': \d+\}")
NUMBERS: Final = re.compile(r"Connected to QEMU \d+\.\d+\.\d+")


@contextmanager
def running(*command: str | Path) -> Iterator[None]:
    """Run a VMM that a client ends."""
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
            assert process.wait(HANG_S) == 0
        finally:
            process.kill()


def listens(path: Path) -> bool:
    """Does a VMM take connections there?"""
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


def said_by(place: Path, vmm: str, client: tuple[str, ...], typed: str = "") -> str:
    """What a client finds, of a VMM whose guest does nothing."""
    path = place / f"{vmm}.sock"
    image = place / "image"
    image.write_bytes(LOOP)
    ours = (sys.executable, "-m", "pvclock", "run", image, "--clock", "kernel", "--qmp", path)
    with running(*((*QEMU, "-qmp", f"unix:{path},server=on,wait=off") if vmm == "qemu" else ours)):
        wait_until(lambda: listens(path))
        return subprocess.run(
            [sys.executable, *client, path],
            cwd=ROOT,
            env={**os.environ, "HOME": str(place)},  # qmp-shell keeps a history there
            input=typed,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=HANG_S,
            check=False,  # qmp-shell fails at its own end where the VMM has hung up before it
        ).stdout


def test_qmp_shell(tmp_path: Path) -> None:
    """The same lines typed, the same answers, errors and events, to the last one."""
    typed = "\n".join(SHELL_LINES) + "\n"
    theirs, found = (
        NUMBERS.sub("Connected to", STAMP.sub("", said_by(tmp_path, vmm, QMP_SHELL, typed))) for vmm in ("qemu", "own")
    )
    assert found == theirs
    assert found.count("(QEMU)") == len(SHELL_LINES) + 1  # it is asked once more, and has no more to type


@pytest.mark.parametrize("client", ["legacy", "asyncio"])
def test_the_python_client(tmp_path: Path, client: str) -> None:
    """Its own checks of greeting, ids and answers are content, and what it gives is what it gives of a QEMU."""
    theirs, found = (said_by(tmp_path, vmm, ("-m", "tests.qemu.qmp_client", client)) for vmm in ("qemu", "own"))
    assert found == theirs
    assert found.splitlines()[-1] == "[{}]"
