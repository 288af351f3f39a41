"""A GuestClock with its pages in a VM's RAM, and the same pages for a twin in C."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from bench.c_twins import Layout, RateOfTime
from pvclock import GuestClock, GuestMemory, HostBackend
from pvclock.machine.ram import Ram

__all__ = ["LINUX_STRIDE", "MSR_SYSTEM_TIME", "PublishedClock", "published_clock"]

MSR_SYSTEM_TIME = 0x4B564D01
ENABLED = 1
FIRST_PAGE = 0x1000
RAM_BYTES = 8 << 20

LINUX_STRIDE = 64
"""Linux keeps its vCPUs' clocks in one array, a cache line each."""


class PublishedClock(NamedTuple):
    """A clock, and where a twin finds what it publishes."""

    clock: GuestClock
    layout: Layout
    rate: RateOfTime


@contextmanager
def published_clock(tsc_hz: int, pages: int, stride: int, *, young: bool = False) -> Iterator[PublishedClock]:
    """Make a clock with `pages` registered pages, `stride` bytes apart.

    It is some seconds old, as nearly all clocks are; a `young` one has to search for its line at every publish.
    """
    ram = Ram(RAM_BYTES)
    with GuestMemory(ram.buffer) as memory:
        clock = GuestClock(memory, pages, backend=HostBackend(tsc_hz))
        for vcpu in range(pages):
            clock.write_msr(vcpu, MSR_SYSTEM_TIME, FIRST_PAGE + vcpu * stride | ENABLED)
        if not young:
            clock.dilate(10_000)
            time.sleep(0.001)
            clock.dilate(1)
        # The RAM stays where it is; a ctypes object that went on holding it could not be closed.
        address = ctypes.addressof(ctypes.c_char.from_buffer(ram.buffer)) + FIRST_PAGE
        yield PublishedClock(clock, Layout(address, pages, stride), RateOfTime.of(clock))
    ram.close()
