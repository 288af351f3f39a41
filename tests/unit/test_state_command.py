"""`pvclock state`: what it shows of a saved state, and what it finds wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pvclock.commands import main
from pvclock.commands.state_clock import in_units
from pvclock.state import clock_state
from pvclock.state.clock_state import FIELDS
from tests.command_line import in_terminal_here
from tests.saved_states import KEPT, LEAST, TYPICAL

STATES = Path(__file__).parents[1] / "states"
TYPICAL_FILE = str(STATES / "v1-typical.json")


def broken(folder: Path, old: str, new: str) -> str:
    """A file with the typical state, changed as text."""
    path = folder / "broken.json"
    path.write_text(clock_state.to_json(TYPICAL).replace(old, new))
    return str(path)


@pytest.mark.row("P-25", "E1", "E13")
def test_show_has_values_units_and_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    """`state show` has a row a field, raw and in units, in sections of what is saved, derived and not saved."""
    assert main(["state", "show", TYPICAL_FILE]) == 0
    shown = capsys.readouterr().out
    for text in (
        *("SAVED", "DERIVED", "NOT SAVED", "vcpus[1].guest_tsc", "guest_memory", "shown.mul"),
        *("86400000000001/3", "28800.000000000 s", "2596.132000 MHz", "0x2000", "advance:max_ns=3600"),
        *("Catch-up policy for the time", "+5000 ticks", "2026-09-21", "-0.714285714 s"),
    ):
        assert text in shown


@pytest.mark.row("P-25", "E13")
@pytest.mark.parametrize("name", KEPT)
def test_show_as_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json, wherever it stands, each part of FIELDS comes with its mark, and the state as it is in files."""
    assert main(["state", "--json", "show", str(STATES / name)]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["result"]["files"]
    assert main(["state", "show", str(STATES / name), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["files"] == [shown]
    assert shown["state"] == clock_state.to_mapping(KEPT[name])
    marks = {row["field"].replace("[0]", "[]"): row["mark"] for row in shown["fields"]}
    assert marks.items() >= {field.path: str(field.mark) for field in FIELDS}.items()


@pytest.mark.row("P-25")
@pytest.mark.parametrize("name", KEPT)
def test_show_takes_every_kept_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in a valid file can be shown, within a table that a terminal of 80 columns takes."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    lines = in_terminal_here("state", "show", str(STATES / name)).splitlines()
    assert len(lines) > 40
    assert max(map(len, lines)) <= 80


@pytest.mark.row("P-25")
def test_what_a_file_holds_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text in a file is shown as it is, not as the table's markup."""
    file = broken(tmp_path, "advance:max_ns=3600000000000", "[red]x[/red]:cat:")
    assert main(["state", "show", file]) == 0
    assert "[red]x[/red]:cat:" in capsys.readouterr().out


@pytest.mark.row("P-25")
def test_check_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`state check` has a line for each file: file, field, found and supported where it is not valid, and status 1."""
    files = [TYPICAL_FILE, broken(tmp_path, '"tsc_aux": 1', '"tsc_aux": -1'), str(tmp_path / "none.json")]
    assert main(["state", "check", *files]) == 1
    good, wrong, missing = capsys.readouterr().out.splitlines()
    assert good.startswith(
        f"{files[0]}: valid: version 1, KVM, 2 vCPUs, guest time 28800.000000000 s, saved 2026-09-21"
    )
    assert wrong.endswith("NOT VALID: vcpus[1].tsc_aux: found -1; supported: a whole number from 0 to 2^32-1")
    assert (
        missing
        == f"{files[2]}: NOT VALID: file: found No such file or directory; supported: a regular file that can be read"
    )
    assert main(["state", "check", "--json", *files]) == 1
    document = json.loads(capsys.readouterr().out)
    reports = document["result"]["files"]
    assert not document["ok"]
    assert [(report["file"], report["ok"], report.get("field")) for report in reports] == [
        (files[0], True, None),
        (files[1], False, "vcpus[1].tsc_aux"),
        (files[2], False, "file"),
    ]
    assert (reports[1]["found"], reports[1]["supported"]) == ("-1", "a whole number from 0 to 2^32-1")


@pytest.mark.row("P-25")
def test_check_knows_versions_and_providers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A version or a provider that this pvclock lacks is found before a restore is tried."""
    assert main(["state", "check", broken(tmp_path, '"version": 3', '"version": 4')]) == 1
    assert "NOT VALID: version: found 4; supported: 1 to 3" in capsys.readouterr().out
    assert main(["state", "check", broken(tmp_path, '"KVM"', '"Xen"')]) == 1
    assert (
        "NOT VALID: provider.name: found 'Xen'; supported: 'None', 'Minimal', 'HyperV', 'KVM'"
        in capsys.readouterr().out
    )
    assert main(["state", "check", *(str(STATES / name) for name in KEPT if "extreme" not in name)]) == 0


@pytest.mark.row("E13")
def test_show_of_what_is_no_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`state show` of a file that is not valid shows nothing but the error, with status 2."""
    file = broken(tmp_path, '"paused": true', '"paused": 1')
    assert main(["state", "show", TYPICAL_FILE, file]) == 2
    output = capsys.readouterr()
    assert not output.out
    assert f"pvclock state: {file}: timeline.paused: found 1; supported: true or false" in output.err


@pytest.mark.row("P-25")
@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("host.real_ns", 0, "1970-01-01 00:00:00.000000000 UTC"),
        ("host.real_ns", -1, "1969-12-31 23:59:59.999999999 UTC"),
        ("host.real_ns", 2**63 - 1, "2262-04-11 23:47:16.854775807 UTC"),
        ("host.raw_ns", -1, "-0.000000001 s"),
        ("host.raw_ns", None, ""),
        ("host.tsc", 3, "0x3, 3.000000000 s"),
        ("vcpus[].tsc_offset", 2**64 - 2, "-2 ticks, -2.000000000 s"),
        ("vcpus[].tsc_offset", 2**63, "-9223372036854775808 ticks, -9223372036854775808.000000000 s"),
        (
            "provider.msrs",
            {"a": (1, 2**64 - 1), "b": True, "c": None, "d": "x"},
            'a [0x1, 0xffffffffffffffff], b true, c null, d "x"',
        ),
        ("policy", "freeze", ""),
    ],
)
def test_units(path: str, value: object, text: str) -> None:
    """Values in units, on a host of 1 Hz: ticks are signed where offsets are, dates reach as far as numbers do."""
    assert in_units(path, value, LEAST) == text
