"""A core's TSC as a VMM that emulates it needs it: instructions, TSC_AUX, exact rates, deadlines, hardware controls."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pvclock import ConfigError, HostTsc, MsrFault, RangeError, VcpuTsc, tsc_ratio
from pvclock.tsc.emulation import rdmsr, rdtsc, rdtscp, tsc_controls
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_TSC_AUX, tsc_rate
from tests.oracle import SVM_FRAC_BITS, VMX_FRAC_BITS, VcpuTscOracle

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
KHZ = st.integers(1, 2**31 - 1)
PLAUSIBLE_KHZ = st.integers(100_000, 10_000_000)
HOST_HZ = 2_596_132_000


@st.composite
def scaled_tscs(draw: st.DrawFn) -> VcpuTsc:
    """A TSC with the hardware's ratio, Intel's or AMD's, or an exact rate, and any offset."""
    offset, guest_khz, host_khz = draw(U64), draw(PLAUSIBLE_KHZ), draw(PLAUSIBLE_KHZ)
    if draw(st.booleans()):
        return VcpuTsc(offset, rate=Fraction(guest_khz, host_khz))
    frac_bits = draw(st.sampled_from([VMX_FRAC_BITS, SVM_FRAC_BITS]))
    return VcpuTsc(offset, ratio=tsc_ratio(guest_khz, host_khz, frac_bits), frac_bits=frac_bits)


# Instructions and MSRs


@pytest.mark.row("P-16")
@given(offset=U64, adjust=U64, aux=U32, now=U64)
def test_instructions(offset: int, adjust: int, aux: int, now: int) -> None:
    """RDTSC, RDTSCP and RDMSR give zero-extended halves, RDTSCP TSC_AUX too, and say how long they are."""
    tsc, value = VcpuTsc(offset, adjust, aux=aux), (now + offset) % 2**64
    halves = (value % 2**32, value // 2**32)
    assert rdtsc(tsc, HostTsc(now)) == (*halves, None, len(bytes.fromhex("0f31")))
    assert rdtscp(tsc, HostTsc(now)) == (*halves, aux, len(bytes.fromhex("0f01f9")))
    assert rdmsr(tsc, MSR_IA32_TSC, HostTsc(now)) == (*halves, None, len(bytes.fromhex("0f32")))
    assert rdmsr(tsc, MSR_IA32_TSC_ADJUST, HostTsc(now)) == (adjust % 2**32, adjust // 2**32, None, 2)
    assert rdmsr(tsc, MSR_TSC_AUX, HostTsc(now)) == (aux, 0, None, 2)


@pytest.mark.row("P-17", "J-03", "J-04")
@given(writes=st.lists(st.tuples(st.sampled_from([MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_TSC_AUX]), U64, U64)), now=U64)
def test_msr_hooks(writes: list[tuple[int, int, int]], now: int) -> None:
    """After any WRMSRs of the three, RDMSR gives what the oracle has; TSC_AUX moves nothing else."""
    tsc, oracle, aux = VcpuTsc(), VcpuTscOracle(), 0
    for index, value, at in writes:
        tsc.wrmsr(index, value, HostTsc(at), amd=True)
        if index == MSR_IA32_TSC:
            oracle.guest_write_tsc(value, at)
        elif index == MSR_IA32_TSC_ADJUST:
            oracle.guest_write_adjust(value)
        else:
            aux = value % 2**32
    values = [rdmsr(tsc, index, HostTsc(now)) for index in (MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_TSC_AUX)]
    assert [each.rdx << 32 | each.rax for each in values] == [oracle.read(now), oracle.adjust, aux]


@pytest.mark.row("J-04", "P-17")
@given(tsc=scaled_tscs(), adjust=U64, value=U64, now=U64)
def test_a_write_of_a_scaled_tsc(tsc: VcpuTsc, adjust: int, value: int, now: int) -> None:
    """At whatever rate, the guest reads at once what it wrote, and ADJUST has moved by what that differed."""
    tsc.host_write_adjust(adjust)
    before = tsc.read(HostTsc(now))
    tsc.wrmsr(MSR_IA32_TSC, value, HostTsc(now))
    assert (tsc.read(HostTsc(now)), tsc.adjust) == (value, (adjust + value - before) % 2**64)


@pytest.mark.row("J-10")
@given(tsc=scaled_tscs(), host_adjust=U64, adjust=U64, physical=U64)
def test_the_three_sum_up(tsc: VcpuTsc, host_adjust: int, adjust: int, physical: int) -> None:
    """The guest's TSC is the host's, its own ADJUST in it, at the guest's rate, plus the VMM's offset, plus ADJUST."""
    vmm_offset, host_tsc = tsc.offset, (physical + host_adjust) % 2**64
    tsc.guest_write_adjust(adjust)
    expected = (int(host_tsc * tsc.rate) + vmm_offset + adjust) % 2**64
    assert tsc.read(HostTsc(host_tsc)) == expected
    assert (tsc.base_offset, tsc.adjust) == (vmm_offset, adjust)


@pytest.mark.row("J-05")
@given(tsc=scaled_tscs(), adjust=U64, now=U64, scales=st.booleans())
def test_controls_hold_adjust(tsc: VcpuTsc, adjust: int, now: int, scales: bool) -> None:
    """The offset for the hardware's control structure moves by what the guest writes to ADJUST, scaled or trapped."""
    before = tsc_controls(tsc, HostTsc(now), scales=scales).offset
    tsc.guest_write_adjust(adjust)
    assert tsc_controls(tsc, HostTsc(now), scales=scales).offset == (before + adjust) % 2**64


@pytest.mark.row("P-17")
def test_msrs_that_a_tsc_does_not_have() -> None:
    """Another MSR faults, read and written."""
    with pytest.raises(MsrFault, match="RDMSR 0x6e0"):
        rdmsr(VcpuTsc(), 0x6E0, HostTsc(0))
    with pytest.raises(MsrFault, match="WRMSR 0x6e0 := 0x1"):
        VcpuTsc().wrmsr(0x6E0, 1, HostTsc(0))


@pytest.mark.row("P-17")
@given(value=U64, before=U32)
@example(value=2**32, before=1)
@example(value=2**32 - 1, before=1)
def test_tsc_aux_has_32_bits(value: int, before: int) -> None:
    """More faults and changes nothing on Intel's processors, and is cut off on AMD's, as in Linux."""
    intel, amd = VcpuTsc(aux=before), VcpuTsc(aux=before)
    amd.wrmsr(MSR_TSC_AUX, value, HostTsc(0), amd=True)
    assert amd.aux == value % 2**32
    if value < 2**32:
        intel.wrmsr(MSR_TSC_AUX, value, HostTsc(0))
        assert intel.aux == value
    else:
        with pytest.raises(MsrFault, match=f"WRMSR 0xc0000103 := {value:#x}"):
            intel.wrmsr(MSR_TSC_AUX, value, HostTsc(0))
        assert intel.aux == before


# Rates


@pytest.mark.row("P-21")
@given(guest_hz=st.integers(1, 2**40), host_hz=st.integers(1, 2**40), host_tsc=U64, offset=U64)
def test_an_exact_rate_loses_nothing(guest_hz: int, host_hz: int, host_tsc: int, offset: int) -> None:
    """Whatever the two frequencies are, the guest's is met exactly, and its TSC is the exact one, rounded down."""
    tsc = VcpuTsc(offset, rate=tsc_rate(guest_hz, host_hz))
    assert tsc.guest_hz(host_hz) == guest_hz
    assert tsc.read(HostTsc(host_tsc)) == (host_tsc * guest_hz // host_hz + offset) % 2**64


@pytest.mark.row("P-21")
@given(guest_khz=PLAUSIBLE_KHZ, host_khz=PLAUSIBLE_KHZ)
def test_palacios_rate(guest_khz: int, host_khz: int) -> None:
    """Palacios' is off by less than 1024 kHz of either frequency, and right where both have that much in common."""
    exact = tsc_rate(guest_khz * 1000, host_khz * 1000)
    off = tsc_rate(guest_khz * 1000, host_khz * 1000, profile="palacios") / exact
    assert 1 - Fraction(1024, guest_khz) < off < 1 / (1 - Fraction(1024, host_khz))
    common = (guest_khz * 1024_000, host_khz * 1024_000)
    assert tsc_rate(*common, profile="palacios") == tsc_rate(*common)


@pytest.mark.row("P-21")
def test_what_palacios_loses() -> None:
    """At 2 to 3 GHz that is hundreds of parts in a million, of which the exact rate loses none."""
    for guest_khz, host_khz, off_ppm in (
        (2_499_999, 2_596_132, -54),
        (2_000_895, 2_999_296, -511),
        (2_048_000, 3_000_319, 341),
        (2_048_000, 3_072_000, 0),
    ):
        exact = Fraction(guest_khz, host_khz)
        palacios = tsc_rate(guest_khz * 1000, host_khz * 1000, profile="palacios")
        assert round((palacios / exact - 1) * 10**6) == off_ppm


@pytest.mark.row("P-01")
@given(tsc=scaled_tscs(), first=U64, second=U64, value=U64)
def test_guest_cycles(tsc: VcpuTsc, first: int, second: int, value: int) -> None:
    """Cycles never decrease and no write moves them; a write moves the offset, which the guest's TSC has on top."""
    earlier, later = sorted((first, second))
    before = tsc.cycles(HostTsc(earlier)), tsc.cycles(HostTsc(later))
    assert before == tuple(sorted(before))
    tsc.guest_write_tsc(value, HostTsc(earlier))
    tsc.guest_write_adjust(value)
    tsc.host_write_tsc(value, HostTsc(later))
    assert (tsc.cycles(HostTsc(earlier)), tsc.cycles(HostTsc(later))) == before
    assert tsc.read(HostTsc(earlier)) == (tsc.cycles(HostTsc(earlier)) + tsc.offset) % 2**64


@pytest.mark.row("P-03")
@given(states=st.lists(st.tuples(U64, U64, KHZ, U32), min_size=2, max_size=4), now=U64)
def test_each_core_has_its_own(states: list[tuple[int, int, int, int]], now: int) -> None:
    """Frequency, offset, ADJUST and TSC_AUX are one core's; a copy has all of them and goes its own way."""
    cores = [VcpuTsc(offset, adjust, rate=tsc_rate(khz, 2_596_132), aux=aux) for offset, adjust, khz, aux in states]
    copies = [core.copy() for core in cores]
    cores[0].wrmsr(MSR_TSC_AUX, 7, HostTsc(now))
    cores[0].reset(HostTsc(now))
    assert (cores[0].read(HostTsc(now)), cores[0].adjust, cores[0].aux) == (0, 0, 0)
    for copy, (offset, adjust, khz, aux) in zip(copies, states, strict=True):
        assert (copy.offset, copy.adjust, copy.aux) == (offset, adjust, aux)
        assert copy.guest_hz(2_596_132) == khz


# Deadlines


@pytest.mark.row("E13")
@given(tsc=scaled_tscs(), host_tsc=st.integers(0, 2**60), ahead=st.integers(0, 2**60))
def test_ns_until_a_deadline(tsc: VcpuTsc, host_tsc: int, ahead: int) -> None:
    """At the host tick that the answer names, the guest reads the deadline or more; one tick before, it does not."""
    tsc.host_write_tsc(1, HostTsc(host_tsc))
    deadline = 1 + ahead
    ticks = tsc.ns_until(deadline, HostTsc(host_tsc), HOST_HZ)
    assert ticks is not None
    at = host_tsc + ticks * HOST_HZ / 10**9
    assert at.denominator == 1
    if at < 2**64:
        assert tsc.read(HostTsc(int(at))) >= deadline
    if host_tsc < at <= 2**64:
        assert tsc.read(HostTsc(int(at) - 1)) < deadline


@pytest.mark.row("E13")
@given(offset=U64, now=U64, deadline=U64, khz=KHZ, advance_ns=st.integers(0, 10_000))
def test_linuxs_deadline(offset: int, now: int, deadline: int, khz: int, advance_ns: int) -> None:
    """KVM's ns are the exact ones, rounded down, as long as 10^6 times the ticks fit in 64 bits; then they wrap."""
    tsc = VcpuTsc(offset)
    guest, ns = (now + offset) % 2**64, tsc.kvm_ns_until(deadline, HostTsc(now), khz, advance_ns=advance_ns)
    if deadline == 0:
        assert ns is None
        assert tsc.ns_until(deadline, HostTsc(now), khz * 1000) is None
    elif deadline <= guest:
        assert ns == tsc.ns_until(deadline, HostTsc(now), khz * 1000) == 0
    else:
        product = (deadline - guest) * 10**6
        assert ns == max(0, product % 2**64 // khz - advance_ns)
        if product < 2**64:
            exact = tsc.ns_until(deadline, HostTsc(now), khz * 1000)
            assert exact is not None
            assert ns == max(0, int(exact) - advance_ns)


@pytest.mark.row("E13")
def test_a_far_deadline_comes_early_in_linux() -> None:
    """Two hours and 3 ms away at 2.5 GHz, KVM's software timer fires after 3 ms; an idle VMM's must not."""
    deadline = 2**64 // 10**6 + 1 + 7_500_000
    tsc = VcpuTsc()
    assert tsc.kvm_ns_until(deadline, HostTsc(0), 2_500_000) == 3_000_000
    exact = tsc.ns_until(deadline, HostTsc(0), 2_500_000_000)
    assert exact is not None
    assert 7378 < exact / 10**9 < 7379
    assert tsc.kvm_ns_until(1, HostTsc(0), 0) is None  # a vCPU without a frequency arms nothing


# What the hardware is to do


@pytest.mark.row("P-18", "P-26")
@given(tsc=scaled_tscs(), now=U64, scales=st.booleans(), n=st.integers(1, 9), d=st.integers(1, 9), later=U64)
def test_hardware_controls(tsc: VcpuTsc, now: int, scales: bool, n: int, d: int, later: int) -> None:
    """RDTSC traps unless the hardware gives the same by itself: then its offset and ratio give the guest's TSC."""
    dilation = Fraction(n, d)
    offset, traps_rdtsc, passthrough, warning = tsc_controls(tsc, HostTsc(now), dilation=dilation, scales=scales)
    assert (passthrough, warning) == (False, "")
    in_hardware = scales and dilation == 1 and tsc.is_hardware_scaled
    assert traps_rdtsc == (not in_hardware and (tsc.rate != 1 or dilation != 1))
    hardware = VcpuTsc(offset, ratio=tsc.ratio, frac_bits=tsc.frac_bits) if in_hardware else VcpuTsc(offset)
    assert hardware.read(HostTsc(now)) == tsc.read(HostTsc(now))
    if not traps_rdtsc:
        assert dilation == 1
        assert hardware.read(HostTsc(later)) == tsc.read(HostTsc(later))


@pytest.mark.row("P-18", "P-19")
def test_passthrough() -> None:
    """A passed-through TSC has offset 0 and no trap; with a dilation or a rate it is cancelled, with a warning."""
    now = HostTsc(10**12)
    assert tsc_controls(VcpuTsc(99), now, passthrough=True) == (0, False, True, "")
    dilated = tsc_controls(VcpuTsc(99), now, passthrough=True, dilation=Fraction(1, 2))
    assert dilated[:3] == (99, True, False)
    assert "1/2" in dilated.warning
    scaled = tsc_controls(VcpuTsc(99, rate=Fraction(3, 2)), now, passthrough=True)
    assert scaled[:3] == (99 + 10**12 // 2, True, False)
    assert "3/2" in scaled.warning


@pytest.mark.row("P-21")
@pytest.mark.parametrize("frac_bits", [32, 48])
def test_an_exact_rate_may_come_with_a_ratio_of_1(frac_bits: int) -> None:
    """The hardware's ratio of 1, given beside an exact rate, says nothing else; any other ratio contradicts it."""
    tsc = VcpuTsc(ratio=2**frac_bits, frac_bits=frac_bits, rate=Fraction(3, 2))
    assert (tsc.rate, tsc.ratio, tsc.is_hardware_scaled) == (Fraction(3, 2), 2**frac_bits, False)
    assert tsc.read(HostTsc(1000)) == 1500
    for ratio in (0, 1, 2**frac_bits - 1, 2**frac_bits + 1, 2 ** (80 - frac_bits)):
        with pytest.raises(ConfigError, match="give one of them"):
            VcpuTsc(ratio=ratio, frac_bits=frac_bits, rate=Fraction(3, 2))


@pytest.mark.row("P-21", "E13")
def test_what_cannot_be() -> None:
    """Numbers that do not fit, options that contradict each other and unknown profiles are errors that say so."""
    for option, value in (
        ("ratio", 0),
        ("ratio", 2**64),
        ("rate", Fraction(0)),
        ("rate", Fraction(-1)),
        ("aux", 2**32),
    ):
        with pytest.raises(RangeError, match=rf"TSC|^{option} is"):
            VcpuTsc(**{option: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="33 fraction bits"):
        VcpuTsc(frac_bits=33)
    with pytest.raises(ConfigError, match="give one of them"):
        VcpuTsc(ratio=3 << 47, rate=Fraction(3, 2))
    with pytest.raises(RangeError, match="at least 1"):
        tsc_rate(0, 1)
    with pytest.raises(RangeError, match="Palacios needs 1024 of each"):
        tsc_rate(1_000_000, 10**9, profile="palacios")
    with pytest.raises(ConfigError, match="profile 'linux' is unknown"):
        tsc_rate(1, 1, profile="linux")  # type: ignore[arg-type]
