"""Judges the facts of a VM before its guest runs: what the guest would see, and what to do."""

from __future__ import annotations

from typing import Final

from pvclock.arguments import instance
from pvclock.errors import RangeError, StateError
from pvclock.machine.machine import Machine
from pvclock.machine.preflight.clocksource import check_clocksource
from pvclock.machine.preflight.collect import guest_facts
from pvclock.machine.preflight.cpuid_checks import check_cpuid
from pvclock.machine.preflight.facts import GuestFacts
from pvclock.machine.preflight.findings import Finding, Severity
from pvclock.machine.preflight.frequency_checks import check_frequencies
from pvclock.machine.preflight.order import check_order
from pvclock.machine.preflight.stability_checks import check_stability
from pvclock.machine.preflight.tsc_checks import check_tscs
from pvclock.machine.run_state import RunState

__all__ = ["judge", "preflight"]

CHECKS: Final = (check_cpuid, check_frequencies, check_tscs, check_stability, check_order, check_clocksource)


def preflight(machine: Machine) -> list[Finding]:
    """What is to be said of a machine that was made and not started yet; nothing of it changes.  Takes some ms.

    StateError in any other run state: what a guest has seen and set up cannot be taken back.
    """
    instance("machine", machine, Machine)
    if machine.run_state.current is not RunState.PRELAUNCH:
        raise StateError("preflight", f"the machine is {machine.run_state.current}", "call it before start()")
    return judge(guest_facts(machine.vcpus, machine.clock))


def judge(facts: GuestFacts) -> list[Finding]:
    """What is to be said of a VM with these facts, errors first; RangeError if it has no vCPU."""
    if not instance("facts", facts, GuestFacts).vcpus:
        raise RangeError("the facts are of 0 vCPUs; give at least one's")
    found = [finding for check in CHECKS for finding in check(facts)]
    return sorted(found, key=lambda finding: list(Severity).index(finding.severity))
