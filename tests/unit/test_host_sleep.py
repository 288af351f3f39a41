"""A host that sleeps: the time missed counts the same whatever its TSC does, and is settled as declared."""

from __future__ import annotations

import re
from typing import Final, Literal

import pytest

from pvclock import GuestClock, GuestMemory, SimulatedBackend
from pvclock.clock.guest_clock import TSC_STABLE_BIT
from pvclock.state.clock_state import ClockState, from_json, to_json
from pvclock.timekeeping.events import Event, EventKind
from tests.unit.clocks import NS_PER_S, SYSTEM_TIME, guest_ns, guest_tsc, page_of
from tests.unit.test_host_watch import INTERVAL_NS, a_watch

HZ: Final = 2_500_000_000
EIGHT_HOURS_NS: Final = 8 * 3600 * NS_PER_S
AWAKE_NS: Final = NS_PER_S
TscInSleep = Literal["stops", "restarts", "counts on", "restarts, continued"]
REGIMES: Final[tuple[TscInSleep, ...]] = ("stops", "restarts", "counts on", "restarts, continued")
STOOD: Final[tuple[TscInSleep, ...]] = ("stops", "restarts", "restarts, continued")
RESTARTED: Final[tuple[TscInSleep, ...]] = ("restarts", "restarts, continued")

every_regime = pytest.mark.parametrize("regime", REGIMES)
where_the_tsc_stood = pytest.mark.parametrize("regime", STOOD)


def a_vm(*, tsc: int = 10**13, honours_tsc_offset: bool = True) -> tuple[GuestClock, SimulatedBackend, GuestMemory]:
    """A VM of two vCPUs that has run for 1 s on the host of the field's report."""
    backend = SimulatedBackend(
        HZ,
        tsc=tsc,
        ref_ns=4 * 10**12,
        realtime_ns=1_800_000_000 * NS_PER_S,
        boot_id="one",
        honours_tsc_offset=honours_tsc_offset,
    )
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 2, backend=backend)
    for vcpu, gpa in enumerate((0x2000, 0x2040)):
        clock.write_msr(vcpu, SYSTEM_TIME, gpa | 1)
    backend.advance(ns=NS_PER_S)
    clock.tick()
    return clock, backend, memory


def sleep(backend: SimulatedBackend, regime: TscInSleep) -> None:
    """The host sleeps for 8 h, and then runs for 1 s."""
    backend.sleep(ns=EIGHT_HOURS_NS, tsc=regime)
    backend.advance(ns=AWAKE_NS)


def guests_read(backend: SimulatedBackend, memory: GuestMemory, ns: int, within_ns: int = 1) -> bool:
    """Do both vCPUs' guests, by their pages and their RDTSC, read that time?"""
    return all(abs(guest_ns(backend, memory, vcpu) - ns) <= within_ns for vcpu in range(2))


def told(clock: GuestClock, kind: EventKind) -> list[Event]:
    """The clock's events of that kind."""
    return [event for event in clock.events.read().events if event.kind is kind]


def numbers(event: Event) -> list[int]:
    """The numbers in its reason."""
    return [int(number) for number in re.findall(r"\d+", event.why)]


def as_v1(state: ClockState) -> ClockState:
    """What version 1 has of the state."""
    mapping = to_json(state._replace(version=1, host=state.host._replace(asleep_ns=None)))
    return from_json(mapping)


# Paused


@pytest.mark.row("E23", "E1")
@every_regime
def test_a_pause_around_a_sleep_gains_all_of_it(regime: TscInSleep) -> None:
    """pause(), 8 h of host sleep and 1 s: resume("advance") gains 28,801 s, and pages show it."""
    clock, backend, memory = a_vm()
    clock.pause()
    sleep(backend, regime)
    settled = clock.resume("advance")
    assert settled.step_ns == 28_801 * NS_PER_S
    assert clock.now() == (1 + 28_801) * NS_PER_S
    assert guests_read(backend, memory, (1 + 28_801) * NS_PER_S)


@pytest.mark.row("E23", "E1")
@every_regime
def test_a_pause_around_a_sleep_keeps_guest_time_under_freeze(regime: TscInSleep) -> None:
    """pause(), 8 h of host sleep and 1 s: resume("freeze") goes on at the instant of the pause."""
    clock, backend, memory = a_vm()
    clock.pause()
    sleep(backend, regime)
    assert clock.resume("freeze").step_ns == 0
    assert clock.now() == 1 * NS_PER_S
    assert guests_read(backend, memory, 1 * NS_PER_S)


@pytest.mark.row("E23", "E1")
@every_regime
def test_a_restore_within_one_boot_gains_the_sleep(regime: TscInSleep) -> None:
    """Saved, 8 h of host sleep and 1 s, restored in the same boot: 28,801 s are gained."""
    clock, backend, memory = a_vm()
    clock.pause()
    state = clock.save()
    sleep(backend, regime)
    restored = GuestClock.restore(state, memory, backend=backend)
    assert restored.resume("advance").step_ns == 28_801 * NS_PER_S
    assert guests_read(backend, memory, (1 + 28_801) * NS_PER_S)


@pytest.mark.row("E23", "E1")
@pytest.mark.parametrize("restores", [False, True])
def test_an_ntp_step_counts_for_nothing(restores: bool) -> None:
    """UTC that is set by 8 h while the clock is paused or saved is no sleep: 1 s passed, 1 s is gained."""
    clock, backend, memory = a_vm()
    clock.pause()
    state = clock.save()
    backend.realtime_ns += EIGHT_HOURS_NS
    backend.advance(ns=NS_PER_S)
    paused = GuestClock.restore(state, memory, backend=backend) if restores else clock
    assert paused.resume("advance").step_ns == 1 * NS_PER_S
    assert guests_read(backend, memory, 2 * NS_PER_S)
    assert not told(paused, EventKind.SUSPEND)


@pytest.mark.row("E23", "E1")
def test_a_sleep_is_dilated_guest_time() -> None:
    """A clock at half speed gains half of the sleep."""
    clock, backend, memory = a_vm()
    clock.dilate(1, 2)
    clock.pause()
    sleep(backend, "stops")
    assert clock.resume("advance").step_ns * 2 == 28_801 * NS_PER_S
    assert guests_read(backend, memory, NS_PER_S + 28_801 * NS_PER_S // 2)


@pytest.mark.row("E23", "E1")
@every_regime
def test_a_sleep_in_a_pause_is_told_once(regime: TscInSleep) -> None:
    """The event names the 8 h, and guest time stood still."""
    clock, backend, memory = a_vm()
    clock.pause()
    clock.tick()
    sleep(backend, regime)
    clock.tick()
    clock.resume("freeze")
    (event,) = told(clock, EventKind.SUSPEND)
    assert numbers(event) == [EIGHT_HOURS_NS]
    assert event.jump_ns == 0
    assert guests_read(backend, memory, 1 * NS_PER_S)


@pytest.mark.row("E23", "E1")
def test_two_sleeps_in_one_pause_add_up() -> None:
    """One with a TSC that stops and one with a TSC that restarts, each found or not: 57,602 s."""
    for looks in (False, True):
        clock, backend, memory = a_vm()
        clock.pause()
        for regime in ("stops", "restarts"):
            sleep(backend, regime)
            if looks:
                clock.tick()
        assert clock.resume("advance").step_ns == 57_602 * NS_PER_S
        assert guests_read(backend, memory, (1 + 57_602) * NS_PER_S)


# Running


@pytest.mark.row("E23", "E1", "K-13")
@where_the_tsc_stood
@pytest.mark.parametrize(
    ("policy", "gain_s"), [(None, 0), ("freeze", 0), ("advance", 28_800), ("advance:max_ns=5000000000", 5)]
)
def test_a_sleep_that_a_vm_ran_through_is_settled_by_policy(
    regime: TscInSleep, policy: str | None, gain_s: int
) -> None:
    """Where the TSC counted on nothing guests gain what sleep_policy says, freeze if nothing was said; it is told."""
    clock, backend, memory = a_vm()
    if policy is not None:
        clock.sleep_policy = policy
    sleep(backend, regime)
    clock.tick()
    assert clock.now() == (2 + gain_s) * NS_PER_S
    assert guests_read(backend, memory, (2 + gain_s) * NS_PER_S)
    (event,) = told(clock, EventKind.SUSPEND)
    assert event.jump_ns == gain_s * NS_PER_S
    assert numbers(event)[0] == EIGHT_HOURS_NS
    assert event.why.endswith(policy or "freeze")


@pytest.mark.row("E23", "E1")
@where_the_tsc_stood
def test_a_sleep_that_a_vm_ran_through_can_be_slewed(regime: TscInSleep) -> None:
    """Under a slew nothing is gained at once, and all of the sleep is owed."""
    clock, backend, memory = a_vm()
    clock.sleep_policy = "slew:max_ppm=500"
    sleep(backend, regime)
    clock.tick()
    assert guests_read(backend, memory, 2 * NS_PER_S)
    assert clock.skew_ns == EIGHT_HOURS_NS
    backend.advance(ns=2 * NS_PER_S)
    clock.tick()
    assert guests_read(backend, memory, 4 * NS_PER_S + 2 * NS_PER_S * 500 // 10**6)
    assert EIGHT_HOURS_NS - clock.skew_ns == 2 * NS_PER_S * 500 // 10**6


@pytest.mark.row("E23", "E1", "K-13")
@pytest.mark.parametrize("policy", ["freeze", "advance", "slew"])
def test_nothing_is_taken_back_where_the_tsc_counted_on(policy: str) -> None:
    """Guests have read that time: whatever the policy, it stays, and nothing is added to it; the event says so."""
    clock, backend, memory = a_vm()
    clock.sleep_policy = policy
    sleep(backend, "counts on")
    clock.tick()
    assert clock.now() == 28_802 * NS_PER_S
    assert 0 <= clock.now() - guest_ns(backend, memory) < 30_000  # 0.47 ppb of 8 h, which come back by 1 ns
    assert clock.skew_ns == 0
    (event,) = told(clock, EventKind.SUSPEND)
    assert numbers(event)[0] == EIGHT_HOURS_NS
    assert event.jump_ns == 0


@pytest.mark.row("E23", "E9")
def test_a_sleep_of_a_young_host_whose_tsc_restarts() -> None:
    """A TSC that began anew and has passed the last publish by the time of the first look: 120 s went by, not 59."""
    clock, backend, memory = a_vm(tsc=60 * HZ)
    backend.sleep(ns=EIGHT_HOURS_NS, tsc="restarts")
    backend.advance(ns=120 * NS_PER_S)
    clock.tick()
    assert clock.now() == 121 * NS_PER_S
    assert guests_read(backend, memory, 121 * NS_PER_S, 60)  # 0.47 ppb of 120 s, in which nothing was published
    assert [clock.read_msr(0, 0x10), guest_tsc(backend, 1)] == [(60 + 121) * HZ] * 2
    assert len(told(clock, EventKind.TSC_STEP)) == 1


@pytest.mark.row("E23", "E15")
@pytest.mark.parametrize("first", ["heed", "tick"])
def test_the_watchs_trouble_and_the_clocks_finding_are_one_event(first: str) -> None:
    """A sleep with a TSC that restarts, found by the clock and by a HostWatch: one SUSPEND and one TSC_STEP."""
    clock, backend, _ = a_vm()
    watch, host = a_watch()
    host.suspend(EIGHT_HOURS_NS, tsc_runs=False)
    host.step_tsc(-(10**11))
    host.run(INTERVAL_NS)
    sleep(backend, "restarts")
    if first == "tick":
        clock.tick()
    assert {"suspend", "tsc_step"} <= {str(trouble.kind) for trouble in clock.check_host(watch)}
    clock.tick()
    assert [len(told(clock, kind)) for kind in (EventKind.SUSPEND, EventKind.TSC_STEP)] == [1, 1]


@pytest.mark.row("E23", "E15")
def test_a_sleep_that_only_the_watch_can_see_is_told() -> None:
    """A backend that does not know of sleep leaves the watch's event."""
    clock, _, _ = a_vm()
    watch, host = a_watch()
    host.suspend(EIGHT_HOURS_NS)
    clock.check_host(watch)
    assert len(told(clock, EventKind.SUSPEND)) == 1


# While a reference is followed


@pytest.mark.row("E23", "E11")
@every_regime
@pytest.mark.parametrize("reference", ["raw", "monotonic", "realtime"])
@pytest.mark.parametrize("policy", ["freeze", "advance"])
@pytest.mark.parametrize("paused", [False, True])
def test_a_sleep_is_the_policys_business_and_no_error(
    regime: TscInSleep, reference: str, policy: str, *, paused: bool
) -> None:
    """Whether the reference or the TSC counted the sleep or not: nothing of it is slewed in or taken back later."""
    clock, backend, memory = a_vm()
    clock.sleep_policy = policy
    clock.follow(reference)
    for _ in range(20):
        backend.advance(ns=NS_PER_S)
        clock.tick()
    before = clock.now()
    assert guests_read(backend, memory, before)
    if paused:
        clock.pause()
    sleep(backend, regime)
    clock.tick()
    if paused:
        clock.resume(policy)
    gains = policy == "advance" or (regime == "counts on" and not paused)
    woken = clock.now()
    assert woken - before == (28_800 * NS_PER_S if gains else 0) + (0 if paused and not gains else AWAKE_NS)
    for _ in range(60):
        backend.advance(ns=NS_PER_S)
        clock.tick()
        assert clock.steering is not None
        assert abs(clock.steering.error_ns) <= 2
    assert abs(clock.now() - woken - 60 * NS_PER_S) <= 2
    assert guests_read(backend, memory, clock.now(), 30_000 if regime == "counts on" else 2)


@pytest.mark.row("E23", "E11")
@every_regime
def test_an_error_from_before_a_sleep_is_not_forgotten(regime: TscInSleep) -> None:
    """UTC was set 10 s ahead, and the host sleeps while that is worked off: it goes on, and the error said is true."""
    clock, backend, _ = a_vm()
    clock.sleep_policy = "advance"
    clock.follow("realtime")
    for _ in range(20):
        backend.advance(ns=NS_PER_S)
        clock.tick()
    utc_ns, begin_ns = backend.realtime_ns, clock.now()
    backend.realtime_ns += 10 * NS_PER_S
    for _ in range(20):
        backend.advance(ns=NS_PER_S)
        clock.tick()
    sleep(backend, regime)
    for _ in range(20):
        clock.tick()
        behind_ns = backend.realtime_ns - utc_ns - (clock.now() - begin_ns)
        backend.advance(ns=NS_PER_S)
    counted_ns = EIGHT_HOURS_NS if regime == "counts on" else 0  # at the 500 ppm that guests had
    assert abs(behind_ns + counted_ns * 500 // 10**6 - 10 * NS_PER_S) < NS_PER_S
    assert clock.steering is not None
    assert abs(clock.steering.error_ns - behind_ns) <= 10


# The vCPUs' TSCs after a sleep


@pytest.mark.row("E23", "E5")
@pytest.mark.parametrize("regime", RESTARTED)
@pytest.mark.parametrize("paused", [False, True])
def test_guests_tscs_go_on_and_are_never_added_to_twice(regime: TscInSleep, paused: bool) -> None:
    """After a TSC that began anew the guest's own goes on from where it was, whether KVM saw to it or not."""
    clock, backend, _ = a_vm()
    gone_on = 10**13 + HZ + AWAKE_NS * HZ // NS_PER_S
    if paused:
        clock.pause()
    sleep(backend, regime)
    clock.tick()
    clock.tick()
    if paused:
        clock.resume("freeze")
    assert [guest_tsc(backend, vcpu) for vcpu in range(2)] == [gone_on] * 2
    assert [clock.read_msr(vcpu, 0x10) for vcpu in range(2)] == [gone_on] * 2
    assert not page_of(clock).flags & TSC_STABLE_BIT
    assert len(told(clock, EventKind.TSC_STEP)) == 1


@pytest.mark.row("E23", "E5")
def test_offsets_that_kvm_gave_to_one_vcpu_are_read_back() -> None:
    """KVM that changed an offset in a sleep that left the TSC alone: the page follows, and STABLE goes with it."""
    clock, backend, memory = a_vm()
    backend.sleep(ns=EIGHT_HOURS_NS, tsc="stops")
    backend.tsc_offsets[1] = 10**12
    backend.advance(ns=AWAKE_NS)
    clock.tick()
    assert backend.tsc_offsets[1] == 10**12
    assert clock.read_msr(1, 0x10) == backend.tsc + 10**12
    assert not page_of(clock).flags & TSC_STABLE_BIT
    assert guests_read(backend, memory, 2 * NS_PER_S)


@pytest.mark.row("E23", "E5")
def test_a_host_without_offsets_loses_stable_and_says_so() -> None:
    """Where the guests' TSCs cannot be put on, they begin anew with the host: STABLE off, told, pages right."""
    clock, backend, memory = a_vm(honours_tsc_offset=False)
    sleep(backend, "restarts")
    clock.tick()
    assert clock.read_msr(0, 0x10) == backend.tsc == HZ
    assert clock.now() == 2 * NS_PER_S
    assert guests_read(backend, memory, 2 * NS_PER_S)
    assert not page_of(clock).flags & TSC_STABLE_BIT
    assert clock.refused_offset is not None
    assert len(told(clock, EventKind.REFUSED)) == 1


# What is saved of it


@pytest.mark.row("E23", "P-25")
def test_a_state_of_version_1_loads_and_says_what_it_could_not_know() -> None:
    """It gains 1 s within the boot, as before, and the event says that nobody knows of a sleep."""
    clock, backend, memory = a_vm()
    clock.pause()
    state = as_v1(clock.save())
    sleep(backend, "stops")
    restored = GuestClock.restore(state, memory, backend=backend)
    assert restored.resume("advance").step_ns == 1 * NS_PER_S
    assert guests_read(backend, memory, 2 * NS_PER_S)
    (event,) = told(restored, EventKind.RESTORE)
    assert "boot one" in event.why
    assert numbers(event) == [1]  # the version


@pytest.mark.row("E23", "P-25")
def test_a_saved_state_has_what_sleep_needs() -> None:
    """asleep_ns and sleep_policy are in the state, and come back with it."""
    clock, backend, memory = a_vm()
    backend.sleep(ns=EIGHT_HOURS_NS, tsc="stops")
    clock.sleep_policy = "advance"
    clock.pause()
    state = from_json(to_json(clock.save()))
    assert (state.host.asleep_ns, str(state.sleep_policy)) == (EIGHT_HOURS_NS, "advance")
    restored = GuestClock.restore(state, memory, backend=backend)
    restored.resume("freeze")
    sleep(backend, "stops")
    restored.tick()
    assert restored.now() == (1 + 28_800 + 28_801) * NS_PER_S
    assert guests_read(backend, memory, (1 + 28_800 + 28_801) * NS_PER_S)
