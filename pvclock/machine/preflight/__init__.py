"""The pre-flight: what a guest would see of time in a VM that does not run yet, and what to do about it."""

from pvclock.machine.preflight.clocksource import Choice, choices
from pvclock.machine.preflight.collect import guest_facts
from pvclock.machine.preflight.facts import ClockFacts, GuestFacts, HostFacts, VcpuFacts
from pvclock.machine.preflight.findings import Finding, Severity
from pvclock.machine.preflight.judge import judge, preflight
from pvclock.machine.preflight.offer import Offer, read_offer
from pvclock.machine.preflight.order import ORDER_RULES, OrderRule
from pvclock.machine.preflight.tsc_checks import repair_writes

__all__ = [
    "ORDER_RULES",
    "Choice",
    "ClockFacts",
    "Finding",
    "GuestFacts",
    "HostFacts",
    "Offer",
    "OrderRule",
    "Severity",
    "VcpuFacts",
    "choices",
    "guest_facts",
    "judge",
    "preflight",
    "read_offer",
    "repair_writes",
]
