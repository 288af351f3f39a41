"""The story of a guest's clocks: the hypervisor, what it offers, what the kernel took and why, what was measured."""

from __future__ import annotations

from pvclock.meter.inside.kernel import clocksource_story
from pvclock.meter.inside.promises import Promises
from pvclock.meter.inside.record import ProbeRecord
from pvclock.meter.inside.symptoms import title
from pvclock.meter.inside.words import cpus_in_words, listed

__all__ = ["story"]


def story(record: ProbeRecord, told: Promises) -> list[str]:
    """Sentences, in the order in which somebody asks."""
    return [
        f"{_hypervisor(told)}, {_offer(told)}.",
        *clocksource_story(record.kernel, told),
        _measured(record),
    ]


# Inside


def _hypervisor(told: Promises) -> str:
    match told.hypervisor:
        case "none":
            return "No hypervisor shows itself in CPUID"
        case "unknown":
            return "A hypervisor is there, without a signature"
        case name:
            others = [each.name for each in told.hypervisors if each.name != name]
            return f"The hypervisor is {name}" + (f", beside {listed(others)}" if others else "")


def _offer(told: Promises) -> str:
    clocks = [each for each in told.clocks if each != "invariant TSC"]
    if told.hypervisor == "none":
        return "so there is no clock but the machine's"
    return f"which offers {listed(clocks)}" if clocks else "which offers no clock of its own"


def _measured(record: ProbeRecord) -> str:
    cpus = cpus_in_words([each.cpu for each in record.cpus])
    clocks = listed([title(clock.name) for clock in record.clocks])
    hz = f"{record.tsc_hz:,} Hz, from {record.tsc_hz_from}"
    return f"Measured for {record.milliseconds / 1000:g} s on {cpus}: {clocks}; the TSC at {hz}."
