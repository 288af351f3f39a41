"""Watch the clock of a running QEMU/KVM guest from outside: how far it steps, how fast it drifts.

Nothing is written to the guest, and nothing of it is restarted.  The pages of its clock are searched in its memory and
looked at every 10 ms, until --seconds, Ctrl-C or its end.  Exit status 1 if a budget is broken, 2 if one is undecided.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from rich.text import Text

from pvclock import Gpa, Reference
from pvclock.commands.arguments import duration_s, rate_ppb, time_ns
from pvclock.commands.outcome import Outcome, line_json
from pvclock.commands.screen import Screen, write
from pvclock.errors import PagesNotFound, PvclockError

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from pvclock.meter.watch.loop import WatchLoop
    from pvclock.meter.watch.page_finder import PagesFound
    from pvclock.meter.watch.vm import WatchedVm
    from qemu_glue.watch.beginning import Patience
    from qemu_glue.watch.instants import Instants
    from qemu_glue.watch.interrupts import Interrupts
    from qemu_glue.watch.views import View

__all__ = ["EXAMPLES", "JSON_LINES", "add_arguments", "run"]

JSON_LINES: Final = True

EXAMPLES: Final = """\
  pvclock watch --pid             the only QEMU here
  pvclock watch --qmp SOCKET      QEMU's -qmp unix:SOCKET,server=on,wait=off
  pvclock watch --libvirt DOMAIN  through virsh
  pvclock watch --qmp SOCKET --seconds 60 --max-step 1us --max-drift 100ppb"""

INTERVAL_MAX_MS: Final = 60_000
THE_ONLY_PID: Final = 0
"""Stands for the pid of the only VM here."""

GPA_MAX: Final = 1 << 52
STOPPED: Final = "the guest was stopped when the watch began; if it has not booted so far, have it go on"
US_PER_S: Final = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    vm = parser.add_mutually_exclusive_group(required=True)
    vm.add_argument("--qmp", metavar="SOCKET", help="the QEMU with this QMP socket")
    pid = "the QEMU that is this process (default: the only one here); causes of steps are not known then"
    vm.add_argument("--pid", type=_pid, nargs="?", const=THE_ONLY_PID, help=pid)
    vm.add_argument("--libvirt", metavar="DOMAIN", help="the QEMU of this domain of libvirt")
    parser.add_argument(
        "--reference",
        choices=[each.value for each in Reference],
        default=Reference.RAW.value,
        help="the clock of this host that the guest's is held against (default raw)",
    )
    parser.add_argument("--seconds", type=duration_s, help="how long (default: until Ctrl-C)")
    wait = "how long to wait for QEMU, its socket and the pages of a guest that boots (default: not at all)"
    parser.add_argument("--wait", type=duration_s, default=0.0, metavar="SECONDS", help=wait)
    interval = "how often the pages are looked at (default 10; less often where that costs much)"
    parser.add_argument("--interval", type=_interval_s, metavar="MS", help=interval)
    pages = "where a vCPU's page is, vCPU 0's first, if you know it: nothing is searched then"
    parser.add_argument("--page", type=_address, action="append", default=[], metavar="GPA", help=pages)
    parser.add_argument("--max-step", type=time_ns, metavar="TIME", help="how far a clock may step, such as 1us")
    parser.add_argument("--max-drift", type=rate_ppb, metavar="RATE", help="how fast it may drift, such as 10ppb")
    pauses = "a step at a pause that QEMU tells counts by what the guest saw of it"
    parser.add_argument("--allow-pauses", action="store_true", help=pauses)
    unchanged = "you know that nobody changes the guest's TSC; counts where its offset cannot be read"
    parser.add_argument("--tsc-unchanged", action="store_true", help=unchanged)


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Watch, show, and hold what was found against the budgets."""
    from qemu_glue.watch.beginning import Interrupted, Patience, opened
    from qemu_glue.watch.interrupts import Interrupts

    with Interrupts() as interrupts:
        patience = Patience(arguments.wait, interrupts)
        try:
            with patience.have(lambda: opened(arguments.qmp, arguments.pid, arguments.libvirt)) as vm:
                loop, found = _begun(arguments, screen, vm, patience, interrupts)
                return _watched(arguments, screen, loop, found)
        except Interrupted:
            screen.tell("pvclock watch: interrupted before the guest's pages were found")
            raise KeyboardInterrupt from None


# Inside


def _begun(
    arguments: argparse.Namespace, screen: Screen, vm: WatchedVm, patience: Patience, interrupts: Interrupts
) -> tuple[WatchLoop, PagesFound]:
    """The watch, with its pages found."""
    from pvclock.meter.watch.loop import WatchLoop

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
            if vm.is_paused:
                raise PagesNotFound(error.searched_bytes, error.looked_for, STOPPED) from None
            raise


def _watched(arguments: argparse.Namespace, screen: Screen, loop: WatchLoop, found: PagesFound) -> Outcome:
    """Watch to the end, and show what it came to; after an error of a VM that runs, too."""
    try:
        why_ended = _looked(arguments, screen, loop, found)
    except PvclockError:
        _show_summary(arguments, screen, loop)
        raise
    return _outcome(arguments, screen, loop, why_ended)


def _looked(arguments: argparse.Namespace, screen: Screen, loop: WatchLoop, found: PagesFound) -> str | None:
    """Show each look; why the VM ended, if it did."""
    from pvclock.meter.watch.loop import VmEnded
    from qemu_glue.watch.instants import Instants

    why_ended = None
    instants = Instants(loop.host_tsc_hz)
    with ExitStack() as resources:
        view = None
        for look in loop.looks(arguments.seconds):
            # From the line on that tells of the pages, all is seen that becomes of them.
            view = view or _view(arguments, screen, loop, found, instants, resources)
            view.show(look)
            why_ended = next((each.why for each in look.findings if isinstance(each, VmEnded)), None)
    return why_ended


def _view(
    arguments: argparse.Namespace,
    screen: Screen,
    loop: WatchLoop,
    found: PagesFound,
    instants: Instants,
    resources: ExitStack,
) -> View:
    from pvclock.meter.watch.words import plain_ns
    from qemu_glue.watch.sentences import addresses_in_words
    from qemu_glue.watch.views import JsonView, LinesView, LiveView

    if arguments.json:
        return JsonView(loop, instants, found)
    vm = loop.vm
    interval = plain_ns(round(loop.interval_s * US_PER_S) * 1000)
    screen.show(f"{vm.name}: watching {addresses_in_words(found.pages)}, every {interval}")
    if loop.is_paused:
        screen.show(Text("The guest is stopped.", "yellow"))
    for lacking, why in (("clock readings", vm.why_no_offsets), ("causes of steps", vm.why_no_events)):
        if why is not None:
            screen.show(Text(f"No {lacking}: {why}", "yellow"))
    if loop.finder.doubt is not None:
        screen.show(Text(f"Perhaps not the guest's: {loop.finder.doubt}", "yellow"))
    if screen.can_redraw:
        return LiveView(loop, instants, resources.enter_context(screen.redrawing()))
    return LinesView(screen, instants)


def _show_summary(arguments: argparse.Namespace, screen: Screen, loop: WatchLoop) -> None:
    """Where there is no outcome: for people, and as a line of JSON."""
    from qemu_glue.watch.records import summary_record
    from qemu_glue.watch.tables import summary_table

    screen.show(summary_table(loop))
    if arguments.json:
        write(line_json("watch", {"kind": "summary", **summary_record(loop.watcher.summary)}) + "\n")


def _outcome(arguments: argparse.Namespace, screen: Screen, loop: WatchLoop, why_ended: str | None) -> Outcome:
    """Show what the watch came to, and how its budgets fared."""
    from pvclock.meter.watch.budgets import Budgets
    from qemu_glue.watch.records import budgets_record, finding_record, rate_records, summary_record, vm_record
    from qemu_glue.watch.tables import summary_table
    from qemu_glue.watch.verdict import judged, verdict_in_words

    screen.show(summary_table(loop))
    if why_ended is not None:
        screen.show(Text("The VM has ended.", "yellow"))
    if not loop.has_run:
        screen.show(Text("The guest was stopped all the while.", "yellow"))
    budgets = Budgets(arguments.max_step, arguments.max_drift, arguments.tsc_unchanged, arguments.allow_pauses)
    verdict = judged(budgets, loop)
    screen.show(*verdict_in_words(verdict))
    found = {
        **vm_record(loop),
        "pages": loop.finder.pages,
        "is_searching": loop.finder.is_searching,
        "why_ended": why_ended,
        "summary": summary_record(loop.watcher.summary),
        "rates": rate_records(loop),
        "host_troubles": list(map(finding_record, loop.troubles)),
        "budgets": budgets_record(budgets, verdict),
    }
    status = 0 if verdict is None else verdict.status.exit_status
    return Outcome(status == 0, found, status)


def _pid(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process ID")
    return int(text)


def _interval_s(text: str) -> float:
    try:
        ms = float(text)
    except ValueError:
        ms = 0
    if not 0 < ms <= INTERVAL_MAX_MS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an interval; give ms, more than 0 and up to {INTERVAL_MAX_MS}"
        )
    return ms / 1000


def _address(text: str) -> Gpa:
    try:
        gpa = int(text, 0)
    except ValueError:
        gpa = -1
    if not 0 <= gpa < GPA_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a guest-physical address, such as 0x1f3a000")
    return Gpa(gpa)
