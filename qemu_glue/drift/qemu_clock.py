"""The clock of a running QEMU guest, as one whose drift is measured."""

from __future__ import annotations

from contextlib import ExitStack

from rich.text import Text

from pvclock.commands.screen import Screen
from pvclock.meter.drift.clocks import DriftingClock
from pvclock.meter.drift.host_reference import HostReference
from pvclock.meter.watch.outside_clock import OutsideClock
from qemu_glue.watch.beginning import Interrupted, Patience, opened
from qemu_glue.watch.interrupts import Interrupts
from qemu_glue.watch.target import Target

__all__ = ["qemu_clock"]


def qemu_clock(
    target: Target,
    screen: Screen,
    host: HostReference,
    settle_s: float,
    interrupts: Interrupts,
    resources: ExitStack,
) -> DriftingClock:
    """The clock of a guest that runs already, with its page found.  `resources` lets go of it.

    As open_vm() and OutsideClock; KeyboardInterrupt if Ctrl-C comes before the page is found.
    """
    vm = resources.enter_context(opened(target))
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
    if guest.is_stopped:
        screen.show(Text("The guest is stopped: how its clock goes on is known once it runs", "yellow"))
    readings = host.readings(vm.name, guest, settle_s, lambda: guest.is_stopped)
    return DriftingClock("qemu", readings, guest.check_running)
