"""Start and wake threads so that a signal handler's exception at any line leaves no lock taken.

And renew locks in a child of fork(), which has only the thread that forked.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from pvclock.arguments import number
from pvclock.errors import RangeError, StateError
from pvclock.quantities import shown

__all__ = ["HasLock", "WakeUp", "begin", "check_timeout", "renew_in_children", "wake_precisely"]


class WakeUp:
    """A binary semaphore: one thread waits, any other calls.  One early call is remembered.

    Lock methods are atomic.  Those of threading.Event and Condition are Python code: an interrupt there may leave their
    lock taken.
    """

    def __init__(self) -> None:
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def call(self) -> None:
        """Wake the waiting thread, or let the next wait() return at once."""
        try:
            self._asleep.release()
        except RuntimeError:  # already called
            return

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for call() and return True; False after timeout_s."""
        return self._asleep.acquire(timeout=-1 if timeout_s is None else timeout_s)


def wake_precisely() -> None:
    """Let timeouts of this thread end when they should; Linux puts 50 us on top to save wake-ups.

    Does nothing on a Linux that does not let it (before 4.6).
    """
    with suppress(OSError):
        Path(f"/proc/{threading.get_native_id()}/timerslack_ns").write_text("1", encoding="ascii")


def begin(thread: threading.Thread, operation: str) -> None:
    """Start `thread` for `operation`; StateError if the system allows no more threads."""
    try:
        thread.start()
    except RuntimeError as error:
        if "new thread" not in str(error):  # raised by threading after an interrupt, not by the system
            raise
        raise StateError(
            operation, f"cannot start a thread: {error}", "end some or raise the limit, and try again"
        ) from None


def check_timeout(timeout_s: float) -> None:
    """RangeError unless a lock can wait for timeout_s; WrongType if it is not a number."""
    if not 0 <= number("timeout_s", timeout_s) <= threading.TIMEOUT_MAX:
        raise RangeError(f"timeout_s is {shown(timeout_s)}; it must be from 0 to {threading.TIMEOUT_MAX:g}")


class HasLock(Protocol):
    """An object with a lock that another thread may hold at a fork()."""

    def begin_anew(self) -> None:
        """In the child: create a new lock and forget the parent's threads."""


_RENEWED: Final[weakref.WeakSet[HasLock]] = weakref.WeakSet()


def renew_in_children(owner: HasLock) -> None:
    """Call owner.begin_anew() in each child of fork() while `owner` lives."""
    _RENEWED.add(owner)


def _renew_all() -> None:
    for owner in tuple(_RENEWED):
        owner.begin_anew()


os.register_at_fork(after_in_child=_renew_all)
