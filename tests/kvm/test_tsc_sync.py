"""What this host's kernel makes of TSC writes, beside the model's prediction; and vCPUs set apart and repaired.

KVM_SET_CLOCK lets KVM decide anew on its master clock, and KVM_GET_CLOCK's flag says how it decided.  That works on
hosts that ignore offsets, too: they keep the books all the same.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from pvclock import HostTsc, KvmError, Machine, RefNs, TscOffsetNotHonoured
from pvclock._sampling import sample_clock
from pvclock.host.linux import host_clocksource
from pvclock.kvm import Kvm, Vcpu, Vm
from pvclock.kvm.tsc_offset import TscOffsets
from pvclock.meter.findings import failures
from pvclock.meter.machine_guest import finish, probe_machine, wait_until_reading
from pvclock.quantities import U64_MASK
from pvclock.tsc.agreement import agreement, repair_plan
from pvclock.tsc.kvm_sync_model import HostInstant, KvmTscSync, KvmTscWrite
from tests.kvm.reading import wait_until_all_read_on
from tests.waiting import HANG_S

pytestmark = pytest.mark.kvm

TSC, TSC_ADJUST = 0x10, 0x3B
KVM_CLOCK_TSC_STABLE: Final = 2
APART = 1 << 40
"""Ticks: some minutes, longer than a test takes."""
OFFSETS = (0, 5 * 10**9, 2**64 - 10**13)


class TooSlow(Exception):
    """A call took so long that the model could not know what KVM would make of it."""


class Pair:
    """A VM in this host's kernel and the same in the model: each write goes to both, and they must agree after it."""

    def __init__(self, vm: Vm, model: KvmTscSync, offsets: TscOffsets) -> None:
        self.vm, self.model, self.offsets = vm, model, offsets
        self.vcpus: list[Vcpu] = []
        self.uncertain_ticks = 0
        self.generations_offset = 0  # as KVM has it; the model's is as exact as the instant it was told
        self.last, self.last_value = HostInstant(HostTsc(0), RefNs(0)), 0

    def create_vcpu(self) -> None:
        """One more vCPU."""
        before = now()
        self.vcpus.append(self.vm.create_vcpu(len(self.vcpus)))
        self.compare(self.model.create_vcpu(before), len(self.vcpus) - 1, before, 0)

    def write_msr(self, vcpu: int, value: int) -> KvmTscWrite:
        """The VMM restores a TSC."""
        before = now()
        self.vcpus[vcpu].set_msr(TSC, value)
        return self.compare(self.model.write_msr(vcpu, value, before), vcpu, before, value)

    def write_near(self, vcpu: int, ahead_s: float) -> KvmTscWrite:
        """The same with a value so far from the one that KVM expects."""
        khz = self.model.khz(vcpu)
        expected = self.last_value + (now().ns - self.last.ns) * khz // 10**6
        return self.write_msr(vcpu, (expected + int(ahead_s * khz * 1000)) & U64_MASK)

    def write_offset(self, vcpu: int, offset: int) -> KvmTscWrite:
        """The VMM writes the offset attribute."""
        before = now()
        self.vcpus[vcpu].set_tsc_offset(offset)
        write = self.model.write_offset(vcpu, offset, before)
        return self.compare(write, vcpu, before, (before.tsc + offset) & U64_MASK)

    def set_tsc_khz(self, vcpu: int, khz: int) -> None:
        """The VMM sets a frequency."""
        try:
            self.vcpus[vcpu].set_tsc_khz(khz)
            taken = True
        except KvmError:
            taken = False
        assert (taken, self.vcpus[vcpu].get_tsc_khz()) == (self.model.set_tsc_khz(vcpu, khz), self.model.khz(vcpu))

    def is_stable(self) -> bool:
        """Does KVM use its master clock, now that it has decided anew?"""
        self.vm.set_clock(0)
        return bool(self.vm.get_clock()["flags"] & KVM_CLOCK_TSC_STABLE)

    def compare(self, write: KvmTscWrite, vcpu: int, before: HostInstant, value: int) -> KvmTscWrite:
        """Hold the prediction for a write at some time since `before` against what KVM did."""
        width = now().tsc - before.tsc
        uncertain, self.uncertain_ticks = self.uncertain_ticks + width, width
        if self.model.clocksource_is_tsc and write.margin_ticks is not None and write.margin_ticks <= uncertain:
            raise TooSlow
        self.last, self.last_value = before, value
        assert self.is_stable() == write.stable_possible, write
        if self.offsets is TscOffsets.HONOURED:
            self.compare_offsets(write, self.vcpus[vcpu].get_tsc_offset(), width)
        return write

    def compare_offsets(self, write: KvmTscWrite, offset: int, width: int) -> None:
        """KVM's offset is the predicted one: to the tick where it joins, else as exactly as the instant is known."""
        if write.is_matched:
            assert offset == self.generations_offset
        else:
            assert (write.offset - offset) & U64_MASK <= width
            self.generations_offset = offset


def now() -> HostInstant:
    """This instant."""
    tsc, ns, _ = sample_clock(time.CLOCK_MONOTONIC_RAW)
    return HostInstant(HostTsc(tsc), RefNs(ns))


def linux_version() -> tuple[int, int]:
    """The running kernel's."""
    major, minor = os.uname().release.split("-")[0].split(".")[:2]
    return int(major), int(minor)


@contextmanager
def a_pair(offsets: TscOffsets, vcpus: int = 2) -> Iterator[Pair]:
    """A new VM, real and modelled."""
    with Kvm() as kvm, kvm.create_vm() as vm, kvm.create_vm() as other, other.create_vcpu(0) as vcpu:
        scales = kvm.check_extension("KVM_CAP_TSC_CONTROL")
        model = KvmTscSync(
            linux_version(),
            vcpu.get_tsc_khz(),
            frac_bits=(32 if "svm" in Path("/proc/cpuinfo").read_text().split() else 48) if scales else None,
            tsc_stable=offsets is not TscOffsets.STEERED,
            clocksource_is_tsc=host_clocksource() in ("tsc", "hyperv_clocksource_tsc_page"),
        )
        pair = Pair(vm, model, offsets)
        try:
            for _ in range(vcpus):
                pair.create_vcpu()
            yield pair
        finally:
            for each in pair.vcpus:
                each.close()


def on_pairs(offsets: TscOffsets, script: Callable[[Pair], None], vcpus: int = 2) -> None:
    """Carry out a script on a new VM, and on others until it was not too slow: this process may lose its CPU."""
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            with a_pair(offsets, vcpus) as pair:
                script(pair)
        except TooSlow:
            assert time.monotonic() < deadline
        else:
            return


def random_write(pair: Pair, source: random.Random) -> None:
    """Let the VMM do anything that bears on the TSCs."""
    vcpu = source.randrange(len(pair.vcpus))
    khz = pair.model.host_khz
    actions: list[Callable[[], object]] = [
        *(partial(pair.write_near, vcpu, ahead_s) for ahead_s in (0, 0, 0.4, -0.4, 1.8, -1.8)),
        *(partial(pair.write_msr, vcpu, value) for value in (0, 1, 10**12)),
        *(partial(pair.write_offset, vcpu, offset) for offset in (*OFFSETS, *OFFSETS)),
        *(partial(pair.set_tsc_khz, vcpu, khz + more) for more in (0, 0, 1)),
    ]
    if len(pair.vcpus) < 4:
        actions.append(pair.create_vcpu)
    source.choice(actions)()


@pytest.mark.row("E5", "J-09", "K-16")
@pytest.mark.parametrize("seed", range(10))
def test_random_writes(seed: int, tsc_offsets: TscOffsets) -> None:
    """Sixty random things that a VMM may do: after each one KVM's master clock and offsets are as foretold."""

    def sixty_writes(pair: Pair) -> None:
        source = random.Random(seed)  # noqa: S311  # a sample, no secret
        for _ in range(60):
            random_write(pair, source)

    on_pairs(tsc_offsets, sixty_writes)


@pytest.mark.row("E5", "K-16")
def test_the_first_value(tsc_offsets: TscOffsets) -> None:
    """A young guest's TSC restored by value is thrown away before Linux 6.7, and by offset it never is."""

    def by_value(pair: Pair) -> None:
        assert pair.write_near(0, 0.4).is_matched == (linux_version() < (6, 7))

    def by_offset(pair: Pair) -> None:
        assert not pair.write_offset(0, OFFSETS[1]).is_matched
        assert pair.write_offset(1, OFFSETS[1]).is_matched

    on_pairs(tsc_offsets, by_value)
    on_pairs(tsc_offsets, by_offset)


@pytest.mark.row("E5", "K-16")
def test_a_value_after_an_offset(tsc_offsets: TscOffsets) -> None:
    """Since Linux 6.15 a value is held against an offset that was written before it; from 6.7 on it was the first."""

    def script(pair: Pair) -> None:
        pair.write_offset(0, OFFSETS[1])
        assert pair.write_near(1, 0.4).is_matched == (not (6, 7) <= linux_version() < (6, 15))

    on_pairs(tsc_offsets, script)


@pytest.mark.row("E5")
def test_frequencies(tsc_offsets: TscOffsets) -> None:
    """KVM takes and keeps the frequencies that the model says it does: the host's, one near it, half and twice it."""

    def script(pair: Pair) -> None:
        khz = pair.model.host_khz
        for wanted in (khz, 0, khz + khz // 5000, khz // 2, khz, 2 * khz):
            pair.set_tsc_khz(0, wanted)

    on_pairs(tsc_offsets, script)


@pytest.mark.row("E5", "K-16")
def test_a_plan_gives_kvms_own_clock_back(tsc_offsets: TscOffsets) -> None:
    """A plan that writes every vCPU makes KVM's clock stable again where the host's is; carried out twice, too."""

    def script(pair: Pair) -> None:
        for vcpu, offset in enumerate((OFFSETS[1], OFFSETS[1] + 2600, OFFSETS[1])):
            pair.write_offset(vcpu, offset)
        assert not pair.is_stable()
        for _ in range(2):
            plan = repair_plan([pair.model.tsc(vcpu) for vcpu in range(3)], every_vcpu=True)
            for write in plan:
                pair.write_offset(write.vcpu, write.offset_after)
            assert pair.is_stable() == pair.model.clocksource_is_tsc
        assert [write.moves_tsc_by for write in plan] == [0, 0, 0]

    on_pairs(tsc_offsets, script, vcpus=3)


# The engine's clock


def flags_of(machine: Machine) -> list[int]:
    """Each vCPU's page's."""
    assert machine.clock is not None
    pages = [machine.clock.page(vcpu) for vcpu in range(machine.clock.vcpus)]
    return [page.flags for page in pages if page is not None]


@pytest.mark.row("E5", "J-09", "K-16", "K-18")
def test_a_repair_under_a_running_guest(tsc_offsets: TscOffsets, stable_bit: int) -> None:
    """A bad restore sets two running vCPUs apart; the plan brings them together, STABLE comes back, no clock steps."""
    with probe_machine("engine", 2) as machine:
        clock = machine.clock
        assert clock is not None
        machine.start()
        wait_until_reading(machine)
        ahead = clock.guest_tsc(1, HostTsc(clock.backend.counter.read())) + APART
        if tsc_offsets is TscOffsets.IGNORED:
            with pytest.raises(TscOffsetNotHonoured, match="not honoured by this host"):
                clock.host_write_msr(1, TSC, ahead)
            assert repair_plan([clock.tsc(vcpu) for vcpu in range(2)]) == []
            return
        clock.host_write_msr(1, TSC, ahead)
        wait_until_all_read_on(machine)
        report = agreement([clock.tsc(vcpu) for vcpu in range(2)])
        assert (report.stable_allowed, report.adjusts_agree, flags_of(machine)) == (False, True, [0, 0])
        plan = repair_plan([clock.tsc(vcpu) for vcpu in range(2)])
        assert [(write.vcpu, write.moves_tsc_by) for write in plan] == [(0, report.spread_ticks)]
        assert clock.repair_tsc() == plan
        assert agreement([clock.tsc(vcpu) for vcpu in range(2)]).stable_allowed
        assert repair_plan([clock.tsc(vcpu) for vcpu in range(2)]) == []
        wait_until_all_read_on(machine)
        records = finish(machine)
        assert flags_of(machine) == [stable_bit, stable_bit]
        assert not any(failures(records).values())
        assert all(0 < record.last_tsc - ahead < APART // 16 for record in records)
        if tsc_offsets is TscOffsets.HONOURED:
            offsets = {vcpu.get_tsc_offset() for vcpu in machine.vcpus}
            assert offsets == {clock.tsc(0).offset}
