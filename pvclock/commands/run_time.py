"""`pvclock run`'s options of guest time: what is typed and what ends at an instant of it, and travel in it."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from typing import Final

from pvclock.commands.arguments import factor, guest_time_ns
from pvclock.commands.run_ending import End, ended_by_guest_time, ended_by_idleness
from pvclock.errors import ConfigError, StateError
from pvclock.machine import Machine
from pvclock.machine.time_travel import Look, TimeTravel, Travel
from pvclock.meter.quantity_text import parse_guest_time_ns
from pvclock.quantities import NS_PER_S
from pvclock.timekeeping.travel import IdleForever

__all__ = ["GUEST_OPTIONS", "IdleEnd", "add_arguments", "machine_options", "schedule", "told", "travelled"]

GUEST_OPTIONS: Final = (
    "tsc=reliable nowatchdog psi=0 mce=ignore_ce cpuidle_haltpoll.force=1 sysctl.vm.compaction_proactiveness=0 "
    "sysctl.vm.stat_interval=3600 sysctl.kernel.hung_task_timeout_secs=0"
)
"""What keeps an idle Linux from waking several times a second: see docs/time-travel.md."""

SKIPS_TOLD: Final = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them.  None stands for an option that is not given."""
    parser.add_argument(
        "--time-travel",
        action="store_true",
        help="let no time pass while the guest is idle: skip to its next timer, or to what is scheduled",
    )
    parser.add_argument(
        "--until", type=guest_time_ns, metavar="GUEST_TIME", help="up to then; from then on time passes as it does"
    )
    parser.add_argument(
        "--max-rate", type=factor, metavar="N", help="no faster than N guest seconds in a host's second"
    )
    parser.add_argument(
        "--why", action="store_const", const=True, help="trace which work of a Linux guest's wakes it, and count it"
    )
    parser.add_argument(
        "--input-at",
        action="append",
        nargs=2,
        default=[],
        metavar=("GUEST_TIME", "LINE"),
        help="type LINE and Enter when the guest's clock shows GUEST_TIME, such as 90s, 1.5h or 30d; can be given "
        "several times",
    )
    parser.add_argument("--end-at", type=guest_time_ns, metavar="GUEST_TIME", help="end the run then")


def machine_options(arguments: argparse.Namespace) -> dict[str, object]:
    """Machine's options for them; ConfigError for those that are missing one."""
    names = ("until", "max_rate", "why")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]
    if not arguments.time_travel:
        if given:
            raise ConfigError(f"{', '.join(given)}: of a run with --time-travel; give that, too")
        return {}
    return {"time_travel": Travel(arguments.until, arguments.max_rate)}


def schedule(machine: Machine, arguments: argparse.Namespace, end: Callable[[End], object]) -> None:
    """Set what is typed and what ends the run at a guest time.  ConfigError, and nothing is set, for no guest time."""
    lines = [(parse_guest_time_ns(when), line) for when, line in arguments.input_at]
    for when_ns, line in lines:
        machine.timers.at(when_ns, _Typist(machine, line))

    def end_here() -> None:
        machine.time_travel.disable()  # else it skips to what is scheduled for later before the run has ended
        end(ended_by_guest_time(arguments.end_at))

    if arguments.end_at is not None:
        machine.timers.at(arguments.end_at, end_here)


class _Typist:
    """Types a line."""

    def __init__(self, machine: Machine, line: str) -> None:
        self._machine, self._data = machine, f"{line}\n".encode(errors="surrogateescape")

    def __call__(self) -> None:
        if self._machine.serial.receive(self._data) < len(self._data):
            raise StateError("--input-at", "the serial port is full", "type less: its guest reads nothing")


class IdleEnd:
    """Ends a run whose guest is idle for ever, and says so where somebody may still type.

    has_clients: may a client of a service wake it?

    Thread-safety: all methods may be called from any thread.
    """

    def __init__(self, machine: Machine, tell: Callable[[str], object], *, has_clients: bool) -> None:
        self._machine, self._tell = machine, tell
        self._lock = threading.Lock()
        self._has_input, self._has_clients = True, has_clients
        self._is_idle = self._is_told = False
        self._typed_ns = 0  # guest time: a decision from before what was typed is none
        self.end: Callable[[End], object] | None = None
        """What ends the run; set before it begins."""

    def look(self, look: Look) -> None:
        """Take a decision of the travel's."""
        is_idle = isinstance(look.decision, IdleForever)
        with self._lock:
            if is_idle == self._is_idle or look.guest_ns < self._typed_ns:
                return
            self._is_idle = is_idle
        self._consider()

    def receive(self, data: bytes) -> int:
        """Type it into the guest, which may wake it; as Uart.receive()."""
        taken = self._machine.serial.receive(data)
        with self._lock:
            self._is_idle = False
            self._typed_ns = self._machine.clock_service.now_ns()
        self._machine.time_travel.notify()
        return taken

    def input_has_ended(self) -> None:
        """Nobody types any more."""
        with self._lock:
            self._has_input = False
        self._consider()

    def _consider(self) -> None:
        with self._lock:
            ends = self._is_idle and not self._has_input and not self._has_clients
            tells = self._is_idle and not ends and not self._is_told
            self._is_told = self._is_told or tells
        idle = ended_by_idleness(self._machine.clock_service.now_ns())
        if ends and self.end is not None:
            self.end(idle)
        elif tells:
            self._tell(f"{idle.why}; it goes on with what is typed")


# What it came to


def travelled(machine: Machine, *, is_asked_for: bool) -> dict[str, object] | None:
    """The travel of a run, for JSON: see docs/commands.md; None without --time-travel."""
    if not is_asked_for:
        return None
    travel = machine.time_travel
    log = travel.log
    return {
        "skips": log.skips,
        "skipped_s": log.skipped_ns / NS_PER_S,
        "largest_s": log.largest_ns / NS_PER_S,
        "host_s": log.host_ns / NS_PER_S,
        "stays": {reason.name.lower(): count for reason, count in log.stays.items()},
        "is_idle_forever": log.is_idle_forever,
        "last_skips": [
            {"guest_s": each.guest_ns / NS_PER_S, "skipped_s": each.skipped_ns / NS_PER_S, "to": str(each.wake)}
            for each in travel.recent[-SKIPS_TOLD:]
        ],
        "failure": None if travel.failure is None else str(travel.failure),
    }


def told(travel: TimeTravel) -> str:
    """The same in a line for people."""
    log = travel.log
    line = (
        f"time travel: {log.skips} skips over {log.skipped_ns / NS_PER_S:.3f} s of guest time, "
        f"the largest {log.largest_ns / NS_PER_S:.3f} s, in {log.host_ns / NS_PER_S:.3f} s"
    )
    return line if travel.failure is None else f"{line}; it ended by an error: {travel.failure}"
