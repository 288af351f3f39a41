"""The verdict from inside: the stories that people report, and what is proven, promised and not kept in each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction

import pytest

from pvclock.meter.inside import Finding, FindingCode, Verdict, VerdictStatus, Weight, judge, verdict_document
from tests.unit.inside_records import (
    BEGAN,
    HYPERVISOR,
    INVARIANT,
    KVM_LEAVES,
    PAGE,
    TSC_HZ,
    a_clock,
    a_kernel,
    a_record,
    drifting,
    leaf,
    record_of,
    samples,
    signature_leaf,
    simulated_pairs,
    still,
)

pytestmark = pytest.mark.row("E18")

PASSED, BROKEN, UNDECIDED = VerdictStatus.PASSED, VerdictStatus.BROKEN, VerdictStatus.UNDECIDED
HVF = [HYPERVISOR, signature_leaf("Apple VZ"), INVARIANT]
VIRTUALBOX = [HYPERVISOR, signature_leaf("VBoxVBoxVBox")]
NO_STEP = {"reads": 1000, "floor": 1000, "forward": None, "backward": None, "count": 0}


def exchanged(*offsets_ns: int, name: str = "tsc", hz: int = TSC_HZ, **more: object) -> dict[str, object]:
    """Return a clock whose CPUs' offsets stand still at these."""
    return a_clock(name, hz, simulated_pairs([still(ns) for ns in offsets_ns], hz), **more)


def verdict_of(*clocks: dict[str, object], **more: object) -> Verdict:
    """Return what becomes of a record of these clocks."""
    cpus = more.pop("cpus", 2)
    assert isinstance(cpus, int)
    return judge(record_of(a_record(clocks, cpus, **more)))  # type: ignore[arg-type]  # keys of the record


def only(verdict: Verdict, code: FindingCode) -> Finding:
    """Return the one finding of that kind."""
    (found,) = [each for each in verdict.findings if each.code is code]
    return found


def codes(verdict: Verdict, weight: Weight = Weight.FAULT) -> list[FindingCode]:
    """Return what was found, of one weight."""
    return [each.code for each in verdict.findings if each.weight is weight]


# Stories


def test_a_clean_guest_passes_and_states_its_floor() -> None:
    """Nothing is found, and nothing below the floor is called clean."""
    verdict = verdict_of(exchanged(0, 0, 0), exchanged(0, 0, 0, name="monotonic", hz=10**9), cpus=3, kernel=a_kernel())
    assert (verdict.status, verdict.exit_status, verdict.findings) == (PASSED, 0, ())
    assert [floor.clock for floor in verdict.floors] == ["tsc", "monotonic"]
    assert verdict.floors[0].ns is not None
    assert 15 < verdict.floors[0].ns < 90
    for floor in verdict.floors:
        assert floor.apart_at_most_ns == floor.ns
        assert "no two CPUs are further apart than " in floor.what


def test_the_floor_beside_an_offset() -> None:
    """What else may go unseen is half a window's width; how far CPUs may be apart is another number."""
    middles = [BEGAN + (2 * at + 1) * TSC_HZ // 16 for at in range(8)]
    pairs = [{"cpus": [0, 1], "rounds": 9, "slices": [[at, 2900 - 58, 2900 + 58] for at in middles]}]
    (floor,) = verdict_of(a_clock(pairs=pairs)).floors
    assert (floor.ns, floor.apart_at_most_ns) == (Fraction(20), Fraction(1020))
    assert "an offset of less than 20 ns may go unseen; no two CPUs are further apart than 1.02 us" in floor.what


def test_the_floor_where_no_offset_is_proven() -> None:
    """An offset of the larger edge may be there, for a window need not lie around 0."""
    middles = [BEGAN + (2 * at + 1) * TSC_HZ // 16 for at in range(8)]
    pairs = [{"cpus": [0, 1], "rounds": 9, "slices": [[at, -29, 290] for at in middles]}]
    (floor,) = verdict_of(a_clock(pairs=pairs)).floors
    assert (floor.ns, floor.apart_at_most_ns) == (Fraction(100), Fraction(100))


def test_1_2_ms_back_between_vcpus_although_stable() -> None:
    """What crashes Erlang and Chromium: kvmclock says STABLE, and one vCPU's monotonic time is 1.2 ms ahead."""
    warps = [{"from": 2, "to": 0, "count": 41, "largest": 1_199_960}, {"from": 2, "to": 1, "count": 2, "largest": 40}]
    verdict = verdict_of(
        exchanged(0, 0, 0, 0),
        exchanged(0, 0, 1_200_000, 0, name="monotonic", hz=10**9, warps=warps),
        cpus=4,
        pages=[{**PAGE, "cpu": cpu} for cpu in range(4)],
        kernel=a_kernel(),
    )
    assert (verdict.status, verdict.exit_status) == (BROKEN, 1)
    assert codes(verdict) == [FindingCode.BROKEN_PROMISE, FindingCode.OFFSET]
    offset, promise = only(verdict, FindingCode.OFFSET), only(verdict, FindingCode.BROKEN_PROMISE)
    assert (offset.cpus, offset.clock) == ((2,), "monotonic")
    assert offset.low_ns is not None
    assert offset.high_ns is not None
    assert 1_199_900 < offset.low_ns < 1_200_000 < offset.high_ns < 1_200_100
    assert offset.what.startswith("CPU 2's CLOCK_MONOTONIC is 1.1999")
    assert "ahead of that of CPUs 0, 1 and 3; 43 readings went back by up to 1.199 ms" in offset.what
    assert "Erlang" in offset.software_sees
    assert promise.what.startswith("STABLE in every pvclock page promises")
    assert any("kvmclock-stable-bit=off" in each for each in promise.change)


def test_1_5_ms_under_a_macos_host() -> None:
    """Two CPUs: the pair is named and neither of them, the invariant TSC is not kept, and the remedy is the VMM's."""
    label = "timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable because the skew is too large:"
    verdict = verdict_of(
        exchanged(0, -1_500_000), leaves=HVF, kernel=a_kernel(clocksource="acpi_pm", complaints=[label, label])
    )
    assert verdict.status is BROKEN
    assert codes(verdict) == [FindingCode.BROKEN_PROMISE, FindingCode.OFFSET]
    offset = only(verdict, FindingCode.OFFSET)
    assert offset.cpus == (0, 1)
    assert offset.what.startswith("CPU 0's TSC is 1.4999")
    assert offset.what.endswith("ahead of that of CPU 1; two CPUs cannot tell which of them is off")
    assert "macOS" in offset.change[0]
    complaint, source = only(verdict, FindingCode.COMPLAINT), only(verdict, FindingCode.CLOCKSOURCE)
    assert "(2 such lines)" in complaint.what
    assert "this run agrees: CPU 0's TSC is" in complaint.what
    assert "acpi_pm: it gave up the TSC" in source.what


def test_9_us_on_virtualbox() -> None:
    """A TSC that is 9 us behind is found, though nothing was promised of it."""
    verdict = verdict_of(exchanged(0, 0, -9_000), cpus=3, leaves=VIRTUALBOX)
    assert codes(verdict) == [FindingCode.OFFSET]
    offset = only(verdict, FindingCode.OFFSET)
    assert offset.cpus == (2,)
    assert "behind that of CPUs 0 and 1" in offset.what
    assert "VBoxManage" in offset.change[0]


def test_the_label_unstable_alone_is_no_fault() -> None:
    """The kernel marked the TSC, and nothing disagrees here: a note that says so, and the verdict passes."""
    said = "tsc: Marking TSC unstable due to TSCs unsynchronized"
    verdict = verdict_of(exchanged(0, 0), kernel=a_kernel(complaints=[said]))
    assert (verdict.status, codes(verdict)) == (PASSED, [])
    told = only(verdict, FindingCode.COMPLAINT).what
    assert f'"{said}"' in told
    assert "this run found nothing wrong with the TSC beyond its floor of" in told


def test_an_added_fault_is_found_and_told() -> None:
    """Who put a fault in reads that it was put in."""
    verdict = verdict_of(exchanged(0, 500), added_ns=[0, 500])
    assert verdict.status is BROKEN
    assert "+500 ns on CPU 1" in only(verdict, FindingCode.ADDED_FAULT).what


def test_an_added_fault_breaks_no_promise() -> None:
    """The guest's clock kept its word: the probe changed its own readings."""
    verdict = verdict_of(exchanged(0, 500), added_ns=[0, 500], pages=[PAGE], leaves=[*KVM_LEAVES, INVARIANT])
    assert codes(verdict) == [FindingCode.OFFSET]


def test_a_clock_whose_tsc_is_the_cause() -> None:
    """Where the TSC is apart on the same CPUs, the clock's finding says so."""
    verdict = verdict_of(exchanged(0, 0, 900), exchanged(0, 0, 900, name="monotonic", hz=10**9), cpus=3)
    tsc, monotonic = verdict.findings
    assert (tsc.clock, monotonic.clock) == ("tsc", "monotonic")
    assert monotonic.what.endswith("; so is the TSC there")


# Between CPUs


def test_no_majority() -> None:
    """Two against two: groups are told, and no CPU is called the odd one."""
    offset = only(verdict_of(exchanged(0, 0, 5000, 5000), cpus=4), FindingCode.OFFSET)
    assert len(offset.cpus) == 2
    assert "no majority agrees: CPUs 0 and 1 and CPUs 2 and 3 are each apart" in offset.what


def test_two_odd_ones() -> None:
    """Each CPU that is apart from the majority has its own finding."""
    verdict = verdict_of(exchanged(0, 4000, 0, 0, -4000), cpus=5)
    assert [each.cpus for each in verdict.findings] == [(1,), (4,)]


def test_cpus_by_the_systems_numbers() -> None:
    """A guest's own numbers are used, not places in a list."""
    cpus = [{"cpu": number, "apic_id": number} for number in (3, 8, 11)]
    document = a_record([exchanged(0, 0, 7000)], 3) | {"cpus": cpus}
    assert judge(record_of(document)).findings[0].cpus == (11,)


def test_a_pair_turned_round() -> None:
    """The window of [1, 0] is that of [0, 1] with its sign turned."""
    clock = exchanged(0, 3000)
    pairs = clock["pairs"]
    assert isinstance(pairs, list)
    turned = [{**pairs[0], "cpus": [1, 0], "slices": [[at, -high, -low] for at, low, high in pairs[0]["slices"]]}]
    assert only(verdict_of({**clock, "pairs": turned}), FindingCode.OFFSET).what.startswith("CPU 1's TSC")


def test_pairs_that_were_not_measured() -> None:
    """Of many CPUs each is compared with the first, which may be the one that is off: only the pair is told."""
    clock = exchanged(0, 0, 9000)
    pairs = clock["pairs"]
    assert isinstance(pairs, list)
    verdict = verdict_of({**clock, "pairs": [pair for pair in pairs if pair["cpus"][0] == 0]}, cpus=3)
    assert only(verdict, FindingCode.OFFSET).cpus == (0, 2)
    assert "compared with CPU 0 alone, so it may be CPU 0 that is off" in only(verdict, FindingCode.OFFSET).what
    assert verdict.floors[0].ns is not None


def test_a_cpu_that_never_answered() -> None:
    """Two CPUs without a round are no clean ones: undecided."""
    clock = exchanged(0, 0, 0)
    pairs = clock["pairs"]
    assert isinstance(pairs, list)
    lone = [{**pair, "slices": [each[:1] for each in pair["slices"]]} if 2 in pair["cpus"] else pair for pair in pairs]
    verdict = verdict_of({**clock, "pairs": lone}, cpus=3)
    assert (verdict.status, verdict.exit_status, verdict.findings) == (UNDECIDED, 2, ())
    assert [each.what for each in verdict.open] == ["TSC: CPUs 0 and 2 were never compared, nor was one other pair"]


def test_one_cpu() -> None:
    """There is nothing to compare, and nothing is open."""
    assert verdict_of(a_clock(), cpus=1).status is PASSED
    assert verdict_of(a_clock(), cpus=2).status is UNDECIDED


def test_a_warp_without_a_proven_offset() -> None:
    """A reading that went back is proof by itself, also where the windows leave 0 open."""
    warps = [{"from": 1, "to": 0, "count": 3, "largest": 58}]
    found = only(verdict_of(exchanged(0, 0, warps=warps)), FindingCode.WARP)
    assert (found.cpus, found.low_ns) == ((0, 1), Fraction(20))
    assert "CPU 0 read 20 ns less of TSC than CPU 1 had read before; 3 such readings of 1,000,000" in found.what


def test_a_cpu_that_goes_back_by_itself() -> None:
    """A warp from a CPU to itself."""
    warps = [{"from": 1, "to": 1, "count": 1, "largest": 2900}]
    found = only(verdict_of(exchanged(0, 0, warps=warps)), FindingCode.WARP)
    assert "CPU 1 read 1 us less of TSC than it had read before itself; 1 such reading" in found.what


# During the run


def test_an_offset_that_moves() -> None:
    """5 us a second between two vCPUs: how far it went, at which rate, and that two cannot tell whose it is."""
    verdict = verdict_of(a_clock(pairs=simulated_pairs([still(0), drifting(5000)])), leaves=HVF)
    drift = only(verdict, FindingCode.DRIFT)
    assert drift.what.startswith("CPU 1's TSC went 4.3")
    assert "further ahead of CPU 0's" in drift.what
    assert "two CPUs cannot tell which of them moved" in drift.what
    assert "at times" in only(verdict, FindingCode.OFFSET).what
    assert FindingCode.BROKEN_PROMISE in codes(verdict)


def test_which_cpu_moved() -> None:
    """Of three the one that moved against both others."""
    drift = only(
        verdict_of(a_clock(pairs=simulated_pairs([still(0), drifting(-9000), still(0)])), cpus=3), FindingCode.DRIFT
    )
    assert drift.cpus == (1,)
    assert "it is CPU 1 that moved" in drift.what


def test_an_eighth_in_which_the_offset_moved() -> None:
    """An empty window is proof, too, although no two eighths differ; of what, and which way, it does not tell."""
    clock = exchanged(0, 0)
    pairs = clock["pairs"]
    assert isinstance(pairs, list)
    for slice_ in pairs[0]["slices"]:
        slice_[1:] = [-100, 100]
    pairs[0]["slices"][3][1:] = [50, 40]
    verdict = verdict_of({**clock, "pairs": pairs})
    assert "moved, or both clocks went back" in only(verdict, FindingCode.UNSTEADY).headline
    assert codes(verdict) == [FindingCode.UNSTEADY]


def stepped(low: int, high: int, key: str, count: int = 1) -> dict[str, object]:
    """Return what a step search tells."""
    return {**NO_STEP, key: [low, high, BEGAN + TSC_HZ // 2], "count": count}


@pytest.mark.parametrize(
    ("key", "low", "high", "code", "says"),
    [
        ("backward", -3_100, -2_900, FindingCode.STEP_BACK, "CLOCK_MONOTONIC fell behind the TSC by 2.9 us to 3.1 us"),
        ("forward", 2_900, 3_100, FindingCode.STEP_FORWARD, "CLOCK_MONOTONIC stepped forward by 2.9 us to 3.1 us"),
    ],
)
def test_a_step(key: str, low: int, high: int, code: FindingCode, says: str) -> None:
    """Its size's bounds, and when."""
    clock = a_clock("monotonic", 10**9, steps=stepped(low, high, key, 7))
    found = only(verdict_of(a_clock(), clock, cpus=1), code)
    assert found.what.startswith(says)
    assert "0.50 s into the run; it was the largest of 7 steps" in found.what
    assert (found.low_ns, found.high_ns, found.budget) == (Fraction(2900), Fraction(3100), "max_step")


def two_rates(hz: int, ppm: int) -> list[list[int]]:
    """Return samples of a clock whose second half runs faster by so many ppm."""
    found = samples(hz)
    for at, sample in enumerate(found):
        sample[1] += max(at - 4, 0) * hz * ppm // 8 // 10**6
    return found


def test_a_rate_that_changed() -> None:
    """50 ppm from one half of the run to the other is told of a raw clock; more than any NTP makes is a fault."""
    raw = a_clock("monotonic_raw", 10**9, samples=two_rates(10**9, 50))
    found = only(verdict_of(a_clock(), raw, cpus=1), FindingCode.RATE_CHANGED)
    assert "CLOCK_MONOTONIC_RAW changed its rate against the TSC by +49" in found.what
    assert found.weight is Weight.NOTE
    far = a_clock("monotonic_raw", 10**9, samples=two_rates(10**9, 2000))
    assert only(verdict_of(a_clock(), far, cpus=1), FindingCode.RATE_CHANGED).weight is Weight.FAULT


def test_ntp_may_slew_its_clock() -> None:
    """The same of CLOCK_MONOTONIC is the guest's own NTP, and no fault of a hypervisor."""
    slewed = a_clock("monotonic", 10**9, samples=two_rates(10**9, 50))
    assert verdict_of(a_clock(), slewed, cpus=1).findings == ()


def test_a_rate_that_noise_may_have_changed() -> None:
    """Within the readings' width it is none."""
    assert verdict_of(a_clock(), a_clock("acpi_pm", 3_579_545), a_clock("hyperv", 10**7), cpus=1).findings == ()


def test_samples_that_say_nothing() -> None:
    """Zeros where none was taken, a TSC that went back, none at all: no rate, and no error."""
    for taken in ([], [[0, 0, 0]] * 9, [[9, 1, 5], [2, 2, 1]], [[5, 0, 6], [5, 9, 6]]):
        assert verdict_of(a_clock(), a_clock("monotonic_raw", 10**9, samples=taken), cpus=1).findings == ()


# Promises


def test_stable_speaks_of_kvmclock() -> None:
    """Without a page in sight, a TSC that is apart breaks no word of kvmclock: its pages may make up for that."""
    assert codes(verdict_of(exchanged(0, 9000))) == [FindingCode.OFFSET]
    assert codes(verdict_of(exchanged(0, 9000), pages=[PAGE])) == [FindingCode.BROKEN_PROMISE, FindingCode.OFFSET]
    assert codes(verdict_of(exchanged(0, 9000), pages=[{**PAGE, "flags": 0}])) == [FindingCode.OFFSET]


def test_monotonic_of_another_clock_source() -> None:
    """STABLE says nothing of CLOCK_MONOTONIC where that is not made of kvmclock."""
    monotonic = exchanged(0, 9000, name="monotonic", hz=10**9)
    kept = verdict_of(exchanged(0, 0), monotonic, kernel=a_kernel(clocksource="hpet"))
    assert codes(kept) == [FindingCode.OFFSET]
    assert FindingCode.BROKEN_PROMISE in codes(verdict_of(exchanged(0, 0), monotonic, kernel=a_kernel()))


def test_a_paused_flag_that_stays() -> None:
    """Set at all looks: a note; set at some: none."""
    stuck = [{**PAGE, "stopped_looks": 9}, {**PAGE, "cpu": 1, "stopped_looks": 8}]
    verdict = verdict_of(exchanged(0, 0), pages=stuck)
    found = only(verdict, FindingCode.STOPPED_FLAG)
    assert (verdict.status, found.cpus) == (PASSED, (0,))
    assert "at all of 9 looks" in found.what
    assert all("Linux clears it when its lockup watchdog next looks" in each for each in found.change)
    assert not verdict_of(exchanged(0, 0), pages=[{**PAGE, "looks": 1, "stopped_looks": 1}]).findings


# Frequencies


def told_frequency(*leaves: Sequence[int], clocks: Sequence[dict[str, object]] = (), **more: object) -> list[Finding]:
    """Return the findings of frequencies, of a TSC of 2.9 GHz by the raw clock."""
    raw = a_clock("monotonic_raw", 10**9)
    verdict = verdict_of(a_clock(), *(clocks or [raw]), cpus=1, leaves=[*KVM_LEAVES, *leaves], **more)
    return [each for each in verdict.findings if each.code is FindingCode.FREQUENCY]


def timing(khz: int) -> list[list[int]]:
    """Return a hypervisor's leaves with that frequency."""
    return [signature_leaf("KVMKVMKVM", last=0x40000010), leaf(0x40000010, khz)]


@pytest.mark.parametrize("khz", [2_900_000, 2_899_999, 2_900_001])
def test_a_frequency_within_its_steps(khz: int) -> None:
    """A kHz off is what a leaf in kHz may be."""
    assert told_frequency(*timing(khz)) == []


def test_a_frequency_that_is_a_little_off() -> None:
    """20 ppm are a fact, and no fault: NTP corrects them."""
    (found,) = told_frequency(*timing(2_900_058))
    assert found.weight is Weight.NOTE
    assert "CPUID 0x40000010 says that the TSC has 2,900,058,000 Hz, in steps of 1,000 Hz" in found.what
    assert "by CLOCK_MONOTONIC_RAW over this run it has 2,899,999," in found.what
    assert "off by +19" in found.what


def test_a_frequency_that_is_far_off() -> None:
    """One percent is a fault, by whichever clock proves it best; the remedies are those of that leaf."""
    (found,) = told_frequency(*timing(2_929_000), clocks=[a_clock("acpi_pm", 3_579_545), a_clock("pit", 1_193_182)])
    assert found.weight is Weight.FAULT
    assert "by ACPI PM timer over this run" in found.what
    assert any("vmware-cpuid-freq=off" in each for each in found.change)


def test_a_frequency_against_the_pages_scale() -> None:
    """The guest's kvmclock goes by its page, so a leaf that says another frequency is off."""
    page = {**PAGE, "mul": (10**9 << 33) // TSC_HZ, "shift": -1}
    (found,) = told_frequency(*timing(2_800_000), clocks=[a_clock("monotonic", 10**9)], pages=[page])
    assert "by the pvclock page of CPU 0 (mul 2962046411, shift -1) it has" in found.what


def test_a_headline_has_the_fault() -> None:
    """By how much a frequency is off stands in it, and so does what proves that a promise is broken."""
    (found,) = told_frequency(*timing(2_929_000), clocks=[a_clock("acpi_pm", 3_579_545)])
    assert found.headline.startswith("CPUID 0x40000010 says that the TSC has 2,929,000,000 Hz, which is off by +")
    assert found.headline.endswith(" %")
    promise = only(verdict_of(exchanged(0, 9000), pages=[PAGE]), FindingCode.BROKEN_PROMISE)
    assert promise.headline.startswith("STABLE in every pvclock page is not kept: CPU 1's TSC is ")
    assert promise.headline.endswith("ahead of that of CPU 0")
    assert promise.promise == "stable"


def test_a_nominal_frequency_is_never_a_fault() -> None:
    """Leaf 0x16 tells what a CPU is sold as."""
    (found,) = told_frequency(leaf(0x16, 2600))
    assert found.weight is Weight.NOTE
    assert "what the CPU is sold as" in found.what


def test_a_page_that_is_far_off() -> None:
    """A page's scale that a clock with its own oscillator proves to be 1 % off is a fault; 10 ppm are none."""
    own, hpet = [a_clock("acpi_pm", 3_579_545)], a_kernel(clocksource="hpet")
    wrong = {**PAGE, "mul": (10**9 << 33) // (TSC_HZ * 101 // 100), "shift": -1}
    near = {**PAGE, "mul": (10**9 << 33) // (TSC_HZ + 29_000), "shift": -1}
    for clocks, more in ((own, {}), ([], {"kernel": hpet})):
        (found,) = told_frequency(pages=[wrong], clocks=clocks, **more)
        assert found.weight is Weight.FAULT
        assert found.what.startswith("the pvclock page of CPU 0 says")
        assert told_frequency(pages=[near], clocks=clocks, **more) == []


@pytest.mark.parametrize("clocksource", ["kvm-clock", "tsc", "tsc-early"])
def test_a_page_is_not_held_against_itself(clocksource: str) -> None:
    """Linux scales CLOCK_MONOTONIC_RAW by that page: what differs from it is no proof, and what agrees none either."""
    wrong = {**PAGE, "mul": (10**9 << 33) // (TSC_HZ * 101 // 100), "shift": -1}
    assert told_frequency(pages=[wrong], kernel=a_kernel(clocksource=clocksource)) == []


def test_a_frequency_that_hyperv_told() -> None:
    """The probe took the TSC's frequency from Hyper-V's MSR: its own reference time shows that it is not so."""
    hyperv = a_clock("hyperv", 10**7, samples=samples(10**7, Fraction(TSC_HZ, 2_800_000_000)))
    (found,) = told_frequency(clocks=[hyperv], tsc_hz_from="hyperv")
    assert found.weight is Weight.FAULT
    assert found.what.startswith("Hyper-V's HV_X64_MSR_TSC_FREQUENCY says that the TSC has 2,900,000,000 Hz")
    assert told_frequency(clocks=[a_clock("hyperv", 10**7)], tsc_hz_from="hyperv") == []


def test_a_clock_that_stepped_tells_no_frequency() -> None:
    """Its samples are no measure of the TSC."""
    raw = a_clock("monotonic_raw", 10**9, samples=two_rates(10**9, 9000), steps=stepped(5, 9, "forward"))
    assert told_frequency(*timing(2_900_000), clocks=[raw]) == []


PREFERRED = "the TSC is invariant, and Linux prefers that one to kvmclock"


def test_the_story() -> None:
    """Who the hypervisor is, which clocks it offers, what the kernel took, and what was measured."""
    leaves = [HYPERVISOR, *timing(2_900_000), leaf(0x40000001, 1 << 24 | 1 << 3), INVARIANT, leaf(7, ebx=2)]
    verdict = verdict_of(exchanged(0, 0), leaves=leaves, kernel=a_kernel(clocksource="tsc"))
    assert verdict.story == (
        "The hypervisor is KVM, which offers kvmclock, STABLE.",
        f"Linux 6.12.1 took the clock source tsc, of kvm-clock, tsc, acpi_pm: {PREFERRED}.",
        "Measured for 1 s on CPUs 0 and 1: TSC; the TSC at 2,900,000,000 Hz, from monotonic_raw.",
    )


@pytest.mark.parametrize(
    ("leaves", "says"),
    [
        ([leaf(1)], "No hypervisor shows itself in CPUID, so there is no clock but the machine's."),
        ([HYPERVISOR], "A hypervisor is there, without a signature, which offers no clock of its own."),
        (
            [HYPERVISOR, signature_leaf("Microsoft Hv"), signature_leaf("VBoxVBoxVBox", 0x40000100)],
            "The hypervisor is VirtualBox, beside Hyper-V, which offers no clock of its own.",
        ),
    ],
)
def test_the_beginning_of_a_story(leaves: list[list[int]], says: str) -> None:
    """Without a hypervisor, without a signature, with two."""
    assert verdict_of(a_clock(), cpus=1, leaves=leaves).story[0] == says


# What to change


def test_what_to_change_where_a_clock_stepped() -> None:
    """What was done to the VM at that moment, and nothing of its CPUs' TSCs."""
    clock = a_clock("monotonic", 10**9, steps=stepped(-3100, -2900, "backward"))
    told = " ".join(only(verdict_of(a_clock(), clock, cpus=1), FindingCode.STEP_BACK).change)
    for event in ("pause", "resume", "migration", "snapshot", "restore", "KVM_SET_CLOCK", "suspend", "master clock"):
        assert event in told
    assert "offset" not in told
    macos = verdict_of(a_clock(), clock, cpus=1, leaves=HVF)
    assert "KVM" not in " ".join(only(macos, FindingCode.STEP_BACK).change)


def test_what_to_change_where_a_rate_changed() -> None:
    """The host's NTP, and KVM's master clock."""
    raw = a_clock("monotonic_raw", 10**9, samples=two_rates(10**9, 2000))
    told = " ".join(only(verdict_of(a_clock(), raw, cpus=1), FindingCode.RATE_CHANGED).change)
    assert "NTP" in told
    assert "master clock" in told
    assert "offset" not in told


@pytest.mark.parametrize(
    ("available", "boot"),
    [
        (["kvm-clock", "tsc"], ""),
        (["tsc", "acpi_pm"], "clocksource=acpi_pm:"),
        (["tsc", "hpet", "acpi_pm"], "clocksource=hpet or clocksource=acpi_pm:"),
    ],
)
def test_a_guest_is_sent_to_no_clock_source_that_it_lacks(available: list[str], boot: str) -> None:
    """The way out in the guest names what its kernel has; an offset's cause is told, and no frequency is set for it."""
    verdict = verdict_of(exchanged(0, 9000), kernel=a_kernel(available=available))
    told = " ".join(only(verdict, FindingCode.OFFSET).change)
    assert (boot in told, "boot with" in told) == (True, bool(boot))
    assert "one TSC offset for all vCPUs" in told
    assert "IA32_TSC" in told
    assert "tsc-frequency" not in told


def test_nothing_is_to_be_changed_for_a_fault_that_was_put_in() -> None:
    """Nobody's host is at fault."""
    verdict = verdict_of(exchanged(0, 9000), added_ns=[0, 9000])
    assert verdict.is_added
    assert all(each.change == () for each in verdict.findings)


# For programs


def test_a_verdict_is_plain_json() -> None:
    """Every field by its name, lengths of time as numbers."""
    document = json.loads(json.dumps(verdict_document(verdict_of(exchanged(0, 1500)))))
    assert (document["status"], document["promises"]["hypervisor"]) == ("broken", "KVM")
    assert document["findings"][0]["code"] == "offset"
    assert document["findings"][0]["weight"] == "fault"
    assert document["findings"][0]["low_ns"] == pytest.approx(1500, abs=60)
    assert document["floors"][0]["apart_at_most_ns"] > 1000 > document["floors"][0]["ns"] > 0
