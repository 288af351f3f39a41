"""The synthetic timers, beside a slow model that writes out every due time; their messages by the guest's own eyes."""

from __future__ import annotations

from struct import unpack
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pvclock import ConfigError, MsrFault
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.hyperv.msr import Part
from pvclock.providers.hyperv.stimers import SyntheticTimers
from pvclock.providers.hyperv.synic import Synic
from pvclock.providers.interface import ReferenceTime
from tests.unit.slow_stimers import AUTO_ENABLE, DIRECT, ENABLE, LAZY, PERIODIC, Message, SlowStimers
from tests.unit.stub_clock import NotedVmm, StubClock
from tests.unit.test_hyperv_synic import EOM, SIMP, SINT0

CONFIG0, COUNT0 = 0x400000B0, 0x400000B1
PAGES: Final = (0x8000, 0x9000)
TIMER_EXPIRED: Final = 0x80000010
NEVER: Final = 2**64 // 100 + 1
MASKED: Final = 1 << 16


def by_message(sint: int) -> int:
    """A configuration's SINT."""
    return sint << 16


def direct(vector: int) -> int:
    """A configuration's vector in direct mode."""
    return DIRECT | vector << 4


class World:
    """The parts on a clock that a test moves, and a guest of two vCPUs that listens at SINTs 1 to 3."""

    def __init__(self, *, offers_direct_mode: bool = True) -> None:
        self.clock, self.vmm, self.now_ns = StubClock(2), NotedVmm(), 0
        self.offers_direct_mode = offers_direct_mode
        self.make()
        for vcpu in range(2):
            self.write(SIMP, PAGES[vcpu] | 1, vcpu)
            for sint in range(1, 4):
                self.write(SINT0 + sint, 0x50 + 16 * vcpu + sint, vcpu)
        self.set_time(0)

    def make(self) -> None:
        """Make the parts."""
        self.synic = Synic(self.clock, 2)
        self.stimers = SyntheticTimers(self.clock, 2, self.synic, self.vmm, offers_direct_mode=self.offers_direct_mode)
        self.msrs = {**self.synic.msrs, **self.stimers.msrs}

    def saved(self) -> dict[str, Any]:
        """The state of both parts."""
        return {**self.synic.save(), **self.stimers.save()}

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from a saved state, in new parts."""
        self.make()
        parts: tuple[Part, ...] = (self.synic, self.stimers)
        for part in parts:
            part.checked({name: saved[name] for name in part.save()})()

    # The guest

    def write(self, index: int, value: int, vcpu: int = 0) -> None:
        """WRMSR."""
        serve = self.msrs[index].write
        assert serve is not None
        serve(vcpu, value)

    def read(self, index: int, vcpu: int = 0) -> int:
        """RDMSR."""
        serve = self.msrs[index].read
        assert serve is not None
        return serve(vcpu)

    def set(self, config: int, units: int, index: int = 0, vcpu: int = 0) -> None:
        """Write both MSRs of a timer, the count first."""
        self.write(COUNT0 + 2 * index, units, vcpu)
        self.write(CONFIG0 + 2 * index, config, vcpu)

    def look(self, vcpu: int, sint: int) -> tuple[Message | None, bool]:
        """What a slot shows, and its flag."""
        raw = self.clock.memory.read(PAGES[vcpu] + 256 * sint, 40)
        kind, size, flags, _, sender, index, zero, expiration, delivery = unpack("<IBBHQIIQQ", raw)
        assert (kind, size, sender, zero) in ((0, size, sender, zero), (TIMER_EXPIRED, 24, 0, 0))
        return Message(index, expiration, delivery) if kind else None, bool(flags & 1)

    def take(self, vcpu: int, sint: int) -> Message | None:
        """Read a slot, free it, and write EOM if its flag is set: Linux's order."""
        found, _ = self.look(vcpu, sint)
        self.clock.memory.write(PAGES[vcpu] + 256 * sint, bytes(4))
        if self.look(vcpu, sint)[1]:
            self.write(EOM, 0, vcpu)
        return found

    # Time

    def set_time(self, now_ns: int) -> None:
        """It is guest time `now_ns`; nobody has noticed yet."""
        self.now_ns = now_ns
        self.clock.reference_time = ReferenceTime(now_ns // 100)

    def serve(self) -> list[tuple[int, int]]:
        """Expire what is due, as a clock does; return the interrupts that were raised."""
        due_ns = self.stimers.next_due_ns()
        if due_ns is None or due_ns > self.now_ns:
            return []
        before = len(self.vmm.notes)
        deliver = self.stimers.expire(self.now_ns)
        assert len(self.vmm.notes) == before  # not with the clock's lock held
        if deliver is not None:
            deliver()
        return [(vcpu, vector) for _, vcpu, vector in self.vmm.notes[before:]]  # type: ignore[misc]  # of NotedVmm

    def at(self, units: int) -> list[tuple[int, int]]:
        """serve() at that reference time."""
        self.set_time(units * 100)
        return self.serve()


# Any program of a guest, on any course of time

# Mostly one-shot timers of one vCPU and messages to SINT 1, so that some have to wait for others.
VCPUS: Final = st.sampled_from([0, 0, 0, 1])
TIMERS: Final = st.tuples(VCPUS, st.integers(0, 3))
BITS: Final = st.sampled_from([*[ENABLE] * 5, ENABLE | PERIODIC, ENABLE | PERIODIC | LAZY, AUTO_ENABLE, 0])
TARGETS: Final = st.sampled_from([*[1 << 16] * 8, 2 << 16, 3 << 16, 0, *(DIRECT | each << 4 for each in (15, 16, 255))])
CONFIGS: Final = st.builds(lambda bits, target: bits | target, BITS, TARGETS)
COUNTS: Final = st.integers(1, 60)
ODD_CONFIGS: Final = st.integers(0, 2**20 - 1) | st.integers(0, 2**64 - 1)
ODD_COUNTS: Final = st.integers(0, 2000) | st.sampled_from([0, NEVER - 1, NEVER, 2**64 - 1])
SETS: Final = st.tuples(st.just("set"), TIMERS, CONFIGS, COUNTS)
ADVANCES: Final = st.tuples(st.just("advance"), st.integers(0, 3000))
TAKES: Final = st.tuples(st.just("take"), VCPUS, st.sampled_from([1, 1, 1, 2, 3]))
OTHERS: Final = st.one_of(
    st.tuples(st.just("config"), TIMERS, CONFIGS | ODD_CONFIGS),
    st.tuples(st.just("count"), TIMERS, COUNTS | ODD_COUNTS),
    st.tuples(st.just("advance"), st.integers(0, 100_000)),
    st.tuples(st.just("eom"), st.integers(0, 1)),
    st.tuples(st.just("page"), st.integers(0, 1), st.booleans()),
    st.tuples(st.just("load")),
)
BURSTS: Final = st.tuples(st.just("burst"), VCPUS, st.tuples(*[COUNTS] * 4))
STEPS: Final = st.lists(st.one_of(SETS, SETS, BURSTS, ADVANCES, ADVANCES, TAKES, OTHERS), min_size=10, max_size=50)


class Pair:
    """The product and the model, which are told the same."""

    def __init__(self) -> None:
        self.world = World()
        vectors: list[list[int | None]] = [
            [0x50 + 16 * vcpu + sint if 0 < sint < 4 else None for sint in range(16)] for vcpu in range(2)
        ]
        self.model = SlowStimers(vectors)

    def do(self, step: tuple[Any, ...]) -> None:
        """Take a step on both, and then all that is due."""
        getattr(self, f"do_{step[0]}")(*step[1:])
        assert self.world.stimers.next_due_ns() == self.model.next_due_ns()
        due_ns = self.model.next_due_ns()
        is_due = due_ns is not None and due_ns <= self.world.now_ns
        assert self.world.serve() == (self.model.expire(self.world.now_ns) if is_due else [])
        self.compare()

    def compare(self) -> None:
        """What the guest reads, and what the VMM counts."""
        for stimer in self.model.stimers:
            config, count = CONFIG0 + 2 * stimer.index, COUNT0 + 2 * stimer.index
            assert self.world.read(config, stimer.vcpu) == stimer.config
            assert self.world.read(count, stimer.vcpu) == stimer.count
            assert self.world.stimers.fired(stimer.vcpu, stimer.index) == stimer.fired
        for vcpu in range(2):
            for sint in range(1, 4):
                slot = (vcpu, sint)
                assert self.world.look(*slot) == (self.model.slots.get(slot), slot in self.model.flags)

    def do_set(self, timer: tuple[int, int], config: int, count: int) -> None:
        """Write both; the count from now on, whatever the timer makes of it."""
        self.do_count(timer, count + (0 if config & PERIODIC else self.world.now_ns // 100))
        self.do_config(timer, config)

    def do_burst(self, vcpu: int, counts: tuple[int, ...]) -> None:
        """Set all timers of a vCPU, once each, to the same SINT."""
        for index, each in enumerate(counts):
            self.do_set((vcpu, index), ONE_SHOT_TO_1, each)

    def do_config(self, timer: tuple[int, int], value: int) -> None:
        """Write a CONFIG."""
        vcpu, index = timer
        if self.model.write_config(self.model.stimers[4 * vcpu + index], value, self.world.now_ns):
            self.world.write(CONFIG0 + 2 * index, value, vcpu)
        else:
            with pytest.raises(MsrFault, match="reserved"):
                self.world.write(CONFIG0 + 2 * index, value, vcpu)

    def do_count(self, timer: tuple[int, int], value: int) -> None:
        """Write a COUNT."""
        vcpu, index = timer
        self.model.write_count(self.model.stimers[4 * vcpu + index], value, self.world.now_ns)
        self.world.write(COUNT0 + 2 * index, value, vcpu)

    def do_advance(self, ns: int) -> None:
        """Let guest time go on."""
        self.world.set_time(self.world.now_ns + ns)

    def do_take(self, vcpu: int, sint: int) -> None:
        """The guest reads a slot."""
        assert self.world.take(vcpu, sint) == self.model.take((vcpu, sint))

    def do_eom(self, vcpu: int) -> None:
        """The guest writes EOM for no reason."""
        self.model.end_of_message()
        self.world.write(EOM, 0, vcpu)

    def do_page(self, vcpu: int, is_there: bool) -> None:
        """The guest writes SIMP."""
        self.model.move_page(vcpu, is_there=is_there)
        self.world.write(SIMP, PAGES[vcpu] | is_there, vcpu)

    def do_load(self) -> None:
        """Save, and go on from that."""
        self.model.load()
        self.world.load(self.world.saved())


ONE_SHOT_TO_1: Final = ENABLE | by_message(1)


@pytest.mark.row("H-42", "H-69", "H-72", "H-73", "H-40")
@given(steps=STEPS)
@example(  # three messages for one slot, over a load
    steps=[
        *[("count", (0, index), 10 + index) for index in range(3)],
        *[("config", (0, index), ONE_SHOT_TO_1) for index in range(3)],
        ("advance", 1000),
        ("advance", 5000),
        ("load",),
        *[("take", 0, 1)] * 4,
    ]
)
@example(  # a message that waits is forgotten with its timer's next write, and the others are not
    steps=[
        *[("count", (1, index), 10 + index) for index in range(4)],
        *[("config", (1, index), ONE_SHOT_TO_1) for index in range(4)],
        ("advance", 5000),
        ("count", (1, 1), 5),
        ("config", (1, 2), 0),
        *[("take", 1, 1)] * 4,
    ]
)
@example(  # one slot's oldest message was taken, and the next one is younger than another slot's
    steps=[
        ("burst", 0, (1, 1, 1, 3)),
        ("set", (0, 0), ENABLE | by_message(2), 3),
        ("advance", 8),
        ("set", (0, 1), ENABLE | by_message(2), 2),
        ("advance", 92),
        ("advance", 200),
        ("set", (0, 1), ONE_SHOT_TO_1, 1),
        ("set", (0, 1), ONE_SHOT_TO_1, 1),
        ("page", 0, True),
    ]
)
def test_any_program_sees_what_the_model_says(steps: list[tuple[Any, ...]]) -> None:
    """MSRs, message slots, interrupts in their order, the next due time and the counters, after every step."""
    pair = Pair()
    for step in steps:
        pair.do(step)
    pair.compare()


# Rules, one by one


@pytest.mark.row("H-42")
def test_the_msrs_are_those_of_the_timers() -> None:
    """Eight, of the timers' privilege, each its vCPU's own; 0 at first."""
    world = World()
    assert list(world.stimers.msrs) == list(range(CONFIG0, CONFIG0 + 8))
    assert {msr.privilege for msr in world.stimers.msrs.values()} == {Privilege.SYNTHETIC_TIMERS}
    for place, index in enumerate(world.stimers.msrs):
        assert world.read(index) == world.read(index, 1) == 0
        world.write(index, place << 16, 1)
    assert [world.read(index, 1) >> 16 for index in world.stimers.msrs] == list(range(8))
    assert {world.read(index) for index in world.stimers.msrs} == {0}


@pytest.mark.row("H-42")
@given(value=st.integers(0, 2**64 - 1) | st.integers(0, 2**20 - 1), offers_direct_mode=st.booleans())
def test_reserved_bits_fault(value: int, offers_direct_mode: bool) -> None:
    """Those of direct mode, too, where it is not offered; the timer that was set runs on."""
    world = World(offers_direct_mode=offers_direct_mode)
    legal = 0xF | 0xF << 16 | (0x1FF << 4 if offers_direct_mode else 0)
    world.set(ONE_SHOT_TO_1, 100)
    if value & ~legal:
        with pytest.raises(MsrFault, match="reserved"):
            world.write(CONFIG0, value)
        assert world.read(CONFIG0) == ONE_SHOT_TO_1
        assert world.stimers.next_due_ns() == 100 * 100
    else:
        world.write(CONFIG0, value)
        has_target = value >> 16 & 0xF or value & DIRECT
        assert world.read(CONFIG0) == (value if has_target else value & ~ENABLE)


@pytest.mark.row("H-42")
@pytest.mark.parametrize("bits", [ENABLE, ENABLE | PERIODIC, ENABLE | LAZY | AUTO_ENABLE])
def test_a_timer_without_a_sint_is_disabled(bits: int) -> None:
    """SINT 0 takes no timer messages: the bit is cleared, and nothing is due."""
    world = World()
    world.set(bits, 10)
    assert world.read(CONFIG0) == bits & ~ENABLE
    assert world.stimers.next_due_ns() is None


@pytest.mark.row("H-42")
def test_a_one_shot_count_is_an_absolute_time() -> None:
    """It expires at that reference time and not 1 ns before, once, and is disabled then."""
    world = World()
    world.at(40)
    world.set(ONE_SHOT_TO_1, 70)
    assert world.stimers.next_due_ns() == 7000
    world.set_time(6999)
    assert world.serve() == []
    assert world.read(CONFIG0) == ONE_SHOT_TO_1
    assert world.at(70) == [(0, 0x51)]
    assert world.take(0, 1) == Message(0, 70, 70)
    assert (world.read(CONFIG0), world.read(COUNT0)) == (ONE_SHOT_TO_1 & ~ENABLE, 70)
    assert world.at(10**9) == []


@pytest.mark.row("H-42")
def test_a_time_in_the_past_is_due_at_once() -> None:
    """The clock is told, and finds it; the message says when it should have come."""
    world = World()
    world.at(1000)
    told = world.clock.timer_changes
    world.set(ONE_SHOT_TO_1, 1)
    assert world.clock.timer_changes > told
    assert world.serve() == [(0, 0x51)]
    assert world.take(0, 1) == Message(0, 1, 1000)


@pytest.mark.row("H-42")
def test_a_periodic_count_is_a_time_span_and_keeps_its_grid() -> None:
    """From the write on; being late moves no later expiry, and missed periods are one message (KVM's rule)."""
    world = World()
    world.at(1000)
    world.set(ENABLE | PERIODIC | by_message(2), 30)
    assert world.at(1029) == []
    seen = []
    for units in (1030, 1059, 1060, 1075, 1200, 1210, 1240):
        world.at(units)
        seen += [found] if (found := world.take(0, 2)) else []
    assert seen == [
        Message(0, expiration, delivery)
        for expiration, delivery in ((1030, 1030), (1060, 1060), (1090, 1200), (1210, 1210), (1240, 1240))
    ]
    assert world.read(CONFIG0) & ENABLE
    assert world.stimers.fired(0, 0) == 5


@pytest.mark.row("H-42", "H-69")
@pytest.mark.parametrize("lazy", [0, LAZY])
def test_a_year_of_the_shortest_period_is_one_message(lazy: int) -> None:
    """However far guest time skips."""
    world = World()
    world.set(ENABLE | PERIODIC | lazy | by_message(1), 1)
    assert world.at(365 * 86_400 * 10**7) == [(0, 0x51)]
    assert world.stimers.fired(0, 0) == 1
    assert world.stimers.next_due_ns() == (365 * 86_400 * 10**7 + 1) * 100


@pytest.mark.row("H-42")
@pytest.mark.parametrize("bits", [ENABLE, ENABLE | PERIODIC])
@pytest.mark.parametrize(("units", "due_ns"), [(NEVER - 1, (NEVER - 1) * 100), (NEVER, None), (2**64 - 1, None)])
def test_after_the_end_of_guest_time_nothing_is_due(bits: int, units: int, due_ns: int | None) -> None:
    """Such a timer is enabled, and never expires."""
    world = World()
    world.set(bits | by_message(1), units)
    assert world.stimers.next_due_ns() == due_ns
    assert world.read(CONFIG0) & ENABLE
    world.load(world.saved())
    world.serve()
    assert world.stimers.next_due_ns() == due_ns


@pytest.mark.row("H-42")
def test_the_last_period_of_guest_time_is_the_last() -> None:
    """The timer stays enabled, and its next expiry would come after the end."""
    world = World()
    world.set(ENABLE | PERIODIC | by_message(1), NEVER - 1)
    assert world.at(NEVER - 1) == [(0, 0x51)]
    assert world.stimers.next_due_ns() is None
    assert world.saved()["stimer_due"][0] == 0
    assert world.read(CONFIG0) & ENABLE


@pytest.mark.row("H-42")
def test_a_time_before_the_last_one_is_taken_for_the_last_one() -> None:
    """A clock that steps back does not stop the timers."""
    world = World()
    world.at(1000)
    world.stimers.expire(100_000)
    world.set(ONE_SHOT_TO_1, 999)
    assert world.stimers.expire(99_000) is not None
    assert world.look(0, 1)[0] == Message(0, 999, 1000)


@pytest.mark.row("H-42")
def test_a_message_is_delivered_at_the_guests_reference_time() -> None:
    """As the page shows it, which may be ahead of guest time; and never before the expiry."""
    world = World()
    for index, (units, shown) in enumerate(((10, 9), (20, 25))):
        world.set(ENABLE | by_message(1 + index), units, index)
        world.set_time(100 * units)
        world.clock.reference_time = ReferenceTime(shown)
        assert world.serve() == [(0, 0x51 + index)]
    assert (world.take(0, 1), world.take(0, 2)) == (Message(0, 10, 10), Message(1, 20, 25))


@pytest.mark.row("H-42")
def test_auto_enable_starts_with_the_count() -> None:
    """Any write of it but 0, which disables."""
    world = World()
    world.write(CONFIG0, AUTO_ENABLE | by_message(1))
    world.write(COUNT0, 50)
    assert world.read(CONFIG0) == ENABLE | AUTO_ENABLE | by_message(1)
    assert world.at(50) == [(0, 0x51)]
    assert world.read(CONFIG0) == AUTO_ENABLE | by_message(1)
    world.write(COUNT0, 90)
    world.write(COUNT0, 0)
    assert world.read(CONFIG0) == AUTO_ENABLE | by_message(1)
    assert world.at(10**6) == []


@pytest.mark.row("H-42")
@given(vector=st.integers(0, 255), bits=st.sampled_from([ENABLE, ENABLE | PERIODIC]))
def test_direct_mode_interrupts_without_a_message(vector: int, bits: int) -> None:
    """With its own vector, if an APIC can take that; no SIM page is needed, and none is written."""
    world = World()
    world.write(SIMP, 0, 1)
    world.set(bits | direct(vector), 10, index=3, vcpu=1)
    assert world.at(10) == ([(1, vector)] if vector >= 16 else [])
    assert world.look(1, 0) == (None, False)
    assert bool(world.read(CONFIG0 + 6, 1) & ENABLE) == bool(bits & PERIODIC)
    assert world.stimers.fired(1, 3) == 1


@pytest.mark.row("H-42", "H-41")
@pytest.mark.parametrize("quiet", [MASKED | 0x51, 1 << 18 | 0x51])
def test_a_masked_or_polled_sint_gets_its_message_all_the_same(quiet: int) -> None:
    """Without an interrupt."""
    world = World()
    world.write(SINT0 + 1, quiet)
    world.set(ONE_SHOT_TO_1, 10)
    assert world.at(10) == []
    assert world.take(0, 1) == Message(0, 10, 10)
    assert not world.read(CONFIG0) & ENABLE


@pytest.mark.row("H-40", "H-42")
def test_messages_for_one_slot_come_in_order_and_each_once() -> None:
    """A slot that is taken keeps its message and gets the flag; each EOM brings the next, with the time it came."""
    world = World()
    for index, units in enumerate((40, 20, 30, 10)):
        world.set(ONE_SHOT_TO_1, units, index)
    assert world.at(40) == [(0, 0x51)]
    assert world.look(0, 1) == (Message(3, 10, 40), True)
    taken = [world.take(0, 1)]
    for units in (50, 60, 70, 80):
        assert world.at(units) == ([(0, 0x51)] if units < 80 else [])
        taken.append(world.take(0, 1))
    assert taken == [Message(3, 10, 40), Message(1, 20, 50), Message(2, 30, 60), Message(0, 40, 70), None]
    assert [world.read(CONFIG0 + 2 * index) & ENABLE for index in range(4)] == [0] * 4


@pytest.mark.row("H-40", "H-42")
def test_the_clock_is_told_of_an_eom_that_frees_a_slot() -> None:
    """And of nothing if no message waits, whatever a guest writes."""
    world = World()
    world.write(EOM, 0)
    told = world.clock.timer_changes
    for index in range(2):
        world.set(ONE_SHOT_TO_1, 10, index)
    world.at(10)
    assert world.clock.timer_changes == told + 4
    assert (world.stimers.next_due_ns(), world.take(0, 1)) == (None, Message(0, 10, 10))
    assert (world.clock.timer_changes, world.stimers.next_due_ns()) == (told + 5, 0)
    world.at(11)
    world.write(EOM, 0)
    assert (world.clock.timer_changes, world.stimers.next_due_ns()) == (told + 5, None)


@pytest.mark.row("H-42")
def test_a_periodic_message_does_not_wait() -> None:
    """It is dropped if its slot is taken, without the flag, and also if another message waits for the slot."""
    world = World()
    world.set(ENABLE | PERIODIC | by_message(1), 10)
    world.at(10)
    world.at(20)
    assert world.look(0, 1) == (Message(0, 10, 10), False)
    world.set(ONE_SHOT_TO_1, 25, 1)
    world.at(30)
    assert world.look(0, 1) == (Message(0, 10, 10), True)
    world.clock.memory.write(PAGES[0] + 256, bytes(4))  # freed, and no EOM yet
    world.at(40)
    assert world.look(0, 1)[0] == Message(1, 25, 40)
    assert world.stimers.fired(0, 0) == 4


@pytest.mark.row("H-42")
@given(piece=st.binary(min_size=64, max_size=64), units=st.lists(st.integers(1, 50), min_size=4, max_size=4))
def test_damaged_slots_change_only_what_is_delivered(piece: bytes, units: list[int]) -> None:
    """A guest may write anything there: the timers expire as ever, and no other memory is written."""
    world, garbage = World(), piece * 64
    before = world.clock.memory.read(0, PAGES[0])
    world.clock.memory.write(PAGES[0], garbage)
    for index, each in enumerate(units):
        world.set(ENABLE | by_message(1 + index % 3), each, index)
    world.at(50)
    assert [world.stimers.fired(0, index) for index in range(4)] == [1] * 4
    assert world.clock.memory.read(0, PAGES[0]) == before
    page = world.clock.memory.read(PAGES[0], 4096)
    changed = {place for place in range(4096) if page[place] != garbage[place]}
    messages = {256 * sint + place for sint in range(1, 4) for place in range(40)}
    assert changed <= messages


# Errors of the VMM


class Failing(NotedVmm):
    """A VMM that raises once it has noted the interrupt."""

    def inject(self, vcpu: int, vector: int) -> None:
        """Note it and raise."""
        super().inject(vcpu, vector)
        raise OSError(f"vector {vector:#x}")


@pytest.mark.row("H-42", "E9")
def test_an_error_of_the_vmm_loses_no_other_interrupt() -> None:
    """All are asked for; the first error is raised by the delivery, and the others are its notes."""
    world = World()
    world.vmm = Failing()
    world.load(world.saved())
    for index in range(3):
        world.set(ENABLE | by_message(1 + index), 10 + index, index)
    world.set_time(5000)
    deliver = world.stimers.expire(5000)
    assert deliver is not None
    with pytest.raises(OSError, match="0x51") as caught:
        deliver()
    assert world.vmm.notes == [("inject", 0, 0x51), ("inject", 0, 0x52), ("inject", 0, 0x53)]
    assert len(caught.value.__notes__) == 2


@pytest.mark.row("H-42", "E9")
def test_an_error_of_on_dirty_loses_no_interrupt() -> None:
    """It is raised after the interrupts, by the delivery; later writes are reported again."""
    world = World()
    dirty = list[int]()

    def full(gpa: int, length: int) -> None:
        dirty.append(gpa)
        raise OSError(f"{length} bytes too many")

    world.clock.memory.on_dirty = full
    world.set(ONE_SHOT_TO_1, 10)
    world.set_time(1000)
    deliver = world.stimers.expire(1000)
    assert deliver is not None
    with pytest.raises(OSError, match="256"):
        deliver()
    assert world.vmm.notes == [("inject", 0, 0x51)]
    world.clock.memory.on_dirty = lambda gpa, _: dirty.append(gpa)
    world.set(ENABLE | by_message(2), 20)
    world.at(20)
    assert dirty == [PAGES[0] + 256, PAGES[0] + 512]


# Life


@pytest.mark.row("H-74")
def test_a_reset_stops_all_timers() -> None:
    """Their MSRs are 0, nothing is due, and no message waits any more."""
    world = World()
    for index in range(3):
        world.set(ONE_SHOT_TO_1, 10, index)
    world.set(ENABLE | PERIODIC | direct(0x90), 7, 3, 1)
    world.at(10)
    told = world.clock.timer_changes
    world.stimers.reset()
    assert world.clock.timer_changes > told
    assert {world.read(index, vcpu) for index in world.stimers.msrs for vcpu in range(2)} == {0}
    assert world.stimers.next_due_ns() is None
    world.write(EOM, 0)
    assert world.stimers.next_due_ns() is None
    assert world.stimers.expire(10**12) is None


@pytest.mark.row("H-72", "H-73")
def test_what_is_saved_goes_on_elsewhere() -> None:
    """A running one-shot timer, a periodic one on its grid, and messages that wait in their order."""
    world = World()
    world.set(ONE_SHOT_TO_1, 20, 1)
    world.set(ONE_SHOT_TO_1, 10, 0)
    world.set(ONE_SHOT_TO_1, 15, 2)
    world.at(20)
    world.set(ENABLE | PERIODIC | direct(0x90), 30, 0, 1)
    world.set(ENABLE | direct(0x91), 77, 1, 1)
    saved = world.saved()
    assert saved["stimer_due"] == (0, 20, 15, 0, 50, 77, 0, 0)
    assert saved["stimer_waiting"] == (2, 1)
    other = World()
    other.clock.memory.write(0, world.clock.memory.read(0, 0x10000))
    other.load(saved)
    assert other.saved() == saved
    assert other.stimers.next_due_ns() == 0
    assert other.at(55) == [(0, 0x51), (1, 0x90)]  # the first is sent again
    assert [other.take(0, 1), other.at(60), other.take(0, 1), other.at(77), other.take(0, 1)] == [
        Message(0, 10, 20),
        [(0, 0x51)],
        Message(2, 15, 60),
        [(1, 0x91), (0, 0x51)],
        Message(1, 20, 77),
    ]
    assert other.at(80) == [(1, 0x90)]


@pytest.mark.row("H-72")
@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("stimer_config", (1 << 20,) + (0,) * 7, "stimer_config"),
        ("stimer_config", (0,) * 7, "stimer_config"),
        ("stimer_count", (-1,) + (0,) * 7, "stimer_count"),
        ("stimer_due", (0,) * 8 + (0,), "stimer_due"),
        ("stimer_waiting", (8,), "stimer_waiting"),
        ("stimer_waiting", None, "stimer_waiting"),
        ("stimer_due", (11,) + (0,) * 7, "no guest"),  # a one-shot timer is due at its count
        ("stimer_due", (0, 19) + (0,) * 6, "no guest"),  # a periodic one not before
        ("stimer_due", (0, NEVER) + (0,) * 6, "no guest"),
        ("stimer_due", (0, 0, 5) + (0,) * 5, "no guest"),  # not enabled
        ("stimer_waiting", (0, 0), "no guest"),
        ("stimer_waiting", (1,), "sends none"),  # periodic
        ("stimer_waiting", (2,), "sends none"),  # not due
        ("stimer_waiting", (3,), "sends none"),  # direct
    ],
)
def test_what_was_never_saved_is_refused(name: str, value: object, why: str) -> None:
    """With an error that says so, and nothing changed."""
    world = World()
    world.set(ONE_SHOT_TO_1, 10, 0)
    world.set(ENABLE | PERIODIC | by_message(1), 20, 1)
    world.set(ENABLE | direct(0x90), 30, 3)
    before = world.stimers.save()
    with pytest.raises(ConfigError, match=why):
        world.stimers.checked({**before, name: value})
    assert world.stimers.save() == before


@pytest.mark.row("H-72")
def test_a_saved_state_may_come_as_lists() -> None:
    """As JSON has them."""
    world = World()
    world.set(ENABLE | PERIODIC | by_message(1), 20, 1)
    saved = world.stimers.save()
    world.stimers.checked({name: list(value) for name, value in saved.items() if isinstance(value, tuple)})()
    assert world.stimers.save() == saved
