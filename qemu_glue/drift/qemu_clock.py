"""The clock of a running QEMU guest, as one whose drift is measured."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from rich.text import Text

from pvclock.commands.screen import Screen
from pvclock.meter.drift import DriftingClock, HostReference
from pvclock.meter.watch.outside_clock import OutsideClock
from qemu_glue.watch.beginning import Interrupted, Patience, opened
from qemu_glue.watch.interrupts import Interrupts

__all__ = ["qemu_clock"]


def qemu_clock(
    arguments: argparse.Namespace,
    screen: Screen,
    host: HostReference,
    settle_s: float,
    interrupts: Interrupts,
    resources: ExitStack,
) -> DriftingClock:
    """The guest that --qmp, --pid or --libvirt names, with its page found.  `resources` lets go of it.

    As open_vm() and OutsideClock; KeyboardInterrupt if Ctrl-C comes before the page is found.
    """
    vm = resources.enter_context(opened(arguments.qmp, arguments.pid, arguments.libvirt))
    patience = Patience(0.0, interrupts)
    with screen.progress(1.0, "searching the guest's memory") as update:

        def progress(done_bytes: int, total_bytes: int) -> None:
            patience.check()
            update(done_bytes / total_bytes, f"searching {total_bytes >> 20} MiB of guest memory")

        try:
            guest = OutsideClock(vm, progress)
        except Interrupted:
            screen.tell("pvclock drift: interrupted before the guest's page was found")
            raise KeyboardInterrupt from None
    if guest.doubt is not None:
        screen.show(Text(f"Perhaps not the guest's: {guest.doubt}", "yellow"))
    return DriftingClock("qemu", host.series(vm.name, guest, settle_s), guest.check_running)
