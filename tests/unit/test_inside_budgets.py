"""Budgets for a measurement from inside: what breaks, keeps and leaves each of them open."""

from __future__ import annotations

from fractions import Fraction

import pytest

from pvclock.meter.inside import Budgets, FindingCode, OpenReason, Verdict, VerdictStatus, judge
from tests.unit.inside_records import (
    BEGAN,
    PAGE,
    TSC_HZ,
    a_clock,
    a_record,
    drifting,
    record_of,
    simulated_pairs,
    still,
)

pytestmark = pytest.mark.row("E18")

PASSED, BROKEN, UNDECIDED = VerdictStatus.PASSED, VerdictStatus.BROKEN, VerdictStatus.UNDECIDED
MIDDLES = [BEGAN + (2 * at + 1) * TSC_HZ // 16 for at in range(8)]


def window_of(low: int, high: int) -> list[dict[str, object]]:
    """Return an exchange that gives that window in each eighth of the run, in ticks."""
    return [{"cpus": [0, 1], "rounds": 9, "slices": [[at, low, high] for at in MIDDLES]}]


def judged(budgets: Budgets, *clocks: dict[str, object], cpus: int = 2, **more: object) -> Verdict:
    """Return what becomes of budgets."""
    return judge(record_of(a_record(clocks, cpus, **more)), budgets)  # type: ignore[arg-type]  # keys of the record


@pytest.mark.parametrize(
    ("max_warp_ns", "status"), [(99, BROKEN), (100, UNDECIDED), (199, UNDECIDED), (200, PASSED), (1000, PASSED)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_window_of_100_to_200_ns(max_warp_ns: int, status: VerdictStatus, sign: int) -> None:
    """Broken by what is proven alone, kept by the worse end alone, either way round; the finding itself stands."""
    pairs = window_of(*sorted((290 * sign, 580 * sign)))
    verdict = judged(Budgets(max_warp_ns=Fraction(max_warp_ns)), a_clock(pairs=pairs))
    assert verdict.status is status
    assert bool(verdict.broken) is (status is BROKEN)
    assert bool(verdict.open) is (status is UNDECIDED)
    assert [each.code for each in verdict.findings] == [FindingCode.OFFSET]


def test_what_breaks_a_budget_is_told_with_its_bounds() -> None:
    """And with the pair, the clock and the budget."""
    verdict = judged(Budgets(max_warp_ns=Fraction(50)), a_clock(pairs=window_of(290, 580)))
    assert verdict.broken == ("TSC: CPUs 0 and 1 are 100 ns to 200 ns apart; the budget is 50 ns",)
    verdict = judged(Budgets(max_warp_ns=Fraction(50)), a_clock(pairs=window_of(-290, 580)))
    (open_,) = verdict.open
    assert open_.what == "TSC: CPUs 0 and 1 may be up to 200 ns apart; the budget is 50 ns"
    assert open_.reason is OpenReason.FLOOR_BETWEEN_CPUS


def test_without_budgets_a_fault_breaks() -> None:
    """And a window that leaves 0 open is none."""
    assert judged(Budgets(), a_clock(pairs=window_of(290, 580))).status is BROKEN
    assert judged(Budgets(), a_clock(pairs=window_of(-290, 580))).status is PASSED


def test_a_budget_of_another_kind_excuses_nothing() -> None:
    """An offset is not within a budget for steps."""
    clock = a_clock(pairs=window_of(290, 580))
    assert judged(Budgets(max_step_ns=Fraction(10**6)), clock).status is BROKEN


def test_a_promise_is_broken_by_no_more_than_its_proof() -> None:
    """STABLE with an offset that the budget allows: told, and no reason to fail."""
    verdict = judged(Budgets(max_warp_ns=Fraction(300)), a_clock(pairs=window_of(290, 580)), pages=[PAGE])
    assert verdict.status is PASSED
    assert verdict.findings[0].code is FindingCode.BROKEN_PROMISE


def test_a_warp_counts_for_its_budget() -> None:
    """A reading that went back by 100 ns breaks 99 ns, whatever the windows leave open."""
    clock = a_clock(pairs=window_of(-58, 58), warps=[{"from": 0, "to": 1, "count": 1, "largest": 290}])
    verdict = judged(Budgets(max_warp_ns=Fraction(99)), clock)
    assert verdict.broken == ("TSC: CPUs 0 and 1 are 100 ns or more apart; the budget is 99 ns",)
    assert judged(Budgets(max_warp_ns=Fraction(100)), clock).status is PASSED
    own = a_clock(pairs=window_of(-58, 58), warps=[{"from": 1, "to": 1, "count": 1, "largest": 290}])
    verdict = judged(Budgets(max_warp_ns=Fraction(99)), own)
    assert verdict.broken == ("TSC: two readings of CPU 1 are 100 ns or more apart; the budget is 99 ns",)


def test_an_offset_that_moved_within_a_budget() -> None:
    """All that was seen counts, not what is common to all eighths, which is nothing."""
    slices = [[at, 290 * place + 1, 290 * place + 57] for place, at in enumerate(MIDDLES)]
    clock = a_clock(pairs=[{"cpus": [0, 1], "rounds": 9, "slices": slices}])
    allowed = Budgets(max_warp_ns=Fraction(720), max_drift_ppb=Fraction(10**6))
    assert judged(allowed, clock).status is PASSED
    assert judged(allowed._replace(max_warp_ns=Fraction(719)), clock).status is UNDECIDED
    assert judged(allowed._replace(max_warp_ns=Fraction(699)), clock).status is BROKEN


def test_cpus_that_were_not_compared() -> None:
    """Nothing is known of them, so no budget passes."""
    for budgets in (Budgets(max_warp_ns=Fraction(10**9)), Budgets(max_drift_ppb=Fraction(10**9))):
        assert judged(budgets, a_clock()).status is UNDECIDED


def test_one_cpu_keeps_no_budget_between_cpus() -> None:
    """`taskset -c 0` leaves nothing to compare: undecided, whatever the budget allows."""
    verdict = judged(Budgets(max_warp_ns=Fraction(10**9)), a_clock(), cpus=1)
    assert (verdict.status, verdict.exit_status) == (UNDECIDED, 2)
    (open_,) = verdict.open
    assert open_.reason is OpenReason.ONE_CPU
    assert open_.what.startswith("only CPU 0 was measured")


def test_a_system_of_one_cpu_has_none_to_be_apart_from() -> None:
    """Where the probe says that there is no other, a budget between CPUs is kept; of two, one tells nothing."""
    budgets = Budgets(max_warp_ns=Fraction(200))
    assert judged(budgets, a_clock(), cpus=1, cpus_present=1).status is PASSED
    assert judged(budgets, a_clock(), cpus=1, cpus_present=2).status is UNDECIDED


# Steps


def clock_with(low: int, high: int, floor: int = 500, name: str = "monotonic") -> dict[str, object]:
    """Return a clock in ns that stepped back by low to high, or not at all."""
    step = [-high, -low, BEGAN] if high else None
    steps = {"reads": 1000, "floor": floor, "forward": None, "backward": step, "count": bool(high) + 0}
    return a_clock(name, 10**9, steps=steps)


@pytest.mark.parametrize(
    ("max_step_ns", "status"), [(899, BROKEN), (900, UNDECIDED), (1099, UNDECIDED), (1100, PASSED), (5000, PASSED)]
)
def test_a_step_of_900_to_1100_ns(max_step_ns: int, status: VerdictStatus) -> None:
    """By its better and its worse end."""
    verdict = judged(Budgets(max_step_ns=Fraction(max_step_ns)), a_clock(), clock_with(900, 1100), cpus=1)
    assert verdict.status is status


def test_a_budget_below_the_floor_is_undecided() -> None:
    """A step within the floor cannot be told."""
    tsc, clock = a_clock(), clock_with(0, 0, floor=500)
    assert judged(Budgets(max_step_ns=Fraction(500)), tsc, clock, cpus=1).status is PASSED
    verdict = judged(Budgets(max_step_ns=Fraction(499)), tsc, clock, cpus=1)
    assert (verdict.status, verdict.exit_status) == (UNDECIDED, 2)
    (open_,) = verdict.open
    assert open_.what == "CLOCK_MONOTONIC may have stepped by up to 500 ns; the budget is 499 ns"
    assert open_.reason is OpenReason.FLOOR_OF_STEPS


def test_a_floor_that_is_not_known() -> None:
    """The probe did not learn the clock's rate in its time: anything may have been."""
    clock = clock_with(0, 0, floor=(1 << 63) - 1)
    (open_,) = judged(Budgets(max_step_ns=Fraction(10**18)), a_clock(), clock, cpus=1).open
    assert "any time" in open_.what
    assert open_.reason is OpenReason.SHORT_RUN


def test_coarse_clocks_leave_no_budget_open() -> None:
    """PIT and ACPI PM timer prove what they prove, and their units are no reason to stay undecided."""
    budgets, sound = Budgets(max_step_ns=Fraction(1000)), (a_clock(), clock_with(0, 0))
    assert judged(budgets, *sound, clock_with(0, 0, 10**6, "pit"), cpus=1).status is PASSED
    assert judged(budgets, *sound, clock_with(10**6, 10**6, 10**5, "pit"), cpus=1).status is BROKEN


def test_a_clock_that_ntp_slews_is_bounded_by_the_one_that_it_does_not() -> None:
    """Linux makes both of one counter, and tells steps of CLOCK_MONOTONIC_RAW far better; what is proven counts."""
    budgets, sharp = Budgets(max_step_ns=Fraction(1000)), clock_with(0, 0, 500, "monotonic_raw")
    assert judged(budgets, a_clock(), clock_with(0, 0, 10**6), cpus=1).status is UNDECIDED
    assert judged(budgets, a_clock(), clock_with(0, 0, 10**6), sharp, cpus=1).status is PASSED
    assert judged(budgets, a_clock(), clock_with(10**6, 10**6), sharp, cpus=1).status is BROKEN


def test_the_tsc_makes_no_steps_against_itself() -> None:
    """The floor of its own readings leaves no budget open, and nothing else is nothing searched."""
    tsc = {**clock_with(0, 0, 10**6), "name": "tsc"}
    assert judged(Budgets(max_step_ns=Fraction(1000)), tsc, clock_with(0, 0), cpus=1).status is PASSED
    assert judged(Budgets(max_step_ns=Fraction(1000)), tsc, cpus=1).status is UNDECIDED


def test_no_reading_for_steps() -> None:
    """Then nothing is known of steps."""
    silent = a_clock(steps={"reads": 0, "floor": 0, "forward": None, "backward": None, "count": 0})
    assert judged(Budgets(max_step_ns=Fraction(1000)), silent, cpus=1).status is UNDECIDED


# Drifts


def test_a_drift_beyond_its_budget() -> None:
    """5 ppm between two vCPUs: proven beyond 3 ppm, within 8 ppm, and open between."""
    clock = a_clock(pairs=simulated_pairs([still(0), drifting(5000)]))
    verdicts = [judged(Budgets(Fraction(10**6), None, Fraction(ppb)), clock).status for ppb in (3000, 5000, 8000)]
    assert verdicts == [BROKEN, UNDECIDED, PASSED]


def test_how_long_a_run_would_tell() -> None:
    """A budget below what this run can tell says how many seconds would do; a run that long then passes."""
    short = a_clock(pairs=simulated_pairs([still(0), still(0)]))
    verdict = judged(Budgets(max_drift_ppb=Fraction(10)), short)
    assert verdict.status is UNDECIDED
    (said,) = verdict.open
    assert said.what.startswith("TSC, CPU 1 against CPU 0: a drift of up to ")
    seconds = said.seconds
    assert seconds is not None
    assert said.what.endswith(f"a run of {seconds} s can tell")
    assert seconds == 11
    long = a_clock(pairs=simulated_pairs([still(0), still(0)], seconds=seconds))
    assert judged(Budgets(max_drift_ppb=Fraction(10)), long, milliseconds=seconds * 1000).status is PASSED


def test_a_rate_that_changed_counts_for_drift() -> None:
    """Of a raw clock, by the run's halves; NTP's own slews of CLOCK_MONOTONIC do not count."""
    kinked = a_clock("monotonic_raw", 10**9)
    samples = kinked["samples"]
    assert isinstance(samples, list)
    for at, sample in enumerate(samples):
        sample[1] += max(at - 4, 0) * 6250
    raw_ppb = [
        judged(Budgets(max_drift_ppb=Fraction(ppb)), a_clock(), kinked, cpus=1).status for ppb in (40_000, 60_000)
    ]
    assert raw_ppb == [BROKEN, PASSED]
    slewed = {**kinked, "name": "monotonic"}
    budgets = Budgets(max_drift_ppb=Fraction(40_000))
    assert judged(budgets, a_clock(), slewed, cpus=1).status is UNDECIDED
    assert not judged(budgets, a_clock(), slewed, cpus=1).broken
