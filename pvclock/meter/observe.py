"""What a guest sees of its clock: left alone, across a pause, and while the clock follows a clock of its host.

The same observations are made of every `Guest`, so that clocks can be compared.  Those of a pause go by this host's
clocks and the guest's readings alone, not by what the server says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from typing import Final, NamedTuple

from pvclock.clock.guest_clock import GuestClock
from pvclock.errors import StateError
from pvclock.meter.findings import READS_PER_FLUSH
from pvclock.meter.guest import ClockServer, EngineGuest, Guest
from pvclock.payloads.probe import ProbeRecord
from pvclock.quantities import NS_PER_S
from pvclock.readings import Reference, TimeInfo
from pvclock.timekeeping.discipline import Steering
from pvclock.timekeeping.sampling import Sampler

__all__ = [
    "AcrossPause",
    "ClockObservation",
    "Following",
    "HostSample",
    "Pause",
    "Undisturbed",
    "observe_across_pause",
    "observe_clock",
    "observe_following",
    "observe_undisturbed",
    "wait_until_all_read",
]

SAMPLES: Final = 10
TRIES_LEAST: Final = 200
SAMPLES_LIMIT_S: Final = 0.3
SAMPLE_PAUSE_S: Final = 0.0002
SAMPLE_BOUND_NS: Final = 50_000
"""How old a guest's newest reading may be when it is compared with a clock of the host."""
STALE_SAMPLE_BOUND_NS: Final = 10_000_000
"""The same on a host with one CPU, where no vCPU runs while we sample: a change of threads, and a slow one."""
SPAN_S: Final = 0.5
PAUSE_S: Final = 0.3
"""Well above the time for which a busy host may keep a vCPU waiting, tens of ms."""
READ_ON_LIMIT_S: Final = 60.0

SETTLE_S: Final = 3.0
"""A rate from a second's baseline is 50 ppb wrong or less, and the error that this leaves is gone 2 s later."""
TICK_S: Final = 0.1


class Undisturbed(NamedTuple):
    """One clock left alone, as its guest saw it.

    rate_ppb: guest nanoseconds against nominal TSC time, less 1, from vCPU 0's first to its last reading; true to
    rate_bound_ppb, which is what 2 ns are over that span.  wall_clock_error_ns: the record plus the guest's time
    against the host's time of day.
    """

    server: ClockServer
    pages: list[TimeInfo]
    tsc_hz: int
    rate_ppb: float
    rate_bound_ppb: float
    wall_clock_ns: int
    wall_clock_error_ns: int
    records: list[ProbeRecord]


class Pause(NamedTuple):
    """A pause of a guest, which took least_ns to most_ns by the host's clock.

    least_ns: from pause() returned to resume() called; most_ns: from pause() called to resume() returned.  pages: as
    they were meanwhile; pages_by_server: the same as the server reads them, empty if it offers no such way.
    """

    least_ns: int
    most_ns: int
    pages: list[TimeInfo]
    pages_by_server: list[TimeInfo]


class AcrossPause(NamedTuple):
    """One clock before, during and after a pause of its guest.

    wall_clock_error_ns: the record plus the guest's time against CLOCK_REALTIME.  progress_ns: what the guest's clock
    gained on CLOCK_MONOTONIC_RAW in span_s before the pause.  left_out_ns: what it lost on that clock over the pause.
    All are true to sample_bound_ns.  before, after: pages.
    """

    sample_bound_ns: int
    wall_clock_error_ns: int
    progress_ns: int
    span_s: float
    left_out_ns: int
    pause: Pause
    before: list[TimeInfo]
    after: list[TimeInfo]
    records: list[ProbeRecord]


class Following(NamedTuple):
    """The rate of a guest's clock that followed a reference, against that, in ppb, true to bound_ppb.

    nominal_ppb: its rate at the TSC's nominal frequency, as the discipline found.
    """

    reference: Reference
    nominal_ppb: float
    steered_ppb: float
    bound_ppb: float


class ClockObservation(NamedTuple):
    """All observations of one clock; `following` only where the clock can follow one of the host's."""

    undisturbed: Undisturbed
    across_pause: AcrossPause
    following: Following | None = None

    @property
    def server(self) -> ClockServer:
        """The clock's server."""
        return self.undisturbed.server


class HostSample(NamedTuple):
    """How far a guest's newest reading is behind a clock of the host: lag_ns, or less by up to bound_ns."""

    lag_ns: int
    bound_ns: int


def observe_clock(make_guest: Callable[[], Guest], seconds: float) -> ClockObservation:
    """One clock, left alone for `seconds` in one guest and paused in another."""
    with make_guest() as guest:
        undisturbed = observe_undisturbed(guest, seconds)
    with make_guest() as guest:
        return ClockObservation(undisturbed, observe_across_pause(guest))


def observe_undisturbed(guest: Guest, seconds: float) -> Undisturbed:
    """Start `guest`, leave it and its clock alone for `seconds`, and end it."""
    guest.start()
    tsc_hz = guest.tsc_hz
    time.sleep(seconds)
    guest.check_running()
    epoch_ns = guest.epoch_ns()
    if epoch_ns is None:
        epoch_ns = _sample_host(guest, time.CLOCK_REALTIME).lag_ns
    records = guest.finish()
    wall_clock_ns = guest.wall_clock_ns()
    first = records[0]
    nominal_ns = Fraction((first.last_tsc - first.first_tsc) * NS_PER_S, tsc_hz)
    return Undisturbed(
        server=guest.server,
        pages=guest.pages(),
        tsc_hz=tsc_hz,
        rate_ppb=float(((first.last_ns - first.first_ns) / nominal_ns - 1) * NS_PER_S),
        rate_bound_ppb=float(2 * NS_PER_S / nominal_ns),
        wall_clock_ns=wall_clock_ns,
        wall_clock_error_ns=wall_clock_ns - epoch_ns,
        records=records,
    )


def observe_across_pause(guest: Guest) -> AcrossPause:
    """Start `guest`, compare its clock with the host's before and after a pause, and end it."""
    guest.start()
    try:
        return _observe_across_pause(guest)
    except StateError:
        guest.check_running()  # a guest that has ended is the better explanation
        raise


def _observe_across_pause(guest: Guest) -> AcrossPause:
    wall_clock_error_ns = guest.wall_clock_ns() - _sample_host(guest, time.CLOCK_REALTIME).lag_ns
    begin_ns, first = _raw_ns(), _sample_host(guest, time.CLOCK_MONOTONIC_RAW)
    time.sleep(SPAN_S)
    second, end_ns = _sample_host(guest, time.CLOCK_MONOTONIC_RAW), _raw_ns()
    before = guest.pages()
    pause = _pause(guest)
    _wait_for_more_reads(guest)
    third = _sample_host(guest, time.CLOCK_MONOTONIC_RAW)
    return AcrossPause(
        sample_bound_ns=max(sample.bound_ns for sample in (first, second, third)),
        wall_clock_error_ns=wall_clock_error_ns,
        progress_ns=first.lag_ns - second.lag_ns,
        span_s=(end_ns - begin_ns) / NS_PER_S,
        left_out_ns=third.lag_ns - second.lag_ns,
        pause=pause,
        before=before,
        after=guest.pages(),
        records=guest.finish(),
    )


def _pause(guest: Guest) -> Pause:
    asked_to_pause = _raw_ns()
    guest.pause()
    paused = _raw_ns()
    pages, pages_by_server = guest.pages(), guest.pages_by_server()
    time.sleep(PAUSE_S)
    asked_to_resume = _raw_ns()
    guest.resume()
    return Pause(asked_to_resume - paused, _raw_ns() - asked_to_pause, pages, pages_by_server)


def _wait_for_more_reads(guest: Guest) -> None:
    """Return when every vCPU has read its own page many times more, and then the newest reading has changed.

    Right after a resume the newest reading can be ahead: a vCPU that reads a page not set yet is ahead of all that read
    later.  StateError if they do not read on.
    """
    wait_until_all_read(guest)
    newest = guest.newest_ns()
    _wait_until(lambda: guest.newest_ns() > newest)


def wait_until_all_read(guest: Guest) -> None:
    """Return when every vCPU has read its own page many times more; StateError if they do not."""
    goals = [record.reads + 2 * READS_PER_FLUSH for record in guest.records()]
    _wait_until(lambda: all(record.reads >= goal for record, goal in zip(guest.records(), goals, strict=True)))


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READ_ON_LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise StateError("observe", f"not all vCPUs read on within {READ_ON_LIMIT_S:g} s of a pause", "try again")
        time.sleep(0.001)


def _sample_host(guest: Guest, clock: int) -> HostSample:
    """The best of many comparisons of the newest reading with a clock of the host.

    One counts if the newest reading changed during it: then a vCPU was running, and the reading is no older than the
    comparison was long.  If none does within SAMPLES_LIMIT_S and TRIES_LEAST (a host with one CPU), the least of all is
    taken.  A busy host may have no CPU for us for as long, and then there were few tries.
    """
    fresh: list[int] = []
    stale: list[int] = []
    deadline = time.monotonic() + SAMPLES_LIMIT_S
    while len(fresh) < SAMPLES and (len(stale) < TRIES_LEAST or time.monotonic() < deadline):
        begin, first = _raw_ns(), guest.newest_ns()
        newest, now, end = guest.newest_ns(), time.clock_gettime_ns(clock), _raw_ns()
        lags = fresh if newest != first and end - begin < SAMPLE_BOUND_NS else stale
        lags.append(now - newest)
        time.sleep(SAMPLE_PAUSE_S)  # a thread that has slept runs at once when it wakes, and leaves the guest the CPU
    return HostSample(min(fresh), SAMPLE_BOUND_NS) if fresh else HostSample(min(stale), STALE_SAMPLE_BOUND_NS)


def _raw_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


def observe_following(guest: EngineGuest, seconds: float, reference: Reference = Reference.RAW) -> Following:
    """Let the clock of `guest` follow `reference`, and compare the two over `seconds` once it has settled."""
    clock = guest.engine_clock
    guest.start()
    clock.follow(reference)
    sampler = Sampler(lambda: clock.backend.sample(reference))

    def compare() -> tuple[int, int, float]:
        """The guest's ns, the reference's at that TSC, and how far the latter can be wrong."""
        sample = sampler.sample()
        seen = guest.reading()
        since_ns = (seen.host_tsc - sample.tsc) * NS_PER_S // clock.backend.tsc_hz
        return seen.ns, sample.ns + since_ns, sample.bound_ns + 1

    _tick_for(clock, SETTLE_S)
    begin = compare()
    found = _tick_for(clock, seconds)
    end = compare()
    guest.finish()
    span_s = (end[1] - begin[1]) / NS_PER_S
    tolerated_ns = begin[2] + end[2]  # the discipline leaves an error within a sample's bound alone
    return Following(
        reference=reference,
        nominal_ppb=-found.rate.value * NS_PER_S,
        steered_ppb=((end[0] - begin[0]) - (end[1] - begin[1])) / span_s,
        bound_ppb=(begin[2] + end[2] + tolerated_ns) / span_s,
    )


def _tick_for(clock: GuestClock, seconds: float) -> Steering:
    """Tick a clock that follows a reference ten times a second, and once at least; what the last tick found."""
    deadline = time.monotonic() + seconds
    while True:
        found = clock.tick()
        assert found is not None  # noqa: S101  # it follows a reference
        if time.monotonic() >= deadline:
            return found
        time.sleep(TICK_S)
