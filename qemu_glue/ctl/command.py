"""Send a QMP command to a running QEMU, or to a machine of `pvclock run --qmp`, and show its answer.

Without a command, all that there are, with their arguments.  A server serves one client at a time, so there may be no
answer while another is there.

key=value is an integer (0x1000, too), true or false, JSON if it begins with { or [, else a string; key:=JSON is any
JSON; a dot in a key, as in a.b=1, is a member of an object.  Exit status 2 if the command is refused.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from pvclock.commands.arguments import Parser, duration_s
from pvclock.commands.outcome import Outcome, line_json
from pvclock.commands.screen import Screen, write
from qemu_glue.errors import QmpFailed

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from collections.abc import Sequence

    from qemu_glue.peer.monitor import Monitor, QmpEvent

__all__ = ["EXAMPLES", "JSON_LINES", "add_arguments", "run"]

JSON_LINES: Final = True

EXAMPLES: Final = """\
  pvclock ctl SOCKET                               its commands
  pvclock ctl SOCKET query-status
  pvclock ctl SOCKET x-pvclock-slew ns=-1000000 max-ppm=100
  pvclock ctl SOCKET human-monitor-command command-line='info registers'
  pvclock ctl --follow SOCKET                      events, until Ctrl-C"""

FOLLOW_POLL_S: Final = 0.05
BUSY: Final = "another client may have it, for one is served at a time; try again once it has left"


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments."""
    parser.is_intermixed = True
    parser.add_argument("socket", metavar="SOCKET", help="the PATH of -qmp unix:PATH,server=on,wait=off or of --qmp")
    parser.add_argument("command_name", nargs="?", metavar="COMMAND", help="such as stop, cont, query-status")
    parser.add_argument("pairs", nargs="*", default=[], metavar="key=value", help="its arguments")
    parser.add_argument("--follow", action="store_true", help="then show events, until Ctrl-C or the machine's end")
    limit = "how long to wait for the greeting (default 2) and for the answer (default 90)"
    parser.add_argument("--timeout", type=duration_s, metavar="SECONDS", help=limit)


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Ask, and show what is answered and told."""
    from qemu_glue.ctl.key_values import arguments_of
    from qemu_glue.peer.qmp_socket import connect

    given = arguments_of(arguments.pairs)
    monitor, _ = connect(arguments.socket, limit_s=arguments.timeout, if_busy=BUSY)
    with monitor:
        found: dict[str, object] = {}
        if arguments.command_name is not None:
            found = _asked(monitor, arguments.command_name, given, screen)
        elif not arguments.follow:
            found = _listed(monitor, screen)
        if arguments.follow:
            _follow(monitor, screen, as_lines=arguments.json)
    return Outcome(True, found)


# Inside


def _asked(monitor: Monitor, command: str, given: dict[str, object], screen: Screen) -> dict[str, object]:
    from qemu_glue.ctl.views import answer_in_words, event_in_words

    answer = monitor.execute(command, given)
    events = _events(monitor)
    screen.show(*map(event_in_words, events), *answer_in_words(answer))
    return {"command": command, "arguments": given, "return": answer, "events": [_event(each) for each in events]}


def _listed(monitor: Monitor, screen: Screen) -> dict[str, object]:
    from qemu_glue.ctl.schema import commands_of
    from qemu_glue.ctl.views import commands_table

    commands = commands_of(monitor)
    screen.show(commands_table(commands))
    return {"commands": commands}


def _events(monitor: Monitor) -> Sequence[QmpEvent]:
    """What came so far; the machine may have ended."""
    with suppress(QmpFailed):
        return monitor.take_events()
    return ()


def _follow(monitor: Monitor, screen: Screen, *, as_lines: bool) -> None:
    """Show events as they come, until Ctrl-C or the other end hangs up."""
    from qemu_glue.ctl.views import event_in_words
    from qemu_glue.watch.interrupts import Interrupts

    with Interrupts() as interrupts, suppress(QmpFailed):
        while not interrupts.wait(FOLLOW_POLL_S):
            for event in monitor.take_events():
                screen.show(event_in_words(event))
                if as_lines:
                    write(line_json("ctl", {"kind": "event", **_event(event)}) + "\n")


def _event(event: QmpEvent) -> dict[str, object]:
    """An event as JSON has it."""
    from qemu_glue.watch.instants import utc_text

    return {"event": event.name, "utc": utc_text(event.utc_ns), "data": event.data}
