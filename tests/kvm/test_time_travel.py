"""A machine's idle time is skipped: small guests, and why each rule of it is there.

The rules need a host that honours TSC offsets; elsewhere `make test-lab` runs those.  A stock Linux guest's days are in
test_stock_linux_travel.py.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Final

import pytest

from pvclock import (
    ConfigError,
    KvmError,
    Machine,
    MissingCapability,
    RangeError,
    StateError,
    TscOffsetNotHonoured,
    WrongType,
)
from pvclock.boot import BootSource
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.host.linux import host_clocksource
from pvclock.kvm import Vcpu
from pvclock.kvm._stats import VcpuStats
from pvclock.kvm.tsc_offset import TscOffsets
from pvclock.machine.guest_time import EngineTime, GuestTime, KernelTime, PageTime
from pvclock.machine.time_travel import Arrival, Look, Travel
from pvclock.machine.traveller import _snapshots
from pvclock.payloads import probe
from pvclock.payloads.hyperv_probe import TimerMode, read_expiries
from pvclock.timekeeping.event_timeline import EventTimeline
from pvclock.timekeeping.events import EventKind
from pvclock.timekeeping.travel import IdleForever, Skip, Stay, StayReason, WakeKind, decide
from tests.kvm.guests import COUNT
from tests.kvm.hyperv_guest import hyperv_machine
from tests.kvm.pc_guests import kernel
from tests.kvm.sleeping_guest import HALTED_FOR_GOOD, SleepingGuest, sleeping_guest
from tests.waiting import HANG_S, wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.row("E17")]

HOUR_NS: Final = 3600 * 10**9
HZ: Final = 10**9
"""About a TSC's frequency: for sleeps whose exact length does not matter."""
RATE: Final = 1000
WAIT_S: Final = 0.05
"""Much longer than a skip takes, on however busy a host."""
RATE_ERROR: Final = 1e-3
"""Of the TSC's nominal frequency, by which the engine counts, against the host's clock, which NTP steers: far less."""


def longest_ns(host_ns: int) -> float:
    """How much guest time passes at most while the host's clock says so, for which nothing is skipped."""
    return host_ns * (1 + RATE_ERROR) + 1000


def host_refuses(offsets: TscOffsets) -> type[Exception] | None:
    """What a machine that needs TSCs to move is refused by here."""
    return TscOffsetNotHonoured if offsets is TscOffsets.IGNORED else None


class Itinerary:
    """Events of a VMM's, each so much later than the last one, and the skips to them."""

    def __init__(self, machine: Machine, count: int, step_ns: int = HOUR_NS) -> None:
        self.arrivals: list[Arrival] = []
        self.due: list[int] = []
        self.were_out: list[bool] = []
        self._machine, self._left, self._step_ns = machine, count, step_ns
        self._next = machine.clock_service.now_ns() + step_ns
        machine.time_travel.next_event, machine.time_travel.on_arrival = self.next_event, self.arrived

    def next_event(self) -> int | None:
        """The next one; None after the last."""
        return self._next if self._left else None

    def arrived(self, arrival: Arrival) -> None:
        """Note it, if it was ours, and go on to the next."""
        if arrival.wake.kind is WakeKind.EVENT and arrival.arrives:
            self.arrivals.append(arrival)
            self.due.append(self._next)
            self.were_out.append(all(vcpu.get_mp_state() >= 0 for vcpu in self._machine.vcpus))  # else a StateError
            self._left -= 1
            self._next += self._step_ns


@pytest.fixture
def halted() -> Machine:
    """A machine with a guest that is halted for good, and no ticker."""
    return Machine(HALTED_FOR_GOOD, tick_interval_s=None)


def test_it_goes_to_the_vmms_events(halted: Machine) -> None:
    """Five hours of a halted guest: each skip ends at the event, never before it, and late by our own share at most."""
    with halted as machine:
        begun_ns = time.monotonic_ns()
        plan = Itinerary(machine, 5)
        machine.time_travel.enable()
        machine.start()
        wait_until(lambda: len(plan.arrivals) == 5)
        passed_ns = longest_ns(time.monotonic_ns() - begun_ns)
        log, clock = machine.time_travel.log, machine.clock
        assert machine.time_travel.failure is None
        assert all(plan.were_out)
        for due, arrival in zip(plan.due, plan.arrivals, strict=True):
            assert 0 <= arrival.guest_ns - due <= longest_ns(arrival.host_ns)
            assert arrival.skipped_ns > HOUR_NS - passed_ns
        assert machine.time_travel.recent == tuple(plan.arrivals)
        assert (log.skips, log.largest_ns) == (5, max(each.skipped_ns for each in plan.arrivals))
        assert log.skipped_ns == sum(each.skipped_ns for each in plan.arrivals)
        assert clock is not None
        skips = [event for event in clock.events.read(0).events if event.kind is EventKind.SKIP]
        assert len(skips) == 5
        timeline = EventTimeline(clock.events.read(0).events)
        now = clock.backend.stamps().tsc
        assert timeline.at(now) == clock.at(now)


def test_who_is_idle_for_ever_is_left_alone(halted: Machine) -> None:
    """A guest that waits for nothing is not looked at again, until the VMM has something for it.

    But for a vCPU whose thread, on a busy host, was only now kicked out of the guest by the look before: it has moved.
    """
    looks: list[Look] = []

    def is_left_alone() -> bool:
        told = len(looks)
        time.sleep(0.3)
        return len(looks) == told > 0 and isinstance(looks[-1].decision, IdleForever)  # else its vCPU has not begun

    with halted as machine:
        machine.time_travel.on_look = looks.append
        machine.time_travel.enable()
        machine.start()
        wait_until(is_left_alone, HANG_S / 2)
        assert machine.time_travel.log.is_idle_forever
        plan = Itinerary(machine, 1)
        machine.time_travel.notify()
        wait_until(lambda: len(plan.arrivals) == 1)


def test_a_hold(halted: Machine) -> None:
    """While the VMM waits for its host no time is skipped; a hold in a hold is two."""
    looks: list[Look] = []
    with halted as machine:
        travel, plan = machine.time_travel, Itinerary(machine, 1)
        travel.on_look = looks.append
        with travel.hold():
            with travel.hold():
                assert travel.holds == 2
                travel.enable()
                machine.start()
                wait_until(lambda: len(looks) > 0)
            assert travel.holds == 1
            travel.notify()
            wait_until(lambda: len(looks) > 1)
            assert {look.decision for look in looks} == {Stay(StayReason.HOLD)}
            wait_until(lambda: travel.log.stays[StayReason.HOLD] == len(looks))  # one may just be told of
        wait_until(lambda: len(plan.arrivals) == 1)


def test_what_a_skip_would_not_spare(halted: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that is shorter than the last skips took is left to pass."""
    for each in (EngineTime, PageTime):
        move = each.move

        def move_slowly(self: GuestTime, ticks: int, why: str, move: Callable[..., None] = move) -> None:
            time.sleep(2 * WAIT_S)
            move(self, ticks, why)

        monkeypatch.setattr(each, "move", move_slowly)
    with halted as machine:
        travel = machine.time_travel
        travel.next_event = lambda: machine.clock_service.now_ns() + int(WAIT_S * 1e9)
        travel.enable()
        machine.start()
        wait_until(lambda: travel.log.stays.get(StayReason.NEAR, 0) >= 3)
        assert travel.log.skips == 1


def test_until(halted: Machine) -> None:
    """It ends at the guest time that was set, on it, and guest time goes on by itself."""
    until_ns = 5 * HOUR_NS
    with halted as machine:
        machine.time_travel.enable(Travel(until_ns=until_ns))
        machine.start()
        travel = machine.time_travel
        wait_until(lambda: not travel.is_enabled or StayReason.NEAR in travel.log.stays)
        assert not travel.is_enabled
        assert travel.options == Travel(until_ns)
        last = travel.recent[-1]
        assert last.wake.kind is WakeKind.END
        assert until_ns <= last.guest_ns <= until_ns + longest_ns(last.host_ns)
        assert machine.clock_service.now_ns() >= until_ns


def test_the_highest_rate(halted: Machine) -> None:
    """Guest time is never ahead of the rate by more than a moment, whatever is to come."""
    with halted as machine:
        clock = machine.clock
        assert clock is not None
        due_ns = clock.now() + 1000 * 10**9
        machine.time_travel.next_event = lambda: due_ns
        machine.time_travel.enable(Travel(max_rate=RATE))
        before = clock.backend.stamps()
        machine.start()
        wait_until(lambda: clock.now() >= due_ns)  # by itself, if the last skip but one has almost come there
        guest_ns, passed_ns = clock.now(), clock.backend.stamps().raw_ns - before.raw_ns
        assert guest_ns <= RATE * (passed_ns + 50_000_000)
        assert machine.time_travel.log.skips > 1
        assert not machine.time_travel.recent[0].arrives


def test_a_guest_that_runs_is_left_alone() -> None:
    """No time is skipped for one that has something to do."""
    with Machine(COUNT, tick_interval_s=None) as machine:
        looks: list[Look] = []
        machine.time_travel.on_look = looks.append
        plan = Itinerary(machine, 1)
        machine.time_travel.enable()
        machine.start()
        wait_until(lambda: machine.time_travel.log.stays.get(StayReason.RUNS, 0) > 0)
        assert not plan.arrivals
        assert machine.time_travel.log.skips == 0


class KnownLock:
    """A lock that knows how often it was asked for."""

    def __init__(self) -> None:
        self.asked = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.asked += 1
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.fixture
def in_first_move(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What is put in here is called in the first skip, before it moves guest time."""
    calls: list[Callable[[], None]] = []

    def moving(move: Callable[..., None]) -> Callable[..., None]:
        def call_and_move(*arguments: object) -> None:
            if calls:
                calls.pop()()
            move(*arguments)

        return call_and_move

    for each in (EngineTime, PageTime):
        monkeypatch.setattr(each, "move", moving(each.move))
    return calls


def test_one_skip_at_a_time(halted: Machine, in_first_move: list[Callable[[], None]]) -> None:
    """enable() with other options while a skip is under way does not have the same wait skipped twice."""
    with halted as machine:
        travel, skipping = machine.time_travel, KnownLock()
        travel._skipping = skipping  # type: ignore[assignment]
        due_ns = machine.clock_service.now_ns() + HOUR_NS
        travel.next_event = lambda: due_ns if machine.clock_service.now_ns() < due_ns else None

        def enable_another() -> None:
            asked = skipping.asked
            travel.enable(Travel(max_rate=10**9))
            wait_until(lambda: skipping.asked > asked or travel.log.skips > 0)

        in_first_move.append(enable_another)
        travel.enable()
        machine.start()
        wait_until(lambda: machine.clock_service.now_ns() >= due_ns)
        travel.close()
        assert not in_first_move
        assert due_ns <= machine.clock_service.now_ns() < due_ns + HOUR_NS // 2
        assert travel.failure is None


def test_a_reset_waits_for_a_skip(
    halted: Machine, in_first_move: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a skip that has begun would write a timer of before into a vCPU that has been reset."""
    done: list[str] = []
    with halted as machine:
        travel, skipping, boot_anew = machine.time_travel, KnownLock(), machine._hardware.boot_anew
        travel._skipping = skipping  # type: ignore[assignment]
        resetting = threading.Thread(target=machine.reset)

        def begin_reset() -> None:
            asked = skipping.asked
            resetting.start()
            wait_until(lambda: skipping.asked > asked or bool(done))
            done.append("skip")

        def note_reset(source: BootSource) -> None:
            done.append("reset")
            boot_anew(source)

        monkeypatch.setattr(machine._hardware, "boot_anew", note_reset)
        Itinerary(machine, 1)
        machine.start()
        in_first_move.append(begin_reset)
        travel.enable()
        wait_until(lambda: not in_first_move)
        resetting.join()
        assert done == ["skip", "reset"]


@pytest.mark.parametrize("counts", ["nothing", "exits alone"])
def test_a_host_that_does_not_count(halted: Machine, monkeypatch: pytest.MonkeyPatch, counts: str) -> None:
    """It travels where KVM has no statistics (before Linux 5.14), and none of who blocks (before 5.17)."""

    class Stats:
        """Statistics of that host."""

        names = ("exits", "halt_exits")

        def __init__(self, vcpu: Vcpu) -> None:
            if counts == "nothing":
                raise KvmError("KVM_GET_STATS_FD", errno.ENOTTY)
            self._real = VcpuStats(vcpu)

        def read(self, name: str) -> int:
            """Count."""
            if name not in self.names:
                raise ConfigError(name)
            return self._real.read(name)

        def close(self) -> None:
            """Give it back."""
            self._real.close()

    monkeypatch.setattr("pvclock.machine.idle_watch.VcpuStats", Stats)
    with halted as machine:
        plan = Itinerary(machine, 3)
        machine.time_travel.enable()
        machine.start()
        wait_until(lambda: len(plan.arrivals) == 3 or not machine.time_travel.is_enabled)
        assert machine.time_travel.failure is None
        assert len(plan.arrivals) == 3


def test_a_pause_is_no_idle_time(halted: Machine) -> None:
    """Of a machine that is paused no time is skipped; after it there is."""
    with halted as machine:
        machine.start()
        machine.pause()
        plan = Itinerary(machine, 1)
        machine.time_travel.enable()
        machine.time_travel.notify()
        before = machine.clock_service.now_ns()
        machine.time_travel.disable()
        machine.time_travel.close()
        assert machine.clock_service.now_ns() == before
        machine.time_travel.enable()
        machine.resume()
        wait_until(lambda: len(plan.arrivals) == 1)


def test_it_goes_on_after_a_reset(halted: Machine) -> None:
    """It stays enabled over the end of a run, a reset and another start."""
    with halted as machine:
        machine.time_travel.enable()
        machine.start()
        first = Itinerary(machine, 1)
        machine.time_travel.notify()
        wait_until(lambda: len(first.arrivals) == 1)
        machine.stop()
        machine.reset()
        machine.start()
        second = Itinerary(machine, 1)
        machine.time_travel.notify()
        wait_until(lambda: len(second.arrivals) == 1)
        assert machine.time_travel.failure is None


def test_a_callback_that_fails(halted: Machine) -> None:
    """It ends the travel, and is found in `failure`; the machine goes on, and it can be enabled again."""

    def fail(_: object) -> None:
        raise RuntimeError("no such thing")

    with halted as machine:
        machine.time_travel.on_look = fail
        machine.time_travel.enable()
        machine.start()
        wait_until(lambda: not machine.time_travel.is_enabled)
        assert str(machine.time_travel.failure) == "no such thing"
        machine.time_travel.on_look = lambda _: None
        machine.time_travel.enable()
        assert machine.time_travel.failure is None
        plan = Itinerary(machine, 1)
        machine.time_travel.notify()
        wait_until(lambda: len(plan.arrivals) == 1)


def test_a_closed_machine_leaves_no_thread(halted: Machine) -> None:
    """Nor does one that is dropped."""
    with halted as machine:
        machine.time_travel.enable()
        machine.start()
    assert "pvclock-travel" not in {thread.name for thread in threading.enumerate()}
    dropped = Machine(HALTED_FOR_GOOD, time_travel=True)
    dropped.start()
    del dropped
    wait_until(lambda: "pvclock-travel" not in {thread.name for thread in threading.enumerate()})


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (1, WrongType),
        ("on", WrongType),
        (Travel(until_ns=-1), RangeError),
        (Travel(until_ns=1.5), WrongType),  # type: ignore[arg-type]
        (Travel(max_rate=Fraction(1, 2)), RangeError),
        (Travel(max_rate=float("inf")), RangeError),
        (Travel(max_rate=float("nan")), RangeError),
        (Travel(max_rate=10**400), RangeError),
        (Travel(max_rate=True), WrongType),
    ],
    ids=["int", "str", "negative", "float", "slow", "infinite", "nan", "huge", "bool"],
)
def test_arguments(wanted: object, error: type[Exception]) -> None:
    """What is no option is refused before anything is made."""
    with pytest.raises(error, match="time_travel"):
        Machine(HALTED_FOR_GOOD, time_travel=wanted)  # type: ignore[arg-type]


class Device:
    """A device where a PC has timers, which says nothing of its time."""

    name = "a timer of ours"

    def read(self, _at: int, length: int) -> bytes:
        """Nothing."""
        return bytes(length)

    def write(self, _at: int, _data: bytes) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Nothing."""


class DeviceInGuestTime(Device):
    """One that lives in its guest's."""

    in_guest_time = True


@pytest.mark.parametrize(
    ("place", "what"),
    [
        (lambda machine, device: machine.bus.add_ports(0x40, 4, device), "PIT"),
        (lambda machine, device: machine.bus.add_ports(0x70, 2, device), "RTC"),
        (lambda machine, device: machine.bus.add_mmio(0xFED00000, 0x400, device), "HPET"),
    ],
    ids=["pit", "rtc", "hpet"],
)
def test_timers_beside_guest_time(place: Callable[[Machine, Device], object], what: str) -> None:
    """A PIT, RTC or HPET that goes by the host's time is refused, also at start(), unless it says that it does not."""
    with Machine(HALTED_FOR_GOOD) as machine:
        place(machine, Device())
        with pytest.raises(StateError, match=f"{what}.*in_guest_time"):
            machine.time_travel.enable()
        assert what in str(machine.time_travel.why_not)
    with Machine(HALTED_FOR_GOOD, time_travel=True) as machine:
        place(machine, Device())
        with pytest.raises(StateError, match=what):
            machine.start()
    with Machine(HALTED_FOR_GOOD, time_travel=True) as machine:
        place(machine, DeviceInGuestTime())
        machine.start()
        assert machine.time_travel.why_not is None


def test_what_this_host_can_do(tsc_offsets: TscOffsets) -> None:
    """Without TSC offsets a guest of ours travels by its page; the kernel's clock, or a kernel, is refused, early."""
    refused = host_refuses(tsc_offsets)
    for image, options in ((HALTED_FOR_GOOD, {"clock": "kernel"}), (kernel(), {"platform": "pc"})):
        if options.get("clock") == "kernel" and host_clocksource() != "tsc":
            with pytest.raises(MissingCapability, match="master clock"):
                Machine(image, time_travel=True, **options)  # type: ignore[arg-type]
        elif refused is not None:
            with pytest.raises(refused, match="time travel"):
                Machine(image, time_travel=True, **options)  # type: ignore[arg-type]
        else:
            with Machine(image, time_travel=True, **options) as machine:  # type: ignore[arg-type]
                assert machine.time_travel.why_not is None
    with Machine(HALTED_FOR_GOOD, platform="pc", time_travel=True) as machine:
        assert machine.time_travel.is_enabled


@pytest.mark.usefixtures("offsets_are_honoured")
def test_execution_time_has_none_to_skip() -> None:
    """A clock that counts what the guest executes stands still while it is idle, and is refused."""
    with pytest.raises(StateError, match="executes"):
        Machine(HALTED_FOR_GOOD, backend=ExecutionTimeBackend, time_travel=True)


def test_statistics() -> None:
    """KVM's account of a vCPU can be read while it runs: a halted one blocks, and being stopped does not count."""
    with Machine(HALTED_FOR_GOOD) as machine, VcpuStats(machine.vcpus[0]) as stats:
        assert {"blocking", "exits"} <= set(stats.names)
        machine.start()
        wait_until(lambda: stats.read("blocking") == 1)
        exits = stats.read("exits")
        with machine.runner.quiesce():
            assert stats.read("blocking") == 0
        wait_until(lambda: stats.read("blocking") == 1)
        assert stats.read("exits") == exits
        with pytest.raises(ConfigError, match="blocking"):
            stats.read("blink")
        with pytest.raises(StateError, match="running"):
            VcpuStats(machine.vcpus[0])


@pytest.mark.parametrize("mode", [TimerMode(0), TimerMode.ONE_SHOT])
def test_timers_of_the_clock_interface(mode: TimerMode) -> None:
    """Hyper-V's synthetic timers, which the engine serves, come in order and never early, each after 100 s."""
    with hyperv_machine(f"expiries=20 period={100 * 10**7} timer={mode}", 2, time_travel=True) as machine:
        machine.start()
        assert machine.wait(HANG_S) == probe.EXIT_FINE
        assert machine.time_travel.failure is None
        for vcpu in (0, 1):
            expiries = read_expiries(machine.memory, vcpu)
            assert len(expiries) == 20
            assert all(each.expiration <= each.delivery <= each.seen for each in expiries if each.message_type)
        assert machine.clock_service.now_ns() >= 19 * 100 * 10**9
        assert WakeKind.CLOCK_TIMER in {arrival.wake.kind for arrival in machine.time_travel.recent}


# A guest's own timer


def test_a_deadline_stays_where_no_tsc_moves(tsc_offsets: TscOffsets) -> None:
    """There its sleep takes as long as ever, and the reason is told."""
    if tsc_offsets is not TscOffsets.IGNORED:
        pytest.skip("this host's KVM moves TSCs, so that a deadline does not stay")
    with sleeping_guest(HZ // 2) as guest:
        guest.machine.time_travel.enable()
        wait_until(lambda: StayReason.FIXED in guest.machine.time_travel.log.stays)
        assert guest.wake().late >= 0
        assert guest.machine.time_travel.log.skips == 0


@pytest.mark.parametrize("clock", ["engine", "kernel"])
def test_its_sleeps_take_no_time(clock: str, tsc_offsets: TscOffsets) -> None:
    """Twenty sleeps of an hour: it never wakes early, and is late by what we take, not by what was skipped.

    With the engine's clock also where the host does not trust its TSC.
    """
    if tsc_offsets is TscOffsets.IGNORED or (tsc_offsets is TscOffsets.STEERED and clock == "kernel"):
        pytest.skip("this host's KVM does not honour TSC offsets; `make test-lab` runs it on one that does")
    with sleeping_guest(3600 * HZ, clock=clock) as guest:
        guest.machine.time_travel.enable()
        wake = guest.wake(20)
        assert 0 <= wake.late < HZ * 60
        log = guest.machine.time_travel.log
        assert log.skips >= 19
        assert guest.machine.time_travel.failure is None


@contextmanager
def kept_asleep(guest: SleepingGuest) -> Iterator[tuple[int, Vcpu]]:
    """How far it is to the deadline of a guest that is asleep, and its vCPU, which stays out of the guest."""
    vcpu, end_s = guest.machine.vcpus[0], time.monotonic() + HANG_S
    while time.monotonic() < end_s:
        guest.wait_until_asleep()
        with guest.machine.runner.quiesce():
            decision = decide(_snapshots([vcpu]), vcpu.get_tsc_khz() * 1000)
            if isinstance(decision, Skip):  # else it was just about to wake
                yield decision.ticks, vcpu
                return
    raise AssertionError("it never slept")


@pytest.mark.usefixtures("offsets_are_honoured")
@pytest.mark.parametrize(
    ("order", "sleep_ticks"), [("offset, deadline", 3600 * HZ), ("offset", 2 * HZ), ("deadline, offset", 2 * HZ)]
)
def test_why_the_deadline_is_written_after_the_offset(order: str, sleep_ticks: int) -> None:
    """Only then does KVM time it anew: else the guest sleeps on for as long as if nothing had been skipped."""
    with sleeping_guest(sleep_ticks, tick_interval_s=None) as guest:
        with kept_asleep(guest) as (ticks, vcpu):
            number, deadline = guest.wake(0).number, vcpu.get_msr(0x6E0)
            for step in order.split(", "):
                if step == "offset":
                    vcpu.set_tsc_offset((vcpu.get_tsc_offset() + ticks) % 2**64)
                else:
                    vcpu.set_msr(0x6E0, deadline)
        late = guest.wake(number + 1).late
    assert late >= 0
    assert (late < ticks * 9 // 10) == (order == "offset, deadline")  # KVM lets a timer expire some us early


@pytest.mark.usefixtures("offsets_are_honoured", "tsc_is_trusted")
def test_why_the_tsc_is_moved_by_its_offset() -> None:
    """KVM takes a write of MSR 0x10 that is within a second of the last one for an attempt to synchronise vCPUs."""
    with Machine(HALTED_FOR_GOOD, tick_interval_s=None) as machine:
        vcpu = machine.vcpus[0]
        hz = vcpu.get_tsc_khz() * 1000
        vcpu.set_msr(0x10, vcpu.get_msr(0x10))
        offset = vcpu.get_tsc_offset()
        vcpu.set_msr(0x10, vcpu.get_msr(0x10) + hz // 2)
        assert abs(vcpu.get_tsc_offset() - offset) < hz // 4  # swallowed
        vcpu.set_tsc_offset(offset + hz // 2)
        assert vcpu.get_tsc_offset() == offset + hz // 2


@pytest.mark.usefixtures("offsets_are_honoured", "tsc_is_trusted")
def test_why_the_offset_is_measured() -> None:
    """Fifty skips of a minute leave the kernel's clock and the TSC together; by GET_CLOCK and a sum they part."""
    apart_ns = {}
    for is_measured in (True, False):
        with sleeping_guest(10**6 * HZ, clock="kernel") as guest:
            guest.wait_until_asleep()
            vm, vcpu = guest.machine.vm, guest.machine.vcpus[0]
            with guest.machine.runner.quiesce():
                hz = vcpu.get_tsc_khz() * 1000
                time = KernelTime(vm, [vcpu])
                first = vm.get_clock()
                first_tsc = first["host_tsc"] + vcpu.get_tsc_offset()
                for _ in range(50):
                    if is_measured:
                        time.move(60 * hz, "")
                    else:
                        vm.set_clock(vm.get_clock()["clock"] + 60 * 10**9)
                        vcpu.set_tsc_offset((vcpu.get_tsc_offset() + 60 * hz) % 2**64)
                last = vm.get_clock()
                tsc_ns = (last["host_tsc"] + vcpu.get_tsc_offset() - first_tsc) % 2**64 * 10**9 // hz
                apart_ns[is_measured] = abs(last["clock"] - first["clock"] - tsc_ns)
    assert apart_ns[True] <= 100
    assert apart_ns[False] > 10 * apart_ns[True]
    assert apart_ns[False] > 1000


@pytest.mark.usefixtures("offsets_are_honoured")
def test_why_a_requested_interrupt_keeps_time() -> None:
    """An interrupt that comes once the vCPU is out, as an IPI may, is in its IRR: skipped over, it would be late."""
    with sleeping_guest(3600 * HZ) as guest:
        guest.wait_until_asleep()
        with guest.machine.runner.quiesce():
            vcpu = guest.machine.vcpus[0]
            hz = vcpu.get_tsc_khz() * 1000
            assert isinstance(decide(_snapshots([vcpu]), hz), Skip)
            assert guest.machine.vm.signal_msi(0xFEE00000, 0x40)
            assert decide(_snapshots([vcpu]), hz) == Stay(StayReason.PENDING, 0)
        assert guest.wake().late < 0  # it was served at once, an hour before its deadline
