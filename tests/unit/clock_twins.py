"""Every operation of a clock, on twins: VMs on simulated hosts that are alike to the bit, and what is seen of them.

One twin does the operation undisturbed, the other is disturbed in it; then they are compared by what their guests, the
VMM and a saved state show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from pvclock import GuestClock, GuestMemory, SimulatedBackend, StateError
from pvclock.host.watch import Trouble, TroubleKind
from pvclock.meter.stress import republish
from pvclock.quantities import Gpa, HostTsc
from pvclock.readings import ClockLine, Sample
from pvclock.state.clock_state import ClockState
from pvclock.timekeeping.events import Event
from tests import oracle
from tests.unit.clocks import NS_PER_S, PAGES, SYSTEM_TIME
from tests.unit.faulty_host import Faults, failing_source, faulty
from tests.unit.test_host_watch import a_watch

HZ = 2_596_132_000
OTHER_PAGE, WALL_CLOCK, STEAL_TIMES = 0x2080, 0x3000, (0x4000, 0x4040)
OLD_SYSTEM_TIME, WALL_CLOCK_MSR, STEAL_TIME_MSR = 0x12, 0x4B564D00, 0x4B564D03
LATER_TICKS = (0, 1, HZ // 1000, HZ)


class Page(NamedTuple):
    """A page through its guest's eyes: its rate and flags, and what it reads now and later."""

    scale: tuple[int, int]
    flags: int
    reads: tuple[int, ...]


class Seen(NamedTuple):
    """All that guests, the VMM and a saved state show of a clock, but versions of pages."""

    state: ClockState
    events: tuple[Event, ...]
    pages: tuple[Page | None, ...]
    guest_tscs: tuple[tuple[int, ...], ...]
    host_offsets: tuple[int, ...]
    reads: tuple[object, ...]
    records: bytes
    now: tuple[ClockLine, int, Fraction, bool, Fraction]
    reference: object
    policies: object
    refused: object


@dataclass
class Twin:
    """A VM with two vCPUs, its host, and the faults that are to come."""

    backend: SimulatedBackend = field(
        default_factory=lambda: SimulatedBackend(HZ, 10**9, 10**12, 17 * 10**17, boot_id="twin")
    )
    faults: Faults = field(default_factory=Faults)
    reference_ahead_ns: int = 0

    def __post_init__(self) -> None:
        self.host = faulty(self.backend, self.faults)
        self.memory = GuestMemory(bytearray(1 << 16))
        self.clock = GuestClock(self.memory, 2, backend=self.host, tsc_offset=5)
        self.saved: ClockState | None = None
        self.troubles: list[Trouble] = []
        for vcpu in range(2):
            self.clock.write_msr(vcpu, SYSTEM_TIME, PAGES[vcpu] | 1)
        self.go_on()
        self.clock.refresh()
        self.memory.on_dirty = lambda _gpa, _length: self.faults.call("on_dirty")

    def go_on(self, ns: int = NS_PER_S) -> None:
        """Let host time pass."""
        self.backend.advance(ns=ns)

    def source(self) -> Callable[[], Sample]:
        """A source of samples that can fail, for follow()."""
        return failing_source(self.backend, self.faults, lambda: self.reference_ahead_ns)

    def follow_for(self, seconds: int, reference: object = "raw") -> None:
        """Follow a reference that is 50 ppm fast, with a tick each second."""
        self.clock.follow(reference)  # type: ignore[arg-type]  # a name or a source
        for _ in range(seconds):
            self.go_on()
            self.set_ahead(50_000)
            self.clock.tick()
        self.go_on()
        self.set_ahead(50_000)

    def set_ahead(self, ns: int) -> None:
        """Let the reference gain."""
        self.reference_ahead_ns += ns
        self.backend.ref_ns += ns  # type: ignore[assignment]  # a RefNs and an int

    def steal(self) -> None:
        """Both vCPUs' guests hear what is stolen from them, and something was."""
        for vcpu in range(2):
            self.clock.write_msr(vcpu, STEAL_TIME_MSR, STEAL_TIMES[vcpu] | 1)
            self.backend.run_delays_ns[vcpu] = 1000 + vcpu

    def seen(self) -> Seen:
        """What there is to see; nothing changes by that, but what the clock finds of its host."""
        clock, tsc = self.clock, self.backend.tsc
        self.faults.disarm()
        later = [HostTsc(tsc + ticks) for ticks in LATER_TICKS]
        guest_tscs = tuple(tuple(clock.guest_tsc(vcpu, each) for each in later) for vcpu in range(2))
        state = clock.save()
        return Seen(
            state,
            clock.events.read().events,
            tuple(self._page(state.vcpus[vcpu].time_page_gpa, guest_tscs[vcpu]) for vcpu in range(2)),
            guest_tscs,
            tuple(self.backend.tsc_offsets.get(vcpu, 0) for vcpu in range(2)),
            tuple(self._read(vcpu) for vcpu in range(2)),
            self.memory.read(WALL_CLOCK + 4, 8) + b"".join(self.memory.read(each, 8) for each in STEAL_TIMES),
            (clock.line, clock.now(), clock.rate, clock.is_paused, clock.skew_ns),
            (clock.reference, clock.steering),
            (clock.policy, clock.sleep_policy, clock.wall_clock),
            str(clock.refused_offset),
        )

    def goes_on(self) -> list[Seen]:
        """What is seen when the clock is used further: resumed if it stands, trusted, refreshed, paused, resumed."""
        found = []
        if self.clock.is_paused:
            self.clock.resume()
        self.clock.apply_host_findings([], tsc_trusted=True)
        found.append(self.seen())
        for operate in (self.clock.tick, self.clock.pause, lambda: self.clock.resume("advance"), self.clock.refresh):
            self.go_on()
            operate()
            found.append(self.seen())
        return found

    def _page(self, gpa: int | None, tscs: tuple[int, ...]) -> Page | None:
        if gpa is None:
            return None
        page = oracle.TimeInfo.parse(self.memory.read(gpa, 32))
        assert not page.is_being_updated
        reads = () if self.clock.is_paused else tuple(page.read(tsc) for tsc in tscs)
        return Page((page.tsc_to_system_mul, page.tsc_shift), page.flags, reads)

    def _read(self, vcpu: int) -> object:
        try:
            return self.clock.read(vcpu), self.clock.reading(vcpu).tsc
        except StateError as error:
            return str(error)


class Operation(NamedTuple):
    """prepare: what comes before.  operate: what is disturbed, and tried again if it was not done.

    in_steps: it is made of operations that each are whole or not begun; tried again, it goes on with the next one.
    """

    operate: Callable[[Twin], object]
    prepare: Callable[[Twin], object] = lambda _: None
    in_steps: bool = False


def paused(twin: Twin) -> None:
    """Pause, and let 5 s pass."""
    twin.clock.pause()
    twin.go_on(5 * NS_PER_S)


def restored(twin: Twin) -> None:
    """A clock restored on another host, from the twin's own state, with TSCs that are apart."""
    twin.clock.write_msr(1, 0x10, 10**15)
    twin.clock.pause()
    twin.saved = twin.clock.save()
    twin.go_on(3 * NS_PER_S)
    twin.backend.tsc = HostTsc(77)
    twin.backend.boot_id = "another"
    restore(twin)


def restore(twin: Twin) -> None:
    """Take over the memory with the clock that was saved."""
    assert twin.saved is not None
    twin.clock = GuestClock.restore(twin.saved, twin.memory, backend=twin.host)


def restore_and_resume(twin: Twin) -> None:
    """As a VMM does it, which begins where it stopped."""
    if twin.clock.events.read().events[-1].kind != "restore":
        restore(twin)
    twin.clock.resume("advance")


def saved(twin: Twin) -> None:
    """Pause and save."""
    twin.clock.pause()
    twin.saved = twin.clock.save()
    twin.go_on(3 * NS_PER_S)


def slewing(twin: Twin) -> None:
    """In the middle of a slew."""
    twin.clock.slew(10**6)
    twin.go_on()


def following(twin: Twin) -> None:
    """Follow a reference, and steal time."""
    twin.steal()
    twin.follow_for(6)


def following_a_source(twin: Twin) -> None:
    """Follow a source of the caller's, which has just turned, so that the next tick changes the rate."""
    twin.follow_for(6, twin.source())
    twin.set_ahead(10**6)


def slept(twin: Twin) -> None:
    """The host slept while the VM ran, and KVM moved the offsets."""
    twin.clock.sleep_policy = "slew"
    twin.backend.sleep(ns=7 * NS_PER_S, tsc="restarts, continued")


def stepped_back(twin: Twin) -> None:
    """The TSC went back."""
    twin.backend.tsc = HostTsc(twin.backend.tsc - HZ)


def apart(twin: Twin) -> None:
    """vCPU 1's TSC is ahead of vCPU 0's."""
    twin.clock.write_msr(1, 0x10, 10**15)


def troubled(twin: Twin) -> None:
    """The host's clocksource left tsc."""
    watch, host = a_watch()
    host.run(10**9)
    host.change_clocksource("hpet")
    twin.troubles = watch.check()
    assert {each.kind for each in twin.troubles} >= {TroubleKind.CLOCKSOURCE}


def by_profile(profile: str) -> Callable[[Twin], None]:
    """A new clock of that profile over the memory, its pages where they were, and vCPU 0's by the old MSR."""

    def prepare(twin: Twin) -> None:
        twin.clock = GuestClock(twin.memory, 2, backend=twin.host, tsc_offset=5, profile=profile)
        twin.clock.write_msr(1, SYSTEM_TIME, PAGES[1] | 1)
        twin.clock.write_msr(0, OLD_SYSTEM_TIME, PAGES[0] | 1)

    return prepare


def note(twin: Twin) -> None:
    """Tell the clock of trouble."""
    twin.clock.apply_host_findings(twin.troubles, tsc_trusted=False)


def guest_writes(index: int, value: int, vcpu: int = 0) -> Callable[[Twin], object]:
    """WRMSR by the guest."""
    return lambda twin: twin.clock.write_msr(vcpu, index, value)


def vmm_writes(index: int, value: int) -> Callable[[Twin], object]:
    """KVM_SET_MSRS by the VMM."""
    return lambda twin: twin.clock.host_write_msr(1, index, value)


def a_unit(profile: str) -> bytes:
    """VirtualBox's unit of a VM whose guest has its pages elsewhere."""
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 2, backend=SimulatedBackend(HZ), profile=profile)
    for vcpu in range(2):
        clock.write_msr(vcpu, SYSTEM_TIME, OTHER_PAGE + 64 * vcpu | 1)
    return clock.interface.save_unit()


def load_unit(profile: str = "linux") -> Callable[[Twin], object]:
    """Take a unit."""
    unit = a_unit(profile)
    return lambda twin: twin.clock.interface.load_unit(unit)


OPERATIONS: dict[str, Operation] = {
    "refresh": Operation(lambda twin: twin.clock.refresh()),
    "refresh of a vCPU": Operation(lambda twin: twin.clock.refresh(0)),
    "refresh in a slew": Operation(lambda twin: twin.clock.refresh(), slewing),
    "refresh after a sleep": Operation(lambda twin: twin.clock.refresh(), slept, in_steps=True),
    "refresh after a step back": Operation(lambda twin: twin.clock.refresh(), stepped_back, in_steps=True),
    "dilate after a step back": Operation(lambda twin: twin.clock.dilate(2), stepped_back, in_steps=True),
    "tick": Operation(lambda twin: twin.clock.tick(), Twin.steal, in_steps=True),
    "tick after raw": Operation(lambda twin: twin.clock.tick(), following, in_steps=True),
    "tick after a source": Operation(lambda twin: twin.clock.tick(), following_a_source, in_steps=True),
    "follow": Operation(lambda twin: twin.clock.follow("raw")),
    "follow no more": Operation(lambda twin: twin.clock.follow("off"), following),
    "dilate": Operation(lambda twin: twin.clock.dilate(1, 3)),
    "dilate, paused": Operation(lambda twin: twin.clock.dilate(1, 3), paused),
    "slew": Operation(lambda twin: twin.clock.slew(10**6)),
    "skip": Operation(lambda twin: twin.clock.skip(10**9)),
    "skip, paused": Operation(lambda twin: twin.clock.skip(10**9), paused),
    "offset": Operation(lambda twin: twin.clock.offset(10**9)),
    "pause": Operation(lambda twin: twin.clock.pause()),
    "pause while following": Operation(lambda twin: twin.clock.pause(), following_a_source),
    "pause in a slew": Operation(lambda twin: twin.clock.pause(), slewing),
    "resume, freeze": Operation(lambda twin: twin.clock.resume("freeze"), paused),
    "resume, advance": Operation(lambda twin: twin.clock.resume("advance"), paused),
    "resume, bounded": Operation(lambda twin: twin.clock.resume("advance:max_ns=7"), paused),
    "resume, slew": Operation(lambda twin: twin.clock.resume("slew"), paused),
    "resume, table": Operation(lambda twin: twin.clock.resume("virtualbox"), paused),
    "reset": Operation(lambda twin: twin.clock.reset(), apart),
    "reset, paused": Operation(lambda twin: twin.clock.reset(), paused),
    "VMM writes TSC": Operation(vmm_writes(0x10, 10**15)),
    "VMM writes ADJUST": Operation(vmm_writes(0x3B, 77)),
    "VMM writes AUX": Operation(vmm_writes(0xC0000103, 7)),
    "VMM writes TSC, restored": Operation(vmm_writes(0x10, 10**15), restored),
    "guest writes TSC": Operation(guest_writes(0x10, 10**15)),
    "guest writes ADJUST": Operation(guest_writes(0x3B, 77)),
    "guest writes AUX": Operation(guest_writes(0xC0000103, 7)),
    "guest moves its page": Operation(guest_writes(SYSTEM_TIME, OTHER_PAGE | 1)),
    "guest writes its page by the old MSR": Operation(guest_writes(OLD_SYSTEM_TIME, OTHER_PAGE | 1)),
    "guest writes a page across two pages by the old MSR": Operation(guest_writes(OLD_SYSTEM_TIME, 0x2FF0 | 1)),
    "guest moves its page by profile document": Operation(
        guest_writes(SYSTEM_TIME, OTHER_PAGE | 1), by_profile("document")
    ),
    "guest moves its page by profile virtualbox": Operation(
        guest_writes(SYSTEM_TIME, OTHER_PAGE | 1), by_profile("virtualbox")
    ),
    "guest disables all pages by profile virtualbox": Operation(guest_writes(SYSTEM_TIME, 0), by_profile("virtualbox")),
    "guest disables its page": Operation(guest_writes(SYSTEM_TIME, 0)),
    "guest writes wall clock": Operation(guest_writes(WALL_CLOCK_MSR, WALL_CLOCK)),
    "guest writes steal time": Operation(guest_writes(STEAL_TIME_MSR, STEAL_TIMES[0] | 1)),
    "repair_tsc": Operation(lambda twin: twin.clock.repair_tsc(), apart),
    "save": Operation(lambda twin: twin.clock.save()),
    "restore": Operation(restore, saved),
    "restore and resume": Operation(restore_and_resume, saved, in_steps=True),
    "resume, restored": Operation(lambda twin: twin.clock.resume("advance"), restored),
    "load a unit": Operation(load_unit()),
    "load a unit, paused": Operation(load_unit(), paused),
    "load a unit by profile virtualbox": Operation(load_unit("virtualbox"), by_profile("virtualbox")),
    "term": Operation(lambda twin: twin.clock.interface.term()),
    "note": Operation(note, troubled),
    "place_time_page": Operation(lambda twin: twin.clock.interface.provider.clock.place_time_page(0, Gpa(OTHER_PAGE))),
    "republish": Operation(lambda twin: republish(twin.clock, 3, [Fraction(1), Fraction(1, 3)])),
}
"""Each operation of GuestClock that changes something, or takes something, where it has something to do."""


class Undisturbed:
    """What an operation is when nothing disturbs it: what was seen before, after, and in further use."""

    def __init__(self, name: str) -> None:
        self.operation = OPERATIONS[name]
        self.before = twin_before(name).seen()  # another one's: save() itself acts on a host that is not well
        twin = twin_before(name)
        twin.faults.calls.clear()
        self.operation.operate(twin)
        self.calls = dict(twin.faults.calls)
        self.after = twin.seen()
        self.later = twin.goes_on()

    def check(self, twin: Twin, found: Seen | None = None) -> None:
        """A twin that was disturbed in it, by something that is over: whole and recorded, or not begun.

        found: what was seen of it just now, if that was seen.
        """
        found = twin.seen() if found is None else found
        if found != self.after:
            assert found == self.before or (self.operation.in_steps and self._is_a_step(found))
            self.operation.operate(twin)
            assert twin.seen() == self.after
        assert twin.goes_on() == self.later

    def _is_a_step(self, found: Seen) -> bool:
        return found.events == self.after.events[: len(found.events)]


def twin_before(name: str) -> Twin:
    """A twin that is about to do that operation."""
    twin = Twin()
    OPERATIONS[name].prepare(twin)
    return twin


def runs_on(twin: Twin) -> None:
    """A paused clock runs for a while, to the tick."""
    begin = twin.clock.at(twin.backend.tsc)
    report = twin.clock.run_for(NS_PER_S, "freeze")
    assert 0 <= report.overshoot_ns < 1
    assert twin.clock.at(twin.backend.tsc) == begin + report.ran_ns
    assert twin.clock.is_paused
