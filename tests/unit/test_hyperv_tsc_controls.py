"""Hyper-V's re-enlightenment after a restore, and the control by which a guest consents to an invariant TSC."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, GuestClock, GuestMemory, SimulatedBackend
from pvclock.providers.hyperv import HyperVProvider
from pvclock.providers.interface import VcpuHost
from pvclock.state.clock_state import from_json, to_json
from pvclock.timekeeping.events import EventKind
from tests.unit.hyperv_provider import KickingVmm, a_provider, is_refused
from tests.unit.stub_clock import TSC_HZ, NotedVmm, StubClock

pytestmark = pytest.mark.row("E22")

FREQUENCY, CONTROL, EMULATION, STATUS, INVARIANT = 0x40000022, 0x40000106, 0x40000107, 0x40000108, 0x40000118
U64 = st.integers(0, 2**64 - 1)
WITH_INVARIANT: Final = 1 << 5 | 1 << 6 | 1 << 15
HZ: Final = 2_500_000_000
ALONE: Final = 1 << 5 | 1 << 6 | 1 << 11 | 1 << 13
"""Frequencies and re-enlightenment without SynIC, which has its own to deliver after a restore."""
ENABLED: Final = 1 << 16


def restored(control: int, *hosts_hz: int) -> tuple[HyperVProvider, NotedVmm]:
    """A provider whose guest wrote `control`, restored on hosts of those TSC frequencies in turn; the last VMM."""
    provider, _ = a_provider(privileges=ALONE)
    provider.write_msr(0, CONTROL, control)
    vmm = NotedVmm()
    for host_tsc_hz in hosts_hz:
        provider, vmm = restored_from(provider, host_tsc_hz)
    return provider, vmm


def restored_from(provider: HyperVProvider, host_tsc_hz: int) -> tuple[HyperVProvider, NotedVmm]:
    """The same VM on a host of that frequency, and its VMM there."""
    vmm = NotedVmm()
    clock = StubClock(2, vmm=vmm)
    clock.host_tsc_hz = host_tsc_hz
    other, _ = a_provider(clock=clock, privileges=ALONE)
    other.load(provider.save())
    return other, vmm


def expired(provider: HyperVProvider) -> bool:
    """Does the provider have something due now?  If so it is delivered."""
    assert provider.hooks.next_due_ns is not None
    assert provider.hooks.expire is not None
    due = provider.hooks.next_due_ns()
    deliver = provider.hooks.expire(5)
    if deliver is not None:
        deliver()
    return due == 0


@given(control=U64, emulation=U64, status=U64)
def test_controls_are_stored(control: int, emulation: int, status: int) -> None:
    """Control and emulation control read back whole, as KVM stores them; of the status only 0 can be written."""
    provider, _ = a_provider()
    provider.write_msr(0, CONTROL, control)
    provider.write_msr(1, EMULATION, emulation)
    assert (provider.read_msr(1, CONTROL), provider.read_msr(0, EMULATION)) == (control, emulation)
    assert is_refused(provider, STATUS, status) is bool(status)
    assert provider.read_msr(0, STATUS) == 0


@pytest.mark.parametrize("vcpu", [0, 1])
def test_a_guest_is_told_of_another_tsc(vcpu: int) -> None:
    """Restored where its TSC has another frequency, the vCPU that it named gets its vector, once."""
    provider, vmm = restored(vcpu << 32 | ENABLED | 0xEE, TSC_HZ + 1)
    assert expired(provider)
    assert vmm.notes == [("inject", vcpu, 0xEE)]
    assert not expired(provider)
    assert vmm.notes == [("inject", vcpu, 0xEE)]


@pytest.mark.parametrize(("control", "host_tsc_hz"), [(ENABLED | 0xEE, TSC_HZ), (0xEE, TSC_HZ + 1)])
def test_a_guest_is_told_of_nothing_else(control: int, host_tsc_hz: int) -> None:
    """The same frequency, and a control that does not ask, are no reason for an interrupt."""
    provider, vmm = restored(control, host_tsc_hz)
    assert not expired(provider)
    assert vmm.notes == []


@given(control=U64)
def test_any_control_ends_well(control: int) -> None:
    """A vector below 16, or a vCPU that is not there, gets nothing; anything else its one interrupt."""
    provider, vmm = restored(control, TSC_HZ - 1)
    assert expired(provider) is bool(control & ENABLED)
    vector, vcpu = control & 0xFF, control >> 32
    is_sound = bool(control & ENABLED) and vector >= 16 and vcpu < 2
    assert vmm.notes == [("inject", vcpu, vector)] * is_sound
    assert not expired(provider)


def as_linux_does(provider: HyperVProvider) -> int | None:
    """What Linux does at the interrupt: the new frequency if RDTSC was emulated, else nothing."""
    if not provider.read_msr(0, STATUS):
        return None
    provider.write_msr(0, STATUS, 0)
    return provider.read_msr(0, FREQUENCY)


@pytest.mark.row("H-37")
def test_linux_finds_the_new_frequency() -> None:
    """At the interrupt the status says that there is news, and 0x40000022 has this host's frequency; once."""
    provider, _ = restored(ENABLED | 0xEE, TSC_HZ + 1)
    assert expired(provider)
    assert as_linux_does(provider) == TSC_HZ + 1
    assert as_linux_does(provider) is None
    provider.reset()
    assert provider.read_msr(0, FREQUENCY) == TSC_HZ + 1
    provider, _ = restored(ENABLED | 0xEE, TSC_HZ + 1)
    provider.reset()
    assert provider.read_msr(0, STATUS) == 0


@pytest.mark.row("H-37")
@pytest.mark.parametrize("host_tsc_hz", [TSC_HZ, TSC_HZ + 1])
def test_a_guest_that_does_not_ask_keeps_its_frequency(host_tsc_hz: int) -> None:
    """Without the interrupt it would compute with two frequencies: it is told the one of before, wherever it is."""
    provider, _ = restored(0xEE, host_tsc_hz)
    assert as_linux_does(provider) is None
    assert provider.read_msr(0, FREQUENCY) == TSC_HZ


@pytest.mark.row("H-37")
@given(st.lists(st.sampled_from([TSC_HZ, TSC_HZ + 1, TSC_HZ + 2]), min_size=1, max_size=5))
def test_each_change_of_host_is_told(hosts_hz: list[int]) -> None:
    """The way back is a change, too: what counts is the frequency that was told last."""
    provider, _ = restored(ENABLED | 0xEE)
    told = TSC_HZ
    for host_tsc_hz in hosts_hz:
        provider, vmm = restored_from(provider, host_tsc_hz)
        assert expired(provider) is (host_tsc_hz != told)
        assert vmm.notes == [("inject", 0, 0xEE)] * (host_tsc_hz != told)
        assert as_linux_does(provider) == (host_tsc_hz if host_tsc_hz != told else None)
        told = host_tsc_hz


def test_what_the_guest_has_not_acted_on_is_told_again() -> None:
    """Saved before the guest wrote 0, as the interrupt may have been on its way: status and interrupt come again."""
    provider, vmm = restored(ENABLED | 0xEE, TSC_HZ + 1, TSC_HZ + 1)
    assert expired(provider)
    assert vmm.notes == [("inject", 0, 0xEE)]
    assert as_linux_does(provider) == TSC_HZ + 1


@pytest.mark.parametrize(("name", "value"), [("told_tsc_hz", 0), ("tsc_emulation_status", 2)])
def test_what_cannot_have_been_told_is_refused(name: str, value: int) -> None:
    """A TSC of 0 Hz, and a status with reserved bits, are a ConfigError that names them."""
    provider, _ = restored(ENABLED)
    with pytest.raises(ConfigError, match=name):
        provider.load({**provider.save(), name: value})


def test_a_reset_takes_the_request_back() -> None:
    """A guest that was reset before the interrupt came does not get it."""
    provider, vmm = restored(ENABLED | 0xEE, TSC_HZ + 1)
    provider.reset()
    assert not expired(provider)
    assert vmm.notes == []


def test_without_interrupts_there_is_no_reenlightenment() -> None:
    """A VMM that raises no interrupts has nothing to offer: #GP, and the clock is not asked for timers."""
    provider, _ = a_provider(vmm=KickingVmm())
    assert all(is_refused(provider, index) for index in (CONTROL, EMULATION, STATUS))
    assert provider.hooks == (None,) * 5
    provider, _ = a_provider(vcpu_host=VcpuHost.KVM)
    assert not is_refused(provider, CONTROL)


@given(writes=st.lists(st.integers(0, 3) | U64, max_size=6))
def test_consent_cannot_be_taken_back(writes: list[int]) -> None:
    """The control takes 0 and 1, and no 0 after a 1; CPUID shows an invariant TSC from the first 1 on."""
    provider, _ = a_provider(privileges=WITH_INVARIANT)
    given_once = 0
    for value in writes:
        assert is_refused(provider, INVARIANT, value) is (value > 1 or value < given_once)
        given_once |= value == 1
        assert provider.read_msr(1, INVARIANT) == given_once
        assert provider.shows_invariant_tsc is bool(given_once)
    provider.reset()
    assert provider.read_msr(0, INVARIANT) == 0
    assert not provider.shows_invariant_tsc


def test_the_control_is_offered_on_request() -> None:
    """By default there is no control, and CPUID shows what the VMM offers; with it the guest lives by its TSC."""
    provider, _ = a_provider()
    assert is_refused(provider, INVARIANT)
    assert (provider.shows_invariant_tsc, provider.guest_lives_by_tsc, provider.warnings) == (True, False, ())
    provider, _ = a_provider(privileges=WITH_INVARIANT)
    assert (provider.shows_invariant_tsc, provider.guest_lives_by_tsc) == (False, True)
    assert provider.warnings == (
        "the TSC-invariant control is offered; a guest that goes by its TSC leaves every policy of this clock",
    )
    provider.write_msr(0, INVARIANT, 1)
    saved = provider.save()
    provider, _ = a_provider(privileges=WITH_INVARIANT)
    provider.load(saved)
    assert provider.shows_invariant_tsc


@pytest.mark.row("E5")
@pytest.mark.parametrize(("hz", "notes"), [(HZ, []), (HZ + 1000, [("inject", 1, 0xEE)])])
def test_a_restored_clock_delivers_the_interrupt_once_it_runs(hz: int, notes: list[tuple[object, ...]]) -> None:
    """A real clock, restored where TSCs have another rate, interrupts its guest once it is resumed, and not before."""
    memory, vmm = GuestMemory(bytearray(1 << 14)), NotedVmm()
    clock = GuestClock(memory, 2, "HyperV", backend=SimulatedBackend(HZ), vmm=vmm, privileges=ALONE)
    clock.write_msr(0, CONTROL, 1 << 32 | ENABLED | 0xEE)
    clock.pause()
    saved = from_json(to_json(clock.save()))
    restored = GuestClock.restore(saved, memory, backend=SimulatedBackend(hz), vmm=vmm)
    restored.expire_timers()
    assert vmm.notes == []
    restored.resume()
    restored.expire_timers()
    restored.expire_timers()
    assert vmm.notes == notes
    assert restored.read_msr(0, FREQUENCY) == hz
    assert restored.read_msr(0, STATUS) == bool(notes)
    told = [event.why for event in restored.events.read().events if event.kind is EventKind.TSC_RATE]
    assert told == [f"the guest is told that its TSC now has {hz} Hz"] * len(notes)
