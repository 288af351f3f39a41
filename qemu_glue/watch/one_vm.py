"""The watch of one VM, from when it is waited for to what it came to."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from rich.text import Text

from pvclock import Reference
from pvclock.commands.outcome import Outcome, line_json
from pvclock.commands.screen import Screen, write
from pvclock.errors import PagesNotFound, PvclockError
from pvclock.meter.watch.loop import HostTrouble, VmEnded, WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.vm import WatchedVm
from qemu_glue.prometheus.metrics import Metrics
from qemu_glue.watch.beginning import Interrupted, Patience, opened, stopped_if_paused
from qemu_glue.watch.ending import ending_of
from qemu_glue.watch.first_lines import first_lines
from qemu_glue.watch.instants import Instants
from qemu_glue.watch.interrupts import Interrupts
from qemu_glue.watch.records import summary_record
from qemu_glue.watch.tables import summary_table
from qemu_glue.watch.target import Target
from qemu_glue.watch.verdict import verdict_in_words
from qemu_glue.watch.views import JsonView, LinesView, LiveView, View

__all__ = ["watch_one"]


def watch_one(
    arguments: argparse.Namespace, screen: Screen, target: Target, metrics: Metrics | None, interrupts: Interrupts
) -> Outcome:
    """Watch `target`, show what is found, tell it to `metrics`, and hold it against the budgets."""
    patience = Patience(arguments.wait, interrupts)
    if metrics is not None:
        metrics.of(target.label)
    try:
        with patience.have(lambda: opened(*target)) as vm:
            loop, found = _begun(arguments, screen, vm, patience, interrupts)
            watch = _Watch(arguments, screen, loop, found, metrics, target.label)
            return watch.to_the_end()
    except Interrupted:
        screen.tell("pvclock watch: interrupted before the guest's pages were found")
        raise KeyboardInterrupt from None


# Inside


def _begun(
    arguments: argparse.Namespace, screen: Screen, vm: WatchedVm, patience: Patience, interrupts: Interrupts
) -> tuple[WatchLoop, PagesFound]:
    """The watch, with its pages found."""
    with screen.progress(1.0, "searching the guest's memory") as update:

        def progress(done_bytes: int, total_bytes: int) -> None:
            patience.check()
            update(done_bytes / total_bytes, f"searching {total_bytes >> 20} MiB of guest memory")

        loop = WatchLoop(
            vm,
            Reference(arguments.reference),
            wait=interrupts.wait,
            interval_s=arguments.interval,
            given=arguments.page,
            progress=progress,
        )
        try:
            return loop, patience.have(loop.begin, lambda _found: loop.finder.doubt is None)
        except PagesNotFound as error:
            raise stopped_if_paused(error, vm) from None


class _Watch:
    """A watch that has found its pages."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        screen: Screen,
        loop: WatchLoop,
        found: PagesFound,
        metrics: Metrics | None,
        label: str,
    ) -> None:
        self._arguments, self._screen, self._metrics, self._label = arguments, screen, metrics, label
        self._loop, self._found = loop, found

    def to_the_end(self) -> Outcome:
        """Watch, and show what it came to; after an error of a VM that runs, too."""
        try:
            why_ended = self._looked()
        except PvclockError:
            self._show_summary()
            raise
        return self._outcome(why_ended)

    def _looked(self) -> str | None:
        """Show each look; why the VM ended, if it did."""
        why_ended = None
        instants = Instants(self._loop.host_tsc_hz)
        if self._metrics is not None:
            self._metrics.host.take(self._loop.troubles)
        with ExitStack() as resources:
            view = None
            for look in self._loop.looks(self._arguments.seconds):
                # From the line on that tells of the pages, all is seen that becomes of them.
                view = view or self._view(instants, resources)
                view.show(look)
                if self._metrics is not None:
                    self._metrics.of(self._label).take(look, self._loop)
                    self._metrics.host.take(each for each in look.findings if isinstance(each, HostTrouble))
                why_ended = next((each.why for each in look.findings if isinstance(each, VmEnded)), None)
        return why_ended

    def _view(self, instants: Instants, resources: ExitStack) -> View:
        if self._arguments.json:
            return JsonView(self._loop, instants, self._found)
        self._screen.show(*first_lines(self._loop, self._found))
        if self._screen.can_redraw:
            return LiveView(self._loop, instants, resources.enter_context(self._screen.redrawing()))
        return LinesView(self._screen, instants)

    def _show_summary(self) -> None:
        """Where there is no outcome: for people, and as a line of JSON."""
        self._screen.show(summary_table(self._loop))
        if self._arguments.json:
            summary = summary_record(self._loop.watcher.summary)
            write(line_json("watch", {"kind": "summary", **summary}) + "\n")

    def _outcome(self, why_ended: str | None) -> Outcome:
        """Show what the watch came to, and how its budgets fared."""
        self._screen.show(summary_table(self._loop))
        if why_ended is not None:
            self._screen.show(Text("The VM has ended.", "yellow"))
        if not self._loop.has_run:
            self._screen.show(Text("The guest was stopped all the while.", "yellow"))
        ending = ending_of(self._loop, self._arguments, why_ended)
        self._screen.show(*verdict_in_words(ending.verdict))
        return Outcome(ending.exit_status == 0, ending.result, ending.exit_status)
