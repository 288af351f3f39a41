"""Waiting for guests that read their clocks, by how often they have: a busy host takes what time it takes."""

from __future__ import annotations

import time

from pvclock import Machine
from pvclock.payloads import probe
from tests.waiting import HANG_S


def wait_until_all_read_on(machine: Machine, more: int = 50_000) -> None:
    """Return once every vCPU has read its clock `more` times again."""
    vcpus = range(len(machine.vcpus))
    goals = [probe.read_record(machine.memory, vcpu).reads + more for vcpu in vcpus]
    deadline = time.monotonic() + HANG_S
    while any(probe.read_record(machine.memory, vcpu).reads < goals[vcpu] for vcpu in vcpus):
        assert time.monotonic() < deadline, "a vCPU reads no more"
        assert not machine.runner.join(0.001)
