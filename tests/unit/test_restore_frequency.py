"""Restored on a TSC of another frequency: what a guest that lives by its TSC was told stays true, or it is refused."""

from __future__ import annotations

from typing import Any, Final

import pytest

from pvclock import GuestClock, GuestMemory, RangeError, SimulatedBackend, StateFileError
from pvclock.state.clock_state import ClockState, from_json, to_json
from pvclock.timekeeping.events import EventKind
from tests import oracle
from tests.unit.clocks import NS_PER_S, a_clock, guest_ns, guest_tsc, page_of

HZ: Final = 2_500_000_000
FASTER_HZ: Final = 3_000_000_000
TIMING: Final = 0x40000010
BOUND_HZ: Final = HZ * 250 // 10**6

LIVES_BY_TSC: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "an invariant TSC": ("KVM", {"offer_invariant_tsc": True}),
    "the timing leaf": ("KVM", {"timing_leaf": True}),
    "Minimal": ("Minimal", {}),
    "None": ("None", {}),
}
every_such_guest = pytest.mark.parametrize("guest", LIVES_BY_TSC)


def saved(provider: str = "KVM", **options: Any) -> tuple[ClockState, GuestMemory]:  # noqa: ANN401  # any option
    """The state of a paused clock on a host of 2.5 GHz, through its file's form, and its memory."""
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 1, provider, backend=SimulatedBackend(HZ), **options)
    clock.pause()
    return from_json(to_json(clock.save())), memory


def told(clock: GuestClock) -> list[str]:
    """What was told of the TSC's rate."""
    return [event.why for event in clock.events.read().events if event.kind is EventKind.TSC_RATE]


@pytest.mark.row("E5", "E22", "P-25")
@every_such_guest
def test_another_frequency_is_refused_by_name(guest: str) -> None:
    """On 3 GHz the error names both frequencies; the memory is left as it was, and to no clock."""
    provider, options = LIVES_BY_TSC[guest]
    state, memory = saved(provider, **options)
    before = memory.read(0, 1 << 16)
    with pytest.raises(StateFileError, match=f"(?s){HZ} Hz.*{FASTER_HZ} Hz") as error:
        GuestClock.restore(state, memory, backend=SimulatedBackend(FASTER_HZ))
    assert error.value.field == "guest_tsc_hz"
    assert memory.read(0, 1 << 16) == before


@pytest.mark.row("E5", "E22", "P-25")
@every_such_guest
def test_another_frequency_is_taken_if_the_caller_says_so(guest: str) -> None:
    """any_tsc_hz=True takes 3 GHz; 10 s are 12 by that TSC, and the event says how far off it is."""
    provider, options = LIVES_BY_TSC[guest]
    state, memory = saved(provider, **options)
    host = SimulatedBackend(FASTER_HZ)
    clock = GuestClock.restore(state, memory, backend=host, any_tsc_hz=True)
    clock.resume()
    begin = guest_tsc(host)
    host.advance(ns=10 * NS_PER_S)
    assert guest_tsc(host) - begin == 12 * HZ
    (why,) = told(clock)
    assert f"{HZ} Hz" in why
    assert f"{FASTER_HZ} Hz" in why
    assert "2e+05 ppm" in why


@pytest.mark.row("E5", "E22", "P-25")
@every_such_guest
@pytest.mark.parametrize("off_hz", [-BOUND_HZ, -1, 1, BOUND_HZ])
def test_up_to_250_ppm_it_is_an_event(guest: str, off_hz: int) -> None:
    """Within 250 ppm, 250 included, either way: restored, told, and the leaf keeps the kHz that the guest has read."""
    provider, options = LIVES_BY_TSC[guest]
    state, memory = saved(provider, **options)
    clock = GuestClock.restore(state, memory, backend=SimulatedBackend(HZ + off_hz))
    (why,) = told(clock)
    assert f"{HZ} Hz" in why
    assert f"{HZ + off_hz} Hz" in why
    leaf = clock.cpuid(TIMING)
    assert (leaf.eax if leaf else None) == (None if guest == "None" else 2_500_000)


@pytest.mark.row("E5", "E22", "P-25")
@every_such_guest
@pytest.mark.parametrize("off_hz", [-BOUND_HZ - 1, BOUND_HZ + 1])
def test_beyond_250_ppm_by_one_hz_it_is_refused(guest: str, off_hz: int) -> None:
    """The bound is exact, either way."""
    provider, options = LIVES_BY_TSC[guest]
    state, memory = saved(provider, **options)
    with pytest.raises(StateFileError, match=f"{HZ} Hz"):
        GuestClock.restore(state, memory, backend=SimulatedBackend(HZ + off_hz))


@pytest.mark.row("E5", "E22", "P-25")
def test_small_differences_do_not_add_up() -> None:
    """Moved twice by 200 ppm in one direction: the second is 400 ppm off what the guest was told, and is refused."""
    state, memory = saved("Minimal")
    step = HZ * 200 // 10**6
    moved = GuestClock.restore(state, memory, backend=SimulatedBackend(HZ + step))
    again = moved.save()
    assert (again.guest_tsc_hz, again.host.tsc_hz) == (HZ, HZ)
    moved.resume()
    moved.pause()
    again = moved.save()
    assert (again.guest_tsc_hz, again.host.tsc_hz) == (HZ, HZ + step)
    with pytest.raises(StateFileError, match=f"{HZ} Hz"):
        GuestClock.restore(again, memory, backend=SimulatedBackend(HZ + 2 * step))
    back = GuestClock.restore(again, memory, backend=SimulatedBackend(HZ))
    assert told(back) == []


@pytest.mark.row("E5", "E22", "P-25")
def test_a_guest_with_a_clock_of_ours_may_go_anywhere() -> None:
    """Its page says the new frequency: nothing is refused, and told only of the leaf that it was offered unasked."""
    source, _, memory = a_clock(HZ)
    source.pause()
    host = SimulatedBackend(FASTER_HZ)
    clock = GuestClock.restore(source.save(), memory, backend=host)
    clock.resume()
    assert told(clock) == [f"the guest was told a TSC of {HZ} Hz, and it is {FASTER_HZ} Hz here, 2e+05 ppm off"]
    host.advance(ns=NS_PER_S)
    assert abs(guest_ns(host, memory) - NS_PER_S) <= 1


@pytest.mark.row("K-15", "E5")
@pytest.mark.parametrize(("hz", "there_hz"), [(HZ, FASTER_HZ), (2_596_132_000, 1_000_001_000)])
def test_pages_show_the_frequency_of_the_host_that_they_are_on(hz: int, there_hz: int) -> None:
    """Every vCPU's mul and shift are for the guest's TSC here; restored at another frequency, for that one."""
    clock, _, memory = a_clock(hz, vcpus=2)
    pairs = [(page_of(clock, vcpu).tsc_to_system_mul, page_of(clock, vcpu).tsc_shift) for vcpu in range(2)]
    assert pairs == [oracle.time_scale(NS_PER_S, hz)] * 2
    clock.pause()
    host = SimulatedBackend(there_hz)
    moved = GuestClock.restore(clock.save(), memory, backend=host)
    moved.resume()
    pairs = [(page_of(moved, vcpu).tsc_to_system_mul, page_of(moved, vcpu).tsc_shift) for vcpu in range(2)]
    assert pairs == [oracle.time_scale(NS_PER_S, there_hz)] * 2
    before = [guest_ns(host, memory, vcpu) for vcpu in range(2)]
    host.advance(ns=NS_PER_S)
    after = [guest_ns(host, memory, vcpu) for vcpu in range(2)]
    assert all(abs(end - begin - NS_PER_S) <= 1 for begin, end in zip(before, after, strict=True))


@pytest.mark.row("E5", "E22", "P-25")
def test_a_state_of_version_1_counts_as_told_its_hosts_frequency() -> None:
    """It has no guest_tsc_hz: host.tsc_hz is what the guest lives by."""
    state, memory = saved("Minimal")
    old = from_json(to_json(state._replace(version=1)))
    with pytest.raises(StateFileError, match=f"{HZ} Hz"):
        GuestClock.restore(old, memory, backend=SimulatedBackend(FASTER_HZ))
    clock = GuestClock.restore(old, memory, backend=SimulatedBackend(HZ + 1000))
    leaf = clock.cpuid(TIMING)
    assert leaf is not None
    assert leaf.eax == 2_500_000


@pytest.mark.row("E22", "M-02")
def test_a_guest_can_be_told_another_frequency_than_its_hosts() -> None:
    """tsc_hz is what the leaf says and what is saved; one that no state can hold is refused."""
    state, _ = saved("Minimal", tsc_hz=2_400_000_000)
    assert state.guest_tsc_hz == 2_400_000_000
    clock = GuestClock(
        GuestMemory(bytearray(1 << 16)), 1, "Minimal", backend=SimulatedBackend(HZ), tsc_hz=2_400_000_000
    )
    leaf = clock.cpuid(TIMING)
    assert leaf is not None
    assert leaf.eax == 2_400_000
    for wrong in (0, -1, 2**64):
        with pytest.raises(RangeError, match=f"tsc_hz is {wrong}"):
            saved("KVM", tsc_hz=wrong)
