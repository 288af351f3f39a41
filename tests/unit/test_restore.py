"""Saved clocks come back: on the same host, on others, after a reboot, and as their policy says."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import pytest

from pvclock import GuestClock, GuestMemory, HostTsc, RangeError, SimulatedBackend, StateFileError
from pvclock.host import linux
from pvclock.host.this_host import HostBackend
from pvclock.state.clock_state import ClockState, SavedPolicy, from_json, to_json
from pvclock.timekeeping import catchup
from tests.unit.clocks import NS_PER_S, PAGES, SYSTEM_TIME, a_clock, bound_ns, guest_ns, guest_tsc, page_of, shown

MIGRATIONS = (1000, pytest.param(10_000, marks=pytest.mark.long))
LOST_NS = Fraction(1, 2**900)


def saved_somewhere(source: random.Random, downtime_ns: int) -> tuple[GuestClock, ClockState, int, Fraction, int]:
    """A clock that was used for a while, its state, UTC after the downtime, and what its guests had: time and TSC."""
    backend = SimulatedBackend(
        source.randrange(10**6, 10**10),
        tsc=source.getrandbits(64),
        ref_ns=source.getrandbits(60),
        realtime_ns=source.getrandbits(60),
    )
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 2, backend=backend)
    for vcpu in range(2):
        clock.write_msr(vcpu, SYSTEM_TIME, PAGES[vcpu] | 1)
    begin = backend.tsc
    backend.advance(ns=source.randrange(10**9))
    clock.refresh()
    clock.pause()
    had = Fraction((backend.tsc - begin) % 2**64 * NS_PER_S, backend.tsc_hz)
    return clock, clock.save(), backend.realtime_ns + downtime_ns, had, backend.tsc


@pytest.mark.row("E1", "E9", "E11", "P-25")
@pytest.mark.parametrize("migrations", MIGRATIONS)
@pytest.mark.parametrize("policy", ["freeze", "advance"])
def test_migrations(policy: str, migrations: int) -> None:
    """Random pairs of hosts: what guests read goes on at the same ns, or by the elapsed time, on every vCPU."""
    source = random.Random(policy)  # noqa: S311  # a sample, no secret
    for _ in range(migrations):
        downtime_ns = source.choice([0, 1, source.randrange(10**6), source.randrange(10**13)])
        clock, state, realtime_ns, had, tsc = saved_somewhere(source, downtime_ns)
        target = SimulatedBackend(source.randrange(10**6, 10**10), source.getrandbits(64), realtime_ns=realtime_ns)
        memory = GuestMemory(bytearray(clock.memory.read(0, 1 << 16)))
        moved = GuestClock.restore(state, memory, backend=target, policy=policy)
        moved.resume()
        gained_ns = downtime_ns if policy == "advance" else 0
        expected = had + gained_ns
        assert abs(moved.at(target.tsc) - expected) <= LOST_NS
        rate = Fraction(NS_PER_S, target.tsc_hz)
        for vcpu in range(2):
            assert abs(guest_ns(target, memory, vcpu) - expected) <= bound_ns(page_of(moved, vcpu), rate, 0)
            assert guest_tsc(target, vcpu) == (tsc + gained_ns * target.tsc_hz // NS_PER_S) % 2**64


@pytest.mark.row("E1", "E9", "E11")
def test_no_guest_reads_less_after_a_restore() -> None:
    """Whatever was done to its clock, paused or running at the save: under freeze it reads on from its last reading."""
    source, ahead = random.Random(1), 0  # noqa: S311  # a sample, no secret
    for _ in range(300):
        clock, backend, memory = a_clock(source.randrange(10**6, 10**10), source.getrandbits(64), vcpus=2)
        for _ in range(source.randrange(6)):
            clock.dilate(source.randrange(1, 400), source.randrange(1, 400))
            backend.advance(ns=source.randrange(10 ** source.randrange(1, 10)))
            clock.refresh()
        if source.randrange(2):
            clock.pause()
        last_ns = [guest_ns(backend, memory, vcpu) for vcpu in range(2)]
        ahead += last_ns[0] > clock.now()
        target = SimulatedBackend(source.randrange(10**6, 10**10), tsc=source.getrandbits(64))
        moved = GuestMemory(bytearray(memory.read(0, 1 << 16)))
        GuestClock.restore(clock.save(), moved, backend=target).resume("freeze")
        assert [guest_ns(target, moved, vcpu) >= last_ns[vcpu] for vcpu in range(2)] == [True, True]
    assert ahead  # of the timeline: that is what a restored page has to reach


@pytest.mark.row("E9", "J-07")
@pytest.mark.parametrize("seed", range(50))
def test_restore_of_save_is_equal(seed: int) -> None:
    """A clock of any history, paused, saved as JSON and restored: its guest reads the same MSRs; saved again, too."""
    source = random.Random(seed)  # noqa: S311  # a sample, no secret
    clock, backend, memory = a_clock(source.choice([10**6, 2_596_132_000]), source.getrandbits(64), vcpus=2)
    tampered, adjust, begin = source.randrange(2), source.getrandbits(64), backend.tsc
    clock.write_msr(tampered, 0x3B, adjust)
    clock.write_msr(0, 0x4B564D00, 0x3000)
    clock.policy = catchup.parse(source.choice(["virtualbox", "advance:max_ns=5", "slew:max_ppm=7", "freeze"]))
    clock.dilate(355, 113)
    backend.advance(ns=source.randrange(10**9))
    clock.slew(source.randrange(-(10**6), 10**6), 100)
    backend.advance(ns=source.randrange(10**6))
    clock.refresh()
    clock.pause()
    state = clock.save()
    last_ns = [guest_ns(backend, memory, vcpu) for vcpu in range(2)]
    adjusts = [adjust if vcpu == tampered else 0 for vcpu in range(2)]
    tscs = [(backend.tsc + each) % 2**64 for each in adjusts]
    backend.tsc, backend.tsc_offsets = HostTsc((begin + 12345) % 2**64), {}
    again = GuestClock.restore(from_json(to_json(state)), memory, backend=backend)
    for is_resumed in (False, True):
        for vcpu in range(2):
            read = [again.read_msr(vcpu, index) for index in (0x10, 0x3B, 0xC0000103, SYSTEM_TIME, 0x4B564D00)]
            assert read == [tscs[vcpu], adjusts[vcpu], 0, PAGES[vcpu] | 1, 0x3000]
        if not is_resumed:
            assert again.save() == state
            assert (again.policy, again.skew_ns) == (clock.policy, clock.skew_ns)
            again.resume("freeze")
    assert [guest_tsc(backend, vcpu) for vcpu in range(2)] == tscs
    assert [guest_ns(backend, memory, vcpu) - last_ns[vcpu] in (0, 1, 2) for vcpu in range(2)] == [True, True]


@pytest.mark.row("J-07", "J-06", "P-25")
def test_adjust_and_aux_are_the_guests_again() -> None:
    """After a restore on another host, resumed, each vCPU reads the ADJUST and the TSC_AUX that it had."""
    clock, _, memory = a_clock(2_596_132_000, tsc=1 << 40, vcpus=2)
    for vcpu, adjust in enumerate((10**11, 2**64 - 5)):
        clock.write_msr(vcpu, 0x3B, adjust)
    clock.pause()
    state = clock.save()
    state = state._replace(vcpus=tuple(vcpu._replace(tsc_aux=7 + at) for at, vcpu in enumerate(state.vcpus)))
    moved_to = SimulatedBackend(2_596_132_000, tsc=99)
    moved = GuestClock.restore(state, memory, backend=moved_to)
    moved.resume("freeze")
    assert [moved.read_msr(vcpu, 0x3B) for vcpu in range(2)] == [10**11, 2**64 - 5]
    assert [moved.read_msr(vcpu, 0xC0000103) for vcpu in range(2)] == [7, 8]
    assert [guest_tsc(moved_to, vcpu) for vcpu in range(2)] == [(1 << 40) + 10**11, (1 << 40) - 5]


@pytest.mark.row("J-02")
@pytest.mark.parametrize("is_paused", [False, True])
def test_reset_clears_adjust_and_aux(is_paused: bool) -> None:
    """A reset leaves 0 in ADJUST and TSC_AUX of each vCPU, of a clock that runs or was just restored, and saved too."""
    clock, backend, memory = a_clock(2_596_132_000, vcpus=2)
    clock.write_msr(1, 0x3B, 500)
    state = clock.save()
    state = state._replace(vcpus=tuple(vcpu._replace(tsc_aux=7) for vcpu in state.vcpus))
    moved = GuestClock.restore(state, memory, backend=backend)
    if not is_paused:
        moved.resume("freeze")
        assert [moved.tsc(vcpu).aux for vcpu in range(2)] == [7, 7]
    moved.reset()
    assert [(vcpu.tsc_adjust, vcpu.tsc_aux) for vcpu in moved.save().vcpus] == [(0, 0)] * 2
    if is_paused:
        moved.resume("freeze")
    assert [(moved.read_msr(vcpu, 0x3B), moved.read_msr(vcpu, 0xC0000103)) for vcpu in range(2)] == [(0, 0)] * 2


@pytest.mark.row("E1", "E5")
def test_restore_within_one_boot_goes_by_the_raw_clock() -> None:
    """On the same boot a step of the time of day counts for nothing; after a reboot it is all there is."""
    clock, backend, memory = a_clock(2_596_132_000)
    backend.advance(ns=10**9)
    state = clock.save()
    backend.advance(ns=10**9)
    backend.realtime_ns += 3600 * NS_PER_S
    same = GuestClock.restore(state, memory, backend=backend)
    same.resume("advance")
    assert same.at(backend.tsc) == 2 * 10**9
    assert abs(guest_ns(backend, memory) - 2 * 10**9) <= 1
    rebooted = SimulatedBackend(2_596_132_000, realtime_ns=backend.realtime_ns)
    after = GuestClock.restore(state, memory, backend=rebooted)
    after.resume("advance")
    assert after.at(rebooted.tsc) == 2 * 10**9 + 3600 * NS_PER_S
    assert abs(guest_ns(rebooted, memory) - 3602 * NS_PER_S) <= 1


@pytest.mark.row("E1")
@pytest.mark.parametrize(
    ("host_step_ns", "guest_step_ns", "why"),
    [(-(10**12), 0, "went back by"), (10 * 366 * 86400 * NS_PER_S, 366 * 86400 * NS_PER_S, "were left out")],
)
def test_absurd_hosts_are_bounded_and_reported(host_step_ns: int, guest_step_ns: int, why: str) -> None:
    """A time of day that went back, or ten years ahead, is not applied as it stands, and the event says so."""
    clock, backend, memory = a_clock(10**9)
    state = clock.save()
    target = SimulatedBackend(10**9, realtime_ns=backend.realtime_ns + host_step_ns)
    moved = GuestClock.restore(state, memory, backend=target)
    moved.resume("advance")
    assert moved.at(target.tsc) == guest_step_ns
    assert abs(guest_ns(target, memory) - guest_step_ns) <= 1
    assert why in moved.events.read().events[-1].why


@pytest.mark.row("E1")
def test_a_host_without_offsets_still_gives_the_right_time() -> None:
    """Where a guest's TSC cannot be put back, that is an event, and pages are right by the TSC that there is."""
    clock, backend, memory = a_clock(2_596_132_000, tsc=5 << 40)
    backend.advance(ns=3 * NS_PER_S)
    state = clock.save()
    target = SimulatedBackend(10**9, tsc=7, honours_tsc_offset=False)
    moved = GuestClock.restore(state, memory, backend=target)
    moved.resume("freeze")
    assert "refused" in [event.kind for event in moved.events.read().events]
    assert moved.read_msr(0, 0x10) == 7
    assert abs(shown(memory, 0, 7) - 3 * NS_PER_S) <= 1


@pytest.mark.row("E9", "P-25")
def test_what_cannot_be_restored_is_named() -> None:
    """Features that are not served here, another provider, another's MSRs: the field, and nothing is written."""
    clock, backend, memory = a_clock(10**9)
    state, before = clock.save(), bytes(memory.read(0, 1 << 16))
    provider = state.provider
    wrong = [
        state._replace(provider=provider._replace(config={**provider.config, "features": 1 << 30})),
        state._replace(provider=provider._replace(config={**provider.config, "colour": 1})),
        state._replace(provider=provider._replace(name="Xen")),
        state._replace(provider=provider._replace(msrs={})),
        state._replace(policy=SavedPolicy("later", None)),
    ]
    for each in wrong:
        with pytest.raises(StateFileError, match=r"provider|policy"):
            GuestClock.restore(each, memory, backend=backend)
    assert memory.read(0, 1 << 16) == before


@pytest.mark.row("E1", "E9")
def test_what_the_saved_clocks_guest_read_is_not_taken_back() -> None:
    """offset() back is refused by a restored clock, as by the one that was saved, before and after its resume."""
    clock, backend, memory = a_clock(10**9)
    backend.advance(ns=100 * NS_PER_S)
    clock.pause()
    restored = GuestClock.restore(clock.save(), memory, backend=backend)
    for _ in range(2):
        with pytest.raises(RangeError, match="time that was read is not taken back"):
            restored.offset(-1)
        if restored.is_paused:
            restored.resume("freeze")
    assert restored.read(0) >= 100 * NS_PER_S


@pytest.mark.row("E1", "E12", "P-25")
@pytest.mark.parametrize("saved", [False, True])
def test_missed_time_has_the_dilation_of_the_pause(saved: bool) -> None:
    """dilate() during a pause takes effect at resume: 10 s missed at dilation 1 are 10 s, saved and restored or not."""
    clock, backend, memory = a_clock(10**9)
    clock.pause()
    backend.advance(ns=4 * NS_PER_S)
    clock.dilate(1000)
    backend.advance(ns=5 * NS_PER_S)
    if saved:
        clock = GuestClock.restore(from_json(to_json(clock.save())), memory, backend=backend)
    backend.advance(ns=NS_PER_S)
    assert clock.resume("advance").step_ns == 10 * NS_PER_S
    backend.advance(ns=NS_PER_S)
    assert clock.at(backend.tsc) == 1010 * NS_PER_S
    assert abs(guest_ns(backend, memory) - 1010 * NS_PER_S) <= bound_ns(page_of(clock), Fraction(1000), NS_PER_S)


@pytest.mark.row("E5")
def test_a_process_moved_to_another_boot_saves_that_ones_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CRIU may restore the process on another host: save(), pause() and resume() read the boot anew, events do not."""
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(linux, "BOOT_ID", boot)
    linux.boot_id.cache_clear()
    try:
        boot.write_text("the first\n")
        clock = GuestClock(GuestMemory(bytearray(4096)), backend=HostBackend(10**9))
        clock.refresh()
        boot.write_text("the second\n")
        assert clock.save().host.boot_id == "the second"
        clock.pause()
        boot.write_text("the third\n")
        assert clock.save().host.boot_id == "the second"
        assert clock.backend.stamps().boot_id == "the first"
    finally:
        linux.boot_id.cache_clear()
