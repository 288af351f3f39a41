"""The hostile-guest run for a few hundred steps of each, and with faults that it must find."""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partialmethod
from itertools import count

import pytest

from pvclock import GuestClock, GuestMemory, HostBackend, StateError
from pvclock.clock.reference_time import ReferenceTime
from pvclock.providers.hyperv.stimers import SyntheticTimers
from pvclock.providers.hyperv.synic import Synic
from tests.stress.hostile_guest import GUESTS, Actor, Soak
from tests.stress.hostile_machine import ENTRIES
from tests.stress.hostile_vm import (
    HYPERV_GUESTS,
    KVM_GUESTS,
    QUIET_PAGE,
    QUIET_REFERENCE_PAGE,
    RAM_BYTES,
    SYSTEM_TIME,
    Arena,
)
from tests.waiting import HANG_S

pytestmark = pytest.mark.stress

STEPS_LEAST = 300
TICKS_LEAST = 10
DONE = {
    "vCPU 0": {"wrmsr", "wrmsr: #GP", "rdmsr", "hypercall", "spoil"},
    "VMM": {"dilate", "skip", "save", "reset", "run_for"},
    "machine": {"table", "pause", "skip", "run_for"},
}
"""What each does by chance, of which some hundred steps may lack one: a run goes on until all have come up."""


def left_to_do(actor: Actor) -> set[str]:
    """What of it has not come up yet."""
    kinds = next((kinds for role, kinds in DONE.items() if actor.name.endswith(role)), set[str]())
    return {kind for kind in kinds if not actor.steps[kind]}


def everybody_acted(soak: Soak) -> bool:
    """Did each take enough steps and do all it does, and was the VM in peace ticked?"""
    return soak.peaceful.ticks >= TICKS_LEAST and all(
        actor.count >= STEPS_LEAST and not left_to_do(actor) for actor in soak.actors
    )


def reference_times_were_read(soak: Soak) -> bool:
    """Did timers expire in each VM, too, and were page and counter read together?"""
    readers = [actor for actor in soak.actors if actor.name.endswith(" reference")]
    return (
        everybody_acted(soak)
        and all(vm.services.interrupts for vm in soak.vms)
        and all(reader.steps["read page and counter"] > STEPS_LEAST // 10 for reader in readers)
    )


def guest_and_everybody_acted(soak: Soak) -> bool:
    """Have the guests gone through their tables, too?"""
    return everybody_acted(soak) and all(machine.faults > ENTRIES for machine in soak.machines.values())


@pytest.mark.row("E9", "K-08")
def test_nothing_breaks() -> None:
    """Hostile vCPUs, VMM threads and a Ticker, some hundred steps of each: no finding, and each did what it does."""
    outcome = Soak(1, machine=False, guests=KVM_GUESTS).run(everybody_acted)
    assert outcome.findings == []


@pytest.mark.row("E4", "E9", "H-50", "H-51", "H-54")
def test_nothing_breaks_of_hyperv() -> None:
    """The same with Hyper-V's interface, alone, beside KVM's and as VirtualBox has it: timers expire throughout.

    But for VirtualBox's, reference time never goes back by page or counter, a valid page is within 2 units of the
    timeline, and no sequence is used again.
    """
    soak = Soak(4, machine=False, guests=HYPERV_GUESTS)
    outcome = soak.run(reference_times_were_read)
    assert outcome.findings == []


@pytest.mark.kvm
@pytest.mark.row("E9")
@pytest.mark.parametrize("name", ["linux", "HyperV", "HyperV+KVM"])
def test_nothing_breaks_on_kvm(name: str) -> None:
    """The same beside a real vCPU that goes through tables of MSR accesses."""
    soak = Soak(2, machine=True, guests={name: GUESTS[name]})
    outcome = soak.run(guest_and_everybody_acted)
    assert outcome.findings == []


def foreign_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that lets an error of Python's through."""
    monkeypatch.setattr(GuestClock, "skip", lambda _clock, _ns: 1 // 0)


def no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that is not recorded."""
    monkeypatch.setattr(GuestClock, "skip", lambda _clock, _ns: None)


def page_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A publish that takes a page back."""

    def refresh(clock: GuestClock) -> None:
        if not clock.is_paused:
            clock.memory.write(QUIET_PAGE + 16, bytes(8))

    monkeypatch.setattr(GuestClock, "refresh", refresh)


def guard_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write behind the end of RAM."""
    plug = Arena.plug

    def plug_and_write(arena: Arena, gpa: int) -> None:
        plug(arena, gpa)
        arena._view[0x1000 + RAM_BYTES] = 0

    monkeypatch.setattr(Arena, "plug", plug_and_write)


def guest_sees_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A WRMSR that ends in anything but #GP."""

    def write_msr(clock: GuestClock, vcpu: int, index: int, value: int) -> None:
        if index == 0x10:
            raise StateError("wrmsr", "broken", "mend it")
        written(clock, vcpu, index, value)

    written = GuestClock.write_msr
    monkeypatch.setattr(GuestClock, "write_msr", write_msr)


def counter_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that goes back now and then."""
    readings = count(1)

    def units(clock: ReferenceTime, vcpu: int | None = None) -> int:
        return read(clock, vcpu) - (1000 if next(readings) % 50 == 0 else 0)

    read = ReferenceTime.units
    monkeypatch.setattr(ReferenceTime, "units", units)


def page_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is ahead of its timeline."""
    change_pages(monkeypatch, sequence=1, offset=1000)


def sequence_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that changes under one sequence."""
    change_pages(monkeypatch, sequence=0, offset=1)


def sequence_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page whose sequence goes back."""
    change_pages(monkeypatch, sequence=-1, offset=0)


def change_pages(monkeypatch: pytest.MonkeyPatch, *, sequence: int, offset: int) -> None:
    """Have refresh() and tick() do that to the page."""
    for name in ("refresh", "tick"):
        monkeypatch.setattr(GuestClock, name, partialmethod(change_page, sequence=sequence, offset=offset))


def change_page(clock: GuestClock, *, sequence: int, offset: int) -> None:
    """Add to fields of the reference TSC page, if it is valid."""
    fields = struct.Struct("<IIQq")
    found, reserved, scale, old = fields.unpack(clock.memory.read(QUIET_REFERENCE_PAGE, fields.size))
    if found > 1:
        changed = fields.pack(found + sequence, reserved, scale, old + offset)
        clock.memory.write(QUIET_REFERENCE_PAGE, changed)


def no_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt that no APIC takes."""
    monkeypatch.setattr(Synic, "vector", lambda *_: 5)


def timer_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expiry that lets an error of Python's through."""
    monkeypatch.setattr(SyntheticTimers, "expire", lambda _timers, _now_ns: 1 // 0)


Guests = Mapping[str, Mapping[str, object]]
FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, Guests]] = {
    "foreign error": (foreign_error, "ZeroDivisionError", KVM_GUESTS),
    "no event": (no_event, "left no event", KVM_GUESTS),
    "page back": (page_back, "a page went back", KVM_GUESTS),
    "guard written": (guard_written, "a guard of guest memory was written to", KVM_GUESTS),
    "guest sees an error": (guest_sees_error, "wrmsr: broken", KVM_GUESTS),
    "counter back": (counter_back, "the counter went back", HYPERV_GUESTS),
    "page off": (page_off, "units or more off", HYPERV_GUESTS),
    "sequence again": (sequence_again, "a sequence was used again", HYPERV_GUESTS),
    "sequence back": (sequence_back, ": sequence 0x", HYPERV_GUESTS),
    "no vector": (no_vector, "interrupt 0x5", HYPERV_GUESTS),
    "timer error": (timer_error, ": timers: ", HYPERV_GUESTS),
}


@pytest.mark.row("E9")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these faults in the product, or in what stands for it, is a finding."""
    break_it, text, guests = FAULTS[name]
    break_it(monkeypatch)
    soak = Soak(3, machine=False, guests=guests)

    def is_found(soak: Soak) -> bool:
        for vm in soak.vms:
            vm.look_at_timers()
        return any(text in each for each in soak.findings)

    outcome = soak.run(is_found)
    assert any(text in each for each in outcome.findings)


@pytest.mark.row("K-08", "E9")
def test_a_spoilt_page_is_given_up_beside_busy_threads() -> None:
    """read() of a page that its guest keeps odd ends, though each turn without the GIL costs a switch interval."""
    clock = GuestClock(GuestMemory(bytearray(0x2000)), backend=HostBackend())
    clock.write_msr(0, SYSTEM_TIME, 0x1001)
    clock.memory.write(0x1000, b"\x01")
    ended, errors = threading.Event(), list[StateError]()

    def be_busy() -> None:
        while not ended.is_set():
            pass

    def read() -> None:
        try:
            clock.read(0)
        except StateError as error:
            errors.append(error)

    threads = [threading.Thread(target=target, daemon=True) for target in (be_busy, read)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.05)  # some thousand turns would take minutes
    try:
        for thread in threads:
            thread.start()
        threads[1].join(HANG_S)
    finally:
        ended.set()
        sys.setswitchinterval(before)
    assert [error.operation for error in errors] == ["read"]
