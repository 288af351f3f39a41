"""The timeline's own arithmetic, on numbers chosen so that the right result is exact and can be worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from pvclock import GuestNs, HostTsc, RangeError
from pvclock.readings import ClockLine
from pvclock.timekeeping.catchup import CatchUpTable, Slew
from pvclock.timekeeping.timeline import RateTerms, Timeline

GHZ = 10**9
"""A TSC that counts ns: its ticks are 1 ns, so that a rate is the ns in a tick."""


@pytest.mark.row("E9", "E11")
def test_a_segment_begins_at_the_anchors_fraction() -> None:
    """A timeline that goes on from a line's anchor begins at its ns and its remainder, no fraction of a ns off."""
    timeline = Timeline(HostTsc(1000), GHZ)
    timeline.resume_from(ClockLine(HostTsc(5000), GuestNs(7_000_000), 1, 3, 3), RateTerms())
    assert timeline.at(HostTsc(5000)) == Fraction(21_000_001, 3)
    assert timeline.at(HostTsc(5006)) == Fraction(21_000_019, 3)


# Slews


@pytest.mark.row("E2", "E9")
@pytest.mark.parametrize("begin", [0, 2**64 - 10**9], ids=["below the wrap", "across the wrap"])
@pytest.mark.parametrize("after", [0, 3, 2**63, 2**64 - 1])
def test_a_slews_last_stretch_ends_where_it_was_to_after_a_renumbering(begin: int, after: int) -> None:
    """A host TSC that is renumbered halfway leaves a stretch of 2 s its second half, to the tick."""
    timeline = Timeline(HostTsc(begin), GHZ)
    timeline.slew(HostTsc(begin), Fraction(1000), Slew(500))
    assert timeline.plan(HostTsc(begin)) == Fraction(500, 10**9)
    slow = Fraction(100, 10**9)  # by less than was planned, so that a new plan is another
    timeline.begin_segment(HostTsc(begin), RateTerms(slew=slow))
    timeline.rebase(HostTsc((begin + 10**9) % 2**64), HostTsc(after))
    assert timeline.copy().plan(HostTsc((after + 5 * 10**8) % 2**64)) != slow  # 1.5 s after the last plan, 0.5 s early
    for halvings in range(30):  # a plan each time half of what was left has passed, to the last tick
        assert timeline.plan(HostTsc((after + 10**9 - (8 * 10**8 >> halvings)) % 2**64)) == slow
    assert timeline.skew_at(HostTsc((after + 10**9) % 2**64)) == 800
    assert timeline.plan(HostTsc((after + 10**9) % 2**64)) == Fraction(400, 10**9)


@pytest.mark.row("E2")
@pytest.mark.parametrize("sign", [1, -1])
def test_a_skew_that_takes_a_stretch_at_full_speed_is_slewed_evenly(sign: int) -> None:
    """A skew of 1 ms at 500 ppm takes 2 s: a plan made halfway keeps to that, and in the end nothing is left."""
    timeline, slew = Timeline(HostTsc(0), GHZ), sign * Fraction(500, 10**6)
    timeline.slew(HostTsc(0), Fraction(sign * 10**6), Slew(500))
    assert timeline.plan(HostTsc(0)) == slew
    timeline.begin_segment(HostTsc(0), RateTerms(slew=slew))
    assert timeline.plan(HostTsc(10**9)) == slew
    assert timeline.skew_at(HostTsc(2 * 10**9)) == 0
    assert timeline.plan(HostTsc(2 * 10**9)) == 0


@pytest.mark.row("E2")
@pytest.mark.parametrize(("early", "is_kept"), [(1, False), (499_999_999, False), (500_000_001, True)])
def test_a_stretch_ends_at_the_plan_that_is_nearest_to_its_end(early: int, is_kept: bool) -> None:
    """Plans come 1 s apart: one that is somewhat early for the end is for it, or the next one would be far too late."""
    timeline, slew = Timeline(HostTsc(0), GHZ), Fraction(500, 10**6)
    timeline.slew(HostTsc(0), Fraction(10**6), Slew(500))
    timeline.begin_segment(HostTsc(0), RateTerms(slew=timeline.plan(HostTsc(0))))
    end = 2 * 10**9
    assert timeline.plan(HostTsc(end - early - 10**9)) == slew
    assert (timeline.plan(HostTsc(end - early)) == slew) == is_kept


@pytest.mark.row("E2", "E12")
@pytest.mark.parametrize("skew_ns", [Fraction(1, 2), Fraction(1), Fraction(-1, 2), Fraction(-1)])
def test_a_skew_of_less_than_a_ns_is_slewed_towards_nothing(skew_ns: Fraction) -> None:
    """A guest at a thousandth of the host's rate, by a policy without tolerance: half a ns is worked off in 2 s."""
    timeline = Timeline(HostTsc(0), GHZ, terms=RateTerms(Fraction(1, 1000)))
    timeline.slew(HostTsc(0), skew_ns, CatchUpTable(((0, 5),), 0, 10**9))
    slew = timeline.plan(HostTsc(0))
    assert slew == skew_ns / (2 * 10**6)  # 2 s of the host are 2 * 10^6 ns of the guest
    timeline.begin_segment(HostTsc(0), RateTerms(Fraction(1, 1000), slew))
    assert timeline.skew_at(HostTsc(2 * 10**9)) == 0


# For the page


@pytest.mark.row("E11")
@pytest.mark.parametrize(
    ("rate", "shown"),
    [
        (Fraction(3, 2**63) + Fraction(1, 2**100), Fraction(3, 2**63)),
        (1 - Fraction(1, 2**63) + Fraction(1, 2**100), 1 - Fraction(1, 2**63)),
        (1 + Fraction(1, 2**63) + Fraction(1, 2**100), 1 + Fraction(1, 2**63)),
        (2 + Fraction(1, 2**62) + Fraction(1, 2**100), 2 + Fraction(1, 2**62)),
        (2**30 + Fraction(1, 2**33) + Fraction(1, 2**100), 2**30 + Fraction(1, 2**33)),
        (2**30 + Fraction(2, 2**33) - Fraction(1, 2**100), 2**30 + Fraction(1, 2**33)),
    ],
    ids=str,
)
def test_a_rate_of_more_than_64_bits_is_cut_to_64(rate: Fraction, shown: Fraction) -> None:
    """What is left of a long fraction is 64 bits of it, or 63 behind the point: slower by 2^-63 at most."""
    num, den = Timeline(HostTsc(0), GHZ).ns_per_tick(rate)
    assert Fraction(num, den) == shown
    assert max(num, den) < 2**64
    assert 0 <= rate - shown <= max(Fraction(1), rate) / 2**63


@pytest.mark.row("E11", "E12")
@pytest.mark.parametrize(
    "rate",
    [Fraction(2**64 - 1, 2**64 - 59), Fraction(2**64 - 59, 2**64 - 1), Fraction(1), Fraction(1, 2**63), Fraction(2, 3)],
    ids=str,
)
def test_a_rate_whose_terms_have_64_bits_is_exact(rate: Fraction) -> None:
    """It is not cut, and its terms fill the 64 bits, so that the remainder that goes with them is as fine as can be."""
    num, den = Timeline(HostTsc(0), GHZ).ns_per_tick(rate)
    assert Fraction(num, den) == rate
    assert max(num, den).bit_length() == 64


LEAST = Fraction(5, 2) / 2**63
"""Dilation of which 2/5 is 2^-63 ns a tick: a clock slowed by half, on a host 10 % slower than nominal."""
MOST = Fraction(2**31 * 10, 111)
"""Dilation of which 11.1 times is 2^31 ns a tick: a clock sped up by 1000 %, on a host 10 % faster than nominal."""
HAIR = Fraction(1, 10**12)


@pytest.mark.row("E12", "E11")
@pytest.mark.parametrize("dilation", [LEAST, LEAST * (1 + HAIR), Fraction(1), MOST * (1 - HAIR)])
@pytest.mark.parametrize("hz", [GHZ, 2_596_132_000])
def test_dilations_that_pages_can_show(dilation: Fraction, hz: int) -> None:
    """From 2^-63 to 2^31 ns a tick with room for each slew: such a dilation is accepted, on any host's TSC."""
    Timeline(HostTsc(0), hz).check(dilation * hz / 10**9)


@pytest.mark.row("E12", "E13")
@pytest.mark.parametrize("dilation", [LEAST * (1 - HAIR), MOST, MOST * (1 + HAIR)])
@pytest.mark.parametrize("hz", [GHZ, 2_596_132_000])
def test_dilations_that_pages_cannot_show(dilation: Fraction, hz: int) -> None:
    """Beyond that a dilation is refused, and the message has both ends of what can be: 2.71e-19 and 1.93e+08."""
    with pytest.raises(RangeError, match=r"a page can show 2\.71e-19 to 1\.93e\+08, with room for slews"):
        Timeline(HostTsc(0), hz).check(dilation * hz / 10**9)
