"""Which clock will a guest take, and why?  What it offers itself is in CPUID; how it rates that is in its kernel.

Source: Linux arch/x86/kernel/kvmclock.c, tsc.c, drivers/clocksource/hyperv_timer.c and arch/x86/kernel/cpu/mshyperv.c,
6.1 to 7.0; "x86: Try to wrangle PV clocks vs. TSC", 51 patches, version 5 of July 2026, which Linux may take or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from pvclock.machine.preflight.facts import GuestFacts
from pvclock.machine.preflight.findings import Finding, Severity
from pvclock.machine.preflight.offer import Offer
from pvclock.tsc.agreement import agreement

__all__ = ["LINUX", "LINUX_TSC_FIRST", "WINDOWS", "Choice", "check_clocksource", "choices"]

LINUX: Final = "Linux"
LINUX_TSC_FIRST: Final = "Linux with the TSC-first series of July 2026"
WINDOWS: Final = "Windows"

KVM_CLOCK: Final = "kvm-clock"
TSC: Final = "tsc"
REFERENCE_PAGE: Final = "hyperv_clocksource_tsc_page"
REFERENCE_COUNTER: Final = "hyperv_clocksource_msr"
NO_CLOCK: Final = "refined-jiffies"
"""As Linux names them."""

KVM_CLOCK_RATING: Final = 400
KVM_CLOCK_BEHIND_TSC_RATING: Final = 299
REFERENCE_RATING: Final = 500
REFERENCE_BEHIND_TSC_RATING: Final = 250
TSC_RATING: Final = 300


class Choice(NamedTuple):
    """The clock that `guest` takes for its time, by Linux's names, the one of its scheduler, and why."""

    guest: str
    clocksource: str
    sched_clock: str
    why: str


class Candidate(NamedTuple):
    """A clock that a Linux finds, how it rates it, and why."""

    clocksource: str
    rating: int
    why: str


def choices(facts: GuestFacts) -> list[Choice]:
    """What each kind of guest that may run in this VM takes."""
    chosen = [_linux(facts), _linux_tsc_first(facts)]
    if facts.offer.has_reference_page:
        chosen.append(Choice(WINDOWS, REFERENCE_PAGE, REFERENCE_PAGE, "it reads Hyper-V's reference TSC page"))
    return chosen


def check_clocksource(facts: GuestFacts) -> Iterator[Finding]:
    """Which one, and what follows where that is no clock of the VMM's."""
    chosen = choices(facts)
    yield Finding(
        "clocksource",
        Severity.NOTE,
        "the clock that it takes: " + "; ".join(f"{clock} for {guests}" for clock, guests in _by_clocksource(chosen)),
        "; ".join(dict.fromkeys(each.why for each in chosen)),
        values={"choices": [each._asdict() for each in chosen]},
    )
    linux = chosen[0]
    if linux.clocksource == NO_CLOCK:
        yield Finding(
            "no-clocksource",
            Severity.WARNING,
            "no clock is offered that a Linux can use",
            "time in ticks of a timer, if it finds the frequency of one; else it hangs at boot",
            "offer KVM's clock or Hyper-V's; or an invariant TSC with its frequency",
        )
    leaving = [each for each in chosen if TSC in (each.clocksource, each.sched_clock)]
    if leaving:
        yield _leaves_the_clock(facts, leaving)


def _by_clocksource(chosen: list[Choice]) -> Iterator[tuple[str, str]]:
    for clocksource in dict.fromkeys(each.clocksource for each in chosen):
        yield clocksource, ", ".join(each.guest for each in chosen if each.clocksource == clocksource)


def _leaves_the_clock(facts: GuestFacts, leaving: list[Choice]) -> Finding:
    rate = "" if facts.clock.rate == 1 else f"; its time does not pass at {facts.clock.rate}"
    return Finding(
        "guest-takes-tsc",
        Severity.WARNING,
        f"{' and '.join(each.guest for each in leaving)} will take the TSC, out of reach of every clock policy",
        f"no pause policy, no rate, no slew and no reference: its time goes on while it is paused{rate}",
        "offer no invariant TSC, if these are wanted (offer_invariant_tsc=False)",
        values={"guests": [each.guest for each in leaving]},
    )


# Linux


def _linux(facts: GuestFacts) -> Choice:
    best = max(_candidates(facts), key=lambda each: each.rating)
    sched_clock = KVM_CLOCK if facts.offer.has_kvmclock else best.clocksource
    return Choice(LINUX, best.clocksource, sched_clock, best.why)


def _linux_tsc_first(facts: GuestFacts) -> Choice:
    """With a constant and nonstop TSC it takes that for all, unwatched, and a missing TSC_STABLE does not matter."""
    offer = facts.offer
    if offer.has_invariant_tsc and (_learns_tsc_frequency(facts) or (offer.is_kvm and offer.timing_khz[0])):
        return Choice(LINUX_TSC_FIRST, TSC, TSC, "an invariant TSC needs no other clock, and no watchdog")
    return _linux(facts)._replace(guest=LINUX_TSC_FIRST)


def _candidates(facts: GuestFacts) -> Iterator[Candidate]:
    offer = facts.offer
    if offer.has_kvmclock:
        yield _kvm_clock(offer)
    elif not offer.is_kvm:
        yield from _hyperv_clocks(offer)
    if (obstacle := _obstacle_to_tsc(facts)) is None:
        yield Candidate(TSC, TSC_RATING, "its TSC is rated higher than any other clock that it finds")
        return
    yield Candidate(NO_CLOCK, 0, f"there is no other clock, and its TSC is none: {obstacle}")


def _kvm_clock(offer: Offer) -> Candidate:
    if offer.has_invariant_tsc:
        return Candidate(KVM_CLOCK, KVM_CLOCK_BEHIND_TSC_RATING, "its TSC is invariant, and it finds it apart")
    return Candidate(KVM_CLOCK, KVM_CLOCK_RATING, "KVM's clock is rated higher than a TSC that is not invariant")


def _hyperv_clocks(offer: Offer) -> Iterator[Candidate]:
    rating = REFERENCE_BEHIND_TSC_RATING if offer.has_tsc_invariant_control else REFERENCE_RATING
    if offer.has_reference_page:
        yield Candidate(REFERENCE_PAGE, rating, "Hyper-V's reference TSC page is rated higher than its TSC")
    if offer.has_reference_counter:
        yield Candidate(REFERENCE_COUNTER, rating - 1, "Hyper-V's counter is rated higher than its TSC")


def _obstacle_to_tsc(facts: GuestFacts) -> str | None:
    """Why its TSC is no clock of a Linux that watches it; None if it is one."""
    offer, has_several = facts.offer, len(facts.vcpus) > 1
    if not _learns_tsc_frequency(facts):
        return "nothing tells its frequency"
    if not offer.is_kvm and offer.privileges and not offer.has_tsc_invariant_control:
        return "on Hyper-V it needs the TSC-invariant control"
    if has_several and not (offer.has_invariant_tsc or offer.is_intel):
        return "TSCs of several CPUs that are not invariant are taken to be apart"
    if has_several and not offer.has_tsc_adjust and not agreement(facts.tscs).offsets_agree:
        return "its own test finds the TSCs apart"
    return None


def _learns_tsc_frequency(facts: GuestFacts) -> bool:
    return facts.offer.has_kvmclock or facts.offer.tells_frequency or facts.has_calibration_timer
