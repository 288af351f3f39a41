"""Is the TSC's frequency that CPUID tells the one at which the guest's TSC ticks?

Source: Intel SDM, CPUID leaves 15H and 16H; https://lwn.net/Articles/301888/ for leaf 0x40000010.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Final, NamedTuple

from pvclock.machine.preflight.facts import GuestFacts
from pvclock.machine.preflight.findings import Finding, Severity
from pvclock.machine.preflight.offer import Offer
from pvclock.providers.timing import APIC_BUS_HZ, CPUID_TIMING

__all__ = ["check_frequencies"]

WRONG_PPM: Final = 250
"""KVM's own tolerance for a guest's TSC (tsc_tolerance_ppm), half of what NTP can correct."""
INEXACT_PPM: Final = 5
"""0.4 s a day, which NTP corrects without notice; a whole kHz of the slowest TSC, 1 GHz, is 1 ppm."""
NOMINAL_PPM: Final = 10_000
"""Leaf 16H has what the CPU is sold as, in whole MHz."""


class Claim(NamedTuple):
    """A frequency of the TSC that a leaf tells, and from how many ppm off it is a warning, and an error."""

    leaf: int
    hz: Fraction
    warning_ppm: int
    error_ppm: int | None


def check_frequencies(facts: GuestFacts) -> Iterator[Finding]:
    """What is wrong with them."""
    actual_hz = facts.tsc_hz(facts.vcpus[0])
    for claim in _claims(facts.offer):
        yield from _off(claim, actual_hz)
    yield from _bus(facts.offer)
    yield from _beside_a_rate(facts)
    for number, vcpu in enumerate(facts.vcpus):
        if vcpu.tsc_hz != facts.tsc_hz(vcpu):
            yield Finding(
                "tsc-frequency-not-served",
                Severity.ERROR,
                f"vCPU {number}'s TSC is set to {vcpu.tsc_hz} Hz, and this host cannot scale its own of "
                f"{facts.host.tsc_hz} Hz",
                "a TSC at the host's rate, which KVM may move forward at each entry, while its pages say another rate",
                "leave KVM_SET_TSC_KHZ alone, or take a host whose CPU scales TSCs",
                number,
                {"tsc_hz": vcpu.tsc_hz, "host_tsc_hz": facts.host.tsc_hz},
            )


def _claims(offer: Offer) -> Iterator[Claim]:
    denominator, numerator, crystal_hz, _ = offer.at(0x15)
    base_mhz = offer.at(0x16).eax & 0xFFFF
    if denominator and numerator and crystal_hz:
        yield Claim(0x15, Fraction(crystal_hz * numerator, denominator), INEXACT_PPM, WRONG_PPM)
    if base_mhz:
        yield Claim(0x16, Fraction(base_mhz * 10**6), NOMINAL_PPM, None)
    if khz := offer.timing_khz[0]:
        yield Claim(CPUID_TIMING, Fraction(khz * 1000), INEXACT_PPM, WRONG_PPM)


def _off(claim: Claim, actual_hz: Fraction) -> Iterator[Finding]:
    ppm = (claim.hz / actual_hz - 1) * 10**6
    if abs(ppm) <= claim.warning_ppm:
        return
    is_wrong = claim.error_ppm is not None and abs(ppm) > claim.error_ppm
    yield Finding(
        "frequency-leaf",
        Severity.ERROR if is_wrong else Severity.WARNING,
        f"leaf {claim.leaf:#x} says {float(claim.hz) / 1e6:.6f} MHz, and its TSC ticks at "
        f"{float(actual_hz) / 1e6:.6f} MHz: {float(ppm):+.1f} ppm",
        f"if it goes by the leaf, seconds of {float(actual_hz / claim.hz) ** -1:.6f} s",
        "have the leaf say the TSC's frequency on this host, or leave it out",
        values={"leaf": claim.leaf, "told_hz": float(claim.hz), "tsc_hz": float(actual_hz), "error_ppm": float(ppm)},
    )


def _bus(offer: Offer) -> Iterator[Finding]:
    tsc_khz, bus_khz = offer.timing_khz
    if tsc_khz and bus_khz * 1000 != APIC_BUS_HZ:
        yield Finding(
            "bus-frequency",
            Severity.WARNING,
            f"leaf {CPUID_TIMING:#x} says that the APIC bus has {bus_khz} kHz; KVM's has {APIC_BUS_HZ // 1000}",
            f"LAPIC timers, where it uses no TSC deadlines, that take {APIC_BUS_HZ / 1000 / max(bus_khz, 1):.4g} "
            "times their time or its inverse",
            "say what KVM has, or set KVM_CAP_X86_APIC_BUS_CYCLES_NS alike",
            values={"bus_khz": bus_khz},
        )


def _beside_a_rate(facts: GuestFacts) -> Iterator[Finding]:
    if facts.clock.rate != 1 and facts.offer.timing_khz[0]:
        yield Finding(
            "frequency-leaf-and-rate",
            Severity.ERROR,
            f"guest time passes at {facts.clock.rate} of the host's, and leaf {CPUID_TIMING:#x} tells the TSC's "
            "frequency by the host's seconds",
            "two frequencies for one TSC: what goes by the leaf, timers by TSC deadlines among it, is off by that rate",
            "leave the leaf out",
            values={"rate": facts.clock.rate},
        )
