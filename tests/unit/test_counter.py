"""Where ticks come from, and the backend for hosts whose TSC is steered."""

from __future__ import annotations

import time
from typing import cast

import pytest

from pvclock import Reference, TscOffsetNotHonoured, read_tsc
from pvclock._counter import HostCounter, KernelTimeCounter
from pvclock.kvm import Runner, Vcpu
from pvclock.kvm.backend import SteeredTscBackend

HZ = 2_596_132_000


class RecordingVcpu:
    """Takes TSC offsets as KVM does, and keeps them."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def get_tsc_khz(self) -> int:
        """The nominal rate."""
        return HZ // 1000

    def set_tsc_offset(self, offset: int) -> None:
        """Keep it."""
        self.offsets.append(offset)

    def run(self) -> None:
        """Nobody asks for it."""

    request_exit = run


@pytest.mark.row("E11")
@pytest.mark.parametrize("hz", [1, 10**9, HZ, 2**64 - 1])
def test_kernel_time_in_ticks(hz: int) -> None:
    """It is CLOCK_MONOTONIC_RAW times the frequency, rounded down, modulo 2^64, between two looks at that clock."""
    counter = KernelTimeCounter(hz)
    begin = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    ticks = counter.read()
    end = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    earliest = begin * hz // 10**9
    assert (ticks - earliest) % 2**64 <= end * hz // 10**9 - earliest
    assert counter.margin_ticks == HostCounter().margin_ticks


@pytest.mark.row("E9")
def test_a_steered_tsc_goes_forward_only() -> None:
    """What is set makes the guest's TSC kernel time plus the offset; setting it back is refused with the reason."""
    vcpu = RecordingVcpu()
    backend = SteeredTscBackend([cast("Vcpu", vcpu)], Runner([cast("Vcpu", vcpu)], lambda *_: True))
    for offset in (0, 5 << 40):
        backend.set_tsc_offset(0, offset)
        guest_tsc = read_tsc() + vcpu.offsets[-1]
        assert (guest_tsc - backend.counter.read() - offset + HZ) % 2**64 < 2 * HZ  # within a second either way
    with pytest.raises(TscOffsetNotHonoured, match="forward only"):
        backend.set_tsc_offset(0, 4 << 40)
    assert len(vcpu.offsets) == 2
    assert not backend.tsc_stable


@pytest.mark.row("E9")
def test_the_time_of_day_at_an_instant_of_kernel_time() -> None:
    """The pair that it gives is one instant: as far from the epoch as kernel time is from its own."""
    vcpus = [cast("Vcpu", RecordingVcpu())]
    backend = SteeredTscBackend(vcpus, Runner(vcpus, lambda *_: True))
    ticks, ns, _ = backend.sample(Reference.REALTIME)
    boot_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    assert abs(ns - ticks * 10**9 // HZ - boot_ns) < 10**7
