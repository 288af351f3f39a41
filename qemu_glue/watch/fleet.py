"""A fleet: all VMs whose QMP sockets there are, and those that come later, each watched by a thread of its own."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from typing import Final, NamedTuple

from rich.text import Text

from pvclock.commands.outcome import message_of
from pvclock.host.this_host import measure_tsc_hz
from pvclock.host.watch import HostWatch, TroubleKind
from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.loop import HostTrouble
from pvclock.meter.watch.vm import WatchedVm
from qemu_glue.prometheus.metrics import Metrics
from qemu_glue.watch.ending import Ending, ending_of
from qemu_glue.watch.fleet_views import FleetView, fleet_row
from qemu_glue.watch.member import FleetEnd, Member
from qemu_glue.watch.sockets import VmNames, is_pattern, sockets_now

__all__ = ["Fleet", "Watched"]

TURN_S: Final = 0.2
LOOK_AGAIN_S: Final = 1.0
"""How often sockets are looked for, and the host is looked at."""
AGAIN_S, AGAIN_MAX_S = 4.0, 60.0
"""What cannot be watched is tried again so much later, then twice as much, and so on."""
JOIN_S: Final = 10.0
"""How long VMs have to end their watch: one that does not answer is left."""
WATCHED_MAX: Final = 1000
"""Watches of which all is kept that they came to, the last ones."""
TROUBLES_MAX: Final = 1000
NS_PER_S: Final = 1_000_000_000
NO_SOCKET: Final = "there was no such socket all the while"
TOO_EARLY: Final = "the watch ended before the guest's pages were found"


class Watched(NamedTuple):
    """What the watch of one VM came to.  cells: of its row.  error: what ended it, if that was one."""

    vm: str
    ending: Ending
    cells: list[str | Text]
    error: str | None


class _Obstacle(NamedTuple):
    """Why a socket's VM is not watched, and when it is tried again.  why: None: its VM has ended."""

    why: str | None
    pause_s: float
    again_s: float


class Fleet:
    """Watches the VMs at the sockets `named`: paths, and patterns of paths.

    metrics: what Prometheus is told.  open_vm: opens a VM by its socket's path.
    """

    def __init__(
        self,
        named: list[str],
        open_vm: Callable[[str], WatchedVm],
        arguments: argparse.Namespace,
        *,
        view: FleetView,
        end: FleetEnd,
        metrics: Metrics | None,
    ) -> None:
        self.watched: deque[Watched] = deque(maxlen=WATCHED_MAX)
        """Those that were, in the order of their ends."""
        self.statuses: set[int] = set()
        """Exit statuses of all that were watched."""
        self.troubles: deque[HostTrouble] = deque(maxlen=TROUBLES_MAX)
        """The host's, the last ones."""
        self._named, self._open_vm, self._arguments = named, open_vm, arguments
        self._view, self._end, self._metrics = view, end, metrics
        self._members: dict[str, Member] = {}
        self._obstacles: dict[str, _Obstacle] = {}
        self._names = VmNames()
        self._missing = {path for path in named if not is_pattern(path)}
        self._host = HostWatch(measure_tsc_hz(), interval_ns=int(LOOK_AGAIN_S * NS_PER_S))
        self._note_host(_from_the_beginning(self._host))

    @property
    def not_watched(self) -> dict[str, str]:
        """The VMs that cannot be watched, although their sockets are there or were named, and why."""
        missing = {path: NO_SOCKET for path in self._missing if not Path(path).exists()}
        obstacles = {self._names.of(path): each.why for path, each in self._obstacles.items() if each.why is not None}
        return missing | obstacles

    @property
    def is_empty(self) -> bool:
        """Is no VM watched, nor about to be?"""
        return not self._members

    def run(self, wait: Callable[[float], bool], is_over: Callable[[Fleet], bool]) -> None:
        """Watch until `wait` says so, which sleeps for some seconds, or `is_over` does, or an output fails."""
        _allow_files()
        next_s = 0.0
        try:
            while not self._end.came:
                self._reap()
                if time.monotonic() >= next_s:
                    next_s = time.monotonic() + LOOK_AGAIN_S
                    self._let_in(sockets_now(self._named))
                    self._look_at_host()
                if is_over(self) or wait(TURN_S):
                    break
        finally:
            self._finish()

    # Inside

    def _let_in(self, paths: list[str]) -> None:
        """Begin to watch those that are new, or to be tried again, and forget those that are gone."""
        self._names.name(paths)
        for path in self._obstacles.keys() - paths:
            del self._obstacles[path]
            self._forget(path)
            self._names.forget(path)
        for path in paths:
            obstacle = self._obstacles.get(path)
            if path not in self._members and (obstacle is None or time.monotonic() >= obstacle.again_s):
                self._begin(path)

    def _begin(self, path: str) -> None:
        name = self._names.of(path)
        member = Member(
            name,
            path,
            self._open_vm,
            self._arguments,
            self._end,
            lambda: sum(each.loop is not None for each in list(self._members.values())),
            show=self._view.of(name),
            metrics=None if self._metrics is None else self._metrics.of(name),
        )
        self._members[path] = member
        self._missing.discard(path)
        member.start()

    def _reap(self) -> None:
        """Take what those came to that are over."""
        for path, member in list(self._members.items()):
            if member.is_over:
                del self._members[path]
                self._take(member)

    def _take(self, member: Member) -> None:
        error = None if member.error is None else message_of(member.error)
        if member.loop is None and error is None:
            error = TOO_EARLY
        if member.loop is not None:
            ending = ending_of(member.loop, self._arguments, member.why_ended)
            cells = fleet_row(member.name, member.loop, ending.verdict)
            self.watched.append(Watched(member.name, ending, cells, error))
            self.statuses |= {ending.exit_status, *([VerdictStatus.UNDECIDED.exit_status] if error else [])}
        before = self._obstacles.get(member.path)
        if member.error is not None and (before is None or before.why != error):
            self._view.left(member.name, str(error))
        if member.why_ended is not None:
            self._forget(member.path)
        was_watched = member.loop is not None or before is None
        pause_s = AGAIN_S if was_watched or before is None else min(2 * before.pause_s, AGAIN_MAX_S)
        self._obstacles[member.path] = _Obstacle(error, pause_s, time.monotonic() + pause_s)

    def _forget(self, path: str) -> None:
        if self._metrics is not None:
            self._metrics.forget(self._names.of(path))

    def _look_at_host(self) -> None:
        found = [each for each in self._host.check() if each.kind is not TroubleKind.STALL]  # a busy host is no trouble
        self._note_host([HostTrouble(each.kind, each.unstable, each.why) for each in found])

    def _note_host(self, troubles: Iterable[HostTrouble]) -> None:
        for trouble in troubles:
            self.troubles.append(trouble)
            self._view.host(trouble)
            if self._metrics is not None:
                self._metrics.host.take([trouble])

    def _finish(self) -> None:
        """End all watches, and take what they came to."""
        self._end.come()
        limit_s = time.monotonic() + JOIN_S
        for member in list(self._members.values()):
            if not member.join(max(limit_s - time.monotonic(), 0)):
                member.error = TimeoutError(f"it did not answer within {JOIN_S:g} s, and is left")
            self._take(member)
        self._members.clear()


def _from_the_beginning(host: HostWatch) -> list[HostTrouble]:
    """What is wrong before anything has changed."""
    why = f"the host's clocksource is {host.last.clocksource}, not tsc"
    return [] if host.tsc_trusted else [HostTrouble(TroubleKind.CLOCKSOURCE, True, why)]


def _allow_files() -> None:
    """Each VM needs some ten descriptors."""
    _, most = getrlimit(RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        setrlimit(RLIMIT_NOFILE, (most, most))
