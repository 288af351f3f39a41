"""What a Linux guest says itself: complaints explained, and why it took which clock source."""

from __future__ import annotations

import pytest

from pvclock.meter.inside import Finding, FindingCode, Verdict, VerdictStatus, judge
from tests.unit.inside_records import (
    HYPERVISOR,
    INVARIANT,
    KVM_LEAVES,
    a_clock,
    a_kernel,
    a_record,
    leaf,
    record_of,
    signature_leaf,
)

pytestmark = pytest.mark.row("E18")


def told_by(leaves: list[list[int]] | None = None, **kernel: object) -> Verdict:
    """Return the verdict on a clean guest whose kernel says that."""
    return judge(record_of(a_record([a_clock()], 1, leaves or KVM_LEAVES, kernel=a_kernel(**kernel))))


def complaints(*lines: str) -> list[Finding]:
    """Return what is said of those lines; none of them is a fault."""
    verdict = told_by(complaints=list(lines))
    assert verdict.status is VerdictStatus.PASSED
    return [each for each in verdict.findings if each.code is FindingCode.COMPLAINT]


@pytest.mark.parametrize(
    ("line", "means"),
    [
        ("clocksource: 'tsc' cs_nsec: 1 cs_now: 2", "the clock source watchdog compared"),
        ("Marking clocksource 'tsc' as unstable because the skew is too large:", "the clock source watchdog compared"),
        ("tsc: Marking TSC unstable due to clocksource watchdog", "for the reason that the line gives"),
        ("tsc: Marking TSC unstable due to TSCs unsynchronized", "the kernel did not measure that"),
        ("tsc: Marking TSC unstable due to boot parameter", "its command line says so"),
        ("tsc: Marking TSC unstable due to check_tsc_sync_source failed", "the kernel's own test at boot"),
        ("TSC ADJUST differs: Reference CPU0: 0 CPU1: -7", "a VMM wrote a CPU's TSC"),
        ("Measured 4711 cycles TSC warp between CPUs, turning off TSC clock.", "the kernel's own test at boot"),
        ("hrtimer: interrupt took 2519431 ns", "this vCPU was held up in it"),
        (
            "clocksource: timekeeping watchdog on CPU1: wd-tsc-wd read-back delay of 90us",
            "took too long for the watchdog",
        ),
        ("watchdog: BUG: soft lockup - CPU#1 stuck for 26s!", "its host held it up, or time stepped"),
        ("tsc: Fast TSC calibration failed", "could not measure the TSC's frequency"),
        ("sched_clock: Marking unstable (1, 2)<-(3, 4)", "the scheduler's clock is corrected"),
        ("PM: time jumped", "which is not explained here"),
    ],
)
def test_a_complaint_is_quoted_and_explained(line: str, means: str) -> None:
    """Whatever the kernel says is a note beside what was measured."""
    (found,) = complaints(line)
    assert f'the kernel said "{line}"' in found.what
    assert means in found.what


def test_many_lines_of_one_kind() -> None:
    """One finding, with the last of them and how many there were."""
    (found,) = complaints(*(f"hrtimer: interrupt took {ns} ns" for ns in range(900)))
    assert '"hrtimer: interrupt took 899 ns" (900 such lines)' in found.what


def test_a_long_line_is_cut() -> None:
    """A kernel's line may be as long as it likes."""
    (found,) = complaints("hrtimer: interrupt took " + "9" * 5000)
    assert len(found.what) < 500


def test_messages_that_may_not_be_read() -> None:
    """The story says how to see them."""
    assert any("run as root" in each for each in told_by(complaints=None).story)


@pytest.mark.parametrize(
    ("kernel", "leaves", "why"),
    [
        (
            {"clocksource": "hpet", "command_line": "ro tsc=unstable quiet"},
            KVM_LEAVES,
            "its command line has tsc=unstable",
        ),
        ({"clocksource": "acpi_pm", "command_line": "clocksource=acpi_pm"}, KVM_LEAVES, "has clocksource=acpi_pm"),
        ({"clocksource": "hpet", "command_line": "no-kvmclock"}, KVM_LEAVES, "has no-kvmclock"),
        (
            {"clocksource": "hpet", "complaints": ["tsc: Marking TSC unstable due to check_tsc_sync_source failed"]},
            KVM_LEAVES,
            'it gave up the TSC: "tsc: Marking TSC unstable',
        ),
        (
            {"clocksource": "refined-jiffies"},
            [HYPERVISOR, signature_leaf("KVMKVMKVM"), leaf(0x40000001)],
            "KVM does not offer kvmclock here",
        ),
        ({"clocksource": "acpi_pm"}, [HYPERVISOR], "CPUID has no invariant TSC"),
        ({"clocksource": "hpet"}, [HYPERVISOR, INVARIANT], "neither its command line nor CPUID says"),
    ],
)
def test_why_a_slow_clock_source(kernel: dict[str, object], leaves: list[list[int]], why: str) -> None:
    """From its command line, its complaints and what CPUID lacks; a note, with what makes it faster."""
    verdict = told_by(leaves, **kernel)
    (found,) = [each for each in verdict.findings if each.code is FindingCode.CLOCKSOURCE]
    assert why in found.what
    assert found.change
    assert verdict.status is VerdictStatus.PASSED


@pytest.mark.parametrize(
    ("name", "leaves", "why"),
    [
        ("tsc", [*KVM_LEAVES, INVARIANT], "the TSC is invariant, and Linux prefers that one"),
        ("kvm-clock", KVM_LEAVES, "without an invariant TSC Linux prefers it"),
        ("kvm-clock", [*KVM_LEAVES, INVARIANT], "it may be marked unstable"),
        ("hyperv_clocksource_tsc_page", [HYPERVISOR], "Hyper-V's reference time is offered"),
    ],
)
def test_why_a_fast_clock_source(name: str, leaves: list[list[int]], why: str) -> None:
    """It is in the story, and no finding."""
    verdict = told_by(leaves, clocksource=name)
    assert any(f"took the clock source {name}" in each and why in each for each in verdict.story)
    assert verdict.findings == ()
