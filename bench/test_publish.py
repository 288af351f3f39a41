"""A publish, by the number of pages and their distance: the product's loop and its Python call beside a loop in C."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest

from bench.c_twins import Twins
from bench.comparison import Comparison
from bench.published_clock import LINUX_STRIDE, PublishedClock, published_clock
from pvclock.meter.stress import republish

PUBLISHES = {1: 4000, 8: 4000, 64: 1000, 1024: 100}
"""In a round, by the number of pages."""

TWIN = "pvclock_publish() in C"


@pytest.fixture(params=[LINUX_STRIDE, 4096], ids=["64B", "4KiB"])
def stride(request: pytest.FixtureRequest) -> int:
    """Return the distance of pages in bytes."""
    return int(request.param)


@pytest.fixture(params=PUBLISHES, ids="{}p".format)
def published(request: pytest.FixtureRequest, tsc_hz: int, stride: int) -> Iterator[PublishedClock]:
    """Return a clock with its pages laid out so."""
    with published_clock(tsc_hz, request.param, stride) as made:
        yield made


def test_republish(comparison: Comparison, twins: Twins, published: PublishedClock) -> None:
    """republish(): the product's own loop, without the GIL."""
    clock, layout, rate = published
    pages, stride = layout.pages, layout.stride
    publishes = PUBLISHES[pages]
    comparison.measure(
        f"publish by republish(), {pages} x {stride} B",
        lambda: republish(clock, publishes, [Fraction(1)]),
        (TWIN, lambda: twins.publish(layout, rate, publishes)),
        operations=publishes,
        parts=("page", pages),
    )


def test_refresh(comparison: Comparison, twins: Twins, published: PublishedClock) -> None:
    """clock.refresh() from Python."""
    clock, layout, rate = published
    pages, stride = layout.pages, layout.stride
    publishes = PUBLISHES[pages]

    def refresh() -> None:
        for _ in range(publishes):
            clock.refresh()

    comparison.measure(
        f"publish by refresh(), {pages} x {stride} B",
        refresh,
        (TWIN, lambda: twins.publish(layout, rate, publishes)),
        operations=publishes,
        parts=("page", pages),
    )
