"""Agreement of a VM's vCPUs' TSCs, and the writes that restore it.

For a VMM after a restore: `agreement` compares the vCPUs, and `repair_plan` lists the writes that put all of them
on one offset.  `kvm_sync_model.py` models what Linux's KVM does with such a write.

Ticks are modulo 2^64: offset a is ahead of b if signed64(a - b) > 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Final, Literal, NamedTuple

from pvclock.arguments import flag, instance, instances, text, whole
from pvclock.errors import ConfigError, RangeError, StateError
from pvclock.quantities import U64_MASK, quoted, signed64
from pvclock.tsc.vcpu_tsc import VcpuTsc

__all__ = [
    "Agreement",
    "OffsetWrite",
    "VcpuComparison",
    "agreement",
    "repair_plan",
]

CIRCLE: Final = 1 << 64


class VcpuComparison(NamedTuple):
    """One vCPU's TSC beside vCPU 0's; ticks are signed, in [-2^63, 2^63)."""

    vcpu: int
    offset_ahead_ticks: int
    adjust_ahead_ticks: int
    """Not 0 if firmware or guest wrote only one vCPU's TSC; Linux then warns and corrects it."""
    rate: Fraction
    """Guest ticks in a host tick."""

    @property
    def is_the_guests_doing(self) -> bool:
        """Is the difference of the offsets exactly what the guest's own writes made?"""
        return self.offset_ahead_ticks == self.adjust_ahead_ticks != 0


class Agreement(NamedTuple):
    """How a VM's vCPUs' TSCs compare."""

    vcpus: tuple[VcpuComparison, ...]
    spread_ticks: int
    """From the offset furthest behind to the one furthest ahead, in [0, 2^64)."""

    @property
    def offsets_agree(self) -> bool:
        """Are all offsets the same?"""
        return self.spread_ticks == 0

    @property
    def adjusts_agree(self) -> bool:
        """Do all vCPUs read the same IA32_TSC_ADJUST?"""
        return not any(vcpu.adjust_ahead_ticks for vcpu in self.vcpus)

    @property
    def rates_agree(self) -> bool:
        """Do all TSCs tick at the same rate?"""
        return len({vcpu.rate for vcpu in self.vcpus}) == 1

    @property
    def stable_allowed(self) -> bool:
        """May pages say TSC_STABLE: do all vCPUs read the same TSC at the same time?"""
        return self.offsets_agree and self.rates_agree


class OffsetWrite(NamedTuple):
    """One write of a repair plan: a vCPU's new TSC offset and IA32_TSC_ADJUST."""

    vcpu: int
    offset_before: int
    """Ticks modulo 2^64, like the next two."""
    offset_after: int
    adjust_after: int
    moves_tsc_by: int
    """Ticks forward, in [0, 2^63)."""

    def applied(self, tsc: VcpuTsc) -> VcpuTsc:
        """A copy of `tsc` after the write; StateError if its offset changed since the plan was made."""
        if instance("tsc", tsc, VcpuTsc).offset != self.offset_before:
            state = f"vCPU {self.vcpu}'s TSC offset is {tsc.offset:#x}, not {self.offset_before:#x}"
            raise StateError("repair", state, "it was written meanwhile: make another plan")
        repaired = tsc.copy()
        repaired.offset, repaired.adjust = self.offset_after, self.adjust_after
        return repaired


def agreement(tscs: Sequence[VcpuTsc]) -> Agreement:
    """Compare the TSCs of a VM's vCPUs, in vCPU order; RangeError if there are none."""
    if not instances("tscs", tscs, VcpuTsc):
        raise RangeError("agreement of 0 vCPUs; give at least one")
    first = tscs[0]
    compared = (
        VcpuComparison(vcpu, signed64(tsc.offset - first.offset), signed64(tsc.adjust - first.adjust), tsc.rate)
        for vcpu, tsc in enumerate(tscs)
    )
    _, spread_ticks = _furthest_ahead([tsc.offset for tsc in tscs])
    return Agreement(tuple(compared), spread_ticks)


def repair_plan(
    tscs: Sequence[VcpuTsc],
    *,
    target: int | None = None,
    adjust: Literal["keep", "carry"] = "keep",
    every_vcpu: bool = False,
) -> list[OffsetWrite]:
    """The writes that put all vCPUs on one offset without moving a TSC back; empty if they agree already.

    target: that offset, in ticks modulo 2^64; by default that of the vCPU furthest ahead.
    adjust: "keep" leaves IA32_TSC_ADJUST alone, like a host write; use it after a failed restore.  "carry" moves it
    along, like a guest write; use it for vCPUs that the guest set apart, whose ADJUST then agree as well.
    every_vcpu: also write vCPUs that have the target offset already.  KVM's own clock needs that: it counts matching
    writes and ignores offsets.

    RangeError if a TSC would have to go back, or if the vCPUs are 2^63 ticks or more apart, so that none is ahead.
    StateError if their rates differ: no offset makes such TSCs agree for longer than an instant.
    """
    flag("every_vcpu", every_vcpu)
    if text("adjust", adjust) not in ("keep", "carry"):
        raise ConfigError(f'adjust {quoted(adjust)} is unknown; use "keep" or "carry"')
    if not agreement(tscs).rates_agree:
        raise StateError("repair_plan", "the vCPUs' TSCs have different rates", "give them one frequency first")
    if target is None:
        target, spread_ticks = _furthest_ahead([tsc.offset for tsc in tscs])
        if spread_ticks >= CIRCLE // 2:
            raise RangeError(f"TSC offsets spread over {spread_ticks:#x} ticks; from 2^63 on no vCPU is ahead")
    plan = [_write_onto(whole("target", target) & U64_MASK, vcpu, tsc, adjust) for vcpu, tsc in enumerate(tscs)]
    return [write for write in plan if every_vcpu or write.moves_tsc_by]


def _write_onto(target: int, vcpu: int, tsc: VcpuTsc, adjust: Literal["keep", "carry"]) -> OffsetWrite:
    moves_tsc_by = signed64(target - tsc.offset)
    if moves_tsc_by < 0:
        raise RangeError(f"TSC offset {target:#x} is {-moves_tsc_by} ticks behind vCPU {vcpu}'s; a TSC may not go back")
    adjust_after = tsc.adjust if adjust == "keep" else (tsc.adjust + moves_tsc_by) & U64_MASK
    return OffsetWrite(vcpu, tsc.offset, target, adjust_after, moves_tsc_by)


def _furthest_ahead(offsets: Sequence[int]) -> tuple[int, int]:
    """The offset below the widest gap of the 2^64 circle, and the width of the rest.

    Of equally wide gaps, take the one above the lowest offset, so that the result is deterministic.
    """
    around = sorted(set(offsets))
    gaps = [after - offset for offset, after in pairwise([*around, around[0] + CIRCLE])]
    widest = max(gaps)
    return around[gaps.index(widest)], CIRCLE - widest
