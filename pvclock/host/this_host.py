"""This host's own TSC and clocks, read together, and a backend of them alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Final

from pvclock._counter import Counter, HostCounter
from pvclock._sampling import sample_clock
from pvclock.arguments import whole
from pvclock.errors import TscOffsetNotHonoured
from pvclock.host.linux import asleep_bounds_ns, boot_id, host_clocksource, read_boot_id, tsc_of_each_cpu
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, RefNs, signed64
from pvclock.readings import HostStamps, Reference, Sample

__all__ = [
    "CLOCK_GRAIN_NS",
    "CLOCK_IDS",
    "HostBackend",
    "bracketed",
    "host_stamps",
    "measure_tsc_hz",
    "measured_tsc_hz",
    "wait_until",
]

CLOCK_IDS: Final = {
    Reference.RAW: time.CLOCK_MONOTONIC_RAW,
    Reference.MONOTONIC: time.CLOCK_MONOTONIC,
    Reference.REALTIME: time.CLOCK_REALTIME,
}
CLOCK_GRAIN_NS: Final = 1
"""Linux truncates its clocks to whole ns."""


class HostBackend:
    """This host's own TSC and clocks, without vCPUs, for readers in this process.  It honours no TSC offset."""

    counter_follows_host = True

    def __init__(self, tsc_hz: int | None = None) -> None:
        self.counter = HostCounter()
        self.tsc_hz = measure_tsc_hz() if tsc_hz is None else whole("tsc_hz", tsc_hz, 1, U64_MASK)
        self.tsc_stable = host_clocksource() == "tsc"

    @property
    def boot_id(self) -> str | None:
        """See Backend."""
        return read_boot_id()

    def sample(self, reference: Reference) -> Sample:
        """See Backend; its bound is about 20 ns."""
        return bracketed(reference, self.tsc_hz)

    def stamps(self) -> HostStamps:
        """See Backend."""
        return host_stamps(self.sample, self.tsc_hz)

    def tsc_readings(self) -> tuple[HostTsc, ...]:
        """See Backend."""
        return tsc_of_each_cpu(self.counter)

    def run_delay_ns(self, vcpu: int) -> int | None:
        """See Backend: no vCPU runs here."""
        return None

    def run_until(self, tsc: HostTsc) -> None:
        """See Backend: no vCPU runs here, so this waits."""
        wait_until(self.counter, tsc, self.tsc_hz)

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """See Backend."""
        if offset:
            raise TscOffsetNotHonoured(offset)

    def tsc_offset(self, vcpu: int) -> int | None:
        """See Backend."""
        return None

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """See Backend: no vCPU runs here."""
        return nullcontext()

    def vcpus_are_out(self) -> bool | None:
        """See Backend: the VMM guarantees it."""
        return None


def bracketed(reference: Reference, tsc_hz: int) -> Sample:
    """One instant on this host's TSC and on one of its clocks: the narrowest of 8 brackets."""
    tsc, ns, width_ticks = sample_clock(CLOCK_IDS[reference])
    return Sample(HostTsc(tsc), ns, width_ticks * NS_PER_S / (2 * tsc_hz) + CLOCK_GRAIN_NS)


def host_stamps(sample: Callable[[Reference], Sample], tsc_hz: int) -> HostStamps:
    """One instant on this host's clocks, that of a backend's sample() of CLOCK_MONOTONIC_RAW.

    UTC is extrapolated by TSC from a sample a few us earlier.
    """
    real, raw = sample(Reference.REALTIME), sample(Reference.RAW)
    passed_ns = signed64(raw.tsc - real.tsc) * NS_PER_S // tsc_hz
    return HostStamps(raw.tsc, RefNs(raw.ns), real.ns + passed_ns, boot_id(), asleep_bounds_ns()[0])


def wait_until(counter: Counter, tsc: HostTsc, tsc_hz: int) -> None:
    """Sleep until `counter` is at `tsc` or beyond; late by as long as this thread waits for a CPU."""
    while (left := signed64(tsc - counter.read())) > 0:
        time.sleep(left / tsc_hz)


def measure_tsc_hz(seconds: float = 0.1) -> int:
    """Measure this host's TSC frequency in Hz against CLOCK_MONOTONIC_RAW, rounded to a whole kHz.

    For hosts that do not report it (KVM does: Kvm.host_tsc_khz()).  Relative error: about 100 ns / seconds.
    """
    tsc0, ns0, _ = sample_clock(time.CLOCK_MONOTONIC_RAW)
    time.sleep(seconds)
    tsc1, ns1, _ = sample_clock(time.CLOCK_MONOTONIC_RAW)
    return round((tsc1 - tsc0) * 10**6 / (ns1 - ns0)) * 1000


@cache
def measured_tsc_hz() -> int:
    """As measure_tsc_hz(), once in this process: all that watch its clocks have the same frequency, to the Hz."""
    return measure_tsc_hz()
