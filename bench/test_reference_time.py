"""What a reference TSC page adds to a publish: the same clock with the page and without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

from bench.comparison import Comparison
from bench.published_clock import MSR_SYSTEM_TIME
from pvclock import GuestClock, GuestMemory, HostBackend
from pvclock.machine.ram import Ram
from pvclock.meter.stress import republish

MSR_REFERENCE_TSC = 0x40000021
REFERENCE_PAGE = 0x8000
PUBLISHES = 4000
TWIN = "without the page"


@contextmanager
def clocks(tsc_hz: int) -> Iterator[tuple[GuestClock, GuestClock]]:
    """Make two clocks with a pvclock page, the first of which has a reference TSC page, too; some seconds old."""
    rams = [Ram(1 << 16), Ram(1 << 16)]
    made = [GuestClock(GuestMemory(ram.buffer), 1, "HyperV+KVM", backend=HostBackend(tsc_hz)) for ram in rams]
    for clock in made:
        clock.write_msr(0, MSR_SYSTEM_TIME, 0x1001)
        clock.skip(10**10)
    made[0].write_msr(0, MSR_REFERENCE_TSC, REFERENCE_PAGE | 1)
    yield made[0], made[1]
    for clock, ram in zip(made, rams, strict=True):
        clock.memory.close()
        ram.close()


def test_rate_changes(comparison: Comparison, tsc_hz: int) -> None:
    """Both kinds change at each publish; the break point comes up to a unit later for the reference TSC page."""
    with clocks(tsc_hz) as (clock, twin):
        rates = [Fraction(1), Fraction(999_999, 1_000_000)]
        comparison.measure(
            "publish of both kinds at a new rate",
            lambda: republish(clock, PUBLISHES, rates),
            (TWIN, lambda: republish(twin, PUBLISHES, rates)),
            operations=PUBLISHES,
        )


def test_refreshes(comparison: Comparison, tsc_hz: int) -> None:
    """A refresh at the same rate leaves the reference TSC page alone."""
    with clocks(tsc_hz) as (clock, twin):
        comparison.measure(
            "refresh with both kinds",
            lambda: republish(clock, PUBLISHES, [Fraction(1)]),
            (TWIN, lambda: republish(twin, PUBLISHES, [Fraction(1)])),
            operations=PUBLISHES,
        )


def test_counter(comparison: Comparison, tsc_hz: int) -> None:
    """The counter, read in this process, beside guest time by the page."""
    with clocks(tsc_hz) as (clock, _):
        units, read = clock.reference_time.units, clock.read

        def count() -> None:
            for _ in range(PUBLISHES):
                units()

        def read_page() -> None:
            for _ in range(PUBLISHES):
                read(0)

        comparison.measure("reference_time.units()", count, ("clock.read()", read_page), operations=PUBLISHES)
