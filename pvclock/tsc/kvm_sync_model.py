"""Model of how Linux's KVM handles writes of a guest's TSC: kvm_synchronize_tsc() and its callers.

KVM guesses: it takes a value near the one that it expects as an attempt to synchronise, and discards the value.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pvclock._scale import ClockScale, time_scale, tsc_ratio
from pvclock.arguments import flag, instance, sequence, vcpu_number, whole
from pvclock.errors import ConfigError, RangeError
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, RefNs, shown, signed64
from pvclock.tsc.vcpu_tsc import VcpuTsc

__all__ = ["HostInstant", "KvmTscSync", "KvmTscWrite"]

OLDEST_LINUX: Final = (5, 16)
"""First Linux with KVM_VCPU_TSC_OFFSET.  The model was checked against versions up to 7.3."""
FIRST_VALUE_IS_KEPT: Final = (6, 7)
"""First Linux with kvm_arch.user_set_tsc; older ones may discard even the first value that a VMM writes."""
OFFSET_COUNTS_AS_VALUE: Final = (6, 15)
"""First Linux in which a write of the offset also sets user_set_tsc."""

TOLERANCE_PPM: Final = 250
"""kvm.tsc_tolerance_ppm: KVM takes a guest frequency within it as the host's."""
MAX_RATIO: Final = {48: (1 << 64) - 1, 32: (1 << 40) - 1}
MAX_KHZ: Final = 0x7FFFFFFF


class HostInstant(NamedTuple):
    """One instant as host TSC and on CLOCK_MONOTONIC_RAW, or on a clock of the same rate."""

    tsc: HostTsc
    ns: RefNs


class KvmTscWrite(NamedTuple):
    """The result of one write."""

    is_matched: bool
    """True: the vCPU joins the current generation of synchronised vCPUs.  False: it begins a new one, alone."""
    offset: int
    """The vCPU's new offset, ticks modulo 2^64; after a write of a value it is as exact as the given instant."""
    error_ticks: int
    """The guest's TSC minus the requested value, signed; not 0 if KVM discarded the value."""
    generation: int
    stable_possible: bool
    """KvmTscSync.stable_possible after the write."""
    margin_ticks: int | None
    """Summed error of this and the last instant up to which this result stands; None: any error."""


class KvmTscSync:
    """One VM's TSC generations as KVM keeps them; each method is one of the VMM's calls.

    linux: the host kernel's version, from (5, 16) on; a distribution's kernel may have later fixes.  host_khz: its
    tsc_khz, as KVM_GET_TSC_KHZ of a new VM returns it.  frac_bits: 48 (VMX) or 32 (SVM) if the host scales TSCs, else
    None.  tsc_stable: the host kernel did not mark its TSC unstable.  clocksource_is_tsc: the host's clocksource is the
    TSC.  RangeError or ConfigError for values that no host has.

    As in KVM, a destroyed vCPU still counts until its VM is destroyed.
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
            raise RangeError(f"host TSC of {shown(host_khz)} kHz; it can be 1 to 2^31 - 1")
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
        """Can KVM use its master clock and set TSC_STABLE?  True if every vCPU joined the current generation.

        KVM re-evaluates it at the next KVM_RUN or KVM_SET_CLOCK.  Not modelled: it uses no master clock if the boot
        vCPU registered its page by MSR 0x12, nor ever after the host TSC went back over a suspend.
        """
        return self.clocksource_is_tsc and self._matched + 1 == len(self._vcpus)

    def tsc(self, vcpu: int) -> VcpuTsc:
        """vCPU's TSC.  Guest writes go straight to it and leave the generations alone."""
        return self._vcpu(vcpu).tsc

    def khz(self, vcpu: int) -> int:
        """vCPU's virtual_tsc_khz, which KVM_GET_TSC_KHZ returns."""
        return self._vcpu(vcpu).khz

    def create_vcpu(self, at: HostInstant, khz: int = 0) -> KvmTscWrite:
        """KVM_CREATE_VCPU: the first TSC starts at 0, others join.  khz: an earlier KVM_SET_TSC_KHZ of the VM."""
        whole("khz", khz)
        instance("at", at, HostInstant)
        self._vcpus.append(_Vcpu(self.host_khz, self.frac_bits or 48))
        self.set_tsc_khz(len(self._vcpus) - 1, khz)
        return self._write_value(self._vcpus[-1], 0, at, True, None)

    def write_msr(self, vcpu: int, value: int, at: HostInstant) -> KvmTscWrite:
        """KVM_SET_MSRS of IA32_TSC.  0 joins; so does a value within 1 s of the one that KVM expects."""
        it = self._vcpu(vcpu)
        instance("at", at, HostInstant)
        whole("value", value, 0, U64_MASK)
        synchronizing, margin_ticks = value == 0, None
        if value and (self._user_set or self.linux < FIRST_VALUE_IS_KEPT):
            synchronizing, margin_ticks = self._is_near(it, value, at)
        self._user_set = True
        return self._write_value(it, value, at, synchronizing, margin_ticks)

    def write_offset(self, vcpu: int, offset: int, at: HostInstant) -> KvmTscWrite:
        """KVM_SET_DEVICE_ATTR of KVM_VCPU_TSC_OFFSET: KVM keeps it as is; joins if the last write set the same."""
        it = self._vcpu(vcpu)
        instance("at", at, HostInstant)
        whole("offset", offset, 0, U64_MASK)
        is_matched = it.khz == self._last.khz and offset == self._last.offset
        self._user_set |= self.linux >= OFFSET_COUNTS_AS_VALUE
        it.tsc.offset = offset
        return self._commit(it, it.tsc.read(at.tsc), at, is_matched, 0, None)

    def set_tsc_khz(self, vcpu: int, khz: int) -> bool:
        """KVM_SET_TSC_KHZ of a vCPU (0: the host's); returns whether KVM accepts it.  Leaves the generations alone.

        On a host without scaling KVM stores even a frequency that it refuses as too low.
        """
        it, frac_bits = self._vcpu(vcpu), self.frac_bits
        if not 0 <= whole("khz", khz) < 1 << 32:
            raise RangeError(f"guest TSC of {shown(khz)} kHz; it can be 0 to 2^32 - 1")
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
        return self._vcpus[vcpu_number(vcpu, len(self._vcpus))]

    def _is_near(self, it: _Vcpu, value: int, at: HostInstant) -> tuple[bool, int | None]:
        """Whether `value` is within 1 s of the last write plus elapsed ticks, and the ticks until that changes.

        The sums wrap, as KVM's do, so the answer is surprising near 0 and 2^64.
        """
        grown, second = it.cycles(at.ns - self._last.ns), it.khz * 1000
        expected = (self._last.value + grown) & U64_MASK
        is_near = value < (expected + second) & U64_MASK and (value + second) & U64_MASK > expected
        ahead = [signed64(turn - expected) for turn in (value - second, value + second, -second, -1)]
        return is_near, min((abs(ticks) for ticks in ahead if ticks >= -grown), default=None)  # elapsed ticks are >= 0

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
        return self._commit(it, value, at, is_matched, signed64(it.tsc.read(at.tsc) - asked), margin_ticks)

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
    """KVM's state of a vCPU: virtual_tsc_khz, this_tsc_generation, offset and ratio."""

    def __init__(self, khz: int, frac_bits: int) -> None:
        self.khz = khz
        self.generation = 0
        self.tsc = VcpuTsc(frac_bits=frac_bits)

    def cycles(self, ns: int) -> int:
        """nsec_to_cycles(): KVM's fixed-point arithmetic for ticks to ns, in the other direction."""
        return ClockScale(*time_scale(self.khz * 1000, NS_PER_S)).to_ns(ns & U64_MASK)


class _LastWrite(NamedTuple):
    """kvm_arch.last_tsc_nsec, last_tsc_write, last_tsc_khz and last_tsc_offset."""

    ns: RefNs
    value: int
    khz: int
    offset: int
