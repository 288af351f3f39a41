"""What a guest sees of its clock: clockprobe run for a while, and what it and the host found.

The same observation is made of the engine's clock and of the kernel's, so that the two can be laid side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from typing import Final, Literal, NamedTuple

from pvclock._core import ClockScale, read_time_info
from pvclock.clock.guest_clock import GuestClock
from pvclock.errors import StateError
from pvclock.machine.machine import Machine
from pvclock.payloads import clockprobe, probe
from pvclock.quantities import NS_PER_S, U64_MASK
from pvclock.readings import Churn, Reference, TimeInfo
from pvclock.timekeeping.discipline import Steering
from pvclock.timekeeping.sampling import Sampler

__all__ = [
    "STORM_DILATIONS",
    "Observation",
    "Steered",
    "Storm",
    "failures",
    "finish",
    "newest_reading",
    "observe",
    "observe_steered",
    "probe_machine",
    "shown_by",
    "storm",
    "wait_until_reading",
]

BOOT_LIMIT_S: Final = 60.0
EXIT_LIMIT_S: Final = 10.0

STORM_DILATIONS: Final = [Fraction(n, d) for n, d in ((10, 1), (1, 10), (1, 1), (355, 113), (7, 3), (1, 3), (9, 8))]
"""Rates from 1/10 to 10/1, taken in turn."""

PUBLISHES_PER_SECOND: Final = 150_000
"""What a storm keeps to, as long as the host is fast enough; in between the readers have the CPUs to themselves."""
BURST: Final = 1000
READING_TRIES: Final = 50
READING_PAUSE_S: Final = 0.002
STEER_S: Final = 3.0
"""A rate from a second's baseline is 50 ppb wrong or less, and the error that this leaves is gone 2 s later."""
TICK_S: Final = 0.1
REST_S: Final = 0.001


class Observation(NamedTuple):
    """One clock, as its guest saw it.

    rate_ppb: guest nanoseconds against nominal TSC time, from a vCPU's first to its last reading, beside 1; true to
    rate_bound_ppb, which is what 2 ns are over that span.  wall_clock_error_ns: the record plus the guest's time
    against the host's time of day.
    """

    clock: str
    pages: list[TimeInfo]
    tsc_hz: int
    rate_ppb: float
    rate_bound_ppb: float
    wall_clock_ns: int
    wall_clock_error_ns: int
    records: list[probe.ProbeRecord]


class Steered(NamedTuple):
    """A guest's clock that followed a reference: its rate against that, in ppb, true to bound_ppb.

    nominal_ppb: what it would have been at the TSC's nominal rate, as the discipline found.
    """

    reference: Reference
    nominal_ppb: float
    steered_ppb: float
    bound_ppb: float


class Storm(NamedTuple):
    """A guest reading while its clock changes rate and anchor all the time."""

    seconds: float
    churn: Churn
    records: list[probe.ProbeRecord]

    @property
    def publishes_per_second(self) -> float:
        """Over the whole run, rests included."""
        return self.churn.publishes / max(self.seconds, 1e-9)

    @property
    def reads(self) -> int:
        """Of all vCPUs."""
        return sum(record.reads for record in self.records)

    @property
    def failures(self) -> dict[str, int]:
        """Readings that no correct clock gives, by kind, over all vCPUs."""
        return failures(self.records)


def failures(records: list[probe.ProbeRecord]) -> dict[str, int]:
    """Backward, wild and torn readings, summed over `records`."""
    kinds = ("backward_own", "backward_cross", "wild", "torn")
    return {kind: sum(getattr(record, kind) for record in records) for kind in kinds}


def probe_machine(clock: Literal["engine", "kernel"], vcpus: int) -> Machine:
    """A machine with clockprobe in it, not started yet; its clock is left alone."""
    return Machine(clockprobe(), vcpus=vcpus, clock=clock, cmdline=f"cpus={vcpus}", tick_interval_s=None)


def wait_until_reading(machine: Machine) -> None:
    """Return once all vCPUs of a started clockprobe read their clock; StateError if they do not."""
    deadline = time.monotonic() + BOOT_LIMIT_S
    while (block := probe.read_block(machine.memory)) is None or block.phase < probe.Phase.READING:
        if machine.runner.join(0.001):
            machine.wait()  # says why it ended
            break
        if time.monotonic() > deadline:
            said = machine.console.strip() or "nothing"
            raise StateError(
                "observe", f"clockprobe has not begun after {BOOT_LIMIT_S:g} s, and said {said}", "try again"
            )
    if block is None or block.cpus_arrived != len(machine.vcpus):
        raise StateError("observe", f"not all {len(machine.vcpus)} vCPUs of clockprobe began: {block}", "try again")


def finish(machine: Machine) -> list[probe.ProbeRecord]:
    """Let clockprobe end, and return what its vCPUs found."""
    probe.stop(machine.memory)
    machine.wait(EXIT_LIMIT_S)
    return [probe.read_record(machine.memory, vcpu) for vcpu in range(len(machine.vcpus))]


def observe(clock: Literal["engine", "kernel"], seconds: float, vcpus: int = 2) -> Observation:
    """Let clockprobe read `clock`, left alone, for `seconds`."""
    with probe_machine(clock, vcpus) as machine:
        tsc_hz = machine.vcpus[0].get_tsc_khz() * 1000
        machine.start()
        wait_until_reading(machine)
        time.sleep(seconds)
        epoch_ns = _host_epoch_ns(machine)
        records = finish(machine)
        pages = [read_time_info(machine.memory, probe.time_page_address(vcpu)) for vcpu in range(vcpus)]
        wall_clock_ns = _wall_clock_ns(machine)
    first = records[0]
    nominal_ns = Fraction((first.last_tsc - first.first_tsc) * NS_PER_S, tsc_hz)
    return Observation(
        clock=clock,
        pages=pages,
        tsc_hz=tsc_hz,
        rate_ppb=float(((first.last_ns - first.first_ns) / nominal_ns - 1) * NS_PER_S),
        rate_bound_ppb=float(2 * NS_PER_S / nominal_ns),
        wall_clock_ns=wall_clock_ns,
        wall_clock_error_ns=wall_clock_ns - epoch_ns,
        records=records,
    )


def newest_reading(machine: Machine) -> tuple[int, int]:
    """vCPU 0's newest reading, its TSC and ns, by the page that it has now; its vCPUs leave the guest for some us.

    A reading that the stop has cut in two, or that is of an older page, is not taken.  StateError if there is no other.
    """
    for _ in range(READING_TRIES):
        with machine.runner.quiesce(None):
            record = probe.read_record(machine.memory, 0)
            page = read_time_info(machine.memory, probe.time_page_address(0))
        if shown_by(page, record.last_tsc) == record.last_ns:
            return record.last_tsc, record.last_ns
        time.sleep(READING_PAUSE_S)
    raise StateError("observe", "vCPU 0 of clockprobe does not read", "give it a CPU, and its own memory")


def shown_by(page: TimeInfo, tsc: int) -> int:
    """What a guest makes of a page at its TSC, in ns."""
    scale = ClockScale(page.tsc_to_system_mul, page.tsc_shift)
    return (page.system_time + scale.to_ns((tsc - page.tsc_timestamp) & U64_MASK)) & U64_MASK


def observe_steered(seconds: float, reference: Reference = Reference.RAW) -> Steered:
    """Let the engine's clock follow `reference`, and compare the two over `seconds`, once it knows the rate."""
    with probe_machine("engine", 1) as machine:
        clock = machine.clock
        assert clock is not None  # noqa: S101  # it is the engine's
        machine.start()
        wait_until_reading(machine)
        clock.follow(reference)
        sampler = Sampler(lambda: clock.backend.sample(reference))

        def beside() -> tuple[int, int, float]:
            """The guest's ns, the reference's at that TSC, and the bound of the latter."""
            sample = sampler.sample()
            tsc, ns = newest_reading(machine)
            since_ns = (tsc - clock.tsc(0).offset - sample.tsc) * NS_PER_S // clock.backend.tsc_hz
            return ns, sample.ns + since_ns, sample.bound_ns + 1

        _tick_for(clock, STEER_S)
        begin = beside()
        found = _tick_for(clock, seconds)
        end = beside()
        finish(machine)
    span_s = (end[1] - begin[1]) / NS_PER_S
    tolerated_ns = begin[2] + end[2]  # the discipline leaves an error within a sample's bound alone
    return Steered(
        reference=reference,
        nominal_ppb=-found.rate.value * NS_PER_S,
        steered_ppb=((end[0] - begin[0]) - (end[1] - begin[1])) / span_s,
        bound_ppb=(begin[2] + end[2] + tolerated_ns) / span_s,
    )


def _tick_for(clock: GuestClock, seconds: float) -> Steering:
    """Tick a clock that follows a reference, ten times a second and once at least; what the last tick found."""
    deadline = time.monotonic() + seconds
    while True:
        found = clock.tick()
        assert found is not None  # noqa: S101  # it follows a reference
        if time.monotonic() >= deadline:
            return found
        time.sleep(TICK_S)


def storm(
    seconds: float,
    vcpus: int = 2,
    dilations: list[Fraction] = STORM_DILATIONS,
    progress: Callable[[Storm], None] = lambda _: None,
) -> Storm:
    """Let clockprobe read while its pages are republished all the time at ever other rates.

    `progress` hears of the state now and then.  The publishes come in bursts, PUBLISHES_PER_SECOND over all.
    """
    with probe_machine("engine", vcpus) as machine:
        clock = machine.clock
        assert clock is not None  # noqa: S101  # the engine's machine has one
        machine.start()
        wait_until_reading(machine)
        begin = time.monotonic()
        so_far = Storm(0.0, clock.churn(BURST, dilations), [])
        while so_far.seconds < seconds:
            if so_far.publishes_per_second > PUBLISHES_PER_SECOND:
                time.sleep(REST_S)
            churn = so_far.churn.plus(clock.churn(BURST, dilations))
            records = [probe.read_record(machine.memory, vcpu) for vcpu in range(vcpus)]
            so_far = Storm(time.monotonic() - begin, churn, records)
            progress(so_far)
        return so_far._replace(records=finish(machine))


def _host_epoch_ns(machine: Machine) -> int:
    """UTC at guest time 0, in ns, by the host's clocks."""
    if machine.clock is not None:
        real = machine.clock.backend.sample(Reference.REALTIME)
        return real.ns - machine.clock.at(real.tsc).__floor__()
    now = machine.vm.get_clock()
    if now["realtime"]:
        return now["realtime"] - now["clock"]
    # Without a master clock KVM does not say what time of day it was at that instant.
    return min((_bracketed_epoch_ns(machine) for _ in range(8)), key=lambda epoch: epoch[1])[0]


def _bracketed_epoch_ns(machine: Machine) -> tuple[int, int]:
    """UTC at guest time 0, and the width of the bracket, in ns."""
    begin = time.time_ns()
    clock = machine.vm.get_clock()["clock"]
    width = time.time_ns() - begin
    return begin + width // 2 - clock, width


def _wall_clock_ns(machine: Machine) -> int:
    _, sec, nsec = (int.from_bytes(machine.memory.read(probe.WALL_CLOCK + at, 4), "little") for at in (0, 4, 8))
    return sec * NS_PER_S + nsec
