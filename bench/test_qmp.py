"""A round trip of QMP: our server beside QEMU's, each asked by the same client over a UNIX socket, in turn.

Each VMM is a process of its own.  The client reads and writes bytes and parses no JSON.  Both guests are halted;
query-status is answered from what the VMM knows, stop and cont move the vCPU.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.comparison import Comparison
from qemu_glue.errors import QemuMissing
from qemu_glue.peer.launch import find_program

CALLS = 200
HALT = bytes.fromhex("f4 eb fd")  # 1: hlt; jmp 1b
START_LIMIT_S = 60.0


class Asker:
    """A session that asks and waits for the answer."""

    def __init__(self, path: Path) -> None:
        self._socket = connected(path)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self.ask(b'{"execute":"qmp_capabilities"}')

    def ask(self, request: bytes) -> None:
        """Send it, and read up to the answer, over events."""
        self._socket.sendall(request)
        while not self._lines.readline().startswith(b'{"return"'):
            pass

    def times(self, *requests: bytes) -> Callable[[], None]:
        """Return a function that asks each of these CALLS times."""

        def run() -> None:
            for _ in range(CALLS):
                for request in requests:
                    self.ask(request)

        return run

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()


def connected(path: Path) -> socket.socket:
    """Return a connection to what listens there, as soon as it does."""
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            return connection


@contextmanager
def asked(path: Path) -> Iterator[Asker]:
    """Have a session at that socket."""
    asker = Asker(path)
    try:
        yield asker
    finally:
        asker.close()


@contextmanager
def session(*command: str | Path, path: Path) -> Iterator[Asker]:
    """Run a VMM that listens at `path`, and have a session with it."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            with asked(path) as asker:
                yield asker
        finally:
            process.kill()


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Asker]:
    """Return a session with a machine of ours."""
    path, image = tmp_path / "ours", tmp_path / "image"
    image.write_bytes(HALT)
    run = (sys.executable, "-m", "pvclock", "run", image, "--clock", "kernel", "--qmp", path)
    with session(*run, path=path) as asker:
        yield asker


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[Asker]:
    """Return a session with a QEMU, whose firmware finds nothing to boot, or skip."""
    try:
        program = find_program()
    except QemuMissing as why:
        pytest.skip(str(why))
    path = tmp_path / "qemu"
    machine = ("-M", "microvm", "-cpu", "host,-arch-capabilities", "-accel", "kvm", "-nodefaults", "-display", "none")
    with session(program, *machine, "-qmp", f"unix:{path},server=on,wait=off", path=path) as asker:
        yield asker


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize(
    ("title", "requests"),
    [
        ("query-status", (b'{"execute":"query-status"}',)),
        ("qom-get of a property", (b'{"execute":"qom-get","arguments":{"path":"/machine","property":"type"}}',)),
        ("stop and cont", (b'{"execute":"stop"}', b'{"execute":"cont"}')),
    ],
)
def test_round_trip(
    comparison: Comparison, ours: Asker, theirs: Asker, title: str, requests: tuple[bytes, ...]
) -> None:
    """A request and its answer; stop and cont are two."""
    twin = ("QEMU's", theirs.times(*requests))
    comparison.measure(f"QMP {title}", ours.times(*requests), twin, operations=CALLS)
