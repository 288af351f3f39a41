"""A tick of a clock beside its model, and what it tells of stolen time."""

from __future__ import annotations

from tests import oracle
from tests.model.twins import STEAL_BYTES, Twins

__all__ = ["looked", "tick"]


def tick(twins: Twins) -> None:
    """Look at the host and the reference."""
    held = [_steal_record(twins, vcpu) for vcpu in range(len(twins.model.vcpus))]
    was_paused = twins.model.is_paused
    if not twins.call(twins.clock.tick):
        assert twins.lag or not twins.is_undecided, "a tick did not look at the host"
    for number, before in enumerate(held):
        if was_paused:
            continue
        vcpu, delay_ns = twins.model.vcpus[number], twins.host.run_delays_ns.get(number, 0)
        due_ns = delay_ns - vcpu.told_ns if delay_ns >= vcpu.told_ns else delay_ns
        vcpu.told_ns = delay_ns
        if before is not None:
            assert _steal_record(twins, number) == before + due_ns, f"vCPU {number}: steal time"


def looked(twins: Twins) -> bool:
    """Did the clock look at all that the host has done?  Moves whose outcome depends on that ask first."""
    if twins.is_undecided:
        tick(twins)
    return not twins.is_undecided


def _steal_record(twins: Twins, vcpu: int) -> int | None:
    """What vCPU's guest was told, if it has a record."""
    gpa = twins.model.vcpus[vcpu].steal_gpa
    if gpa is None or not twins.covers(gpa, STEAL_BYTES):
        return None
    return oracle.StealTime.parse(twins.memory.read(gpa, STEAL_BYTES)).steal
