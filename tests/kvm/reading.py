"""Waiting for guests that read their clocks, by how often they have: a busy host takes what time it takes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pvclock import HostTsc, Machine
from pvclock.payloads import probe
from pvclock.payloads.probe import ProbeRecord
from pvclock.quantities import U64_MASK
from tests.waiting import HANG_S


def wait_until_all_read_on(machine: Machine, more: int = 50_000) -> None:
    """Return once every vCPU has read its clock `more` times again."""
    vcpus = range(len(machine.vcpus))
    goals = [probe.read_record(machine.memory, vcpu).reads + more for vcpu in vcpus]
    deadline = time.monotonic() + HANG_S
    while any(probe.read_record(machine.memory, vcpu).reads < goals[vcpu] for vcpu in vcpus):
        assert time.monotonic() < deadline, "a vCPU reads no more"
        assert not machine.runner.join(0.001)


def assert_last_are_on_the_timeline(machine: Machine, records: Sequence[ProbeRecord], bound_ns: int) -> None:
    """Each vCPU's last reading is the timeline's value at its TSC, within `bound_ns`.

    Without STABLE it may be another vCPU's, which was ahead of it: for as long as this one had lost its CPU meanwhile.
    """
    clock = machine.clock
    assert clock is not None
    due_ns = [
        clock.at(HostTsc(record.last_tsc - clock.tsc(vcpu).offset & U64_MASK)) for vcpu, record in enumerate(records)
    ]
    for record, own_ns in zip(records, due_ns, strict=True):
        assert own_ns - bound_ns <= record.last_ns
        assert record.last_ns <= (max(due_ns) if record.clamped else own_ns) + bound_ns
