"""What a tick of many clocks takes: with a reference to follow, and without one."""

from __future__ import annotations

from collections.abc import Callable
from timeit import Timer

import pytest

from bench.comparison import Comparison
from bench.published_clock import MSR_SYSTEM_TIME
from pvclock import GuestClock, GuestMemory, SimulatedBackend

HZ = 2_596_146_000
NS_PER_S = 10**9
OFF_PPB = 67
LEARNT = 100
"""Ticks before the first that is measured: by then the rate is known, and as many points are kept as ever are."""


class Host:
    """A simulated host with `vms` clocks, whose reference is off its TSC's nominal rate."""

    def __init__(self, vms: int, reference: str) -> None:
        self.backend = SimulatedBackend(HZ)
        self.clocks = [
            GuestClock(GuestMemory(bytearray(1 << 13)), backend=self.backend, reference=reference) for _ in range(vms)
        ]
        for clock in self.clocks:
            clock.write_msr(0, MSR_SYSTEM_TIME, 0x1001)

    def pass_second(self) -> tuple[()]:
        """Let a second pass; tick() takes nothing of it."""
        self.backend.advance(ns=NS_PER_S)
        self.backend.ref_ns += OFF_PPB  # type: ignore[assignment]  # a RefNs and an int
        return ()

    def tick(self) -> None:
        """Tick every clock."""
        for clock in self.clocks:
            clock.tick()


@pytest.mark.parametrize("vms", [1, 64, 1000])
@pytest.mark.parametrize("reference", ["off", "raw"])
def test_tick(comparison: Comparison, nothing: Callable[..., None], vms: int, reference: str) -> None:
    """A round of ticks over VMs of one vCPU each, a second after the last, beside as many empty calls."""
    host = Host(vms, reference)
    for _ in range(LEARNT):
        host.pass_second()
        host.tick()
    calls = Timer(lambda: nothing(0))
    comparison.measure(
        f'a tick of {vms} VMs, reference "{reference}"',
        host.tick,
        ("as many empty calls", lambda: calls.timeit(vms)),
        operations=1,
        prepare=host.pass_second,
        parts=("VM", vms),
    )
