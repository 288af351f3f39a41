"""Scale arithmetic: (mul, shift) pairs of a page, TSC ratios, and the guest's TSC, bit-exact with the kernel's."""

cimport cython
from libc.stdint cimport uint64_t

from pvclock._math cimport (
    pvclock_fixed_rate, pvclock_guest_tsc, pvclock_scale, pvclock_scale_delta, pvclock_time_scale,
    pvclock_time_scale_of_rate, pvclock_tsc_ratio, pvclock_u128, pvclock_unscale_delta
)
from pvclock._memory cimport as_u64, as_whole, shortened

from pvclock.errors import ConfigError, RangeError, WrongType
from pvclock.quantities import NS_PER_S as _NS_PER_S


def time_scale(scaled_hz: int, base_hz: int) -> tuple[int, int]:
    """(mul, shift) that turns `base_hz` ticks into `scaled_hz` ticks, as Linux's kvm_get_time_scale() does.

    Both in [1, 2^64), scaled_hz below 2^63; else RangeError (Linux would not end).
    """
    cdef pvclock_scale scale
    if pvclock_time_scale(as_u64(scaled_hz, "scaled_hz"), as_u64(base_hz, "base_hz"), &scale) != 0:
        raise RangeError(f"no (mul, shift) from {base_hz} Hz to {scaled_hz} Hz: both must be at least 1, "
                         "the second below 2^63")
    return scale.mul, scale.shift


def fixed_rate(num: int, den: int, unit_ns: int) -> int:
    """num/den ns a tick as units of `unit_ns` ns a tick, the nearest multiple of 2^-64 units, in these.

    That of a reference TSC page, with units of 100 ns, is its scale, if it has 64 bits.  num, den: 64 bits; den at
    least 1; unit_ns from 1 to 2^63 - 1; else RangeError.
    """
    cdef uint64_t divisor = as_u64(den, "den"), unit = as_u64(unit_ns, "unit_ns")
    cdef pvclock_u128 rate
    if divisor == 0 or not 0 < unit < <uint64_t>1 << 63:
        raise RangeError(f"{shortened(num)}/{divisor} ns a tick in units of {unit} ns; den must be at least 1, unit_ns "
                         "in [1, 2^63)")
    rate = pvclock_fixed_rate(as_u64(num, "num"), divisor, unit)
    return int(<uint64_t>(rate >> 64)) << 64 | int(<uint64_t>rate)


def tsc_ratio(guest_khz: int, host_khz: int, frac_bits: int = 48) -> int:
    """Hardware TSC ratio floor(2^frac_bits * guest_khz / host_khz): 48 fraction bits on VMX, 32 on SVM.

    RangeError if a frequency is not in [1, 2^32) kHz or the ratio does not fit the hardware's field.
    """
    cdef uint64_t ratio
    frac_bits = as_whole(frac_bits, "frac_bits")
    if frac_bits not in (32, 48):
        raise ConfigError(f"TSC ratio with {shortened(frac_bits)} fraction bits; hardware has 48 (VMX) or 32 (SVM)")
    guest_khz, host_khz = as_whole(guest_khz, "guest_khz"), as_whole(host_khz, "host_khz")
    if not (0 < guest_khz < 1 << 32 and 0 < host_khz < 1 << 32):
        raise RangeError(f"TSC ratio {shortened(guest_khz)}/{shortened(host_khz)} kHz: each must be in [1, 2^32)")
    if pvclock_tsc_ratio(guest_khz, host_khz, frac_bits, &ratio) != 0:
        raise RangeError(f"TSC ratio {guest_khz}/{host_khz} does not fit the hardware's field")
    return ratio


def guest_tsc(host_tsc: int, offset: int = 0, ratio: int = 1 << 48, frac_bits: int = 48) -> int:
    """What RDTSC returns in the guest, in ticks: ((host_tsc * ratio) >> frac_bits) + offset, modulo 2^64."""
    frac_bits = as_whole(frac_bits, "frac_bits")
    if not 0 <= frac_bits < 128:
        raise RangeError(f"a TSC ratio with {shortened(frac_bits)} fraction bits; a 128-bit product has 0 to 127")
    return pvclock_guest_tsc(as_u64(host_tsc, "host_tsc"), as_u64(ratio, "ratio"), frac_bits, as_u64(offset, "offset"))


cdef uint64_t NS_PER_S = _NS_PER_S


cdef (uint64_t, uint64_t) _own_rate(pvclock_scale scale) noexcept:
    """The pair's own ns in a tick as num/den: mul * 2^(shift - 32)."""
    if scale.shift >= -31:
        return <uint64_t>scale.mul << max(scale.shift, 0), <uint64_t>1 << (32 + max(-scale.shift, 0))
    return max(scale.mul >> (-31 - scale.shift), 1), <uint64_t>1 << 63


@cython.final
cdef class ClockScale:
    """A pair (mul, shift) that turns TSC ticks into ns as a pvclock guest does: ((ticks << shift) * mul) >> 32.

    mul: 1 to 2^32 - 1.  shift: -63 to 31, negative is a right shift.  hz: the frequency that it was made for, or the
    one that it expresses, rounded.  ns_per_tick: the rate that it was made for, exactly, which other kinds of pages
    show with more bits.  Immutable, hashable, comparable by (mul, shift).
    """

    def __cinit__(self, mul: int, shift: int, hz: int | None = None) -> None:
        mul, shift = as_whole(mul, "mul"), as_whole(shift, "shift")
        if not (0 < mul < 1 << 32 and -64 < shift < 32):
            raise RangeError(f"(mul, shift) = ({shortened(mul)}, {shortened(shift)}); mul must be in [1, 2^32), "
                             "shift in [-63, 31]")
        self.c.mul, self.c.shift = mul, shift
        denominator = mul << (shift + 63)
        if hz is not None and as_whole(hz, "hz") < 1:
            raise RangeError(f"TSC frequency is {shortened(hz)} Hz; it must be at least 1 Hz")
        self.hz = hz if hz is not None else ((_NS_PER_S << 95) + denominator // 2) // denominator
        self.num, self.den = _own_rate(self.c) if hz is None or hz >> 64 else (NS_PER_S, <uint64_t>hz)

    @staticmethod
    def from_hz(hz: int, *, rounding: str = "floor") -> ClockScale:
        """The scale of a TSC of `hz` (1 to 2^64 - 1), else RangeError.

        rounding "floor" is Linux's kvm_get_time_scale() to the bit; "nearest" is the closest pair there is.
        """
        cdef pvclock_scale scale
        cdef uint64_t frequency = as_u64(hz, "hz")
        if rounding == "floor":
            failed = pvclock_time_scale(_NS_PER_S, frequency, &scale)
        elif rounding == "nearest":
            failed = pvclock_time_scale_of_rate(_NS_PER_S, frequency, True, &scale)
        elif not isinstance(rounding, str):
            raise WrongType("rounding", rounding, '"floor" or "nearest"')
        else:
            raise ConfigError(f'rounding {rounding!r} is unknown; use "floor" (as Linux) or "nearest"')
        if failed:
            raise RangeError("TSC frequency is 0 Hz; give the frequency of the guest's TSC, at least 1 Hz")
        return ClockScale(scale.mul, scale.shift, hz)

    @staticmethod
    def from_khz(khz: int, *, rounding: str = "floor") -> ClockScale:
        """The scale of a TSC of `khz` kHz, the unit of KVM_GET_TSC_KHZ."""
        return ClockScale.from_hz(as_whole(khz, "khz") * 1000, rounding=rounding)

    @staticmethod
    def from_rate(num: int, den: int) -> ClockScale:
        """The pair for num/den ns a tick, each in [1, 2^64), rounded down: never fast, at most 0.466 ppb slow.

        For every frequency of whole kHz below 16 GHz it is that of from_hz().  RangeError if there is none.
        """
        cdef pvclock_scale scale
        cdef ClockScale made
        if pvclock_time_scale_of_rate(as_u64(num, "num"), as_u64(den, "den"), False, &scale) != 0:
            raise RangeError(f"no (mul, shift) shows {num}/{den} ns a tick")
        made = ClockScale(scale.mul, scale.shift)
        made.num, made.den = num, den
        return made

    @property
    def mul(self) -> int:
        """tsc_to_system_mul of the page."""
        return self.c.mul

    @property
    def shift(self) -> int:
        """tsc_shift of the page."""
        return self.c.shift

    @property
    def ns_per_tick(self) -> tuple[int, int]:
        """(num, den): it was made for num/den ns a tick, or for its own rate, which terms of 64 bits may cut."""
        return self.num, self.den

    @property
    def rate_error_ppb(self) -> float:
        """How much faster than true time the pair runs at `hz`, in parts per 10^9."""
        exact = _NS_PER_S << 95
        shown = self.hz * self.c.mul << (self.c.shift + 63)
        return (shown - exact) * _NS_PER_S / exact

    def to_ns(self, ticks: int) -> int:
        """ns that a guest makes of `ticks`; both modulo 2^64, and a left shift loses high bits as it does there."""
        return pvclock_scale_delta(as_u64(ticks, "ticks"), self.c)

    def to_ticks(self, ns: int) -> int:
        """The fewest ticks that show at least `ns`; RangeError if no number of ticks below 2^64 does."""
        cdef uint64_t ticks
        if pvclock_unscale_delta(as_u64(ns, "ns"), self.c, &ticks) != 0:
            raise RangeError(f"{ns} ns are more ticks than mul {self.c.mul:#x}, shift {self.c.shift} can carry")
        return ticks

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClockScale):
            return NotImplemented
        return (self.mul, self.shift) == (other.mul, other.shift)

    def __hash__(self) -> int:
        return hash((self.c.mul, self.c.shift))

    def __repr__(self) -> str:
        return f"ClockScale(mul={self.c.mul:#x}, shift={self.c.shift}, hz={self.hz})"
