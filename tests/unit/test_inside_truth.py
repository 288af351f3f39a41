"""Clocks whose truth is known, measured and judged: never a finding that is untrue, and always one beyond the floor."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock.meter.inside import Budgets, FindingCode, ProbeRecord, VerdictStatus, judge
from pvclock.meter.inside.drift import drift_of
from pvclock.meter.inside.rates import rate_change, tsc_hz_by
from pvclock.meter.inside.windows import all_windows
from tests.unit.inside_records import (
    TSC_HZ,
    Offset,
    a_clock,
    a_record,
    drifting,
    record_of,
    samples,
    simulated_pairs,
    still,
)

pytestmark = pytest.mark.row("E18")

LASTS = st.sampled_from([Fraction(0), Fraction(1, 10), Fraction(1)])
"""How much of its eighth of the run an exchange takes."""
WAYS = st.tuples(st.integers(10, 60), st.integers(60, 200))
"""ns that a cache line travels, the least and the most."""
HZ = st.sampled_from([TSC_HZ, 10**9, 10**7])
OFFSETS = st.lists(st.sampled_from([0, 0, 0, 70, 90, -400, 5000, 1_200_000]), min_size=2, max_size=4)
"""ns, in whole ticks of the TSC."""
SEEDS = st.integers(0, 2**32)


def measured(
    offsets: Sequence[Offset], hz: int, ways: tuple[int, int], seed: int, lasts: Fraction = Fraction(0)
) -> ProbeRecord:
    """Return the record of a clock whose CPUs have these offsets; the last one, and the TSC if it has its units."""
    pairs = simulated_pairs(offsets, hz, 1, seed, ways, rounds=4, lasts=lasts)
    clocks = [a_clock(pairs=pairs)] if hz == TSC_HZ else [a_clock(), a_clock("monotonic", hz, pairs)]
    return record_of(a_record(clocks, len(offsets)))


def most_apart(offsets: Sequence[int]) -> int:
    """Return by how much two of them differ at most."""
    return max(offsets) - min(offsets)


@given(OFFSETS, HZ, WAYS, SEEDS)
def test_every_window_holds_the_offset(offsets: list[int], hz: int, ways: tuple[int, int], seed: int) -> None:
    """Whatever a cache line's way takes in either direction, and whatever the clock's unit is."""
    record = measured([still(ns) for ns in offsets], hz, ways, seed)
    for (a, b), window in all_windows(record.clocks[-1], len(offsets)).items():
        assert window is not None
        assert window.low <= offsets[b] - offsets[a] <= window.high
        assert not window.moved


@given(OFFSETS, WAYS, SEEDS)
def test_windows_through_the_first_cpu_hold_the_offset(offsets: list[int], ways: tuple[int, int], seed: int) -> None:
    """Of many CPUs each is compared with the first alone; any other two are bounded by both windows, and looser."""
    record = measured([still(ns) for ns in offsets], TSC_HZ, ways, seed)
    own = all_windows(record.clocks[-1], len(offsets))
    starred = record.tsc._replace(pairs=tuple(pair for pair in record.tsc.pairs if pair.a == 0))
    for (a, b), window in all_windows(starred, len(offsets)).items():
        assert window is not None
        assert window.low <= offsets[b] - offsets[a] <= window.high
        assert window.is_direct is (a == 0)
        assert a > 0 or window == own[a, b]


@given(OFFSETS, HZ, WAYS, SEEDS)
def test_what_is_found_is_true_and_what_is_large_is_found(
    offsets: list[int], hz: int, ways: tuple[int, int], seed: int
) -> None:
    """No finding of equal clocks; bounds that hold the truth; and none missed beyond a round trip and two units."""
    verdict = judge(measured([still(ns) for ns in offsets], hz, ways, seed))
    apart = most_apart(offsets)
    assert all(each.code is FindingCode.OFFSET for each in verdict.findings)
    if apart == 0:
        assert not verdict.findings
    if apart > 2 * ways[1] + Fraction(2 * 10**9, hz) + Fraction(2 * 10**9, hz):
        assert verdict.findings
    differences = {abs(a - b) for a, b in combinations(offsets, 2)}
    for found in verdict.findings:
        assert found.low_ns is not None
        assert found.high_ns is not None
        assert any(found.low_ns <= each <= found.high_ns for each in differences)
    (floor,) = verdict.floors
    assert floor.ns is not None
    assert floor.apart_at_most_ns is not None
    assert floor.apart_at_most_ns >= apart
    assert floor.ns >= apart or verdict.findings


@given(st.integers(3, 5), st.integers(0, 4), st.sampled_from([-5000, 900, 1_200_000]), WAYS, SEEDS)
def test_the_odd_one_is_named(cpus: int, odd: int, by_ns: int, ways: tuple[int, int], seed: int) -> None:
    """One CPU that is apart from two or more others is the one that is named, first or not."""
    odd %= cpus
    offsets = [still(by_ns if cpu == odd else 0) for cpu in range(cpus)]
    (found,) = judge(measured(offsets, TSC_HZ, ways, seed)).findings
    assert found.cpus == (odd,)
    assert ("ahead of" if by_ns > 0 else "behind") in found.what


@given(OFFSETS, st.integers(0, 2_000_000), WAYS, SEEDS)
def test_a_budget_for_warps_is_judged_truly(
    offsets: list[int], budget_ns: int, ways: tuple[int, int], seed: int
) -> None:
    """What passes is within it, and what breaks it is beyond it."""
    record = measured([still(ns) for ns in offsets], 10**9, ways, seed)
    verdict = judge(record, Budgets(max_warp_ns=Fraction(budget_ns)))
    if verdict.status is VerdictStatus.PASSED:
        assert most_apart(offsets) <= budget_ns
    if verdict.status is VerdictStatus.BROKEN:
        assert most_apart(offsets) > budget_ns


@given(st.integers(-50_000, 50_000), LASTS, HZ, WAYS, SEEDS)
def test_a_drift_is_within_its_bounds(ppb: int, lasts: Fraction, hz: int, ways: tuple[int, int], seed: int) -> None:
    """The true drift always is; one is proven only if there is one, by no more than there was."""
    record = measured([still(0), drifting(ppb, 300)], hz, ways, seed, lasts)
    drift = drift_of(record.clocks[-1].pairs[0], record.clocks[-1], record.tsc_hz)
    assert drift is not None
    assert drift.low is not None
    assert drift.high is not None
    assert drift.low <= ppb <= drift.high
    assert abs(drift.moved_ns) <= abs(ppb)
    assert drift.moved_ns * ppb >= 0
    if abs(ppb) * Fraction(6, 8) > 4 * (ways[1] + Fraction(10**9, hz)):
        assert drift.moved_ns
        assert FindingCode.DRIFT in [each.code for each in judge(record).findings]


@given(st.integers(-5_000, 5_000), st.integers(1, 9_000), LASTS, WAYS, SEEDS)
def test_a_budget_for_drift_is_judged_truly(
    ppb: int, budget_ppb: int, lasts: Fraction, ways: tuple[int, int], seed: int
) -> None:
    """What passes is within it, and what breaks it is beyond it; the offset is allowed."""
    record = measured([still(0), drifting(ppb)], 10**9, ways, seed, lasts)
    verdict = judge(record, Budgets(Fraction(10**9), None, Fraction(budget_ppb)))
    if verdict.status is VerdictStatus.PASSED:
        assert abs(ppb) <= budget_ppb
    if verdict.status is VerdictStatus.BROKEN:
        assert abs(ppb) > budget_ppb


def uneven(hz: int, rate: Fraction, seed: int, seconds: int) -> list[list[int]]:
    """Return samples between readings of the TSC that lie anywhere around them, and may be far away."""
    chance = random.Random(seed)  # noqa: S311  # no secret
    found = samples(hz, rate, seconds, width_ns=0)
    for sample in found:
        sample[0] -= chance.choice([0, 30, 300, 30_000])
        sample[2] += chance.choice([0, 30, 300, 30_000])
    return found


@given(st.integers(-(10**6), 10**6), st.sampled_from([10**9, 10**7, 3_579_545, 1_193_182]), SEEDS, st.integers(1, 60))
def test_a_rate_is_within_its_bounds(ppb: int, hz: int, seed: int, seconds: int) -> None:
    """The TSC's frequency by a clock holds the true one, and a rate that stands still is never called changed."""
    rate = 1 + Fraction(ppb, 10**9)
    raw = a_clock("monotonic_raw", hz, samples=uneven(hz, rate, seed, seconds))
    record = record_of(a_record([a_clock(), raw], 1))
    clock = record.clocks[1]
    measured_hz = tsc_hz_by(clock)
    assert measured_hz is not None
    assert measured_hz.low <= TSC_HZ / rate <= measured_hz.high
    for change in (rate_change(clock), rate_change(clock, halves=True)):
        assert change is not None
        assert change.ppb.low <= 0 <= change.ppb.high
    assert not judge(record).findings


@given(st.integers(0, 10**6), st.integers(0, 10**6), SEEDS)
def test_a_rate_that_changes_is_found_if_it_is_large(before_ppb: int, after_ppb: int, seed: int) -> None:
    """And its change is within the bounds that are told."""
    early, late = (1 + Fraction(ppb, 10**9) for ppb in (before_ppb, after_ppb))
    taken = [
        [tsc_before, _kinked(early, late)(at), tsc_after]
        for at, (tsc_before, _, tsc_after) in enumerate(uneven(10**9, early, seed, 8))
    ]
    clock = record_of(a_record([a_clock(), a_clock("pvclock", 10**9, samples=taken)], 1)).clocks[1]
    halves = rate_change(clock, halves=True)
    assert halves is not None
    assert halves.ppb.low <= (late / early - 1) * 10**9 <= halves.ppb.high
    if abs(after_ppb - before_ppb) > 100_000:
        proven = rate_change(clock)
        assert proven is not None
        assert not proven.ppb.low <= 0 <= proven.ppb.high


def _kinked(early: Fraction, late: Fraction) -> Callable[[int], int]:
    """Return the clock's reading by the second: another rate after four."""
    return lambda at: int((min(at, 4) * early + max(at - 4, 0) * late) * 10**9)
