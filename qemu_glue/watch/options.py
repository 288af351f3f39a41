"""How VMs are watched, as the user said."""

from __future__ import annotations

from typing import NamedTuple

from pvclock import Gpa, Reference
from pvclock.meter.watch.budgets import Budgets

__all__ = ["WatchOptions"]


class WatchOptions(NamedTuple):
    """reference: the host's clock.  seconds: for how long; None: until Ctrl-C.  wait_s: for QEMU and a guest's pages.

    interval_s: how often the pages are looked at; None: as often as that costs little.  pages: where they are; empty:
    they are searched.  is_json: show lines of JSON.
    """

    reference: Reference = Reference.RAW
    budgets: Budgets = Budgets()
    seconds: float | None = None
    wait_s: float = 0.0
    interval_s: float | None = None
    pages: tuple[Gpa, ...] = ()
    is_json: bool = False
