"""What a QMP server answers and tells, for people: tables of what has names, text as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeGuard

from rich.text import Text

from pvclock.commands.tables import Table
from qemu_glue.ctl.schema import QmpCommand
from qemu_glue.peer.monitor import QmpEvent
from qemu_glue.watch.instants import utc_text

__all__ = ["answer_in_words", "commands_table", "event_in_words"]

COLUMNS_MAX: Final = 6
"""Members of objects that stand beside each other in a table."""
TEXT_CONTROLS: Final = "\n\t"


def answer_in_words(answer: object) -> Iterator[Table | Text]:
    """An answer's parts: nothing but "done" for an empty one."""
    if answer == {}:
        yield Text("done", "green")
    elif isinstance(answer, str):
        yield Text(_printable(answer.replace("\r\n", "\n").rstrip("\n")))
    elif _is_of_rows(answer):
        yield _columns(answer)
    elif isinstance(answer, Mapping | list):
        yield _names_and_values(answer)
    else:
        yield Text(_shown(answer))


def event_in_words(event: QmpEvent) -> Text:
    """An event's instant, name and data, on a line."""
    data = "" if not event.data else f" {json.dumps(event.data)}"
    return Text.assemble((utc_text(event.utc_ns), "dim"), " ", (event.name, "cyan"), data)


def commands_table(commands: Sequence[QmpCommand]) -> Table:
    """A row for each command: how it is typed."""
    told = any(command.arguments is not None for command in commands)
    table = Table("command", *["arguments"] * told)
    for command in commands:
        table.add_row(command.name, *[" ".join(map(str, command.arguments or ()))] * told)
    return table


# Inside


def _is_of_rows(answer: object) -> TypeGuard[list[dict[str, object]]]:
    """A list of objects with the same few members, each of one value?"""
    if not isinstance(answer, list) or not answer or not all(isinstance(each, dict) for each in answer):
        return False
    names = list(answer[0])
    flat = all(not isinstance(value, dict | list) for each in answer for value in each.values())
    return flat and 0 < len(names) <= COLUMNS_MAX and all(list(each) == names for each in answer)


def _columns(answer: list[dict[str, object]]) -> Table:
    table = Table(*answer[0])
    for each in answer:
        table.add_row(*map(_shown, each.values()))
    return table


def _names_and_values(answer: object) -> Table:
    table = Table("name", "value")
    for name, value in _leaves(answer, ""):
        table.add_row(name, value)
    return table


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Each value with the path to it, such as qemu.major or vcpus[0].page."""
    if isinstance(value, dict) and value:
        for name, each in value.items():
            yield from _leaves(each, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for number, each in enumerate(value):
            yield from _leaves(each, f"{path}[{number}]")
    else:
        yield path, _shown(value)


def _shown(value: object) -> str:
    return _printable(value) if isinstance(value, str) else json.dumps(value)


def _printable(text: str) -> str:
    """Text in which what would command a terminal stands as an escape."""
    return "".join(each if each.isprintable() or each in TEXT_CONTROLS else ascii(each)[1:-1] for each in text)
