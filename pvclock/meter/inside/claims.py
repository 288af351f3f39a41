"""Promises held against facts: STABLE, the invariant TSC, the frequencies told, and a paused flag that stays."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final

from pvclock.meter.inside.advice import CALIBRATION_CHANGE, STOPPED_CHANGE, STOPPED_CLEARED, Remedies, frequency_change
from pvclock.meter.inside.pages import stable_clocks
from pvclock.meter.inside.promises import FrequencyClaim, Promises
from pvclock.meter.inside.rates import Interval
from pvclock.meter.inside.record import ProbeRecord
from pvclock.meter.inside.references import Reference, off_ppb, references
from pvclock.meter.inside.symptoms import title
from pvclock.meter.inside.verdict import Finding, FindingCode, Weight
from pvclock.meter.inside.words import cpus_in_words, hz_in_words, listed, ppm_between

__all__ = ["BETWEEN_CPUS", "frequency_findings", "promise_findings", "stopped_findings"]

NTP_CORRECTS_PPB: Final = 500_000
"""What a guest's NTP can correct; a frequency that is further off makes its clock wrong for good."""
ONE_FREQUENCY_PPB: Final = 20_000
"""Within which a page and a leaf tell one frequency: each is rounded in its own way."""
KERNELS_BELIEF: Final = "monotonic_raw"
"""What Linux makes by the frequency that it was told or measured at boot, where it counts the TSC."""
BETWEEN_CPUS: Final = frozenset({FindingCode.OFFSET, FindingCode.WARP, FindingCode.DRIFT})
"""What shows that CPUs do not agree."""


def promise_findings(
    record: ProbeRecord, told: Promises, faults: Sequence[Finding], remedies: Remedies
) -> list[Finding]:
    """STABLE or invariant TSC is promised, and a fault of that clock is proven that the probe did not put in."""
    if any(record.added_ns):
        return []
    own = [each for each in faults if each.weight is Weight.FAULT and _is_between_cpus(each)]
    found = []
    if told.invariant_tsc and (proof := [each for each in own if each.clock == "tsc"]):
        found.append(
            _broken(
                "CPUID promises an invariant TSC (0x80000007 EDX bit 8), and Linux takes one to be the same on all "
                "CPUs; it is not",
                proof[0],
                remedies.for_promise(is_stable=False),
                "the invariant TSC that CPUID promises is not kept",
                "invariant-tsc",
            )
        )
    if proof := [each for each in own if each.clock in _under_stable(record, told)]:
        found.append(
            _broken(
                f"{_stable_from(told)} promises that readings of kvmclock on different CPUs are in order; they are not",
                proof[0],
                remedies.for_promise(is_stable=True),
                f"{_stable_from(told)} is not kept",
                "stable",
            )
        )
    return found


def frequency_findings(record: ProbeRecord, told: Promises) -> list[Finding]:
    """Each frequency that the guest is told, against the clock that proves best that it is another.

    Where what the guest is told agrees, and the kernel's own clock alone does not, it is the kernel that is wrong.
    """
    claims = [*told.frequencies, *_own_claim(record)]
    clocks = references(record)
    if kernel := _kernel_finding(claims, clocks):
        found, clocks = [kernel], [each for each in clocks if not _is_belief(each)]
    else:
        found = []
    return found + [finding for claim in claims if (finding := _claim_finding(claim, clocks))]


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
            f"GUEST_STOPPED stays set on the pvclock page of {whose}",
            f"GUEST_STOPPED stayed set on the pvclock page of {whose} at all of {looks:,} looks: a pause was told, "
            f"and its flag not cleared yet: {STOPPED_CLEARED}",
            "the next lockup that the guest's watchdogs find is taken for that pause, and not reported.",
            (STOPPED_CHANGE,),
            tuple(stuck),
        )
    ]


# Promises


def _is_between_cpus(fault: Finding) -> bool:
    """Not a CPU that read less than it had read before itself, which proves nothing of two."""
    return fault.code in BETWEEN_CPUS and not (fault.code is FindingCode.WARP and len(fault.cpus) == 1)


def _under_stable(record: ProbeRecord, told: Promises) -> set[str]:
    """The clocks that STABLE speaks for, with those that the kernel makes of kvmclock."""
    clocks = stable_clocks(told)
    if clocks and record.kernel and record.kernel.clocksource == "kvm-clock":
        clocks |= {"monotonic", "monotonic_raw"}
    return clocks


def _stable_from(told: Promises) -> str:
    return "STABLE in every pvclock page" if told.has_stable_pages else "KVM's feature CLOCKSOURCE_STABLE"


def _broken(promise: str, proof: Finding, change: tuple[str, ...], headline: str, name: str) -> Finding:
    return Finding(
        FindingCode.BROKEN_PROMISE,
        Weight.FAULT,
        proof.clock,
        f"{headline}: {proof.headline}",
        f"{promise}: {proof.headline}",
        f"what trusts the promise reads {title(proof.clock)} without a check of its own: {proof.software_sees}",
        change,
        proof.cpus,
        proof.budget,
        proof.low_ns,
        proof.high_ns,
        name,
    )


# Frequencies


def _claim_finding(claim: FrequencyClaim, clocks: Sequence[Reference]) -> Finding | None:
    offs = [(off_ppb(claim, each.hz), each) for each in clocks if _can_judge(each, claim)]
    if not offs:
        return None
    off, reference = max(offs, key=lambda each: (_is_far(each[0]) and not _is_belief(each[1]), _proven(each[0])))
    is_borne_out = any(not _is_far(off_ppb(claim, each.hz)) for each in clocks if each.name not in claim.source)
    is_fault = _is_far(off) and not (claim.is_nominal or _is_belief(reference) or is_borne_out)
    # A page is made by the host's own calibration, which another of its clocks may well miss by some ppm.
    if _proven(off) <= (0 if "CPUID" in claim.source else NTP_CORRECTS_PPB):
        return None
    return _frequency_told(claim, off, reference, is_fault=is_fault)


def _can_judge(reference: Reference, claim: FrequencyClaim) -> bool:
    """A page's scale is what Linux makes its clocks by, so only a clock with its own oscillator can tell it wrong."""
    if "pvclock" in claim.source:
        return reference.is_independent
    return reference.name not in claim.source


def _is_belief(reference: Reference) -> bool:
    """Is that clock no more than what the kernel believes of the TSC?"""
    return reference.name == KERNELS_BELIEF and not reference.is_independent


def _kernel_finding(claims: Sequence[FrequencyClaim], clocks: Sequence[Reference]) -> Finding | None:
    """The kernel's clock disagrees with a page and a leaf that agree, and no other clock takes its side."""
    told = [each for each in claims if not each.is_nominal]
    belief = next((each for each in clocks if _is_belief(each)), None)
    others = [each for each in clocks if not _is_belief(each)]
    if belief is None or not _has_page_and_leaf(told) or not _is_one_frequency(told):
        return None
    if any(_is_far(off_ppb(claim, other.hz)) for claim in told for other in others):
        return None
    off, claim = min(((off_ppb(each, belief.hz), each) for each in told), key=lambda each: _proven(each[0]))
    return _miscalibrated(told, claim, off, belief) if _proven(off) > 0 else None


def _has_page_and_leaf(told: Sequence[FrequencyClaim]) -> bool:
    return any("CPUID" in each.source for each in told) and any("pvclock" in each.source for each in told)


def _is_one_frequency(told: Sequence[FrequencyClaim]) -> bool:
    low, high = min(each.hz - each.grain_hz for each in told), max(each.hz + each.grain_hz for each in told)
    return (high - low) * 10**9 <= low * ONE_FREQUENCY_PPB


def _miscalibrated(told: Sequence[FrequencyClaim], claim: FrequencyClaim, off: Interval, belief: Reference) -> Finding:
    is_fault = _is_far(off)
    sources = listed([each.source for each in told])
    turned = Interval(-off.high, -off.low)
    headline = f"the kernel's own calibration of the TSC is off by {ppm_between(*turned)}"
    has = f"{hz_in_words(belief.hz.low)} to {hz_in_words(belief.hz.high, up=True)}"
    corrects = "more than NTP can correct (500 ppm)" if is_fault else "which NTP corrects"
    return Finding(
        FindingCode.FREQUENCY,
        Weight.FAULT if is_fault else Weight.NOTE,
        belief.name,
        headline,
        f"{headline}: by {belief.words} the TSC has {has}; {sources} agree on {hz_in_words(claim.hz)}",
        f"the kernel's clocks run wrong by so much, {corrects}.",
        (CALIBRATION_CHANGE,) if is_fault else (),
    )


def _own_claim(record: ProbeRecord) -> list[FrequencyClaim]:
    """What Hyper-V told the probe: its MSR is in Hz, KVM fills it in whole kHz."""
    if record.tsc_hz_from != "hyperv":
        return []
    return [FrequencyClaim("Hyper-V's HV_X64_MSR_TSC_FREQUENCY", Fraction(record.tsc_hz), Fraction(1000))]


def _proven(off: Interval) -> Fraction:
    """How far off it is at least; negative where it may be right."""
    return max(off.low, -off.high)


def _is_far(off: Interval) -> bool:
    """Proven to be further off than NTP can correct."""
    return _proven(off) > NTP_CORRECTS_PPB


def _frequency_told(claim: FrequencyClaim, off: Interval, reference: Reference, *, is_fault: bool) -> Finding:
    grain = f", in steps of {hz_in_words(claim.grain_hz)}" if claim.grain_hz >= 1 else ""
    has = f"{hz_in_words(reference.hz.low)} to {hz_in_words(reference.hz.high, up=True)}"
    what = (
        f"{claim.source} says that the TSC has {hz_in_words(claim.hz)}{grain}; by {reference.words} it has {has}: "
        f"it is off by {ppm_between(*off)}"
    )
    headline = f"{claim.source} says that the TSC has {hz_in_words(claim.hz)}, which is off by {ppm_between(*off)}"
    if _is_belief(reference):
        what += "; that clock goes by what the kernel was told or measured when it booted, and one of the two is wrong"
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
        headline,
        what,
        sees,
        frequency_change(claim.source) if is_fault else (),
    )
