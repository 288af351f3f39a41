"""The thread that ticks clocks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import pytest

from pvclock import (
    GuestClock,
    GuestMemory,
    HostBackend,
    HostTsc,
    RangeError,
    Reference,
    Sample,
    SimulatedBackend,
    StateError,
)
from pvclock.clock.ticker import Ticker
from pvclock.host.watch import HostWatch, Trouble, TroubleKind
from pvclock.threads import WakeUp
from pvclock.timekeeping.events import EventKind
from tests.waiting import HANG_S

SYSTEM_TIME = 0x4B564D01
HZ = 2_596_132_000


def a_clock() -> GuestClock:
    """A clock with a page on a simulated host, which stands still."""
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), backend=SimulatedBackend(HZ))
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    return clock


def a_host_clock() -> GuestClock:
    """A clock with a page on this host's TSC, which it takes as stable."""
    backend = HostBackend()
    backend.tsc_stable = True
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), backend=backend)
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    return clock


def wait_for(condition: Callable[[], bool]) -> None:
    """Return once it holds."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def version(clock: GuestClock) -> int:
    """The version of vCPU 0's page: one publish is 2."""
    page = clock.page(0)
    assert page is not None
    return page.version


@pytest.mark.row("E11", "E13")
def test_all_clocks_are_ticked() -> None:
    """Each round publishes each clock's pages once; a clock may come and go, and after stop() nothing is ticked."""
    first, second = a_clock(), a_clock()
    with Ticker(first, interval_s=0.01, watch_host=False) as ticker:
        wait_for(lambda: version(first) > 20)
        assert version(second) == 2
        ticker.add(second)
        wait_for(lambda: version(second) > 20)
        ticker.remove(first)
        rounds = ticker.rounds
        wait_for(lambda: ticker.rounds > rounds + 1)
        stopped = version(first)
        wait_for(lambda: ticker.rounds > rounds + 5)
        assert version(first) == stopped
    done = version(second)
    assert not [thread for thread in threading.enumerate() if thread.name == "pvclock-ticker"]
    time.sleep(0.05)
    assert version(second) == done
    assert ticker.failures == ()


@pytest.mark.row("E11")
def test_it_follows_this_hosts_clock() -> None:
    """A clock that follows CLOCK_MONOTONIC_RAW locks on to it, with a bound below 1 us."""
    backend = HostBackend()
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), backend=backend, reference="raw")
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    with Ticker(clock, interval_s=0.05):
        wait_for(lambda: clock.steering is not None and clock.steering.state == "locked")
        begin, guest_ns, begun = backend.sample(Reference.RAW), clock.read(0), backend.sample(Reference.RAW)
        time.sleep(1)
        end, guest_end_ns, ended = backend.sample(Reference.RAW), clock.read(0), backend.sample(Reference.RAW)
        wait_for(lambda: clock.steering is not None and abs(clock.steering.error_ns) < 10_000)
    least_ns, most_ns = end.ns - begun.ns, ended.ns - begin.ns  # each reading is between its samples
    assert least_ns - 200_000 < guest_end_ns - guest_ns < most_ns + 200_000


@pytest.mark.row("E11", "E13")
def test_one_clocks_error_is_not_anothers() -> None:
    """A clock whose source raises is kept among the failures, and the others are ticked."""

    def broken() -> Sample:
        raise OSError("the source is gone")

    bad, good = a_clock(), a_clock()
    bad.follow(broken)
    with Ticker(bad, good, interval_s=0.005, watch_host=False) as ticker:
        wait_for(lambda: version(good) > 60 and len(ticker.failures) == 16)
    assert len(ticker.failures) == 16
    assert {(failure.clock, str(failure.error)) for failure in ticker.failures} == {(bad, "the source is gone")}


class TroubledWatch(HostWatch):
    """A watch that finds the TSC unstable at its third look."""

    looks = 0

    def check(self, *, on_schedule: bool = True) -> list[Trouble]:
        """See HostWatch."""
        super().check(on_schedule=on_schedule)
        self.looks += 1
        self._marked_unstable = self.looks >= 3
        found = Trouble(TroubleKind.TSC_UNSTABLE, "said the test", True, 0, self.last, self.last)
        return [found] if self.looks == 3 else []


@pytest.mark.row("E11", "K-16")
def test_trouble_of_the_host_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ticker looks at the host once a round: its trouble is an event of each clock, and takes STABLE."""
    monkeypatch.setattr("pvclock.clock.ticker.HostWatch", TroubledWatch)
    clocks = [a_host_clock(), a_host_clock()]
    apart = a_clock()
    with Ticker(apart, *clocks, interval_s=0.01) as ticker:
        wait_for(lambda: all(clock.events.last > 2 for clock in clocks))
        wait_for(lambda: all(clock.reading(0).flags == 0 for clock in clocks))
    assert ticker.failures == ()
    monkeypatch.undo()
    with ticker:  # its next watch has seen nothing
        wait_for(lambda: ticker.rounds > 10)
    for clock in clocks:
        kinds = [event.kind for event in clock.events.read().events]
        assert kinds == [EventKind.START, EventKind.PAGE, EventKind.TSC_UNSTABLE]
        assert clock.reading(0).flags == 0
    assert apart.events.last == 2  # its TSC is its own


@pytest.mark.row("E11", "K-16")
def test_trouble_is_told_though_a_tick_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock whose source raises hears of the host's trouble all the same."""

    def broken() -> Sample:
        raise SystemExit

    monkeypatch.setattr("pvclock.clock.ticker.HostWatch", TroubledWatch)
    clock = a_host_clock()
    clock.follow(broken)
    with Ticker(clock, interval_s=0.01) as ticker:
        wait_for(lambda: clock.reading(0).flags == 0)
    assert {type(failure.error) for failure in ticker.failures} == {SystemExit}


class BrokenWatch(HostWatch):
    """A watch that cannot look."""

    def check(self, *, on_schedule: bool = True) -> list[Trouble]:
        """See HostWatch."""
        raise ValueError("nothing to be seen")


@pytest.mark.row("E11", "E13")
def test_a_look_that_fails_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looking at the host raises is kept, and clocks are ticked on."""
    monkeypatch.setattr("pvclock.clock.ticker.HostWatch", BrokenWatch)
    clock = a_host_clock()
    with Ticker(clock, interval_s=0.005) as ticker:
        wait_for(lambda: version(clock) > 20)
    assert (ticker.failures[-1].clock, str(ticker.failures[-1].error)) == (None, "nothing to be seen")


@pytest.mark.row("E11", "E13")
def test_stop_beside_start() -> None:
    """A start while another thread waits in stop(): the old thread ends, one new one runs, and nobody hangs."""
    entered, hold = threading.Event(), threading.Event()

    def slow() -> Sample:
        entered.set()
        hold.wait(HANG_S)
        return Sample(HostTsc(1), 1, 1.0)

    clock = a_clock()
    clock.follow(slow)
    ticker = Ticker(clock, interval_s=0.01, watch_host=False)
    ticker.start()
    assert entered.wait(HANG_S)
    stopping = threading.Thread(target=ticker.stop)
    stopping.start()
    wait_for(lambda: ticker._schedule is None)
    ticker.start()
    hold.set()
    stopping.join(HANG_S)
    assert not stopping.is_alive()
    assert len([thread for thread in threading.enumerate() if thread.name == "pvclock-ticker"]) == 1
    ticker.stop()


class PlayedTime:
    """The time that a ticker's schedule goes by: it stands still but for what a test adds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = float(int(time.monotonic()) + 1000)  # ahead of the one by which stop() waits for workers
        self._waits = queue.SimpleQueue[float | None]()
        self._wake_up = WakeUp()
        monkeypatch.setattr("pvclock.clock.ticker.time", self)
        monkeypatch.setattr("pvclock.clock.ticker.WakeUp", lambda: self)

    def monotonic(self) -> float:
        """See time.monotonic()."""
        return self.now_s

    def wait(self, timeout_s: float | None = None) -> bool:
        """Tell the test, and wait for it."""
        self._waits.put(timeout_s)
        return self._wake_up.wait(HANG_S)

    def call(self) -> None:
        """See WakeUp."""
        self._wake_up.call()

    def wait_s(self, *, passed_s: float | None = None) -> float:
        """How long the schedule waits now, or when so much time has passed since it began to wait."""
        if passed_s is not None:
            self.now_s += passed_s
            self.call()
        wait_s = self._waits.get(timeout=HANG_S)
        assert wait_s is not None
        return wait_s


@pytest.mark.row("E11", "E12")
def test_a_fast_clock_is_ticked_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """At ten times host time a clock's pages age ten times as fast, and so are all ticks; not below 1 ms."""
    clock, played = a_clock(), PlayedTime(monkeypatch)
    with Ticker(a_clock(), clock, interval_s=0.5, watch_host=False):
        assert played.wait_s() == 0.5
        clock.dilate(10)
        assert played.wait_s(passed_s=0.5) == pytest.approx(0.05)
        clock.dilate(10**6)
        assert played.wait_s(passed_s=0.05) == pytest.approx(0.001)


@pytest.mark.row("E11")
def test_a_late_round_is_not_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the schedule was held up for many intervals the rounds keep to it, without a burst."""
    played = PlayedTime(monkeypatch)
    with Ticker(a_clock(), interval_s=0.5, watch_host=False):
        assert played.wait_s() == 0.5
        assert played.wait_s(passed_s=0.5) == 0.5
        assert played.wait_s(passed_s=7.125) == 0.375
        assert played.wait_s(passed_s=0.375) == 0.5


@pytest.mark.row("E13")
def test_misuse() -> None:
    """Intervals that let pages become too old, a second start, an unknown clock: errors that say what to do."""
    for interval_s in (0, -1, 1e-10, 2.1, float("nan")):
        with pytest.raises(RangeError, match=r"from 0\.001 to 2"):
            Ticker(interval_s=interval_s)
    ticker = Ticker(interval_s=0.01)
    with ticker, pytest.raises(StateError, match="stop"):
        ticker.start()
    ticker.stop()
    with pytest.raises(StateError, match="add"):
        ticker.remove(a_clock())
