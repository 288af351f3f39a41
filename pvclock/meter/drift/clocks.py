"""How guests' clocks drift beside a clock of this host: the engine's, the kernel's, that of a VM that runs already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import NamedTuple

from pvclock.meter.drift.host_reference import HostReference
from pvclock.meter.drift.readings import ClockReadings, Reanchor
from pvclock.meter.drift.reanchor import engine_reanchors, kernel_reanchors
from pvclock.meter.machine_guest import MachineGuest

__all__ = ["DriftingClock", "engine_clock", "kernel_clock", "take_readings"]


class DriftingClock(NamedTuple):
    """A clock whose drift is measured.

    word: how the user names it.  check: raises why its guest has ended.  correct: has the clock follow the reference
    before each reading; None if nobody does.  ways: those in which it comes to a new anchor.
    """

    word: str
    readings: ClockReadings
    check: Callable[[], None] = lambda: None
    correct: Callable[[], object] | None = None
    ways: Sequence[Reanchor] = ()


def engine_clock(host: HostReference, settle_s: float, resources: ExitStack) -> DriftingClock:
    """A guest of this process with the engine's clock, which follows the reference.  `resources` ends it."""
    guest = resources.enter_context(MachineGuest("engine", 1))
    guest.start()
    readings = host.readings(f"pvclock, {host.reference}", guest, settle_s)
    clock = guest.engine_clock
    clock.follow(host.reference)
    return DriftingClock("engine", readings, guest.check_running, clock.tick, engine_reanchors(guest))


def kernel_clock(host: HostReference, settle_s: float, resources: ExitStack) -> DriftingClock:
    """The same with the kernel's clock."""
    guest = resources.enter_context(MachineGuest("kernel", 1))
    guest.start()
    readings = host.readings("kernel kvmclock", guest, settle_s)
    return DriftingClock("kernel", readings, guest.check_running, ways=kernel_reanchors(guest, resources))


def take_readings(
    clocks: Sequence[DriftingClock],
    *,
    seconds: float,
    interval_s: float,
    wait: Callable[[float], bool],
) -> Iterator[float]:
    """Take a reading of each clock once an interval for `seconds`, and give the seconds that passed after each round.

    wait: sleeps for some seconds; True if that was the last round.  A guest's end is its error.
    """
    begin_s = due_s = monotonic()
    while True:
        for each in clocks:
            _take(each)
        passed_s = monotonic() - begin_s
        yield passed_s
        due_s = max(due_s + interval_s, monotonic())
        if passed_s >= seconds or wait(due_s - monotonic()):
            return


def _take(clock: DriftingClock) -> None:
    clock.check()
    if clock.correct is None:
        clock.readings.take()
        return
    before = clock.readings.page()  # a corrected rate changes no reading at the break point, so compare at once
    clock.correct()
    clock.readings.take(before)
