"""Ctrl-C and SIGTERM as the normal end of a watch: what was found is told then, and nothing is cut off midway."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Final, Self

from pvclock.commands.signals import woken_by_signals

__all__ = ["Interrupts"]

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
READ_BYTES: Final = 4096


class Interrupts:
    """While it is entered, the first SIGINT or SIGTERM is kept and not acted on; a second acts as it did before.

    Only for the main thread.  A signal that the process was started to ignore stays ignored.
    """

    def __init__(self) -> None:
        self.came = False
        """Did one come?"""

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds` or until one comes; did one come?"""
        end_s = time.monotonic() + seconds
        while not self.came and select.select([self._woken], [], [], max(end_s - time.monotonic(), 0))[0]:
            os.read(self._woken, READ_BYTES)  # of whichever signal: the handlers have run
        return self.came

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def __enter__(self) -> Self:
        self._waking = ExitStack()
        self._woken = self._waking.enter_context(woken_by_signals())
        taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._take) for number in taken}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        self._waking.close()
