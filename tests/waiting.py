"""How long a test waits."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["HANG_S", "alarm_after", "wait_until"]

HANG_S: Final = 120
"""For what comes at once unless something hangs: no claim of how fast it is, on however busy a machine."""


POLL_S: Final = 0.05


def wait_until(condition: Callable[[], bool], limit_s: float = HANG_S) -> None:
    """Return once `condition()` holds; AssertionError if it never does."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(POLL_S)


@contextmanager
def alarm_after(seconds: int) -> Iterator[None]:
    """Turn a wait for ever into a failure, if signals interrupt it; `signal.alarm(seconds)` within begins anew.

    One around another one goes on with what it had left when that began.
    """

    def fail(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    left_s = signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        signal.alarm(left_s)
