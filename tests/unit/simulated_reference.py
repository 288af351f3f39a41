"""A reference clock to follow in simulated time: its rate, its noise and its faults, and how a discipline fares."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc
from pvclock.readings import Sample
from pvclock.timekeeping.discipline import Discipline, Steering

HZ = 2_596_132_000


class SimulatedReference:
    """A clock that runs `rate(s)` off nominal, read within `noise_ns`.

    fault: what becomes of a reading, given (s, ns).  outliers: the part of readings that are up to 10 ms wrong and do
    not say so.
    """

    def __init__(
        self,
        rate: Callable[[float], float] = lambda _: 0.0,
        *,
        noise_ns: float = 20,
        fault: Callable[[float, float], float] = lambda _, ns: ns,
        outliers: float = 0,
        seed: int = 1,
    ) -> None:
        self.rate = rate
        self.fault = fault
        self.host_ns = Fraction(0)
        self._ahead_ns = 0.0  # of host time, in floating point: the sum would have no ns after a month
        self._noise_ns = noise_ns
        self._outliers = outliers
        self._random = random.Random(seed)  # noqa: S311  # no secret

    @property
    def s(self) -> float:
        """Nominal host time in s."""
        return float(self.host_ns) / NS_PER_S

    @property
    def lead_ns(self) -> float:
        """How far it shows more than nominal host time, without noise."""
        host_ns = float(self.host_ns)
        return self._ahead_ns + (self.fault(self.s, host_ns) - host_ns)

    def pass_time(self, ns: Fraction) -> None:
        """Let host time go on by `ns`."""
        self._ahead_ns += self.rate(self.s) * float(ns)
        self.host_ns += ns

    def read(self) -> tuple[int, float]:
        """What it shows now, and the bound that the reading claims."""
        bound_ns = self._noise_ns * self._random.uniform(0.3, 1)
        wrong_ns = self._random.uniform(-1e7, 1e7) if self._random.random() < self._outliers else 0.0
        error_ns = self.lead_ns + self._random.uniform(-bound_ns, bound_ns) + wrong_ns
        return self.host_ns.__floor__() + round(error_ns), bound_ns + 1


class Tick(NamedTuple):
    """One tick of a simulation: when (s of nominal host time), how far the clock truly lags, and what was done."""

    s: float
    lag_ns: float
    steering: Steering


def follow(
    reference: SimulatedReference, seconds: float, *, interval_s: float = 1, max_ppm: float = 500, tsc: int = 0
) -> Iterator[Tick]:
    """Tick a discipline for `seconds`, 10 % off the schedule either way; its clock does what it says, exactly."""
    schedule = random.Random(2)  # noqa: S311  # no secret
    discipline = Discipline(HZ, max_ppm)
    gained_ns = Fraction(0)  # by the clock, over nominal host time
    while reference.s < seconds:
        ns, bound_ns = reference.read()
        steering = discipline.steer(Sample(HostTsc(tsc), ns, bound_ns), reference.host_ns + gained_ns)
        yield Tick(reference.s, reference.lead_ns - float(gained_ns), steering)
        ticks = int(HZ * interval_s * schedule.uniform(0.9, 1.1))
        tsc = (tsc + ticks) & U64_MASK
        passed_ns = Fraction(ticks * NS_PER_S, HZ)
        gained_ns += passed_ns * steering.frequency_adjustment
        reference.pass_time(passed_ns)
