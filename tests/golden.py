"""Golden values of Linux's clock arithmetic, computed apart from pvclock; those of versions seen on a real host.

Data only: test_oracle.py holds the oracle against them, and the unit tests hold pvclock against them.
Errors are decimal text, rounded to six places, so that no float comes between.
"""

from typing import NamedTuple


class KhzScale(NamedTuple):
    """TSC to ns for an integer kHz, what a guest derives back from it, and the pair for ns to TSC."""

    tsc_khz: int
    shift: int
    mul: int
    error_ppb: str
    guest_khz: int
    reverse_shift: int
    reverse_mul: int
    reverse_error_ppb: str


KHZ_SCALES = (
    KhzScale(1, 20, 0xF4240000, "+0.000000", 1, -19, 0x863E0519, "+182817.012529"),
    KhzScale(1_000, 10, 0xFA000000, "+0.000000", 1_000, -9, 0x83126E97, "-0.251021"),
    KhzScale(100_000, 4, 0xA0000000, "+0.000000", 100_000, -3, 0xCCCCCCCC, "-0.232831"),
    KhzScale(999_999, 1, 0x80000863, "-0.226216", 999_999, 0, 0xFFFFEF39, "-0.007615"),
    KhzScale(1_000_000, 1, 0x80000000, "+0.000000", 1_000_000, 1, 0x80000000, "+0.000000"),
    KhzScale(1_000_001, 0, 0xFFFFEF39, "-0.008615", 1_000_001, 1, 0x80000863, "-0.225216"),
    KhzScale(1_999_999, 0, 0x80000431, "-0.345689", 1_999_999, 1, 0xFFFFF79C, "-0.120223"),
    KhzScale(2_000_000, 0, 0x80000000, "+0.000000", 2_000_000, 2, 0x80000000, "+0.000000"),
    KhzScale(2_000_001, -1, 0xFFFFF79C, "-0.120473", 2_000_000, 2, 0x80000431, "-0.345439"),
    KhzScale(2_400_000, -1, 0xD5555555, "-0.093132", 2_400_000, 2, 0x99999999, "-0.232831"),
    KhzScale(2_500_000, -1, 0xCCCCCCCC, "-0.232831", 2_500_000, 2, 0xA0000000, "+0.000000"),
    KhzScale(2_499_999, -1, 0xCCCCD22B, "-0.055322", 2_499_998, 2, 0x9FFFFBCE, "-0.096178"),
    KhzScale(2_596_132, -1, 0xC5376ADD, "-0.003336", 2_596_132, 2, 0xA62706D5, "-0.008885"),
    KhzScale(2_799_998, -1, 0xB6DB7646, "-0.054942", 2_799_998, 2, 0xB3332ACF, "-0.238270"),
    KhzScale(3_000_000, -1, 0xAAAAAAAA, "-0.232831", 3_000_000, 2, 0xC0000000, "+0.000000"),
    KhzScale(3_700_000, -1, 0x8A60DD67, "-0.337604", 3_700_000, 2, 0xECCCCCCC, "-0.201367"),
    KhzScale(4_000_000, -1, 0x80000000, "+0.000000", 4_000_000, 3, 0x80000000, "+0.000000"),
    KhzScale(4_294_967, -2, 0xEE6B2913, "-0.167875", 4_294_964, 3, 0x89705EA2, "-0.130063"),
    KhzScale(5_000_000, -2, 0xCCCCCCCC, "-0.232831", 5_000_000, 3, 0xA0000000, "+0.000000"),
    KhzScale(10_000_000, -3, 0xCCCCCCCC, "-0.232831", 10_000_000, 4, 0xA0000000, "+0.000000"),
)


class HzScale(NamedTuple):
    """TSC to ns for a frequency in Hz that KVM itself, which counts in kHz, never uses."""

    tsc_hz: int
    shift: int
    mul: int
    error_ppb: str


HZ_SCALES = (
    HzScale(1, 30, 0xEE6B2800, "+0.000000"),
    HzScale(2, 29, 0xEE6B2800, "+0.000000"),
    HzScale(999, 20, 0xF4629004, "-0.024414"),
    HzScale(1_000, 20, 0xF4240000, "+0.000000"),
    HzScale(999_999_999, 1, 0x80000002, "-0.068677"),
    HzScale(1_000_000_000, 1, 0x80000000, "+0.000000"),
    HzScale(1_000_000_001, 0, 0xFFFFFFFB, "-0.164153"),
    HzScale(1_999_999_999, 0, 0x80000001, "-0.034339"),
    HzScale(2_000_000_000, 0, 0x80000000, "+0.000000"),
    HzScale(2_000_000_001, 0, 0x80000000, "+0.500000"),
    HzScale(2_000_000_002, -1, 0xFFFFFFFB, "-0.164153"),
    HzScale(2_499_999_000, -1, 0xCCCCD22B, "-0.055322"),
    HzScale(2_499_999_999, -1, 0xCCCCCCCF, "+0.240284"),
    HzScale(2_500_000_000, -1, 0xCCCCCCCC, "-0.232831"),
    HzScale(2_147_483_647, -1, 0xEE6B2803, "+0.284339"),
    HzScale(2_147_483_648, -1, 0xEE6B2800, "+0.000000"),
    HzScale(2_147_483_649, -1, 0xEE6B2800, "+0.465661"),
    HzScale(4_294_967_295, -2, 0xEE6B2803, "+0.517169"),
    HzScale(4_294_967_296, -2, 0xEE6B2800, "+0.000000"),
    HzScale(4_294_967_297, -2, 0xEE6B2800, "+0.232831"),
    HzScale(4_000_000_001, -1, 0x80000000, "+0.250000"),
    HzScale(8_000_000_000, -2, 0x80000000, "+0.000000"),
    HzScale(17_179_869_184, -4, 0xEE6B2800, "+0.000000"),
    HzScale(1_000_000_000_000, -9, 0x83126E97, "-0.251021"),
)


class Scaled(NamedTuple):
    """One result of pvclock_scale_delta()."""

    mul: int
    shift: int
    delta: int
    result: int


SCALE_DELTAS = (
    Scaled(0x80000000, 1, 0, 0),
    Scaled(0x80000000, 1, 1, 1),
    Scaled(0x80000000, 1, 10**9, 10**9),
    Scaled(0xC5376ADD, -1, 1, 0),
    Scaled(0xC5376ADD, -1, 2, 0),
    Scaled(0xC5376ADD, -1, 3, 0),
    Scaled(0xC5376ADD, -1, 2_596_132_000, 999_999_999),
    Scaled(0xC5376ADD, -1, 2**64 - 1, 0x629BB56E7FFFFFFF),
    Scaled(0xAAAAAAAA, -1, 3 * 10**9, 999_999_999),
    Scaled(0xF4240000, 20, 1000, 10**9),
    Scaled(0xF4240000, 20, 2**44, 0),  # the left shift drops the bit
    Scaled(0xF4240000, 20, 2**44 + 1, 1_000_000),
    Scaled(0xFFFFFFFF, 0, 2**64 - 1, 0xFFFFFFFEFFFFFFFF),
    Scaled(0xCCCCCCCC, -2, 5 * 10**9 * 86400, 86_399_999_979_883),  # a day at -0.233 ppb
)


class TscRatio(NamedTuple):
    """Hardware TSC scaling: the ratio, the kHz that kvmclock then uses, and what exact Hz would give."""

    host_khz: int
    asked_khz: int
    frac_bits: int
    ratio: int
    kvmclock_khz: int
    mul: int
    shift: int
    exact_hz: int
    exact_mul: int | None
    exact_shift: int | None


TSC_RATIOS = (
    TscRatio(3_000_000, 2_500_000, 48, 0xD55555555555, 2_499_999, 0xCCCCD22B, -1, 2_499_999_999, 0xCCCCCCCF, -1),
    TscRatio(3_000_000, 2_500_000, 32, 0xD5555555, 2_499_999, 0xCCCCD22B, -1, 2_499_999_999, None, None),
    TscRatio(2_596_132, 1_000_000, 48, 0x629BB56E8169, 999_999, 0x80000863, 1, 999_999_999, 0x80000002, 1),
    TscRatio(2_596_132, 2_345_678, 48, 0xE74D9CB79FD3, 2_345_677, 0xDA461C70, -1, 2_345_677_999, None, None),
    TscRatio(2_400_000, 2_400_001, 48, 0x1000006FD91D8, 2_400_000, 0xD5555555, -1, 2_400_000_999, None, None),
    TscRatio(2_596_132, 5_192_264, 32, 0x200000000, 5_192_264, 0xC5376ADD, -2, 5_192_264_000, None, None),
)


class VersionStep(NamedTuple):
    """A time page's version before, during and after one publish by KVM."""

    old: int
    during: int
    after: int


TIME_VERSIONS = (
    VersionStep(0, 1, 2),
    VersionStep(2, 3, 4),
    VersionStep(17, 19, 20),
    VersionStep(0xFFFFFFFE, 0xFFFFFFFF, 0),
    VersionStep(0xFFFFFFFF, 1, 2),
)

# A wall clock's version before and after one write by KVM.
WALL_VERSIONS = (
    (0, 2),
    (1, 4),
    (2, 4),
    (5, 8),
    (0xFFFFFFFE, 0),
    (0xFFFFFFFF, 2),
)
