"""pytest's fixtures for tests of a guest's clock; pytest finds them by the entry point `pytest11`.

What a test has not asked for is not loaded: each fixture imports what it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from pvclock import GuestClock, Machine, SimulatedBackend
    from pvclock.boot import BootSource
    from pvclock.testing.clock_budget import ClockBudget

__all__ = ["clock_budget", "guest_clock", "kvm_machine", "simulated_backend"]

TSC_HZ: Final = 2_500_000_000
TSC: Final = 10**12
UTC_NS: Final = 1_800_000_000 * 10**9
MEMORY_BYTES: Final = 1 << 20
PAGE: Final = 0x1000
MSR_KVM_SYSTEM_TIME_NEW: Final = 0x4B564D01


@pytest.fixture
def simulated_backend() -> SimulatedBackend:
    """Return a host whose time moves only by its advance(ns=...): a TSC of 2.5 GHz that has counted 400 s."""
    from pvclock import SimulatedBackend

    return SimulatedBackend(TSC_HZ, tsc=TSC, ref_ns=TSC * 10**9 // TSC_HZ, realtime_ns=UTC_NS)


@pytest.fixture
def guest_clock(simulated_backend: SimulatedBackend) -> Iterator[GuestClock]:
    """Return the clock of a guest with one vCPU on `simulated_backend`; its page is registered, at 0x1000."""
    from pvclock import GuestClock, GuestMemory

    with GuestMemory(bytearray(MEMORY_BYTES)) as memory:
        clock = GuestClock(memory, backend=simulated_backend)
        clock.write_msr(0, MSR_KVM_SYSTEM_TIME_NEW, PAGE | 1)
        yield clock


@pytest.fixture
def kvm_machine() -> Iterator[Callable[..., Machine]]:
    """Return what makes a Machine of Machine's arguments, closed after the test.

    Skip where KVM cannot be used, or does not let the guest travel in time as it is asked to.

    Without an image its guest is clockprobe, whose vCPUs read their clock all the time, and runs already.
    """
    from pvclock.errors import KvmUnavailable, MissingCapability, TscOffsetNotHonoured
    from pvclock.testing.machines import made

    with ExitStack() as machines:

        def make(image: bytes | BootSource | None = None, **options: Any) -> Machine:  # noqa: ANN401  # Machine's
            try:
                return machines.enter_context(made(image, **options))
            except KvmUnavailable as error:
                pytest.skip(str(error))
            except (MissingCapability, TscOffsetNotHonoured) as error:
                if not options.get("time_travel"):
                    raise
                pytest.skip(str(error))

        yield make


@pytest.fixture
def clock_budget() -> type[ClockBudget]:
    """Return ClockBudget: its `with` block fails the test if the guest's clock stepped or drifted beyond it."""
    from pvclock.testing.clock_budget import ClockBudget

    return ClockBudget
