"""What a watch found, in sentences for people: one a finding, and one for vCPUs that had the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Final

from pvclock.meter.watch.changes import Disagreement, FlagsChange, PageLost, Stall, Step, TscBasis
from pvclock.meter.watch.host_troubles import HostTrouble
from pvclock.meter.watch.loop import Finding, VmEnded
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.vm import VmEvent
from pvclock.meter.watch.words import bounded_ns, counted, duration, exact_ns, flags_in_words
from pvclock.quantities import Gpa

__all__ = [
    "addresses_in_words",
    "cause",
    "disagreement_in_words",
    "pages_in_words",
    "sentences",
    "step_in_words",
    "vcpus_in_words",
]

PAGES_SHOWN: Final = 4


def sentences(findings: Sequence[Finding]) -> Iterator[tuple[Finding, str]]:
    """The findings of one look: the first of those that are alike, and the sentence for them all."""
    for _, group in groupby(findings, _all_but_vcpu):
        alike = list(group)
        yield alike[0], _sentence(alike)


def vcpus_in_words(vcpus: Iterable[int]) -> str:
    """Such as "vCPU 0" or "vCPUs 0-3, 7"; in ascending order."""
    numbers = list(vcpus)
    begins = [numbers[0], *(after for before, after in pairwise(numbers) if after != before + 1)]
    ends = [*(before for before, after in pairwise(numbers) if after != before + 1), numbers[-1]]
    runs = [f"{begin}-{end}" if end > begin else f"{begin}" for begin, end in zip(begins, ends, strict=True)]
    return f"vCPU{'s' * (len(numbers) > 1)} {', '.join(runs)}"


def cause(events: Sequence[VmEvent]) -> str:
    """What the VMM did, such as "STOP, RESUME 1.035 s later"; empty if it told nothing."""
    told = [event.kind.upper() for event in events[:1]]
    told += [
        f"{after.kind.upper()} {duration(after.utc_ns - before.utc_ns)} later" for before, after in pairwise(events)
    ]
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
    numbers = [_against_tsc(step)]
    if step.seen_ns is not None:
        numbers.append(f"{bounded_ns(step.seen_ns, step.seen_bound_ns or 0)} from STOP to RESUME")
    several = [f"{step.lines} lines followed each other"] * (step.lines > 1)
    return "; ".join([", ".join(numbers), *several, *_causes(step.events)])


def _against_tsc(step: Step) -> str:
    if step.lines == 0 and step.step_ns is None:
        return "has its line still, but its TSC was written: perhaps the guest was reset, and reads others"
    if step.lines == 0:
        return f"has its line still, but its TSC was written: that is {exact_ns(step.step_ns or 0)}"
    if step.step_ns is None:
        return "got a new line: by how much it stepped is unknown, for the guest's TSC was changed, or may have been"
    if step.step_ns == 0:
        return "has its line written anew, without a step"
    said = f"stepped by {exact_ns(step.step_ns, step.bound_ns or 1)} against the TSC"
    return said if step.basis is TscBasis.OFFSETS else f"{said} (if its TSC was not changed)"


def disagreement_in_words(found: Disagreement) -> str:
    """Which page was ahead, by how much, for how long, and what that was for a reader."""
    ahead = exact_ns(found.by_ns, found.bound_ns).removeprefix("+")
    how_long = f"for at least {duration(found.least_ns)}" if found.least_ns else "at one look"
    reader = "a clock that was read by it went back by as much"
    if found.is_stale:
        reader = f"vCPU {found.behind or found.ahead} does not run, so its page is stale, and nobody reads it"
    said = f"vCPU {found.ahead}'s page gave up to {ahead} more than vCPU {found.behind}'s, {how_long}: {reader}"
    return "; ".join([said, *_causes(found.events)])


def _causes(events: Sequence[VmEvent]) -> list[str]:
    return [cause(events)] if events else []
