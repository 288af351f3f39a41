"""What becomes of the looks of a watch: each is shown, and told to Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pvclock.meter.watch.loop import Look, VmEnded, WatchLoop
from qemu_glue.prometheus.metrics import VmMetrics
from qemu_glue.watch.views import View

__all__ = ["take_looks"]


def take_looks(
    loop: WatchLoop, looks: Iterable[Look], begin_view: Callable[[Look], View], metrics: VmMetrics | None
) -> str | None:
    """Take all of them; why the VM ended, if it did.

    begin_view: makes the view at the first one: from the line on that tells of the pages, all is seen that becomes of
    them.
    """
    view, why_ended = None, None
    for look in looks:
        view = view or begin_view(look)
        view.show(look)
        if metrics is not None:
            metrics.take(look, loop)
        why_ended = next((each.why for each in look.findings if isinstance(each, VmEnded)), None)
    return why_ended
