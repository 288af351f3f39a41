"""A guest may print any record: judging it ends in a verdict or in an error of ours, and in bounded time."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock.errors import PvclockError
from pvclock.meter.inside import Budgets, judge, parse_record, verdict_document
from tests.unit.inside_records import (
    BEGAN,
    INVARIANT,
    KVM_LEAVES,
    PAGE,
    TSC_HZ,
    a_clock,
    a_kernel,
    a_record,
    leaf,
    line,
    record_of,
    simulated_pairs,
    still,
)

pytestmark = pytest.mark.row("E18")

STEPS = {"reads": 5, "floor": 9, "forward": [5, 9, BEGAN], "backward": [-9, -5, BEGAN], "count": 2}
WARPS = [{"from": 0, "to": 1, "count": 1, "largest": 5}]
DOCUMENT = a_record(
    [
        a_clock(pairs=simulated_pairs([still(0), still(900)]), warps=WARPS, steps=STEPS),
        a_clock("pvclock", 10**9, simulated_pairs([still(0), still(0)], 10**9)),
        a_clock("acpi_pm", 3_579_545),
    ],
    leaves=[*KVM_LEAVES, INVARIANT, leaf(0x15, 2, 250, 24_000_000), leaf(0x16, 2900)],
    pages=[PAGE, {**PAGE, "cpu": 1}],
    kernel=a_kernel(complaints=["hrtimer: interrupt took 5 ns"]),
    added_ns=[0, 900],
)
BUDGETS = Budgets(Fraction(100), Fraction(100), Fraction(100))
EXTREMES = [0, 1, -1, 2, 7, 64, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1, 10**12, BEGAN]


def numbers(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:  # noqa: ANN401  # of a JSON document
    """Return the way to each number in a document."""
    if isinstance(value, dict):
        return [way for key, each in value.items() for way in numbers(each, (*path, key))]
    if isinstance(value, list):
        return [way for at, each in enumerate(value) for way in numbers(each, (*path, at))]
    return [path] if isinstance(value, int) else []


WAYS = numbers(DOCUMENT)


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_any_numbers_end_in_a_verdict(seed: int, count: int) -> None:
    """Zeros, wrapped and largest numbers in any places: judged, or refused with the place."""
    chance = random.Random(seed)  # noqa: S311  # no secret
    document = json.loads(line(DOCUMENT))
    for way in chance.sample(WAYS, count):
        inner = document
        for key in way[:-1]:
            inner = inner[key]
        inner[way[-1]] = chance.choice(EXTREMES)
    try:
        record = parse_record(line(document))
    except PvclockError:
        return
    for budgets in (None, BUDGETS):
        json.dumps(verdict_document(judge(record, budgets)))


@given(st.integers(0, 2**32))
def test_lists_of_any_length_end_in_a_verdict(seed: int) -> None:
    """Lists that are empty or cut."""
    chance = random.Random(seed)  # noqa: S311  # no secret
    document = json.loads(line(DOCUMENT))
    for clock in document["clocks"]:
        for key in ("samples", "pairs", "warps"):
            clock[key] = clock[key][: chance.randrange(10)]
        for pair in clock["pairs"]:
            pair["slices"] = [each[: chance.choice([1, 3])] for each in pair["slices"][: chance.randrange(9)]]
    for key in ("cpuid", "pages"):
        document[key] = document[key][: chance.randrange(3)]
    assert judge(parse_record(line(document)), BUDGETS).story


def test_64_cpus() -> None:
    """The largest machine that the probe measures: each CPU is compared with the first, and one of them is off."""
    middles = [BEGAN + (2 * at + 1) * TSC_HZ // 16 for at in range(8)]
    off = {5: 29_000}
    pairs = [
        {"cpus": [0, cpu], "rounds": 9, "slices": [[at, off.get(cpu, 0) - 99, off.get(cpu, 0) + 99] for at in middles]}
        for cpu in range(1, 64)
    ]
    warps = [{"from": a, "to": b, "count": 1, "largest": 28_000} for a in range(64) for b in range(64) if a == 5 != b]
    verdict = judge(record_of(a_record([a_clock(pairs=pairs, warps=warps)], 64)), BUDGETS)
    (found,) = verdict.findings
    assert found.cpus == (0, 5)
    assert "that of CPU 0; each CPU was compared with CPU 0 alone, so it may be CPU 0 that is off" in found.what
    assert "1 reading went back" in found.what


def test_64_cpus_that_all_differ() -> None:
    """One finding tells those that are furthest apart, and how many more there are."""
    middles = [BEGAN + (2 * at + 1) * TSC_HZ // 16 for at in range(8)]
    pairs = [
        {"cpus": [0, cpu], "rounds": 9, "slices": [[at, cpu * 29_000 - 99, cpu * 29_000 + 99] for at in middles]}
        for cpu in range(1, 64)
    ]
    (found,) = judge(record_of(a_record([a_clock(pairs=pairs)], 64))).findings
    assert found.cpus == (0, 63)
    assert found.what.startswith("CPU 63's TSC is 629.9")
    assert "it may be CPU 0 that is off; 62 more pairs are apart" in found.what
