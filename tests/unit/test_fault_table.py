"""Every operation of a clock with every callback of the caller's failing where it is called."""

from __future__ import annotations

from contextlib import suppress

import pytest

from pvclock import GuestClock, GuestMemory
from pvclock.providers.interface import HypercallRegisters
from pvclock.timekeeping.events import Event
from tests.unit.clock_twins import OPERATIONS, Twin, Undisturbed, paused, runs_on, twin_before
from tests.unit.clocks import NS_PER_S
from tests.unit.faulty_host import POINTS

ERRORS = {"error": OSError("it fails"), "interrupt": KeyboardInterrupt()}
HOLDS_OVER = ("source", "sample")
"""Without a sample a tick keeps the rate that is known, and says so: it is done, in another way."""


@pytest.mark.row("E9", "E1")
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_callback_that_fails(name: str, error: BaseException) -> None:
    """Whichever call of a callback fails, it is whole and recorded, or not begun, and works when it is tried again."""
    undisturbed = Undisturbed(name)
    holds_over = HOLDS_OVER if name.startswith("tick") and isinstance(error, Exception) else ()
    for point in POINTS:
        for nth in range(1, undisturbed.calls.get(point, 0) + 1):
            if point in holds_over:
                continue
            twin = twin_before(name)
            twin.faults.arm(point, nth, error)
            with suppress(type(error)):
                undisturbed.operation.operate(twin)
            assert twin.faults.disarm(), (point, nth)
            undisturbed.check(twin)


@pytest.mark.row("E9")
def test_each_callback_is_called_by_some_operation() -> None:
    """No point of failure stands in the table without an operation that comes by; run_for() is in a test of its own."""
    called: set[str] = set()
    for name in OPERATIONS:
        called |= {point for point, calls in Undisturbed(name).calls.items() if calls}
    assert set(POINTS) - called == {"run_until", "run_until, done"}


@pytest.mark.row("P-22", "E9")
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_callback_that_fails_in_run_for(error: BaseException) -> None:
    """run_for() was not begun, or ended paused; where the pause itself failed, time goes on and pause() stops it."""
    undisturbed = Twin()
    paused(undisturbed)
    before = undisturbed.seen()
    undisturbed.faults.calls.clear()
    undisturbed.clock.run_for(NS_PER_S, "advance")
    kinds = [event.kind for event in undisturbed.seen().events]
    for point, calls in dict(undisturbed.faults.calls).items():
        for nth in range(1, calls + 1):
            twin = Twin()
            paused(twin)
            twin.faults.arm(point, nth, error)
            with pytest.raises(type(error)):
                twin.clock.run_for(NS_PER_S, "advance")
            assert twin.faults.disarm()
            found = twin.seen()
            if found != before:
                assert [event.kind for event in found.events] == kinds[: len(found.events)]
                assert found.now[3] == (len(found.events) == len(kinds)), (point, nth)
            if not twin.clock.is_paused:
                twin.clock.pause()
            runs_on(twin)


@pytest.mark.row("E9")
@pytest.mark.parametrize("name", ["tick after raw", "tick after a source"])
def test_a_tick_without_a_sample(name: str) -> None:
    """What a source raises comes out; the clock keeps the rate that it knows, tells it, and steers at the next tick."""
    undisturbed, twin = twin_before(name), twin_before(name)
    rate = twin.clock._follower.holdover(twin.clock._keeper.timeline.terms)
    twin.faults.arm("source" if "source" in name else "sample", 1, ERRORS["error"])
    with pytest.raises(OSError, match="it fails"):
        twin.clock.tick()
    assert twin.faults.disarm()
    assert twin.clock.rate == rate.rate
    assert "no sample" in twin.seen().events[-1].why
    records = undisturbed.clock.tick() and undisturbed.seen().records
    assert twin.seen().records == records
    steering = twin.clock.tick()
    assert steering is not None
    assert steering.rate == undisturbed.clock.steering.rate  # type: ignore[union-attr]  # it follows
    assert twin.clock.rate == 1 + steering.frequency_adjustment


@pytest.mark.row("E9", "E12")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_subscriber_that_raises(name: str) -> None:
    """It disturbs no operation, and hears of the next event all the same."""
    undisturbed, twin = Undisturbed(name), twin_before(name)
    heard: list[int] = []

    def complain(event: Event) -> None:
        heard.append(event.sequence)
        raise KeyboardInterrupt

    unsubscribe = twin.clock.events.subscribe(complain)
    events, last = twin.clock.events, twin.clock.events.last
    undisturbed.operation.operate(twin)
    assert twin.seen() == undisturbed.after
    assert events.flush()
    unsubscribe()
    assert heard == [event.sequence for event in events.read(last).events]
    assert twin.goes_on() == undisturbed.later


class FailingVmm:
    """A VMM none of whose services works."""

    def kick(self, apic_id: int) -> None:
        """See VmmServices."""
        raise OSError(f"kick {apic_id}")

    def yield_to(self, apic_id: int) -> None:
        """See VmmServices."""
        raise OSError(f"yield to {apic_id}")

    def send_ipi(self, apic_ids: list[int], icr: int) -> int:
        """See VmmServices."""
        raise OSError(f"send {icr} to {apic_ids}")


@pytest.mark.row("E9", "K-36")
@pytest.mark.parametrize(("number", "match"), [(5, "kick 1"), (10, "send"), (11, "yield")])
def test_a_service_that_raises(number: int, match: str) -> None:
    """What a VMM's service raises comes out of the guest's hypercall, which is counted; the clock is as it was."""
    twin = Twin()
    clock = GuestClock(GuestMemory(bytearray(1 << 12)), 2, backend=twin.backend, vmm=FailingVmm(), features=0x2888)
    before = clock.save(), clock.events.read(), clock.memory.read(0, 1 << 12)
    registers = HypercallRegisters(number, rbx=1, rcx=1, rdx=0, rsi=0)
    with pytest.raises(OSError, match=match):
        clock.hypercall(0, registers)
    assert (clock.save(), clock.events.read(), clock.memory.read(0, 1 << 12)) == before
    assert clock.interface.statistics.hypercalls == 1
