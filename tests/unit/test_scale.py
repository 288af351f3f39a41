"""(mul, shift): to the bit Linux's, and the conversions both ways, against the oracle."""

from __future__ import annotations

import random
from array import array
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pvclock import ClockScale, ConfigError, RangeError, time_scale, tsc_ratio
from pvclock._bulk import time_scales
from pvclock._scale import guest_tsc
from tests import golden, oracle

NS_PER_S = 10**9
U64 = st.integers(0, 2**64 - 1)
FREQUENCIES = st.integers(1, 2**64 - 1)
EDGES = sorted(
    {
        base + near
        for base in (10**9, 2 * 10**9, 4 * 10**9, 2**31, 2**32, 2**33, 2**62, 2**63)
        for near in (-2, -1, 0, 1, 2)
    }
    | {1, 2, 3, 2**64 - 2, 2**64 - 1}
)


def log_uniform_frequencies(count: int) -> array[int]:
    """`count` frequencies, all magnitudes alike, the same each time."""
    source = random.Random(20_261_121)  # noqa: S311  # a sample, no secret
    return array("Q", (max(1, source.getrandbits(source.randint(1, 64))) for _ in range(count)))


@pytest.mark.row("K-15", "V-18")
def test_a_million_frequencies_give_linuxs_pair() -> None:
    """Whatever the frequency, (mul, shift) is that of kvm_get_time_scale() to the bit."""
    base_hz = log_uniform_frequencies(1_000_000)
    mul, shift = array("I", bytes(4 * len(base_hz))), array("b", bytes(len(base_hz)))
    time_scales(base_hz, mul, shift)
    wrong = [
        hz
        for hz, got_mul, got_shift in zip(base_hz, mul, shift, strict=True)
        if oracle.time_scale(NS_PER_S, hz) != (got_mul, got_shift)
    ]
    assert wrong == []


@pytest.mark.row("K-15")
@pytest.mark.parametrize("hz", EDGES)
def test_edges_give_linuxs_pair(hz: int) -> None:
    """At each limit of the algorithm the pair is Linux's, and its error is what the pair says."""
    scale = ClockScale.from_hz(hz)
    assert (scale.mul, scale.shift) == oracle.time_scale(NS_PER_S, hz)
    exact = oracle.rate_error_ppb(NS_PER_S, hz, scale.mul, scale.shift)
    assert scale.rate_error_ppb == pytest.approx(float(exact), rel=1e-12, abs=1e-12)


@pytest.mark.row("K-15")
@pytest.mark.parametrize("row", golden.KHZ_SCALES, ids=lambda row: f"{row.tsc_khz}kHz")
def test_golden_khz(row: golden.KhzScale) -> None:
    """The published table for whole kHz: both directions, and the error."""
    scale = ClockScale.from_khz(row.tsc_khz)
    assert (scale.mul, scale.shift, scale.hz) == (row.mul, row.shift, row.tsc_khz * 1000)
    assert f"{scale.rate_error_ppb:+.6f}" == row.error_ppb.replace("-0.000000", "+0.000000")
    assert time_scale(row.tsc_khz * 1000, NS_PER_S) == (row.reverse_mul, row.reverse_shift)
    assert oracle.pvclock_tsc_khz(scale.mul, scale.shift) == row.guest_khz


@pytest.mark.row("K-15")
@pytest.mark.parametrize("row", golden.HZ_SCALES, ids=lambda row: f"{row.tsc_hz}Hz")
def test_golden_hz(row: golden.HzScale) -> None:
    """The published table for frequencies that are no whole kHz."""
    scale = ClockScale.from_hz(row.tsc_hz)
    assert (scale.mul, scale.shift) == (row.mul, row.shift)
    assert f"{scale.rate_error_ppb:+.6f}" == row.error_ppb


@pytest.mark.row("K-15")
@given(scaled_hz=st.integers(1, 2**63 - 1), base_hz=FREQUENCIES)
def test_any_pair_of_frequencies(scaled_hz: int, base_hz: int) -> None:
    """Between any two frequencies the pair is Linux's."""
    assert time_scale(scaled_hz, base_hz) == oracle.time_scale(scaled_hz, base_hz)


@pytest.mark.row("K-15")
@pytest.mark.parametrize(("scaled_hz", "base_hz"), [(NS_PER_S, 0), (0, NS_PER_S), (2**63, 1), (-1, 1), (1, 2**64)])
def test_frequencies_without_a_pair_are_errors(scaled_hz: int, base_hz: int) -> None:
    """Where Linux would loop for ever or wrap there is an error that names the frequencies."""
    with pytest.raises(RangeError, match=r"[Hh]z"):
        time_scale(scaled_hz, base_hz)


@pytest.mark.row("K-15")
def test_a_frequency_of_zero_says_what_to_give() -> None:
    """0 Hz is refused with a sentence that helps; so are a negative and a 65-bit frequency."""
    with pytest.raises(RangeError, match="0 Hz; give the frequency of the guest's TSC"):
        ClockScale.from_hz(0)
    for hz in (-1, 2**64):
        with pytest.raises(RangeError, match="64 bits"):
            ClockScale.from_hz(hz)
    with pytest.raises(ConfigError, match="nearest"):
        ClockScale.from_hz(1, rounding="up")


@pytest.mark.row("E11")
@given(hz=FREQUENCIES)
@example(2_000_000_001)
@example(999_999_999)
@example(2**64 - 1)
@example(10**9 * 2**33 + 1)  # so near to a power of two that mul rounds up to 2^32
def test_nearest_is_nearest(hz: int) -> None:
    """rounding="nearest" is the closest pair there is: at most 2^-32 off."""
    scale = ClockScale.from_hz(hz, rounding="nearest")
    exact = Fraction(NS_PER_S, hz)
    error = abs(oracle.scale_rate(scale.mul, scale.shift) - exact) / exact
    assert (scale.mul, scale.shift) == oracle.nearest_scale(NS_PER_S, hz)
    assert error <= Fraction(1, 2**32)


@pytest.mark.row("E11")
@given(num=st.integers(1, 2**64 - 1), den=st.integers(1, 2**64 - 1))
@example(10**9 * 10, 2_596_132_000)
@example(10**9, 2_000_000_001)
def test_a_rates_pair_is_never_fast(num: int, den: int) -> None:
    """from_rate() is at most 2^-31 slow and never fast; a rate that takes too long a shift is refused."""
    rate = Fraction(num, den)
    if rate >= 2**31:
        with pytest.raises(RangeError):
            ClockScale.from_rate(num, den)
        return
    scale = ClockScale.from_rate(num, den)
    shown = oracle.scale_rate(scale.mul, scale.shift)
    assert 0 <= (rate - shown) / rate <= Fraction(1, 2**31)


@pytest.mark.row("E11", "K-15")
@given(khz=st.integers(1, 16_000_000))
def test_at_whole_khz_the_rates_pair_is_linuxs(khz: int) -> None:
    """For each frequency that KVM can have, the pair that the engine publishes is the kernel's to the bit."""
    assert ClockScale.from_rate(NS_PER_S, khz * 1000) == ClockScale.from_khz(khz)


SCALES = st.builds(ClockScale, st.integers(1, 2**32 - 1), st.integers(-63, 31))


@pytest.mark.row("K-14")
@given(scale=SCALES, ticks=U64)
@example(ClockScale(0xF4240000, 20), 2**44)
@example(ClockScale(0xFFFFFFFF, 0), 2**64 - 1)
@example(ClockScale(0xC5376ADD, -1), 2**33 + 1)
def test_ticks_to_ns_is_the_guests_arithmetic(scale: ClockScale, ticks: int) -> None:
    """to_ns() is the 96-bit product that every guest computes, truncations and lost bits included."""
    assert scale.to_ns(ticks) == oracle.scale_delta(ticks, scale.mul, scale.shift)


@pytest.mark.row("K-14")
@pytest.mark.parametrize("row", golden.SCALE_DELTAS)
def test_golden_deltas(row: golden.Scaled) -> None:
    """The published table of conversions, overflow of the left shift included."""
    assert ClockScale(row.mul, row.shift).to_ns(row.delta) == row.result


@pytest.mark.row("K-14", "E11")
@given(scale=SCALES, ns=U64)
@example(ClockScale(0x80000000, 0), 2**62)  # 2^63 ticks
@example(ClockScale(0xFFFFFFFF, 1), 2**64 - 2**32 - 1)  # 2^63 ticks, which the left shift makes 2^64
@example(ClockScale(0xFFFFFFFF, 4), 2**64 - 2**32 - 1)
def test_ns_to_ticks_is_the_exact_inverse(scale: ClockScale, ns: int) -> None:
    """to_ticks() gives the fewest ticks that show `ns`, or says that there are none."""
    ticks = oracle.ticks_to_reach(ns, scale.mul, scale.shift)
    if ticks is None:
        with pytest.raises(RangeError):
            scale.to_ticks(ns)
        return
    assert scale.to_ticks(ns) == ticks
    assert scale.to_ns(ticks) >= ns
    assert ticks == 0 or scale.to_ns(ticks - 1) < ns


@pytest.mark.row("E13")
@pytest.mark.parametrize(("mul", "shift"), [(0, 0), (2**32, 0), (-1, 0), (1, 32), (1, -64)])
def test_pairs_that_no_page_holds_are_refused(mul: int, shift: int) -> None:
    """mul 0, which divides a guest by zero, and shifts beyond a word cannot be made."""
    with pytest.raises(RangeError):
        ClockScale(mul, shift)


@pytest.mark.row("E13")
def test_a_scale_is_a_value() -> None:
    """Scales are equal by (mul, shift), hash alike, show themselves, and know the frequency that they express."""
    scale = ClockScale(0xC5376ADD, -1)
    assert scale == ClockScale.from_hz(2_596_132_000)
    assert hash(scale) == hash(ClockScale.from_hz(2_596_132_000))
    assert scale != ClockScale(0xC5376ADD, 0)
    assert scale != (0xC5376ADD, -1)
    assert scale.hz == 2_596_132_000
    assert repr(scale) == "ClockScale(mul=0xc5376add, shift=-1, hz=2596132000)"


@pytest.mark.row("K-15")
@pytest.mark.parametrize("row", golden.TSC_RATIOS)
def test_golden_ratios(row: golden.TscRatio) -> None:
    """The published table of hardware ratios, with the kHz that Linux derives from them."""
    assert tsc_ratio(row.asked_khz, row.host_khz, row.frac_bits) == row.ratio
    assert guest_tsc(row.host_khz, ratio=row.ratio, frac_bits=row.frac_bits) == row.kvmclock_khz


@pytest.mark.row("K-15")
@given(host_tsc=U64, ratio=U64, offset=U64, frac_bits=st.sampled_from([32, 48]))
def test_guest_tsc_is_scaled_and_offset(host_tsc: int, ratio: int, offset: int, frac_bits: int) -> None:
    """guest = (host * ratio >> frac_bits) + offset, modulo 2^64."""
    scaled = oracle.scale_tsc(host_tsc, ratio, frac_bits)
    assert guest_tsc(host_tsc, offset, ratio, frac_bits) == (scaled + offset) % 2**64


@pytest.mark.row("K-15")
@pytest.mark.parametrize(
    ("guest_khz", "host_khz", "frac_bits"),
    [(0, 1, 48), (1, 0, 48), (2**32, 1, 48), (256, 1, 32), (2**17, 1, 48)],
)
def test_ratios_that_no_field_holds_are_refused(guest_khz: int, host_khz: int, frac_bits: int) -> None:
    """A ratio of 0, or one beyond SVM's 40 or VMX's 64 bits, is an error with the two frequencies."""
    with pytest.raises(RangeError, match="TSC ratio"):
        tsc_ratio(guest_khz, host_khz, frac_bits)


@pytest.mark.row("E13")
def test_a_batch_needs_buffers_of_one_length() -> None:
    """time_scales() refuses outputs that do not fit, and gives mul 0 for 0 Hz."""
    mul, shift = array("I", [7]), array("b", [7])
    time_scales(array("Q", [0]), mul, shift)
    assert (mul[0], shift[0]) == (0, 0)
    with pytest.raises(ConfigError, match="equal length"):
        time_scales(array("Q", [1, 2]), mul, shift)
