"""The guest's own eyes: clockprobe on real vCPUs reads its clock while it changes, and beside the kernel's."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from struct import pack, unpack

import pytest

from pvclock import GuestClock, HostTsc, KvmFeature, Machine
from pvclock.clock.guest_clock import GUEST_STOPPED
from pvclock.kvm import Kvm
from pvclock.machine import cpuid as machine_cpuid
from pvclock.machine.cpuid import CpuidEntry, CpuidSource, guest_cpuid
from pvclock.meter.findings import failures
from pvclock.meter.machine_guest import MachineGuest, finish, probe_machine, wait_until_reading
from pvclock.meter.observe import Undisturbed, observe_undisturbed
from pvclock.meter.stress import PublishStress, stress_publishing
from pvclock.payloads import clockprobe, probe
from tests import oracle
from tests.waiting import HANG_S

pytestmark = pytest.mark.kvm

NS_PER_S = 10**9
HOUR_NS = 3600 * NS_PER_S
READS = 10**8
PUBLISHES = 10**5
MOST_RUNS = 100
"""Far more than any host takes; some 20 where the CPU is emulated."""


def engine_of(machine: Machine) -> GuestClock:
    """The machine's clock, which must be the engine's."""
    assert machine.clock is not None
    return machine.clock


@pytest.mark.stress
@pytest.mark.row("K-08", "K-12", "K-14", "K-15", "E9", "E11")
def test_a_hundred_million_reads_while_the_clock_changes() -> None:
    """Two vCPUs read 10^8 times while rate and anchor change 10^5 times: nothing back, wild or torn."""
    runs: list[PublishStress] = []
    while sum(each.reads for each in runs) < READS or sum(each.publishing.publishes for each in runs) < PUBLISHES:
        assert len(runs) < MOST_RUNS
        with MachineGuest("engine") as guest:
            runs.append(stress_publishing(guest, 6.0))
    assert runs
    for each in runs:
        assert not any(each.failures.values()), each
        assert all(record.reads > 0 and record.retries > 0 for record in each.records)
        assert (each.publishing.least_step_ns, each.publishing.most_step_ns) == (0, 1)
        assert each.publishing.most_behind_ns <= 2
        assert each.publishing.most_ahead_ns <= 2


def wait_for_reads(machine: Machine, more: int, vcpu: int = 0) -> None:
    """Return once vCPU has read its clock `more` times."""
    reads = probe.read_record(machine.memory, vcpu).reads
    while probe.read_record(machine.memory, vcpu).reads < reads + more:
        assert not machine.runner.join(0.001)


def rewrite(machine: Machine, vcpu: int, at: int, change: int) -> None:
    """Add to a 64-bit field of vCPU's page under its version, as no publisher may."""
    gpa = probe.time_page_address(vcpu)
    page = oracle.TimeInfo.parse(machine.memory.read(gpa, 32))
    machine.memory.write(gpa, (page.version + 1).to_bytes(4, "little"))
    field = int.from_bytes(machine.memory.read(gpa + at, 8), "little")
    machine.memory.write(gpa + at, ((field + change) % 2**64).to_bytes(8, "little"))
    machine.memory.write(gpa, (page.version + 2).to_bytes(4, "little"))


def step_back(machine: Machine) -> None:
    """Turn vCPU 0's clock back by an hour: for however long it has no CPU, it has read what is later."""
    rewrite(machine, 0, 16, -HOUR_NS)


def put_timestamp_ahead(machine: Machine) -> None:
    """Put vCPU 0's timestamp where no TSC is yet."""
    rewrite(machine, 0, 8, 1 << 40)


def change_without_version(machine: Machine) -> None:
    """Change vCPU 0's system time and leave its version as it is."""
    gpa = probe.time_page_address(0) + 16
    field = int.from_bytes(machine.memory.read(gpa, 8), "little")
    machine.memory.write(gpa, (field + 7).to_bytes(8, "little"))


@pytest.mark.row("E9", "K-08")
@pytest.mark.parametrize(
    ("sabotage", "kind"),
    [(step_back, "backward_own"), (put_timestamp_ahead, "wild"), (change_without_version, "torn")],
)
def test_clockprobe_sees_a_broken_clock(sabotage: Callable[[Machine], None], kind: str) -> None:
    """The probe is no rubber stamp: each kind of broken page is counted by the guest."""
    with probe_machine("engine", 1) as machine:
        machine.start()
        wait_until_reading(machine)
        engine_of(machine).skip(2 * HOUR_NS)
        wait_for_reads(machine, 20_000)  # what it has not seen right, it cannot see wrong
        sabotage(machine)
        wait_for_reads(machine, 200_000)
        assert failures(finish(machine))[kind] > 0


@pytest.mark.row("K-38")
def test_a_signature_leaf_with_eax_0_is_kvms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old kernels name no highest leaf: the guest finds features and clock in the leaf after the signature's anyway."""

    def as_of_old(kvm: Kvm, apic_id: int, clock: CpuidSource) -> list[CpuidEntry]:
        return [{**it, "eax": 0} if it["function"] == 0x40000000 else it for it in guest_cpuid(kvm, apic_id, clock)]

    monkeypatch.setattr(machine_cpuid, "guest_cpuid", as_of_old)
    with probe_machine("engine", 1) as machine:
        machine.start()
        wait_until_reading(machine)
        wait_for_reads(machine, 1000)
        (record,) = finish(machine)
    assert (record.signature_leaf, record.msr) == (0x40000000, 0x4B564D01)
    assert record.features & 1 << 3
    assert not any(failures([record]).values())


@pytest.fixture(scope="module", params=[1, 2])
def observations(request: pytest.FixtureRequest) -> tuple[Undisturbed, Undisturbed]:
    """The engine's and the kernel's clock, each left alone under its guest for a second."""
    with MachineGuest("engine", request.param) as engine, MachineGuest("kernel", request.param) as kernel:
        return observe_undisturbed(engine, 1.0), observe_undisturbed(kernel, 1.0)


@pytest.mark.row("K-11", "K-15", "K-16", "K-20", "K-38")
def test_engine_and_kernel_publish_the_same(observations: tuple[Undisturbed, Undisturbed]) -> None:
    """On one host both show the same mul, shift, flags and features, and even versions."""
    engine, kernel = observations
    for ours, theirs in zip(engine.pages, kernel.pages, strict=True):
        assert ours[3:] == theirs[3:]
        assert ours.version % 2 == theirs.version % 2 == 0
    assert engine.tsc_hz == kernel.tsc_hz
    expected = oracle.time_scale(NS_PER_S, engine.tsc_hz)
    assert (engine.pages[0].tsc_to_system_mul, engine.pages[0].tsc_shift) == expected
    same = ("signature_leaf", "features", "msr", "msr_value", "uses_rdtscp", "state")
    for record, other in zip(engine.records, kernel.records, strict=True):
        assert [getattr(record, name) for name in same] == [getattr(other, name) for name in same]


@pytest.mark.row("K-19", "K-20")
@pytest.mark.parametrize(
    ("features", "state", "msr"),
    [
        (KvmFeature.CLOCKSOURCE | KvmFeature.CLOCKSOURCE2, probe.State.DONE, 0x4B564D01),
        (KvmFeature.CLOCKSOURCE2, probe.State.DONE, 0x4B564D01),
        (KvmFeature.CLOCKSOURCE, probe.State.DONE, 0x12),
        (KvmFeature.NOP_IO_DELAY, probe.State.NO_CLOCK, 0),
    ],
)
def test_which_clock_a_guest_takes(features: KvmFeature, state: probe.State, msr: int) -> None:
    """It tries bit 3, then bit 0; by either MSRs it reads the clock, and with neither bit it has none."""
    with Machine(clockprobe(), cmdline="cpus=1", features=int(features)) as machine:
        machine.start()
        if state == probe.State.DONE:
            wait_until_reading(machine)
            wait_for_reads(machine, 10_000)
            (record,) = finish(machine)
            wall_version, wall_s, _ = struct.unpack("<III", machine.memory.read(probe.WALL_CLOCK, 12))
            assert (wall_version, wall_s) == (2, pytest.approx(time.time(), abs=60))
            assert not any(failures([record]).values())
        else:
            assert machine.wait(HANG_S) == probe.EXIT_FAILED
            record = probe.read_record(machine.memory, 0)
        assert (record.features, record.state, record.msr) == (features, state, msr)
        page = engine_of(machine).page(0)
        assert (page is not None) == (msr != 0)


@pytest.mark.row("K-13", "K-14", "K-15")
def test_engine_and_kernel_go_at_the_same_rate(observations: tuple[Undisturbed, Undisturbed]) -> None:
    """From its first to its last reading a guest's clock goes on by what its TSC says, under both."""
    for each in observations:
        quantum_ppb = 10**9 / 2**31
        assert -quantum_ppb - each.rate_bound_ppb <= each.rate_ppb <= each.rate_bound_ppb
        assert not any(failures(each.records).values())


@pytest.mark.row("K-02", "K-07")
def test_engine_and_kernel_write_the_same_wall_clock(observations: tuple[Undisturbed, Undisturbed]) -> None:
    """The record plus the guest's time is the host's time of day: to 100 us, for NTP slews the host meanwhile.

    KVM before Linux 6.7 reads the time of day and then kvmclock: its record is early by what passes in between.
    """
    engine, kernel = observations
    assert abs(engine.wall_clock_error_ns) < 100_000
    assert -50_000_000 < kernel.wall_clock_error_ns < 100_000


@pytest.mark.row("K-13", "K-14", "E11")
def test_a_guests_readings_are_on_the_timeline() -> None:
    """First and last reading of each vCPU are the timeline's value at their TSC, within design 2.3's bound."""
    with probe_machine("engine", 2) as machine:
        clock = engine_of(machine)
        machine.start()
        wait_until_reading(machine)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            clock.refresh()
        records, hz = finish(machine), machine.vcpus[0].get_tsc_khz() * 1000
        for vcpu, record in enumerate(records):
            offset = clock.tsc(vcpu).offset
            for tsc, ns in ((record.first_tsc, record.first_ns), (record.last_tsc, record.last_ns)):
                error = ns - clock.at(HostTsc((tsc - offset) % 2**64))
                assert -Fraction(4) <= error <= 2
                passed_ns = Fraction((tsc - records[0].first_tsc) * NS_PER_S, hz)
                assert abs(ns - records[0].first_ns - passed_ns) <= 6
        assert clock.line.num * clock.backend.tsc_hz == clock.line.den * NS_PER_S


@pytest.mark.row("K-16", "K-18", "K-19")
def test_stable_taken_from_running_guests(stable_bit: int) -> None:
    """When the boot vCPU goes to the old MSR, running vCPUs lose STABLE at once, and clamp what they read."""
    with probe_machine("engine", 2) as machine:
        clock = engine_of(machine)
        machine.start()
        wait_until_reading(machine)
        wait_for_reads(machine, 100_000)
        if stable_bit:
            assert sum(probe.read_record(machine.memory, vcpu).clamped for vcpu in range(2)) == 0
        with machine.runner.quiesce():  # as after vCPU 0's own exit
            clock.write_msr(0, 0x12, probe.time_page_address(0) | 1)
        wait_for_reads(machine, 1_000_000)
        records = finish(machine)
        assert [page.flags for vcpu in range(2) if (page := clock.page(vcpu))] == [0, 0]
        assert sum(record.clamped for record in records) > 0
        assert not any(failures(records).values())


@pytest.mark.row("K-18")
def test_vcpus_whose_pages_disagree_go_on_monotone() -> None:
    """One vCPU's page is 100 ms ahead; without STABLE the other returns what that one had, and no reading is less."""
    with probe_machine("engine", 2) as machine:
        clock = engine_of(machine)
        machine.start()
        wait_until_reading(machine)
        with machine.runner.quiesce():
            clock.write_msr(0, 0x12, probe.time_page_address(0) | 1)
            clamped = probe.read_record(machine.memory, 0).clamped
        rewrite(machine, 1, 16, 100_000_000)
        for vcpu in range(2):
            wait_for_reads(machine, 1_000_000, vcpu)
        records = finish(machine)
        assert not any(failures(records).values())
        assert records[0].clamped > clamped
        block = probe.read_block(machine.memory)
        assert block is not None
        assert block.last_value == max(record.last_ns for record in records)


@pytest.mark.row("K-18")
def test_what_is_clamped_is_what_is_returned() -> None:
    """Without STABLE a guest returns the greatest value that any vCPU had, here an hour ahead, and not its own."""
    with probe_machine("engine", 2) as machine:
        clock = engine_of(machine)
        machine.start()
        wait_until_reading(machine)
        with machine.runner.quiesce():
            clock.write_msr(0, 0x12, probe.time_page_address(0) | 1)
            ahead_ns = clock.now() + 3600 * NS_PER_S
            machine.memory.write(probe.LAST_VALUE, ahead_ns.to_bytes(8, "little"))
            clamped = [probe.read_record(machine.memory, vcpu).clamped for vcpu in range(2)]
        for vcpu in range(2):
            wait_for_reads(machine, 100_000, vcpu)
        records = finish(machine)
        assert clock.now() < ahead_ns
        assert [record.last_ns for record in records] == [ahead_ns] * 2
        assert all(record.clamped > before for record, before in zip(records, clamped, strict=True))
        block = probe.read_block(machine.memory)
        assert block is not None
        assert block.last_value == ahead_ns


@pytest.mark.row("V-26")
def test_virtualboxs_clock_under_running_guests() -> None:
    """Under profile "virtualbox" a wall clock is UTC at its write, late in the guest's life, too, and all read on."""
    with Machine(clockprobe(), vcpus=2, cmdline="cpus=2", profile="virtualbox") as machine:
        clock = engine_of(machine)
        machine.start()
        wait_until_reading(machine)
        wait_for_reads(machine, 100_000)
        for gpa in (0x5000, 0x6000):
            with machine.runner.quiesce():  # as after vCPU 1's own exit
                before_ns = time.time_ns()
                clock.write_msr(1, 0x4B564D00, gpa)
                after_ns = time.time_ns()
            sec, nsec = unpack("<II", machine.memory.read(gpa + 4, 8))
            assert before_ns - 1000 <= sec * 10**9 + nsec <= after_ns + 1000
        records = finish(machine)
        assert not any(failures(records).values())
        told = [event.why for event in clock.events.read().events if "wall clock" in event.why]
        assert [re.findall("0x[0-9a-f]+", why) for why in told] == [[hex(probe.WALL_CLOCK)], ["0x5000"], ["0x6000"]]


@pytest.mark.row("V-25")
def test_virtualboxs_wall_clock_is_written_while_no_vcpu_runs() -> None:
    """While the record changes, the vCPUs that were reading their clocks do not get on; then they do.

    The write is one of vCPU 2, which the guest never starts, so that it is out as at an exit of its own.
    """
    with Machine(clockprobe(), vcpus=3, cmdline="cpus=2", profile="virtualbox") as machine:
        clock = engine_of(machine)
        machine.start()
        for vcpu in range(2):
            wait_for_reads(machine, 1000, vcpu)
        seen: list[tuple[bytes, set[int], bytes]] = []
        quiesce = clock._keeper.backend.quiesce

        @contextmanager
        def watched(vcpu: int | None) -> Iterator[None]:
            with quiesce(vcpu):
                before = machine.memory.read(0x5000, 12)
                yield
                reads = {sum(probe.read_record(machine.memory, each).reads for each in range(2)) for _ in range(1000)}
                seen.append((before, reads, machine.memory.read(0x5000, 12)))

        clock._keeper.backend.quiesce = watched  # type: ignore[method-assign]  # the backend's own, watched
        machine.memory.write(0x5000, pack("<III", 41, 0, 0))
        for _ in range(3):
            clock.write_msr(2, 0x4B564D00, 0x5000)
            for vcpu in range(2):
                wait_for_reads(machine, 1000, vcpu)
        versions = [unpack("<I", record[:4])[0] for before, _, after in seen for record in (before, after)]
        assert versions == [41, 42, 42, 44, 44, 46]
        assert [len(reads) for _, reads, _ in seen] == [1] * 3


@pytest.mark.row("K-17")
def test_guest_stopped_is_the_guests_to_clear(stable_bit: int) -> None:
    """GUEST_STOPPED in a running vCPU's page is seen once and cleared by the guest; publishes leave it alone."""
    with probe_machine("engine", 1) as machine:
        clock = engine_of(machine)
        machine.start()
        wait_until_reading(machine)
        with machine.runner.quiesce():
            flags_at = probe.time_page_address(0) + 29
            machine.memory.write(flags_at, bytes([stable_bit | GUEST_STOPPED]))
        for _ in range(1000):
            clock.refresh()
        wait_for_reads(machine, 100_000)
        (record,) = finish(machine)
        assert record.stopped == 1
        page = clock.page(0)
        assert page is not None
        assert page.flags == stable_bit
