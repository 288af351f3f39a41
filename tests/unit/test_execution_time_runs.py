"""A run of unslaved time that is held for a while: no part of the run, and its guest sees nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count

import pytest

from pvclock import GuestClock, GuestMemory, HostTsc, SimulatedBackend
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.meter.stress import republish
from tests.unit.clocks import NS_PER_S, PAGES, SYSTEM_TIME, shown
from tests.unit.fault_points import EXECUTION_TIME
from tests.unit.schedules import Lines

HZ = 10**9
BEGIN = 10**15
OFFSET = 77
"""Ticks that the guest's TSC is ahead of what was executed."""


class BusyHost(SimulatedBackend):
    """A host on which it takes `out_ns` until the vCPUs are out of the guest, which they read their TSC in until then.

    last_tscs: what each vCPU's RDTSC returned last, before it left.  holds: how many keep the vCPUs out.
    """

    def __init__(self, out_ns: int = 0) -> None:
        super().__init__(HZ, BEGIN)
        self.out_ns = out_ns
        self.last_tscs: dict[int, int] = {}
        self.holds = 0

    def guest_tsc(self, vcpu: int) -> int:
        """What vCPU's RDTSC returns now."""
        return (self.tsc + self.tsc_offsets[vcpu]) % 2**64

    @contextmanager
    def _held(self) -> Iterator[None]:
        if not self.holds:
            self.advance(ns=self.out_ns)
            self.last_tscs = {vcpu: self.guest_tsc(vcpu) for vcpu in self.tsc_offsets}
        self.holds += 1
        try:
            yield
        finally:
            self.holds -= 1

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """See Backend."""
        return self._held()


def a_backend(vcpus: int = 2) -> tuple[ExecutionTimeBackend, BusyHost]:
    """An unslaved backend in a run of 100 ticks so far."""
    host = BusyHost()
    backend = ExecutionTimeBackend(host)
    for vcpu in range(vcpus):
        backend.set_tsc_offset(vcpu, OFFSET)
    backend.enter()
    host.advance(ns=100)
    return backend, host


def sees_what_was_executed(backend: ExecutionTimeBackend, host: BusyHost, executed: int) -> bool:
    """Do counter and each vCPU's TSC show so many ticks?"""
    tscs = {host.guest_tsc(vcpu) for vcpu in range(2)}
    return backend.counter.read() == executed and tscs == {executed + OFFSET}


@pytest.mark.row("P-08", "P-11", "P-18")
def test_a_hold_is_no_part_of_the_run() -> None:
    """Counter and samples stand in it, and after it the guest's TSCs go on where they were; exit() leaves it out."""
    backend, host = a_backend()
    assert sees_what_was_executed(backend, host, 100)
    with backend.quiesce(None):
        host.advance(ns=5000)
        assert backend.counter.read() == backend.stamps().tsc == 100
    assert sees_what_was_executed(backend, host, 100)
    host.advance(ns=10)
    assert sees_what_was_executed(backend, host, 110)
    assert backend.exit() == 110
    backend.ran(110)
    assert backend.counter.read() == 110


@pytest.mark.row("P-08", "P-11")
def test_a_run_goes_on_after_the_last_hold() -> None:
    """Of holds that overlap the last to end lets time go on, whichever was the first to begin."""
    backend, host = a_backend()
    with ExitStack() as later:
        with backend.quiesce(None):
            host.advance(ns=1000)
            later.enter_context(backend.quiesce(0))
            host.advance(ns=1000)
        host.advance(ns=1000)
        assert backend.counter.read() == 100
    assert sees_what_was_executed(backend, host, 100)


@pytest.mark.row("P-08", "P-11")
def test_a_run_that_begins_or_ends_in_a_hold() -> None:
    """It has what it had before the hold; one that begins in it begins with the hold's end."""
    backend, host = a_backend()
    with backend.quiesce(None):
        host.advance(ns=1000)
        assert backend.exit() == 100
        backend.ran(100)
        host.advance(ns=1000)
        backend.enter()
        host.advance(ns=1000)
        assert backend.counter.read() == 100
    assert sees_what_was_executed(backend, host, 100)
    host.advance(ns=5)
    backend.leave()
    host.advance(ns=1000)
    backend.leave()
    assert (backend.counter.read(), backend.is_running) == (105, False)


@pytest.mark.row("P-08", "E9")
def test_a_hold_that_is_dropped_holds_nobody() -> None:
    """What entered it and never ended it, as an interrupt may, leaves a run whose counter is what its guest sees."""
    backend, host = a_backend()
    hold = backend.quiesce(None)
    hold.__enter__()
    host.advance(ns=1000)
    del hold
    assert sees_what_was_executed(backend, host, 1100)
    with backend.quiesce(None):
        host.advance(ns=1000)
    assert sees_what_was_executed(backend, host, 1100)


@pytest.mark.row("P-12")
def test_a_trapped_guests_cycles_are_the_vmms_to_count() -> None:
    """Not native: a hold changes no count, for its guest reads no hardware."""
    host = BusyHost()
    backend = ExecutionTimeBackend(host, native=False)
    backend.enter()
    with backend.quiesce(None):
        host.advance(ns=1000)
    assert backend.exit() == 1000


@pytest.mark.row("P-08", "E9")
@pytest.mark.parametrize("call", ["hold", "leave", "enter"])
def test_an_interrupt_at_each_line(call: str) -> None:
    """KeyboardInterrupt at any line leaves no hold, and hardware and counter show what was executed and no more."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    for line in count():
        backend, host = a_backend()
        if call == "enter":
            backend.leave()
            host.advance(ns=1000)
        lines = Lines(*EXECUTION_TIME, at=line, action=interrupt)
        try:
            with lines.traced():
                if call == "hold":
                    with backend.quiesce(None):
                        host.advance(ns=1000)
                elif call == "leave":
                    backend.leave()
                else:
                    backend.enter()
        except KeyboardInterrupt:
            pass
        assert host.holds == 0
        if not backend.is_running:
            backend.enter()
        executed = backend.counter.read()
        assert executed == 100 or (executed == 1100 and call == "hold" and line < lines.count)  # one that was dropped
        assert sees_what_was_executed(backend, host, executed)
        if lines.count <= line:
            break
        del lines  # which has frames, and these have what was interrupted
    assert line > 5


@pytest.mark.row("P-08", "E9", "E12")
@pytest.mark.parametrize("change", ["dilate", "republish", "slew", "refresh"])
def test_no_reading_goes_back_over_an_operation_in_a_run(change: str) -> None:
    """What a vCPU reads until it leaves the guest is not above what it reads of the new page when it is back."""
    host = BusyHost(out_ns=1_000_000)
    backend = ExecutionTimeBackend(host)
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, backend=backend)
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    clock.dilate(3)
    backend.enter()
    host.advance(ns=NS_PER_S)
    before = memory.read(PAGES[0], 32)
    reader = GuestMemory(bytearray(1 << 16))
    reader.write(PAGES[0], before)
    if change == "dilate":
        clock.dilate(1, 10)
    elif change == "republish":
        republish(clock, 3, [clock.dilation / 30])
    elif change == "slew":
        clock.slew(-10_000_000, 100_000)
    else:
        clock.refresh()
    assert memory.read(PAGES[0], 32) != before
    last_ns = shown(reader, 0, host.last_tscs[0])
    assert last_ns >= 3 * NS_PER_S
    assert last_ns <= shown(memory, 0, host.guest_tsc(0)) <= last_ns + 1
    assert clock.at(HostTsc(backend.counter.read())) >= last_ns
