"""A Hyper-V guest's report of its own crash: what the VMM hears, and how often."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock.timekeeping.events import EventKind
from tests.unit.hyperv_provider import EVERY_PROFILE, a_provider, is_refused

P0, CTL = 0x40000100, 0x40000105
NOTIFY = 1 << 63
U64 = st.integers(0, 2**64 - 1)


@pytest.mark.row("H-46")
@EVERY_PROFILE
@given(writes=st.lists(st.tuples(st.integers(0, 4), U64), max_size=8))
def test_parameters_read_back(profile: str, writes: list[tuple[int, int]]) -> None:
    """Each of the five parameters is the VM's, not a vCPU's: what any vCPU wrote last, 0 before; nothing is told."""
    provider, clock = a_provider(profile=profile)
    expected = [0] * 5
    for at, (number, value) in enumerate(writes):
        provider.write_msr(at % 2, P0 + number, value)
        expected[number] = value
        for vcpu in range(2):
            assert [provider.read_msr(vcpu, P0 + each) for each in range(5)] == expected
    assert [kind for kind, _ in clock.told if kind is EventKind.CRASH] == []


@pytest.mark.row("H-47")
@EVERY_PROFILE
@given(value=U64)
def test_a_crash_is_told_with_its_parameters(profile: str, value: int) -> None:
    """Bit 63 of the control reports the crash, once a write; the control is not stored, and reads as the capability."""
    provider, clock = a_provider(profile=profile)
    for number in range(5):
        provider.write_msr(0, P0 + number, 0xD1 + number)
    assert provider.read_msr(1, CTL) == NOTIFY
    provider.write_msr(1, CTL, value)
    told = (EventKind.CRASH, "vCPU 1: the guest reports its crash, P0 to P4: 0xd1, 0xd2, 0xd3, 0xd4, 0xd5")
    assert clock.told == [told] * (value >> 63)
    assert provider.read_msr(0, CTL) == NOTIFY


@pytest.mark.row("H-47", "E11")
def test_a_guest_cannot_fill_the_log() -> None:
    """The first 20 reports are events, with their parameters as they were; the others are dropped."""
    provider, clock = a_provider()
    for number in range(100):
        provider.write_msr(0, P0, number)
        provider.write_msr(0, CTL, NOTIFY)
    assert len(clock.told) == 20
    assert clock.told[19][1].endswith("P0 to P4: 0x13, 0x0, 0x0, 0x0, 0x0")


@pytest.mark.row("H-46", "H-47", "H-21")
@EVERY_PROFILE
def test_without_the_feature_there_are_no_crash_msrs(profile: str) -> None:
    """Where CPUID does not offer crash reports each of the six MSRs is #GP, unless CPUID is not enforced."""
    provider, _ = a_provider(profile=profile, features=1 << 8)
    for index in range(P0, CTL + 1):
        assert is_refused(provider, index)
        assert is_refused(provider, index, 0)
    provider, _ = a_provider(profile=profile, features=1 << 8, enforce_cpuid=False)
    assert [provider.read_msr(0, index) for index in range(P0, CTL + 1)] == [0] * 5 + [NOTIFY]
    assert is_refused(provider, CTL + 1) is False  # re-enlightenment is next
    assert is_refused(provider, P0 - 1)
