"""What a drift is to measure, and for how long: the command line's arguments, checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final, NamedTuple

from pvclock import ConfigError, Reference
from pvclock.meter.drift.readings import ENDS
from qemu_glue.watch.beginning import target_of
from qemu_glue.watch.target import Target

__all__ = ["DriftPlan", "plan_of"]

SETTLE_S: Final = 20.0
"""The engine's clock has found its reference's rate by then; that time is shown, and not counted."""
INTERVAL_LEAST_S: Final = 0.05
"""Readings of three clocks take some ms."""
READINGS_MAX: Final = 100_000
"""All are kept; a day has 86400 s."""


class DriftPlan(NamedTuple):
    """What `pvclock drift` is to do.

    words: its clocks.  target: which VM `qemu` is, if it is one of them.  seconds: how long, after settle_s in which
    readings do not count.  outputs: the files to write.  as_json: print lines of JSON.
    """

    words: tuple[str, ...]
    target: Target
    reference: Reference
    seconds: float
    settle_s: float
    interval_s: float
    outputs: tuple[Path, ...]
    as_json: bool

    @property
    def whole_s(self) -> float:
        """How long it takes."""
        return self.settle_s + self.seconds


def plan_of(arguments: argparse.Namespace) -> DriftPlan:
    """The plan; ConfigError for arguments that do not go together."""
    words = tuple(arguments.clocks or ("engine", "kernel"))
    settle_s = arguments.settle
    if settle_s is None:
        settle_s = SETTLE_S if "engine" in words else 0.0
    plan = DriftPlan(
        words,
        Target(arguments.qmp, arguments.pid, arguments.libvirt),
        Reference(arguments.reference),
        arguments.seconds,
        settle_s,
        arguments.interval,
        tuple(arguments.output),
        arguments.json,
    )
    _refuse(plan)
    return plan._replace(target=target_of(*plan.target))


def _refuse(plan: DriftPlan) -> None:
    words = plan.words
    if len(set(words)) != len(words):
        raise ConfigError(f"each clock once, not {' '.join(words)} (see pvclock drift --help)")
    names_vm = plan.target != Target()
    if ("qemu" in words) != names_vm:
        why = (
            "--qmp, --pid and --libvirt say which guest qemu is, which is none of the clocks"
            if names_vm
            else "which guest is qemu? Give --qmp, --pid or --libvirt"
        )
        raise ConfigError(f"{why} (see pvclock drift --help)")
    if plan.interval_s < INTERVAL_LEAST_S:
        raise ConfigError(f"--interval {plan.interval_s:g} is too short: at least {INTERVAL_LEAST_S:g} s")
    least_s = 2 * ENDS * plan.interval_s
    if plan.seconds < least_s:
        why = f"{plan.seconds:g} s are too short for {ENDS} readings at either end"
        raise ConfigError(f"{why}: at least {least_s:g} s")
    if plan.whole_s / plan.interval_s > READINGS_MAX:
        raise ConfigError(f"more than {READINGS_MAX:,} readings; take a longer --interval")
