"""Ctrl-C while a watch goes on: the first is its end, the second is Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from qemu_glue.watch.interrupts import Interrupts
from tests.kvm.leaks import open_descriptors
from tests.unit.other_threads_signal import taken_by_another_thread
from tests.waiting import HANG_S, alarm_after

pytestmark = pytest.mark.row("E3")


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and so would its tests."""
    before = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_kept(number: signal.Signals) -> None:
    """It ends a wait and raises nothing; afterwards all is as before, descriptors, too."""
    before, descriptors = signal.getsignal(number), open_descriptors()
    with Interrupts() as interrupts:
        assert not interrupts.wait(0)
        os.kill(os.getpid(), number)
        assert interrupts.wait(HANG_S)
        assert interrupts.came
        assert signal.getsignal(number) == before
    assert (signal.getsignal(number), open_descriptors()) == (before, descriptors)


def test_a_second_is_one() -> None:
    """Who is in a hurry presses it again."""
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.wait(HANG_S)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored() -> None:
    """As nohup and a shell's background jobs have it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert not interrupts.wait(0)


def test_one_that_another_thread_took_ends_a_wait() -> None:
    """As that of metrics or of a vCPU may; a signal that is none of the two does not end it."""
    seen: list[object] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(None))
    try:
        with Interrupts() as interrupts, alarm_after(HANG_S), taken_by_another_thread(signal.SIGUSR1):
            while not seen:
                assert not interrupts.wait(0.1)
        with Interrupts() as interrupts, alarm_after(HANG_S), taken_by_another_thread(signal.SIGTERM):
            assert interrupts.wait(2 * HANG_S)
    finally:
        signal.signal(signal.SIGUSR1, before)
