"""How late a timer of a guest's interface is delivered by a TimerThread, in host time."""

from __future__ import annotations

import threading
import time
from statistics import median, quantiles

import pytest

from bench.comparison import Comparison, Figure
from pvclock import GuestClock, GuestMemory, HostBackend, TimerThread
from pvclock.threads import WakeUp
from tests.unit.alarm_provider import ALARM_MSR, Alarm, register

AHEAD_NS = 1_000_000
TIMERS = 200
ROUNDS = 10
TWIN = "a lock's timeout"


class Alarms:
    """A clock whose provider sets one timer after the other."""

    def __init__(self) -> None:
        self.clock = GuestClock(GuestMemory(bytearray(1 << 12)), 1, "Alarm", backend=HostBackend())
        provider = self.clock.interface.provider
        assert isinstance(provider, Alarm)
        self._expired = provider.expired
        provider.deliver = self._deliver
        self._delivered = WakeUp()
        self.late_ns: list[int] = []

    def go_off(self) -> None:
        """Wait for TIMERS timers."""
        for _ in range(TIMERS):
            self.clock.write_msr(0, ALARM_MSR, self.clock.now() + AHEAD_NS)
            self._delivered.wait()

    def _deliver(self) -> None:
        self.late_ns.append(self.clock.now() - self._expired[-1][0])
        self._delivered.call()


def wait_by_lock(late_ns: list[int]) -> None:
    """As many timeouts of a plain lock, as Linux's default for a thread has them."""
    lock = threading.Lock()
    lock.acquire()
    for _ in range(TIMERS):
        due_ns = time.monotonic_ns() + AHEAD_NS
        lock.acquire(timeout=AHEAD_NS / 1e9)
        late_ns.append(time.monotonic_ns() - due_ns)


def test_latency(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the guest time at which it is due to the call of the VMM that raises its interrupt."""
    register(monkeypatch)
    alarms, twin_ns = Alarms(), list[int]()
    with TimerThread(alarms.clock):
        comparison.benchmark.pedantic(alarms.go_off, setup=lambda: wait_by_lock(twin_ns), rounds=ROUNDS)
    late_ns = alarms.late_ns
    comparison.record(
        Figure("a timer's delivery, late by, median", median(late_ns), TWIN, median(twin_ns)),
        Figure("a timer's delivery, late by, p99", p99(late_ns), TWIN, p99(twin_ns)),
    )


def p99(ns: list[int]) -> float:
    """What 1 in 100 exceeds."""
    return quantiles(ns, n=100)[-1]
