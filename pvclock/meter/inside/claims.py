"""Promises held against facts: STABLE, the invariant TSC, the frequencies told, and a paused flag that stays."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final, NamedTuple

from pvclock.meter.inside.advice import STOPPED_CHANGE, frequency_change, promise_change, title
from pvclock.meter.inside.promises import FrequencyClaim, Promises, page_hz
from pvclock.meter.inside.rates import Interval, tsc_hz_by
from pvclock.meter.inside.record import ClockRecord, ProbeRecord
from pvclock.meter.inside.verdict import Finding, FindingCode, Weight
from pvclock.meter.inside.words import cpus_in_words, hz_in_words, ppm_between

__all__ = ["frequency_findings", "promise_findings", "stopped_findings"]

REFERENCES: Final = ("acpi_pm", "pit", "hyperv", "monotonic_raw", "pvclock")
"""Clocks that tell the TSC's frequency, none of which the guest's NTP changes."""
NTP_CORRECTS_PPB: Final = 500_000
"""What a guest's NTP can correct; a frequency that is further off makes its clock wrong for good."""
BETWEEN_CPUS: Final = {FindingCode.OFFSET, FindingCode.WARP, FindingCode.DRIFT, FindingCode.STEP_BACK}


def promise_findings(record: ProbeRecord, told: Promises, faults: Sequence[Finding]) -> list[Finding]:
    """STABLE or invariant TSC is promised, and a fault of that clock is proven that the probe did not put in."""
    if any(record.added_ns):
        return []
    own = [each for each in faults if each.code in BETWEEN_CPUS and each.weight is Weight.FAULT]
    found = []
    if told.invariant_tsc and (proof := [each for each in own if each.clock == "tsc"]):
        found.append(
            _broken(
                "CPUID promises an invariant TSC (0x80000007 EDX bit 8), and Linux takes one to be the same on all "
                "CPUs; it is not",
                proof[0],
                promise_change(told.hypervisor, is_stable=False),
            )
        )
    if proof := [each for each in own if each.clock in _under_stable(record, told)]:
        found.append(
            _broken(
                f"{_stable_from(told)} promises that readings of kvmclock on different CPUs are in order; they are not",
                proof[0],
                promise_change(told.hypervisor, is_stable=True),
            )
        )
    return found


def frequency_findings(record: ProbeRecord, told: Promises) -> list[Finding]:
    """Each frequency that the guest is told, against the clock that proves best that it is another."""
    references = _references(record)
    found = []
    for claim in (*told.frequencies, *_own_claim(record)):
        offs = [(_off_ppb(claim, each.hz), each) for each in references if each.name not in claim.source]
        if not offs:
            continue
        off, reference = max(offs, key=lambda each: _proven(each[0]))
        is_fault = not claim.is_nominal and _proven(off) > NTP_CORRECTS_PPB
        # A page is made by the host's own calibration, which another of its clocks may well miss by some ppm.
        if _proven(off) > (0 if "CPUID" in claim.source else NTP_CORRECTS_PPB):
            found.append(_frequency_told(claim, off, reference, is_fault=is_fault))
    return found


def stopped_findings(record: ProbeRecord) -> list[Finding]:
    """GUEST_STOPPED was set whenever it was looked at."""
    stuck = [page.cpu for page in record.pages if page.looks > 1 and page.stopped_looks == page.looks]
    if not stuck:
        return []
    looks = min(page.looks for page in record.pages if page.cpu in stuck)
    whose = cpus_in_words(stuck)
    return [
        Finding(
            FindingCode.STOPPED_FLAG,
            Weight.NOTE,
            "pvclock",
            f"GUEST_STOPPED stayed set on the pvclock page of {whose} at all of {looks:,} looks: a pause was told, "
            "and its flag never cleared",
            "the next lockup that the guest's watchdogs find is taken for that pause, and not reported.",
            (STOPPED_CHANGE,),
            tuple(stuck),
        )
    ]


# Promises


def _under_stable(record: ProbeRecord, told: Promises) -> set[str]:
    """The clocks that STABLE speaks for: with the flag in every page a vDSO reads one page with any CPU's TSC."""
    if told.has_stable_pages is False or not (told.has_stable_pages or told.kvm_stable):
        return set()
    clocks = {"pvclock"}
    if told.has_stable_pages:
        clocks.add("tsc")
    if record.kernel and record.kernel.clocksource == "kvm-clock":
        clocks |= {"monotonic", "monotonic_raw"}
    return clocks


def _stable_from(told: Promises) -> str:
    return "STABLE in every pvclock page" if told.has_stable_pages else "KVM's feature CLOCKSOURCE_STABLE"


def _broken(promise: str, proof: Finding, change: tuple[str, ...]) -> Finding:
    return Finding(
        FindingCode.BROKEN_PROMISE,
        Weight.FAULT,
        proof.clock,
        f"{promise}: {proof.what.partition(';')[0]}",
        f"what trusts the promise reads {title(proof.clock)} without a check of its own: {proof.software_sees}",
        change,
        proof.cpus,
        proof.budget,
        proof.low_ns,
        proof.high_ns,
    )


# Frequencies


class _Reference(NamedTuple):
    name: str
    words: str
    hz: Interval


def _references(record: ProbeRecord) -> list[_Reference]:
    """What the TSC's frequency is by the clocks measured, and by the pvclock pages."""
    found = [
        _Reference(clock.name, f"{title(clock.name)} over this run", hz)
        for clock in record.clocks
        if clock.name in REFERENCES and not _has_stepped(clock) and (hz := tsc_hz_by(clock))
    ]
    for page in record.pages[:1]:
        if page.mul:
            scaled = page_hz(page)
            words = f"the pvclock page of CPU {page.cpu} (mul {page.mul}, shift {page.shift})"
            grain = scaled / page.mul
            found.append(_Reference("pvclock", words, Interval(scaled - grain, scaled + grain)))
    return found


def _has_stepped(clock: ClockRecord) -> bool:
    return clock.steps.forward is not None or clock.steps.backward is not None


def _own_claim(record: ProbeRecord) -> list[FrequencyClaim]:
    """What Hyper-V told the probe: its MSR is in Hz, KVM fills it in whole kHz."""
    if record.tsc_hz_from != "hyperv":
        return []
    return [FrequencyClaim("Hyper-V's HV_X64_MSR_TSC_FREQUENCY", Fraction(record.tsc_hz), Fraction(1000))]


def _off_ppb(claim: FrequencyClaim, hz: Interval) -> Interval:
    """By how much the claim is above the TSC's frequency: claim over measured, minus 1."""
    low, high = claim.hz - claim.grain_hz, claim.hz + claim.grain_hz
    return Interval((low / hz.high - 1) * 10**9, (high / hz.low - 1) * 10**9)


def _proven(off: Interval) -> Fraction:
    """How far off it is at least; negative where it may be right."""
    return max(off.low, -off.high)


def _frequency_told(claim: FrequencyClaim, off: Interval, reference: _Reference, *, is_fault: bool) -> Finding:
    grain = f", in steps of {hz_in_words(claim.grain_hz)}" if claim.grain_hz >= 1 else ""
    has = f"{hz_in_words(reference.hz.low)} to {hz_in_words(reference.hz.high, up=True)}"
    what = (
        f"{claim.source} says that the TSC has {hz_in_words(claim.hz)}{grain}; by {reference.words} it has {has}: "
        f"it is off by {ppm_between(*off)}"
    )
    if claim.is_nominal:
        what += "; this leaf tells what the CPU is sold as, by its definition, and not its TSC's frequency"
    sees = (
        "a clock made of the TSC by that frequency is off by so much, more than NTP can correct (500 ppm)."
        if is_fault
        else "a clock made of the TSC by that frequency is off by so much, which NTP corrects."
    )
    return Finding(
        FindingCode.FREQUENCY,
        Weight.FAULT if is_fault else Weight.NOTE,
        "tsc",
        what,
        sees,
        frequency_change(claim.source) if is_fault else (),
    )
