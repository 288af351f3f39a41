"""Waiting for guests that read their clocks, by how often they have: a busy host takes what time it takes."""

from __future__ import annotations

import time
from typing import Final

from pvclock import Machine
from pvclock.payloads import probe

LIMIT_S: Final = 60.0
"""Far beyond what anything here takes: past it something hangs."""


def wait_until_all_read_on(machine: Machine, more: int = 50_000) -> None:
    """Return once every vCPU has read its clock `more` times again."""
    vcpus = range(len(machine.vcpus))
    goals = [probe.read_record(machine.memory, vcpu).reads + more for vcpu in vcpus]
    deadline = time.monotonic() + LIMIT_S
    while any(probe.read_record(machine.memory, vcpu).reads < goals[vcpu] for vcpu in vcpus):
        assert time.monotonic() < deadline, "a vCPU reads no more"
        assert not machine.runner.join(0.001)
