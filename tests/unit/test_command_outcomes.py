"""What every command says in the same way: JSON of one shape, exit statuses, help, and what doctor advises."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from pvclock.commands import _parser, main
from pvclock.commands.doctor import next_command
from pvclock.commands.outcome import Outcome, error_json, outcome_json
from pvclock.errors import KvmUnavailable, LabError, MsrFault, PvclockError
from pvclock.meter.figure import Figure
from qemu_glue import QemuExited
from tests.command_line import ROOT, run_pvclock

pytestmark = pytest.mark.row("E13")

STATES = Path(__file__).parents[1] / "states"
COMMANDS = {
    "doctor": [],
    "demo": ["--seconds", "0.2"],
    "scale": ["2.4GHz"],
    "state": ["check", str(STATES / "v2-typical.json")],
}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Each command's parser, by its name."""
    (choices,) = (action.choices for action in _parser()._actions if isinstance(action.choices, dict))
    return dict(choices)


@pytest.mark.parametrize(("name", "needed"), [("run", {"importlib.metadata"}), ("scale", {"rich"})])
def test_a_command_loads_no_other(name: str, needed: set[str]) -> None:
    """It begins without the other commands' modules, and without what it does not need itself.

    `pvclock run` looks at what is installed, for its services' options; `pvclock scale` draws a table.
    """
    program = f"import sys; from pvclock.commands import main; main(['{name}', '--help']); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = set(ran.stdout.splitlines()[-1].split())
    assert {f"pvclock.commands.{each}" for each in ("run", "demo", "scale")} & loaded == {f"pvclock.commands.{name}"}
    assert {"qemu_glue", "rich", "pvclock.lab", "importlib.metadata"} & loaded == needed


@pytest.mark.parametrize("name", ["screen", "outcome", "run.run", "-", "Run"])
def test_what_commands_share_is_no_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A module beside the commands', and a name that is none, are refused as any unknown command."""
    assert main([name]) == 2
    assert f"invalid choice: {name!r}" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_one_shape(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command's document has schema, version, ok and result; the exit status is 0 if ok and 1 if not."""
    monkeypatch.setattr("pvclock.commands.demo.open_kvm", no_kvm)
    status = main([name, "--json", *COMMANDS[name]])
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["schema", "version", "ok", "result"]
    assert document["schema"] == f"pvclock.{name}/1"
    assert document["version"] == version("pvclock")
    assert status == int(not document["ok"])
    assert isinstance(document["result"], dict)
    assert not list(texts_that_are_numbers(document["result"]))


def no_kvm() -> None:
    """As where there is no device: the demonstration in this process is the quick one."""
    raise KvmUnavailable("open /dev/kvm", 2)


def texts_that_are_numbers(value: Any, key: str = "") -> Any:  # noqa: ANN401  # JSON
    """Give the keys whose value is a number's text, and not what people read (`text`) or a version."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from texts_that_are_numbers(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from texts_that_are_numbers(each, key)
    elif isinstance(value, str) and key != "text" and value.strip("+-.,xX ").replace(",", "").isdigit():
        yield key


def test_a_cell_has_its_text_and_its_numbers() -> None:
    """What a table shows stands beside the numbers that it is made of, whose keys have their unit."""
    shown = Figure("-25.9 us", {"wall_clock_error_ns": -25_912})
    document = json.loads(outcome_json("x", Outcome(False, {"engine": shown})))
    assert document["result"] == {"engine": {"text": "-25.9 us", "values": {"wall_clock_error_ns": -25912}}}


def test_a_status_of_its_own() -> None:
    """A report's exit status is 0 for ok and 1 for a finding, unless it has one of its own."""
    assert [Outcome(ok, {}).exit_status for ok in (True, False)] == [0, 1]
    assert Outcome(False, {}, 127).exit_status == 127


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MsrFault(0x4B564D01, 5), {"index": 0x4B564D01, "value": 5}),
        (KvmUnavailable("open /dev/kvm", 13, "see there"), {"errno": 13, "call": "open /dev/kvm"}),
        (LabError("it did not boot", "the end"), {"console_tail": "the end"}),
        (QemuExited(-9, ["qemu", "-S"], "x"), {"exit_code": -9, "command": ["qemu", "-S"], "output": "x"}),
        (PermissionError(13, "Permission denied", "/nowhere"), {"errno": 13, "path": "/nowhere"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_keeps_its_numbers(error: PvclockError, told: dict[str, object]) -> None:
    """In JSON an error has its kind, its message and what it carries."""
    document = json.loads(error_json("x", error))
    assert list(document) == ["schema", "version", "ok", "error"]
    assert not document["ok"]
    assert document["error"]["kind"] == type(error).__name__
    assert document["error"]["message"]
    assert document["error"].items() >= told.items()


def test_a_file_of_the_systems_is_named_without_its_number() -> None:
    """An OSError of Python's says which file and why, as a shell does."""
    document = json.loads(error_json("x", PermissionError(13, "Permission denied", "/nowhere")))
    assert document["error"]["message"] == "/nowhere: Permission denied"


@pytest.mark.parametrize(
    ("working", "command"),
    [
        ({"engine_clock": True, "kvm_guests": True, "crosscheck": True, "lab": True}, "pvclock demo"),
        ({"engine_clock": True, "kvm_guests": True, "crosscheck": False, "lab": False}, "pvclock demo"),
        ({"engine_clock": True, "kvm_guests": False, "crosscheck": False, "lab": True}, "pvclock lab -- pvclock demo"),
    ],
)
def test_the_next_command(working: dict[str, bool], command: str) -> None:
    """Real vCPUs come first, then those of the lab."""
    assert next_command(working)[0] == command


def test_the_next_command_without_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without KVM and the lab's programs: get them, where there is an apt-get, else see the clock in this process."""
    nothing = {"engine_clock": True, "kvm_guests": False, "crosscheck": False, "lab": False}
    monkeypatch.setattr("pvclock.commands.doctor.install_commands", lambda: ["apt-get install -y file"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert next_command(nothing)[0] == "pvclock demo"
    (tmp_path / "apt-get").touch(mode=0o755)
    assert next_command(nothing)[0].removeprefix("sudo ") == "apt-get install -y file"


def test_doctor_begins_with_what_works() -> None:
    """The first two lines say what works here and what to type next; JSON has the same."""
    first, second, *_ = run_pvclock("doctor").stdout.splitlines()
    result = json.loads(run_pvclock("doctor", "--json").stdout)["result"]
    assert set(result["works"]) == {"engine_clock", "kvm_guests", "crosscheck", "lab"}
    assert first.startswith("Works here: engine clock")
    assert ("KVM guests" in first.partition("Not:")[0]) == result["works"]["kvm_guests"]
    assert second.startswith(f"Type next:  {result['next']['command']}  (")


def test_doctor_advises_where_something_lacks() -> None:
    """What is as it should be has no advice."""
    findings = json.loads(run_pvclock("doctor", "--json").stdout)["result"]["findings"]
    assert [finding["name"] for finding in findings if bool(finding["advice"]) == finding["ok"]] == []


@pytest.mark.parametrize("name", ["", *parsers()])
def test_help_fits_and_says_what_to_type_first(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each --help is within 80 columns and has lines to type."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert f"Type first:\n  pvclock {name}" in shown


def test_help_is_what_is_shown_without_a_command() -> None:
    """`pvclock` alone is `pvclock --help`, within 80 columns where no terminal is."""
    done = run_pvclock("--help")
    assert done.status == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert run_pvclock() == done


def test_the_document_of_the_commands_is_whole() -> None:
    """docs/commands.md has each command, each of its options, and its schema."""
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    every = parsers()
    assert {"crosscheck", "demo", "doctor", "lab", "scale", "state"} <= {name.split()[0] for name in every if name}
    for name, parser in every.items():
        _, found, section = text.partition(f"## pvclock {name}\n")
        assert found, name
        section = section.partition("\n## ")[0]
        options = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
        assert {option for option in options - {"--help", "--json"} if f"`{option}" not in section} == set()
        assert f"`pvclock.{name}/1`" in section
