"""A signal that another thread than the main one takes, while the main one sleeps in select()."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.waiting import HANG_S

__all__ = ["taken_by_another_thread"]

SELECTS: Final = {"23", "270"}
"""select() and pselect6() of x86-64."""


@contextmanager
def taken_by_another_thread(number: signal.Signals) -> Iterator[None]:
    """While it is entered a thread gives itself the signal, as soon as this one sleeps in select()."""
    sleeper = Path(f"/proc/self/task/{threading.get_native_id()}/syscall")

    def take() -> None:
        deadline_s = time.monotonic() + HANG_S
        while sleeper.read_text().split()[0] not in SELECTS and time.monotonic() < deadline_s:
            time.sleep(0.001)
        signal.pthread_kill(threading.get_ident(), number)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield
    finally:
        thread.join()
