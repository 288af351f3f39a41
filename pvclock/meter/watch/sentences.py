"""What a watch found, in sentences for people: one a finding, and one for vCPUs that had the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final

from pvclock.meter.watch.changes import Disagreement, FlagsChange, PageLost, Stall, Step, TscBasis
from pvclock.meter.watch.host_troubles import HostTrouble
from pvclock.meter.watch.loop import Finding, VmEnded
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.vm import VmEvent
from pvclock.meter.watch.words import bounded_ns, counted, duration, exact_ns, flags_in_words, vcpus_in_words
from pvclock.quantities import Gpa

__all__ = [
    "addresses_in_words",
    "cause",
    "disagreement_in_words",
    "pages_in_words",
    "sentences",
    "step_in_words",
    "told_disagreement_in_words",
    "told_step_in_words",
]

PAGES_SHOWN: Final = 4


def sentences(findings: Sequence[Finding]) -> Iterator[tuple[Finding, str]]:
    """The findings of one look: the first of those that are alike, and the sentence for them all."""
    for _, group in groupby(findings, _all_but_vcpu):
        alike = list(group)
        yield alike[0], _sentence(alike)


def cause(events: Iterable[tuple[str, int | None]]) -> str:
    """What the VMM did, by VmEvents, such as "STOP, RESUME 1.035 s later"; empty if it told nothing.

    Also by what a file tells of them: a kind, and its UTC in ns, or None.
    """
    told: list[str] = []
    before_ns: int | None = None
    for kind, utc_ns in events:
        later = "" if utc_ns is None or before_ns is None else f" {duration(utc_ns - before_ns)} later"
        told.append(f"{kind.upper()}{later}")
        before_ns = utc_ns
    return ", ".join(told)


def pages_in_words(found: PagesFound) -> str:
    """Where the pages are, and how they were found."""
    if found.searched_bytes:
        return f"found in {found.searched_bytes >> 20} MiB of its memory in {found.seconds:.2f} s: {found.why}"
    return f"{addresses_in_words(found.pages)}, {found.why}"


def addresses_in_words(pages: Sequence[Gpa | None]) -> str:
    """Such as "2 pages at 0x201000, 0x201040"; of many, the first and the last."""
    places = [gpa for gpa in pages if gpa is not None]
    shown = list(map(hex, places))
    if len(shown) > PAGES_SHOWN:
        shown[2:-1] = ["..."]
    return f"{counted(len(places), 'page')} at {', '.join(shown)}"


def _all_but_vcpu(finding: Finding) -> object:
    return finding._replace(vcpu=0) if isinstance(finding, Step | FlagsChange | PageLost) else finding


def _sentence(alike: Sequence[Finding]) -> str:
    match alike[0]:
        case Step() as step:
            said = f"{_of(alike)} {step_in_words(step)}"
        case FlagsChange(before=before, after=after):
            said = f"{_of(alike)}: flags {flags_in_words(before)} -> {flags_in_words(after)}"
        case PageLost(why=why):
            said = f"{_of(alike)}: the page is gone: {why}"
        case Disagreement() as found:
            said = disagreement_in_words(found)
        case Stall(gap_ns=gap_ns):
            said = f"no look for {duration(gap_ns)}: what came and went meanwhile was not seen"
        case PagesFound() as found:
            said = pages_in_words(found)
        case VmEvent(kind=kind):
            said = f"the VMM says {kind.upper()}"
        case HostTrouble(why=why):
            said = f"the host: {why}"
        case VmEnded():
            said = "the VM has ended"
    return said


def _of(alike: Sequence[Finding]) -> str:
    return vcpus_in_words(finding.vcpu for finding in alike if isinstance(finding, Step | FlagsChange | PageLost))


def step_in_words(step: Step) -> str:
    """What follows the vCPU's name."""
    return told_step_in_words(
        lines=step.lines,
        basis=step.basis,
        step_ns=step.step_ns,
        bound_ns=step.bound_ns,
        seen_ns=step.seen_ns,
        seen_bound_ns=step.seen_bound_ns,
        cause=cause(step.events),
    )


def told_step_in_words(
    *,
    lines: int,
    basis: str,
    step_ns: int | None,
    bound_ns: int | None,
    seen_ns: int | None,
    seen_bound_ns: int | None,
    cause: str,
) -> str:
    """The same of a step of which only its numbers are known, as its line of JSON tells them."""
    numbers = [_against_tsc(lines, basis, step_ns, bound_ns)]
    if seen_ns is not None:
        numbers.append(f"{bounded_ns(seen_ns, seen_bound_ns or 0)} from STOP to RESUME")
    several = [f"{lines} lines followed each other"] * (lines > 1)
    return "; ".join([", ".join(numbers), *several, *[cause] * bool(cause)])


def _against_tsc(lines: int, basis: str, step_ns: int | None, bound_ns: int | None) -> str:
    if lines == 0 and step_ns is None:
        return "has its line still, but its TSC was written: perhaps the guest was reset, and reads others"
    if lines == 0:
        return f"has its line still, but its TSC was written: that is {exact_ns(step_ns or 0)}"
    if step_ns is None:
        return "got a new line: by how much it stepped is unknown, for the guest's TSC was changed, or may have been"
    if step_ns == 0:
        return "has its line written anew, without a step"
    said = f"stepped by {exact_ns(step_ns, bound_ns or 1)} against the TSC"
    return said if basis == TscBasis.OFFSETS else f"{said} (if its TSC was not changed)"


def disagreement_in_words(found: Disagreement) -> str:
    """Which page was ahead, by how much, for how long, and what that was for a reader."""
    return told_disagreement_in_words(
        ahead=found.ahead,
        behind=found.behind,
        by_ns=found.by_ns,
        bound_ns=found.bound_ns,
        least_ns=found.least_ns,
        is_stale=found.is_stale,
        cause=cause(found.events),
    )


def told_disagreement_in_words(
    *, ahead: int, behind: int, by_ns: int, bound_ns: int, least_ns: int, is_stale: bool, cause: str
) -> str:
    """The same of one of which only its numbers are known, as its line of JSON tells them."""
    by = exact_ns(by_ns, bound_ns).removeprefix("+")
    how_long = f"for at least {duration(least_ns)}" if least_ns else "at one look"
    reader = "a clock that was read by it went back by as much"
    if is_stale:
        reader = f"vCPU {behind or ahead} does not run, so its page is stale, and nobody reads it"
    said = f"vCPU {ahead}'s page gave up to {by} more than vCPU {behind}'s, {how_long}: {reader}"
    return "; ".join([said, *[cause] * bool(cause)])
