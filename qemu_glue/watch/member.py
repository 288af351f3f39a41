"""One VM of a fleet: a thread that opens it, finds its pages and looks at them, until it ends or the fleet does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from pvclock.meter.watch.host_troubles import HostTrouble
from pvclock.meter.watch.loop import Look, WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.vm import WatchedVm
from qemu_glue.prometheus.metrics import VmMetrics
from qemu_glue.watch.beginning import Interrupted, Patience, begun
from qemu_glue.watch.fleet_end import SearchTurns
from qemu_glue.watch.looks import take_looks
from qemu_glue.watch.options import WatchOptions
from qemu_glue.watch.poll_share import SharedWait
from qemu_glue.watch.views import View

__all__ = ["Member", "Shows"]


class Shows(Protocol):
    """Shows one VM's watch, but for the host's troubles, which are no VM's."""

    def begin(self, loop: WatchLoop, found: PagesFound, first: Look) -> View:
        """Its pages were found, and looked at for the first time: what shows that look and all others."""


class Member:
    """A VM, from its socket on.

    open_vm: opens it.  searches: its turn to search, until the fleet ends.  watched: how many VMs the fleet watches.
    metrics: what is told to Prometheus of it.
    """

    def __init__(
        self,
        name: str,
        path: str,
        open_vm: Callable[[str], WatchedVm],
        options: WatchOptions,
        searches: SearchTurns,
        watched: Callable[[], int],
        *,
        show: Shows,
        metrics: VmMetrics | None,
    ) -> None:
        self.name, self.path = name, path
        self.loop: WatchLoop | None = None
        """Once its pages are found."""
        self.why_ended: str | None = None
        """The VM has ended."""
        self.error: Exception | None = None
        """What kept the watch from its work, or ended it."""
        self._open_vm, self._options, self._searches = open_vm, options, searches
        self._show, self._metrics = show, metrics
        self._wait = SharedWait(searches.end.wait, watched, is_fixed=options.interval_s is not None)
        self._thread = threading.Thread(target=self._run, name=f"pvclock-watch-{name}", daemon=True)

    def start(self) -> None:
        """Begin; it is over at once if the system allows no more threads."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self.error = error

    @property
    def is_over(self) -> bool:
        """Has it come to its end?"""
        return not self._thread.is_alive()

    def join(self, limit_s: float) -> bool:
        """Wait for its end; did it come?"""
        if not self.is_over:
            self._thread.join(limit_s)
        return self.is_over

    # In its thread

    def _run(self) -> None:
        try:
            self._watch()
        except Interrupted:
            return
        except Exception as error:  # noqa: BLE001  # whatever it is, the others are watched on
            self.error = error
        finally:
            if self._metrics is not None:
                self._metrics.end()

    def _watch(self) -> None:
        patience = Patience(self._options.wait_s, self._searches.end)
        with patience.have(lambda: self._open_vm(self.path)) as vm:
            loop, found = begun(vm, self._options, patience, wait=self._wait, begin=self._begin)
            self._wait.take_charge(loop)
            self.loop = loop
            looks = map(_without_host, loop.looks())
            self.why_ended = take_looks(loop, looks, lambda first: self._show.begin(loop, found, first), self._metrics)

    def _begin(self, loop: WatchLoop) -> PagesFound:
        with self._searches.turn():
            return loop.begin()


def _without_host(look: Look) -> Look:
    return look._replace(findings=tuple(each for each in look.findings if not isinstance(each, HostTrouble)))
