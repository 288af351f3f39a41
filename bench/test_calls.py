"""What a Python call costs: the clock's own beside time.monotonic_ns(), and others beside an empty extension's.

Both sides are statements in the same `for` loop, whose own cost (some 10 ns) is in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from timeit import Timer

import pytest

from bench.comparison import Comparison
from bench.published_clock import LINUX_STRIDE, MSR_SYSTEM_TIME, published_clock
from pvclock import ClockScale, GuestClock
from pvclock.providers.interface import HypercallRegisters
from pvclock.providers.kvm import KvmProvider

CALLS = 5000
EMPTY = "an extension's empty call"
TIME_PAGE_ENABLED = 0x1000 | 1
MSR_STEAL_TIME = 0x4B564D03
STEAL_TIME_ENABLED = 0x8000 | 1


@pytest.fixture
def clock(tsc_hz: int) -> Iterator[GuestClock]:
    """Return a clock with one page."""
    with published_clock(tsc_hz, 1, LINUX_STRIDE) as (made, _, _):
        yield made


def loop(statement: str, **names: object) -> Callable[[], float]:
    """Return a function that executes `statement` CALLS times."""
    # Local variables of the loop, as in code written for speed.
    locals_ = "; ".join(f"{name} = outer[{name!r}]" for name in names)
    timer = Timer(statement, setup=locals_, globals={"outer": names})
    return lambda: timer.timeit(CALLS)


def test_read(comparison: Comparison, clock: GuestClock) -> None:
    """clock.read(0) does what time.monotonic_ns() does, for a guest."""
    twin = ("time.monotonic_ns()", loop("now()", now=time.monotonic_ns))
    comparison.measure("clock.read(0)", loop("read(0)", read=clock.read), twin, operations=CALLS)


def test_reading(comparison: Comparison, clock: GuestClock, nothing: Callable[..., None]) -> None:
    """clock.reading(0) returns a tuple of TSC, ns, version and flags."""
    twin = (EMPTY, loop("nothing(0)", nothing=nothing))
    comparison.measure("clock.reading(0)", loop("reading(0)", reading=clock.reading), twin, operations=CALLS)


def test_to_ns(comparison: Comparison, tsc_hz: int, nothing: Callable[..., None]) -> None:
    """ClockScale.to_ns() is three instructions and a call."""
    ticks = 10**15
    twin = (EMPTY, loop("nothing(ticks)", nothing=nothing, ticks=ticks))
    to_ns = loop("to_ns(ticks)", to_ns=ClockScale.from_hz(tsc_hz).to_ns, ticks=ticks)
    comparison.measure("ClockScale.to_ns(ticks)", to_ns, twin, operations=CALLS)


def test_write_msr(comparison: Comparison, clock: GuestClock, nothing: Callable[..., None]) -> None:
    """A registration: the MSR's rules, the page's address, and a publish, which alone waits for 1024 ticks."""
    arguments = {"msr": MSR_SYSTEM_TIME, "value": TIME_PAGE_ENABLED}
    twin = (EMPTY, loop("nothing(0, msr, value)", nothing=nothing, **arguments))
    write_msr = loop("write_msr(0, msr, value)", write_msr=clock.write_msr, **arguments)
    comparison.measure("clock.write_msr(), registering", write_msr, twin, operations=CALLS)


def test_dispatch(comparison: Comparison, clock: GuestClock, nothing: Callable[..., None]) -> None:
    """A guest's RDMSR, from the VMM's exit handler to the provider's register and back."""
    twin = (EMPTY, loop("nothing(0, msr)", nothing=nothing, msr=MSR_SYSTEM_TIME))
    read_msr = loop("read_msr(0, msr)", read_msr=clock.read_msr, msr=MSR_SYSTEM_TIME)
    comparison.measure("clock.read_msr()", read_msr, twin, operations=CALLS)


def test_hypercall(comparison: Comparison, clock: GuestClock, nothing: Callable[..., None]) -> None:
    """The least of the hypercalls: counted, dispatched and answered."""
    registers = HypercallRegisters(rax=1)
    twin = (EMPTY, loop("nothing(0, registers)", nothing=nothing, registers=registers))
    hypercall = loop("hypercall(0, registers)", hypercall=clock.hypercall, registers=registers)
    comparison.measure("clock.hypercall(), VAPIC_POLL_IRQ", hypercall, twin, operations=CALLS)


def test_steal_time(comparison: Comparison, clock: GuestClock, nothing: Callable[..., None]) -> None:
    """A steal-time update: the record in guest memory under its version."""
    clock.write_msr(0, MSR_STEAL_TIME, STEAL_TIME_ENABLED)
    provider = clock.interface.provider
    assert isinstance(provider, KvmProvider)
    twin = (EMPTY, loop("nothing(0, 5)", nothing=nothing))
    add = loop("add_steal_time(0, 5)", add_steal_time=provider.add_steal_time)
    comparison.measure("add_steal_time()", add, twin, operations=CALLS)
