"""Signals to a command: an orderly end, where what it has started or changed is put right, and an orderly stop."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

__all__ = ["ended_by_signals", "told_to_stop", "woken_by_signals"]


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP unwind the stack, as Ctrl-C does."""

    def leave(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def told_to_stop() -> Iterator[None]:
    """Have SIGTSTP, which job control sends, wake woken_by_signals() instead of stopping this process at once."""
    is_default = signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL
    if is_default:
        signal.signal(signal.SIGTSTP, lambda _number, _frame: None)
    try:
        yield
    finally:
        if is_default:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)


@contextmanager
def woken_by_signals() -> Iterator[int]:
    """A descriptor that can be read once a signal has come, its number a byte, for a select() of the main thread.

    Linux may give a process's signal to any thread, a vCPU's, too.  Python's handlers run in the main thread, and that
    sleeps on in a system call that it was not taken in.
    """
    woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    try:
        yield woken
    finally:
        signal.set_wakeup_fd(before)
        os.close(woken)
        os.close(wakes)
