"""A guest's usual TSC writes, in compiled code, beside the same writes by the path in Python and beside the oracle.

Where on_dirty has to be told of what is written, every write goes by the path in Python; so a twin with one shows it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvclock import GuestClock, GuestMemory, MsrFault, SimulatedBackend
from pvclock._guest_budget import GUEST_BURST
from pvclock.errors import PvclockError
from pvclock.quantities import HostTsc
from pvclock.timekeeping.events import Event, EventCause, EventKind
from tests.oracle import VcpuTscOracle
from tests.unit.clocks import NS_PER_S, PAGES, SYSTEM_TIME, guest_ns, guest_tsc, page_of
from tests.unit.fault_points import product
from tests.unit.schedules import places_in
from tests.unit.test_interrupted_operations import interrupted

HZ: Final = 2 * NS_PER_S
"""Whole ticks a ns, so that the host's clocks are extrapolated to the ns."""
TSC, ADJUST, AUX = 0x10, 0x3B, 0xC0000103
STABLE: Final = 1
VALUES: Final = st.sampled_from([0, 1, 5, 10**6, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)


class Vm(NamedTuple):
    """A clock and its host."""

    clock: GuestClock
    backend: SimulatedBackend
    memory: GuestMemory

    def write(self, vcpu: int, index: int, value: int) -> bool:
        """WRMSR, as a machine does it; was it served in compiled code?"""
        if self.clock.serve_tsc_write(vcpu, index, value):
            return True
        self.clock.write_msr(vcpu, index, value)
        return False

    def told(self, kind: EventKind) -> list[Event]:
        """The events of a kind."""
        return [event for event in self.clock.events.read().events if event.kind is kind]


def a_vm(vcpus: int = 1, *, by_python: bool = False, **options: Any) -> Vm:  # noqa: ANN401  # SimulatedBackend's, GuestClock's
    """A VM whose vCPUs have registered their pages, a second ago.  by_python: no write is a usual one there."""
    backend = SimulatedBackend(HZ, 10**12, boot_id="twin", honours_tsc_offset=options.pop("honours_tsc_offset", True))
    memory = GuestMemory(bytearray(1 << 16))
    memory.on_dirty = (lambda _gpa, _length: None) if by_python else None
    vm = Vm(GuestClock(memory, vcpus, backend=backend, **options), backend, memory)
    for vcpu in range(vcpus if vm.clock.interface.provider.name == "KVM" else 0):
        vm.clock.write_msr(vcpu, SYSTEM_TIME, 0x2001 + 64 * vcpu)
    backend.advance(ns=NS_PER_S)
    return vm


def a_usual_vm(vcpus: int = 1) -> Vm:
    """A VM of which one write was served, of vCPU 0; several vCPUs' TSCs disagree from then on."""
    vm = a_vm(vcpus)
    vm.write(0, ADJUST, 10**9)
    return vm


# What changes


@pytest.mark.row("J-03", "J-04")
@pytest.mark.parametrize("index", [TSC, ADJUST])
def test_a_write_moves_its_own_page_alone(index: int) -> None:
    """The guest reads the same time right after it; no other vCPU's page changes, and no flag."""
    vm = a_usual_vm(2)
    other, before, ns = page_of(vm.clock, 1), page_of(vm.clock), guest_ns(vm.backend, vm.memory)
    assert vm.write(0, index, 2**40)
    assert guest_ns(vm.backend, vm.memory) == ns == vm.clock.read(0)
    assert page_of(vm.clock, 1) == other
    after = page_of(vm.clock)
    assert after.tsc_timestamp != before.tsc_timestamp
    assert after == before._replace(version=before.version + 2, tsc_timestamp=after.tsc_timestamp)
    assert vm.clock.tsc(0).read(vm.backend.tsc) == guest_tsc(vm.backend)


@pytest.mark.row("J-03", "P-03")
def test_the_path_in_python_moves_its_own_page_alone_too() -> None:
    """And tells on_dirty of that page, and of no other."""
    vm, dirty = a_usual_vm(2), []
    vm.memory.on_dirty = lambda gpa, length: dirty.append((gpa, length))
    other, ns = page_of(vm.clock, 1), guest_ns(vm.backend, vm.memory)
    assert not vm.write(0, ADJUST, 7)
    assert page_of(vm.clock, 1) == other
    assert guest_ns(vm.backend, vm.memory) == ns
    assert dirty == [(PAGES[0], 32)]


@pytest.mark.row("J-09", "P-03")
def test_tscs_that_come_to_agree_or_to_disagree_change_every_page() -> None:
    """STABLE goes with the first write that sets vCPUs apart, and comes back with the one that brings them together."""
    vm = a_vm(2)
    assert [page_of(vm.clock, vcpu).flags for vcpu in range(2)] == [STABLE, STABLE]
    for value, served, flags in ((5, False, 0), (6, True, 0), (0, False, STABLE), (0, False, STABLE)):
        assert vm.write(0, ADJUST, value) is served
        assert [page_of(vm.clock, vcpu).flags for vcpu in range(2)] == [flags, flags]


@pytest.mark.row("J-03")
def test_a_vcpu_without_a_page() -> None:
    """It has a TSC all the same."""
    vm = a_usual_vm()
    vm.clock.write_msr(0, SYSTEM_TIME, 0)
    ram = vm.memory.read(0, 1 << 16)
    assert vm.write(0, ADJUST, 7)
    assert (vm.clock.read_msr(0, ADJUST), vm.backend.tsc_offsets[0]) == (7, 7)
    assert vm.memory.read(0, 1 << 16) == ram


@pytest.mark.row("J-03")
def test_a_page_whose_memory_is_gone_or_another() -> None:
    """Nothing is written where it was; in other memory it begins with its flags, as at a first publish."""
    vm = a_usual_vm()
    vm.memory.remove_slot(0)
    vm.write(0, ADJUST, 7)
    ram = bytearray(1 << 16)
    vm.memory.add_slot(0, ram)
    assert not vm.write(0, ADJUST, 8)
    assert page_of(vm.clock).flags == STABLE
    assert guest_ns(vm.backend, vm.memory) == vm.clock.read(0)


# Events


@pytest.mark.row("E9")
def test_each_write_is_told_as_long_as_the_budget_lasts() -> None:
    """As other events of the guest's: with the instant, and those beyond the budget as a number."""
    vm = a_usual_vm()
    vm.backend.advance(ns=NS_PER_S // 2)
    assert vm.write(0, ADJUST, 7)
    event = vm.told(EventKind.TSC)[-1]
    assert (event.host_tsc, event.raw_ns, event.cause) == (vm.backend.tsc, vm.backend.ref_ns, EventCause.GUEST)
    assert event.why == "vCPU 0: offset 0x3b9aca00 becomes 0x7"
    for value in range(2 * GUEST_BURST):
        assert vm.write(0, ADJUST, value)
    written = 2 * GUEST_BURST + 2
    assert (len(vm.told(EventKind.TSC)), vm.clock.events.suppressed) == (GUEST_BURST, written - GUEST_BURST)
    vm.backend.advance(ns=2 * NS_PER_S)
    assert vm.write(0, ADJUST, 1)
    (lost,) = vm.told(EventKind.SUPPRESSED)
    assert lost.why == f"{written - GUEST_BURST} more guest-caused events were not recorded"


@pytest.mark.row("E9")
def test_a_subscriber_gets_them() -> None:
    """Each, without another operation of the clock."""
    vm = a_usual_vm()
    got: list[Event] = []
    vm.clock.events.subscribe(got.append)
    assert vm.write(0, ADJUST, 7)
    assert vm.clock.events.flush(60)
    assert [event.why for event in got] == ["vCPU 0: offset 0x3b9aca00 becomes 0x7"]


# What is not a usual write


def pause(vm: Vm) -> None:
    """Have time stand."""
    vm.clock.pause()


def refuse(vm: Vm) -> None:
    """Have the host honour no offset any more."""
    vm.backend._honours_tsc_offset = False


def put_back(vm: Vm) -> None:
    """Have the host's TSC go back."""
    vm.backend.tsc = HostTsc(max(0, vm.backend.tsc - 10**10))


def tell_of_writes(vm: Vm) -> None:
    """Have the memory tell somebody of what is written."""
    vm.memory.on_dirty = lambda _gpa, _length: None


def take_over(vm: Vm) -> None:
    """Have another clock in that memory."""
    GuestClock(vm.memory, 1, backend=vm.backend)


def distrust(vm: Vm) -> None:
    """Have the host's kernel leave its TSC."""
    vm.backend.tsc_stable = False
    vm.clock.refresh()


@pytest.mark.row("J-01", "J-05", "E9")
@pytest.mark.parametrize("make_unusual", [pause, refuse, put_back, tell_of_writes, take_over, distrust])
def test_nothing_changes_by_what_is_not_a_usual_write(make_unusual: Callable[[Vm], None]) -> None:
    """It is left to write_msr(), whatever the reason."""
    vm = a_usual_vm()
    assert vm.write(0, ADJUST, 7)
    make_unusual(vm)
    ram, events = vm.memory.read(0, 1 << 16), vm.clock.events.last
    offsets, suppressed = dict(vm.backend.tsc_offsets), vm.clock.events.suppressed
    for vcpu, index in ((0, ADJUST), (0, TSC), (0, AUX), (0, SYSTEM_TIME)):
        assert vm.clock.serve_tsc_write(vcpu, index, 8) is False
    assert (vm.memory.read(0, 1 << 16), vm.clock.events.last) == (ram, events)
    assert (vm.backend.tsc_offsets, vm.clock.events.suppressed) == (offsets, suppressed)
    if vm.memory.on_dirty is None and not vm.clock.is_paused:
        assert vm.clock.tsc(0).adjust == 7


@pytest.mark.row("J-01")
@pytest.mark.parametrize("profile", ["linux", "document"])
def test_adjust_that_is_not_offered(profile: str) -> None:
    """It is ignored, or #GP; a write of the TSC is a usual one all the same."""
    vm = a_vm(offer_tsc_adjust=False, profile=profile)
    vm.write(0, TSC, 5)
    assert vm.write(0, TSC, 6)
    offset = vm.backend.tsc_offsets[0]
    if profile == "linux":
        assert not vm.write(0, ADJUST, 9)
    else:
        with pytest.raises(MsrFault):
            vm.write(0, ADJUST, 9)
    assert vm.backend.tsc_offsets[0] == offset


@pytest.mark.row("E9")
def test_it_does_not_wait_for_the_clocks_lock() -> None:
    """Whoever has it may wait for this vCPU to leave the guest."""
    vm, taken, done = a_usual_vm(), threading.Event(), threading.Event()

    def change() -> None:
        with vm.memory.clock_lock:
            taken.set()
            done.wait(60)

    thread = threading.Thread(target=change)
    thread.start()
    assert taken.wait(60)
    served = vm.clock.serve_tsc_write(0, ADJUST, 7)
    done.set()
    thread.join()
    assert not served
    assert vm.write(0, ADJUST, 7)


# Beside the oracle, and beside the path in Python


@pytest.mark.row("J-02", "J-03", "J-04", "J-06")
@settings(max_examples=40)
@given(
    st.integers(1, 2),
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([TSC, ADJUST]), VALUES, st.integers(0, 3 * 10**9))),
)
def test_tscs_and_pages_are_the_oracles(vcpus: int, writes: list[tuple[int, int, int, int]]) -> None:
    """After any writes: every vCPU's TSC and ADJUST, and the time that its guest makes of its page."""
    vm, oracles = a_vm(vcpus), [VcpuTscOracle() for _ in range(vcpus)]
    for vcpu, index, value, ns in writes:
        vm.backend.advance(ns=ns)
        before = [guest_ns(vm.backend, vm.memory, each) for each in range(vcpus)]
        oracle = oracles[vcpu % vcpus]
        if index == TSC:
            oracle.guest_write_tsc(value, vm.backend.tsc)
        else:
            oracle.guest_write_adjust(value)
        vm.write(vcpu % vcpus, index, value)
        for each in range(vcpus):
            tsc = vm.clock.tsc(each)
            assert (tsc.offset, tsc.adjust) == (oracles[each].offset, oracles[each].adjust)
            assert vm.backend.tsc_offsets.get(each, 0) == oracles[each].offset
            assert guest_ns(vm.backend, vm.memory, each) - before[each] in (0, 1)


OPERATIONS: Final = st.one_of(
    st.tuples(st.just("write"), st.tuples(st.integers(0, 1), st.sampled_from([TSC, ADJUST, AUX]), VALUES)),
    st.tuples(st.just("write"), st.tuples(st.integers(0, 1), st.sampled_from([TSC, ADJUST]), st.integers(0, 3))),
    st.tuples(
        st.just("write"), st.tuples(st.integers(0, 1), st.just(SYSTEM_TIME), st.sampled_from([0, 0x2001, 0x3001]))
    ),
    st.tuples(st.just("advance"), st.integers(0, 3 * 10**9)),
    st.tuples(st.just("host_write"), st.tuples(st.integers(0, 1), st.sampled_from([TSC, ADJUST]), VALUES)),
    st.tuples(st.just("resume"), st.sampled_from(["freeze", "advance", "slew"])),
    st.tuples(st.just("dilate"), st.sampled_from([Fraction(1, 3), Fraction(1), Fraction(2)])),
    st.tuples(st.sampled_from(["refresh", "tick", "pause", "reset", "repair", "distrust", "back", "lag"]), st.none()),
)


def operations(vm: Vm) -> dict[str, Callable[[Any], object]]:
    """What each of OPERATIONS does."""
    clock, backend = vm.clock, vm.backend
    return {
        "write": lambda it: vm.write(*it),
        "advance": lambda ns: backend.advance(ns=ns),
        "host_write": lambda it: clock.host_write_msr(*it),
        "resume": clock.resume,
        "dilate": clock.dilate,
        "refresh": lambda _: clock.refresh(),
        "tick": lambda _: clock.tick(),
        "pause": lambda _: clock.pause(),
        "reset": lambda _: clock.reset(),
        "repair": lambda _: clock.repair_tsc(),
        "distrust": lambda _: clock.apply_host_findings([], tsc_trusted=False),
        "back": lambda _: put_back(vm),
        "lag": lambda _: setattr(backend, "cpu_lag_ticks", 10**11 - backend.cpu_lag_ticks),
    }


def operate(vm: Vm, name: str, value: object) -> str:
    """Do the operation; what came of it, in words."""
    try:
        operations(vm)[name](value)
    except PvclockError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def saved(clock: GuestClock) -> object:
    """Its state, or why it has none."""
    try:
        return clock.save()
    except PvclockError as error:
        return str(error)


def seen(vm: Vm, vcpus: int) -> tuple[object, ...]:
    """All that guest and VMM see of it, to the bit."""
    clock = vm.clock
    return (
        vm.memory.read(0, 1 << 16),
        dict(vm.backend.tsc_offsets),
        [(clock.read_msr(vcpu, TSC), clock.tsc(vcpu).adjust, clock.read_msr(vcpu, AUX)) for vcpu in range(vcpus)],
        clock.events.read(),
        clock.events.suppressed,
        (clock.now(), clock.line, clock.is_paused, str(clock.refused_offset)),
        saved(clock),
    )


@pytest.mark.row("E9", "J-02", "J-03", "J-04", "J-05")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="as it is"),
        pytest.param({"honours_tsc_offset": False}, id="no offsets"),
        pytest.param({"offer_tsc_adjust": False, "profile": "document"}, id="no adjust"),
        pytest.param({"profile": "virtualbox"}, id="lines of their own"),
    ],
)
@pytest.mark.parametrize("vcpus", [1, 2])
@settings(max_examples=30)
@given(operations=st.lists(OPERATIONS, max_size=25))
def test_both_paths_have_the_same_results(
    vcpus: int, options: dict[str, Any], operations: list[tuple[str, Any]]
) -> None:
    """State, page bytes, events and faults, after each of any operations, with writes of its guest between them."""
    quick, twin = a_vm(vcpus, **options), a_vm(vcpus, by_python=True, **options)
    for name, value in operations:
        if name == "write" and value[0] >= vcpus:
            continue
        assert operate(quick, name, value) == operate(twin, name, value)
        assert seen(quick, vcpus) == seen(twin, vcpus)


@pytest.mark.row("E9")
def test_an_interrupt_at_each_line_of_a_usual_write() -> None:
    """The TSC, its page, the host's offset and the event are there, or none of them is."""

    def write(vm: Vm) -> None:
        vm.clock.serve_tsc_write(0, ADJUST, 7)

    before, after = a_usual_vm(), a_usual_vm()
    places, found = places_in(lambda: write(after), product()), set()
    assert len(places) > 5
    both = [seen(each, 1) for each in (before, after)]
    for place in places:
        vm = a_usual_vm()
        assert interrupted(lambda: write(vm), place)  # noqa: B023  # called at once
        assert seen(vm, 1) in both
        found.add(seen(vm, 1) == both[1])
        write(vm)
        assert (vm.clock.tsc(0).adjust, vm.backend.tsc_offsets[0]) == (7, 7)
    assert found == {False, True}


@pytest.mark.row("E9")
def test_an_interrupt_after_the_host_was_told() -> None:
    """It takes the offset back: the write was not done, and the next try does it."""
    vm, interrupts = a_usual_vm(), [KeyboardInterrupt()]
    set_offset = vm.backend.set_tsc_offset

    def set_and_interrupt(vcpu: int, offset: int) -> None:
        set_offset(vcpu, offset)
        if interrupts:
            raise interrupts.pop()

    vm.backend.set_tsc_offset = set_and_interrupt  # type: ignore[method-assign]
    vm.clock.refresh()  # usual writes look at the backend anew
    before = seen(vm, 1)
    with pytest.raises(KeyboardInterrupt):
        vm.clock.serve_tsc_write(0, ADJUST, 7)
    assert seen(vm, 1) == before
    assert vm.write(0, ADJUST, 7)
    assert (vm.clock.tsc(0).adjust, vm.backend.tsc_offsets[0]) == (7, 7)
