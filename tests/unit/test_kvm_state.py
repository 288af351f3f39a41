"""What the KVM provider saves: of every MSR, of both versions, checked as a whole; and what a reset leaves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pvclock import ConfigError, MsrFault
from pvclock.providers.kvm import PROFILES, KvmProvider
from tests.unit.stub_clock import NotedVmm, StubClock, a_provider

EVERYTHING = 0x1027EFB & ~(1 << 2)  # all that the library and a VMM serve
MSRS = (0x11, 0x12, *range(0x4B564D00, 0x4B564D09))
VERSION_1 = {"system_time": (0x2001, 0x3001), "wall_clock": 0x1000, "boot_vcpu_runs_old_kvmclock": True}

VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 0xEC, 0x2001, 0x3001, 0x4001, 0x5009, 0x600F, 2**64 - 1]), st.integers(0, 2**64 - 1)
)
TRAFFIC = st.lists(st.tuples(st.integers(0, 1), st.sampled_from(MSRS), VALUES), max_size=30)


def whole(profile: str = "linux") -> KvmProvider:
    """A provider with every feature that the profile has."""
    features = EVERYTHING if profile != "virtualbox" else None
    return a_provider(clock=StubClock(vmm=NotedVmm()), features=features, profile=profile)[0]


def play(provider: KvmProvider, traffic: list[tuple[int, int, int]]) -> None:
    """Let the guest write, and the VMM do its part; faults are the guest's."""
    provider.clock.memory.write(0x6000, bytes(8))  # the words of a guest that waits for a page
    for vcpu, index, value in traffic:
        try:
            provider.write_msr(vcpu, index, value)
        except MsrFault:
            continue
        provider.offer_eoi(vcpu)
        provider.page_ready(vcpu, 7)


def read_all(provider: KvmProvider) -> list[int | None]:
    """What both vCPUs read of every MSR; None for a fault."""
    values: list[int | None] = []
    for vcpu in range(2):
        for index in MSRS:
            try:
                values.append(provider.read_msr(vcpu, index))
            except MsrFault:
                values.append(None)
    return values


@pytest.mark.row("E9", "K-35", "V-36")
@given(profile=st.sampled_from(sorted(PROFILES)), traffic=TRAFFIC)
@example(profile="linux", traffic=[(0, 0x4B564D02, 0x600F), (1, 0x4B564D04, 0x5001)])
def test_what_is_saved_is_loaded(profile: str, traffic: list[tuple[int, int, int]]) -> None:
    """A provider made by the config and loaded with the state saves the same, and its guest reads the same."""
    provider = whole(profile)
    play(provider, traffic)
    clock = StubClock(vmm=NotedVmm())
    copy = KvmProvider(clock, 2, **provider.config)  # type: ignore[arg-type]  # its own options
    copy.load(provider.save())
    assert copy.save() == provider.save()
    assert (copy.config, copy.cpuid_leaves) == (provider.config, provider.cpuid_leaves)
    assert read_all(copy) == read_all(provider)
    assert [copy.awaits_ack(vcpu) for vcpu in range(2)] == [provider.awaits_ack(vcpu) for vcpu in range(2)]
    assert clock.page_at(0) is None  # loading does nothing again


@pytest.mark.row("E9", "K-32")
def test_an_offer_of_an_eoi_is_saved() -> None:
    """Else an interrupt that the guest ended after the restore would never end for the VMM."""
    provider = whole()
    provider.write_msr(0, 0x4B564D04, 0x5001)
    provider.offer_eoi(0)
    copy, clock = a_provider(features=EVERYTHING, clock=StubClock(vmm=NotedVmm()))
    copy.load(provider.save())
    clock.memory.write(0x5000, b"\0")
    assert copy.take_eoi(0)


@pytest.mark.row("E9")
def test_version_1_is_read() -> None:
    """It had the clock's own MSRs; the rest is as at reset."""
    provider = whole()
    play(provider, [(0, 0x4B564D03, 0x4001), (1, 0x4B564D05, 0)])
    provider.load(VERSION_1)
    assert provider.save() == {**whole().save(), **VERSION_1}
    assert (provider.read_msr(1, 0x12), provider.read_msr(0, 0x11)) == (0x3001, 0x1000)
    assert (provider.may_poll(1), provider.allows_stable) == (True, False)


def damaged() -> list[tuple[str, Any]]:
    """A name and a value that no guest can have written."""
    two = [
        *((name, value) for name in ("system_time", "steal_time") for value in ((), (1,), (1, 1, 1), 1, None, "x")),
        *((name, (bad, 0)) for name in ("system_time", "pv_eoi") for bad in (-1, 2**64, True, 1.0, "1", None)),
    ]
    return [
        *two,
        *((("steal_time", (0x4003, 0)), ("pv_eoi", (0, 0x5003)), ("pv_eoi_offered", (0x5000, 0)))),
        *((("async_pf", (0x10, 0)), ("async_pf_interrupt", (0, 256)), ("async_pf_unacknowledged", (2, 0)))),
        *((("poll_control", (2, 1)), ("migration_control", 2), ("migration_control", (1,)))),
        *((("wall_clock", (0,)), ("wall_clock", True), ("boot_vcpu_runs_old_kvmclock", 1))),
        *((("time_page_version", (0, 0)), ("colour", 1))),
    ]


@pytest.mark.row("E9")
@pytest.mark.parametrize(("name", "value"), damaged())
def test_a_damaged_state_is_refused_as_a_whole(name: str, value: object) -> None:
    """The error names what is wrong, and the provider is as before."""
    provider = whole()
    play(provider, [(0, 0x4B564D01, 0x2001), (0, 0x4B564D03, 0x4001)])
    before = provider.save()
    with pytest.raises(ConfigError, match=name):
        provider.load({**whole().save(), name: value})
    assert provider.save() == before


@pytest.mark.row("E9")
def test_a_part_of_a_state_is_refused() -> None:
    """All names of one version must be there."""
    provider = whole()
    saved = dict(provider.save())
    for left_out in list(saved):
        part = {name: value for name, value in saved.items() if name != left_out}
        with pytest.raises(ConfigError, match="found were"):
            provider.load(part)
    for mapping in ({}, {"system_time": (0, 0)}, {**VERSION_1, "steal_time": (0, 0)}):
        with pytest.raises(ConfigError, match="found were"):
            provider.load(mapping)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.lists(inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.row("E9")
@given(changes=st.dictionaries(st.sampled_from([*whole().save(), "other"]), ANYTHING, max_size=3))
@example(changes={"async_pf": (0x3F, 0)})
def test_any_state_is_taken_or_refused(changes: dict[str, Any]) -> None:
    """Whatever is in it, it is loaded and can be saved again, or is a ConfigError that changes nothing."""
    provider = whole()
    before = provider.save()
    try:
        provider.load({**before, **changes})
    except ConfigError:
        assert provider.save() == before
    else:
        again = whole()
        again.load(provider.save())
        assert again.save() == provider.save()


@pytest.mark.row("V-39", "X-08")
@given(profile=st.sampled_from(sorted(PROFILES)), traffic=TRAFFIC)
def test_a_reset_leaves_nothing(profile: str, traffic: list[tuple[int, int, int]]) -> None:
    """After any traffic every MSR is as in a new VM, no page is kept, and nothing is written any more."""
    provider, clock = a_provider(
        clock=StubClock(vmm=NotedVmm()), features=EVERYTHING if profile != "virtualbox" else None, profile=profile
    )
    play(provider, traffic)
    provider.reset()
    assert provider.save() == whole(profile).save()
    assert [clock.page_at(vcpu) for vcpu in range(2)] == [None, None]
    before = clock.memory.read(0, 1 << 20)
    for vcpu in range(2):
        provider.add_steal_time(vcpu, 5)
        assert not provider.take_eoi(vcpu)
        assert not provider.wake_all(vcpu)
    clock.refresh()
    assert clock.memory.read(0, 1 << 20) == before


@pytest.mark.row("K-35")
def test_msrs_are_as_at_power_on() -> None:
    """All read 0 but polling and migration, which are allowed."""
    expected = [0] * 7 + [1, 0, 0, 1]
    assert read_all(whole()) == expected * 2
