"""One conversation with a real QEMU and with our server: the same answers, but for versions and stamps."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from pvclock.machine import Machine
from qemu_glue.face.served import serve
from tests.waiting import HANG_S

pytestmark = [pytest.mark.row("E15"), pytest.mark.kvm, pytest.mark.qemu]

LOOP: Final = bytes.fromhex("ebfe")
CONVERSATION: Final = (
    b'{"execute":"query-status"}',
    b'{"execute":"nope","id":1}',
    b'{"execute":"qmp_capabilities"}',
    b'{"execute":"qmp_capabilities"}',
    b'{"execute":"query-status","id":{"a":[1]}}',
    b'{"execute"\n:\n"query-status"}',
    b"{'execute':'query-status','id':'it\\'s'}",
    b'{"execute":"nope"}',
    b"[]",
    b"3 ",
    b'"x" ',
    b'{"exec":"a"}',
    b'{"execute":3}',
    b'{"execute":"stop","arguments":[]}',
    b'{"execute":"stop","arguments":{"a":1}}',
    b"{}",
    b'{"execute":"pmemsave"}',
    b'{"execute":"pmemsave","arguments":{"val":"x","size":1,"filename":"a"}}',
    b'{"execute":"pmemsave","arguments":{"val":1.5,"size":1,"filename":"a"}}',
    b'{"execute":"pmemsave","arguments":{"val":1,"size":1,"filename":3}}',
    b'{"execute":"pmemsave","arguments":{"val":1,"size":1,"filename":"/none/a","x":1}}',
    b'{"execute":"stop","foo":1}',
    b"}",
    b'{"execute":"stop", "execute":"cont"}',
    b"\xff",
    b"[1,[2\n]]",
    b'{"execute":"stop"}',
    b'{"execute":"stop"}',
    b'{"execute":"query-status"}',
    b'{"execute":"cont"}',
    b'{"execute":"cont"}',
    b'{"execute":"query-status"}',
    b'{"execute":"system_reset"}',
    b'{"execute":"query-kvm"}',
)


def talk(connection: socket.socket) -> list[list[Any]]:
    """All that comes for each part of the conversation, the greeting first; a marked command tells where it ends."""
    lines = connection.makefile("rb")
    found = [[json.loads(lines.readline())]]
    for number, text in enumerate(CONVERSATION):
        mark = f"mark {number}"
        connection.sendall(text + b'{"execute":"query-version","id":"%s"}' % mark.encode())
        found.append([])
        while (message := json.loads(lines.readline())).get("id") != mark:
            found[-1].append(message)
    return [[shape(message) for message in part] for part in found]


def shape(message: dict[str, Any]) -> Any:  # noqa: ANN401  # JSON
    """A message without what is QEMU's own: stamps and versions, what capabilities it offers, its parser's words."""
    if "QMP" in message:
        return {key: {name: type(each).__name__ for name, each in inner.items()} for key, inner in message.items()}
    if "event" in message:
        return message["event"], message.get("data")
    if message.get("error", {}).get("desc", "").startswith("JSON parse error"):
        return message["error"]["class"], "JSON parse error"
    return message


@contextmanager
def a_qemu(path: Path) -> Iterator[None]:
    """A QEMU with its monitor at `path`, whose guest does nothing, and boots again where it is reset."""
    command = ["qemu-system-x86_64", "-M", "none", "-accel", "kvm", "-nodefaults", "-display", "none"]
    monitor = ["-qmp", f"unix:{path},server=on,wait=off"]
    with subprocess.Popen([*command, *monitor]) as process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def ours(path: Path) -> Iterator[None]:
    """A machine of ours with its monitor at `path`."""
    with Machine(LOOP, clock="kernel") as machine, serve(machine, path, list):
        machine.start()
        yield


def told_by(path: Path) -> list[list[Any]]:
    """The conversation, with what listens at `path` as soon as it does."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(HANG_S)
        while True:
            try:
                connection.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                continue
            return talk(connection)


def test_the_same_conversation(tmp_path: Path) -> None:
    """Keys, types, error classes and their words, events and their order are QEMU's."""
    with a_qemu(tmp_path / "qemu"):
        theirs = told_by(tmp_path / "qemu")
    with ours(tmp_path / "ours"):
        found = told_by(tmp_path / "ours")
    for text, expected, seen in zip((b"", *CONVERSATION), theirs, found, strict=True):
        assert (text, seen) == (text, expected)
