"""A page's rate against a reference: drifts of 0.01 to 1000 ppb are found within the bound that is told."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from math import floor

import pytest

from pvclock.meter.watch.rate import PageRate, RateMeter
from pvclock.quantities import GuestNs, GuestTsc, HostTsc
from pvclock.readings import Sample, TimeInfo
from tests.oracle import NS_PER_S, scale_rate, time_scale
from tests.unit.watched_guest import log_uniform

CASES, MANY = 300, 10_000
PPB = 10**9
ROUNDED_PPB = 1e-6
"""What floating point makes of a rate."""


class Drifting:
    """A page's line, and a reference against which it drifts by `ppb`; samples come at random times within `span_s`."""

    def __init__(self, seed: int, *, outliers: bool = False) -> None:
        self.rng = rng = random.Random(seed)  # noqa: S311  # no secret
        self.khz, self.outliers = rng.randint(800_000, 5_000_000), outliers
        mul, shift = time_scale(NS_PER_S, self.khz * 1000)
        self.line = TimeInfo(2, GuestTsc(0), GuestNs(0), mul, shift, 1)
        self.ppb = Fraction(log_uniform(rng, 0.01, 1000)) * rng.choice([1, -1])
        self.ns_per_tick = scale_rate(mul, shift) / (1 + self.ppb / PPB)
        """The reference's."""
        self.begin_tsc, self.begin_ns = rng.randrange(2**63), rng.randrange(2**62)
        self.tsc = HostTsc(self.begin_tsc)
        self.span_s = log_uniform(rng, 1, 10**6)

    def samples(self) -> Iterator[Sample]:
        """Give samples, each off by up to its bound, now and then by what it does not say."""
        while True:
            bound_ns = self.rng.uniform(0, 300)
            wrong_ns = self.rng.choice([10**6, -(10**6)]) if self.outliers and self.rng.random() < 0.1 else 0
            true_ns = self.begin_ns + (self.tsc - self.begin_tsc) * self.ns_per_tick
            seen_ns = floor(true_ns + Fraction(self.rng.uniform(-bound_ns, bound_ns)) + wrong_ns)
            yield Sample(self.tsc, seen_ns, bound_ns + 1)
            self.tsc = HostTsc(self.tsc + floor(self.span_s / 30 * self.rng.uniform(0.1, 2) * self.khz * 1000))

    def measured(self, takes: int = 30) -> RateMeter:
        """Return a meter that has taken some."""
        samples = self.samples()
        meter = RateMeter(lambda: next(samples), self.khz * 1000)
        for _ in range(takes):
            meter.take()
        return meter


def wrong_rates(seeds: range) -> list[tuple[int, PageRate]]:
    """Return the rates that are not within their bound, or whose bound is not the samples'."""
    found = []
    for seed in seeds:
        drifting = Drifting(seed)
        rate = drifting.measured().rate_of(drifting.line)
        off_ppb, bound_ppb = abs(Fraction(rate.ppb or 0) - drifting.ppb), rate.bound_ppb or 0
        if not (off_ppb <= bound_ppb + ROUNDED_PPB and 0 < bound_ppb <= 10 * 2 * 301 / drifting.span_s):
            found.append((seed, rate))
    return found


@pytest.mark.row("E3")
def test_drifts_are_within_their_bound() -> None:
    """Whatever they are, and the bound is the samples' over the span."""
    assert wrong_rates(range(CASES)) == []


@pytest.mark.long
@pytest.mark.row("E3")
def test_many_drifts_are_within_their_bound() -> None:
    """The same 10,000 times."""
    assert wrong_rates(range(CASES, CASES + MANY)) == []


@pytest.mark.row("E3")
def test_samples_that_are_wrong_are_left_out() -> None:
    """A sample that is a ms off fits no line; the rate stays right."""
    drifting = Drifting(3, outliers=True)
    meter = drifting.measured(200)
    rate = meter.rate_of(drifting.line)
    assert abs(Fraction(rate.ppb or 0) - drifting.ppb) <= (rate.bound_ppb or 0) + ROUNDED_PPB
    assert meter.restarts == 0


@pytest.mark.row("E3")
def test_a_reference_that_is_set_begins_a_new_line() -> None:
    """After some samples that fit no line the rate is learnt anew, and that is told."""
    drifting = Drifting(4)
    samples = drifting.samples()
    set_ns = 0
    meter = RateMeter(lambda: (it := next(samples))._replace(ns=it.ns + set_ns), drifting.khz * 1000)
    for _ in range(20):
        meter.take()
    set_ns = 10**12
    for _ in range(20):
        meter.take()
    rate = meter.rate_of(drifting.line)
    assert meter.restarts == 1
    assert abs(Fraction(rate.ppb or 0) - drifting.ppb) <= (rate.bound_ppb or 0) + ROUNDED_PPB


@pytest.mark.row("E3")
def test_no_rate_without_a_measurement_or_for_a_scaled_tsc() -> None:
    """It says why."""
    drifting = Drifting(5)
    once = drifting.measured(1).rate_of(drifting.line)
    mul, shift = time_scale(NS_PER_S, drifting.khz * 1000 * 1001 // 1000)
    scaled = drifting.line._replace(tsc_to_system_mul=mul, tsc_shift=shift)
    other = drifting.measured().rate_of(scaled)
    known = RateMeter(lambda: Sample(HostTsc(0), 0, 1.0), drifting.khz * 1000, drifting.khz * 1001).rate_of(
        drifting.line
    )
    assert once[:2] == other[:2] == known[:2] == (None, None)
    assert "not sampled twice" in (once.why or "")
    assert "scaled" in (other.why or "")
    assert "scaled" in (known.why or "")
