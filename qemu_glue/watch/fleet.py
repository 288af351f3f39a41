"""A fleet: all VMs whose QMP sockets there are, and those that come later, each watched by a thread of its own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from typing import Final, NamedTuple

from rich.text import Text

from pvclock.commands.outcome import message_of
from pvclock.host.this_host import measured_tsc_hz
from pvclock.meter.inside.schema import printable
from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.host_troubles import HostTrouble, HostTroubles
from pvclock.meter.watch.vm import WatchedVm
from qemu_glue.prometheus.metrics import Metrics
from qemu_glue.watch.ending import Ending, ending_of
from qemu_glue.watch.fleet_end import FleetEnd, SearchTurns
from qemu_glue.watch.fleet_views import FleetView, fleet_row
from qemu_glue.watch.member import Member
from qemu_glue.watch.names import FileId, VmNames, shown
from qemu_glue.watch.options import WatchOptions
from qemu_glue.watch.retry import Retry
from qemu_glue.watch.sockets import is_pattern, sockets_now

__all__ = ["Fleet", "Watched"]

TURN_S: Final = 0.2
LOOK_AGAIN_S: Final = 1.0
"""How often sockets are looked for, and the host is looked at."""
IN_PLACE_S: Final = 4.0
"""A socket that took another's place is left alone for so long, while that one's VM is watched."""
JOIN_S: Final = 10.0
"""How long VMs have to end their watch: one that does not answer is left."""
WATCHED_MAX: Final = 1000
"""Watches of which all is kept that they came to, the last ones."""
TROUBLES_MAX: Final = 1000
NO_SOCKET: Final = "there was no such socket all the while"
TOO_EARLY: Final = "the watch ended before the guest's pages were found"


class Watched(NamedTuple):
    """What the watch of one VM came to.  cells: of its row.  error: what ended it, if that was one."""

    vm: str
    ending: Ending
    cells: list[str | Text]
    error: str | None


class Fleet:
    """Watches the VMs at the sockets `named`: paths, and patterns of paths.

    metrics: what Prometheus is told.  open_vm: opens a VM by its socket's path.
    """

    def __init__(
        self,
        named: list[str],
        open_vm: Callable[[str], WatchedVm],
        options: WatchOptions,
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
        self._named, self._open_vm, self._options = named, open_vm, options
        self._view, self._end, self._metrics = view, end, metrics
        self._searches = SearchTurns(end)
        self._members: dict[FileId, Member] = {}
        self._retries: dict[FileId, Retry] = {}
        self._first_seen_s: dict[FileId, float] = {}
        self._names = VmNames()
        self._missing = {path for path in named if not is_pattern(path)}
        self._host = HostTroubles(measured_tsc_hz(), LOOK_AGAIN_S)
        self._note_host(self._host.at_begin)

    @property
    def not_watched(self) -> dict[str, str]:
        """The VMs that cannot be watched, although their sockets are there or were named, and why."""
        missing = {shown(path): NO_SOCKET for path in self._missing if not Path(path).exists()}
        obstacles = {self._names.of(it): each.why for it, each in self._retries.items() if each.why is not None}
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
                    self._note_host(self._host.check())
                if is_over(self) or wait(TURN_S):
                    break
        finally:
            self._finish()

    # Inside

    def _let_in(self, paths: Mapping[FileId, str]) -> None:
        """Begin to watch those that are new, or to be tried again, and forget those that are gone."""
        self._missing -= {path for path in self._missing if Path(path).exists()}
        for socket in self._retries.keys() - paths.keys():
            del self._retries[socket]
            self._forget(socket)
            self._names.forget(socket)
        now_s = time.monotonic()
        self._first_seen_s = {socket: self._first_seen_s.get(socket, now_s) for socket in paths}
        due = {socket: path for socket, path in paths.items() if self._is_due(socket, path, now_s)}
        self._names.name(due)
        for socket, path in due.items():
            self._begin(socket, path)

    def _is_due(self, socket: FileId, path: str, now_s: float) -> bool:
        if socket in self._members:
            return False
        if socket in self._retries:
            return self._retries[socket].is_due
        # One that took another's place is most often of the same VM, started anew: it gets the name, once that is free.
        is_in_place = any(member.path == path for member in self._members.values())
        return not is_in_place or now_s >= self._first_seen_s[socket] + IN_PLACE_S

    def _begin(self, socket: FileId, path: str) -> None:
        name = self._names.of(socket)
        member = Member(
            name,
            path,
            self._open_vm,
            self._options,
            self._searches,
            lambda: sum(each.loop is not None for each in list(self._members.values())),
            show=self._view.of(name),
            metrics=None if self._metrics is None else self._metrics.of(name),
        )
        self._members[socket] = member
        member.start()

    def _reap(self) -> None:
        """Take what those came to that are over."""
        for socket, member in list(self._members.items()):
            if member.is_over:
                del self._members[socket]
                self._take(socket, member)

    def _take(self, socket: FileId, member: Member) -> None:
        error = None if member.error is None else printable(message_of(member.error))
        if member.loop is None and error is None:
            error = TOO_EARLY
        if member.loop is not None:
            ending = ending_of(member.loop, self._options.budgets, member.why_ended)
            cells = fleet_row(member.name, member.loop, ending.verdict)
            self.watched.append(Watched(member.name, ending, cells, error))
            self.statuses |= {ending.exit_status, *([VerdictStatus.UNDECIDED.exit_status] if error else [])}
        before = self._retries.get(socket)
        if member.error is not None and (before is None or before.why != error):
            self._view.left(member.name, str(error))
        if member.why_ended is not None:
            self._forget(socket)
        self._retries[socket] = Retry.first(error) if member.loop is not None or before is None else before.next(error)

    def _forget(self, socket: FileId) -> None:
        if self._metrics is not None:
            self._metrics.forget(self._names.of(socket))

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
        for socket, member in list(self._members.items()):
            if not member.join(max(limit_s - time.monotonic(), 0)):
                member.error = TimeoutError(f"it did not answer within {JOIN_S:g} s, and is left")
            self._take(socket, member)
        self._members.clear()


def _allow_files() -> None:
    """Each VM needs some ten descriptors."""
    _, most = getrlimit(RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        setrlimit(RLIMIT_NOFILE, (most, most))
