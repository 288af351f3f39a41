"""A host's TSC that reads low: once, on one CPU, or on all, and then right again."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Literal

import pytest

from pvclock import GuestClock, GuestMemory, HostTsc, SimulatedBackend, StateError
from pvclock.clock.guest_clock import TSC_STABLE_BIT
from pvclock.meter.stress import republish
from pvclock.readings import HostStamps, Sample
from pvclock.timekeeping.events import EventKind
from tests import oracle
from tests.unit.clocks import NS_PER_S, SYSTEM_TIME, guest_ns, guest_tsc, page_of, shown

HZ: Final = 2_500_000_000
HOUR_S: Final = 3600
FORTY_DAYS_S: Final = 40 * 86400
WALL_CLOCK: Final = 0x4B564D00
UTC_S: Final = 1_800_000_000

glitches = pytest.mark.parametrize("glitch_s", [HOUR_S, FORTY_DAYS_S])
ways_to_look = pytest.mark.parametrize("look", [GuestClock.refresh, GuestClock.tick])


def a_vm(tsc: int = 10**17) -> tuple[GuestClock, SimulatedBackend, GuestMemory]:
    """A VM of two vCPUs that has run for 1 s."""
    backend = SimulatedBackend(HZ, tsc=tsc, ref_ns=4 * 10**12, realtime_ns=UTC_S * NS_PER_S)
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 2, backend=backend)
    for vcpu, gpa in enumerate((0x2000, 0x2040)):
        clock.write_msr(vcpu, SYSTEM_TIME, gpa | 1)
    backend.advance(ns=NS_PER_S)
    clock.tick()
    return clock, backend, memory


def steps(clock: GuestClock) -> list[str]:
    """What was told of the TSC's steps."""
    return [event.why for event in clock.events.read().events if event.kind is EventKind.TSC_STEP]


def guests_read(backend: SimulatedBackend, memory: GuestMemory, ns: int) -> bool:
    """Do both vCPUs' guests, by their pages and their RDTSC, read that time?"""
    return all(abs(guest_ns(backend, memory, vcpu) - ns) <= 1 for vcpu in range(2))


def is_stable(clock: GuestClock) -> bool:
    """Do pages say that TSCs are in step?"""
    return bool(page_of(clock).flags & TSC_STABLE_BIT)


class OtherCpu:
    """A CPU whose TSC is 5 s behind the others'; within it, that is the one that we run on."""

    lag: Final = 5 * HZ

    def __init__(self, backend: SimulatedBackend) -> None:
        self._backend = backend

    def __enter__(self) -> None:
        self._backend.tsc = HostTsc(self._backend.tsc - self.lag)
        self._backend.cpu_lag_ticks = self.lag

    def __exit__(self, *_: object) -> None:
        self._backend.tsc = HostTsc(self._backend.tsc + self.lag)
        self._backend.cpu_lag_ticks = 0


# Once


@pytest.mark.row("E9", "E11")
@ways_to_look
def test_a_reading_that_is_right_at_the_second_look(look: Callable[[GuestClock], object]) -> None:
    """Guest time goes on by what passed, STABLE goes off, and it is told."""
    clock, backend, memory = a_vm()
    right = HostTsc(backend.tsc + HZ)
    backend.advance(ns=NS_PER_S)
    backend.tsc = HostTsc(right - HOUR_S * HZ)

    def look_again() -> tuple[HostTsc, ...]:
        backend.tsc = right
        return right, right

    backend.tsc_readings = look_again  # type: ignore[method-assign]  # the glitch is gone
    look(clock)
    assert clock.now() == 2 * NS_PER_S
    assert guests_read(backend, memory, 2 * NS_PER_S)
    assert not is_stable(clock)
    assert len(steps(clock)) == 1


@pytest.mark.row("E9", "E11")
def test_a_reading_that_is_right_at_the_second_look_only() -> None:
    """A thread that is back on the CPU that is behind does nothing there: it is no glitch that is over."""
    clock, backend, memory = a_vm()
    right = HostTsc(backend.tsc + HZ)
    backend.advance(ns=NS_PER_S)
    pages = memory.read(0x2000, 0x60)
    with OtherCpu(backend):
        backend.tsc_readings = lambda: (right, right)  # type: ignore[method-assign]  # read while it was elsewhere
        with pytest.raises(StateError, match="behind"):
            clock.dilate(2)
        assert memory.read(0x2000, 0x60) == pages


# On one CPU


@pytest.mark.row("E9", "E5")
@ways_to_look
def test_pages_do_not_move_where_one_cpu_is_behind(look: Callable[[GuestClock], object]) -> None:
    """Nothing is published from there: guests on other CPUs read on; the next publish takes STABLE off."""
    clock, backend, memory = a_vm()
    backend.advance(ns=NS_PER_S)
    image = memory.read(0, 1 << 16)
    with OtherCpu(backend):
        look(clock)
        look(clock)
        assert memory.read(0, 1 << 16) == image
    assert clock.now() == 2 * NS_PER_S
    look(clock)
    assert not is_stable(clock)
    assert guests_read(backend, memory, 2 * NS_PER_S)
    (why,) = steps(clock)
    assert re.findall(r"\d+", why) == [f"{4 * HZ}"]


@pytest.mark.row("E9", "E5")
def test_each_time_that_a_cpu_is_behind_is_told_once() -> None:
    """A thread that goes there, comes back and goes there again: two events, and STABLE stays off between."""
    clock, backend, _ = a_vm()
    for _ in range(2):
        with OtherCpu(backend):
            for _ in range(3):
                clock.tick()
        clock.tick()
        assert not is_stable(clock)
    assert len(steps(clock)) == 2


OPERATIONS: Final[dict[str, Callable[[GuestClock], object]]] = {
    "dilate": lambda clock: clock.dilate(2),
    "slew": lambda clock: clock.slew(1000),
    "skip": lambda clock: clock.skip(1000),
    "offset": lambda clock: clock.offset(1000),
    "pause": lambda clock: clock.pause(),
    "republish": lambda clock: republish(clock, 1, [clock.dilation]),
    "follow": lambda clock: clock.follow("raw"),
    "save": lambda clock: clock.save(),
    "host_write_msr": lambda clock: clock.host_write_msr(0, 0x10, 5),
    "repair_tsc": lambda clock: clock.repair_tsc(),
}

DONE: Final[dict[str, Callable[[GuestClock], bool]]] = {
    "dilate": lambda clock: clock.dilation == 2,
    "slew": lambda clock: clock.skew_ns == 1000,
    "skip": lambda clock: clock.now() == 2 * NS_PER_S + 1000,
    "offset": lambda clock: clock.now() == 2 * NS_PER_S + 1000,
    "pause": lambda clock: clock.is_paused,
    "republish": lambda clock: page_of(clock).version > 4,
    "follow": lambda clock: clock.reference == "raw",
    "host_write_msr": lambda clock: clock.read_msr(0, 0x10) == 5,
}
"""What is to be seen after an operation; of the others that is what they return."""


@pytest.mark.row("E9", "E5")
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_that_need_a_tsc_are_refused_on_a_cpu_that_is_behind(name: str) -> None:
    """Each is a StateError that says what to do, and changes nothing; on another CPU it is done."""
    clock, backend, memory = a_vm()
    backend.advance(ns=NS_PER_S)
    offsets, pages, line, reference = dict(backend.tsc_offsets), memory.read(0, 1 << 16), clock.line, clock.reference
    with OtherCpu(backend), pytest.raises(StateError, match=f"{name}: this CPU's TSC is behind the others'; try again"):
        OPERATIONS[name](clock)
    assert (backend.tsc_offsets, memory.read(0, 1 << 16), clock.line) == (offsets, pages, line)
    assert (clock.reference, clock.is_paused) == (reference, False)
    returned = OPERATIONS[name](clock)
    assert DONE[name](clock) if name in DONE else returned is not None


@pytest.mark.row("E9", "E5")
def test_resume_and_run_for_are_refused_on_a_cpu_that_is_behind() -> None:
    """A paused clock stays paused, and counts what it missed when it is resumed on another CPU."""
    clock, backend, memory = a_vm()
    clock.pause()
    backend.advance(ns=NS_PER_S)
    for operation in (clock.resume, lambda: clock.run_for(1000)):
        with OtherCpu(backend), pytest.raises(StateError, match="TSC is behind"):
            operation()
        assert clock.is_paused
    assert clock.resume("advance").step_ns == NS_PER_S
    assert guests_read(backend, memory, 2 * NS_PER_S)


GUEST_WRITES: Final[dict[str, Callable[[GuestClock], object]]] = {
    "a page": lambda clock: clock.write_msr(0, SYSTEM_TIME, 0x3001),
    "the page that it has": lambda clock: clock.write_msr(0, SYSTEM_TIME, 0x2001),
    "no page": lambda clock: clock.write_msr(0, SYSTEM_TIME, 0),
    "ADJUST": lambda clock: clock.write_msr(0, 0x3B, 12345),
    "TSC": lambda clock: clock.write_msr(0, 0x10, 12345),
}


@pytest.mark.row("E9", "E5")
@pytest.mark.parametrize("name", GUEST_WRITES)
def test_a_guest_that_writes_on_a_cpu_that_is_behind_moves_no_page(name: str) -> None:
    """Its write is done at once, on a line that began since then, too; guests on other CPUs read on within 1 ns."""
    clock, backend, memory = a_vm()
    backend.advance(ns=NS_PER_S)
    clock.dilate(2)
    backend.advance(ns=NS_PER_S)
    with OtherCpu(backend):
        GUEST_WRITES[name](clock)
        moved = {"ADJUST": 12345, "TSC": 12345 - backend.tsc}.get(name, 0) % 2**64
    assert clock.now() == 4 * NS_PER_S
    assert backend.tsc_offsets == {0: moved, 1: 0}
    assert clock.read_msr(0, 0x3B) == moved
    assert abs(shown(memory, 1, backend.tsc) - 4 * NS_PER_S) <= 2
    if name != "no page":
        page = oracle.TimeInfo.parse(memory.read(0x3000 if name == "a page" else 0x2000, 32))
        assert abs(page.read(guest_tsc(backend)) - 4 * NS_PER_S) <= 2
    with OtherCpu(backend), pytest.raises(StateError, match="TSC is behind"):
        clock.skip(1)


@pytest.mark.row("E9", "K-07")
def test_the_time_of_day_is_right_on_a_cpu_that_is_behind() -> None:
    """A guest that asks for its wall clock there gets the UTC of guest time 0, as on the others."""
    clock, backend, memory = a_vm()
    backend.advance(ns=NS_PER_S)
    with OtherCpu(backend):
        clock.write_msr(1, WALL_CLOCK, 0x3000)
    assert int.from_bytes(memory.read(0x3004, 4), "little") == UTC_S
    assert int.from_bytes(memory.read(0x3008, 4), "little") == 0


# On all CPUs


@pytest.mark.row("E9", "E11")
@glitches
@ways_to_look
def test_a_tsc_that_reads_low_once_and_is_right_again(look: Callable[[GuestClock], object], glitch_s: int) -> None:
    """Published while it read low, then right: guest time goes on by the 1 s that passed, and both steps are told."""
    clock, backend, memory = a_vm()
    right = backend.tsc
    backend.tsc = HostTsc(right - glitch_s * HZ)
    look(clock)
    backend.tsc = right
    backend.advance(ns=NS_PER_S)
    look(clock)
    assert clock.now() == 2 * NS_PER_S
    assert guests_read(backend, memory, 2 * NS_PER_S)
    assert not is_stable(clock)
    assert [re.findall(r"\d+", why)[0] for why in steps(clock)] == [f"{glitch_s * HZ}"] * 2


@pytest.mark.row("E9", "E11", "E5")
@glitches
def test_a_tsc_that_stays_low_for_a_while(glitch_s: int) -> None:
    """Re-based at once by the raw clock, and again when it comes back: at each tick guest time is what passed."""
    clock, backend, memory = a_vm()
    begin, passed_ns = backend.tsc, 0
    for at in range(20):
        if at in (5, 12):
            backend.tsc = HostTsc(backend.tsc + (-glitch_s if at == 5 else glitch_s) * HZ)
        backend.advance(ns=NS_PER_S)
        passed_ns += NS_PER_S
        clock.tick()
        assert clock.now() == NS_PER_S + passed_ns
        tscs = guest_tsc(backend), guest_tsc(backend, 1), clock.read_msr(0, 0x10)
        assert set(tscs) == {begin + passed_ns * HZ // NS_PER_S}
        assert guests_read(backend, memory, NS_PER_S + passed_ns)
    assert len(steps(clock)) == 2


@pytest.mark.row("E9", "E11")
def test_a_tsc_that_comes_back_while_the_clock_is_paused_for_long() -> None:
    """Ten days later, on a TSC that is 60 ppm off nominal: what the raw clock says is gained, within that rate."""
    clock, backend, memory = a_vm()
    backend.tsc = HostTsc(backend.tsc - HOUR_S * HZ)
    clock.tick()
    clock.pause()
    days_ns = 10 * 86400 * NS_PER_S
    backend.advance(ns=days_ns)
    backend.tsc = HostTsc(backend.tsc + HOUR_S * HZ + days_ns * HZ // NS_PER_S * 60 // 10**6)
    gained = clock.resume("advance").step_ns
    assert abs(gained - days_ns) <= days_ns * 60 // 10**6
    assert guests_read(backend, memory, clock.now())
    assert 0 <= clock.now() - NS_PER_S - gained <= 1


@pytest.mark.row("E9", "E11")
def test_a_fast_tsc_is_not_taken_for_one_that_came_back() -> None:
    """After a step of 60 us a TSC that runs 60 ppm fast gains as much in 1 s: that is its rate, and no return."""
    clock, backend, memory = a_vm()
    fast = HZ * 60 // 10**6
    backend.tsc = HostTsc(backend.tsc - fast)
    clock.tick()
    newest = clock.now()
    for _ in range(5):
        backend.advance(ns=NS_PER_S)
        backend.tsc = HostTsc(backend.tsc + fast)
        clock.tick()
        assert clock.now() - newest == NS_PER_S + 60_000
        assert guests_read(backend, memory, clock.now())
        newest = clock.now()
    assert len(steps(clock)) == 1


@pytest.mark.row("E9", "E11")
@pytest.mark.parametrize("raw_back_ns", [0, HOUR_S * NS_PER_S])
def test_a_raw_clock_that_jumped_too_cannot_tell(raw_back_ns: int) -> None:
    """Where RAW is made of that TSC it stands or goes back, too: time goes on from the last publish, and it is said."""
    clock, backend, memory = a_vm()
    backend.tsc = HostTsc(backend.tsc - HOUR_S * HZ)
    backend.ref_ns = type(backend.ref_ns)(backend.ref_ns - raw_back_ns)
    clock.tick()
    assert clock.now() == NS_PER_S
    assert guests_read(backend, memory, NS_PER_S)
    (why,) = steps(clock)
    assert "CLOCK_MONOTONIC_RAW" in why
    backend.advance(ns=NS_PER_S)
    assert clock.now() == 2 * NS_PER_S
    assert guests_read(backend, memory, 2 * NS_PER_S)


@pytest.mark.row("E9", "E5")
def test_a_guests_tsc_write_after_a_step_that_nobody_saw() -> None:
    """WRMSR 0x10 is the first that comes after the TSC began anew: the guest reads what it wrote, and time goes on."""
    clock, backend, memory = a_vm()
    backend.tsc = HostTsc(1000)
    backend.advance(ns=NS_PER_S)
    clock.write_msr(0, 0x10, 777)
    assert guest_tsc(backend) == clock.read_msr(0, 0x10) == 777
    assert guest_tsc(backend, 1) == clock.read_msr(1, 0x10) == 10**17 + 2 * HZ
    assert clock.now() == 2 * NS_PER_S
    assert guests_read(backend, memory, 2 * NS_PER_S)


@pytest.mark.row("E9", "E5", "K-37")
def test_what_a_guest_is_told_after_a_step_that_nobody_saw() -> None:
    """Its time of day, asked for first after the TSC began anew, is right; there is no pairing of clocks any more."""
    clock, backend, memory = a_vm()
    assert clock.pairing(0) is not None
    backend.tsc = HostTsc(1000)
    backend.advance(ns=NS_PER_S)
    clock.write_msr(0, WALL_CLOCK, 0x3000)
    assert int.from_bytes(memory.read(0x3004, 8), "little") == UTC_S
    assert clock.pairing(0) is None


@pytest.mark.row("E9", "E11", "E1")
@pytest.mark.parametrize("ticks", [False, True])
@pytest.mark.parametrize("returns", [False, True])
def test_a_step_in_a_pause_that_stays_above_the_last_publish(*, ticks: bool, returns: bool) -> None:
    """2 h into a pause the TSC goes back by 1 h: 2 h are gained, and when it comes back nothing is."""
    clock, backend, memory = a_vm()
    clock.pause()
    for _ in range(2):
        backend.advance(ns=HOUR_S * NS_PER_S)
        if ticks:
            clock.tick()
    backend.tsc = HostTsc(backend.tsc - HOUR_S * HZ)
    assert clock.resume("advance").step_ns == 2 * HOUR_S * NS_PER_S
    resumed_at = 10**17 + HZ + 2 * HOUR_S * HZ
    assert guest_tsc(backend) == clock.read_msr(0, 0x10) == resumed_at
    if returns:
        backend.tsc = HostTsc(backend.tsc + HOUR_S * HZ)
    backend.advance(ns=NS_PER_S)
    clock.refresh()
    assert clock.now() == (2 * HOUR_S + 2) * NS_PER_S
    assert guest_tsc(backend) == clock.read_msr(0, 0x10) == resumed_at + HZ
    assert guests_read(backend, memory, (2 * HOUR_S + 2) * NS_PER_S)
    assert len(steps(clock)) == 1 + returns


@pytest.mark.row("E9", "E11", "E23")
def test_a_sleep_as_long_as_the_step_is_not_a_return() -> None:
    """The TSC went back by 1 h, and counted on in a sleep of 59 min 50 s: guests had that time, and keep it."""
    clock, backend, _ = a_vm()
    backend.tsc = HostTsc(backend.tsc - HOUR_S * HZ)
    clock.tick()
    before = clock.now()
    backend.sleep(ns=(HOUR_S - 10) * NS_PER_S, tsc="counts on")
    clock.tick()
    assert clock.now() - before == (HOUR_S - 10) * NS_PER_S
    assert len(steps(clock)) == 1


@pytest.mark.row("E9", "E11", "E23")
@pytest.mark.parametrize("regime", ["stops", "counts on"])
def test_a_tsc_that_comes_back_after_a_sleep(regime: Literal["stops", "counts on"]) -> None:
    """The TSC went back by 1 h, the host slept, and the TSC is right again: the raw clock decides all the same."""
    clock, backend, _ = a_vm()
    backend.tsc = HostTsc(backend.tsc - HOUR_S * HZ)
    clock.tick()
    backend.sleep(ns=10 * NS_PER_S, tsc=regime)
    clock.tick()
    before = clock.now()
    backend.tsc = HostTsc(backend.tsc + HOUR_S * HZ)
    backend.advance(ns=NS_PER_S)
    clock.tick()
    assert clock.now() - before == NS_PER_S
    assert len(steps(clock)) == 2


# What it costs


class CountedLooks(SimulatedBackend):
    """A host that counts how often all its clocks are looked at."""

    looks = 0

    def stamps(self) -> HostStamps:
        """See Backend."""
        self.looks += 1
        return super().stamps()


@pytest.mark.row("E9", "E15")
@pytest.mark.parametrize("fault", ["none", "step", "sleep"])
def test_a_publish_looks_at_the_raw_clock_on_suspicion_only(fault: str) -> None:
    """After a step or a sleep, too, a refresh costs one reading of the TSC; a tick looks once."""
    backend = CountedLooks(HZ, tsc=10**17)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend)
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    if fault == "step":
        backend.tsc = HostTsc(10**15)
    elif fault == "sleep":
        backend.sleep(ns=NS_PER_S, tsc="restarts")
    clock.tick()
    backend.looks = 0
    for _ in range(100):
        backend.advance(ns=NS_PER_S)
        clock.refresh()
    assert backend.looks == 0
    clock.tick()
    assert backend.looks == 1


# While a reference is followed


@pytest.mark.row("E11", "E9")
@pytest.mark.parametrize("reference", ["raw", "monotonic"])
def test_a_clock_that_follows_a_reference_ends_where_it_is(reference: str) -> None:
    """The TSC begins anew and half a second later is looked at: never 1.5 s off, and the error said is the true one."""
    clock, backend, _ = a_vm()
    clock.follow(reference)
    for _ in range(20):
        backend.advance(ns=NS_PER_S)
        clock.tick()
    guest_ns, reference_ns = clock.now(), backend.ref_ns
    backend.tsc = HostTsc(1000)
    backend.advance(ns=NS_PER_S // 2)
    for _ in range(60):
        backend.advance(ns=NS_PER_S)
        clock.tick()
        behind_ns = backend.ref_ns - reference_ns - (clock.now() - guest_ns)
        assert abs(behind_ns) <= 1
        assert clock.steering is not None
        assert abs(clock.steering.error_ns - behind_ns) <= 2


@pytest.mark.row("E11", "E9")
def test_an_error_that_nobody_could_tell_is_said_and_worked_off() -> None:
    """RAW jumped with the TSC, and a reference of the caller's did not: its error is said, and ends at 0."""
    clock, backend, _ = a_vm()
    begin_ns = true_ns = 10**15
    clock.follow(lambda: Sample(backend.tsc, true_ns, 10.0), max_ppm=100_000)
    for _ in range(20):
        backend.advance(ns=NS_PER_S)
        true_ns += NS_PER_S
        clock.tick()
    begin_ns, guest_ns, raw_ns = true_ns, clock.now(), backend.ref_ns
    backend.advance(ns=NS_PER_S)
    true_ns += NS_PER_S
    backend.tsc, backend.ref_ns = HostTsc(1000), raw_ns
    said = []
    for _ in range(60):
        clock.tick()
        backend.advance(ns=NS_PER_S)
        true_ns += NS_PER_S
        assert clock.steering is not None
        said.append(clock.steering)
    assert any(abs(steering.error_ns - NS_PER_S) < 10**6 for steering in said)
    assert str(said[-1].state) == "locked"
    assert abs(said[-1].error_ns) < 100
    assert abs(true_ns - begin_ns - (clock.now() - guest_ns)) < 100
