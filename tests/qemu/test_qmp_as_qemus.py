"""One conversation with a real QEMU and with our server: the same answers, but for versions and stamps."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Final

import pytest

from pvclock.machine import Machine
from qemu_glue.face.served import serve
from tests.waiting import HANG_S

pytestmark = [pytest.mark.row("E15"), pytest.mark.kvm, pytest.mark.qemu]

LOOP: Final = bytes.fromhex("ebfe")
CPU: Final = "/machine/unattached/device[0]"
CONVERSATION: Final = (
    b'{"execute":"query-status"}',
    b'{"execute":"nope","id":1}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":3}}',
    b'{"execute":"qmp_capabilities","arguments":{"on":true}}',
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
    b'{"execute":"query-status"}',
    b'{"execute":"stop"}{"execute":"system_reset"}{"execute":"query-status"}',
    b'{"execute":"stop"}',
    b'{"execute":"system_reset"}',
    b'{"execute":"query-status"}',
    b'{"execute":"cont"}',
    b'{"execute":"query-kvm"}',
    b'{"execute":"pmemsave","arguments":{"val":9223372036854775808,"size":1,"filename":"/none/a"}}',
    b'{"execute":"pmemsave","arguments":{"val":18446744073709551616,"size":1,"filename":"/none/a"}}',
    b'{"execute":"pmemsave","arguments":{"val":true,"size":1,"filename":"/none/a"}}',
    b'{"execute":"pmemsave","arguments":{"val":1e3,"size":1,"filename":"/none/a"}}',
    b'{"execute":"pmemsave","arguments":{"val":0,"size":1,"filename":null}}',
    b'{"execute":"pmemsave","arguments":{"val":0,"size":1,"filename":"/none/a"}}',
    b'{"execute":"query-status","arguments":null}',
    b'{"execute":"query-status","id":null}',
    b'{"execute":"query-status","exec-oob":"stop"}',
    b'{"execute":""}',
    b'{"execute":"query-status","control":{}}',
    b'{"execute":"quit","arguments":{"now":true}}',
)


def asks(command: str, *arguments: str) -> Iterator[bytes]:
    """The command with each of the arguments, in JSON without the outer brackets."""
    return (b'{"execute":"%s","arguments":{%s}}' % (command.encode(), each.encode()) for each in arguments)


OBJECTS: Final = (
    b'{"execute":"qmp_capabilities"}',
    *asks("qom-list", "", '"path":3', '"path":"/nope"', '"path":""', '"path":"/machine/type"', '"path":"//nope/"'),
    *asks(
        "qom-get",
        '"path":"/machine","property":"type"',
        '"path":"/machine","property":"nope"',
        '"path":"/nope","property":"type"',
        '"path":"","property":"type"',
        '"path":"machine","property":"unattached"',
        '"path":"unattached/","property":"type"',
        '"path":"/","property":"machine"',
        f'"path":"{CPU}","property":"type"',
        '"path":"device[0]","property":"realized"',
        f'"path":"{CPU}","property":"hotplugged"',
        f'"path":"{CPU}","property":"apic-id"',
        f'"path":"{CPU}/nope","property":"type"',
        '"path":"/machine"',
    ),
    *asks(
        "qom-set",
        '"path":"/machine","property":"type","value":"x"',
        '"path":"/machine","property":"nope","value":null',
        '"path":"/nope","property":"nope","value":"x"',
        '"path":"","property":"type","value":1',
        '"path":"/machine","property":"type"',
        '"path":"/machine","property":"unattached","value":"/machine"',
        f'"path":"{CPU}","property":"realized","value":7',
        f'"path":"{CPU}","property":"realized","value":true',
        f'"path":"{CPU}","property":"hotplugged","value":true',
        f'"path":"{CPU}","property":"realized","value":true,"x":1',
    ),
    *asks("qom-list-types", '"implements":"container"', '"implements":"nope"', '"implements":3', '"abstract":3'),
    *asks("qom-list-properties", "", '"typename":"nope"'),
    *asks("device-list-properties", '"typename":"nope"', '"typename":"container"', '"typename":"device"'),
    *asks(
        "human-monitor-command",
        "",
        '"command-line":3',
        '"command-line":"info status","cpu-index":"x"',
        '"command-line":"info status","cpu-index":9',
        '"command-line":"info status","x":1',
    ),
)
LINES: Final = (
    *("info status", "  info   status  ", "info status x", "info nope", "nope", "", "help nope", "help info status"),
    *("help xp", "help gpa2hva", "info registers x", "info registers 9", "info mtree -q", "info mtree x"),
    *("gpa2hva", "gpa2hva zz", "gpa2hva 0xffffffffff", "gpa2hva 0xfec00000", "gpa2hva 0 0"),
    *("xp 0x8000", "xp/4x 0x8000", "xp /4xg 0x8000", "xp 0x8000", "xp /3xw 0xffffffffff", "xp /3xb 0x8000"),
    *("xp /20dh 0x8000", "xp /20c 0x8000", "xp", "xp /x", "xp /x zzz", "xp /q 0", "xp /2x 0 7", "xp /2x 0x10+0x10"),
    *("xp /8ob 0x8000", "xp /3ow 0x8000", "xp /3og 0x8000", "xp /3ug 0x8000", "xp /0x 0", "xp /x8", "xp / 0x8000"),
    *("xp /4xw 0xfffff8", "xp /2x 010", "xp /2x 0x", "xp /x 089", "xp /2x (16*2-8)/2%7", "xp /x 0x10000000000000000"),
    *(
        "xp /x -8",
        "xp /x ~0",
        "xp /x 'a'",
        "xp /x 'a",
        "xp /x (5",
        "xp /x 5/0",
        "xp /x 5%0",
        "xp /x $nope",
        "xp /-3x 0",
    ),
    *("xp /x 1+2*3&1", "xp /x 6&2+1", "xp /x 6|2*4", "xp /x 5 + 3", "xp /x 7^2", "xp /xbg 8", "xp /L 8"),
)
"""Lines of HMP.  The guests' RAM is empty from 0x8000 on, and of 16 MiB."""


def talk(connection: socket.socket, conversation: Sequence[bytes]) -> list[list[Any]]:
    """All that comes for each part of the conversation, the greeting first; a marked command tells where it ends."""
    lines = connection.makefile("rb")
    found = [[json.loads(lines.readline())]]
    for number, text in enumerate(conversation):
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
def a_qemu(path: Path, *machine: str) -> Iterator[None]:
    """A QEMU with its monitor at `path`, whose guest does nothing, and boots again where it is reset."""
    command = ["qemu-system-x86_64", *machine, "-accel", "kvm", "-nodefaults", "-display", "none"]
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


def told_by(path: Path, conversation: Sequence[bytes] = CONVERSATION) -> list[list[Any]]:
    """What it says to the conversation: what listens at `path`, as soon as it does."""
    with connected(path) as connection:
        return talk(connection, conversation)


def connected(path: Path) -> socket.socket:
    """A connection with what listens at `path`, as soon as it does."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(HANG_S)
    while True:
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            continue
        return connection


def test_the_same_conversation(tmp_path: Path) -> None:
    """Keys, types, error classes and their words, events and their order are QEMU's."""
    with a_qemu(tmp_path / "qemu", "-M", "none"):
        theirs = told_by(tmp_path / "qemu")
    with ours(tmp_path / "ours"):
        found = told_by(tmp_path / "ours")
    for text, expected, seen in zip((b"", *CONVERSATION), theirs, found, strict=True):
        assert (text, seen) == (text, expected)


def told_at_the_end(path: Path) -> list[Any]:
    """What comes after `quit`, until it hangs up."""
    with connected(path) as connection:
        connection.sendall(b'{"execute":"qmp_capabilities"}{"execute":"quit","id":1}')
        return [shape(json.loads(line)) for line in connection.makefile("rb")]


@contextmanager
def ours_until_quit(path: Path) -> Iterator[None]:
    """A machine of ours that ends as a client says, as that of `pvclock run --qmp` does."""
    quits, is_there = Event(), Event()

    def run() -> None:
        with Machine(LOOP, clock="kernel") as machine, serve(machine, path, quits.set):
            machine.start()
            is_there.set()
            quits.wait(HANG_S)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        is_there.wait(HANG_S)
        yield
        running.result()


def test_quit_is_the_same(tmp_path: Path) -> None:
    """SHUTDOWN, its reason, the answer, and then it hangs up."""
    with a_qemu(tmp_path / "qemu", "-M", "none"):
        theirs = told_at_the_end(tmp_path / "qemu")
    with ours_until_quit(tmp_path / "ours"):
        assert told_at_the_end(tmp_path / "ours") == theirs
    assert theirs[2:] == [("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}), {"return": {}, "id": 1}]


MICROVM: Final = ("-M", "microvm", "-cpu", "host,-arch-capabilities", "-m", "16", "-smp", "2", "-S")


@contextmanager
def ours_in_prelaunch(path: Path) -> Iterator[None]:
    """A machine of ours as MICROVM is one."""
    with Machine(LOOP, vcpus=2, clock="kernel") as machine, serve(machine, path, list):
        yield


def without_machine_types(found: list[list[Any]]) -> Any:  # noqa: ANN401  # JSON
    """What was told, with one name for the machines of both, and without the greeting."""
    text = json.dumps(found[1:])
    return json.loads(text.replace("microvm-machine", "a machine").replace("pvclock-machine", "a machine"))


def test_objects_are_asked_for_as_qemus(tmp_path: Path) -> None:
    """Objects, types and properties: errors, their classes and words, and what all machines have."""
    with a_qemu(tmp_path / "qemu", *MICROVM):
        theirs = without_machine_types(told_by(tmp_path / "qemu", OBJECTS))
    with ours_in_prelaunch(tmp_path / "ours"):
        found = without_machine_types(told_by(tmp_path / "ours", OBJECTS))
    for text, expected, seen in zip(OBJECTS, theirs, found, strict=True):
        assert (text, seen) == (text, expected)


def test_lines_for_people_are_answered_as_qemus(tmp_path: Path) -> None:
    """HMP's formats, expressions and complaints, to the last blank."""
    asked = (OBJECTS[0], *asks("human-monitor-command", *(f'"command-line":{json.dumps(line)}' for line in LINES)))
    with a_qemu(tmp_path / "qemu", *MICROVM):
        theirs = told_by(tmp_path / "qemu", asked)
    with ours_in_prelaunch(tmp_path / "ours"):
        found = told_by(tmp_path / "ours", asked)
    for text, expected, seen in zip(("", *asked), theirs, found, strict=True):
        if text:
            assert (text, seen) == (text, expected)


def test_what_both_have_is_of_the_same_type(tmp_path: Path) -> None:
    """Properties and children by the paths of QEMU, and registers in its format."""
    asked = (
        OBJECTS[0],
        *asks("qom-list", '"path":"/"', '"path":"/machine"', f'"path":"{CPU}"', '"path":"/objects"'),
        *asks("qom-list-properties", '"typename":"device"', '"typename":"host-x86_64-cpu"'),
    )
    with a_qemu(tmp_path / "qemu", *MICROVM):
        theirs = without_machine_types(told_by(tmp_path / "qemu", asked))[1:]
    with ours_in_prelaunch(tmp_path / "ours"):
        found = without_machine_types(told_by(tmp_path / "ours", asked))[1:]
    for expected, seen in zip(theirs, found, strict=True):
        types, own = ({each["name"]: each["type"] for each in part[0]["return"]} for part in (expected, seen))
        both = types.keys() & own.keys()
        assert "type" in both
        assert {name: types[name] for name in both} == {name: own[name] for name in both}


def test_registers_are_printed_as_qemus(tmp_path: Path) -> None:
    """The same lines, but for the numbers, up to the FPU's."""
    asked = (OBJECTS[0], *asks("human-monitor-command", '"command-line":"info registers 1"'))
    with a_qemu(tmp_path / "qemu", *MICROVM):
        theirs = told_by(tmp_path / "qemu", asked)[2][0]["return"]
    with ours_in_prelaunch(tmp_path / "ours"):
        found = told_by(tmp_path / "ours", asked)[2][0]["return"]
    expected = theirs[: theirs.index("FCW=")]
    assert re.sub("[0-9a-f]+", "N", found) == re.sub("[0-9a-f]+", "N", expected)
    assert [len(line) for line in found.splitlines()] == [len(line) for line in expected.splitlines()]
