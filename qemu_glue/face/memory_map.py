"""`info mtree -f`: who answers at which guest-physical addresses and I/O ports, as QEMU's monitor for people prints it.

Source: QEMU's softmmu/memory.c (mtree_print_flatview).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Final, NamedTuple

from pvclock.machine import Machine

__all__ = ["flat_views"]

PORTS: Final = 1 << 16


class Range(NamedTuple):
    """kind: "ram" or "i/o".  offset: in the region `name`."""

    first: int
    length: int
    kind: str
    name: str
    offset: int = 0

    def __str__(self) -> str:
        offset = f" @{self.offset:016x}" if self.offset else ""
        kvm = " KVM" if self.kind == "ram" else ""
        return (
            f"  {self.first:016x}-{self.first + self.length - 1:016x} (prio 0, {self.kind}): {self.name}{offset}{kvm}"
        )


def flat_views(machine: Machine, ram: str) -> Iterator[str]:
    """The lines.  ram: the name of the region that all RAM is in, one slot behind the other."""
    spaces = ["memory", *(f"cpu-memory-{vcpu.vcpu_id}" for vcpu in machine.vcpus)]
    views = ((spaces, "system", _memory(machine, ram)), (["I/O"], "io", _ports(machine)))
    for number, (names, root, ranges) in enumerate(views):
        yield f"FlatView #{number}"
        yield from (f' AS "{name}", root: {root}' for name in names)
        yield f" Root memory region: {root}"
        yield from map(str, ranges)
        yield ""


def _memory(machine: Machine, ram: str) -> list[Range]:
    slots = sorted(machine.memory.slots)
    blocks = []
    offset = 0
    for gpa, length in slots:
        blocks.append(Range(gpa, length, "ram", ram, offset))
        offset += length
    claims = (
        Range(claim.base, claim.length, "i/o", claim.name)
        for claim in machine.bus.memory_claims
        if not machine.memory.contains(claim.base, 1)
    )
    return sorted(chain(blocks, claims))


def _ports(machine: Machine) -> Iterator[Range]:
    """Devices, and between them the ports where nobody answers."""
    at = 0
    for claim in machine.bus.port_claims:
        if claim.base > at:
            yield Range(at, claim.base - at, "i/o", "io", at)
        yield Range(claim.base, claim.length, "i/o", claim.name)
        at = claim.base + claim.length
    if at < PORTS:
        yield Range(at, PORTS - at, "i/o", "io", at)
