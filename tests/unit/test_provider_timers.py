"""Timers of a provider: expired by the VMM's loop, in guest time whatever becomes of it, delivered without a lock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import GuestClock, GuestMemory, SimulatedBackend, StateError, WrongType
from tests.unit.alarm_provider import ALARM_MSR, VECTOR, Alarm, register
from tests.unit.clocks import NS_PER_S

pytestmark = pytest.mark.row("H-42", "P-15")

HZ = 2_500_000_000
ODD_HZ = 2_596_132_711


@pytest.fixture(autouse=True)
def alarm_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a provider with a timer."""
    register(monkeypatch)


class Vmm:
    """Notes the interrupts, and whether the clock's lock is free then."""

    def __init__(self) -> None:
        self.injected: list[tuple[int, int]] = []
        self.is_lock_free: list[bool] = []
        self.clock: GuestClock | None = None

    def inject(self, vcpu: int, vector: int) -> None:
        """Note it."""
        self.injected.append((vcpu, vector))
        assert self.clock is not None
        ask = threading.Thread(target=self._try_lock, args=(self.clock.memory.clock_lock,))
        ask.start()
        ask.join()

    def _try_lock(self, lock: Any) -> None:  # noqa: ANN401  # an RLock
        self.is_lock_free.append(is_free := lock.acquire(blocking=False))
        if is_free:
            lock.release()

    def kick(self, apic_id: int) -> None:
        """Ignore it."""

    def yield_to(self, apic_id: int) -> None:
        """Ignore it."""

    def send_ipi(self, apic_ids: list[int], icr: int) -> int:
        """Accept none."""
        return 0


def an_alarm(hz: int = HZ, **options: Any) -> tuple[GuestClock, SimulatedBackend, Alarm]:  # noqa: ANN401  # GuestClock's
    """A clock with the provider, its host and the provider."""
    backend = SimulatedBackend(hz)
    clock = GuestClock(GuestMemory(bytearray(1 << 12)), 2, "Alarm", backend=backend, **options)
    provider = clock.interface.provider
    assert isinstance(provider, Alarm)
    return clock, backend, provider


def test_a_timer_expires_when_its_guest_time_has_come() -> None:
    """Not a nanosecond before; the interrupt is raised on the vCPU that set it, without the clock's lock."""
    vmm = Vmm()
    clock, backend, provider = an_alarm(vmm=vmm)
    vmm.clock = clock
    clock.write_msr(1, ALARM_MSR, 1000)
    backend.advance(ns=998)
    assert (clock.expire_timers(), provider.expired) == (1000, [])
    backend.advance(ns=2)
    assert (clock.expire_timers(), provider.expired) == (None, [(1000, 1000)])
    assert (vmm.injected, vmm.is_lock_free) == ([(1, VECTOR)], [True])
    assert clock.expire_timers() is None
    assert len(vmm.injected) == 1


def test_a_late_call_expires_what_was_due() -> None:
    """What is due expires once, and what follows it is due by its own time, possibly in the past."""
    clock, backend, provider = an_alarm(period_ns=100)
    clock.write_msr(0, ALARM_MSR, 1000)
    backend.advance(ns=1250)
    assert [clock.expire_timers() for _ in range(4)] == [1100, 1200, 1300, 1300]
    assert provider.expired == [(1000, 1250), (1100, 1250), (1200, 1250)]


def test_nothing_expires_while_guest_time_stands_still() -> None:
    """A pause keeps what is due; after resume() it is due at once if the policy moved time there, else later."""
    clock, backend, provider = an_alarm()
    clock.write_msr(0, ALARM_MSR, 1000)
    backend.advance(ns=500)
    clock.pause()
    backend.advance(ns=10_000)
    assert (clock.expire_timers(), clock.timers.host_ns_left(), provider.expired) == (None, None, [])
    clock.resume("freeze")
    assert (clock.expire_timers(), clock.timers.host_ns_left()) == (1000, 500)
    clock.skip(500)
    assert (clock.timers.host_ns_left(), clock.expire_timers()) == (0, None)
    assert provider.expired == [(1000, 1000)]


@given(
    hz=st.sampled_from([HZ, ODD_HZ, 10**9, 1_000_003]),
    rate=st.fractions(Fraction(1, 997), 1000, max_denominator=997),
    skipped=st.integers(0, 2**40),
    ahead=st.integers(1, 2**44),
)
def test_host_time_until_a_timer_is_due(hz: int, rate: Fraction, skipped: int, ahead: int) -> None:
    """It ends with the first tick at which guest time is there: the timer expires then, and no tick before."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        clock, backend, provider = an_alarm(hz)
    clock.skip(skipped)
    clock.dilate(*rate.as_integer_ratio())
    clock.write_msr(0, ALARM_MSR, skipped + ahead)
    ticks = ceil(Fraction(ahead * hz, NS_PER_S) / rate)
    assert clock.timers.host_ns_left() == ceil(Fraction(ticks * NS_PER_S, hz))
    backend.tsc += ticks - 1
    clock.expire_timers()
    assert provider.expired == []
    backend.tsc += 1
    clock.expire_timers()
    assert [due for due, _ in provider.expired] == [skipped + ahead]


def test_no_host_time_reaches_some_timers() -> None:
    """Beyond 2^63 host ticks there is nothing to wait for; a timer in the past is due now."""
    clock, backend, _ = an_alarm()
    assert clock.timers.host_ns_left() is None
    clock.write_msr(0, ALARM_MSR, 2**64 - 1)
    assert clock.timers.host_ns_left() is None
    backend.advance(ns=1000)
    clock.write_msr(0, ALARM_MSR, 10)
    assert clock.timers.host_ns_left() == 0


def test_whoever_waits_is_told_of_every_change() -> None:
    """Of timers and of time: pause, resume, rate, slew and step; the provider hears of time before; nobody twice."""
    clock, backend, provider = an_alarm()
    told: list[str] = []
    clock.timers.watch(mine := lambda: told.append("changed"))
    clock.timers.watch(mine)
    changes: dict[str, Callable[[], object]] = {
        "MSR": lambda: clock.write_msr(0, ALARM_MSR, 5),
        "pause": clock.pause,
        "resume": clock.resume,
        "rate": lambda: clock.dilate(2),
        "step": lambda: clock.skip(10),
        "slew": lambda: clock.slew(1000),
    }
    for name, change in changes.items():
        told.clear()
        backend.advance(ns=1000)
        change()
        assert told == ["changed"], name
    assert [each for each in provider.told if each[0] == "time"] == [
        ("time", is_paused) for is_paused in (True, False, False, False, False)
    ]
    clock.timers.unwatch(mine)
    clock.timers.unwatch(mine)
    clock.skip(10)
    assert told == ["changed"]
    with pytest.raises(WrongType, match=r"^told "):
        clock.timers.watch(None)  # type: ignore[arg-type]


def test_a_restored_clock_has_its_timers_paused() -> None:
    """They expire once it is resumed, and the clock that it replaced expires none."""
    clock, backend, _ = an_alarm()
    clock.pause()
    again = GuestClock.restore(clock.save(), clock.memory, backend=backend)
    again.write_msr(0, ALARM_MSR, 1)
    assert again.expire_timers() is None
    backend.advance(ns=1000)
    again.resume("advance")
    assert (again.timers.host_ns_left(), again.expire_timers()) == (0, None)
    assert again.interface.provider.expired  # type: ignore[attr-defined]  # it is an Alarm
    with pytest.raises(StateError, match="another clock has taken over"):
        clock.expire_timers()


def test_what_a_delivery_raises_comes_out() -> None:
    """The VMM's error is its own to handle: the timer has expired, and the clock goes on."""
    clock, backend, provider = an_alarm()
    provider.deliver = lambda: 1 // 0
    clock.write_msr(0, ALARM_MSR, 10)
    backend.advance(ns=10)
    with pytest.raises(ZeroDivisionError):
        clock.expire_timers()
    assert (clock.expire_timers(), len(provider.expired)) == (None, 1)


@pytest.mark.parametrize("provider", ["KVM", "Minimal", "None"])
def test_a_provider_without_timers(provider: str) -> None:
    """Nothing is due, ever, and nobody has to wait."""
    clock = GuestClock(GuestMemory(bytearray(1 << 12)), provider=provider, backend=SimulatedBackend(HZ))
    assert (clock.timers.exist, clock.expire_timers(), clock.timers.host_ns_left()) == (False, None, None)
    assert an_alarm()[0].timers.exist
