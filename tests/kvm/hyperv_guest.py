"""hvprobe in a machine with the Hyper-V provider, and what a VMM may do to its clock meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Final

from pvclock import GuestClock, Machine
from pvclock.meter import stress
from pvclock.payloads import hvprobe, probe
from pvclock.payloads.hyperv_probe import HvBlock, HvRecord, read_block, read_record, violations
from tests.waiting import HANG_S

MS: Final = 10**6


def hyperv_machine(cmdline: str, vcpus: int = 2, **options: object) -> Machine:
    """A machine with hvprobe in it, not started yet; nothing ticks its clock."""
    if "restore" not in options:
        options["provider"] = "HyperV"
    command = f"cpus={vcpus} {cmdline}"
    return Machine(hvprobe(), vcpus=vcpus, cmdline=command, tick_interval_s=None, **options)  # type: ignore[arg-type]


@contextmanager
def reading_guest(cmdline: str = "", vcpus: int = 2, **options: object) -> Iterator[Machine]:
    """A machine whose vCPUs read, each of which has gone through some rounds."""
    with hyperv_machine(cmdline, vcpus, **options) as machine:
        machine.start()
        wait_for(machine, "rounds", 10)
        yield machine


def records_of(machine: Machine) -> list[HvRecord]:
    """What the vCPUs have found so far."""
    return [read_record(machine.memory, vcpu) for vcpu in range(len(machine.vcpus))]


def wait_for(machine: Machine, field: str, more: int) -> None:
    """Return once a count of every vCPU is higher by `more`."""
    goals = [getattr(record, field) + more for record in records_of(machine)]
    deadline = time.monotonic() + HANG_S
    while any(getattr(record, field) < goal for record, goal in zip(records_of(machine), goals, strict=True)):
        assert time.monotonic() < deadline, f"{field} stays below {goals}: {records_of(machine)}"
        assert not machine.runner.join(0.001), records_of(machine)


def finish(machine: Machine) -> list[HvRecord]:
    """Let hvprobe end; what it found."""
    probe.stop(machine.memory)
    assert machine.wait(HANG_S) == probe.EXIT_FINE
    return records_of(machine)


def block_of(machine: Machine) -> HvBlock:
    """The run's block, which is there once a vCPU reads."""
    block = read_block(machine.memory)
    assert block is not None
    return block


def clock_of(machine: Machine) -> GuestClock:
    """The machine's clock, which must be the engine's."""
    assert machine.clock is not None
    return machine.clock


def assert_no_violations(records: list[HvRecord]) -> None:
    """A correct reference time shows none of them."""
    for record in records:
        assert not any(violations(record).values()), record


def refresh(machine: Machine) -> None:
    """Publish anew, at the same rate."""
    clock_of(machine).refresh()


def dilate(machine: Machine) -> None:
    """Change the rate there and back."""
    clock = clock_of(machine)
    clock.dilate(3, 2)
    clock.dilate(1, 1)


def republish(machine: Machine) -> None:
    """Change the rate for 20 ms as fast as it goes, so that the page is invalid for much of the while."""
    clock = clock_of(machine)
    if not clock.skew_ns:  # a slew that goes on needs the rate for itself
        stress.republish(clock, 100_000, [Fraction(1), Fraction(3, 2)], seconds=0.02)


def slew(machine: Machine) -> None:
    """Begin to work off an error, forward and then back."""
    clock = clock_of(machine)
    clock.slew(MS, 100_000)
    clock.refresh()
    clock.slew(-MS, 100_000)


def skip(machine: Machine) -> None:
    """Step forward by 1 ms."""
    clock_of(machine).skip(MS)


def pause_and_resume(machine: Machine) -> None:
    """Stand still for a moment, and for the guest's time, too."""
    machine.pause()
    machine.resume("freeze")


def pause_and_catch_up(machine: Machine) -> None:
    """Stand still, and step over that."""
    machine.pause()
    machine.resume("advance")


def save_and_restore(machine: Machine) -> None:
    """Take the guest's clock away and go on with the saved one, in the same memory."""
    machine.pause()
    machine.roll_back(machine.save(), policy="advance")
    machine.resume()


OPERATIONS: Final = [refresh, dilate, republish, slew, skip, pause_and_resume, pause_and_catch_up, save_and_restore]


def operate(machine: Machine, operation: Callable[[Machine], None], triples: int) -> int:
    """Repeat it, 11 times at least, until every vCPU has read page, counter, page `triples` times more; how often."""
    goals, times = [record.triples + triples for record in records_of(machine)], 0
    deadline = time.monotonic() + HANG_S
    while times <= 10 or any(record.triples < goal for record, goal in zip(records_of(machine), goals, strict=True)):
        assert time.monotonic() < deadline, records_of(machine)
        operation(machine)
        times += 1
        assert not machine.runner.join(0.002)
    return times
