"""run_for(): how far it reaches, what other threads may do meanwhile, and what becomes of the time missed before it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Final

import pytest

from pvclock import GuestClock, GuestMemory, HostTsc, RangeError, SimulatedBackend, StateError
from pvclock.readings import RunReport
from pvclock.timekeeping.events import EventKind
from tests.unit.clocks import NS_PER_S, PAGES, SYSTEM_TIME, a_clock, guest_ns, shown
from tests.waiting import HANG_S

HZ: Final = 2_600_000_000
YEAR_NS: Final = 365 * 86400 * NS_PER_S


class Interrupted(SimulatedBackend):
    """A host on which `meanwhile` is called, on a thread of its own, while vCPUs run."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def run_until(self, tsc: HostTsc) -> None:
        """See Backend."""
        thread = threading.Thread(target=self.meanwhile)
        thread.start()
        thread.join(HANG_S)
        assert not thread.is_alive()
        super().run_until(tsc)


def a_vm() -> tuple[GuestClock, Interrupted]:
    """A paused VM at guest time 0."""
    backend = Interrupted(HZ)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend)
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    clock.pause()
    return clock, backend


# How far


@pytest.mark.row("P-22", "E9", "E13")
@pytest.mark.parametrize("ns", [1, NS_PER_S, YEAR_NS, 50 * YEAR_NS])
def test_it_returns_at_that_time_or_less_than_a_tick_later(ns: int) -> None:
    """50 years at 2.6 GHz are 4.1x10^18 ticks, below 2^62."""
    clock, _ = a_vm()
    report = clock.run_for(ns)
    assert 0 <= report.overshoot_ns < 1
    assert report.ran_ns - report.overshoot_ns == ns
    assert clock.now() == ns
    assert clock.is_paused


@pytest.mark.row("P-22", "E12")
@pytest.mark.parametrize("dilation", [Fraction(1, 10), Fraction(1), Fraction(10)])
def test_a_run_is_of_guest_time_and_ends_paused(dilation: Fraction) -> None:
    """Each vCPU reads 1 s more by its own page, however long that takes the host, and then time stands for all."""
    clock, backend, memory = a_clock(HZ, vcpus=2)
    clock.dilate(dilation.numerator, dilation.denominator)
    backend.advance(ns=100)
    clock.pause()
    begin_ns, begin_tsc = clock.now(), backend.tsc
    clock.run_for(NS_PER_S)
    assert abs(Fraction(backend.tsc - begin_tsc, HZ) - 1 / dilation) < Fraction(2, HZ)
    for vcpu in range(2):
        assert abs(shown(memory, vcpu, backend.tsc) - begin_ns - NS_PER_S) <= 4
    backend.advance(ns=NS_PER_S)
    assert [abs(clock.read(vcpu) - begin_ns - NS_PER_S) <= 4 for vcpu in range(2)] == [True, True]
    clock.resume("freeze")
    assert abs(shown(memory, 1, backend.tsc) - begin_ns - NS_PER_S) <= 4


@pytest.mark.row("P-22")
def test_a_run_is_of_a_paused_vm() -> None:
    """On a VM whose time is running it is refused, and that time goes on."""
    clock, backend, memory = a_clock(HZ)
    with pytest.raises(StateError, match=r"pause\(\)"):
        clock.run_for(NS_PER_S)
    assert (clock.is_paused, clock.now(), backend.tsc) == (False, 0, 0)
    backend.advance(ns=NS_PER_S)
    assert abs(shown(memory, 0, backend.tsc) - NS_PER_S) <= 1


@pytest.mark.row("E9", "E13")
@pytest.mark.parametrize(("ns", "denominator"), [(120 * YEAR_NS, 1), (10 * NS_PER_S, 10**9), (10**40, 1)])
def test_what_no_counter_reaches_is_refused(ns: int, denominator: int) -> None:
    """Beyond 2^62 ticks: a RangeError, and the clock is paused where it was, with what it missed yet to be settled."""
    clock, backend = a_vm()
    if denominator > 1:
        clock.dilate(1, denominator)
    backend.advance(ns=NS_PER_S)
    last = clock.events.last
    with pytest.raises(RangeError, match="can be waited for"):
        clock.run_for(ns)
    assert (clock.is_paused, clock.now(), clock.events.last) == (True, 0, last)
    assert clock.resume("advance").step_ns == NS_PER_S  # missed at the dilation of the pause


@pytest.mark.row("E9", "E13")
def test_exactly_2_62_ticks_can_be_waited_for_and_no_more() -> None:
    """At 1 GHz a ns is a tick."""
    backend = SimulatedBackend(10**9)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend)
    clock.pause()
    with pytest.raises(RangeError):
        clock.run_for(2**62)
    assert clock.run_for(2**62 - 1) == RunReport(Fraction(2**62 - 1), Fraction(0))


@pytest.mark.row("E9", "E13")
@pytest.mark.parametrize("ns", [0, -1])
def test_no_time_is_no_run(ns: int) -> None:
    """RangeError, and it stays paused."""
    clock, _ = a_vm()
    with pytest.raises(RangeError, match="more than 0"):
        clock.run_for(ns)
    assert clock.is_paused


# Meanwhile

REFUSED: Final[dict[str, Callable[[GuestClock], object]]] = {
    "pause": lambda clock: clock.pause(),
    "resume": lambda clock: clock.resume(),
    "run_for": lambda clock: clock.run_for(1000),
}
ALLOWED: Final[dict[str, Callable[[GuestClock], object]]] = {
    "refresh": lambda clock: clock.refresh(),
    "tick": lambda clock: clock.tick(),
    "dilate": lambda clock: clock.dilate(2),
    "save": lambda clock: clock.save(),
    "skip": lambda clock: clock.skip(10),
    "a guest's write": lambda clock: clock.write_msr(0, 0x3B, 5),
}


@pytest.mark.row("E9", "E1")
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_end_it_is_refused_on_another_thread(name: str) -> None:
    """A StateError there; the run ends as if nothing had been tried, and another run can follow."""
    clock, backend = a_vm()
    errors: list[str] = []

    def meanwhile() -> None:
        with pytest.raises(StateError) as error:
            REFUSED[name](clock)
        errors.append(str(error.value))

    backend.meanwhile = meanwhile
    report = clock.run_for(NS_PER_S)
    assert report.ran_ns - report.overshoot_ns == NS_PER_S
    assert errors == [f"{name}: a run_for() is under way; wait until it returns"]
    backend.meanwhile = lambda: None
    clock.run_for(NS_PER_S)
    assert clock.is_paused
    clock.resume()


@pytest.mark.row("E9", "E1")
@pytest.mark.parametrize("name", ALLOWED)
def test_all_else_may_come_meanwhile(name: str) -> None:
    """It ends at the guest time that was asked for; one put ahead while its vCPUs run is late, and says so."""
    clock, backend = a_vm()
    done: list[str] = []

    def meanwhile() -> None:
        backend.meanwhile = lambda: None
        ALLOWED[name](clock)
        done.append(name)

    backend.meanwhile = meanwhile
    report = clock.run_for(NS_PER_S)
    assert done == [name]
    assert report.ran_ns - report.overshoot_ns == NS_PER_S
    assert clock.now() == {"dilate": 2 * NS_PER_S, "skip": NS_PER_S + 10}.get(name, NS_PER_S)
    assert report.overshoot_ns == clock.now() - NS_PER_S
    assert clock.is_paused


@pytest.mark.row("E9", "E1")
def test_who_is_second_meets_a_running_clock_or_a_run_under_way() -> None:
    """Another thread's run_for() at each moment of the first: a StateError or a run of its own, nothing else."""
    clock, backend = a_vm()
    seen: list[str] = []

    def second() -> None:
        try:
            seen.append(f"ran {clock.run_for(500).ran_ns >= 500}")
        except StateError as error:
            seen.append(str(error))

    def told(_gpa: int, _length: int) -> None:  # the lock is held: a second one waits until the first ends
        threads.append(threading.Thread(target=second))
        threads[-1].start()

    threads: list[threading.Thread] = []
    clock.memory.on_dirty = told
    clock.run_for(1000)
    clock.memory.on_dirty = None
    for thread in threads:
        thread.join(HANG_S)
        assert not thread.is_alive()
    assert seen
    assert set(seen) <= {
        "ran True",
        "run_for: a run_for() is under way; wait until it returns",
        "run_for: guest time is running; pause() it first",
    }
    assert clock.is_paused
    assert backend.tsc > 0


@pytest.mark.row("E9", "E1")
def test_a_backend_that_fails_leaves_the_clock_paused_and_idle() -> None:
    """Its error comes out; what ran stays in guest time, and resume() is possible."""
    clock, backend = a_vm()

    def fail(tsc: HostTsc) -> None:
        backend.advance(ns=10)
        raise OSError(5, f"EIO before {tsc}")

    backend.run_until = fail  # type: ignore[method-assign]  # a VMM's
    with pytest.raises(OSError, match="EIO"):
        clock.run_for(NS_PER_S)
    assert (clock.is_paused, clock.now()) == (True, 10)
    clock.resume("freeze")
    assert abs(guest_ns(backend, clock.memory) - 10) <= 1


@pytest.mark.row("E9", "E1")
def test_a_backend_that_returns_early_for_ever_is_an_error() -> None:
    """One whose TSC stands still in run_until() is told to be mended rather than asked for ever."""
    clock, backend = a_vm()
    asked: list[HostTsc] = []

    def return_early(tsc: HostTsc) -> None:
        asked.append(tsc)

    backend.run_until = return_early  # type: ignore[method-assign]  # a VMM's
    with pytest.raises(StateError, match="the backend returned early, and its TSC stands still"):
        clock.run_for(NS_PER_S)
    assert len(asked) == 1
    assert clock.is_paused


# What was missed before


@pytest.mark.row("P-22", "E1", "E9")
@pytest.mark.parametrize(
    ("policy", "gain_s"), [("freeze", 0), ("advance", 100), ("advance:max_ns=7000000000", 7), (None, 100)]
)
def test_time_missed_before_it_is_settled_by_the_policy(policy: str | None, gain_s: int) -> None:
    """100 s of pause: gained at once as resume() would, the clock's own policy by default, and no part of the run."""
    clock, backend = a_vm()
    clock.policy = "advance"
    backend.advance(ns=100 * NS_PER_S)
    report = clock.run_for(NS_PER_S, policy)
    assert report.ran_ns - report.overshoot_ns == NS_PER_S
    assert clock.now() == (gain_s + 1) * NS_PER_S
    assert abs(guest_ns(backend, clock.memory) - clock.now()) <= 2
    kinds = [event.kind for event in clock.events.read().events]
    assert kinds[-2:] == [EventKind.RESUME, EventKind.PAUSE]


@pytest.mark.row("E1", "E9")
def test_time_missed_before_it_can_be_slewed_in() -> None:
    """Under a slew all of it is owed, and worked off in the runs, whose length is guest time all the same."""
    clock, backend = a_vm()
    backend.advance(ns=100 * NS_PER_S)
    clock.run_for(NS_PER_S, "slew:max_ppm=500")
    assert clock.now() == NS_PER_S
    assert abs(guest_ns(backend, clock.memory) - NS_PER_S) <= 2
    owed = clock.skew_ns
    assert 99 * NS_PER_S < owed < 100 * NS_PER_S
    clock.run_for(NS_PER_S, "freeze")
    assert clock.now() == 2 * NS_PER_S
    assert abs(guest_ns(backend, clock.memory) - 2 * NS_PER_S) <= 2
    assert clock.skew_ns < owed
