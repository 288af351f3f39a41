"""Leaf 0x40000010 beside KVM's leaves: on request, as provider Minimal's, and saved with the clock."""

from __future__ import annotations

import pytest

from pvclock import ConfigError, CpuidLeaf, GuestClock, GuestMemory, SimulatedBackend

HZ = 2_596_132_000
TIMING = 0x40000010


def a_clock(provider: str = "KVM", hz: int = HZ, **options: object) -> GuestClock:
    """A clock of one vCPU on a simulated host."""
    memory = GuestMemory(bytearray(1 << 14))
    return GuestClock(memory, 1, provider, backend=SimulatedBackend(hz), **options)  # type: ignore[arg-type]


@pytest.mark.row("E22", "M-02")
@pytest.mark.parametrize("profile", ["linux", "document", "virtualbox"])
def test_the_leaf_beside_kvms(profile: str) -> None:
    """Signature and features stay where they are; EAX of 0x40000000 says that 0x40000010 is there, zeros between."""
    plain, timed = a_clock(profile=profile), a_clock(profile=profile, timing_leaf=True)
    signature = plain.cpuid(0x40000000)
    assert signature is not None
    assert signature.eax == 0x40000001
    assert plain.cpuid(TIMING) is None
    assert timed.cpuid(0x40000000) == signature._replace(eax=TIMING)
    assert timed.cpuid(0x40000001) == plain.cpuid(0x40000001)
    assert all(timed.cpuid(leaf) == CpuidLeaf() for leaf in range(0x40000002, TIMING))
    assert timed.cpuid(TIMING) == CpuidLeaf(eax=2_596_132, ebx=1_000_000)
    assert timed.cpuid(TIMING + 1) is None
    assert list(timed.cpuid_leaves) == list(range(0x40000000, TIMING + 1))


@pytest.mark.row("E22", "M-02")
@pytest.mark.parametrize(
    ("hz", "bus_hz", "khz", "bus_khz"),
    [
        (HZ, 10**9, 2_596_132, 10**6),
        (1_500, 200_000_500, 2, 200_001),
        (499, 0, 0, 0),
        (4_294_967_295_499, 25 * 10**6, 2**32 - 1, 25_000),
    ],
)
def test_it_is_minimals_leaf(hz: int, bus_hz: int, khz: int, bus_khz: int) -> None:
    """Both providers say the same of the same frequencies: kHz, rounded to the nearest, a half up."""
    for timed in (a_clock(hz=hz, timing_leaf=True, apic_bus_hz=bus_hz), a_clock("Minimal", hz, apic_bus_hz=bus_hz)):
        assert timed.cpuid(TIMING) == CpuidLeaf(eax=khz, ebx=bus_khz)


@pytest.mark.row("E22", "P-25")
def test_it_is_saved_with_the_clock() -> None:
    """A restored clock has the leaf, with the APIC bus that was said; one that was saved without it has none."""
    slow_bus = a_clock(timing_leaf=True, apic_bus_hz=200_000_000)
    for clock, bus_khz in ((slow_bus, 200_000), (a_clock(timing_leaf=True), 10**6), (a_clock(timing_leaf=False), None)):
        restored = GuestClock.restore(clock.save(), clock.memory, backend=SimulatedBackend(HZ))
        assert restored.cpuid(TIMING) == (None if bus_khz is None else CpuidLeaf(eax=2_596_132, ebx=bus_khz))
        assert restored.cpuid_leaves == clock.cpuid_leaves
        assert restored.interface.config == clock.interface.config


@pytest.mark.row("E22", "M-02")
@pytest.mark.parametrize(("provider", "options"), [("KVM", {"timing_leaf": True}), ("Minimal", {})])
def test_a_guest_is_not_told_another_frequency_later(provider: str, options: dict[str, object]) -> None:
    """Restored where the TSC is nominally 100 ppm faster, the leaf says what the guest has read."""
    clock = a_clock(provider, HZ, **options)
    faster = SimulatedBackend(HZ + HZ // 10_000)
    restored = GuestClock.restore(clock.save(), clock.memory, backend=faster)
    assert restored.cpuid(TIMING) == clock.cpuid(TIMING) == CpuidLeaf(eax=2_596_132, ebx=1_000_000)
    assert restored.interface.config == clock.interface.config


@pytest.mark.row("E22", "E13")
@pytest.mark.parametrize(
    ("hz", "options", "complaint"),
    [
        (HZ, {"apic_bus_hz": 10**9}, "apic_bus_hz is 1000000000; only leaf 0x40000010 says it"),
        (HZ, {"timing_leaf": 1}, "timing_leaf is 1; it can be True or False"),
        (
            HZ,
            {"timing_leaf": True, "apic_bus_hz": 2**63},
            "apic_bus_hz is 9223372036854775808 Hz; leaf 0x40000010 holds",
        ),
        (4_294_967_295_500, {"timing_leaf": True}, "TSC is 4294967295500 Hz; leaf 0x40000010 holds"),
    ],
)
def test_what_the_leaf_cannot_say(hz: int, options: dict[str, object], complaint: str) -> None:
    """A bus without the leaf, another type, and frequencies beyond 32 bits of kHz are ConfigErrors."""
    with pytest.raises(ConfigError, match=complaint):
        a_clock("KVM", hz, **options)


@pytest.mark.row("E22")
def test_that_guests_may_leave_this_clock_is_told() -> None:
    """Where the leaf is offered beside a clock, a warning says so at the start; without it, or alone, there is none."""
    offered, left_out, alone = a_clock(timing_leaf=True), a_clock(timing_leaf=False), a_clock("Minimal")
    for clock, expected in ((offered, 1), (left_out, 0), (a_clock(), 0), (alone, 0)):
        first, *others = (event.why for event in clock.events.read().events)
        assert first.startswith(f"provider {clock.interface.name}")
        assert sum("leaf 0x40000010 is offered" in why for why in others) == expected
