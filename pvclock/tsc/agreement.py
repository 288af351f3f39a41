"""Do a VM's vCPUs' TSCs agree, and which writes bring them together?

For a VMM after a restore: `agreement` compares the vCPUs, and `repair_plan` lists the writes that put all of them
on one offset.  What Linux's KVM does with such a write: `kvm_sync_model.py`.

Ticks are modulo 2^64: of two offsets less than 2^63 apart, the one that a shorter way up leads to is ahead.
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
    """Not 0: firmware or guest wrote one vCPU's TSC and not the other's; Linux then complains, and corrects it."""
    rate: Fraction
    """Guest ticks in a host tick."""

    @property
    def is_the_guests_doing(self) -> bool:
        """Do the offsets differ by what the guest wrote, and by no more?"""
        return self.offset_ahead_ticks == self.adjust_ahead_ticks != 0


class Agreement(NamedTuple):
    """How a VM's vCPUs' TSCs compare."""

    vcpus: tuple[VcpuComparison, ...]
    spread_ticks: int
    """Offsets: from the one that is furthest behind to the one furthest ahead, in [0, 2^64)."""

    @property
    def offsets_agree(self) -> bool:
        """Are all offsets the same?"""
        return self.spread_ticks == 0

    @property
    def adjusts_agree(self) -> bool:
        """Do all guests' vCPUs read the same IA32_TSC_ADJUST?"""
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
    """One write of a repair plan: vCPU's TSC offset, and what is to become of its IA32_TSC_ADJUST."""

    vcpu: int
    offset_before: int
    """Ticks modulo 2^64, as both others."""
    offset_after: int
    adjust_after: int
    moves_tsc_by: int
    """Ticks forward, in [0, 2^63)."""

    def applied(self, tsc: VcpuTsc) -> VcpuTsc:
        """A copy of `tsc` after the write; StateError if its offset is another one than the plan was made for."""
        if instance("tsc", tsc, VcpuTsc).offset != self.offset_before:
            state = f"vCPU {self.vcpu}'s TSC offset is {tsc.offset:#x}, not {self.offset_before:#x}"
            raise StateError("repair", state, "it was written meanwhile: make another plan")
        repaired = tsc.copy()
        repaired.offset, repaired.adjust = self.offset_after, self.adjust_after
        return repaired


def agreement(tscs: Sequence[VcpuTsc]) -> Agreement:
    """Compare the TSCs of a VM's vCPUs, given by number; RangeError for none."""
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
    """The writes that bring all vCPUs onto one offset, no TSC backwards; none if they agree already.

    target: that offset, in ticks modulo 2^64; by default that of the vCPU that is furthest ahead.
    adjust: "keep" leaves each IA32_TSC_ADJUST, as a host's write does: right after a restore that went wrong.  "carry"
    moves it along, as a guest's own write does: right for vCPUs that the guest set apart, whose ADJUST then agree, too.
    every_vcpu: also write vCPUs that stand right.  KVM's own clock wants that: it counts matching writes, and does not
    look at offsets.

    RangeError if a TSC would have to go back, or if the vCPUs are so far apart (2^63 ticks) that none is ahead.
    StateError if their rates differ: then no offset brings them together for longer than an instant.
    """
    flag("every_vcpu", every_vcpu)
    if text("adjust", adjust) not in ("keep", "carry"):
        raise ConfigError(f'adjust {quoted(adjust)} is unknown; use "keep" or "carry"')
    if not agreement(tscs).rates_agree:
        raise StateError("repair_plan", "the vCPUs' TSCs have different rates", "give them one frequency first")
    if target is None:
        target, spread_ticks = _furthest_ahead([tsc.offset for tsc in tscs])
        if spread_ticks >= CIRCLE // 2:
            raise RangeError(f"TSC offsets are spread over {spread_ticks:#x} ticks; from 2^63 on none is ahead")
    plan = [_write_onto(whole("target", target) & U64_MASK, vcpu, tsc, adjust) for vcpu, tsc in enumerate(tscs)]
    return [write for write in plan if every_vcpu or write.moves_tsc_by]


def _write_onto(target: int, vcpu: int, tsc: VcpuTsc, adjust: Literal["keep", "carry"]) -> OffsetWrite:
    moves_tsc_by = signed64(target - tsc.offset)
    if moves_tsc_by < 0:
        raise RangeError(f"TSC offset {target:#x} is {-moves_tsc_by} ticks behind vCPU {vcpu}'s; a TSC may not go back")
    adjust_after = tsc.adjust if adjust == "keep" else (tsc.adjust + moves_tsc_by) & U64_MASK
    return OffsetWrite(vcpu, tsc.offset, target, adjust_after, moves_tsc_by)


def _furthest_ahead(offsets: Sequence[int]) -> tuple[int, int]:
    """The offset after which the widest stretch of the circle is empty, and how wide the rest is.

    Of stretches equally wide, the one above the lowest offset: any choice will do, as long as it is always the same.
    """
    around = sorted(set(offsets))
    gaps = [after - offset for offset, after in pairwise([*around, around[0] + CIRCLE])]
    widest = max(gaps)
    return around[gaps.index(widest)], CIRCLE - widest
