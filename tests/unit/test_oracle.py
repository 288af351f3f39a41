"""The oracle itself, against golden values and against its own definitions."""

from fractions import Fraction
from struct import pack

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import golden, oracle
from tests.oracle import NS_PER_S, U32, U64, ExactLine, Scale, TimeInfo, VcpuTscOracle

pytestmark = pytest.mark.row("style")  # these prove the reference that other tests stand on, not pvclock

u64 = st.integers(0, U64 - 1)
mul32 = st.integers(0, U32 - 1)
shifts = st.integers(-63, 63)
frequencies = st.integers(1, U64 - 1)


def is_rounded(exact: Fraction, text: str) -> bool:
    """Whether six decimal places of a golden value are those of the exact one."""
    return abs(exact - Fraction(text)) <= Fraction(1, 2 * 10**6)


@pytest.mark.parametrize("row", golden.KHZ_SCALES, ids=lambda row: str(row.tsc_khz))
def test_time_scale_gives_every_golden_khz(row: golden.KhzScale) -> None:
    """Both directions, their errors, and the kHz that a guest derives back are the table's."""
    hz = row.tsc_khz * 1000
    assert oracle.time_scale(NS_PER_S, hz) == Scale(row.mul, row.shift)
    assert oracle.time_scale(hz, NS_PER_S) == Scale(row.reverse_mul, row.reverse_shift)
    assert is_rounded(oracle.rate_error_ppb(NS_PER_S, hz, row.mul, row.shift), row.error_ppb)
    reverse_error = oracle.rate_error_ppb(hz, NS_PER_S, row.reverse_mul, row.reverse_shift)
    assert is_rounded(reverse_error, row.reverse_error_ppb)
    assert oracle.pvclock_tsc_khz(row.mul, row.shift) == row.guest_khz


@pytest.mark.parametrize("row", golden.HZ_SCALES, ids=lambda row: str(row.tsc_hz))
def test_time_scale_gives_every_golden_hz(row: golden.HzScale) -> None:
    """Edge frequencies in Hz give the table's pair and error."""
    assert oracle.time_scale(NS_PER_S, row.tsc_hz) == Scale(row.mul, row.shift)
    assert is_rounded(oracle.rate_error_ppb(NS_PER_S, row.tsc_hz, row.mul, row.shift), row.error_ppb)


def test_time_scale_worst_error_of_a_khz_clock() -> None:
    """The worst kHz from 1 kHz to 10 GHz is off by 0.46498 ppb."""
    hz = 1_997_945_000
    error = oracle.rate_error_ppb(NS_PER_S, hz, *oracle.time_scale(NS_PER_S, hz))
    assert round(abs(error), 5) == Fraction("0.46498")


@pytest.mark.parametrize(("scaled_hz", "base_hz"), [(NS_PER_S, 0), (0, 1), (2**63, 1), (NS_PER_S, -1), (U64, 1)])
def test_time_scale_refuses_what_linux_cannot_finish(scaled_hz: int, base_hz: int) -> None:
    """Frequencies that are no u64, or that Linux would loop on for ever, are errors here."""
    with pytest.raises(ValueError, match=r"."):
        oracle.time_scale(scaled_hz, base_hz)


@given(scaled_hz=st.one_of(st.integers(1, 2**31 - 1), st.integers(1, 2**63 - 1)), base_hz=frequencies)
@example(scaled_hz=2**31 + 1, base_hz=2**31 + 1)  # scaled loses its low bit: mul is 2**31 - 1
def test_time_scale_normalises_mul_and_stays_close(scaled_hz: int, base_hz: int) -> None:
    """Below 2**31 Hz mul has its top bit set, and the rate is always right to what truncation costs."""
    mul, shift = oracle.time_scale(scaled_hz, base_hz)
    assert (2**31 if scaled_hz < 2**31 else 1) <= mul < U32
    bits_kept = min(scaled_hz.bit_length(), base_hz.bit_length(), 31)
    assert abs(oracle.rate_error_ppb(scaled_hz, base_hz, mul, shift)) <= Fraction(4 * 10**9, 2**bits_kept)


@given(scaled_hz=frequencies, base_hz=frequencies)
def test_nearest_scale_has_no_closer_neighbour(scaled_hz: int, base_hz: int) -> None:
    """One mul more or less is never nearer to the exact rate."""
    mul, shift = oracle.nearest_scale(scaled_hz, base_hz)
    assert 2**31 <= mul < U32
    error = abs(oracle.rate_error_ppb(scaled_hz, base_hz, mul, shift))
    for neighbour in (mul - 1, mul + 1):
        assert error <= abs(oracle.rate_error_ppb(scaled_hz, base_hz, neighbour, shift))


@pytest.mark.parametrize("row", golden.SCALE_DELTAS)
def test_scale_delta_gives_every_golden_value(row: golden.Scaled) -> None:
    """Floor, lost bits and the overflow of a left shift are the table's."""
    assert oracle.scale_delta(row.delta, row.mul, row.shift) == row.result


@given(delta=u64, mul=mul32, shift=st.one_of(shifts, st.integers(-128, 127)))
def test_scale_delta_always_fits_64_bits(delta: int, mul: int, shift: int) -> None:
    """The product is below 2**96, so nothing but the left shift can overflow; shifts C leaves undefined give 0."""
    result = oracle.scale_delta(delta, mul, shift)
    assert 0 <= result < U64
    if abs(shift) >= 64:
        assert result == 0


@given(ns=u64, mul=mul32, shift=shifts)
def test_ticks_to_reach_is_the_fewest(ns: int, mul: int, shift: int) -> None:
    """The ticks named reach the time, one tick less does not, and None means that no lossless delta does."""
    ticks = oracle.ticks_to_reach(ns, mul, shift)
    if ticks is None:
        most = (U64 - 1) >> max(shift, 0)
        assert oracle.scale_delta(most, mul, shift) < ns
        return
    assert oracle.scale_delta(ticks, mul, shift) >= ns
    if ticks:
        assert oracle.scale_delta(ticks - 1, mul, shift) < ns


@pytest.mark.parametrize("row", golden.TSC_RATIOS)
def test_tsc_ratio_gives_every_golden_value(row: golden.TscRatio) -> None:
    """Two floors in a row lose a kHz, as KVM's do; the same in Hz loses less."""
    ratio = oracle.tsc_ratio(row.asked_khz, row.host_khz, row.frac_bits)
    assert ratio == row.ratio
    khz = oracle.scale_tsc(row.host_khz, ratio, row.frac_bits)
    assert khz == row.kvmclock_khz
    assert oracle.time_scale(NS_PER_S, khz * 1000) == Scale(row.mul, row.shift)
    exact_hz = oracle.scale_tsc(row.host_khz * 1000, ratio, row.frac_bits)
    assert exact_hz == row.exact_hz
    if row.exact_mul is not None:
        assert oracle.time_scale(NS_PER_S, exact_hz) == (row.exact_mul, row.exact_shift)


@pytest.mark.parametrize("guest_khz", [0, 256 * 3_000_000])
def test_tsc_ratio_out_of_range_is_refused(guest_khz: int) -> None:
    """A ratio of 0, or one that AMD's 40 bits cannot hold, is an error."""
    with pytest.raises(ValueError, match="32-bit ratio"):
        oracle.tsc_ratio(guest_khz, 3_000_000, oracle.SVM_FRAC_BITS)


@pytest.mark.parametrize("step", golden.TIME_VERSIONS)
def test_time_page_version_steps(step: golden.VersionStep) -> None:
    """Even advances by two, odd junk by three, modulo 2**32."""
    odd = oracle.version_odd(step.old)
    assert (odd, oracle.version_even(odd)) == (step.during, step.after)


@pytest.mark.parametrize(("old", "after"), golden.WALL_VERSIONS)
def test_wall_clock_version_steps(old: int, after: int) -> None:
    """A wall clock's version is odd while it is written, and ends as a real host left it."""
    odd = oracle.wall_version_odd(old)
    assert odd % 2 == 1
    assert oracle.wall_version_even(odd) == after


def test_time_info_is_parsed_and_read_as_a_guest_does() -> None:
    """The eight fields lie where the ABI puts them, and a read adds the scaled delta."""
    page = bytes.fromhex("02000000 00000000 0010000000000000 e803000000000000 dd6a37c5 ff 03 0000")
    info = TimeInfo.parse(page)
    assert info == TimeInfo(2, 0, 0x1000, 1000, 0xC5376ADD, -1, oracle.TSC_STABLE | oracle.GUEST_STOPPED, 0)
    assert not info.is_being_updated
    assert info.read(0x1000) == 1000
    assert info.read(0x1000 + 2_596_132_000) == 1000 + 999_999_999


def test_time_info_wraps_without_a_guard() -> None:
    """A TSC one tick before the timestamp reads centuries, and a sum beyond 64 bits wraps."""
    page = pack("<IIQQIbBH", 3, 0, 1, U64 - 1, U32 - 1, 0, 0, 0)
    info = TimeInfo.parse(page)
    assert info.is_being_updated
    assert info.read(0) == (U64 - 1 + 0xFFFFFFFEFFFFFFFF) % U64


@given(offset=u64, adjust=u64, tsc=u64, host_tsc=u64)
def test_vcpu_tsc_guest_writes_keep_tsc_less_adjust(offset: int, adjust: int, tsc: int, host_tsc: int) -> None:
    """What a guest writes to either register shows at once, and the difference of the two never changes."""
    vcpu = VcpuTscOracle(offset=offset)
    difference = (vcpu.read(host_tsc) - vcpu.adjust) % U64
    vcpu.guest_write_adjust(adjust)
    assert vcpu.adjust == adjust
    assert (vcpu.read(host_tsc) - vcpu.adjust) % U64 == difference
    vcpu.guest_write_tsc(tsc, host_tsc)
    assert vcpu.read(host_tsc) == tsc
    assert (tsc - vcpu.adjust) % U64 == difference


@given(offset=u64, adjust=u64, tsc=u64, host_tsc=u64)
def test_vcpu_tsc_host_writes_change_one_alone(offset: int, adjust: int, tsc: int, host_tsc: int) -> None:
    """The host restores either register without moving the other, in either order."""
    adjust_first, tsc_first = VcpuTscOracle(offset=offset), VcpuTscOracle(offset=offset)
    adjust_first.host_write_adjust(adjust)
    adjust_first.host_write_tsc(tsc, host_tsc)
    tsc_first.host_write_tsc(tsc, host_tsc)
    tsc_first.host_write_adjust(adjust)
    for vcpu in (adjust_first, tsc_first):
        assert (vcpu.read(host_tsc), vcpu.adjust) == (tsc, adjust)


def test_vcpu_tsc_adjust_not_offered_is_ignored() -> None:
    """Without the CPUID bit both writes of TSC_ADJUST do nothing, and it reads 0 as after reset."""
    vcpu = VcpuTscOracle(offset=5, offers_adjust=False)
    vcpu.guest_write_adjust(100)
    vcpu.host_write_adjust(100)
    assert (vcpu.adjust, vcpu.read(10)) == (0, 15)


def test_vcpu_tsc_is_scaled_before_it_is_offset() -> None:
    """Twice the host's rate, plus the offset."""
    vcpu = VcpuTscOracle(offset=7, ratio=2 << 32, frac_bits=oracle.SVM_FRAC_BITS)
    assert vcpu.read(100) == 207


def test_exact_line_has_no_rounding() -> None:
    """A third of a nanosecond stays a third, on both sides of the anchor."""
    line = ExactLine(tsc0=10, ns0=Fraction(1), rate=Fraction(1, 3))
    assert (line.at(11), line.at(7)) == (Fraction(4, 3), Fraction(0))
