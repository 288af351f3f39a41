"""The watch of one VM, from when it is waited for to what it came to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from rich.text import Text

from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.errors import PvclockError
from pvclock.meter.watch.host_troubles import HostTrouble
from pvclock.meter.watch.loop import Look, WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from qemu_glue.prometheus.metrics import Metrics
from qemu_glue.watch.beginning import Interrupted, Patience, begun, opened
from qemu_glue.watch.ending import ending_of
from qemu_glue.watch.instants import Instants
from qemu_glue.watch.interrupts import Interrupts
from qemu_glue.watch.json_lines import JsonLines
from qemu_glue.watch.looks import take_looks
from qemu_glue.watch.options import WatchOptions
from qemu_glue.watch.records import summary_record
from qemu_glue.watch.tables import summary_table
from qemu_glue.watch.target import Target
from qemu_glue.watch.verdict import verdict_in_words
from qemu_glue.watch.views import JsonView, LinesView, LiveView, View, first_lines

__all__ = ["watch_one"]


def watch_one(
    options: WatchOptions, screen: Screen, target: Target, metrics: Metrics | None, interrupts: Interrupts
) -> Outcome:
    """Watch `target`, show what is found, tell it to `metrics`, and hold it against the budgets."""
    patience = Patience(options.wait_s, interrupts)
    if metrics is not None:
        metrics.of(target.label)
    try:
        with patience.have(lambda: opened(target)) as vm:
            with screen.progress(1.0, "searching the guest's memory") as update:

                def progress(done_bytes: int, total_bytes: int) -> None:
                    update(done_bytes / total_bytes, f"searching {total_bytes >> 20} MiB of guest memory")

                loop, found = begun(vm, options, patience, wait=interrupts.wait, progress=progress)
            return _Watch(options, screen, loop, found, metrics, target.label).to_the_end()
    except Interrupted:
        screen.tell("pvclock watch: interrupted before the guest's pages were found")
        raise KeyboardInterrupt from None


# Inside


class _Watch:
    """A watch that has found its pages."""

    def __init__(
        self,
        options: WatchOptions,
        screen: Screen,
        loop: WatchLoop,
        found: PagesFound,
        metrics: Metrics | None,
        label: str,
    ) -> None:
        self._options, self._screen, self._metrics, self._label = options, screen, metrics, label
        self._loop, self._found = loop, found
        self._lines = JsonLines(Instants(loop.host_tsc_hz))

    def to_the_end(self) -> Outcome:
        """Watch, and show what it came to; after an error of a VM that runs, too."""
        try:
            with ExitStack() as resources:
                metrics = None if self._metrics is None else self._metrics.of(self._label)
                why_ended = take_looks(self._loop, self._looks(), lambda first: self._view(first, resources), metrics)
        except PvclockError:
            self._show_summary()
            raise
        return self._outcome(why_ended)

    def _looks(self) -> Iterator[Look]:
        """Each look, once the metrics have the host's troubles that it found."""
        host = None if self._metrics is None else self._metrics.host
        if host is not None:
            host.take(self._loop.troubles)
        for look in self._loop.looks(self._options.seconds):
            if host is not None:
                host.take(each for each in look.findings if isinstance(each, HostTrouble))
            yield look

    def _view(self, first: Look, resources: ExitStack) -> View:
        if self._options.is_json:
            return JsonView(self._loop, self._lines, self._found, first.poll.begin)
        self._screen.show(*first_lines(self._loop, self._found))
        if self._screen.can_redraw:
            return LiveView(self._loop, self._lines.instants, resources.enter_context(self._screen.redrawing()))
        return LinesView(self._screen, self._lines.instants)

    def _show_summary(self) -> None:
        """Where there is no outcome: for people, and as a line of JSON."""
        self._screen.show(summary_table(self._loop))
        if self._options.is_json:
            self._lines.write({"kind": "summary", **summary_record(self._loop.watcher.summary)})

    def _outcome(self, why_ended: str | None) -> Outcome:
        """Show what the watch came to, and how its budgets fared."""
        self._screen.show(summary_table(self._loop))
        if why_ended is not None:
            self._screen.show(Text("The VM has ended.", "yellow"))
        if not self._loop.has_run:
            self._screen.show(Text("The guest was stopped all the while.", "yellow"))
        ending = ending_of(self._loop, self._options.budgets, why_ended)
        self._screen.show(*verdict_in_words(ending.verdict))
        return Outcome(ending.exit_status == 0, ending.result, ending.exit_status)
