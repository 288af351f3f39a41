"""Watch the clocks of running QEMU/KVM guests from outside: how far they step, how fast they drift.

Nothing is written to a guest, and nothing of it is restarted.  The pages of its clock are searched in its memory and
looked at every 10 ms, until --seconds, Ctrl-C or its end.  Exit status 1 if a budget is broken, 2 if one is undecided.

--qmp with a pattern, or given several times, watches all VMs whose sockets there are, and those that come later.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from pvclock import ConfigError, Gpa, Reference
from pvclock.commands.arguments import THE_ONLY_PID, duration_s, process_id, rate_ppb, time_ns
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from qemu_glue.prometheus.address import DEFAULT_HOST, parsed_address

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from qemu_glue.prometheus.metrics import Metrics
    from qemu_glue.watch.options import WatchOptions
    from qemu_glue.watch.target import Target

__all__ = ["EXAMPLES", "JSON_LINES", "add_arguments", "run"]

JSON_LINES: Final = True

EXAMPLES: Final = """\
  pvclock watch --pid             the only QEMU here
  pvclock watch --qmp SOCKET      QEMU's -qmp unix:SOCKET,server=on,wait=off
  pvclock watch --libvirt DOMAIN  through virsh
  pvclock watch --qmp SOCKET --seconds 60 --max-step 1us --max-drift 100ppb
  pvclock watch --qmp '/run/vms/*.qmp' --prometheus 9911"""

INTERVAL_MAX_MS: Final = 60_000
GPA_MAX: Final = 1 << 52


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    vm = parser.add_mutually_exclusive_group(required=True)
    qmp = "the QEMU with this QMP socket; all that match a pattern, which is to be quoted; may be given several times"
    vm.add_argument("--qmp", metavar="SOCKET", action="append", help=qmp)
    pid = "the QEMU that is this process (default: the only one here); causes of steps are not known then"
    vm.add_argument("--pid", type=process_id, nargs="?", const=THE_ONLY_PID, action="append", help=pid)
    vm.add_argument("--libvirt", metavar="DOMAIN", action="append", help="the QEMU of this domain of libvirt")
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
    metrics = f"serve metrics at http://ADDRESS:PORT/metrics (default ADDRESS {DEFAULT_HOST}; PORT 0: any free one)"
    parser.add_argument("--prometheus", type=parsed_address, metavar="[ADDRESS:]PORT", help=metrics)
    parser.add_argument("--max-step", type=time_ns, metavar="TIME", help="how far a clock may step, such as 1us")
    parser.add_argument("--max-drift", type=rate_ppb, metavar="RATE", help="how fast it may drift, such as 10ppb")
    pauses = "a step at a pause that QEMU tells counts by what the guest saw of it"
    parser.add_argument("--allow-pauses", action="store_true", help=pauses)
    unchanged = "you know that nobody changes the guest's TSC; counts where its offset cannot be read"
    parser.add_argument("--tsc-unchanged", action="store_true", help=unchanged)


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Watch, show, and hold what was found against the budgets."""
    from qemu_glue.watch.fleet_command import watch_fleet
    from qemu_glue.watch.interrupts import Interrupts
    from qemu_glue.watch.one_vm import watch_one

    target = _only_target(arguments)
    if target is None and arguments.page:
        raise ConfigError("--page is of one VM; a fleet's pages are searched")
    options = _options(arguments)
    with Interrupts() as interrupts, ExitStack() as resources:
        metrics = _served(arguments, screen, resources)
        if target is None:
            return watch_fleet(arguments.qmp, options, screen, metrics, interrupts)
        return watch_one(options, screen, target, metrics, interrupts)


# Inside


def _options(arguments: argparse.Namespace) -> WatchOptions:
    from pvclock.meter.watch.budgets import Budgets
    from qemu_glue.watch.options import WatchOptions

    return WatchOptions(
        Reference(arguments.reference),
        Budgets(arguments.max_step, arguments.max_drift, arguments.tsc_unchanged, arguments.allow_pauses),
        seconds=arguments.seconds,
        wait_s=arguments.wait,
        interval_s=arguments.interval,
        pages=tuple(arguments.page),
        is_json=arguments.json,
    )


def _only_target(arguments: argparse.Namespace) -> Target | None:
    """The VM to watch; None: a fleet.  ConfigError."""
    from qemu_glue.watch.beginning import target_of
    from qemu_glue.watch.sockets import is_pattern

    if arguments.qmp is not None:
        several = len(arguments.qmp) > 1 or is_pattern(arguments.qmp[0])
        return None if several else target_of(qmp=arguments.qmp[0])
    for option, given in (("--pid", arguments.pid), ("--libvirt", arguments.libvirt)):
        if given is not None and len(given) > 1:
            raise ConfigError(f"{option} is for one VM; several are watched by their sockets: --qmp 'PATTERN'")
    if arguments.pid is not None:
        return target_of(pid=arguments.pid[0])
    return target_of(libvirt=arguments.libvirt[0])


def _served(arguments: argparse.Namespace, screen: Screen, resources: ExitStack) -> Metrics | None:
    """What --prometheus serves from now on."""
    if arguments.prometheus is None:
        return None
    try:
        from qemu_glue.prometheus.exporter import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prometheus_client":
            raise
        raise ConfigError("--prometheus needs prometheus_client: pip install 'pvclock[prometheus]'") from None
    from pvclock.host.this_host import measured_tsc_hz
    from qemu_glue.prometheus.metrics import Metrics
    from qemu_glue.watch.instants import Instants
    from qemu_glue.watch.json_lines import JsonLines

    metrics = Metrics()
    server = resources.enter_context(serve(arguments.prometheus, metrics))
    screen.show(f"metrics at {server.url}")
    if arguments.json:
        JsonLines(Instants(measured_tsc_hz())).write({"kind": "metrics", "url": server.url})
    return metrics


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
