"""What a tick of many clocks takes: with a reference to follow, and without one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from timeit import Timer

import pytest

from bench.comparison import Comparison
from bench.published_clock import LINUX_STRIDE, published_clock

ROUNDS_OF_TICKS = 20
REFERENCES = ["off", "raw", "monotonic"]


@pytest.mark.parametrize("vms", [1, 64, 1000])
@pytest.mark.parametrize("reference", REFERENCES)
def test_tick(comparison: Comparison, tsc_hz: int, nothing: Callable[..., None], vms: int, reference: str) -> None:
    """A round of ticks over VMs of one vCPU each, beside as many empty calls."""
    with ExitStack() as resources:
        clocks = [resources.enter_context(published_clock(tsc_hz, 1, LINUX_STRIDE)).clock for _ in range(vms)]
        for clock in clocks:
            clock.follow(reference)

        def ticks() -> None:
            for clock in clocks:
                clock.tick()

        def calls() -> None:
            for _ in clocks:
                nothing(0)

        rounds = max(ROUNDS_OF_TICKS // vms, 1)
        product, twin = Timer(ticks), Timer(calls)
        comparison.measure(
            f'a tick of {vms} VMs, reference "{reference}"',
            lambda: product.timeit(rounds),
            ("as many empty calls", lambda: twin.timeit(rounds)),
            operations=rounds,
            parts=("VM", vms),
        )
