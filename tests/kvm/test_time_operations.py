"""What a VMM does to time, seen by guests: clockprobe reads in ring 3 throughout, and its samples show what was said.

A look at the guest's newest reading can be late, never early.  So after an operation the guest must come to the value
that was declared for that instant, and may at no look be beyond the one that holds now.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import pytest

from pvclock import GuestClock, HostTsc, Machine
from pvclock.meter.findings import failures
from pvclock.meter.machine_guest import finish, probe_machine, wait_until_reading
from pvclock.payloads import probe
from tests.kvm.reading import assert_last_are_on_the_timeline, wait_until_all_read_on
from tests.waiting import HANG_S

pytestmark = pytest.mark.kvm

MS = 10**6
BOUND_NS = 4
"""Design 2.3: 2 ns, a tick that the shift cuts, and a page's age of a second or two."""


@contextmanager
def reading_guest() -> Iterator[tuple[Machine, GuestClock]]:
    """A machine with the engine's clock whose two vCPUs read it; none of their readings may be wrong in the end."""
    with probe_machine("engine", 2) as machine:
        assert machine.clock is not None
        machine.start()
        wait_until_reading(machine)
        wait_until_all_read_on(machine)
        yield machine, machine.clock
        wait_until_all_read_on(machine)
        records = finish(machine)
    assert not any(failures(records).values())
    assert_last_are_on_the_timeline(machine, records, BOUND_NS)


def newest_ns(machine: Machine) -> int:
    """The highest reading of all vCPUs so far."""
    block = probe.read_block(machine.memory)
    assert block is not None
    return block.shared_last


def wait_until_it_reads(machine: Machine, clock: GuestClock) -> None:
    """Return once a guest has read what the clock says now, and nothing beyond what it says then."""
    due = clock.at(HostTsc(clock.backend.counter.read()))
    deadline = time.monotonic() + HANG_S
    while (newest := newest_ns(machine)) < due - BOUND_NS:
        assert time.monotonic() < deadline, f"the guest read {newest} ns, and {float(due)} ns was due"
        assert not machine.runner.join(0.0005)
    assert newest <= clock.at(HostTsc(clock.backend.counter.read())) + BOUND_NS


@pytest.mark.row("E12", "E11", "P-08")
def test_dilation_at_run_time() -> None:
    """At 1/10, 10/1 and 355/113 of host time, changed under running guests, they read what the timeline says."""
    with reading_guest() as (machine, clock):
        for dilation in ((1, 10), (10, 1), (355, 113), (1, 1)):
            clock.dilate(*dilation)
            begin = HostTsc(clock.backend.counter.read())
            guest_begin = clock.at(begin)
            time.sleep(0.1)
            wait_until_it_reads(machine, clock)
            end = HostTsc(clock.backend.counter.read())
            host_ns = Fraction((end - begin) * 10**9, clock.backend.tsc_hz)
            assert clock.at(end) - guest_begin == host_ns * Fraction(*dilation)


@pytest.mark.row("P-09", "E1")
def test_steps_forward() -> None:
    """A skip and an offset show in the guest's readings at once, whole, as its largest gap."""
    with reading_guest() as (machine, clock):
        for step in (clock.skip, clock.offset):
            before = clock.at(HostTsc(clock.backend.counter.read()))
            step(700 * MS)
            assert clock.at(HostTsc(clock.backend.counter.read())) >= before + 700 * MS
            wait_until_it_reads(machine, clock)
        wait_until_all_read_on(machine)
        gaps = [probe.read_record(machine.memory, vcpu).largest_gap_ns for vcpu in range(2)]
        assert min(gaps) >= 700 * MS - BOUND_NS


@pytest.mark.row("E2", "P-14")
@pytest.mark.parametrize("target_ns", [2 * MS, -2 * MS])
def test_a_slew(target_ns: int) -> None:
    """An error of 2 ms is worked off at 10 % either way; guests see no step, and in the end all of it."""
    with reading_guest() as (machine, clock):
        begin = HostTsc(clock.backend.counter.read())
        nominal = clock.at(begin)
        clock.slew(target_ns, 100_000)
        deadline = time.monotonic() + HANG_S
        while clock.skew_ns and time.monotonic() < deadline:
            time.sleep(0.02)
            clock.refresh()
            wait_until_it_reads(machine, clock)
        end = HostTsc(clock.backend.counter.read())
        gained = clock.at(end) - nominal - Fraction((end - begin) * 10**9, clock.backend.tsc_hz)
        assert abs(gained - target_ns) < BOUND_NS
        kinds = [str(event.kind) for event in clock.events.read().events]
        *slews, end_of_it = (kind for kind in kinds if kind not in ("start", "page"))
        assert set(slews) == {"slew"}  # again for what a late refresh has overshot by
        assert end_of_it == "slew_end"


PAUSE_S = 0.12


@pytest.mark.row("E1", "E2", "P-10", "K-17")
@pytest.mark.parametrize(
    "policy", ["freeze", "advance", "advance:max_ns=100000000", "slew:max_ppm=100000", "virtualbox"]
)
def test_pause_and_resume(policy: str) -> None:
    """Over a pause guest time gains what the policy declares, guests see GUEST_STOPPED once, and nothing goes back."""
    with reading_guest() as (machine, clock):
        before = clock.backend.counter.read()
        machine.pause()
        begin = clock.backend.counter.read()
        stopped = clock.now()
        newest = newest_ns(machine)
        time.sleep(PAUSE_S)
        assert (clock.now(), newest_ns(machine)) == (stopped, newest)
        end = clock.backend.counter.read()
        machine.resume(policy)
        after = clock.backend.counter.read()
        wait_until_it_reads(machine, clock)
        resumed = next(event for event in clock.events.read().events if event.kind == "resume")
        gains = {"freeze": 0, "advance": missed_ns(clock), "advance:max_ns=100000000": 100 * MS}
        assert resumed.jump_ns == gains.get(policy, 0)
        assert end - begin <= missed_ns(clock) * clock.backend.tsc_hz / 10**9 <= after - before
        deadline = time.monotonic() + HANG_S
        while clock.skew_ns and time.monotonic() < deadline:
            time.sleep(0.05)
            clock.refresh()
        assert clock.skew_ns == 0
        wait_until_it_reads(machine, clock)
        wait_until_all_read_on(machine)
        assert [probe.read_record(machine.memory, vcpu).stopped for vcpu in range(2)] == [1, 1]


def missed_ns(clock: GuestClock) -> Fraction:
    """Guest time from pause to resume, by the events' own stamps."""
    pause, resume = (
        next(event for event in clock.events.read().events if event.kind == kind) for kind in ("pause", "resume")
    )
    assert pause.host_tsc is not None
    assert resume.host_tsc is not None
    return Fraction((resume.host_tsc - pause.host_tsc) * 10**9, clock.backend.tsc_hz)


def newest_of_each(machine: Machine) -> list[int]:
    """The newest time that each vCPU has read."""
    return [probe.read_record(machine.memory, vcpu).last_ns for vcpu in range(2)]


@pytest.mark.row("P-22", "E12")
def test_run_for() -> None:
    """A paused VM runs for 50 ms of guest time, and a little more: that is reported, and stays, and guests see no more.

    Every vCPU executes in some run and reads later times, but none beyond a run's end; after it none reads on.
    """
    with reading_guest() as (machine, clock):
        machine.pause()
        begun, runs, deadline = newest_of_each(machine), 0, time.monotonic() + HANG_S
        while runs < 3 or any(map(int.__le__, newest_of_each(machine), begun)):
            assert time.monotonic() < deadline, f"of {begun} some vCPU read nothing later in {runs} runs"
            before = clock.at(HostTsc(clock.backend.counter.read()))
            report = machine.run_for(50 * MS)
            end, read = clock.at(HostTsc(clock.backend.counter.read())), newest_of_each(machine)
            assert report.overshoot_ns >= 0
            assert end == before + 50 * MS + report.overshoot_ns
            assert max(read) <= end + BOUND_NS
            time.sleep(0.01)
            assert newest_of_each(machine) == read
            runs += 1
        machine.resume()
        wait_until_it_reads(machine, clock)


@pytest.mark.row("E1", "P-25")
@pytest.mark.parametrize("policy", ["freeze", "advance"])
def test_a_clock_saved_under_its_guest(policy: str) -> None:
    """Saved while its guest is paused, and restored over the same memory: the guest's own page goes on from there."""
    with probe_machine("engine", 1) as machine:
        assert machine.clock is not None
        machine.start()
        wait_until_reading(machine)
        machine.pause()
        state = machine.clock.save()
        finished = newest_ns(machine)
        again = GuestClock.restore(state, machine.memory, backend=machine.clock.backend, vcpu_host="kvm", policy=policy)
        begin = again.backend.stamps()
        again.resume()
        end = again.backend.stamps()
        resumed = next(event for event in again.events.read().events if event.kind == "resume")
        assert resumed.guest_ns_before == state.timeline.guest_ns
        saved = raw_ns_of(state.host.raw_ns)
        least, most = (begin.raw_ns - saved, end.raw_ns - saved) if policy == "advance" else (0, 0)
        assert least <= resumed.jump_ns <= most
        assert again.read(0) >= finished
        machine.runner.resume()
        wait_until_it_reads(machine, again)


def raw_ns_of(raw_ns: int | None) -> int:
    """The stamp, which a real host has."""
    assert raw_ns is not None
    return raw_ns
