"""The reference for every formula of the guest clocks: unbounded integers, slow and obvious.

Written from the description of Linux's behaviour alone, never from pvclock's own headers, so that the two can
disagree. Where C wraps, the wrap is spelled out here as `% U64` or `% U32`. Names follow the kernel's.
"""

from dataclasses import dataclass
from fractions import Fraction
from struct import Struct
from typing import NamedTuple, Self

U32 = 2**32
U64 = 2**64
NS_PER_S = 10**9

TSC_STABLE, GUEST_STOPPED = 1, 2


class Scale(NamedTuple):
    """The fixed-point factor of the ABI: `x` becomes `((x << shift) * mul) >> 32`."""

    mul: int
    shift: int


def time_scale(scaled_hz: int, base_hz: int) -> Scale:
    """Return what Linux's kvm_get_time_scale() makes of these two frequencies, bit for bit.

    Zero hertz, and 2**63 scaled hertz, whose double is 0 in 64 bits, leave Linux in an endless loop: ValueError.
    """
    if not (0 <= scaled_hz < U64 and 0 <= base_hz < U64):
        raise ValueError(f"not a pair of unsigned 64-bit frequencies: {scaled_hz}, {base_hz}")
    if base_hz == 0 or scaled_hz * 2 % U64 == 0:
        raise ValueError(f"Linux never returns from time_scale({scaled_hz}, {base_hz})")

    scaled, base, shift = scaled_hz, base_hz, 0
    while base > scaled * 2 % U64 or base >= U32:
        base >>= 1
        shift -= 1
    while base <= scaled or scaled >= U32:
        if scaled >= U32 or base >= U32 // 2:
            scaled >>= 1
        else:
            base <<= 1
        shift += 1
    return Scale((scaled << 32) // base, shift)


def nearest_scale(scaled_hz: int, base_hz: int) -> Scale:
    """Return the pair with `2**31 <= mul < 2**32` whose rate is nearest to scaled/base; a tie goes up."""
    target = Fraction(scaled_hz, base_hz) * U32
    shift = 0
    while target >= U32:
        target, shift = target / 2, shift + 1
    while target < U32 // 2:
        target, shift = target * 2, shift - 1
    mul = int(target + Fraction(1, 2))
    return Scale(U32 // 2, shift + 1) if mul == U32 else Scale(mul, shift)


def scale_rate(mul: int, shift: int) -> Fraction:
    """Return the exact factor that a pair stands for."""
    return Fraction(mul, U32) * Fraction(2) ** shift


def rate_error_ppb(scaled_hz: int, base_hz: int, mul: int, shift: int) -> Fraction:
    """Return by how many parts per billion a pair runs faster than scaled/base."""
    return (scale_rate(mul, shift) * base_hz / scaled_hz - 1) * 10**9


def scale_delta(delta: int, mul: int, shift: int) -> int:
    """Return pvclock_scale_delta() of an unsigned 64-bit delta.

    A left shift drops high bits. A shift by 64 or more, undefined in C, leaves nothing.
    """
    if not 0 <= delta < U64:
        raise ValueError(f"not an unsigned 64-bit delta: {delta}")
    if abs(shift) >= 64:
        return 0
    shifted = (delta << shift) % U64 if shift >= 0 else delta >> -shift
    return shifted * mul >> 32


def ticks_to_reach(ns: int, mul: int, shift: int) -> int | None:
    """Return the fewest ticks whose scale_delta() is at least `ns`.

    None where that takes 2**64 ticks or more, or so many that the left shift would drop a bit.
    """
    if ns <= 0:
        return 0
    if mul == 0 or abs(shift) >= 64:
        return None
    shifted = -(-(ns << 32) // mul)  # the fewest that reach ns once they are shifted
    ticks = -(-shifted // 2**shift) if shift >= 0 else shifted << -shift
    is_lossless = ticks < U64 and (shift < 0 or ticks << shift < U64)
    return ticks if is_lossless else None


def pvclock_tsc_khz(mul: int, shift: int) -> int:
    """Return the TSC frequency that a Linux guest derives from its page."""
    khz = (10**6 << 32) // mul
    return (khz << -shift) % U64 if shift < 0 else khz >> shift


# Fraction bits of the hardware's TSC ratio: Intel VMX, AMD SVM; and the ratio that KVM refuses, with all above it.
VMX_FRAC_BITS, SVM_FRAC_BITS = 48, 32
TSC_RATIO_LIMIT = {VMX_FRAC_BITS: 2**64 - 1, SVM_FRAC_BITS: 2**40 - 1}


def tsc_ratio(guest_khz: int, host_khz: int, frac_bits: int) -> int:
    """Return the hardware ratio for a guest TSC frequency, or raise ValueError where KVM refuses it."""
    ratio = (guest_khz << frac_bits) // host_khz
    if not 0 < ratio < TSC_RATIO_LIMIT[frac_bits]:
        raise ValueError(f"no {frac_bits}-bit ratio for {guest_khz} kHz on {host_khz} kHz")
    return ratio


def scale_tsc(host_tsc: int, ratio: int, frac_bits: int) -> int:
    """Return the guest's count, before any offset, at a count of the host."""
    return (host_tsc * ratio >> frac_bits) % U64


TIME_INFO = Struct("<IIQQIbBH")
REFERENCE_TSC_PAGE = Struct("<IIQq")


class TimeInfo(NamedTuple):
    """One struct pvclock_vcpu_time_info, as its bytes in guest memory say."""

    version: int
    pad0: int
    tsc_timestamp: int
    system_time: int
    tsc_to_system_mul: int
    tsc_shift: int
    flags: int
    pad: int

    @classmethod
    def parse(cls, page: bytes) -> Self:
        """Read the 32 bytes of a page."""
        return cls(*TIME_INFO.unpack(page))

    @property
    def is_being_updated(self) -> bool:
        """An odd version: a guest reads again."""
        return self.version % 2 == 1

    def read(self, tsc: int) -> int:
        """Return the nanoseconds that a guest computes at its TSC; one before the timestamp wraps, unguarded."""
        delta = (tsc - self.tsc_timestamp) % U64
        return (self.system_time + scale_delta(delta, self.tsc_to_system_mul, self.tsc_shift)) % U64


class PagePlaces(NamedTuple):
    """What a search of memory is to find: a count and two lists of offsets."""

    even_and_zero_pads: int
    pages: list[int]
    other_rate: list[int]


LINUX_SHIFTS = range(-34, 31)


def page_places(memory: bytes, tsc_hz: int, within_ppm: int, newest_tsc: int) -> PagePlaces:
    """Return where time pages can be, every 4 bytes, and legal ones of another rate.

    An odd version is a page in the middle of an update, whose tsc_timestamp may be anything.
    """
    found = PagePlaces(0, [], [])
    for offset in range(0, len(memory) - 31, 4):
        page = TimeInfo.parse(memory[offset : offset + 32])
        if page.version == 0 or page.pad0 != 0 or page.pad != 0:
            continue
        if not page.is_being_updated:
            found = found._replace(even_and_zero_pads=found.even_and_zero_pads + 1)
        is_scale = page.tsc_to_system_mul >= 2**31 and page.tsc_shift in LINUX_SHIFTS
        is_past = page.is_being_updated or 0 < page.tsc_timestamp <= newest_tsc
        if page.flags not in range(4) or not is_scale or not is_past:
            continue
        error_ppb = abs(rate_error_ppb(NS_PER_S, tsc_hz, page.tsc_to_system_mul, page.tsc_shift))
        (found.pages if error_ppb <= within_ppm * 1000 else found.other_rate).append(offset)
    return found


def version_odd(version: int) -> int:
    """Return what KVM stores before it changes a time page."""
    return (version + 1 | 1) % U32


def version_even(odd: int) -> int:
    """Return what KVM stores once a time page is whole again."""
    return (odd + 1) % U32


def wall_version_odd(version: int) -> int:
    """Return what KVM stores before it changes the wall clock: an odd version is made even first."""
    if version % 2 == 1:
        version += 1
    return (version + 1) % U32


def wall_version_even(odd: int) -> int:
    """Return what KVM stores once the wall clock is whole again."""
    return (odd + 1) % U32


@dataclass(frozen=True)
class StealTime:
    """One struct kvm_steal_time, as its bytes in guest memory say."""

    steal: int
    version: int
    flags: int
    preempted: int
    rest: bytes

    LAYOUT = Struct("<QIIB47s")
    PREEMPTED, FLUSH_TLB = 1, 2

    @classmethod
    def parse(cls, record: bytes) -> Self:
        """Read the 64 bytes of a record."""
        return cls(*cls.LAYOUT.unpack(record))

    def updated(self, ns: int) -> tuple["StealTime", bool]:
        """Return what record_steal_time() makes of it after `ns` of run delay, and whether a TLB flush was wanted."""
        version = self.version + 1 if self.version % 2 == 1 else self.version
        updated = StealTime((self.steal + ns) % U64, (version + 2) % U32, self.flags, 0, self.rest)
        return updated, bool(self.preempted & self.FLUSH_TLB)


def ipi_targets(low: int, high: int, lowest: int, cluster: int) -> list[int]:
    """Return the APIC ids that KVM_HC_SEND_IPI means; `cluster` bits are in each bitmap, and ids have 32 bits."""
    targets: list[int] = []
    for bitmap, base in ((low, lowest % U32), (high, (lowest + cluster) % U32)):
        bits = [bit for bit in range(cluster) if bitmap // 2**bit % 2 == 1]
        targets += [base + bit for bit in bits if base + bit < U32]
    return targets


HYPERV_UNIT_NS = 100
HYPERV_INVALID_SEQUENCES = (0, U32 - 1)


class ReferenceTscPage(NamedTuple):
    """The beginning of a Hyper-V reference TSC page, as its bytes in guest memory say."""

    sequence: int
    reserved: int
    scale: int
    offset: int

    @classmethod
    def parse(cls, page: bytes) -> Self:
        """Read the first 24 bytes of a page."""
        return cls(*REFERENCE_TSC_PAGE.unpack(page))

    @property
    def is_valid(self) -> bool:
        """No: a guest reads the counter MSR."""
        return self.sequence not in HYPERV_INVALID_SEQUENCES

    def read(self, tsc: int) -> int:
        """Return the units of 100 ns that a guest computes at its TSC."""
        return ((tsc * self.scale >> 64) + self.offset) % U64


def hyperv_sequence_after(sequence: int) -> int:
    """Return the next sequence under which a page is valid."""
    following = (sequence + 1) % U32
    while following in HYPERV_INVALID_SEQUENCES:
        following = (following + 1) % U32
    return following


def hyperv_scale(num: int, den: int) -> int:
    """Return num/den ns a tick as units a tick in 2**-64, the nearest; a tie goes up, and 2**64 fits no page."""
    double = den * HYPERV_UNIT_NS * 2  # half of it rounds to the nearest
    return (num * U64 * 2 + double // 2) // double


def kvm_hyperv_scale(mul: int, shift: int) -> int:
    """Return the scale of KVM's page, which it makes of kvmclock's (mul, shift)."""
    return int(Fraction(mul) * Fraction(2) ** (32 + shift) / HYPERV_UNIT_NS)


def hyperv_page_line(now: int, shown: int, scale: int, guest_tsc: int) -> tuple[int, int] | None:
    """Return scale and offset of the page whose line begins at `guest_tsc`, or None where no page can show it.

    `now` is the timeline, in 2**-64 units, and `shown` the units of the old line: the page shows those or 1 more. Its
    line is the first that has reached the timeline. Where that is 1 unit ahead, it begins as low as may be, and the
    scale carries what a whole offset cannot say, by 2**-31 at most: the smaller of the two ways, or the slower one
    where the line begins 1 unit ahead as it is. From 2 units ahead on the scale is the slowest that may be.
    """
    if scale >= U64:
        return None
    target = min(max(now, shown * U64), (shown + 2) * U64 - 1)
    offset = -((guest_tsc * scale - target) // U64)
    value = guest_tsc * scale + offset * U64
    if value >= now + U64:
        too_much, too_little = value - target, target - (value - U64)
        is_slower = target >= now + U64 or too_much < too_little
        if target >= now + 2 * U64:  # it comes back as fast as may be
            units = max(guest_tsc * (scale >> 31) - too_much, 0) // U64
            too_much, offset = too_much + units * U64, offset + units
        if (too_much if is_slower else too_little) > guest_tsc * (scale >> 31):
            return None
        if is_slower:
            scale -= too_much // guest_tsc if guest_tsc else 0
        else:
            scale, offset = scale - (-too_little // guest_tsc), offset - 1
        value = guest_tsc * scale + offset * U64
    return scale, offset - max(0, value // U64 - shown - 1)


class VcpuTscOracle:
    """One vCPU's TSC: an offset to the scaled host TSC, and the guest's own IA32_TSC_ADJUST."""

    def __init__(
        self, *, offset: int = 0, ratio: int = 1 << 48, frac_bits: int = VMX_FRAC_BITS, offers_adjust: bool = True
    ) -> None:
        """Begin at the given offset; `offers_adjust` is CPUID.7.0:EBX[1]."""
        self.offset = offset % U64
        self.adjust = 0
        self._ratio, self._frac_bits, self._offers_adjust = ratio, frac_bits, offers_adjust

    def read(self, host_tsc: int) -> int:
        """Return what rdtsc gives in the guest."""
        return (scale_tsc(host_tsc, self._ratio, self._frac_bits) + self.offset) % U64

    def guest_write_tsc(self, value: int, host_tsc: int) -> None:
        """Guest WRMSR 0x10: offset and adjust move together."""
        moved = value - self.read(host_tsc)
        self.offset = (self.offset + moved) % U64
        self.adjust = (self.adjust + moved) % U64

    def guest_write_adjust(self, value: int) -> None:
        """Guest WRMSR 0x3b: the TSC moves by the difference; ignored where CPUID does not offer it."""
        if self._offers_adjust:
            self.offset = (self.offset + value - self.adjust) % U64
            self.adjust = value % U64

    def host_write_tsc(self, value: int, host_tsc: int) -> None:
        """Host write of 0x10 that joins no generation of synchronised vCPUs: adjust keeps its value."""
        self.offset = (self.offset + value - self.read(host_tsc)) % U64

    def host_write_adjust(self, value: int) -> None:
        """Host write of 0x3b: the TSC stays; ignored where CPUID does not offer it."""
        if self._offers_adjust:
            self.adjust = value % U64


@dataclass(frozen=True)
class ExactLine:
    """One affine piece of a timeline, without any rounding."""

    tsc0: int
    ns0: Fraction
    rate: Fraction  # ns per tick

    def at(self, tsc: int) -> Fraction:
        """Return the exact nanoseconds at a TSC value, before or after `tsc0`."""
        return self.ns0 + (tsc - self.tsc0) * self.rate
