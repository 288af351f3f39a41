"""Synthetic timers of real vCPUs: hvprobe sleeps until they interrupt it, and writes down when."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import pytest

from pvclock.payloads import probe
from pvclock.payloads.hyperv_probe import Expiry, TimerMode, read_expiries
from tests.kvm.hyperv_guest import LIMIT_S, hyperv_machine

pytestmark = [pytest.mark.kvm, pytest.mark.row("H-42")]

EXPIRIES: Final = 20
PERIOD: Final = 20_000
"""2 ms, in units of 100 ns."""
MESSAGE_TIMER_EXPIRED: Final = 0x80000010


def expiries_of(mode: int, vcpus: int) -> list[list[Expiry]]:
    """What each vCPU has written down of so many interrupts of its timer."""
    with hyperv_machine(f"expiries={EXPIRIES} period={PERIOD} timer={mode}", vcpus) as machine:
        machine.start()
        assert machine.wait(LIMIT_S) == probe.EXIT_FINE
        return [read_expiries(machine.memory, vcpu) for vcpu in range(vcpus)]


@pytest.mark.row("H-40", "H-41", "H-42")
@pytest.mark.parametrize("mode", [TimerMode(0), TimerMode.ONE_SHOT])
@pytest.mark.parametrize("vcpus", [1, 2])
def test_expiries_by_message(mode: TimerMode, vcpus: int) -> None:
    """Each message says when the timer was due and when it was written; neither is early, nor is the interrupt.

    A periodic timer is due at multiples of its period, a one-shot one not before the guest has taken the last.
    """
    for expiries in expiries_of(mode, vcpus):
        assert len(expiries) == EXPIRIES
        for expiry in expiries:
            assert expiry.message_type == MESSAGE_TIMER_EXPIRED
            assert expiry.expiration <= expiry.delivery <= expiry.seen
        for before, after in pairwise(expiries):
            if mode & TimerMode.ONE_SHOT:
                assert after.expiration >= before.seen + PERIOD
            else:
                assert after.expiration > before.expiration
                assert (after.expiration - before.expiration) % PERIOD == 0


@pytest.mark.parametrize("vcpus", [1, 2])
def test_direct_mode_interrupts_without_messages(vcpus: int) -> None:
    """A one-shot timer in direct mode raises its own vector on its vCPU, not before it is due, and no message."""
    for expiries in expiries_of(TimerMode.DIRECT | TimerMode.ONE_SHOT, vcpus):
        assert len(expiries) == EXPIRIES
        assert {expiry.message_type for expiry in expiries} == {0}
        assert all(expiry.seen >= expiry.expiration for expiry in expiries)
        for before, after in pairwise(expiries):
            assert after.expiration >= before.seen + PERIOD


def test_a_periodic_timer_in_direct_mode_keeps_its_period() -> None:
    """Interrupts of a periodic timer may be late or fall together, but the n-th comes after n periods at the least."""
    (expiries,) = expiries_of(TimerMode.DIRECT, 1)
    assert len(expiries) == EXPIRIES
    for number, expiry in enumerate(expiries, start=1):
        assert expiry.seen >= number * PERIOD
