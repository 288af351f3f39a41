"""Show what is in a clock's saved state, or check that saved states can be restored with this pvclock.

`show` prints each field with its value, its mark (saved, derived, not saved) and what it means.  `check` prints a line
for each file, and its exit status is 1 if one of them is not valid.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any, Final

from rich.text import Text

from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.commands.tables import Table
from pvclock.errors import StateFileError
from pvclock.quantities import NS_PER_S, signed64
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState, Field
from pvclock.state.json_schema import plain

__all__ = ["EXAMPLES", "add_arguments", "in_units", "run"]

EXAMPLES: Final = """\
  pvclock state show clock.json     what is in it, in units, and what it means
  pvclock state check *.json        can this pvclock restore them?"""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=("show", "check"), help="what to do")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a saved state")


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Show or check the files; a finding if `check` finds one that is not valid."""
    return (_check if arguments.action == "check" else _show)(arguments.files, screen)


def _check(files: list[str], screen: Screen) -> Outcome:
    reports = [_report(file) for file in files]
    for report in reports:
        screen.show(f"{_name(report['file'])}: {report['summary']}")
    return Outcome(all(report["ok"] for report in reports), {"files": reports})


def _report(file: str) -> dict[str, Any]:
    try:
        state = clock_state.read(file)
        clock_state.check_provider(state)
    except StateFileError as error:
        wrong = {"field": error.field, "found": error.found, "supported": error.supported}
        summary = "NOT VALID: {field}: found {found}; supported: {supported}".format_map(wrong)
        return {"file": file, "ok": False, "summary": summary, **wrong}
    return {"file": file, "ok": True, "summary": f"valid: {_summary(state)}"}


def _summary(state: ClockState) -> str:
    guest_time = in_units("timeline.guest_ns", state.timeline.guest_ns, state)
    saved = in_units("host.real_ns", state.host.real_ns, state)
    vcpus = f"{len(state.vcpus)} vCPU{'s' * (len(state.vcpus) > 1)}"
    return f"version {state.version}, {state.provider.name}, {vcpus}, guest time {guest_time}, saved {saved}"


def _show(files: list[str], screen: Screen) -> Outcome:
    states = [(file, clock_state.read(file)) for file in files]
    for file, state in states:
        screen.show(_name(file), _table(state))
    return Outcome(True, {"files": [_as_json(file, state) for file, state in states]})


def _as_json(file: str, state: ClockState) -> dict[str, Any]:
    fields = [
        {
            "field": path,
            "mark": str(field.mark),
            "value": plain(value),
            "in_units": in_units(field.path, value, state),
            "meaning": field.meaning,
        }
        for path, field, value in clock_state.rows(state)
    ]
    return {"file": file, "fields": fields, "state": clock_state.to_mapping(state)}


def _table(state: ClockState) -> Table:
    """A section for each mark; a field's meaning is below its value where the field first appears."""
    table = Table("field", "value, what that is, and what it means")
    explained: set[str] = set()
    for path, field, value in clock_state.rows(state):
        if field.mark not in explained:
            table.end_section()
            table.add_row(Text(field.mark.upper(), style="bold"))
        meaning = "" if field.path in explained else field.meaning
        shown = _shown(field, value, state)
        table.add_row(path, Text.assemble(shown, "\n" if shown and meaning else "", (meaning, "dim")))
        explained |= {field.mark, field.path}
    return table


def _name(file: str) -> str:
    return file if file.isprintable() else repr(file)


def _shown(field: Field, value: object, state: ClockState) -> str:
    raw = str(value) if isinstance(value, Fraction) else json.dumps(plain(value)) if field.kind else ""
    return "\n".join(text for text in (raw, in_units(field.path, value, state)) if text)


def in_units(path: str, value: object, state: ClockState) -> str:
    """The value of the field at `path` of FIELDS in units for people; empty where none apply."""
    unit = UNITS.get(path)
    return unit(value, state.host.tsc_hz) if unit and value is not None else ""


def _seconds(ns: Fraction, _hz: int) -> str:
    seconds, rest = divmod(int(abs(ns)), NS_PER_S)
    return f"{'-' if ns < 0 else ''}{seconds}.{rest:09d} s"


def _ticks(ticks: int, hz: int) -> str:
    return f"{ticks:#x}, {_seconds(Fraction(ticks * NS_PER_S, hz), hz)}"


def _signed_ticks(ticks: int, hz: int) -> str:
    signed = signed64(ticks)
    return f"{signed:+d} ticks, {_seconds(Fraction(signed * NS_PER_S, hz), hz)}"


def _utc(ns: int, _hz: int) -> str:
    seconds, rest = divmod(ns, NS_PER_S)
    return f"{EPOCH + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S}.{rest:09d} UTC"


def _hex(value: int, _hz: int) -> str:
    return f"{value:#x}"


def _settings(values: Mapping[str, object], _hz: int) -> str:
    return ", ".join(f"{name} {_setting(value)}" for name, value in values.items())


def _setting(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_setting, value))}]"
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) else json.dumps(value)


UNITS: Final[dict[str, Callable[[Any, int], str]]] = {
    "provider.config": _settings,
    "provider.msrs": _settings,
    "timeline.guest_ns": _seconds,
    "timeline.dilation": lambda rate, _: f"{float(rate):.9g} s a second",
    "slew.remaining_ns": _seconds,
    "host.tsc": _ticks,
    "host.tsc_hz": lambda hz, _: f"{hz / 1e6:.6f} MHz",
    "host.raw_ns": _seconds,
    "host.real_ns": _utc,
    "wall_clock_gpa": _hex,
    "vcpus[].tsc_offset": _signed_ticks,
    "vcpus[].tsc_adjust": _signed_ticks,
    "vcpus[].tsc_aux": _hex,
    "vcpus[].guest_tsc": _ticks,
    "vcpus[].time_page_gpa": _hex,
}
