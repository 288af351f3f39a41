"""What the meter reads of clockprobe's findings, where its vCPU gets no CPU for a while or none at all."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from pvclock import GuestClock, GuestMemory, SimulatedBackend, StateError
from pvclock.meter import findings
from pvclock.meter.findings import read_pages, vcpu0_reading
from pvclock.payloads.probe import RECORDS, read_record, time_page_address

pytestmark = pytest.mark.row("E13")

PAGE = time_page_address(0)
SYSTEM_TIME = 0x4B564D01
LOOKS = 500
"""A second of them: longer than a thread is without a CPU, most often."""


def guest_memory() -> GuestMemory:
    """Memory in which vCPU 0 has a page, and a record whose newest reading is by another one: 0 ns at TSC 0."""
    memory = GuestMemory(bytearray(4 << 20))
    GuestClock(memory, backend=SimulatedBackend(10**9, 1 << 40)).write_msr(0, SYSTEM_TIME, PAGE | 1)
    return memory


def read_by_page(memory: GuestMemory) -> tuple[int, int]:
    """Have the record say that vCPU 0 has read its page; (TSC, ns)."""
    page = read_pages(memory, 1)[0]
    record = read_record(memory, 0)._replace(last_tsc=page.tsc_timestamp, last_ns=page.system_time)
    memory.write(RECORDS, struct.pack(f"<{len(record)}Q", *record))
    return page.tsc_timestamp, page.system_time


def test_a_vcpu_that_reads_by_its_new_page_a_second_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for: after a publish the newest reading is by the old page until that vCPU has a CPU again."""
    memory = guest_memory()
    looks = 0
    reading = None

    @contextmanager
    def stopped() -> Iterator[None]:
        nonlocal looks, reading
        looks += 1
        if looks == LOOKS:
            reading = read_by_page(memory)
        yield

    monkeypatch.setattr(findings, "READING_PAUSE_S", 0)
    assert vcpu0_reading(memory, stopped) == reading
    assert looks == LOOKS


def test_a_vcpu_that_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up in the end, in words."""
    memory = guest_memory()
    monkeypatch.setattr(findings, "READING_LIMIT_S", 0.05)
    with pytest.raises(StateError, match="vCPU 0 of clockprobe does not read"):
        vcpu0_reading(memory, nullcontext)
