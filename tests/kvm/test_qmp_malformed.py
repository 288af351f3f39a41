"""What clients do to the QMP server of a running machine, and what it does to the machine: nothing."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import pytest

from tests.kvm.malformed_qmp import malformed
from tests.kvm.watched_machine import WatchedMachine, watched_machine
from tests.waiting import HANG_S, wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.row("E15")]

BATCH: Final = 100
ANEW: Final = b"\xff\n\xff\n"
"""Ends what was open, a string in quotes of either kind, too."""
NEGOTIATE: Final = b'{"execute":"qmp_capabilities"}'
CLASSES: Final = {"GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap"}
"""QEMU's, all of them."""
MEMORY_BYTES_MAX: Final = 48 << 20
"""What the server may take at its worst: a value of 1 MiB as Python has its tokens, and 4 MiB of events."""
UNREAD_BYTES_MAX: Final = 6 << 20
"""For what is not read: an answer or two, of some 50 KiB, and what a client's session takes."""


class Target(NamedTuple):
    """A process whose machine is served at `path`, and whose guest reads its clock."""

    machine: WatchedMachine
    path: Path

    def resident_bytes(self, which: str = "VmRSS") -> int:
        """Its memory; VmHWM: the most that it ever was."""
        found = re.search(rf"{which}:\s+(\d+) kB", Path(f"/proc/{self.machine.pid}/status").read_text())
        assert found is not None
        return int(found[1]) << 10

    def check_reading(self) -> None:
        """All vCPUs go on reading their clock."""
        before = self.machine.ask("reads")
        wait_until(lambda: all(now != then for now, then in zip(self.machine.ask("reads"), before, strict=True)))


class Client:
    """A client that speaks bytes, and hears lines."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))  # with a time limit it would fail where others wait
        self.socket.settimeout(HANG_S)
        self._lines = self.socket.makefile("rb")

    def talk(self, *texts: bytes) -> list[Any]:
        """All that comes for these, sent meanwhile; what stands unfinished is ended."""
        text = b"".join(text + ANEW for text in texts) + b'{"execute":"qom-list-types","arguments":{"x":1},"id":"end"}'
        found = []
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(self.socket.sendall, text)  # meanwhile: it takes no more than it is read
            while (message := json.loads(self._lines.readline())).get("id") != "end":
                found.append(message)
            sent.result()
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self.socket.close()


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Return one; a file that a command should write would be in `tmp_path`."""
    path = tmp_path / "qmp.sock"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with watched_machine(qmp=path) as machine:
        yield Target(machine, path)


def check(message: dict[str, Any]) -> None:
    """Each answer is one: by QEMU's classes, in words, and no fault of ours."""
    if "error" in message:
        assert message["error"]["class"] in CLASSES
        assert message["error"]["desc"]
        assert "internal error" not in message["error"]["desc"], message
    else:
        assert message.keys() & {"return", "event", "QMP"}, message


def is_alive(target: Target) -> bool:
    """Is the next client served, and does the guest run?"""
    with Client(target.path) as client:
        answers = client.talk(NEGOTIATE, b'{"execute":"cont"}', b'{"execute":"query-status"}')
    assert [message for message in answers if "return" in message][-1]["return"]["running"]
    target.check_reading()
    return True


def bombard(target: Target, count: int, seed: int) -> int:
    """Send so many malformed inputs; how many bytes the server has more afterwards than after the first of them."""
    inputs = malformed(seed, count)
    first = 0
    with Client(target.path) as client:
        client.talk(NEGOTIATE)
        for number in range(0, count, BATCH):
            for message in client.talk(*islice(inputs, BATCH)):
                check(message)
            if number == count // 10 // BATCH * BATCH:
                first = target.resident_bytes()
            if number % 2000 == 0:
                client.talk(b'{"execute":"cont"}')
                target.check_reading()
    assert is_alive(target)
    return target.resident_bytes() - first


def test_malformed_inputs(target: Target) -> None:
    """Thousands: each is answered or ended, the guest reads on, and the memory is what it was."""
    assert bombard(target, 2500, seed=1) < MEMORY_BYTES_MAX


@pytest.mark.long
def test_a_hundred_thousand_malformed_inputs(target: Target) -> None:
    """0 crashes, 0 vCPUs that stand still, and no more memory."""
    assert bombard(target, 100_000, seed=2) < MEMORY_BYTES_MAX


def test_ten_megabytes_without_a_newline(target: Target) -> None:
    """A string, a word, spaces, and lists in lists: no value is that long, and none is kept."""
    before = target.resident_bytes()
    for text in (
        b'"' + b"a" * 10**7,
        b"a" * 10**6,
        b" " * 10**6,
        b'"' + b"\\'" * 10**6,
        b"[" * 10**5,
        b'{"a":' * 10**4,
    ):
        with Client(target.path) as client:
            for message in client.talk(NEGOTIATE, text):
                check(message)
    assert target.resident_bytes("VmHWM") - before < MEMORY_BYTES_MAX
    assert is_alive(target)


def test_clients_that_vanish(target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    """Before the greeting, within a message, within an answer, a hundred at once: the next one is served in peace."""
    for text in (b"", b'{"exec', NEGOTIATE, NEGOTIATE + b'{"execute":"query-commands"}' * 50):
        for _ in range(10):
            with Client(target.path) as client:
                client.socket.sendall(text)
    with ExitStack() as clients:
        for _ in range(100):
            waiting = clients.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with suppress(BlockingIOError):  # as many wait as it lets wait
                waiting.connect(str(target.path))
    assert is_alive(target)
    assert capfd.readouterr().err == ""


def test_a_client_that_never_reads(target: Target) -> None:
    """It is not read either once it has enough to read, so that its answers fill no memory, and the guest runs on."""
    before = target.resident_bytes()
    with Client(target.path) as client:
        client.socket.send(NEGOTIATE)
        client.socket.setblocking(False)
        with suppress(BlockingIOError):
            while client.socket.send(b'{"execute":"query-qmp-schema"}'):
                pass
        target.check_reading()
    assert is_alive(target)
    assert target.resident_bytes("VmHWM") - before < UNREAD_BYTES_MAX
