"""What saving and restoring a clock with many vCPUs takes: one Python call beside an empty extension's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from timeit import Timer

import pytest

from bench.comparison import Comparison
from bench.published_clock import LINUX_STRIDE, published_clock
from pvclock import GuestClock, GuestMemory
from pvclock.state.clock_state import from_json, to_json

VCPUS = 64
CALLS = 20
EMPTY = "an extension's empty call"


@pytest.fixture
def clock(tsc_hz: int) -> Iterator[GuestClock]:
    """Return a paused clock with 64 pages."""
    with published_clock(tsc_hz, VCPUS, LINUX_STRIDE) as (made, _, _):
        made.pause()
        yield made


def times(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that calls CALLS times."""
    timer = Timer(call)
    return lambda: timer.timeit(CALLS)


@pytest.mark.parametrize("what", ["save()", "restore()", "save() and restore()", "to_json()", "from_json()"])
def test_state(comparison: Comparison, clock: GuestClock, nothing: Callable[..., None], what: str) -> None:
    """A state of 64 vCPUs: taken, made a clock of, written and read."""
    state = clock.save()
    document = to_json(state)
    memory = GuestMemory(bytearray(1 << 20))  # another one, which the clock restored takes over
    calls: dict[str, Callable[[], object]] = {
        "save()": clock.save,
        "restore()": lambda: GuestClock.restore(state, memory, backend=clock.backend),
        "save() and restore()": lambda: GuestClock.restore(clock.save(), memory, backend=clock.backend),
        "to_json()": lambda: to_json(state),
        "from_json()": lambda: from_json(document),
    }
    twin = (EMPTY, times(lambda: nothing(0)))
    comparison.measure(f"{what}, {VCPUS} vCPUs", times(calls[what]), twin, operations=CALLS)
