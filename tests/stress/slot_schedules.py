"""A publish that is held open while slots change, and what else the tests of slots have in common."""

import threading
import time
from typing import Self

from pvclock import ClockLine, ClockScale, GuestMemory, GuestNs, HostTsc
from pvclock._core import TimePages, read_time_info
from pvclock._counter import SimulatedCounter
from pvclock._stress import republish_in_turn

SIZE = 0x1000
PAGE = 0x10000  # where the publish that is held open has its page
SCALE = ClockScale.from_hz(10**9)
LINE = ClockLine(HostTsc(0), GuestNs(0), 0, 1, 1)
REPUBLISH_TICKS = 1000


def pages_at(memory: GuestMemory, gpa: int) -> TimePages:
    """One vCPU's page, published there if there is memory."""
    pages = TimePages(memory, 1, SimulatedCounter(REPUBLISH_TICKS))
    pages.register(0, gpa)
    pages.publish(LINE, SCALE)
    return pages


class PublishUnderWay:
    """A thread that publishes without the GIL, from here to end()."""

    def __init__(self, memory: GuestMemory) -> None:
        memory.add_slot(PAGE, bytearray(SIZE))
        self.pages = pages_at(memory, PAGE)
        self._counter = self.pages.counter
        self._thread = threading.Thread(target=self._publish)
        self._thread.start()
        while read_time_info(memory, PAGE).version == 2:
            give_way()

    def _publish(self) -> None:
        republish_in_turn(self.pages, LINE, [(1, 1, SCALE)], 2**63, REPUBLISH_TICKS)

    def end(self) -> None:
        """Let it end, and wait for that."""
        assert isinstance(self._counter, SimulatedCounter)
        self._counter.value += 10 * REPUBLISH_TICKS
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()


def give_way(times: int = 1) -> None:
    """Let other threads have the GIL."""
    for _ in range(times):
        time.sleep(0)


class Announced:
    """An address that says when an operation converts it, which is when it begins."""

    def __init__(self, gpa: int) -> None:
        self.gpa = gpa
        self.begun = threading.Event()

    def __index__(self) -> int:
        self.begun.set()
        return self.gpa
