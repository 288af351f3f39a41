"""`pvclock watch` for people: units that fit, no digit beyond the bound, and a finding in one sentence."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock.host.watch import TroubleKind
from pvclock.meter.watch.changes import Disagreement, FlagsChange, PageLost, Stall, Step, TscBasis
from pvclock.meter.watch.host_troubles import HostTrouble
from pvclock.meter.watch.loop import Finding, VmEnded
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.sentences import sentences
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.meter.watch.words import (
    about_ns,
    counted,
    duration,
    exact_ns,
    flags_in_words,
    plain_ns,
    rate_in_words,
    reading,
    time_of_day,
    vcpus_in_words,
)
from pvclock.quantities import Gpa, GuestNs, HostTsc
from pvclock.readings import TimeInfo

pytestmark = pytest.mark.row("E3")

UNITS_NS = {"s": 10**9, "ms": 10**6, "us": 1000, "ns": 1}
PAGE = TimeInfo(2, 1, 2, 1 << 31, -1, 1)  # type: ignore[arg-type]  # units
STOP = VmEvent(VmEventKind.STOP, 10**18)
RESUME = VmEvent(VmEventKind.RESUME, 10**18 + 1_035_000_000)
STEP = Step(HostTsc(9), HostTsc(8), 0, PAGE, PAGE, 1, TscBasis.OFFSETS, -1_035_012_345, 2, None, None, ())


def meant_ns(text: str) -> Fraction:
    """Give the ns that a text stands for."""
    number, unit = re.fullmatch(r"([+-]?[\d .]+) (\w+)", text).groups()  # type: ignore[union-attr]  # else a failure
    return Fraction(number.replace(" ", "")) * UNITS_NS[unit]


@given(ns=st.integers(-(10**14), 10**14), bound_ns=st.integers(0, 10**10))
def test_a_time_says_what_its_bound_leaves(ns: int, bound_ns: int) -> None:
    """The text means the number to within half its last digit, which the bound's first digit covers."""
    assert abs(meant_ns(exact_ns(ns, bound_ns)) - ns) * 2 <= max(bound_ns, 1)


@given(ns=st.integers(-(10**14), 10**14))
def test_a_time_in_four_digits(ns: int) -> None:
    """A table's text is within 1/2000 of the number, and its unit leaves a whole part."""
    text = about_ns(ns)
    assert abs(meant_ns(text) - ns) * 2000 <= abs(ns)
    assert not text.lstrip("+-").startswith("0.")
    assert meant_ns(duration(ns)) == abs(meant_ns(text))


@pytest.mark.parametrize(
    ("ns", "bound_ns", "text"),
    [
        (-1_035_012_345, 2, "-1.035 012 345 s"),
        (2_100_000, 500_000, "+2.1 ms"),
        (115_712_345, 1000, "+115.712 ms"),
        (0, 1, "+0 ns"),
        (-4, 100, "+0 ns"),
        (999_999_999, 500_000, "+1.000 0 s"),
        (3_600_000_000_001, 1, "+3 600.000 000 001 s"),
        (-66_827, 252_080, "-100 us"),
    ],
)
def test_times_at_a_glance(ns: int, bound_ns: int, text: str) -> None:
    """Digits stand in threes, and only those that mean something."""
    assert exact_ns(ns, bound_ns) == text


@pytest.mark.parametrize(
    ("ppb", "bound_ppb", "text"),
    [
        (-64.671, 0.08, "-64.67 ppb, within 0.08"),
        (3.2, 25.0, "+3 ppb, within 25"),
        (12_345.6, 30.0, "+12.35 ppm, within 0.03"),
        (0.0, 0.0, "+0.000000 ppb, within 0.000000"),
        (-0.4, 1.0, "+0 ppb, within 1"),
    ],
)
def test_a_rate_with_its_bound(ppb: float, bound_ppb: float, text: str) -> None:
    """The bound's first digit is the last of both."""
    assert rate_in_words(ppb, bound_ppb) == text


def test_what_is_counted_and_chosen() -> None:
    """One is no plural, and a time that somebody chose is as it was written."""
    assert [counted(number, "poll") for number in (0, 1, 1234)] == ["0 polls", "1 poll", "1,234 polls"]
    assert [plain_ns(ns) for ns in (60 * 10**9, 10**7, 1500, Fraction(1, 2))] == ["60 s", "10 ms", "1.5 us", "0.5 ns"]


def test_what_stands_in_a_row() -> None:
    """A reading is s as in a kernel's messages, flags have names, and a time of day is UTC to the ms."""
    assert reading(GuestNs(12_345_678_901_234)) == "12345.678901 s"
    assert [flags_in_words(flags) for flags in (0, 1, 3, 7)] == [
        "-",
        "stable",
        "stable, stopped",
        "stable, stopped, 0x4",
    ]
    assert time_of_day(1_764_252_000_123_999_999) == "14:00:00.123"


SENTENCES = [
    (STEP, "vCPU 0 stepped by -1.035 012 345 s against the TSC"),
    (
        STEP._replace(seen_ns=2_100_000, seen_bound_ns=500_000, events=(STOP, RESUME)),
        (
            "vCPU 0 stepped by -1.035 012 345 s against the TSC, +2.10 ms (within 500 us) from STOP to RESUME; "
            "STOP, RESUME 1.035 s later"
        ),
    ),
    (
        STEP._replace(step_ns=7, basis=TscBasis.ASSUMED, lines=3),
        "vCPU 0 stepped by +7 ns against the TSC (if its TSC was not changed); 3 lines followed each other",
    ),
    (
        STEP._replace(step_ns=None, bound_ns=None, basis=TscBasis.CHANGED),
        "vCPU 0 got a new line: by how much it stepped is unknown, for the guest's TSC was changed, or may have been",
    ),
    (STEP._replace(step_ns=0), "vCPU 0 has its line written anew, without a step"),
    (
        STEP._replace(lines=0, step_ns=None, bound_ns=None, basis=TscBasis.CHANGED),
        "vCPU 0 has its line still, but its TSC was written: perhaps the guest was reset, and reads others",
    ),
    (STEP._replace(lines=0, step_ns=5000), "vCPU 0 has its line still, but its TSC was written: that is +5.000 us"),
    (
        Disagreement(HostTsc(9), 0, 1, 115_700_000, 2, 3_100_000, (STOP, RESUME), TscBasis.OFFSETS),
        (
            "vCPU 0's page gave up to 115.700 000 ms more than vCPU 1's, for at least 3.100 ms: a clock that was read "
            "by it went back by as much; STOP, RESUME 1.035 s later"
        ),
    ),
    (
        Disagreement(HostTsc(9), 0, 1, 115, 2, 3_100_000, (), TscBasis.OFFSETS, is_stale=True),
        (
            "vCPU 0's page gave up to 115 ns more than vCPU 1's, for at least 3.100 ms: vCPU 1 does not run, so its "
            "page is stale, and nobody reads it"
        ),
    ),
    (FlagsChange(HostTsc(9), 1, 1, 3), "vCPU 1: flags stable -> stable, stopped"),
    (PageLost(HostTsc(9), 1, "mul is 0"), "vCPU 1: the page is gone: mul is 0"),
    (Stall(HostTsc(9), 1_500_000_000), "no look for 1.500 s: what came and went meanwhile was not seen"),
    (PagesFound((Gpa(0x1000), Gpa(0x1040)), "as given"), "2 pages at 0x1000, 0x1040, as given"),
    (
        PagesFound((Gpa(0x1000),), "one page at 0x1000", 192 << 20, 0.25),
        "found in 192 MiB of its memory in 0.25 s: one page at 0x1000",
    ),
    (
        PagesFound(tuple(Gpa(0x1000 + 64 * vcpu) for vcpu in range(5)), "as given"),
        "5 pages at 0x1000, 0x1040, ..., 0x1100, as given",
    ),
    (RESUME, "the VMM says RESUME"),
    (HostTrouble(TroubleKind.SUSPEND, False, "it slept"), "the host: it slept"),
    (VmEnded("it is gone"), "the VM has ended"),
]


@pytest.mark.parametrize(("finding", "sentence"), SENTENCES, ids=[type(finding).__name__ for finding, _ in SENTENCES])
def test_a_finding_is_a_sentence(finding: Finding, sentence: str) -> None:
    """Each kind says what was found, how far it is known, and what the VMM did."""
    assert list(sentences([finding])) == [(finding, sentence)]


def test_vcpus_that_had_the_same_are_told_once() -> None:
    """Other numbers are another sentence."""
    same = [STEP._replace(vcpu=vcpu) for vcpu in (0, 1, 2, 5)]
    (_, first), (_, second) = sentences([*same, STEP._replace(vcpu=6, step_ns=-1)])
    assert first.startswith("vCPUs 0-2, 5 stepped by -1.035 012 345 s")
    assert second.startswith("vCPU 6 stepped by -1 ns")


@given(vcpus=st.sets(st.integers(0, 40), min_size=1))
def test_vcpus_in_words(vcpus: set[int]) -> None:
    """Runs of numbers have a hyphen, and none is lost."""
    runs = [run.split("-") for run in vcpus_in_words(sorted(vcpus)).split(" ", 1)[1].split(", ")]
    assert {number for run in runs for number in range(int(run[0]), int(run[-1]) + 1)} == vcpus
    assert all(int(after[0]) > int(before[-1]) + 1 for before, after in pairwise(runs))
