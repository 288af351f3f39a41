"""Records that look like one fault and are another, or none: what may be said of each, and what may not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import pytest

from pvclock.errors import ProbeRecordError, PvclockError
from pvclock.meter.inside import Budgets, Finding, FindingCode, Verdict, VerdictStatus, Weight, judge, parse_record
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
    line,
    record_of,
    samples,
    signature_leaf,
    simulated_pairs,
    still,
)

pytestmark = pytest.mark.row("E18")

PASSED, BROKEN, UNDECIDED = VerdictStatus.PASSED, VerdictStatus.BROKEN, VerdictStatus.UNDECIDED
FAULT, NOTE = Weight.FAULT, Weight.NOTE
NS_HZ, PIT_HZ, ACPI_HZ = 10**9, 1_193_182, 3_579_545
PAGES = [PAGE, {**PAGE, "cpu": 1}]
UNPROMISED = [HYPERVISOR, signature_leaf("KVMKVMKVM"), leaf(0x40000001, 1 << 3)]
"""KVM's leaves without CLOCKSOURCE_STABLE."""
TRUE_PAGE = {**PAGE, "mul": (10**9 << 33) // TSC_HZ}


def verdict_of(*clocks: Mapping[str, object], budgets: Budgets | None = None, **more: Any) -> Verdict:  # noqa: ANN401
    """Return what becomes of a record of these clocks."""
    return judge(record_of(a_record(clocks, **more)), budgets)


def the(verdict: Verdict, code: FindingCode) -> Finding:
    """Return the one finding of that kind."""
    (found,) = [each for each in verdict.findings if each.code is code]
    return found


def codes(verdict: Verdict, weight: Weight = FAULT) -> list[FindingCode]:
    """Return what was found, of one weight."""
    return [each.code for each in verdict.findings if each.weight is weight]


def steps(clock_hz: int = NS_HZ, **ms: int) -> dict[str, object]:
    """Return what a step search tells of steps of so many ms."""
    told = {way: [ms_ * clock_hz // 1000, (ms_ * clock_hz // 1000) + 9 * (1 if ms_ > 0 else -1), BEGAN + TSC_HZ // 2]
            for way, ms_ in ms.items()}  # fmt: skip
    return {"reads": 1000, "floor": 1000, "forward": None, "backward": None, "count": len(ms), **told}


def windowed(windows: Mapping[tuple[int, int], Sequence[Any]], name: str = "tsc", **more: object) -> dict[str, object]:
    """Return a clock in ns whose pairs have these windows: one for the whole run, or one for each eighth."""
    pairs = []
    for cpus, edges in windows.items():
        each = list(edges) if isinstance(edges[0], tuple) else [edges] * 8
        slices = [
            [BEGAN + (2 * at + 1) * TSC_HZ // 16, *(edge * TSC_HZ // NS_HZ if name == "tsc" else edge for edge in both)]
            for at, both in enumerate(each)
        ]
        pairs.append({"cpus": list(cpus), "rounds": 99, "slices": slices})
    return a_clock(name, TSC_HZ if name == "tsc" else NS_HZ, pairs, **more)


AGREE = windowed({(0, 1): (-60, 60)})


# Steps


def test_a_pause_is_no_time_that_went_back() -> None:
    """A clock that stood still while the TSC ran fell behind it; that a reader saw it go back, nothing shows."""
    kvmclock = a_clock("pvclock", NS_HZ, simulated_pairs([still(0)] * 2, NS_HZ), steps=steps(backward=-30_000))
    verdict = verdict_of(AGREE, kvmclock, pages=PAGES, leaves=[*KVM_LEAVES, INVARIANT])
    assert codes(verdict) == [FindingCode.STEP_BACK]
    told = the(verdict, FindingCode.STEP_BACK)
    assert told.headline.startswith("kvmclock fell behind the TSC by 30 s")
    assert "pause" in told.what
    assert "TSC that jumped" in told.what
    assert "go back" not in told.software_sees
    assert "Erlang" not in told.software_sees


@pytest.mark.parametrize("reader", [0, 1])
def test_a_reading_that_was_less_proves_that_time_went_back(reader: int) -> None:
    """A warp of a CPU against itself, or between two that agree: then software saw it."""
    warps = [{"from": 0, "to": reader, "count": 1, "largest": 5000}]
    pairs = simulated_pairs([still(0)] * 2, NS_HZ)
    kvmclock = a_clock("pvclock", NS_HZ, pairs, steps=steps(backward=-30_000), warps=warps)
    told = the(verdict_of(AGREE, kvmclock), FindingCode.STEP_BACK)
    assert "a reading was 5 us less than an earlier one, so time went back" in told.what
    assert "Erlang" in told.software_sees


def test_a_warp_that_an_offset_makes_is_no_proof_of_a_step() -> None:
    """Two CPUs that are apart read less than each other anyway."""
    warps = [{"from": 1, "to": 0, "count": 1, "largest": 8900}]
    pairs = simulated_pairs([still(0), still(9000)], NS_HZ)
    kvmclock = a_clock("pvclock", NS_HZ, pairs, steps=steps(backward=-30_000), warps=warps)
    assert "does not tell" in the(verdict_of(AGREE, kvmclock), FindingCode.STEP_BACK).what


def test_a_step_breaks_no_promise_between_cpus() -> None:
    """STABLE and the invariant TSC speak of CPUs against each other."""
    raw = a_clock("monotonic_raw", NS_HZ, steps=steps(backward=-9))
    monotonic = a_clock("monotonic", NS_HZ, simulated_pairs([still(0)] * 2, NS_HZ), steps=steps(backward=-9))
    verdict = verdict_of(AGREE, monotonic, raw, pages=PAGES, kernel=a_kernel())
    assert codes(verdict) == [FindingCode.STEP_BACK, FindingCode.STEP_BACK]


@pytest.mark.parametrize(("way", "ms"), [("forward", 4), ("backward", -4)])
def test_a_step_of_the_guests_own(way: str, ms: int) -> None:
    """CLOCK_MONOTONIC alone is steered; what the counter does is in CLOCK_MONOTONIC_RAW, too, and the same way."""
    other = {"forward": "backward", "backward": "forward"}[way]
    monotonic = a_clock("monotonic", NS_HZ, steps=steps(**{way: ms}))
    for raw_steps, weight in (({}, NOTE), ({other: -ms}, NOTE), ({way: ms}, FAULT)):
        raw = a_clock("monotonic_raw", NS_HZ, steps=steps(**raw_steps))
        verdict = verdict_of(a_clock(), monotonic, raw, cpus=1)
        assert [each.weight for each in verdict.findings if each.clock == "monotonic"] == [weight]
    alone = verdict_of(a_clock(), monotonic, cpus=1)
    assert [each.weight for each in alone.findings] == [FAULT]


def test_a_tsc_that_goes_back() -> None:
    """Of the TSC's own steps the backward ones count: the first CPU read less than before; no budget allows it."""
    tsc = {**AGREE, "steps": steps(TSC_HZ, backward=-1000, forward=5)}
    for budgets in (None, Budgets(Fraction(10**12), Fraction(10**12), Fraction(10**12))):
        verdict = verdict_of(tsc, budgets=budgets)
        assert (verdict.status, codes(verdict)) == (BROKEN, [FindingCode.STEP_BACK])
    told = the(verdict, FindingCode.STEP_BACK)
    assert told.headline.startswith("the TSC of CPU 0 went back by 1 s")
    assert told.cpus == (0,)
    assert verdict_of({**AGREE, "steps": steps(TSC_HZ, forward=5)}).findings == ()


def test_how_small_a_step_was_looked_for() -> None:
    """The floor of each clock but the TSC; none where its rate was not learned, or nothing was read."""
    never = {**steps(), "floor": (1 << 63) - 1}
    unread = {**steps(), "reads": 0, "floor": 0}
    verdict = verdict_of(
        a_clock(),
        a_clock("pvclock", NS_HZ, steps=steps()),
        a_clock("pit", PIT_HZ, steps=never),
        a_clock("acpi_pm", ACPI_HZ, steps=unread),
        cpus=1,
    )
    assert [(each.clock, each.ns) for each in verdict.step_floors] == [
        ("pvclock", 1000),
        ("pit", None),
        ("acpi_pm", None),
    ]
    assert "a step of less than 1 us may go unseen" in verdict.step_floors[0].what
    assert "not searched for" in verdict.step_floors[1].what


# Frequencies


def frequency(*leaves: Sequence[int], **more: Any) -> list[Finding]:  # noqa: ANN401
    """Return what is said of frequencies in a record of one CPU."""
    verdict = verdict_of(a_clock(), *more.pop("clocks"), cpus=1, leaves=[*KVM_LEAVES, *leaves], **more)
    return [each for each in verdict.findings if each.code is FindingCode.FREQUENCY]


def wrong(name: str, hz: int) -> dict[str, object]:
    """Return a clock by which the TSC has another frequency."""
    return a_clock(name, hz, samples=samples(hz, Fraction(101, 100)))


TRUE_LEAF = leaf(0x15, 1, 1, TSC_HZ)
FALSE_LEAF = leaf(0x15, 1, 1, TSC_HZ * 102 // 100)


def lost(hz: int, from_eighth: int) -> list[list[int]]:
    """Return samples of a timer that lost 54.9 ms in one eighth of the run."""
    taken = samples(hz)
    return [[before, clock - (hz * 549 // 10_000) * (at >= from_eighth), after]
            for at, (before, clock, after) in enumerate(taken)]  # fmt: skip


def held_up(hz: int, ms: int) -> list[list[int]]:
    """Return samples of a timer by which the TSC is 1 % off, that come so late from the middle of the run on."""
    found = samples(hz, Fraction(101, 100))
    for sample in found[5:]:
        sample[0] += ms * TSC_HZ // 1000
        sample[1] += ms * hz * 101 // 100_000
        sample[2] += ms * TSC_HZ // 1000
    return found


@pytest.mark.parametrize("name", ["pit", "acpi_pm"])
def test_a_timer_that_lost_time_tells_no_frequency(name: str) -> None:
    """Not where its own rate changed, where another clock stepped, or where the CPU was held up for long."""
    hz = {"pit": PIT_HZ, "acpi_pm": ACPI_HZ}[name]
    (told,) = frequency(TRUE_LEAF, clocks=[wrong(name, hz)])
    assert told.weight is FAULT
    assert not frequency(TRUE_LEAF, clocks=[a_clock(name, hz, samples=lost(hz, 5))])
    stepped = a_clock("pvclock", NS_HZ, steps=steps(backward=-100))
    assert not frequency(TRUE_LEAF, clocks=[wrong(name, hz), stepped])
    assert not frequency(TRUE_LEAF, clocks=[a_clock(name, hz, samples=held_up(hz, 30))])
    assert frequency(TRUE_LEAF, clocks=[a_clock(name, hz, samples=held_up(hz, 20))])


def test_a_pause_is_no_other_rate_of_a_timer() -> None:
    """A PIT that lost whole rounds while the VM stood still seems to run slower there: the step is the finding."""
    pit = a_clock("pit", PIT_HZ, samples=lost(PIT_HZ, 5))
    assert codes(verdict_of(a_clock(), pit, cpus=1)) == [FindingCode.RATE_CHANGED]
    paused = a_clock("pvclock", NS_HZ, steps=steps(backward=-55))
    assert codes(verdict_of(a_clock(), paused, pit, cpus=1)) == [FindingCode.STEP_BACK]


def test_one_timer_against_others() -> None:
    """What another clock bears out is no fault on the word of one."""
    (told,) = frequency(TRUE_LEAF, clocks=[wrong("pit", PIT_HZ), a_clock("acpi_pm", ACPI_HZ)])
    assert told.weight is NOTE
    (both,) = frequency(TRUE_LEAF, clocks=[wrong("pit", PIT_HZ), wrong("acpi_pm", ACPI_HZ)])
    assert both.weight is FAULT


def test_the_kernels_own_calibration() -> None:
    """A page and a leaf agree, and CLOCK_MONOTONIC_RAW alone does not: it is the kernel that is wrong."""
    raw = wrong("monotonic_raw", NS_HZ)
    (told,) = frequency(TRUE_LEAF, clocks=[raw], pages=[TRUE_PAGE], kernel=a_kernel(clocksource="tsc"))
    assert told.weight is FAULT
    assert told.headline.startswith("the kernel's own calibration of the TSC is off by -")
    assert "the pvclock page of CPU 0" in told.what
    assert "CPUID 0x15" in told.what


def test_raw_alone_blames_no_claim() -> None:
    """It is what the kernel believes: a disagreement is worth knowing, and whose it is stays open."""
    (told,) = frequency(TRUE_LEAF, clocks=[wrong("monotonic_raw", NS_HZ)], kernel=a_kernel(clocksource="tsc"))
    assert (told.weight, told.clock) == (NOTE, "tsc")
    assert "one of the two is wrong" in told.what


def test_raw_of_a_clock_source_of_its_own() -> None:
    """By acpi_pm it measures the TSC, and does not repeat what was told of it."""
    raw = wrong("monotonic_raw", NS_HZ)
    (told,) = frequency(FALSE_LEAF, clocks=[raw], kernel=a_kernel(clocksource="acpi_pm"))
    assert told.weight is FAULT


def test_a_page_whose_scale_says_nothing() -> None:
    """A multiplier of 1 is rounded from anything up to twice that: no reference, and no error."""
    for mul in (0, 1, 2):
        assert verdict_of(a_clock(), cpus=1, pages=[{**PAGE, "mul": mul}], leaves=[*KVM_LEAVES, TRUE_LEAF]).story


# Between CPUs


def test_the_first_cpu_that_is_off() -> None:
    """Noisy windows: one other CPU is proven apart from it, so the pair is told, and the other one not blamed."""
    verdict = verdict_of(windowed({(0, 1): (-5, 130), (0, 2): (10, 130), (1, 2): (-60, 60)}), cpus=3)
    told = the(verdict, FindingCode.OFFSET)
    assert told.cpus == (0, 2)
    assert told.headline.startswith("CPU 2's TSC is 10 ns to 130 ns ahead of that of CPU 0")
    assert "which of them is off is open" in told.what


def test_a_chain() -> None:
    """Two ends are apart, and the middle from neither: the figure is of the ends, and none is named."""
    verdict = verdict_of(windowed({(0, 1): (-20, 100), (0, 2): (20, 140), (1, 2): (-20, 100)}), cpus=3)
    told = the(verdict, FindingCode.OFFSET)
    assert told.cpus == (0, 2)
    assert "CPU 1" not in told.what


def test_a_figure_is_of_whom_it_is_said() -> None:
    """An odd CPU's bounds hold against each CPU that is named beside it, and those alone are."""
    windows = {
        (0, 1): (-60, 60),
        (0, 2): (-60, 60),
        (1, 2): (-60, 60),
        (0, 4): (-60, 60),
        (1, 4): (-60, 60),
        (2, 4): (-60, 60),
    }
    windows |= {(0, 3): (500, 600), (1, 3): (450, 700), (2, 3): (510, 620), (3, 4): (-900, 900)}
    told = the(verdict_of(windowed(windows), cpus=5), FindingCode.OFFSET)
    assert told.cpus == (3,)
    assert "ahead of that of CPUs 0 to 2" in told.headline
    assert told.low_ns is not None
    assert told.high_ns is not None
    assert (round(told.low_ns), round(told.high_ns)) == (450, 700)


def test_a_star_blames_the_first_cpu_only_if_most_are_apart_from_it() -> None:
    """Of 18 CPUs 16 are proven apart from the first: it is named, and the one that is near it is not."""
    pairs = {(0, cpu): (10, 130) if cpu > 1 else (-5, 140) for cpu in range(1, 18)}
    told = the(verdict_of(windowed(pairs), cpus=18), FindingCode.OFFSET)
    assert told.cpus == (0,)
    assert "behind that of CPUs 2 to 17" in told.headline
    few = {(0, cpu): (10, 130) if cpu < 9 else (-5, 140) for cpu in range(1, 18)}
    open_ = the(verdict_of(windowed(few), cpus=18), FindingCode.OFFSET)
    assert len(open_.cpus) == 2
    assert "it may be CPU 0 that is off; 7 more pairs are apart" in open_.what


def test_a_drift_whose_cpu_is_not_proven() -> None:
    """One sharp pair moved, and the third CPU's windows are wide: either may have."""
    moving = [(40 * at - 60, 40 * at + 60) for at in range(8)]
    wide = {(0, 2): (-600, 600), (1, 2): (-600, 600)}
    told = the(verdict_of(windowed({(0, 1): moving, **wide}), cpus=3), FindingCode.DRIFT)
    assert told.cpus == (0, 1)
    assert "that moved" not in told.what
    assert "which of the two moved is open" in told.what
    proven = a_clock(pairs=simulated_pairs([drifting(9000), still(0), still(0)]))
    named = the(verdict_of(proven, cpus=3), FindingCode.DRIFT)
    assert named.cpus == (0,)


def test_both_clocks_that_went_back_at_once() -> None:
    """An exchange that saw its clocks set back has an empty window: none is ahead, and no promise of two is broken."""
    edges = [(-60, 60)] * 8
    edges[4] = (900_000, 60)
    verdict = verdict_of(windowed({(0, 1): edges}), leaves=[*KVM_LEAVES, INVARIANT])
    assert codes(verdict) == [FindingCode.UNSTEADY]
    told = the(verdict, FindingCode.UNSTEADY)
    assert "moved, or both clocks went back" in told.headline
    assert "ahead of that" not in told.what
    alone = verdict_of(windowed({(0, 1): [(900_000, 60)]}), leaves=[*KVM_LEAVES, INVARIANT])
    assert codes(alone) == [FindingCode.UNSTEADY]
    assert "went back" in the(alone, FindingCode.UNSTEADY).headline


# kvmclock's pages


def bare(offset_ns: int, **more: Any) -> Verdict:  # noqa: ANN401
    """Return the verdict on two pages that are apart."""
    kvmclock = a_clock("pvclock", NS_HZ, simulated_pairs([still(0), still(offset_ns)], NS_HZ), **more.pop("clock", {}))
    return verdict_of(AGREE, kvmclock, form="bare", **more)


def test_pages_that_nobody_promised_to_agree() -> None:
    """Without STABLE their readings may be apart, and Linux puts them in order: worth knowing, and no fault."""
    unpromised = [{**page, "flags": 0} for page in PAGES]
    verdict = bare(2000, pages=unpromised, leaves=UNPROMISED)
    assert (verdict.status, the(verdict, FindingCode.OFFSET).weight) == (PASSED, NOTE)
    assert "without STABLE" in the(verdict, FindingCode.OFFSET).what
    assert codes(bare(2000, pages=PAGES)) == [FindingCode.BROKEN_PROMISE, FindingCode.OFFSET]
    back = {"warps": [{"from": 1, "to": 1, "count": 1, "largest": 5}]}
    assert codes(bare(0, clock=back, pages=unpromised, leaves=UNPROMISED)) == [FindingCode.WARP]


@pytest.mark.parametrize("refused", [{"mul": 0}, {"version": 0}])
def test_a_cpu_without_a_page(refused: dict[str, int]) -> None:
    """Its readings are of no clock: they are not compared, it is said, and the comparison is open."""
    verdict = bare(-(10**12), pages=[PAGE, {**PAGE, "cpu": 1, **refused}])
    assert (verdict.status, codes(verdict)) == (UNDECIDED, [])
    assert the(verdict, FindingCode.NO_PAGE).cpus == (1,)
    assert any("kvmclock was not compared" in each.what for each in verdict.open)
    first = bare(0, pages=[{**PAGE, **refused}, PAGES[1]], clock={"steps": steps(backward=-9)})
    assert codes(first) == []


# What was not compared


def test_a_clock_that_should_have_been_compared() -> None:
    """CLOCK_MONOTONIC without an exchange between two CPUs leaves the verdict open; a device's timer does not."""
    verdict = verdict_of(AGREE, a_clock("monotonic", NS_HZ))
    assert verdict.status is UNDECIDED
    assert [each.what for each in verdict.open] == ["CLOCK_MONOTONIC was not compared between CPUs"]
    assert verdict_of(AGREE, a_clock("acpi_pm", ACPI_HZ), a_clock("monotonic_raw", NS_HZ)).status is PASSED
    assert verdict_of(a_clock(), a_clock("monotonic", NS_HZ), cpus=1).status is PASSED


def test_a_warp_bounds_nothing_from_above() -> None:
    """A CPU that read less than itself may have gone back by more where nobody looked."""
    tsc = windowed({(0, 1): (-60, 60)}, warps=[{"from": 0, "to": 0, "count": 1, "largest": 290}])
    verdict = verdict_of(tsc, budgets=Budgets(max_warp_ns=Fraction(200)))
    assert verdict.status is UNDECIDED


# The kernel's words


def complaint(text: str, **more: Any) -> str:  # noqa: ANN401
    """Return what is said of a kernel's line."""
    verdict = verdict_of(more.pop("tsc", AGREE), kernel=a_kernel(complaints=[text]), **more)
    return the(verdict, FindingCode.COMPLAINT).what


def test_an_added_fault_is_no_witness() -> None:
    """What --add put in does not bear out a kernel's complaint."""
    said = "tsc: Marking TSC unstable due to check_tsc_sync_source failed"
    apart = windowed({(0, 1): (440, 560)})
    assert "this run agrees" in complaint(said, tsc=apart)
    added = complaint(said, tsc=apart, added_ns=[0, 500])
    assert "agrees" not in added
    assert "no witness" in added


@pytest.mark.parametrize(
    ("said", "is_of_tsc"),
    [
        ("timekeeping watchdog on CPU0: Marking clocksource 'hpet' as unstable because the skew is too large:", False),
        ("timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable because the skew is too large:", True),
        ("timekeeping watchdog: Marking clocksource 'tsc-early' as unstable because the skew is too large:", True),
        ("clocksource:                       'hpet' cs_nsec: 5 cs_now: 6", False),
        ("clocksource:                       'hpet' wd_nsec: 503936207 wd_now: ffffffff", False),
        ("clocksource: Clocksource 'hpet' skewed -9 ns (0 ms) over watchdog 'acpi_pm' interval of 5 ns", False),
        ("clocksource: Clocksource 'tsc' skewed -9 ns (0 ms) over watchdog 'hpet' interval of 5 ns", True),
    ],
)
def test_whose_clock_source_a_watchdog_line_names(said: str, is_of_tsc: bool) -> None:
    """A line of hpet is none of the TSC, and nothing measured of that is held against it."""
    assert ("this run found nothing wrong with the TSC" in complaint(said)) is is_of_tsc


# Reading


def test_a_cut_record_is_not_replaced_by_an_older_one() -> None:
    """The last beginning decides: another boot's record says nothing of this one."""
    whole = line(a_record([a_clock()], 1))
    with pytest.raises(ProbeRecordError, match="in the record that begins at line 2"):
        parse_record(f"{whole}\n{whole[: len(whole) // 2]}")
    assert parse_record(f"{whole[: len(whole) // 2]}\n{whole}").version == "0.9"


@pytest.mark.parametrize("key", ["error", "schema"])
def test_lists_of_any_depth(key: str) -> None:
    """Whatever depth the decoder just bears is no crash a call deeper."""
    begins = {"error": '{"error":', "schema": '{"schema":"pvclock.probe-record/1","x":'}[key]
    for depth in range(900, 1010):
        with pytest.raises(PvclockError):
            parse_record(f"{begins}{'[' * depth}{']' * depth}}}")


@pytest.mark.parametrize("again", [[0, 1], [1, 0]])
def test_a_pair_that_is_told_twice(again: list[int]) -> None:
    """Two windows of one pair need not agree: refused, either way round."""
    (pair,) = simulated_pairs([still(0), still(0)])
    with pytest.raises(ProbeRecordError, match=r"clocks\[0\].pairs\[1\].cpus: found \[., .\] more than once"):
        record_of(a_record([a_clock(pairs=[pair, {**pair, "cpus": again}])]))


def test_how_many_cpus_there_are() -> None:
    """An older probe does not say."""
    assert record_of(a_record([a_clock()], 1)).cpus_present is None
    assert record_of(a_record([a_clock()], 1, cpus_present=96)).cpus_present == 96
    with pytest.raises(ProbeRecordError, match="cpus_present"):
        record_of(a_record([a_clock()], 1, cpus_present=-1))
