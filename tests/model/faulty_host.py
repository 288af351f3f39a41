"""A simulated host whose TSC, TSC offsets and vCPUs fail when they are told to."""

from __future__ import annotations

from contextlib import AbstractContextManager

from pvclock import SimulatedBackend
from pvclock.quantities import HostTsc

__all__ = ["FaultyHost", "NoQuiesce"]


class NoQuiesce(Exception):
    """The vCPUs did not leave the guest."""


class FaultyHost(SimulatedBackend):
    """Simulated host time with faults, each of which comes once.

    refuse: (vCPU, error) of the next set_tsc_offset() for that vCPU.  low_by: so many ticks too low is what the TSC
    reads until it is looked at a second time.  faults: how many have come.
    """

    def __init__(self, tsc_hz: int, tsc: int = 0, ref_ns: int = 0, realtime_ns: int = 0) -> None:
        super().__init__(tsc_hz, tsc, ref_ns, realtime_ns)
        self.refuse: tuple[int, Exception] | None = None
        self.refused_vcpu: int | None = None  # that of the last refusal
        self.holds_vcpus = True
        self.low_by = 0
        self.faults = 0

    @property
    def true_tsc(self) -> int:
        """What the TSC of a good CPU reads, at a second look."""
        return self.tsc + self.cpu_lag_ticks + self.low_by

    def read_low(self, ticks: int) -> None:
        """Let the TSC read low, until the second look."""
        self.tsc, self.low_by = HostTsc(self.tsc - ticks), ticks

    def look_again(self) -> None:
        """The second look: the TSC is right."""
        self.faults += self.low_by != 0
        self.tsc, self.low_by = HostTsc(self.tsc + self.low_by), 0

    def tsc_readings(self) -> tuple[HostTsc, ...]:
        """See Backend."""
        self.look_again()
        return super().tsc_readings()

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """See Backend."""
        if self.refuse is not None and self.refuse[0] == vcpu:
            (self.refused_vcpu, error), self.refuse = self.refuse, None
            self.faults += 1
            raise error
        super().set_tsc_offset(vcpu, offset)

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """See Backend."""
        if not self.holds_vcpus:
            self.faults += 1
            raise NoQuiesce
        return super().quiesce(vcpu)
