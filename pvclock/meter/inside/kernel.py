"""What a Linux guest says itself: its complaints, explained, and which clock source it took, and why.

A kernel's label is no proof: what it says of the TSC stands beside what was measured, as a note.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from pvclock.meter.inside.promises import Promises
from pvclock.meter.inside.record import KernelRecord
from pvclock.meter.inside.verdict import Finding, FindingCode, Weight

__all__ = ["clocksource_findings", "clocksource_story", "complaint_findings"]

QUOTED_MAX: Final = 200
OTHERS_TOLD_MAX: Final = 8

SLOW: Final = {"hpet", "acpi_pm", "refined-jiffies", "jiffies", "pit"}
READS: Final = {
    "hpet": "each reading of time leaves the guest (a VM exit, 1 to 20 us)",
    "acpi_pm": "each reading of time leaves the guest (a VM exit, 1 to 20 us)",
    "pit": "each reading of time leaves the guest several times",
    "refined-jiffies": "time goes on in ticks of 1 to 10 ms, and stands still between them",
    "jiffies": "time goes on in ticks of 1 to 10 ms, and stands still between them",
}
FASTER_BY_QEMU: Final = (
    "QEMU: -cpu host,kvmclock=on, and where the host's TSC is sound, invtsc=on (with migratable=off or a fixed "
    "tsc-frequency=HZ)"
)
FASTER_BY_LIBVIRT: Final = (
    "libvirt: <timer name='kvmclock' present='yes'/>, and where the host's TSC is sound, <feature policy='require' "
    "name='invtsc'/> (with <timer name='tsc' frequency='HZ'/>)"
)
PARAMETERS: Final = re.compile(r"(?:clocksource|tsc)=\S+|notsc|no-kvmclock(?:-vsyscall)?|hv_nopvtsc\S*|no_timer_check")


class Complaint(NamedTuple):
    """Lines that match, and what they mean.  is_of_tsc: the kernel's label for the TSC, which may be wrong."""

    pattern: re.Pattern[str]
    meaning: str
    sees: str
    is_of_tsc: bool = False


COMPLAINTS: Final = (
    Complaint(
        re.compile(r"TSC ADJUST"),
        "IA32_TSC_ADJUST differs between CPUs: firmware or a VMM wrote a CPU's TSC, and the kernel wrote it again",
        "until that line TSCs were apart; a kernel without this repair still sees it.",
        is_of_tsc=True,
    ),
    Complaint(
        re.compile(r"TSC warp between CPUs|TSC warped randomly|cycles TSC warp|due to check_tsc_sync_source failed"),
        "the kernel's own test at boot read a TSC that went back between two CPUs, and turned the TSC off as a clock",
        "a slower clock source is taken.",
        is_of_tsc=True,
    ),
    Complaint(
        re.compile(r"due to TSCs unsynchronized"),
        "the kernel did not measure that: without a constant TSC it takes several CPUs' TSCs to be apart",
        "the TSC is no clock source here, whatever it does.",
        is_of_tsc=True,
    ),
    Complaint(
        re.compile(r"TSC unstable due to boot parameter"),
        "its command line says so (tsc=unstable)",
        "the TSC is no clock source here, whatever it does.",
        is_of_tsc=True,
    ),
    Complaint(
        re.compile(r"read-back delay|Long readout interval"),
        "reading two clocks after each other took too long for the watchdog to judge: this vCPU was held up",
        "none by itself; timing in this guest is disturbed by its host.",
    ),
    Complaint(
        re.compile(
            r"clocksource '?tsc(?:-early)?'? as unstable because|'tsc(?:-early)?' cs_nsec:"
            r"|Clocksource '?tsc(?:-early)?'? skewed"
        ),
        "the clock source watchdog compared the TSC with another clock over half a second, and they went apart by more "
        "than 62.5 us or so: the TSC or that clock was wrong, or this vCPU was held up between the two readings",
        "a slower clock source is taken, from one moment to the next.",
        is_of_tsc=True,
    ),
    Complaint(
        re.compile(r"as unstable because the skew is too large|cs_nsec:|Clocksource .* skewed"),
        "the clock source watchdog compared that clock source, which is not the TSC, with another one over half a "
        "second, and they went apart: one of the two was wrong, or this vCPU was held up between the two readings",
        "another clock source is taken, if that one was in use.",
    ),
    Complaint(
        re.compile(r"wd_nsec:"),
        "numbers of the clock source watchdog's own clock, which it held another one against",
        "nothing of this line alone.",
    ),
    Complaint(
        re.compile(r"[Mm]arking (?:TSC|clocksource '?tsc'?) (?:as )?unstable|TSC .*unstable"),
        "the kernel marked the TSC as unstable, for the reason that the line gives",
        "a slower clock source is taken.",
        is_of_tsc=True,
    ),
    Complaint(
        re.compile(r"hrtimer: interrupt took"),
        "a timer interrupt took that long: this vCPU was held up in it, most often by its host",
        "timers are late by so much; the kernel makes its timers coarser once after that line.",
    ),
    Complaint(
        re.compile(r"soft lockup|hard LOCKUP|detected (?:expedited )?stalls?"),
        "a CPU did nothing else for long: its host held it up, or time stepped forward and the watchdog believed it",
        "a false alarm where time has stepped.",
    ),
    Complaint(
        re.compile(r"(?:Fast TSC|TSC) calibration failed|[Uu]nable to calibrate|could not calculate TSC"),
        "the kernel could not measure the TSC's frequency: PIT, HPET or ACPI PM timer were too slow or are not there",
        "without a frequency the TSC is no clock source.",
    ),
    Complaint(
        re.compile(r"sched_clock: Marking unstable"),
        "the scheduler's clock is corrected at each tick from now on",
        "timestamps in traces are coarser.",
    ),
)


def complaint_findings(kernel: KernelRecord | None, measured: str) -> list[Finding]:
    """Each kind of complaint once, with the last line of it; `measured`: what this run found of the TSC, in words."""
    lines = (kernel.complaints if kernel else None) or ()
    found, others = [], []
    by_kind: dict[Complaint, list[str]] = {}
    for line in lines:
        kind = next((each for each in COMPLAINTS if each.pattern.search(line)), None)
        if kind:
            by_kind.setdefault(kind, []).append(line)
        else:
            others.append(line)
    for kind, said in by_kind.items():
        beside = f"; {measured}" if kind.is_of_tsc else ""
        found.append(_note(_quoted(said), f": {kind.meaning}{beside}", kind.sees))
    return found + [_note(_quoted([line]), ", which is not explained here", "") for line in others[-OTHERS_TOLD_MAX:]]


def clocksource_findings(kernel: KernelRecord | None, told: Promises) -> list[Finding]:
    """The kernel took a clock that is slow to read, and why."""
    if kernel is None or kernel.clocksource not in SLOW:
        return []
    return [
        Finding(
            FindingCode.CLOCKSOURCE,
            Weight.NOTE,
            "monotonic",
            f"the kernel's clock source is {kernel.clocksource}, which is slow",
            f"the kernel's clock source is {kernel.clocksource}: {_listed(_why_slow(kernel, told))}",
            f"{READS[kernel.clocksource]}.",
            tuple(_faster(told)),
        )
    ]


def clocksource_story(kernel: KernelRecord | None, told: Promises) -> list[str]:
    """Which clock source the kernel took, of which, and why."""
    if kernel is None:
        return []
    of = f", of {', '.join(kernel.available)}" if kernel.available else ""
    why = _listed(_why_slow(kernel, told) if kernel.clocksource in SLOW else _why_fast(kernel, told))
    lines = [f"Linux {kernel.release} took the clock source {kernel.clocksource}{of}{f': {why}' * bool(why)}."]
    if kernel.complaints is None:
        lines.append("Its messages may not be read here (kernel.dmesg_restrict): run as root to see its complaints.")
    return lines


# Inside


def _note(said: str, meaning: str, sees: str) -> Finding:
    return Finding(FindingCode.COMPLAINT, Weight.NOTE, "", said, said + meaning, sees)


def _quoted(lines: Sequence[str]) -> str:
    last = lines[-1] if len(lines[-1]) <= QUOTED_MAX else f"{lines[-1][:QUOTED_MAX]}..."
    return f'the kernel said "{last}"' + (f" ({len(lines):,} such lines)" if len(lines) > 1 else "")


def _listed(reasons: Sequence[str]) -> str:
    return "; ".join(reasons)


def _asked_for(kernel: KernelRecord) -> list[str]:
    """What of the command line chooses clocks."""
    return [word for word in kernel.command_line.split() if PARAMETERS.fullmatch(word)]


def _why_slow(kernel: KernelRecord, told: Promises) -> list[str]:
    reasons = [f"its command line has {word}" for word in _asked_for(kernel)]
    for line in kernel.complaints or ():
        if any(each.is_of_tsc and each.pattern.search(line) for each in COMPLAINTS):
            reasons.append(f'it gave up the TSC: "{line[:QUOTED_MAX]}"')
            break
    if told.hypervisor == "KVM" and not any(each.startswith("CLOCKSOURCE") for each in told.kvm_features):
        reasons.append("KVM does not offer kvmclock here (no CLOCKSOURCE in CPUID 0x40000001)")
    if not told.invariant_tsc:
        reasons.append(
            "CPUID has no invariant TSC (0x80000007 EDX bit 8), so the kernel watches the TSC and may drop it"
        )
    return reasons or ["neither its command line nor CPUID says why"]


def _why_fast(kernel: KernelRecord, told: Promises) -> list[str]:
    reasons = [f"its command line has {word}" for word in _asked_for(kernel)]
    match kernel.clocksource:
        case "tsc" if told.invariant_tsc:
            reasons.append("the TSC is invariant, and Linux prefers that one to kvmclock")
        case "tsc":
            reasons.append("no clock of the hypervisor's was preferred")
        case "kvm-clock" if not told.invariant_tsc:
            reasons.append("KVM offers it, and without an invariant TSC Linux prefers it to the TSC")
        case "kvm-clock":
            reasons.append(
                "KVM offers it, and Linux does not take the TSC although it is invariant: it may be marked unstable"
            )
        case name if name.startswith("hyperv"):
            reasons.append("Hyper-V's reference time is offered, which Linux prefers")
        case "xen":
            reasons.append("Xen offers it, and Linux prefers it")
        case _:
            pass
    return reasons


def _faster(told: Promises) -> list[str]:
    """What gives the guest a clock that it can read without leaving."""
    if told.hypervisor in {"KVM", "QEMU's TCG"}:
        return [FASTER_BY_QEMU, FASTER_BY_LIBVIRT]
    return ["the host: offer the guest a paravirtual clock, or an invariant TSC"]
