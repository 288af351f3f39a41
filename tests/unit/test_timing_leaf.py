"""Leaf 0x40000010 beside KVM's leaves: where the rate stays or on request, as provider Minimal's, and saved."""

from __future__ import annotations

from typing import Any

import pytest

from pvclock import ConfigError, CpuidLeaf, GuestClock, GuestMemory, SimulatedBackend, StateFileError
from pvclock.readings import shown_khz
from pvclock.timekeeping.events import EventKind

HZ = 2_596_132_000
TIMING = 0x40000010


def a_clock(provider: str = "KVM", hz: int = HZ, **options: Any) -> GuestClock:  # noqa: ANN401  # any option
    """A clock of one vCPU on a simulated host."""
    memory = GuestMemory(bytearray(1 << 14))
    return GuestClock(memory, 1, provider, backend=SimulatedBackend(hz), **options)


@pytest.mark.row("E22", "M-02")
@pytest.mark.parametrize("profile", ["linux", "document", "virtualbox"])
def test_the_leaf_beside_kvms(profile: str) -> None:
    """Signature and features stay where they are; EAX of 0x40000000 says that 0x40000010 is there, zeros between."""
    plain, timed = a_clock(profile=profile, timing_leaf=False), a_clock(profile=profile, timing_leaf=True)
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


# Unasked, where the guest's rate stays


@pytest.mark.row("E22", "M-02")
def test_it_is_offered_where_the_rate_stays() -> None:
    """Unasked, with the frequency that the page shows to a guest that computes it, within the page's own rounding."""
    clock = a_clock()
    assert clock.cpuid(TIMING) == CpuidLeaf(eax=2_596_132, ebx=1_000_000)
    clock.write_msr(0, 0x4B564D01, 0x1001)
    assert abs(shown_khz(clock.scale.mul, clock.scale.shift) - 2_596_132) <= 1


NOT_KEPT: dict[str, tuple[int, dict[str, Any]]] = {
    "a reference is followed": (HZ, {"reference": "monotonic"}),
    "another interface has its place": (HZ, {"cpuid_base": 0x40000100}),
    "the documents have none": (HZ, {"profile": "document"}),
    "VirtualBox has none": (HZ, {"profile": "virtualbox"}),
    "the TSC is not as fast as the guest is told": (HZ, {"tsc_hz": HZ - 1}),
    "it has no room for the frequency": (4_294_967_295_500, {}),
    "it is declined": (HZ, {"timing_leaf": False}),
}


@pytest.mark.row("E22", "M-02")
@pytest.mark.parametrize("case", NOT_KEPT)
def test_where_it_is_not_offered(case: str) -> None:
    """Not to a guest whose clock may leave the rate of its TSC, and not where it would be in another's way."""
    hz, options = NOT_KEPT[case]
    assert a_clock(hz=hz, **options).cpuid(TIMING) is None


@pytest.mark.row("E22", "M-02")
def test_it_is_not_offered_on_a_host_whose_tsc_is_not_trusted() -> None:
    """There guests are told no frequency that the host's kernel itself does not believe in."""
    backend = SimulatedBackend(HZ)
    backend.tsc_stable = False
    assert GuestClock(GuestMemory(bytearray(1 << 14)), 1, backend=backend).cpuid(TIMING) is None


@pytest.mark.row("E22", "E12")
def test_a_clock_that_is_dilated_from_the_boot_offers_none() -> None:
    """A dilation or a reference takes it back, and back at the TSC's own rate it is there again."""
    clock = a_clock()
    clock.dilate(1, 10)
    assert clock.cpuid(TIMING) is None
    clock.dilate(1)
    assert clock.cpuid(TIMING) is not None
    clock.follow("raw")
    assert clock.cpuid(TIMING) is None
    clock.follow("off")
    assert clock.cpuid(TIMING) is not None


@pytest.mark.row("E22", "E12")
@pytest.mark.parametrize("is_offered", [True, False])
def test_what_a_guest_may_have_read_stays(is_offered: bool) -> None:
    """From its first page on a dilation changes nothing of it: the leaf is of the TSC, whose frequency is as it was."""
    clock = a_clock()
    if not is_offered:
        clock.dilate(1, 10)
    before = clock.cpuid(TIMING)
    clock.write_msr(0, 0x4B564D01, 0x1001)
    clock.dilate(1, 3)
    clock.dilate(1)
    assert clock.cpuid(TIMING) == before
    assert (before is not None) == is_offered


@pytest.mark.row("E22", "P-25")
@pytest.mark.parametrize("is_dilated", [False, True])
def test_a_restore_does_not_decide_anew(is_dilated: bool) -> None:
    """A guest that was told has the leaf wherever it goes on, and one that was not never gets it, dilated or not."""
    clock = a_clock()
    if is_dilated:
        clock.dilate(1, 10)
    state = clock.save()
    restored = GuestClock.restore(state, clock.memory, backend=SimulatedBackend(HZ))
    assert (restored.cpuid(TIMING) is None) == is_dilated
    restored.dilate(1)
    assert (restored.cpuid(TIMING) is None) == is_dilated
    assert restored.interface.config == restored.save().provider.config == state.provider.config


@pytest.mark.row("E22", "P-25")
@pytest.mark.parametrize("timing_leaf", [None, "boot"])
def test_a_restore_elsewhere_makes_it_untrue_and_says_so(timing_leaf: str | None) -> None:
    """Where the TSC is faster by a tenth the guest goes on, with the leaf that it has read, and an event names both."""
    clock, faster = a_clock(timing_leaf=timing_leaf), SimulatedBackend(HZ + HZ // 10)
    restored = GuestClock.restore(clock.save(), clock.memory, backend=faster)
    assert restored.cpuid(TIMING) == clock.cpuid(TIMING)
    (told,) = [event.why for event in restored.events.read().events if event.kind is EventKind.TSC_RATE]
    assert f"told a TSC of {HZ} Hz, and it is {HZ + HZ // 10} Hz" in told


@pytest.mark.row("E22", "P-25")
def test_one_that_was_asked_for_is_not_made_untrue() -> None:
    """A guest that lives by the leaf is not restored where its TSC is faster by a tenth."""
    clock, faster = a_clock(timing_leaf=True), SimulatedBackend(HZ + HZ // 10)
    with pytest.raises(StateFileError, match=f"{HZ} Hz"):
        GuestClock.restore(clock.save(), clock.memory, backend=faster)
