"""Ctrl-C while a watch goes on: the first is its end, the second is Ctrl-C."""

from __future__ import annotations

import os
import signal

import pytest

from qemu_glue.watch.interrupts import Interrupts
from tests.kvm.leaks import open_descriptors
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("E3")


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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.wait(HANG_S)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored() -> None:
    """As nohup and a shell's background jobs have it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupts.wait(0)
    finally:
        signal.signal(signal.SIGINT, before)
