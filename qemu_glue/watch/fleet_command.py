"""`pvclock watch` of a fleet: when it waits, when it ends, and what it came to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from rich.text import Text

from pvclock import ConfigError
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.host.this_host import measured_tsc_hz
from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.vm import WatchedVm
from qemu_glue.prometheus.metrics import Metrics
from qemu_glue.watch.fleet import Fleet
from qemu_glue.watch.fleet_end import FleetEnd
from qemu_glue.watch.fleet_views import FleetView, fleet_table, verdict_lines
from qemu_glue.watch.instants import Instants
from qemu_glue.watch.interrupts import Interrupts
from qemu_glue.watch.options import WatchOptions
from qemu_glue.watch.records import finding_record
from qemu_glue.watch.sockets import sockets_now
from qemu_glue.watch.target import open_vm

__all__ = ["watch_fleet"]

WORST_FIRST: Final = (VerdictStatus.BROKEN.exit_status, VerdictStatus.UNDECIDED.exit_status, 0)
"""A budget that is surely broken is worse than one that may be."""


def watch_fleet(
    named: list[str], options: WatchOptions, screen: Screen, metrics: Metrics | None, interrupts: Interrupts
) -> Outcome:
    """Watch all VMs at the sockets `named`: paths, and patterns of paths.

    ConfigError if there is none, unless --wait or --prometheus let it wait.
    """
    waits_for_ever = metrics is not None
    if not (waits_for_ever or options.wait_s or sockets_now(named)):
        raise ConfigError(
            f"no QMP socket at {', '.join(named)}; --wait SECONDS waits for one, and --prometheus for ever"
        )
    failures: list[OSError] = []
    end = FleetEnd()

    def fail(error: OSError) -> None:
        failures.append(error)
        end.come()

    view = FleetView(screen, Instants(measured_tsc_hz()), fail, is_json=options.is_json)
    fleet = Fleet(named, _open_by_socket, options, view=view, end=end, metrics=metrics)
    if not sockets_now(named):
        view.waits()
    fleet.run(interrupts.wait, _is_over(options, waits_for_ever=waits_for_ever))
    if failures:
        raise failures[0]
    return _outcome(fleet, screen)


def _open_by_socket(path: str) -> WatchedVm:
    return open_vm(qmp=path)


def _is_over(options: WatchOptions, *, waits_for_ever: bool) -> Callable[[Fleet], bool]:
    """Is it, after --seconds, or once there is no VM any more and nobody wants to wait for one?"""
    begin_s = time.monotonic()

    def is_over(fleet: Fleet) -> bool:
        passed_s = time.monotonic() - begin_s
        if options.seconds is not None and passed_s >= options.seconds:
            return True
        return fleet.is_empty and not waits_for_ever and passed_s >= options.wait_s

    return is_over


def _outcome(fleet: Fleet, screen: Screen) -> Outcome:
    """Show a row a VM, and each verdict; the worst is the fleet's."""
    if fleet.watched:
        screen.show(fleet_table(each.cells for each in fleet.watched))
    for each in fleet.watched:
        screen.show(*verdict_lines(each.vm, each.ending.verdict))
    for name, why in fleet.not_watched.items():
        screen.show(Text.assemble((f"{name}: ", "bold"), Text(f"not watched at the end: {why}", "yellow")))
    statuses = {*fleet.statuses, *([VerdictStatus.UNDECIDED.exit_status] if fleet.not_watched else [])}
    result = {
        "vms": [{**each.ending.result, "vm": each.vm} for each in fleet.watched],
        "not_watched": [{"vm": name, "why": why} for name, why in fleet.not_watched.items()],
        "host_troubles": list(map(finding_record, fleet.troubles)),
    }
    status = next((each for each in WORST_FIRST if each in statuses), 0)
    return Outcome(status == 0, result, status)
