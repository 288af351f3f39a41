"""Hyper-V's reference time by MSR: the clock's own, and VirtualBox's, which is the TSC divided twice over."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, Gpa, GuestTsc
from pvclock.providers.hyperv import HyperVProvider
from pvclock.providers.interface import ReferenceTime, Status
from tests.unit.hyperv_provider import EVERY_PROFILE, a_provider, is_refused, written_pages
from tests.unit.stub_clock import SIZE, TSC_HZ, UPTIME_NS, NotedVmm, StubClock, u32, u64

TIME_REF_COUNT, REFERENCE_TSC, TSC_FREQUENCY, APIC_FREQUENCY = 0x40000020, 0x40000021, 0x40000022, 0x40000023
U64 = st.integers(0, 2**64 - 1)
UNITS_PER_S: Final = 10**7
LINUXES: Final = pytest.mark.parametrize("profile", ["linux", "document"])


def virtualbox(hz: int = TSC_HZ, tsc: int = 0, clock: StubClock | None = None) -> tuple[HyperVProvider, StubClock]:
    """A provider of profile "virtualbox" on TSCs of `hz` that read `tsc`, plus 1 for each vCPU's number."""
    clock = clock or StubClock(2, vmm=NotedVmm())
    clock.host_tsc_hz = hz
    clock.guest_tsc = lambda vcpu: GuestTsc(tsc + vcpu)  # type: ignore[method-assign]  # the instant of this test
    return a_provider(clock=clock, profile="virtualbox")


def page_at(clock: StubClock, gpa: int) -> tuple[int, ...]:
    """Sequence, reserved word, scale and offset."""
    return struct.unpack("<IIQq", clock.memory.read(gpa, 24))


# Counter


@pytest.mark.row("H-35")
@LINUXES
def test_the_counter_is_the_clocks_reference_time(profile: str) -> None:
    """The counter MSR reads guest time in units of 100 ns on every vCPU, and a write of it is #GP."""
    provider, clock = a_provider(profile=profile)
    assert {provider.read_msr(vcpu, TIME_REF_COUNT) for vcpu in range(2)} == {UPTIME_NS // 100}
    clock.reference_time = ReferenceTime(2**64 - 1, 7)
    assert provider.read_msr(0, TIME_REF_COUNT) == 2**64 - 1
    assert is_refused(provider, TIME_REF_COUNT, 0)


@pytest.mark.row("H-35", "H-53")
@given(hz=st.integers(10**7, 2**40), tsc=st.integers(0, 2**64 - 2), value=U64)
def test_virtualboxs_counter_is_the_tsc_divided(hz: int, tsc: int, value: int) -> None:
    """It is how often hz // 10^7 ticks, a whole number, fit into the reading vCPU's TSC; a write is #GP."""
    provider, _ = virtualbox(hz, tsc)
    for vcpu in range(2):
        count = provider.read_msr(vcpu, TIME_REF_COUNT)
        divisor = hz // UNITS_PER_S
        assert count * divisor <= tsc + vcpu < (count + 1) * divisor
    assert is_refused(provider, TIME_REF_COUNT, value)


@pytest.mark.row("H-35")
@pytest.mark.parametrize(("hz", "per_mille"), [(2_596_132_000, 2.3676), (2_419_200_000, 3.8174), (2_000_000_000, 0.0)])
def test_virtualboxs_counter_runs_fast(hz: int, per_mille: float) -> None:
    """What the whole divisor loses is a rate error of some per mille: 259.6132 ticks in a unit count as 259."""
    provider, _ = virtualbox(hz, tsc=hz * 1000)
    assert provider.read_msr(0, TIME_REF_COUNT) / (1000 * UNITS_PER_S) - 1 == pytest.approx(per_mille / 1000, abs=1e-7)


@pytest.mark.row("H-35", "H-52")
@pytest.mark.parametrize("hz", [1, 999, 1000, 999_999, 9_999_999, 10_000_000])
def test_virtualboxs_divisions_have_a_divisor(hz: int) -> None:
    """TSCs below 10 MHz and below 1 kHz, where VirtualBox divides by 0, count ticks, and have a page all the same."""
    provider, clock = virtualbox(hz, tsc=12345)
    assert provider.read_msr(0, TIME_REF_COUNT) == 12345
    provider.write_msr(0, REFERENCE_TSC, 0x3001)
    sequence, _, scale, offset = page_at(clock, 0x3000)
    assert (sequence, scale & 0xFFFFFFFF, offset) == (1, 0, 0)


# The MSR of the page


@pytest.mark.row("H-36", "G-10", "G-14")
@LINUXES
@given(values=st.lists(U64 | st.integers(0, 0x7000), min_size=1, max_size=4))
def test_the_clock_keeps_the_page(profile: str, values: list[int]) -> None:
    """Any value reads back on every vCPU, and bit 0 says whether there is a page, wherever it is: never #GP."""
    provider, clock = a_provider(profile=profile)
    for vcpu, value in enumerate(values):
        provider.write_msr(vcpu % 2, REFERENCE_TSC, value)
        assert {provider.read_msr(each, REFERENCE_TSC) for each in range(2)} == {value}
        assert clock.reference_page == (value >> 12 << 12 if value % 2 else None)
        assert provider.is_paravirt_tsc_enabled is bool(value % 2)
        assert provider.update_paravirt_tsc() is (Status.SUCCESS if value % 2 else Status.NOT_ENABLED)
    assert written_pages(clock.memory) == []


@pytest.mark.row("H-36")
@LINUXES
def test_msr_and_page_change_as_one(profile: str) -> None:
    """The MSR has its new value before the clock publishes, and the old one again if that fails."""
    provider, clock = a_provider(profile=profile)
    provider.write_msr(0, REFERENCE_TSC, 0x5001)
    seen: list[object] = []

    def failing(
        gpa: Gpa | None, begin: Callable[[], object], undo: Callable[[], object], vcpu: int | None = None
    ) -> None:
        seen.extend((gpa, vcpu, provider.read_msr(0, REFERENCE_TSC)))
        begin()
        seen.append(provider.read_msr(0, REFERENCE_TSC))
        undo()
        raise OSError("the publish failed")

    clock.place_reference_page = failing  # type: ignore[method-assign,assignment]  # that is the test
    with pytest.raises(OSError, match="the publish failed"):
        provider.write_msr(1, REFERENCE_TSC, 0x6001)
    assert seen == [0x6000, 1, 0x5001, 0x6001]
    assert provider.read_msr(0, REFERENCE_TSC) == 0x5001


@pytest.mark.row("H-36", "H-52", "H-53", "H-55")
def test_virtualboxs_page_is_written_once() -> None:
    """Enabling writes sequence 1, the scale and offset 0, all else stays; the clock keeps no page and TSCs no mode."""
    provider, clock = virtualbox()
    tsc = clock.guest_tsc(0)
    provider.write_msr(0, REFERENCE_TSC, 0x5FF1)
    assert page_at(clock, 0x5000) == (1, 0, ((10000 << 32) // 2_596_132) << 32, 0)
    assert set(clock.memory.read(0x5018, 0x1000 - 24)) == {0xA5}
    assert written_pages(clock.memory) == [0x5000]
    assert clock.reference_page is None
    assert provider.read_msr(1, REFERENCE_TSC) == 0x5FF1
    assert (provider.is_paravirt_tsc_enabled, provider.update_paravirt_tsc()) == (True, Status.SUCCESS)
    provider.write_msr(0, REFERENCE_TSC, 0x5FF0)
    assert provider.read_msr(1, REFERENCE_TSC) == 0x5FF0
    assert (provider.is_paravirt_tsc_enabled, provider.update_paravirt_tsc()) == (False, Status.NOT_ENABLED)
    assert clock.guest_tsc(0) == tsc


@pytest.mark.row("H-36")
def test_virtualbox_leaves_a_page_that_is_there() -> None:
    """The same page enabled again is left alone; another one, and the same after a disable, are written anew."""
    provider, clock = virtualbox()
    provider.write_msr(0, REFERENCE_TSC, 0x5001)
    clock.memory.write(0x5000, bytes(24))
    provider.write_msr(1, REFERENCE_TSC, 0x5801)
    assert page_at(clock, 0x5000) == (0, 0, 0, 0)
    assert provider.read_msr(0, REFERENCE_TSC) == 0x5801
    provider.write_msr(0, REFERENCE_TSC, 0x7001)
    assert page_at(clock, 0x7000)[0] == 1
    for value in (0x5001, 0x5000, 0x5001):
        clock.memory.write(0x5000, bytes(24))
        provider.write_msr(0, REFERENCE_TSC, value)
        assert page_at(clock, 0x5000)[0] == value & 1


@pytest.mark.row("H-36")
@given(value=U64)
def test_virtualboxs_page_must_be_in_memory(value: int) -> None:
    """Enabling elsewhere is #GP, the address is kept and no page enabled; disabling with any address is fine."""
    provider, clock = virtualbox()
    provider.write_msr(0, REFERENCE_TSC, 0x5001)
    is_bad = bool(value & 1) and value >> 12 << 12 >= SIZE
    assert is_refused(provider, REFERENCE_TSC, value) is is_bad
    assert provider.read_msr(0, REFERENCE_TSC) == (value & ~1 if is_bad else value)
    assert provider.is_paravirt_tsc_enabled is bool(value & 1 and not is_bad)
    page = [value >> 12 << 12] if value & 1 and not is_bad else []
    assert set(written_pages(clock.memory)) == {0x5000, *page}


# Scale, offset, sequence


@pytest.mark.row("H-52")
@given(hz=st.integers(10_001_000, 2**44))
def test_virtualboxs_scale(hz: int) -> None:
    """The scale's low 32 bits are zero; the others are the largest number of 2^-32 units in a tick, by whole kHz."""
    provider, clock = virtualbox(hz)
    provider.write_msr(0, REFERENCE_TSC, 0x3001)
    scale = page_at(clock, 0x3000)[2]
    high, low = divmod(scale, 1 << 32)
    assert low == 0
    assert high * (hz // 1000) <= 10000 << 32 < (high + 1) * (hz // 1000)


@pytest.mark.row("H-52")
@pytest.mark.parametrize(
    ("hz", "ppb"),
    [(2_596_132_000, (-61, 0)), (3_399_999_999, (0, 300)), (2_394_230_767, (200, 330)), (10**9, (-23, -22))],
)
def test_virtualboxs_rate_error(hz: int, ppb: tuple[int, int]) -> None:
    """The page loses up to 61 ppb by its zero bits, and gains up to some 100 ppb where kHz were cut."""
    provider, clock = virtualbox(hz)
    provider.write_msr(0, REFERENCE_TSC, 0x3001)
    error = Fraction(page_at(clock, 0x3000)[2] * hz, UNITS_PER_S << 64) - 1
    assert ppb[0] <= error * 10**9 <= ppb[1]


@pytest.mark.row("H-53")
@given(before=st.integers(0, 2**62), after=st.integers(0, 2**62))
def test_virtualboxs_time_goes_where_the_tsc_goes(before: int, after: int) -> None:
    """The page's offset is 0 whatever the TSC was when it was enabled, so a TSC that is set sets reference time."""
    provider, clock = virtualbox(tsc=before)
    provider.write_msr(0, REFERENCE_TSC, 0x3001)
    shown = page_at(clock, 0x3000)
    assert shown[3] == 0
    provider, clock = virtualbox(tsc=after)
    provider.write_msr(0, REFERENCE_TSC, 0x3001)
    assert page_at(clock, 0x3000) == shown
    assert provider.read_msr(0, TIME_REF_COUNT) == after // (TSC_HZ // UNITS_PER_S)


@pytest.mark.row("H-56")
@pytest.mark.parametrize("hz", [2_596_132_000, 2_394_230_767, 3_300_000_001])
def test_virtualboxs_counter_and_page_disagree(hz: int) -> None:
    """After an hour counter and page are apart by the error of the counter's whole divisor, seconds: a trap (H-35)."""
    provider, clock = virtualbox(hz, tsc=3600 * hz)
    provider.write_msr(0, REFERENCE_TSC, 0x3001)
    by_page = 3600 * hz * page_at(clock, 0x3000)[2] >> 64
    by_counter = provider.read_msr(0, TIME_REF_COUNT)
    fraction = Fraction(hz, UNITS_PER_S) / (hz // UNITS_PER_S) - 1
    assert abs(by_counter - by_page - fraction * 3600 * UNITS_PER_S) < 3600 * UNITS_PER_S * 350 / 10**9
    assert (by_counter != by_page) is (fraction > 0)


# Frequencies


@pytest.mark.row("H-37")
@EVERY_PROFILE
@given(tsc_hz=st.integers(1, 2**40), apic_bus_hz=st.integers(1, 2**40), value=U64)
def test_frequencies_are_told_in_hz(profile: str, tsc_hz: int, apic_bus_hz: int, value: int) -> None:
    """The MSRs have the TSC's frequency as the guest was told it, and the APIC bus's, to the Hz; writes are #GP."""
    clock = StubClock(2)
    clock.tsc_hz = tsc_hz
    provider, _ = a_provider(clock=clock, profile=profile, apic_bus_hz=apic_bus_hz)
    assert provider.read_msr(1, TSC_FREQUENCY) == tsc_hz
    assert provider.read_msr(0, APIC_FREQUENCY) == apic_bus_hz
    assert is_refused(provider, TSC_FREQUENCY, value)
    assert is_refused(provider, APIC_FREQUENCY, value)


@pytest.mark.row("H-37")
def test_the_apic_bus_is_kvms_by_default() -> None:
    """Without a word of the VMM the APIC timer counts ns, as KVM's does."""
    assert a_provider()[0].read_msr(0, APIC_FREQUENCY) == 10**9


# Saved

UNITS_MAX = 2**64 // 100 + 2


@pytest.mark.row("H-36", "H-72")
@LINUXES
@given(value=U64, units=st.integers(0, UNITS_MAX), sequence=st.integers(0, 2**32 - 1))
def test_reference_time_goes_on_from_what_was_saved(profile: str, value: int, units: int, sequence: int) -> None:
    """MSR, units and sequence are saved, and the restored clock gets them with the page's address."""
    provider, clock = a_provider(profile=profile)
    provider.write_msr(0, REFERENCE_TSC, value)
    clock.reference_time = ReferenceTime(units, sequence)
    saved = provider.save()
    provider, clock = a_provider(profile=profile)
    provider.load(saved)
    assert provider.read_msr(0, REFERENCE_TSC) == value
    assert clock.reference_time == ReferenceTime(units, sequence)
    assert clock.reference_page == (value >> 12 << 12 if value & 1 else None)


@pytest.mark.row("H-72", "E13")
@LINUXES
@given(units=st.integers(UNITS_MAX + 1, 2**64 - 1))
def test_reference_time_beyond_the_end_of_guest_time_is_refused(profile: str, units: int) -> None:
    """Guest time ends after 2^64 ns, with the counter at no more than 2 units above that; it would go back else."""
    provider, _ = a_provider(profile=profile)
    saved = provider.save()
    with pytest.raises(ConfigError, match="reference_units"):
        provider.load({**saved, "reference_units": units})
    assert provider.save() == saved


@pytest.mark.row("H-36")
@pytest.mark.parametrize(
    ("saved", "shown"), [(0, 1), (1, 2), (0xFFFFFFFD, 0xFFFFFFFE), (0xFFFFFFFE, 1), (0xFFFFFFFF, 1)]
)
def test_virtualbox_writes_the_page_anew_when_it_is_loaded(saved: int, shown: int) -> None:
    """With the saved sequence and 1, or 1 near the end of 32 bits, and the scale of the TSC here."""
    provider, _ = virtualbox()
    provider.write_msr(0, REFERENCE_TSC, 0x5001)
    state = {**provider.save(), "reference_sequence": saved}
    provider, clock = virtualbox(hz=2 * 10**9)
    provider.load(state)
    assert page_at(clock, 0x5000) == (shown, 0, (10000 << 32) // 2_000_000 << 32, 0)
    assert provider.save()["reference_sequence"] == shown
    assert provider.read_msr(0, REFERENCE_TSC) == 0x5001


@pytest.mark.row("H-36")
def test_virtualbox_loads_without_a_page() -> None:
    """A disabled page, or one that is not in memory here, is not written, and the MSR is as it was saved."""
    for value in (0x5000, SIZE | 1):
        provider, clock = virtualbox()
        provider.load({**provider.save(), "reference_tsc": value, "reference_sequence": 4})
        assert provider.read_msr(0, REFERENCE_TSC) == value
        assert provider.save()["reference_sequence"] == 4
        assert written_pages(clock.memory) == []


@pytest.mark.row("style")
def test_pages_are_read_here_as_they_are_laid_out() -> None:
    """This file's reader and the stub's agree on where sequence and scale are."""
    provider, clock = virtualbox()
    provider.write_msr(0, REFERENCE_TSC, 0x5001)
    assert (u32(clock.memory, 0x5000), u64(clock.memory, 0x5008)) == (
        page_at(clock, 0x5000)[0],
        page_at(clock, 0x5000)[2],
    )
