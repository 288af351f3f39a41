"""Reading the clock as a guest does: in C beside the vDSO and a bare TSC, in a guest beside the kernel's kvmclock."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Literal

import pytest

from bench.c_twins import Twins
from bench.comparison import Comparison, Figure
from bench.published_clock import LINUX_STRIDE, published_clock
from pvclock.meter.machine_guest import MachineGuest
from pvclock.meter.observe import observe_undisturbed

READS = 100_000
GUEST_SECONDS = 0.15
GUEST_ROUNDS = 7


def compare(comparison: Comparison, twins: Twins, tsc_hz: int, title: str, twin: Callable[[int], object]) -> None:
    """Measure pvclock_read() in C beside `twin`."""
    with published_clock(tsc_hz, 1, LINUX_STRIDE) as (_, layout, _):
        comparison.measure(
            "pvclock_read() in C",
            lambda: twins.pvclock_read(layout.memory, READS),
            (title, lambda: twin(READS)),
            operations=READS,
        )


def test_read_beside_vdso(comparison: Comparison, twins: Twins, tsc_hz: int) -> None:
    """Linux does the same for its own programs: a TSC, a page, a sequence count."""
    compare(comparison, twins, tsc_hz, "clock_gettime() by the vDSO", twins.vdso)


def test_read_beside_fenced_rdtsc(comparison: Comparison, twins: Twins, tsc_hz: int) -> None:
    """No ordered reading can be faster than this."""
    compare(comparison, twins, tsc_hz, "lfence; rdtsc", twins.fenced_rdtsc)


@pytest.mark.kvm
@pytest.mark.usefixtures("kvm")
def test_read_in_a_guest(comparison: Comparison) -> None:
    """Run clockprobe on a real vCPU: it reads, and checks each reading."""
    engine_ns: list[float] = []
    kernel_ns: list[float] = []
    comparison.benchmark.pedantic(
        lambda: engine_ns.append(guest_read_ns("engine")),
        setup=lambda: kernel_ns.append(guest_read_ns("kernel")),
        rounds=GUEST_ROUNDS,
    )
    title = "clockprobe in a guest, a read and its checks"
    comparison.record(Figure(title, median(engine_ns), "on the kernel's kvmclock", median(kernel_ns)))


def guest_read_ns(clock: Literal["engine", "kernel"]) -> float:
    """Return what a read takes in a guest, in ns of its own clock."""
    with MachineGuest(clock, 1) as guest:
        record = observe_undisturbed(guest, GUEST_SECONDS).records[0]
    return (record.last_ns - record.first_ns) / record.reads
