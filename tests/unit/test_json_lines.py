"""A command whose JSON is lines: all of it, errors too, is one object a line; and a terminal that is redrawn."""

from __future__ import annotations

import json
import os
import pty
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from pvclock.commands import main
from pvclock.commands.outcome import Outcome, line_json
from pvclock.commands.screen import Screen, write
from pvclock.errors import StateError

pytestmark = pytest.mark.row("E13")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Give the module of a command `lines`, which writes a line and reports; it is installed."""
    module = ModuleType("lines", "Write lines.")
    module.__dict__.update(JSON_LINES=True, EXAMPLES="  pvclock lines", add_arguments=lambda _: None)
    module.__dict__["run"] = run
    point = EntryPoint("lines", "lines", "pvclock.commands")
    monkeypatch.setattr("pvclock.commands._points", lambda: [point])
    monkeypatch.setattr(EntryPoint, "load", lambda _: module)
    return module


def run(*_: object) -> Outcome:
    """Write a line, and report a finding."""
    write(line_json("lines", {"kind": "step", "numbers": (1, 2)}) + "\n")
    return Outcome(False, {"steps": 1})


@pytest.mark.usefixtures("command")
def test_the_report_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is an object with the schema; the last is what other commands print alone."""
    assert main(["lines", "--json"]) == 1
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"schema": "pvclock.lines/1", "kind": "step", "numbers": [1, 2]}
    assert list(last) == ["schema", "version", "ok", "result"]
    assert last["result"] == {"steps": 1}


@pytest.mark.parametrize("arguments", [["--frobnicate"], []], ids=["wrong argument", "failure"])
def test_an_error_is_a_line(
    arguments: list[str], command: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps it from its work is one line, too."""

    def fail(*_: object) -> Outcome:
        raise StateError("watch", "it ended", "start it")

    monkeypatch.setattr(command, "run", fail)
    assert main(["lines", "--json", *arguments]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert list(json.loads(line)) == ["schema", "version", "ok", "error"]


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, kind: str) -> Iterator[int]:
    """Have a terminal of this kind as standard output; gives the end from which to read what was drawn."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        monkeypatch.setenv("TERM", kind)
        yield ours
    os.close(ours)


def test_what_was_drawn_is_replaced_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second drawing begins above the first, and nothing stays; what is shown then stands there instead."""
    with terminal(monkeypatch, "xterm") as output:
        screen = Screen()
        assert screen.can_redraw
        with screen.redrawing() as draw:
            draw("one", "two")
            draw("three")
        screen.show("the end")
        drawn = ""
        while not drawn.endswith("the end\r\n"):
            drawn += os.read(output, 1 << 16).decode()
    up_and_erased = "\x1b[1A\x1b[2K"
    assert drawn.index("one") < drawn.index(up_and_erased) < drawn.index("three")
    assert drawn.rindex(up_and_erased) > drawn.index("three")


@pytest.mark.parametrize(("kind", "quiet"), [("dumb", False), ("xterm", True)])
def test_what_cannot_be_redrawn(kind: str, quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that only takes lines, and one to which JSON goes."""
    with terminal(monkeypatch, kind):
        assert not Screen(quiet=quiet).can_redraw


def test_a_pipe_is_not_redrawn() -> None:
    """Readers of a pipe want lines."""
    assert not Screen().can_redraw
