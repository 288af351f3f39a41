"""Bounds in words: rounded outwards, so that what is said is true, in the unit and digits that fit."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock.meter.inside.words import (
    at_least,
    between,
    cpus_in_words,
    far_end,
    floor_in_words,
    hz_in_words,
    listed,
    ppm_between,
    rate_in_words,
    signed_between,
)

pytestmark = pytest.mark.row("E18")

LENGTHS = st.builds(Fraction, st.integers(0, 10**12), st.integers(1, 10**4))
NS_IN = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}


def ns_said(text: str) -> Fraction:
    """Return the length of time that a text says."""
    number, unit = text.split()
    return Fraction(number) * NS_IN[unit]


@given(LENGTHS)
def test_a_length_is_rounded_outwards(ns: Fraction) -> None:
    """What is said to be proven is, and what is said to be possible is no less."""
    assert ns_said(at_least(ns)) <= ns <= ns_said(floor_in_words(ns))
    assert at_least(-ns) == at_least(ns)


@given(LENGTHS, LENGTHS)
def test_a_span_is_rounded_outwards(low: Fraction, width: Fraction) -> None:
    """Both ends, by no more than a tenth of the width or so; a negative span is the same length."""
    low_said, _, high_said = between(low, low + width).partition(" to ")
    near, far = ns_said(low_said), ns_said(high_said or low_said)
    assert near <= low
    assert far >= low + width
    assert far - near <= width * Fraction(13, 10) + 2 + low / 500
    assert between(-low - width, -low) == between(low, low + width)


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (Fraction(123456789, 100), Fraction(123456799, 100), "1.2345678 ms to 1.234568 ms"),
        (Fraction(100), Fraction(200), "100 ns to 200 ns"),
        (Fraction(0), Fraction(1, 3), "0 ns to 0.4 ns"),
        (Fraction(2900), Fraction(3100), "2.9 us to 3.1 us"),
        (Fraction(10**9), Fraction(10**9), "1 s"),
    ],
)
def test_spans(low: Fraction, high: Fraction, says: str) -> None:
    """As they are read."""
    assert between(low, high) == says


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (Fraction(-20), Fraction(30), "-20 to +30 ppb"),
        (Fraction(19_999), Fraction(20_001), "+19.9 to +20.1 ppm"),
        (Fraction(-34_490_000), Fraction(-34_480_123), "-3.449 to -3.448 %"),
        (Fraction(0), Fraction(5), "0 to +5 ppb"),
    ],
)
def test_rates(low: Fraction, high: Fraction, says: str) -> None:
    """In ppb or ppm, signed, rounded outwards."""
    assert ppm_between(low, high) == says


def test_a_rate_without_its_sign() -> None:
    """Rounded up."""
    assert (rate_in_words(Fraction(-10)), rate_in_words(Fraction(123456, 10))) == ("10 ppb", "12.4 ppm")
    assert rate_in_words(Fraction(50_000_001)) == "5.001 %"


@given(LENGTHS, LENGTHS)
def test_a_signed_span_has_the_digits_of_its_lengths(low: Fraction, width: Fraction) -> None:
    """The same bound is the same number in a sentence and in a table, whatever its sign."""
    assert signed_between(low, low + width).replace("+", "") == between(low, low + width)
    assert between(low, low + width).endswith(far_end(low, low + width))
    assert signed_between(-low, low + 1) == f"-{floor_in_words(low)} to +{floor_in_words(low + 1)}".replace("-0 ", "0 ")


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ([2], "CPU 2"),
        ([1, 0], "CPUs 0 and 1"),
        ([0, 1, 2, 5], "CPUs 0 to 2 and 5"),
        ([7, 3, 4, 9, 10, 11], "CPUs 3, 4, 7 and 9 to 11"),
    ],
)
def test_cpus(numbers: list[int], says: str) -> None:
    """In runs, so that 64 of them are a short text."""
    assert cpus_in_words(numbers) == says


def test_lists_and_frequencies() -> None:
    """With and, and with thousands."""
    assert (listed([]), listed(["a"]), listed(["a", "b", "c"])) == ("", "a", "a, b and c")
    assert (hz_in_words(Fraction(2_900_000_001, 2)), hz_in_words(Fraction(3, 2), up=True)) == (
        "1,450,000,000 Hz",
        "2 Hz",
    )
