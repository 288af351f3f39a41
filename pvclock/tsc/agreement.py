"""How a VM's vCPUs' TSCs come into step: whether they agree, what brings them together, what KVM makes of each write.

What a VMM needs after a restore: `agreement` compares the vCPUs, `repair_plan` lists the writes that put all of them
on one offset, and `KvmTscSync` foretells what Linux's KVM does with a write.  KVM guesses: it takes a value near the
one that it expects for an attempt to synchronise, and throws the value away.

Ticks are modulo 2^64: of two offsets less than 2^63 apart, the one that a shorter way up leads to is ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Final, Literal, NamedTuple

from pvclock._core import ClockScale, time_scale, tsc_ratio
from pvclock.arguments import flag, instance, instances, sequence, text, whole
from pvclock.errors import ConfigError, RangeError, StateError
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, RefNs, quoted, shown
from pvclock.tsc.vcpu_tsc import VcpuTsc

__all__ = [
    "Agreement",
    "HostInstant",
    "KvmTscSync",
    "KvmTscWrite",
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
        VcpuComparison(vcpu, _signed(tsc.offset - first.offset), _signed(tsc.adjust - first.adjust), tsc.rate)
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
    moves_tsc_by = _signed(target - tsc.offset)
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


def _signed(ticks: int) -> int:
    return (ticks + CIRCLE // 2) % CIRCLE - CIRCLE // 2


# What KVM makes of a write

OLDEST_LINUX: Final = (5, 16)
"""The first one with KVM_VCPU_TSC_OFFSET.  The newest that this was held against is 7.3."""
FIRST_VALUE_IS_KEPT: Final = (6, 7)
"""kvm_arch.user_set_tsc: before, even the first value that a VMM wrote could be thrown away."""
OFFSET_COUNTS_AS_VALUE: Final = (6, 15)
"""From then on a write of the offset sets user_set_tsc, too."""

TOLERANCE_PPM: Final = 250
"""kvm.tsc_tolerance_ppm: within it, a guest's frequency is taken for the host's."""
MAX_RATIO: Final = {48: (1 << 64) - 1, 32: (1 << 40) - 1}
MAX_KHZ: Final = 0x7FFFFFFF


class HostInstant(NamedTuple):
    """One instant as host TSC and on CLOCK_MONOTONIC_RAW, or whatever goes on at its pace."""

    tsc: HostTsc
    ns: RefNs


class KvmTscWrite(NamedTuple):
    """What KVM does with one write."""

    is_matched: bool
    """Does the vCPU join the generation of those that are in step?  Else it begins a new one, alone."""
    offset: int
    """The vCPU's offset from then on, ticks modulo 2^64; after a write of a value as exact as the instant was."""
    error_ticks: int
    """The guest's TSC less the value that was asked for, signed: 0, or the value was thrown away."""
    generation: int
    stable_possible: bool
    """As KvmTscSync.stable_possible, afterwards."""
    margin_ticks: int | None
    """How much instant and last instant together may be wrong for all this to stay true; None: at will."""


class KvmTscSync:
    """A model of kvm_synchronize_tsc() and its like: one VM's TSC generations, fed with what its VMM does.

    linux: the host kernel's version, from (5, 16) on; a distribution's kernel may have later fixes.  host_khz: its
    tsc_khz, as KVM_GET_TSC_KHZ of a new VM says.  frac_bits: 48 (VMX) or 32 (SVM) if the host scales TSCs, else None.
    tsc_stable: the host kernel did not mark its TSC unstable.  clocksource_is_tsc: the host's clocksource is the TSC.

    RangeError or ConfigError for what cannot be.  Destroyed vCPUs stay in a VM's count until it goes, here, too.
    """

    def __init__(
        self,
        linux: tuple[int, int],
        host_khz: int,
        *,
        frac_bits: int | None = None,
        tsc_stable: bool = True,
        clocksource_is_tsc: bool = True,
    ) -> None:
        if len(sequence("linux", linux, "a kernel's version, as (6, 7)")) != 2:
            raise ConfigError("linux has two numbers, as (6, 7)")
        linux = whole("linux[0]", linux[0]), whole("linux[1]", linux[1])
        if linux < OLDEST_LINUX:
            raise RangeError(f"Linux {linux[0]}.{linux[1]}; the model begins with 5.16")
        if not 0 < whole("host_khz", host_khz) <= MAX_KHZ:
            raise RangeError(f"host TSC of {shown(host_khz)} kHz; it must be in [1, 2^31)")
        if frac_bits is not None and whole("frac_bits", frac_bits) not in (32, 48):
            raise ConfigError(f"TSC ratio with {frac_bits} fraction bits; hardware has 48 (VMX), 32 (SVM) or none")
        self.linux = linux
        self.host_khz = host_khz
        self.frac_bits = frac_bits
        self.tsc_stable = flag("tsc_stable", tsc_stable)
        self.clocksource_is_tsc = flag("clocksource_is_tsc", clocksource_is_tsc)
        self.generation = 0
        self._vcpus: list[_Vcpu] = []
        self._matched = 0
        self._user_set = False
        self._last = _LastWrite(RefNs(0), 0, 0, 0)
        self._generations_offset = 0

    @property
    def stable_possible(self) -> bool:
        """Can KVM use its master clock, and write TSC_STABLE: did every vCPU join the present generation?

        KVM finds out at the next KVM_RUN or KVM_SET_CLOCK.  It uses none if the boot vCPU has its page by MSR 0x12, nor
        ever after the host's TSC went back over a suspend.
        """
        return self.clocksource_is_tsc and self._matched + 1 == len(self._vcpus)

    def tsc(self, vcpu: int) -> VcpuTsc:
        """vCPU's TSC.  What the guest writes goes straight there, and touches no generation."""
        return self._vcpu(vcpu).tsc

    def khz(self, vcpu: int) -> int:
        """vCPU's virtual_tsc_khz, as KVM_GET_TSC_KHZ says."""
        return self._vcpu(vcpu).khz

    def create_vcpu(self, at: HostInstant, khz: int = 0) -> KvmTscWrite:
        """KVM_CREATE_VCPU: the first one's TSC begins with 0, others join.  khz: KVM_SET_TSC_KHZ of the VM, before."""
        whole("khz", khz)
        instance("at", at, HostInstant)
        self._vcpus.append(_Vcpu(self.host_khz, self.frac_bits or 48))
        self.set_tsc_khz(len(self._vcpus) - 1, khz)
        return self._write_value(self._vcpus[-1], 0, at, True, None)

    def write_msr(self, vcpu: int, value: int, at: HostInstant) -> KvmTscWrite:
        """KVM_SET_MSRS of IA32_TSC.  0 asks to join; so does a value within 1 s of the one that KVM expects."""
        it = self._vcpu(vcpu)
        instance("at", at, HostInstant)
        _check_u64("value", value)
        synchronizing, margin_ticks = value == 0, None
        if value and (self._user_set or self.linux < FIRST_VALUE_IS_KEPT):
            synchronizing, margin_ticks = self._is_near(it, value, at)
        self._user_set = True
        return self._write_value(it, value, at, synchronizing, margin_ticks)

    def write_offset(self, vcpu: int, offset: int, at: HostInstant) -> KvmTscWrite:
        """KVM_SET_DEVICE_ATTR of KVM_VCPU_TSC_OFFSET: it is kept as it is, and joins if the last write set the same."""
        it = self._vcpu(vcpu)
        instance("at", at, HostInstant)
        _check_u64("offset", offset)
        is_matched = it.khz == self._last.khz and offset == self._last.offset
        self._user_set |= self.linux >= OFFSET_COUNTS_AS_VALUE
        it.tsc.offset = offset
        return self._commit(it, it.tsc.read(at.tsc), at, is_matched, 0, None)

    def set_tsc_khz(self, vcpu: int, khz: int) -> bool:
        """KVM_SET_TSC_KHZ of a vCPU, 0 for the host's: does KVM take it?  It changes no generation.

        It remembers even a frequency that it refuses for being too low for a host without scaling.
        """
        it, frac_bits = self._vcpu(vcpu), self.frac_bits
        if not 0 <= whole("khz", khz) < 1 << 32:
            raise RangeError(f"guest TSC of {shown(khz)} kHz; it has 32 bits, unsigned")
        if frac_bits and khz >= min(MAX_KHZ, self.host_khz * MAX_RATIO[frac_bits] >> frac_bits):
            return False
        it.khz = khz or self.host_khz
        low, high = (self.host_khz * (10**6 + ppm) // 10**6 for ppm in (-TOLERANCE_PPM, TOLERANCE_PPM))
        if low <= it.khz <= high:
            it.tsc.ratio = 1 << it.tsc.frac_bits
        elif frac_bits:
            it.tsc.ratio = tsc_ratio(it.khz, self.host_khz, frac_bits)
        else:
            return it.khz > self.host_khz  # KVM catches its TSC up at every exit
        return True

    def _vcpu(self, vcpu: int) -> _Vcpu:
        if not 0 <= whole("vcpu", vcpu) < len(self._vcpus):
            raise RangeError(f"vCPU {shown(vcpu)}; this VM has {len(self._vcpus)}")
        return self._vcpus[vcpu]

    def _is_near(self, it: _Vcpu, value: int, at: HostInstant) -> tuple[bool, int | None]:
        """Is `value` within 1 s of what the last write has grown to?  And how many ticks from where that changes?

        The sums wrap, as KVM's do: near 0 and 2^64 the answer is not what one would think.
        """
        grown, second = it.cycles(at.ns - self._last.ns), it.khz * 1000
        expected = (self._last.value + grown) & U64_MASK
        is_near = value < (expected + second) & U64_MASK and (value + second) & U64_MASK > expected
        ahead = [_signed(turn - expected) for turn in (value - second, value + second, -second, -1)]
        return is_near, min((abs(ticks) for ticks in ahead if ticks >= -grown), default=None)  # it never shrank

    def _write_value(
        self, it: _Vcpu, value: int, at: HostInstant, synchronizing: bool, margin_ticks: int | None
    ) -> KvmTscWrite:
        is_matched = synchronizing and it.khz == self._last.khz
        asked, grown = value, it.cycles(at.ns - self._last.ns)
        if is_matched and self.tsc_stable:
            it.tsc.offset = self._generations_offset
        else:
            if is_matched:
                value = (value + grown) & U64_MASK
            it.tsc.host_write_tsc(value, at.tsc)
        return self._commit(it, value, at, is_matched, _signed(it.tsc.read(at.tsc) - asked), margin_ticks)

    def _commit(
        self, it: _Vcpu, value: int, at: HostInstant, is_matched: bool, error_ticks: int, margin_ticks: int | None
    ) -> KvmTscWrite:
        offset = it.tsc.offset
        self._last = _LastWrite(at.ns, value, it.khz, offset)
        if not is_matched:
            self.generation += 1
            self._generations_offset, self._matched = offset, 0
        elif it.generation != self.generation:
            self._matched += 1
        it.generation = self.generation
        return KvmTscWrite(is_matched, offset, error_ticks, self.generation, self.stable_possible, margin_ticks)


class _Vcpu:
    """What KVM keeps of a vCPU: virtual_tsc_khz, this_tsc_generation, offset and ratio."""

    def __init__(self, khz: int, frac_bits: int) -> None:
        self.khz = khz
        self.generation = 0
        self.tsc = VcpuTsc(frac_bits=frac_bits)

    def cycles(self, ns: int) -> int:
        """nsec_to_cycles(): the same fixed-point arithmetic that turns ticks into ns, the other way round."""
        return ClockScale(*time_scale(self.khz * 1000, NS_PER_S)).to_ns(ns & U64_MASK)


class _LastWrite(NamedTuple):
    """kvm_arch.last_tsc_nsec, last_tsc_write, last_tsc_khz and last_tsc_offset."""

    ns: RefNs
    value: int
    khz: int
    offset: int


def _check_u64(what: str, value: int) -> None:
    if not 0 <= whole(what, value) <= U64_MASK:
        raise RangeError(f"{what} := {value:#x}; it has 64 bits, unsigned")
