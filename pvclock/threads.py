"""How a thread is begun and woken, such that a signal handler's exception at any line leaves no lock taken.

And what is to be done about locks and threads in a child of fork(), which has the one thread that forked.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Final, Protocol

from pvclock.arguments import number
from pvclock.errors import RangeError, StateError
from pvclock.quantities import shown

__all__ = ["HasLock", "WakeUp", "begin", "check_timeout", "renew_in_children"]


class WakeUp:
    """What one thread waits for and any other gives: a binary semaphore.  A call that comes early is kept, once.

    A lock's own methods are one step each.  Those of threading.Event and Condition are Python code: an interrupt there
    may leave their lock taken.
    """

    def __init__(self) -> None:
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def call(self) -> None:
        """Wake the thread that waits, or the next one that would."""
        try:
            self._asleep.release()
        except RuntimeError:  # it has been called already
            return

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return once called: True; or False after timeout_s."""
        return self._asleep.acquire(timeout=-1 if timeout_s is None else timeout_s)


def begin(thread: threading.Thread, operation: str) -> None:
    """Start `thread` for `operation`.  StateError where the system allows no more threads."""
    try:
        thread.start()
    except RuntimeError as error:
        if "new thread" not in str(error):  # an interrupt made threading stumble over its own lock
            raise
        raise StateError(
            operation, f"no thread begins: {error}", "end some or raise the limit, and try again"
        ) from None


def check_timeout(timeout_s: float) -> None:
    """RangeError for what no lock can wait for; WrongType for what is no number."""
    if not 0 <= number("timeout_s", timeout_s) <= threading.TIMEOUT_MAX:
        raise RangeError(f"timeout_s is {shown(timeout_s)}; it must be from 0 to {threading.TIMEOUT_MAX:g}")


class HasLock(Protocol):
    """What has a lock that another thread may hold at a fork()."""

    def begin_anew(self) -> None:
        """In the child: take a new lock, and forget the parent's threads."""


_RENEWED: Final[weakref.WeakSet[HasLock]] = weakref.WeakSet()


def renew_in_children(owner: HasLock) -> None:
    """Call owner.begin_anew() in each child of fork(), as long as `owner` lives."""
    _RENEWED.add(owner)


def _renew_all() -> None:
    for owner in tuple(_RENEWED):
        owner.begin_anew()


os.register_at_fork(after_in_child=_renew_all)
