"""TSC offsets and IA32_TSC_ADJUST as a guest sees them by RDTSC, with the engine and with the kernel serving.

Hosts differ: one honours offsets, one steers them along kernel time, one ignores them.  Each is held to what it can do.
"""

from __future__ import annotations

from typing import Literal

import pytest

from pvclock import GuestClock, HostTsc, Machine, TscOffsetNotHonoured
from pvclock._counter import read_tsc
from pvclock.kvm import Kvm, open_kvm, tsc_offset
from pvclock.kvm.loaded import FoundOnce, loaded_kvm
from pvclock.kvm.tsc_offset import TscOffsets
from pvclock.meter.findings import failures
from pvclock.meter.machine_guest import finish, probe_machine, wait_until_reading
from pvclock.payloads import probe
from tests.kvm.reading import assert_last_are_on_the_timeline, wait_until_all_read_on
from tests.kvm.tsc_guest import TSC, TSC_ADJUST, Step, TscGuest, tsc_guest

pytestmark = pytest.mark.kvm

Clock = Literal["engine", "kernel"]
both = pytest.mark.parametrize("clock", ["engine", "kernel"])

RDTSC, READ_TSC, READ_ADJUST = Step("rdtsc"), Step("rdmsr", TSC), Step("rdmsr", TSC_ADJUST)
BOUND_NS = 4
"""Design 2.3, as in test_time_operations."""
SOON = 1 << 36
"""Ticks, some 25 s: a guest gets from one step to the next within it, and every move below is longer."""


def guest_writes(adjust: int, tsc: int) -> list[Step]:
    """Look, write ADJUST, look, write TSC, look."""
    look = [RDTSC, READ_TSC, READ_ADJUST]
    return [*look, Step("wrmsr", TSC_ADJUST, adjust), *look, Step("wrmsr", TSC, tsc), *look]


def is_soon_after(later: int, earlier: int) -> bool:
    """Is one TSC value a little later than another, modulo 2^64?"""
    return 0 <= (later - earlier) % 2**64 < SOON


def engine_of(guest: TscGuest) -> GuestClock:
    """The guest's clock, which is the engine's."""
    assert guest.machine.clock is not None
    return guest.machine.clock


@pytest.mark.row("J-02", "J-03", "J-04", "J-05")
@both
def test_guest_writes_on_two_vcpus(clock: Clock, tsc_offsets: TscOffsets) -> None:
    """Each vCPU's own writes of 0x3b and 0x10 show at once in its RDTSC, RDMSR 0x10 and ADJUST, and in its offset."""
    adjusts, tscs = (1 << 40, 3 << 40), (1 << 50, 5 << 50)
    host_tsc = read_tsc()
    with tsc_guest(clock, *map(guest_writes, adjusts, tscs)) as guest:
        guest.wait_until_all_reach(255)
        guest.machine.pause()
        assert is_soon_after(read_tsc(), host_tsc)  # the CPU's own IA32_TSC_ADJUST, which moves it, was not written
        for vcpu, (adjust, tsc) in enumerate(zip(adjusts, tscs, strict=True)):
            t0, m0, a0, t1, m1, a1, t2, m2, a2 = guest.results(vcpu)
            assert a0 == 0
            assert all(is_soon_after(*pair) for pair in ((m0, t0), (m1, t1), (m2, t2)))
            if tsc_offsets is TscOffsets.IGNORED:
                assert is_soon_after(t1, m0)
                assert is_soon_after(t2, m1)
                assert a1 == adjust
                assert is_soon_after(a1 + tsc - a2, m1)  # ADJUST moved by tsc - TSC, which the TSC itself did not
                continue
            assert a1 == adjust
            if (clock, tsc_offsets) == ("kernel", TscOffsets.STEERED):
                continue  # KVM forgets the move if it reloads the vCPU before the next exit: docs/lab.md
            assert is_soon_after(t1, m0 + adjust)
            assert is_soon_after(t2, tsc)
            assert is_soon_after(t2 - a2, m1 - a1)  # TSC moved ADJUST along
            if clock == "engine":
                assert engine_of(guest).tsc(vcpu).adjust == a2
            if tsc_offsets is TscOffsets.HONOURED:
                assert_offset_holds_adjust(guest, vcpu, a2)
        if clock == "engine":
            assert (engine_of(guest).refused_offset is not None) == (tsc_offsets is TscOffsets.IGNORED)


def assert_offset_holds_adjust(guest: TscGuest, vcpu: int, adjust: int) -> None:
    """What KVM adds to vCPU's TSC is what it added at first, and ADJUST."""
    offset = guest.machine.vcpus[vcpu].get_tsc_offset()
    assert 0 < (adjust - offset) % 2**64 < 1 << 60  # what the host's had counted when the guest's began at 0
    if guest.machine.clock is not None:
        assert guest.machine.clock.tsc(vcpu).offset == offset


@pytest.mark.row("J-06", "J-07")
@both
def test_host_writes_leave_the_other_alone(clock: Clock, tsc_offsets: TscOffsets) -> None:
    """The VMM restores TSC without touching ADJUST, and ADJUST without touching TSC; the guest reads both back."""
    look = [RDTSC, READ_ADJUST]
    first, second, ahead = 1 << 40, 7 << 40, 1 << 52
    steps = [Step("wrmsr", TSC_ADJUST, first), *look, Step("wait", value=1), *look, Step("wait", value=2), *look]
    with tsc_guest(clock, steps) as guest:
        guest.wait_until_all_reach(1)
        restored = host_write(guest, TSC, ahead)
        guest.let_pass(1)
        guest.wait_until_all_reach(2)
        host_write(guest, TSC_ADJUST, second)
        guest.let_pass(2)
        guest.wait_until_all_reach(255)
        t0, a0, t1, a1, t2, a2 = guest.results(0)
        assert restored == (clock == "kernel" or tsc_offsets is not TscOffsets.IGNORED)
        assert a0 == a1 == first
        assert a2 == second
        assert is_soon_after(t1, t0 if tsc_offsets is TscOffsets.IGNORED else ahead)
        assert is_soon_after(t2, t1)


def host_write(guest: TscGuest, msr: int, value: int) -> bool:
    """Write vCPU 0's MSR as its VMM would; False if the engine says that this host cannot."""
    guest.machine.pause()
    try:
        if guest.machine.clock is None:
            guest.machine.vcpus[0].set_msr(msr, value)
        else:
            guest.machine.clock.host_write_msr(0, msr, value)
    except TscOffsetNotHonoured:
        return False
    finally:
        guest.machine.resume()
    return True


@pytest.mark.row("J-05")
@both
def test_where_a_guests_tsc_begins(clock: Clock, tsc_offsets: TscOffsets) -> None:
    """At 0 with the first vCPU, and all have that one offset; where offsets are not honoured it is the host's."""
    host_tsc = read_tsc()
    with tsc_guest(clock, [RDTSC], [RDTSC]) as guest:
        guest.wait_until_all_reach(255)
        tscs = [guest.results(vcpu)[0] for vcpu in range(2)]
        guest.machine.pause()
        offsets = {vcpu.get_tsc_offset() for vcpu in guest.machine.vcpus}
        if tsc_offsets is TscOffsets.HONOURED:
            assert all(0 < tsc < SOON for tsc in tscs)
            assert len(offsets) == 1
        if tsc_offsets is TscOffsets.IGNORED:
            assert all(is_soon_after(tsc, host_tsc) for tsc in tscs)
        if clock == "engine":
            assert engine_of(guest).tsc(0).offset == engine_of(guest).tsc(1).offset


@pytest.mark.row("J-05")
@pytest.mark.parametrize("honoured", [True, False])
def test_the_engine_takes_the_first_vcpus_offset(
    honoured: bool, tsc_offsets: TscOffsets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine's clock has the offset that KVM gave its first vCPU, if the host honours any; else only 0 is taken."""
    if honoured and tsc_offsets is TscOffsets.STEERED:
        pytest.skip("such a host cannot play one that honours offsets: it moves each whenever it is asked for it")
    outcome = TscOffsets.HONOURED if honoured else TscOffsets.IGNORED
    monkeypatch.setattr("pvclock.kvm.backend.tsc_offsets_here", lambda _kvm, _vcpu: outcome)
    with Machine(b"\xf4", vcpus=2) as machine:
        assert machine.clock is not None
        offset = machine.vcpus[0].get_tsc_offset() if honoured else 0
        assert [machine.clock.tsc(vcpu).offset for vcpu in range(2)] == [offset, offset]
    if not honoured:
        with pytest.raises(TscOffsetNotHonoured):
            Machine(b"\xf4", tsc_offset=7)


class Moved:
    """A vCPU whose offset KVM moves whenever it is asked for it."""

    def __init__(self) -> None:
        self.offset = 0

    def get_tsc_offset(self) -> int:
        """Another one each time."""
        self.offset += 1
        return self.offset


@pytest.mark.row("J-05")
def test_a_process_probes_once_and_looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second machine needs no throw-away VM; a host that has begun to steer offsets is noticed all the same."""
    probed: list[Kvm] = []

    def probe(kvm: Kvm) -> TscOffsets:
        probed.append(kvm)
        return TscOffsets.IGNORED

    monkeypatch.setattr(tsc_offset, "probe_tsc_offsets", probe)
    monkeypatch.setattr(tsc_offset, "_OFFSETS", FoundOnce())
    with open_kvm() as kvm, Machine(b"\xf4", clock="kernel") as machine:
        vcpu = machine.vcpus[0]
        if vcpu.get_tsc_offset() == vcpu.get_tsc_offset():
            assert [tsc_offset.tsc_offsets_here(kvm, vcpu) for _ in range(2)] == [TscOffsets.IGNORED] * 2
            assert len(probed) == (1 if loaded_kvm() is not None else 2)
        assert tsc_offset.tsc_offsets_here(kvm, Moved()) is TscOffsets.STEERED  # type: ignore[arg-type]  # in its place


@pytest.mark.row("J-01")
@both
def test_adjust_that_is_not_offered(clock: Clock, tsc_offsets: TscOffsets) -> None:
    """Without CPUID's bit a write of 0x3b is ignored as Linux does: no fault, nothing moves, 0 is read."""
    steps = [RDTSC, Step("wrmsr", TSC_ADJUST, 1 << 40), RDTSC, READ_ADJUST]
    with tsc_guest(clock, steps, offer_tsc_adjust=False) as guest:
        guest.wait_until_all_reach(255)
        before, after, adjust = guest.results(0)
        # A host that ignores offsets may keep whatever is written, too.
        assert adjust == 0 or (clock, tsc_offsets) == ("kernel", TscOffsets.IGNORED)
        assert is_soon_after(after, before)


@pytest.mark.row("J-05", "J-06", "E5")
def test_a_clock_read_with_two_different_offsets(tsc_offsets: TscOffsets) -> None:
    """One vCPU's TSC is put forward under its running guest: STABLE goes, both clocks stay on the timeline."""
    with probe_machine("engine", 2) as machine:
        clock = machine.clock
        assert clock is not None
        machine.start()
        wait_until_reading(machine)
        ahead = clock.guest_tsc(1, HostTsc(clock.backend.counter.read())) + (1 << 40)
        if tsc_offsets is TscOffsets.IGNORED:
            with pytest.raises(TscOffsetNotHonoured, match="not honoured by this host"):
                clock.host_write_msr(1, TSC, ahead)
            assert clock.tsc(1).offset == clock.tsc(0).offset
            return
        clock.host_write_msr(1, TSC, ahead)
        wait_until_all_read_on(machine)
        records = finish(machine)
        assert [page.flags for vcpu in range(2) if (page := clock.page(vcpu))] == [0, 0]
        assert not any(failures(records).values())
        assert abs(records[1].last_tsc - records[0].last_tsc - (1 << 40)) < SOON
        assert_last_are_on_the_timeline(machine, records, BOUND_NS)


@pytest.mark.row("K-16", "K-18", "E9")
@both
def test_the_host_decides_on_stable(clock: Clock, stable_bit: int) -> None:
    """Pages say STABLE where the host trusts its TSCs; where not, guests clamp what they read, and go on monotone."""
    with probe_machine(clock, 2) as machine:
        machine.start()
        wait_until_reading(machine)
        wait_until_all_read_on(machine, 1_000_000)
        records = finish(machine)
        flags = [machine.memory.read(probe.time_page_address(vcpu) + 29, 1)[0] for vcpu in range(2)]
        assert flags == [stable_bit, stable_bit]
        assert (sum(record.clamped for record in records) > 0) == (not stable_bit)
        assert not any(failures(records).values())
