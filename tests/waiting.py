"""How long a test waits."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["HANG_S", "alarm_after"]

HANG_S: Final = 120.0
"""For what comes at once unless something hangs: no claim of how fast it is, on however busy a machine."""


@contextmanager
def alarm_after(seconds: int) -> Iterator[None]:
    """Turn a wait for ever into a failure, if signals interrupt it; `signal.alarm(seconds)` within begins anew."""

    def fail(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
