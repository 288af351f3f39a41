"""The pre-flight's judgement: facts of VMs, each with one thing wrong, and what is said of it."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

import pytest

from pvclock.kvm.tsc_offset import TscOffsets
from pvclock.machine.cpuid import CpuidEntry
from pvclock.machine.preflight import (
    ORDER_RULES,
    ClockFacts,
    Finding,
    GuestFacts,
    HostFacts,
    Severity,
    VcpuFacts,
    choices,
    judge,
    read_offer,
    repair_writes,
)
from pvclock.machine.preflight.facts import ASKED_MSRS
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.interface import CpuidLeaf
from pvclock.providers.kvm.features import KvmFeature, kvm_cpuid_leaves
from pvclock.state.json_schema import plain

pytestmark = pytest.mark.row("E8")

HZ: Final = 2_500_000_000
MS: Final = HZ // 1000
KVMCLOCK: Final = KvmFeature.CLOCKSOURCE | KvmFeature.CLOCKSOURCE2 | KvmFeature.CLOCKSOURCE_STABLE

AMD: Final = CpuidLeaf(0x10, 0x68747541, 0x444D4163, 0x69746E65)
INTEL: Final = CpuidLeaf(0x16, 0x756E6547, 0x6C65746E, 0x49656E69)
BARE: Final = {0: AMD, 1: CpuidLeaf(ecx=1 << 31 | 1 << 24), 7: CpuidLeaf(ebx=1 << 1)}
SOUND: Final = BARE | kvm_cpuid_leaves(KVMCLOCK)
INVARIANT: Final = {0x80000007: CpuidLeaf(edx=1 << 8)}
TIMING: Final = {0x40000000: SOUND[0x40000000]._replace(eax=0x40000010)}

Leaves = dict[int, CpuidLeaf]


def entries(leaves: Leaves) -> list[CpuidEntry]:
    """They as KVM has them, and a subleaf that is not to be read as the leaf itself."""
    given = [{"function": leaf, "index": 0, "flags": 0, **registers._asdict()} for leaf, registers in leaves.items()]
    return [*given, {"function": 7, "index": 1, "flags": 1, **CpuidLeaf()._asdict()}]


def vcpu(leaves: Leaves = SOUND, **changes: object) -> VcpuFacts:
    """One vCPU, with nothing wrong."""
    return VcpuFacts(read_offer(entries(leaves)), served_but(), HZ)._replace(**changes)  # type: ignore[arg-type]  # its members


def guest(*vcpus: VcpuFacts, kernel: bool = False, **host: object) -> GuestFacts:
    """A VM of these, by default of one, whose clock knows their offsets."""
    all_of_it = vcpus or (vcpu(),)
    clock = ClockFacts("engine", tuple(each.tsc_offset or 0 for each in all_of_it))
    facts = HostFacts("tsc", HZ)._replace(**host)  # type: ignore[arg-type]  # its members
    return GuestFacts(all_of_it, ClockFacts("kernel") if kernel else clock, facts)


def clocked(facts: GuestFacts, **clock: object) -> GuestFacts:
    """The same with another clock."""
    return facts._replace(clock=facts.clock._replace(**clock))  # type: ignore[arg-type]  # its members


def hyperv(privileges: Privilege, **leaves: int) -> Leaves:
    """A guest of Hyper-V's interface, beside KVM's at 0x40000100 if it has features of that."""
    own = {
        0x40000000: CpuidLeaf(0x40000005, 0x7263694D, 0x666F736F, 0x76482074),
        0x40000001: CpuidLeaf(eax=int.from_bytes(b"Hv#1", "little")),
        0x40000003: CpuidLeaf(eax=int(privileges) & 0xFFFFFFFF),
    }
    beside = kvm_cpuid_leaves(leaves["kvm"], base=0x40000100) if "kvm" in leaves else {}
    return BARE | own | beside


def codes(facts: GuestFacts, *severities: Severity) -> list[str]:
    """What is found, of those severities."""
    return [finding.code for finding in judge(facts) if finding.severity in severities]


@pytest.mark.parametrize("kernel", [False, True], ids=["engine", "kernel"])
@pytest.mark.parametrize("vcpus", [1, 3])
def test_a_sound_vm(vcpus: int, *, kernel: bool) -> None:
    """Nothing is wrong with it; what to expect is said: pages that are stable, and the clock that it will take."""
    found = judge(guest(*(vcpu(tsc_offset=-5 * HZ) for _ in range(vcpus)), kernel=kernel))
    assert [finding.code for finding in found] == ["master-clock" if kernel else "stable", "clocksource"]
    assert {finding.severity for finding in found} == {Severity.NOTE}


def without(leaves: Leaves, leaf: int, **registers: int) -> Leaves:
    """They, with some bits of a leaf cleared."""
    before = leaves[leaf]._asdict()
    return leaves | {leaf: CpuidLeaf(**{name: value & ~registers.get(name, 0) for name, value in before.items()})}


def served_but(*msrs: int) -> frozenset[int]:
    """All MSRs that are asked for, but those."""
    return frozenset(ASKED_MSRS) - set(msrs)


CASES: Final = {
    "no hypervisor bit": (guest(vcpu(without(SOUND, 1, ecx=1 << 31))), "error", "hypervisor-bit"),
    "no signature": (guest(vcpu(without(SOUND, 0x40000000, ebx=~0, ecx=~0, edx=~0))), "error", "signature"),
    "beyond the maximum": (guest(vcpu(SOUND | {0x40000010: CpuidLeaf(HZ // 1000, 10**6)})), "warning", "maximum-leaf"),
    "the new MSR": (guest(vcpu(served_msrs=served_but(0x4B564D01))), "error", "clock-msr-not-served"),
    "the old wall clock": (guest(vcpu(served_msrs=served_but(0x11))), "error", "clock-msr-not-served"),
    "Hyper-V's page": (
        guest(vcpu(hyperv(Privilege.REFERENCE_TSC), served_msrs=served_but(0x40000021))),
        "error",
        "clock-msr-not-served",
    ),
    "no stable bit": (guest(vcpu(without(SOUND, 0x40000001, eax=1 << 24))), "warning", "stable-not-offered"),
    "no TSC_ADJUST": (guest(vcpu(served_msrs=served_but(0x3B))), "error", "tsc-adjust-not-served"),
    "no LAPIC with deadlines": (guest(serves_tsc_deadline=False), "error", "tsc-deadline-not-served"),
    "no deadline bit": (guest(vcpu(without(SOUND, 1, ecx=1 << 24))), "warning", "tsc-deadline-not-offered"),
    "a restored deadline mode": (
        guest(vcpu(without(SOUND, 1, ecx=1 << 24), timer_mode=2), serves_tsc_deadline=False),
        "error",
        "tsc-deadline-mode",
    ),
    "an invariant TSC that the host lacks": (
        clocked(guest(), offers_invariant_tsc=True),
        "warning",
        "invariant-tsc-not-supported",
    ),
    "vCPUs of two kinds": (guest(vcpu(), vcpu(SOUND | INVARIANT)), "warning", "cpuid-differs"),
    "leaf 0x15": (guest(vcpu(SOUND | {0x15: CpuidLeaf(1, 100, 24_999_000)})), "warning", "frequency-leaf"),
    "leaf 0x15, far off": (guest(vcpu(SOUND | {0x15: CpuidLeaf(1, 100, 24_000_000)})), "error", "frequency-leaf"),
    "leaf 0x16": (guest(vcpu(SOUND | {0x16: CpuidLeaf(2300)})), "warning", "frequency-leaf"),
    "leaf 0x40000010": (
        guest(vcpu(SOUND | TIMING | {0x40000010: CpuidLeaf(HZ // 1000 + 1000, 10**6)})),
        "error",
        "frequency-leaf",
    ),
    "another bus": (
        guest(vcpu(SOUND | TIMING | {0x40000010: CpuidLeaf(HZ // 1000, 25_000)})),
        "warning",
        "bus-frequency",
    ),
    "a rate beside the leaf": (
        clocked(guest(vcpu(SOUND | TIMING | {0x40000010: CpuidLeaf(HZ // 1000, 10**6)})), rate=Fraction(1, 10)),
        "error",
        "frequency-leaf-and-rate",
    ),
    "a frequency that is not served": (guest(vcpu(tsc_hz=HZ + 1000)), "error", "tsc-frequency-not-served"),
    "two frequencies": (guest(vcpu(), vcpu(tsc_hz=HZ // 2), scales_tsc=True), "error", "tsc-rates-differ"),
    "offsets apart": (guest(vcpu(), vcpu(tsc_offset=1)), "warning", "tsc-disagreement"),
    "ADJUSTs apart": (guest(vcpu(), vcpu(tsc_adjust=1)), "warning", "tsc-adjust-disagreement"),
    "a clock that does not know": (
        clocked(guest(vcpu(tsc_offset=7)), tsc_offsets=(0,)),
        "error",
        "tsc-offset-unknown",
    ),
    "no offsets": (
        guest(vcpu(SOUND | INVARIANT, tsc_offset=None), tsc_offsets=TscOffsets.IGNORED),
        "warning",
        "tsc-offset-not-honoured",
    ),
    "steered offsets": (
        guest(vcpu(SOUND | INVARIANT, tsc_offset=None), tsc_offsets=TscOffsets.STEERED),
        "warning",
        "tsc-offset-steered",
    ),
    "another clocksource of the host's": (guest(clocksource="hpet"), "warning", "not-stable"),
    "the same with the kernel's clock": (guest(clocksource="hpet", kernel=True), "warning", "no-master-clock"),
    "old MSRs only": (
        guest(vcpu(BARE | kvm_cpuid_leaves(KVMCLOCK & ~KvmFeature.CLOCKSOURCE2)), kernel=True),
        "warning",
        "no-master-clock",
    ),
    "an interface without it": (clocked(guest(), allows_stable=False), "warning", "not-stable"),
    "a deadline before the TSC": (guest(vcpu(tsc=5, tsc_deadline=1 << 45)), "error", "deadline-before-tsc"),
    "no clock": (guest(vcpu(BARE)), "warning", "no-clocksource"),
    "an invariant TSC": (guest(vcpu(SOUND | INVARIANT)), "warning", "guest-takes-tsc"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(case: str) -> None:
    """With its severity; it comes before the notes, says what the guest sees and what to do, and is plain data."""
    facts, severity, code = CASES[case]
    found = judge(facts)
    (finding,) = [each for each in found if each.code == code][:1]
    assert finding.severity is Severity(severity)
    assert finding.what
    assert finding.guest_sees
    assert finding.advice
    plain(finding._asdict())
    order = [list(Severity).index(each.severity) for each in found]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        (guest(vcpu(BARE | kvm_cpuid_leaves(KvmFeature.CLOCKSOURCE2))), "clock-msr-not-offered"),
        (guest(vcpu(without(SOUND | INVARIANT, 7, ebx=2))), "tsc-adjust-not-offered"),
        (guest(vcpu(tsc_offset=None), tsc_offsets=TscOffsets.IGNORED), "tsc-offset-not-honoured"),
        (guest(vcpu(tsc_offset=None), tsc_offsets=TscOffsets.STEERED), "tsc-offset-steered"),
    ],
    ids=["served and not offered", "no TSC_ADJUST", "no offsets, no need", "steered, no need"],
)
def test_what_is_no_fault_is_a_note(facts: GuestFacts, code: str) -> None:
    """It says what to expect."""
    assert code in codes(facts, Severity.NOTE)
    assert code not in codes(facts, Severity.ERROR, Severity.WARNING)


def test_what_is_served_and_offered_is_not_reported() -> None:
    """Hyper-V's clock and KVM's side by side, of each the MSRs that it offers."""
    both = hyperv(Privilege.REFERENCE_TSC | Privilege.TIME_REF_COUNT, kvm=KVMCLOCK)
    assert codes(guest(vcpu(both)), Severity.ERROR, Severity.WARNING) == []
    assert codes(guest(vcpu(served_msrs=served_but(0x40000021))), Severity.ERROR, Severity.WARNING) == []


# Frequencies


@pytest.mark.parametrize(
    ("ppm", "severity"), [(0, None), (5, None), (6, "warning"), (-6, "warning"), (250, "warning"), (251, "error")]
)
def test_bounds_of_a_told_frequency(ppm: int, severity: str | None) -> None:
    """Up to 5 ppm NTP corrects without notice; from 250 on KVM itself takes it for another frequency."""
    crystal_hz = 25_000_000 + 25 * ppm
    found = [each for each in judge(guest(vcpu(SOUND | {0x15: CpuidLeaf(1, 100, crystal_hz)}))) if each.values]
    off = [each for each in found if each.code == "frequency-leaf"]
    assert [each.severity for each in off] == ([] if severity is None else [severity])
    assert [each.values["error_ppm"] for each in off] == pytest.approx([ppm] * len(off))


def test_a_scaled_tsc_is_the_guests_own() -> None:
    """Where the CPU scales TSCs a leaf is held against the guest's frequency, and else against the host's."""
    leaves = SOUND | TIMING | {0x40000010: CpuidLeaf(1_000_000, 10**6)}
    assert codes(guest(vcpu(leaves, tsc_hz=10**9), scales_tsc=True), Severity.ERROR) == []
    assert codes(guest(vcpu(leaves, tsc_hz=10**9)), Severity.ERROR) == ["frequency-leaf", "tsc-frequency-not-served"]


def test_hyperv_has_other_leaves_there() -> None:
    """Leaf 0x40000010 of a Hyper-V guest is no frequency."""
    leaves = hyperv(Privilege.REFERENCE_TSC) | {0x40000010: CpuidLeaf(1, 1)}
    assert "frequency-leaf" not in codes(guest(vcpu(leaves)), *Severity)


# TSCs


@pytest.mark.row("E5")
@pytest.mark.parametrize("kernel", [False, True], ids=["engine", "kernel"])
@pytest.mark.parametrize("ahead_ms", [10, -10, 3000])
def test_a_disagreement_has_its_size_its_vcpu_and_its_repair(ahead_ms: int, *, kernel: bool) -> None:
    """With an invariant TSC it is an error; the writes of the repair make the TSCs agree, and move none back."""
    vcpus = [vcpu(SOUND | INVARIANT, tsc_offset=-5 * HZ) for _ in range(3)]
    vcpus[2] = vcpus[2]._replace(tsc_offset=-5 * HZ + ahead_ms * MS)
    facts = guest(*vcpus, kernel=kernel)
    (finding,) = [each for each in judge(facts) if each.code == "tsc-disagreement"]
    assert (finding.severity, finding.vcpu) == (Severity.ERROR, 2)
    assert (finding.values["ahead_ticks"], finding.values["ahead_ns"]) == (ahead_ms * MS, ahead_ms * 10**6)
    assert f"{abs(ahead_ms)}.000000 ms {'ahead of' if ahead_ms > 0 else 'behind'} vCPU 0's" in finding.what
    writes = repair_writes(facts)
    assert finding.values["repair"] == [write._asdict() for write in writes]
    assert all(write.moves_tsc_by >= 0 for write in writes)
    assert [write.vcpu for write in writes] == ([0, 1, 2] if kernel else [2] if ahead_ms < 0 else [0, 1])
    for write in writes:
        vcpus[write.vcpu] = vcpus[write.vcpu]._replace(tsc_offset=write.offset_after)
    repaired = guest(*vcpus, kernel=kernel)
    assert codes(repaired, Severity.ERROR) == []
    assert repair_writes(repaired) == []


def test_what_no_offset_repairs() -> None:
    """TSCs of two frequencies, and TSCs 2^63 ticks apart, of which none is ahead."""
    assert repair_writes(guest(vcpu(), vcpu(tsc_hz=HZ // 2, tsc_offset=5), scales_tsc=True)) == []
    far = guest(vcpu(), vcpu(tsc_offset=1 << 63))
    assert repair_writes(far) == []
    assert "tsc-disagreement" in codes(far, Severity.WARNING)


def test_a_disagreement_that_the_clock_knows_is_no_flag() -> None:
    """The engine's pages lose TSC_STABLE by what the engine knows, and the kernel's by what the host has."""
    apart = guest(vcpu(), vcpu(tsc_offset=MS))
    assert "not-stable" in codes(apart, Severity.WARNING)
    unaware = clocked(apart, tsc_offsets=(0, 0))
    assert {"stable", "tsc-offset-unknown"} <= set(codes(unaware, *Severity))
    assert "no-master-clock" in codes(guest(vcpu(), vcpu(tsc_offset=MS), kernel=True), Severity.WARNING)


# The guest's choice

PRIVILEGES: Final = Privilege.REFERENCE_TSC | Privilege.TIME_REF_COUNT
ON_INTEL: Final = {0: INTEL}
PAGE: Final = "hyperv_clocksource_tsc_page"


@pytest.mark.parametrize(
    ("leaves", "vcpus", "linux", "tsc_first"),
    [
        (SOUND, 1, "kvm-clock", "kvm-clock"),
        (SOUND | ON_INTEL, 2, "kvm-clock", "kvm-clock"),
        (SOUND | INVARIANT, 1, "tsc", "tsc"),
        (SOUND | INVARIANT, 2, "tsc", "tsc"),
        (hyperv(PRIVILEGES, kvm=KVMCLOCK), 1, "kvm-clock", "kvm-clock"),
        (hyperv(PRIVILEGES, kvm=KVMCLOCK) | INVARIANT, 1, "tsc", "tsc"),
        (hyperv(PRIVILEGES), 1, PAGE, PAGE),
        (hyperv(Privilege.TIME_REF_COUNT), 1, "hyperv_clocksource_msr", "hyperv_clocksource_msr"),
        (hyperv(PRIVILEGES | Privilege.FREQUENCY | Privilege.TSC_INVARIANT) | INVARIANT, 2, "tsc", "tsc"),
        (hyperv(PRIVILEGES | Privilege.FREQUENCY | Privilege.TSC_INVARIANT), 2, PAGE, PAGE),
        (BARE, 1, "refined-jiffies", "refined-jiffies"),
        (BARE | ON_INTEL | {0x16: CpuidLeaf(2500)}, 2, "tsc", "tsc"),
        (BARE | {0x16: CpuidLeaf(2500)}, 1, "refined-jiffies", "refined-jiffies"),
        (without(SOUND, 0x40000001, eax=0x9), 1, "refined-jiffies", "refined-jiffies"),
        (without(SOUND, 1, ecx=1 << 31), 1, "refined-jiffies", "refined-jiffies"),
        (
            without(SOUND, 0x40000001, eax=0x9) | INVARIANT | TIMING | {0x40000010: CpuidLeaf(HZ // 1000, 10**6)},
            1,
            "refined-jiffies",
            "tsc",
        ),
    ],
)
def test_which_clock_a_guest_takes(leaves: Leaves, vcpus: int, linux: str, tsc_first: str) -> None:
    """By Linux's rules of today, and by those of the series that prefers a constant TSC to any other clock."""
    chosen = choices(guest(*[vcpu(leaves)] * vcpus))
    assert [each.clocksource for each in chosen[:2]] == [linux, tsc_first]
    assert all(each.why for each in chosen)


def test_the_schedulers_clock_moves_with_the_series_only() -> None:
    """Today's Linux keeps KVM's clock for its scheduler beside an invariant TSC."""
    chosen = choices(guest(vcpu(SOUND | INVARIANT)))
    assert [each.sched_clock for each in chosen] == ["kvm-clock", "tsc"]


def test_a_missing_stable_bit_is_nothing_to_a_guest_of_the_series() -> None:
    """Both take the TSC, if it is invariant; the one of today has a slow clock for its scheduler then."""
    leaves = without(SOUND, 0x40000001, eax=1 << 24) | INVARIANT
    assert [each.clocksource for each in choices(guest(vcpu(leaves)))] == ["tsc", "tsc"]
    assert "stable-not-offered" in codes(guest(vcpu(leaves)), Severity.WARNING)


def test_a_timer_to_calibrate_by_makes_the_tsc_a_clock() -> None:
    """A VM with a PIT needs no leaf that tells the frequency."""
    bare = guest(vcpu(BARE))
    assert [each.clocksource for each in choices(bare._replace(has_calibration_timer=True))] == ["tsc", "tsc"]
    two = guest(vcpu(BARE), vcpu(BARE))._replace(has_calibration_timer=True)
    assert choices(two)[0].clocksource == "refined-jiffies"


def test_a_guest_without_tsc_adjust_finds_its_tscs_apart() -> None:
    """By its own test at boot, and goes back to KVM's clock; one of the series does not look."""
    leaves = without(SOUND | INVARIANT, 7, ebx=2)
    chosen = choices(guest(vcpu(leaves), vcpu(leaves, tsc_offset=10 * MS)))
    assert [each.clocksource for each in chosen] == ["kvm-clock", "tsc"]


def leaving(facts: GuestFacts) -> Finding:
    """What is said of a guest that takes its TSC."""
    (found,) = [each for each in judge(facts) if each.code == "guest-takes-tsc"]
    return found


@pytest.mark.row("E22")
def test_a_guest_that_takes_its_tsc_leaves_every_policy() -> None:
    """The finding says so, of which guests, and of a rate that is asked for."""
    facts = guest(vcpu(SOUND | INVARIANT))
    assert "no pause policy, no rate, no slew" in leaving(facts).guest_sees
    assert leaving(facts).values["guests"] == ["Linux", "Linux with the TSC-first series of July 2026"]
    assert "1/10" in leaving(clocked(facts, rate=Fraction(1, 10))).guest_sees


@pytest.mark.parametrize("deadline", [0, 1, 10**6 - 1, 10**6 + (1 << 64) // 10**6 - 1])
def test_a_deadline_in_the_past_is_none(deadline: int) -> None:
    """Nor one that is just near enough for KVM's arithmetic: only from 2^64 / 10^6 ticks on it wraps."""
    assert "deadline-before-tsc" not in codes(guest(vcpu(tsc=10**6, tsc_deadline=deadline)), *Severity)
    assert "deadline-before-tsc" in codes(guest(vcpu(tsc=10**6, tsc_deadline=10**6 + (1 << 64) // 10**6)), *Severity)


def test_rules_of_order_have_reasons() -> None:
    """Each says why, and the code of the finding that shows the mistake is one that there is."""
    known = {code for _, _, code in CASES.values()}
    assert all(rule.first and rule.then and rule.why for rule in ORDER_RULES)
    assert {rule.code for rule in ORDER_RULES} - {""} <= known
    assert any(not rule.code for rule in ORDER_RULES)
