"""The story of a guest's clocks: the hypervisor, what it offers, what the kernel took and why, what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from pvclock.meter.inside.advice import title
from pvclock.meter.inside.kernel import clocksource_story
from pvclock.meter.inside.promises import Promises
from pvclock.meter.inside.record import ProbeRecord
from pvclock.meter.inside.verdict import Floor
from pvclock.meter.inside.words import cpus_in_words, hz_in_words, listed

__all__ = ["story"]


def story(record: ProbeRecord, told: Promises, floors: Sequence[Floor]) -> list[str]:
    """Sentences, in the order in which somebody asks."""
    return [
        f"{_hypervisor(told)}, {_offer(told)}.",
        *_features(told),
        f"The CPU offers {_cpu(told)}.",
        *_frequencies(told),
        *clocksource_story(record.kernel, told),
        _measured(record),
        *(f"{each.what}." for each in floors),
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


def _features(told: Promises) -> list[str]:
    kvm = [f"KVM's features: {'|'.join(told.kvm_features)}."] if told.kvm_features else []
    return kvm + ([f"Hyper-V's privileges: {'|'.join(told.hyperv_features)}."] if told.hyperv_features else [])


def _cpu(told: Promises) -> str:
    constant = "a constant TSC that is not invariant" if told.constant_tsc else "no constant TSC"
    parts = [
        "an invariant TSC" if told.invariant_tsc else constant,
        "the TSC-deadline timer" if told.tsc_deadline else "no TSC-deadline timer",
        "TSC_ADJUST" if told.tsc_adjust else "no TSC_ADJUST",
    ]
    return listed(parts)


def _frequencies(told: Promises) -> list[str]:
    claims = [f"{each.source}: {hz_in_words(each.hz)}" for each in told.frequencies]
    return [f"The TSC's frequency is told by {listed(claims)}."] if claims else []


def _measured(record: ProbeRecord) -> str:
    cpus = cpus_in_words([each.cpu for each in record.cpus])
    clocks = listed([title(clock.name) for clock in record.clocks])
    hz = f"{record.tsc_hz:,} Hz, from {record.tsc_hz_from}"
    return f"Measured for {record.milliseconds / 1000:g} s on {cpus}: {clocks}; the TSC at {hz}."
