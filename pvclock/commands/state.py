"""Show what is in a clock's saved state, check whether it can be used, or convert it.

A state is a clock's own (a JSON document), that in a QEMU migration stream or an image of libvirt's "virsh save", or
VirtualBox's saved unit "GIM"; what a file is, its first bytes say.

`show` prints each field with its value, its mark (saved, derived, not saved) and what it means.  `check` prints a line
for each file, and its exit status is 1 if one of them is not valid.  `convert` writes one of them in the format --to,
and says what was assumed, and what the format cannot hold.  QEMU's streams are not made anew: the clock is replaced in
the stream --into.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from rich.text import Text

from pvclock.commands.arguments import time_ns, whole_number
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.commands.state_formats import Given, SavedState, format_names, format_of, named_format
from pvclock.commands.state_units import EPOCH
from pvclock.commands.tables import Table
from pvclock.errors import ConfigError, StateFileError
from pvclock.quantities import U32_MASK, U64_MASK

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock state show clock.json     what is in it, in units, and what it means
  pvclock state check *.json        can this pvclock restore them?
  pvclock state show vm.stream      the clock in a QEMU migration stream
  pvclock state convert vm.stream --to clock -o clock.json
  pvclock state convert vm.stream --to qemu --skip 3600s -o later.stream"""

ACTIONS: Final = ("show", "check", "convert")
CONVERT_ONLY: Final = ("to", "output", "into", "skip", *Given._fields)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a saved state")
    convert = parser.add_argument_group("convert")
    convert.add_argument("--to", choices=format_names(), help="the format to write")
    convert.add_argument("-o", "--output", metavar="FILE", help="the file to write")
    convert.add_argument(
        "--into", metavar="STREAM", help="QEMU's stream in which the clock is replaced; by default FILE, if it is one"
    )
    convert.add_argument(
        "--skip", type=time_ns, metavar="TIME", help="let guest time jump forward by that, such as 250ms or 3600s"
    )
    given = parser.add_argument_group("convert: what a file does not say")
    mask = whole_number(0, U32_MASK)
    given.add_argument("--features", type=mask, metavar="MASK", help="CPUID 0x40000001 EAX that the guest sees")
    ticks = whole_number(0, U64_MASK)
    given.add_argument("--tsc-hz", type=whole_number(1, U64_MASK), metavar="HZ", help="frequency of the guest's TSC")
    given.add_argument("--guest-tsc", type=ticks, metavar="TICKS", help="the guest's TSC when the state was saved")
    given.add_argument(
        "--saved-at", type=_utc_ns, metavar="TIME", dest="saved_ns", help="when that was, as 2026-11-28T12:00:00Z"
    )


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Show, check or convert; a finding if `check` finds a file that is not valid."""
    if arguments.action == "convert":
        return _convert(arguments, screen)
    if named := [name for name in CONVERT_ONLY if getattr(arguments, name) is not None]:
        raise ConfigError(f"{arguments.action} takes none of convert's options; {named[0]} was given")
    return (_check if arguments.action == "check" else _show)(arguments.files, screen)


# check


def _check(files: list[str], screen: Screen) -> Outcome:
    reports = [_report(file) for file in files]
    for report in reports:
        screen.show(f"{_name(report['file'])}: {report['summary']}")
        _show_notes(report.get("notes", []), screen)
    return Outcome(all(report["ok"] for report in reports), {"files": reports})


def _report(file: str) -> dict[str, Any]:
    try:
        name = format_of(file)
        saved = named_format(name).read(file)
        saved.check()
    except StateFileError as error:
        wrong = {"field": error.field, "found": error.found, "supported": error.supported}
        summary = "NOT VALID: {field}: found {found}; supported: {supported}".format_map(wrong)
        return {"file": file, "ok": False, "summary": summary, **wrong}
    return {"file": file, "format": name, "ok": True, "summary": f"valid: {saved.summary}", "notes": [*saved.notes]}


# show


def _show(files: list[str], screen: Screen) -> Outcome:
    states = [(file, name := format_of(file), named_format(name).read(file)) for file in files]
    for file, _, saved in states:
        screen.show(_name(file), _table(saved))
        _show_notes(saved.notes, screen)
    return Outcome(True, {"files": [_as_json(file, name, saved) for file, name, saved in states]})


def _as_json(file: str, name: str, saved: SavedState) -> dict[str, Any]:
    shown = ("field", "mark", "value", "in_units", "meaning")
    fields = [{key: value for key, value in row._asdict().items() if key in shown} for row in saved.rows()]
    return {"file": file, "format": name, "fields": fields, "state": saved.as_json(), "notes": [*saved.notes]}


def _table(saved: SavedState) -> Table:
    """A section for each mark; a field's meaning is below its value where it first appears."""
    table = Table("field", "value, what that is, and what it means")
    explained: set[str] = set()
    for row in saved.rows():
        if row.mark not in explained:
            table.end_section()
            table.add_row(Text(row.mark.upper(), style="bold"))
        meaning = "" if row.meaning in explained else row.meaning
        shown = "\n".join(text for text in (row.shown, row.in_units) if text)
        table.add_row(row.field, Text.assemble(shown, "\n" if shown and meaning else "", (meaning, "dim")))
        explained |= {row.mark, row.meaning}
    return table


def _show_notes(notes: Iterable[str], screen: Screen) -> None:
    for note in notes:
        screen.show(f"  {note}")


# convert


def _convert(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Read one state as a clock's, and write that."""
    if len(arguments.files) != 1:
        raise ConfigError(f"convert takes one FILE; {len(arguments.files)} were given")
    for option in ("to", "output"):
        if getattr(arguments, option) is None:
            raise ConfigError(f"convert needs --{option}")
    (file,) = arguments.files
    name = format_of(file)
    given = Given(*(getattr(arguments, each) for each in Given._fields))
    state, notes = named_format(name).read(file).clock_state(given)
    skip_ns = arguments.skip or 0
    state = state._replace(timeline=state.timeline._replace(guest_ns=state.timeline.guest_ns + skip_ns))
    target = named_format(arguments.to)
    notes += target.write(state, arguments.output, _base(arguments, name))
    summary = f"written: {target.read(arguments.output).summary}"
    screen.show(f"{_name(arguments.output)}: {summary}")
    _show_notes(notes, screen)
    report = {"file": file, "format": name, "output": arguments.output, "to": arguments.to}
    return Outcome(True, {"files": [{**report, "ok": True, "summary": summary, "notes": notes}]})


def _base(arguments: argparse.Namespace, name: str) -> str | None:
    """The file in a copy of which the clock is replaced; None for a format whose files are made anew."""
    if named_format(arguments.to).IS_MADE_ANEW:
        if arguments.into is not None:
            raise ConfigError(f"a file of format {arguments.to} is written whole; leave out --into")
        return None
    base = arguments.into or (arguments.files[0] if name == arguments.to else None)
    if base is None:
        raise ConfigError(f"a file of format {arguments.to} is not made anew; give --into one that the VMM has written")
    return str(base)


def _utc_ns(text: str) -> int:
    """An argument that is a time in UTC."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; give one as 2026-11-28T12:00:00Z") from None
    return (time.replace(tzinfo=time.tzinfo or UTC) - EPOCH) // timedelta(microseconds=1) * 1000


def _name(file: str) -> str:
    return file if file.isprintable() else repr(file)
