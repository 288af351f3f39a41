"""Ctrl-C while a watch goes on: the first is its end, the second is Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from qemu_glue.watch.interrupts import Interrupts
from tests.kvm.leaks import open_descriptors
from tests.waiting import HANG_S

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
