"""`pvclock ctl`: what is typed becomes a command's arguments, and its answer is shown, or why there is none."""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, RangeError
from pvclock.commands import main
from pvclock.commands.screen import _drawn
from qemu_glue.ctl.key_values import arguments_of
from qemu_glue.ctl.views import answer_in_words
from qemu_glue.face.dispatch import Command, command_of
from qemu_glue.face.server import QmpServer
from tests.command_line import ROOT
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.row("E15")

VERSION: Final = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
SCHEMA: Final = [
    {"name": "add", "meta-type": "command", "arg-type": "1", "ret-type": "int"},
    {
        "name": "1",
        "meta-type": "object",
        "members": [
            {"name": "left", "type": "int"},
            {"name": "right-one", "type": "int", "default": None},
            {"name": "how", "type": "2", "default": None},
            {"name": "each", "type": "[int]", "default": None},
        ],
    },
    {"name": "2", "meta-type": "enum", "values": ["fast", "well"]},
    {"name": "[int]", "meta-type": "array", "element-type": "int"},
    {"name": "int", "meta-type": "builtin", "json-type": "int"},
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


class Served:
    """A server with some commands, and where it is."""

    def __init__(self, path: Path, server: QmpServer) -> None:
        self.path, self.server = str(path), server

    def ctl(self, *words: str) -> int:
        """Run the command on it; the exit status."""
        return main(["ctl", self.path, *words])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """Return a server."""
    commands: dict[str, Command] = {}
    with QmpServer(tmp_path / "qmp.sock", commands, VERSION) as made:

        def add(left: int, right_one: int = 1, how: str = "well", each: list[int] | None = None) -> object:
            if how == "fast":
                raise RangeError("that is too fast")
            made.emit("RESET", {"guest": False})
            return left + right_one + sum(each or ())

        def hello() -> None:
            pass

        commands |= {"add": command_of(add), "hello": command_of(hello)}
        commands["query-commands"] = command_of(lambda: [{"name": "nap"}, {"name": "add"}])
        commands["query-qmp-schema"] = command_of(lambda: SCHEMA)
        yield Served(tmp_path / "qmp.sock", made)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ([], {}),
        (["ns=-1000", "to=+7", "val=0x1000", "old=007"], {"ns": -1000, "to": 7, "val": 4096, "old": 7}),
        (["a=true", "b=False", "c=on", "d="], {"a": True, "b": False, "c": "on", "d": ""}),
        (["a=1.5", "b=1_000", "c=0x", "d=" + "9" * 21], {"a": "1.5", "b": "1_000", "c": "0x", "d": "9" * 21}),
        (["command-line=info status", "x=a=b"], {"command-line": "info status", "x": "a=b"}),
        (['a={"b":[1]}', "c=[]"], {"a": {"b": [1]}, "c": []}),
        (["a:=1.5", 'b:="7"', "c:=null"], {"a": 1.5, "b": "7", "c": None}),
        (["a.b=1", "a.c.d:=true", "e=2"], {"a": {"b": 1, "c": {"d": True}}, "e": 2}),
    ],
)
def test_values_as_they_are_typed(words: list[str], arguments: dict[str, object]) -> None:
    """Integers, booleans, objects and lists as qmp-shell has them, hexadecimal numbers, and any JSON behind `:=`."""
    found = arguments_of(words)
    assert found == arguments
    assert json.dumps(found) == json.dumps(arguments)  # 1 is not true


@given(value=VALUES)
def test_any_json_can_be_typed(value: object) -> None:
    """Behind `:=` each value is the value."""
    assert arguments_of([f"key:={json.dumps(value)}"]) == {"key": value}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["stop"], "'stop' is no argument; write key=value, or key:=JSON"),
        (["=1"], "'=1' is no argument"),
        (["a..b=1"], "'a..b=1' is no argument"),
        (["a=[1"], r"'a=\[1': '\[1' is no JSON"),
        (["a:=text"], r"a string goes in quotes there, as in key:='\"text\"'"),
        (["a:=NaN"], "NaN is no JSON"),
        (["a:=" + "[" * 100_000], "is no JSON"),
        (["a=1", "a=2"], "a has a value already; give each key once"),
        (["a=1", "a.b=2"], "a has a value already, so a.b cannot be its member|a.b has a value already"),
        (["a.b=1", "a=2"], "a has a value already"),
    ],
)
def test_what_cannot_be_typed(words: list[str], complaint: str) -> None:
    """It is refused before anything is sent, with what to write."""
    with pytest.raises(ConfigError, match=complaint):
        arguments_of(words)


@pytest.mark.parametrize(
    ("answer", "lines"),
    [
        ({}, ["done"]),
        ("VM status: running\r\n", ["VM status: running"]),
        ("\x1b[31mred", [r"\x1b[31mred"]),
        (7, ["7"]),
        (None, ["null"]),
        ([], ["name  value", "      []"]),
        ({"qemu": {"major": 7}, "package": ""}, ["name        value", "qemu.major  7", "package"]),
        ([{"name": "a", "n": 1}, {"name": "b", "n": 2}], ["name  n", "a     1", "b     2"]),
        ([{"a": 1}, {"b": [2]}], ["name     value", "[0].a    1", "[1].b[0]  2".replace("  2", " 2")]),
    ],
)
def test_answers_are_shown(answer: object, lines: list[str]) -> None:
    """Text as it is, without what would command a terminal; what has names as a table; nothing cut."""
    shown = "".join(_drawn(part, None) for part in answer_in_words(answer)).splitlines()
    assert [" ".join(line.split()) for line in shown] == [" ".join(line.split()) for line in lines]


def test_an_answer_and_what_was_told_meanwhile(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """Events first, each on a line with its instant and data; with --json all of it in one object."""
    assert served.ctl("add", "left=2", "each=[3,4]") == 0
    event, answer = capsys.readouterr().out.splitlines()
    assert event[10] == "T"
    assert event.endswith('Z RESET {"guest": false}')
    assert answer == "10"
    assert served.ctl("--json", "add", "left=2") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["ok"]) == ("pvclock.ctl/1", True)
    (told,) = document["result"].pop("events")
    assert document["result"] == {"command": "add", "arguments": {"left": 2}, "return": 3}
    assert (told["event"], told["data"]) == ("RESET", {"guest": False})


def test_without_a_command_those_that_there_are(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, with what is typed for their arguments where the server tells."""
    assert served.ctl() == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert shown == ["command arguments", "add left=int [right-one=int] [how=fast|well] [each=[...]]", "nap"]
    assert served.ctl("--json") == 0
    add, nap = json.loads(capsys.readouterr().out)["result"]["commands"]
    assert add["arguments"][1] == {"name": "right-one", "type": "int", "is_required": False}
    assert nap == {"name": "nap", "arguments": None}


@pytest.mark.parametrize(
    ("words", "error_class", "why"),
    [
        (("nope",), "CommandNotFound", "The command nope has not been found"),
        (("add", "left=x"), "GenericError", "Invalid parameter type for 'left', expected: integer"),
        (("add", "left=1", "how=fast"), "GenericError", "that is too fast"),
    ],
)
def test_what_the_server_refuses(
    served: Served, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], error_class: str, why: str
) -> None:
    """Status 2, in its words; with --json its error class, too."""
    assert served.ctl(*words) == 2
    assert capsys.readouterr().err == f"pvclock ctl: QMP {words[0]}: refused: {why}\n"
    assert served.ctl("--json", *words) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["error_class"], error["operation"]) == (error_class, words[0])


def test_another_client_is_there(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no answer while it is; that is told after a while, with what to do."""
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(served.path)
        other.recv(1)
        assert served.ctl("--timeout", "0.1", "hello") == 2
        assert "no greeting within 0.1 s; another client may have it" in capsys.readouterr().err
    assert served.ctl("hello") == 0
    assert capsys.readouterr().out == "done\n"


def test_nobody_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with the path is one line; a wrong argument is told before it is looked at."""
    assert main(["ctl", str(tmp_path / "none"), "stop"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main(["ctl", str(tmp_path / "none"), "stop", "now"]) == 2
    assert "'now' is no argument" in capsys.readouterr().err


@contextmanager
def following(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`pvclock ctl --follow` in a process of its own, for which SIGINT is what it is in a terminal."""
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{begin}; from pvclock.commands import main; raise SystemExit(main())"
    command = [sys.executable, "-c", program, "ctl", "--follow", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """Its next line."""
    assert process.stdout is not None
    return process.stdout.readline()


def test_events_are_followed(served: Served) -> None:
    """After the answer each event as it comes, until Ctrl-C, which is a normal end."""
    with following(served.path, "hello") as process:
        assert line_of(process) == "done\n"
        for name in ("STOP", "RESUME"):
            served.server.emit(name)
            assert line_of(process).endswith(f"Z {name}\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG_S) == 0


def test_events_are_followed_as_lines_of_json(served: Served) -> None:
    """One object an event, the report at last; the machine's end is a normal end."""
    with following("--json", served.path) as process:
        assert process.stdout is not None
        listener = process.stdout

        def is_heard() -> bool:
            served.server.emit("STOP", {"n": 1})
            return bool(select.select([listener], (), (), 0)[0])

        wait_until(is_heard)
        served.server.close()
        lines: list[dict[str, Any]] = [json.loads(line) for line in listener]
        assert process.wait(HANG_S) == 0
    *events, report = lines
    assert {(each["kind"], each["event"], each["data"]["n"]) for each in events} == {("event", "STOP", 1)}
    assert (report["ok"], report["result"]) == (True, {})
