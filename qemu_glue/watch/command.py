"""Watch the clock of a running QEMU/KVM guest from outside: how far it steps, how fast it drifts.

Nothing is written to the guest, and nothing of it is restarted.  The pages of its clock are searched in its memory and
looked at every 10 ms, until --seconds, Ctrl-C or its end.  Exit status 1 if a budget is broken, 2 if one is undecided.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from rich.text import Text

from pvclock import ConfigError, Gpa, Reference
from pvclock.commands.arguments import duration_s
from pvclock.commands.report import Report
from pvclock.commands.screen import Screen

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from pvclock.meter.watch.budgets import Budgets
    from pvclock.meter.watch.loop import WatchLoop
    from pvclock.meter.watch.page_finder import PagesFound
    from pvclock.meter.watch.vm import WatchedVm
    from qemu_glue.watch.interrupts import Interrupts
    from qemu_glue.watch.views import View

__all__ = ["EXAMPLES", "JSON_LINES", "add_arguments", "run"]

JSON_LINES: Final = True

EXAMPLES: Final = """\
  pvclock watch --pid $(pidof -s qemu-system-x86_64)
  pvclock watch --qmp SOCKET      QEMU's -qmp unix:SOCKET,server=on,wait=off
  pvclock watch --libvirt DOMAIN  through virsh
  pvclock watch --qmp SOCKET --seconds 60 --max-step 1us --max-drift 100ppb"""

INTERVAL_MAX_MS: Final = 60_000
GPA_MAX: Final = 1 << 52


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    vm = parser.add_mutually_exclusive_group(required=True)
    vm.add_argument("--qmp", metavar="SOCKET", help="the QEMU with this QMP socket")
    vm.add_argument("--pid", type=_pid, help="the QEMU that is this process; causes of steps are not known then")
    vm.add_argument("--libvirt", metavar="DOMAIN", help="the QEMU of this domain of libvirt")
    parser.add_argument(
        "--reference",
        choices=[each.value for each in Reference],
        default=Reference.RAW.value,
        help="the clock of this host that the guest's is held against (default raw)",
    )
    parser.add_argument("--seconds", type=duration_s, help="how long (default: until Ctrl-C)")
    interval = "how often the pages are looked at (default 10; less often where that costs much)"
    parser.add_argument("--interval", type=_interval_s, metavar="MS", help=interval)
    pages = "where a vCPU's page is, vCPU 0's first, if you know it: nothing is searched then"
    parser.add_argument("--page", type=_address, action="append", default=[], metavar="GPA", help=pages)
    parser.add_argument("--max-step", type=_step_ns, metavar="TIME", help="how far a clock may step, such as 1us")
    parser.add_argument("--max-drift", type=_drift_ppb, metavar="RATE", help="how fast it may drift, such as 10ppb")
    unchanged = "you know that nobody changes the guest's TSC; counts where its offset cannot be read"
    parser.add_argument("--tsc-unchanged", action="store_true", help=unchanged)


def run(arguments: argparse.Namespace, screen: Screen) -> Report:
    """Watch, show, and hold what was found against the budgets."""
    from pvclock.meter.watch.budgets import Budgets
    from qemu_glue.watch.interrupts import Interrupts
    from qemu_glue.watch.target import open_vm

    budgets = Budgets(arguments.max_step, arguments.max_drift, arguments.tsc_unchanged)
    interrupts = Interrupts()
    with open_vm(qmp=arguments.qmp, pid=arguments.pid, libvirt=arguments.libvirt) as vm:
        loop, found = _begun(arguments, screen, vm, interrupts)
        why_ended = _watched(arguments, screen, loop, found, interrupts)
        return _report(screen, loop, budgets, why_ended)


# Inside


def _begun(
    arguments: argparse.Namespace, screen: Screen, vm: WatchedVm, interrupts: Interrupts
) -> tuple[WatchLoop, PagesFound]:
    """The watch, with its pages found."""
    from pvclock.meter.watch.loop import WatchLoop

    with screen.progress(1.0, "searching the guest's memory") as update:
        loop = WatchLoop(
            vm,
            Reference(arguments.reference),
            wait=interrupts.wait,
            interval_s=arguments.interval,
            given=arguments.page,
            progress=lambda done, total: update(done / total, f"searching {total >> 20} MiB of guest memory"),
        )
        return loop, loop.begin()


def _watched(
    arguments: argparse.Namespace, screen: Screen, loop: WatchLoop, found: PagesFound, interrupts: Interrupts
) -> str | None:
    """Watch to the end; why the VM ended, if it did."""
    from pvclock.meter.watch.loop import VmEnded

    why_ended = None
    with interrupts, ExitStack() as resources:
        view = _view(arguments, screen, loop, found, resources)
        for look in loop.looks(arguments.seconds):
            view.show(look)
            why_ended = next((each.why for each in look.findings if isinstance(each, VmEnded)), None)
    return why_ended


def _view(
    arguments: argparse.Namespace, screen: Screen, loop: WatchLoop, found: PagesFound, resources: ExitStack
) -> View:
    from qemu_glue.watch.instants import Instants
    from qemu_glue.watch.sentences import pages_in_words
    from qemu_glue.watch.views import JsonView, LinesView, LiveView

    instants = Instants(loop.host_tsc_hz)
    if arguments.json:
        return JsonView(loop, instants, found)
    vm = loop.vm
    screen.show(f"{vm.name}: {pages_in_words(found)}; read by {vm.ram.means} every {loop.interval_s * 1000:.3g} ms")
    for lacking, why in (("clock readings", vm.why_no_offsets), ("causes of steps", vm.why_no_events)):
        if why is not None:
            screen.show(Text(f"No {lacking}: {why}", "yellow"))
    if not loop.finder.is_sure:
        screen.show(
            Text("Perhaps firmware left that: it does not lie as Linux's pages do.  Others are searched.", "yellow")
        )
    if screen.can_redraw:
        return LiveView(loop, instants, resources.enter_context(screen.redrawing()))
    return LinesView(screen, instants)


def _report(screen: Screen, loop: WatchLoop, budgets: Budgets, why_ended: str | None) -> Report:
    """Show what the watch came to, and how its budgets fared."""
    from qemu_glue.watch.records import budgets_record, finding_record, rate_records, summary_record, vm_record
    from qemu_glue.watch.tables import summary_table
    from qemu_glue.watch.verdict import EXIT_STATUSES, judged, verdict_in_words

    screen.show(summary_table(loop))
    if why_ended is not None:
        screen.show(Text("The VM has ended.", "yellow"))
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
    status = 0 if verdict is None else EXIT_STATUSES[verdict.status]
    return Report(status == 0, found, status)


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


def _step_ns(text: str) -> Fraction:
    from pvclock.meter.watch.budgets import parse_step_ns

    try:
        return parse_step_ns(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _drift_ppb(text: str) -> Fraction:
    from pvclock.meter.watch.budgets import parse_drift_ppb

    try:
        return parse_drift_ppb(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
