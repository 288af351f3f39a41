"""Samples of a reference: which are good, and what a run of them says of its rate."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import HostBackend, HostTsc, RangeError, Reference, Sample, SimulatedBackend
from pvclock.timekeeping.sampling import POINTS_KEPT, Baseline, Point, Sampler


def point(nominal_ns: float, deviation_ns: float, bound_ns: float) -> Point:
    """A point by its middle."""
    return Point(nominal_ns, deviation_ns - bound_ns, deviation_ns + bound_ns)


def source_of(bounds: Sequence[float]) -> Sampler:
    """A sampler whose source gives samples with these bounds, in turn; the sample's ns says which it was."""
    samples = iter([Sample(HostTsc(0), place, bound) for place, bound in enumerate(bounds)])
    return Sampler(lambda: next(samples))


@pytest.mark.row("E3", "E11")
def test_a_bad_sample_is_dropped() -> None:
    """A sample far worse than is usual is left out and another taken; of four bad ones the best is given."""
    sampler = source_of([20] * 10 + [500, 21] + [900, 800, 700, 750])
    assert [sampler.sample().ns for _ in range(11)] == [*range(10), 11]
    assert sampler.dropped == 1
    assert sampler.sample().bound_ns == 700
    assert sampler.dropped == 4


@pytest.mark.row("E3")
def test_a_source_that_becomes_worse_is_believed_in_time() -> None:
    """What is usual follows the source: a host that becomes slower is not sampled four times for ever."""
    sampler = source_of([20] * 16 + [400] * 100)
    for _ in range(30):
        sampler.sample()
    dropped = sampler.dropped
    for _ in range(20):
        sampler.sample()
    assert sampler.dropped == dropped


@pytest.mark.row("E3")
def test_bounds_below_half_a_ns_count_as_half_a_ns() -> None:
    """A source of whole ns that claims to be exact: 1.5 ns is 3 times what is usual and good; more is dropped."""
    sampler = source_of([0] * 8 + [1.5] + [1.6, 0.25])
    assert [sampler.sample().bound_ns for _ in range(9)] == [0] * 8 + [1.5]
    assert sampler.dropped == 0
    assert sampler.sample().bound_ns == 0.25
    assert sampler.dropped == 1


@pytest.mark.row("E3")
def test_of_an_even_number_of_bounds_the_lower_median_is_usual() -> None:
    """The second sample is measured against the first one's bound and not its own, the fourth against the second."""
    sampler = source_of([10, 31, 12, 36, 37, 11])
    assert [sampler.sample().bound_ns for _ in range(3)] == [10, 12, 36]  # medians 10, then 12 of four
    assert sampler.sample().bound_ns == 37  # the median is now 31, of five
    assert sampler.dropped == 1


@pytest.mark.row("E3", "E13")
def test_the_least_tolerance_is_1() -> None:
    """A sampler may take only what is no worse than usual: a sample a hair above the median is dropped."""
    samples = iter([Sample(HostTsc(0), 0, bound) for bound in (20, 20, 20.5, 20)])
    sampler = Sampler(lambda: next(samples), tolerance=1)
    assert [sampler.sample().bound_ns for _ in range(3)] == [20, 20, 20]
    assert sampler.dropped == 1


@pytest.mark.row("E13")
@pytest.mark.parametrize(("tries", "tolerance"), [(0, 3), (4, 0.5)])
def test_a_sampler_is_checked(tries: int, tolerance: float) -> None:
    """A sampler that never samples, or takes nothing, is an error."""
    with pytest.raises(RangeError, match="1 or more"):
        Sampler(lambda: Sample(HostTsc(0), 0, 0), tries=tries, tolerance=tolerance)


@pytest.mark.row("E3", "E11")
@pytest.mark.parametrize("reference", list(Reference))
def test_samples_of_this_host(reference: Reference) -> None:
    """A bracket is true and narrow: the host's clock, read before and after it, agrees, by less than lies between."""
    clock_id = {"raw": time.CLOCK_MONOTONIC_RAW, "monotonic": time.CLOCK_MONOTONIC, "realtime": time.CLOCK_REALTIME}
    backend = HostBackend()
    sampler = Sampler(lambda: backend.sample(reference))
    for _ in range(50):
        begin_ns = time.clock_gettime_ns(clock_id[reference])
        sample = sampler.sample()
        end_ns = time.clock_gettime_ns(clock_id[reference])
        assert begin_ns - sample.bound_ns <= sample.ns <= end_ns + sample.bound_ns
        assert 0 < sample.bound_ns < end_ns - begin_ns


@pytest.mark.row("E3")
def test_samples_of_a_simulated_host() -> None:
    """They are what was set, within a tick."""
    backend = SimulatedBackend(1000, tsc=5, ref_ns=7, realtime_ns=9)
    assert backend.sample(Reference.RAW) == backend.sample(Reference.MONOTONIC) == (5, 7, 10**6)
    assert backend.sample(Reference.REALTIME) == (5, 9, 10**6)


points = st.lists(
    st.tuples(st.floats(-1, 1), st.floats(0.5, 1000), st.integers(1, 10**10)), min_size=2, max_size=3 * POINTS_KEPT
)


@pytest.mark.row("E3", "E9")
@given(rate=st.floats(-1e-3, 1e-3), errors=points)
def test_a_baseline_tells_the_truth(rate: float, errors: list[tuple[float, float, int]]) -> None:
    """Of points within their bounds of a line: all are admitted, and its rate and place are within what is said."""
    baseline = Baseline(steepest=2e-3)
    nominal_ns = 0.0
    for error, bound_ns, step_ns in errors:
        assert baseline.admit(point(nominal_ns, rate * nominal_ns + error * bound_ns, bound_ns + 0.001))
        found = baseline.rate
        assert abs(found.value - rate) <= found.bound + 1e-15
        value, place_bound_ns = baseline.deviation_at(nominal_ns, found.value)
        assert abs(value - rate * nominal_ns) <= place_bound_ns + 0.01
        nominal_ns += step_ns
    assert len(baseline.points) <= POINTS_KEPT


@pytest.mark.row("E3", "E11")
def test_a_bound_shrinks_as_the_baseline_grows() -> None:
    """It never grows, and over 1000 times the time it shrinks by 500 or more; what thinned-out points said is kept."""
    baseline, bounds = Baseline(), []
    source = random.Random(1)  # noqa: S311  # no secret
    for second in range(1, 10_001):
        before = baseline.rate.bound
        baseline.admit(point(second * 1e9, source.uniform(-20, 20), 20))
        assert baseline.rate.bound <= before
        if second in (10, 100, 1000, 10_000):
            bounds.append(baseline.rate.bound)
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < bounds[0] / 500


@pytest.mark.row("E3", "E9")
def test_what_no_line_allows_is_not_admitted() -> None:
    """Points off the line, too steep, or not later than the last one: refused, and nothing changes."""
    baseline = Baseline(steepest=500e-6)
    for second in range(10):
        assert baseline.admit(point(second * 1e9, 0, 10))
    rate, kept = baseline.rate, list(baseline.points)
    for wrong in (point(10e9, 50, 10), point(10e9, 1e9, 10), point(9e9, 0, 10), point(5e9, 0, 10)):
        assert not baseline.admit(wrong)
    assert (baseline.rate, baseline.points) == (rate, kept)
    assert baseline.admit(point(10e9, 19, 10))


@pytest.mark.row("E3")
def test_a_new_run_takes_what_fits_of_the_old_one() -> None:
    """The newest points of the old run that lie on a line with the new ones, and none before one that is off it."""
    run = Baseline()
    run.admit(point(100e9, 100, 1))
    run.admit(point(101e9, 101, 1))
    old = [point(second * 1e9, max(second, 50), 1) for second in range(100)]
    run.extend_back(old)
    assert [it.nominal_ns / 1e9 for it in run.points] == [*range(48, 102)]
    assert run.rate.value == pytest.approx(1e-9, rel=0.1)
