"""A guest clock that follows a reference, in simulated time: what a guest reads, tick by tick."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import pytest

from pvclock import (
    ConfigError,
    GuestClock,
    GuestMemory,
    HostTsc,
    RangeError,
    Reference,
    Sample,
    SimulatedBackend,
    WrongType,
)
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.meter.stress import republish
from pvclock.timekeeping.discipline import SteeringState
from pvclock.timekeeping.events import EventKind
from tests import oracle
from tests.unit.clocks import MAX_AGE_NS, NS_PER_S, PAGES, SYSTEM_TIME, bound_ns, guest_ns, page_of, shown
from tests.waiting import HANG_S

HZ = 2_596_132_000
PPB = Fraction(1, 10**9)


class Vm:
    """A clock on a simulated host whose reference runs `ppb` off its TSC's nominal rate."""

    def __init__(self, ppb: Fraction | int, hz: int = HZ, *, vcpus: int = 1) -> None:
        self.backend = SimulatedBackend(hz, tsc=10**12, ref_ns=10**15, realtime_ns=10**18)
        self.memory = GuestMemory(bytearray(1 << 16))
        self.clock = GuestClock(self.memory, vcpus, backend=self.backend)
        for vcpu in range(vcpus):
            self.clock.write_msr(vcpu, SYSTEM_TIME, PAGES[vcpu] | 1)
        self.off = ppb * PPB
        self._extra_ns = Fraction(0)

    def pass_time(self, ns: int = NS_PER_S) -> None:
        """Let host time go on, and the reference with it, at its own rate."""
        self.backend.advance(ns=ns)
        self._extra_ns += ns * self.off
        whole = self._extra_ns.__floor__()
        self._extra_ns -= whole
        self.backend.ref_ns += whole  # type: ignore[assignment]  # a RefNs and an int
        self.backend.realtime_ns += whole

    def tick(self) -> int:
        """Tick the clock; by how much a guest's reading stepped, in ns."""
        before = self.clock.read(0)
        self.clock.tick()
        return self.clock.read(0) - before

    def lag_ns(self, since: tuple[Fraction, int]) -> float:
        """How much more the reference than the guest's time has gone on since then, by the timeline."""
        exact_ns, ref_ns = since
        return float(self.backend.ref_ns - ref_ns - (self.clock.at(self.backend.tsc) - exact_ns))

    @property
    def now(self) -> tuple[Fraction, int]:
        """The timeline's guest time and the reference, at this instant."""
        return self.clock.at(self.backend.tsc), self.backend.ref_ns

    @property
    def guest_ns(self) -> int:
        """What vCPU 0's guest reads now."""
        return guest_ns(self.backend, self.memory)

    @property
    def page_rate(self) -> Fraction:
        """How fast vCPU 0's page lets time pass, by its own mul and shift; at most 0.47 ppb below the clock's rate."""
        page = page_of(self.clock)
        return oracle.scale_rate(page.tsc_to_system_mul, page.tsc_shift) * self.backend.tsc_hz / NS_PER_S


@pytest.mark.row("E11", "K-15")
def test_a_hundred_thousand_ticks() -> None:
    """28 h at a tick a second, 66.8 ppb off: guests step by 0 or 1 ns at each, stay with timeline and reference."""
    vm = Vm(Fraction(668, 10), vcpus=2)
    vm.clock.follow("raw")
    begin = vm.now
    for tick in range(100_000):
        assert vm.tick() in (0, 1)
        if tick % 100 == 99:
            page, exact = page_of(vm.clock), vm.clock.at(vm.backend.tsc)
            age_ticks = vm.backend.tsc - page.tsc_timestamp
            for vcpu in range(2):
                error_ns = shown(vm.memory, vcpu, vm.backend.tsc) - exact
                assert abs(error_ns) <= bound_ns(page, vm.clock.rate * NS_PER_S / HZ, age_ticks)
            assert shown(vm.memory, 0, vm.backend.tsc) == shown(vm.memory, 1, vm.backend.tsc)
            assert vm.memory.read(PAGES[0] + 24, 5) == vm.memory.read(PAGES[1] + 24, 5)  # mul and shift
            assert abs(vm.lag_ns(begin)) < 100
        vm.pass_time()
    assert vm.clock.steering is not None
    assert vm.clock.steering.state is SteeringState.LOCKED
    assert abs(vm.clock.steering.rate.value - 66.8e-9) < 1e-13
    rates = [event for event in vm.clock.events.read().events if event.kind is EventKind.RATE]
    assert 2 <= len(rates) < 200
    assert all(event.jump_ns == 0 for event in rates)


@pytest.mark.row("E11")
@pytest.mark.parametrize("hz", [2_596_132_001, 999_999_937, 19_200_000, 4_294_967_291])
def test_any_frequency(hz: int) -> None:
    """A TSC of odd Hz, whose rate and a correction have no common terms, follows as well as another."""
    vm = Vm(-31, hz)
    vm.clock.follow(Reference.MONOTONIC)
    begin, begin_ns = vm.now, vm.guest_ns
    for _ in range(300):
        assert vm.tick() in (0, 1)
        vm.pass_time()
    assert abs(vm.lag_ns(begin)) < 31 + 10**9 / hz
    assert abs(vm.backend.ref_ns - begin[1] - (vm.guest_ns - begin_ns)) < 33 + 10**9 / hz


@pytest.mark.row("E11", "E2")
@pytest.mark.parametrize("step_ns", [NS_PER_S // 100, -NS_PER_S // 100])
def test_a_host_step_becomes_a_slew(step_ns: int) -> None:
    """UTC is set on the host: guests follow at 500 ppm, never back, and all their clocks with them."""
    vm = Vm(0)
    vm.clock.follow("realtime")
    for _ in range(5):
        vm.tick()
        vm.pass_time()
    begin = vm.guest_ns, vm.backend.realtime_ns
    vm.backend.realtime_ns += step_ns
    for _ in range(60):
        before_ns = vm.guest_ns
        assert vm.tick() in (0, 1)
        vm.pass_time()
        assert abs(vm.guest_ns - before_ns - NS_PER_S) <= 500_000 + 2
    assert abs(vm.backend.realtime_ns - begin[1] - (vm.guest_ns - begin[0])) < 20


@pytest.mark.row("E11", "E12")
@pytest.mark.parametrize("operation", ["dilate", "skip", "offset", "slew", "pause", "republish"])
def test_other_operations_leave_it_on_course(operation: str) -> None:
    """Whatever else a VMM does to guest time, the host time under it goes on with the reference."""
    vm = Vm(5000)
    vm.clock.follow("raw")
    for _ in range(50):
        vm.tick()
        vm.pass_time()
    operations: dict[str, Callable[[], object]] = {
        "dilate": lambda: vm.clock.dilate(355, 113),
        "skip": lambda: vm.clock.skip(10**10),
        "offset": lambda: vm.clock.offset(123),
        "slew": lambda: vm.clock.slew(-1000, 500),
        "pause": vm.clock.pause,
        "republish": lambda: republish(vm.clock, 100, [Fraction(1), Fraction(3, 7), Fraction(1)]),
    }
    operations[operation]()
    for _ in range(10):
        vm.clock.tick()
        vm.pass_time()
    if operation == "pause":
        missed_ns = vm.clock.resume("advance").step_ns
        assert abs(missed_ns - 10 * NS_PER_S * (1 + 5000 * PPB)) < 10  # what the reference missed, not what the TSC did
    vm.clock.tick()
    begin_ns, ref_ns = vm.guest_ns, vm.backend.ref_ns
    for _ in range(10):
        vm.pass_time()
        vm.clock.tick()
    dilation = Fraction(355, 113) if operation == "dilate" else Fraction(1)
    assert abs(vm.guest_ns - begin_ns - (vm.backend.ref_ns - ref_ns) * dilation) < 10
    assert vm.clock.steering is not None
    assert vm.clock.steering.state is SteeringState.LOCKED
    assert abs(vm.clock.steering.error_ns) < 3
    assert vm.clock.rate == vm.clock.dilation * (1 + vm.clock.steering.frequency_adjustment)


@pytest.mark.row("E11", "K-15")
def test_off_is_the_nominal_rate() -> None:
    """Without a reference the page is Linux's to the bit; after one, "off" goes back to that without a step."""
    vm = Vm(5000, vcpus=2)
    nominal = oracle.time_scale(NS_PER_S, HZ)

    def pages() -> list[tuple[int, int]]:
        found = [page_of(vm.clock, vcpu) for vcpu in range(2)]
        return [(page.tsc_to_system_mul, page.tsc_shift) for page in found]

    assert (vm.clock.reference, vm.clock.tick()) == ("off", None)
    assert pages() == [nominal, nominal]
    vm.clock.follow("raw")
    for _ in range(5):
        vm.tick()
        vm.pass_time()
    assert abs(vm.page_rate - 1 - 5000 * PPB) < 500 * PPB  # it works off what it missed, too
    assert vm.clock.reference == "raw"
    before = vm.guest_ns
    vm.clock.follow("off")
    assert vm.guest_ns - before in (0, 1)
    assert vm.clock.tick() is None
    assert vm.clock.rate == 1
    assert pages() == [nominal, nominal]


@pytest.mark.row("E11", "E13")
def test_an_injected_source() -> None:
    """A source of the caller's is followed like any other; what it raises comes out, and the clock goes on."""
    vm = Vm(0)
    vm.clock.follow(lambda: Sample(vm.backend.tsc, vm.backend.ref_ns + vm.backend.ref_ns // 10**6, 5.0))
    begin = vm.now
    for _ in range(30):
        vm.tick()
        vm.pass_time()
    assert vm.clock.reference == "injected"
    assert vm.lag_ns(begin) == pytest.approx(-30_000, abs=1100)

    def broken() -> Sample:
        raise OSError("the source is gone")

    vm.clock.follow(broken)
    before = vm.clock.line, page_of(vm.clock).version
    with pytest.raises(OSError, match="gone"):
        vm.clock.tick()
    assert (vm.clock.line, page_of(vm.clock).version) == (before[0], before[1] + 2)  # published all the same


class Unreliable:
    """A source that gives samples of the VM's reference, within 100 ns, until it fails."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.failure: Exception | None = None

    def __call__(self) -> Sample:
        """A sample, or what fails."""
        if self.failure is not None:
            raise self.failure
        return Sample(self._vm.backend.tsc, self._vm.backend.ref_ns, 100.0)


def refusals(vm: Vm) -> list[str]:
    """What the events of the clock say was refused."""
    return [event.why for event in vm.clock.events.read().events if event.kind is EventKind.REFUSED]


@pytest.mark.row("E11", "E13")
def test_a_source_without_samples_is_held_over() -> None:
    """From the third tick on that is the state, and an event, once; the error's bound grows with time."""
    vm = Vm(0)
    source = Unreliable(vm)
    vm.clock.follow(source)
    for _ in range(100):
        vm.tick()
        vm.pass_time()
    locked = vm.clock.steering
    assert locked is not None
    assert locked.state is SteeringState.LOCKED
    source.failure = OSError("the source is gone")
    bounds_ns = []
    for tick in range(1000):
        with pytest.raises(OSError, match="gone"):
            vm.clock.tick()
        found = vm.clock.steering
        assert found is not None
        if tick < 2:
            assert found == locked
        else:
            assert found.state is SteeringState.HOLDOVER
            bounds_ns.append(found.bound_ns)
        vm.pass_time()
    assert bounds_ns == sorted(set(bounds_ns))
    assert bounds_ns[-1] > 10 * locked.bound_ns
    (why,) = refusals(vm)
    assert {"injected", "OSError", "3"} <= set(re.findall(r"\w+", why))
    assert vm.clock.rate == 1 + locked.frequency_adjustment
    source.failure = None
    for _ in range(5):
        vm.tick()
        vm.pass_time()
    assert vm.clock.steering is not None
    assert vm.clock.steering.state is SteeringState.LOCKED
    assert vm.clock.steering.bound_ns < 1000


@pytest.mark.row("E11", "E13")
def test_one_tick_or_two_without_a_sample_are_none() -> None:
    """Only ticks in a row count: what gives a sample now and then is followed, without a word."""
    vm = Vm(0)
    source = Unreliable(vm)
    vm.clock.follow(source)
    for tick in range(60):
        source.failure = OSError("gone") if tick % 3 else None
        if source.failure:
            with pytest.raises(OSError, match="gone"):
                vm.clock.tick()
        else:
            vm.tick()
        vm.pass_time()
    assert vm.clock.steering is not None
    assert vm.clock.steering.state is SteeringState.LOCKED
    assert refusals(vm) == []


@pytest.mark.row("E11", "E13")
def test_a_source_that_never_gave_a_sample() -> None:
    """Nothing is known of the error then, and holdover says so."""
    vm = Vm(0)
    source = Unreliable(vm)
    source.failure = OSError("gone")
    vm.clock.follow(source)
    for _ in range(3):
        assert vm.clock.steering is None
        with pytest.raises(OSError, match="gone"):
            vm.clock.tick()
        vm.pass_time()
    assert vm.clock.steering is not None
    assert vm.clock.steering.state is SteeringState.HOLDOVER
    assert math.isnan(vm.clock.steering.error_ns)
    assert vm.clock.steering.bound_ns == math.inf


@pytest.mark.row("E11", "E13")
@pytest.mark.parametrize(
    ("sample", "error", "said"),
    [
        ((1, 2, 3.0), WrongType, {"injected", "tuple", "Sample"}),
        (Sample(HostTsc(1), 2, math.inf), RangeError, {"injected", "2", "inf"}),
    ],
)
def test_what_is_no_sample_is_an_event(sample: Sample, error: type[Exception], said: set[str]) -> None:
    """At the first tick, and once: a ticker's clock raises it where nobody may look."""
    vm = Vm(0)
    vm.clock.follow(lambda: sample)
    for _ in range(2):
        with pytest.raises(error):
            vm.clock.tick()
    (why,) = refusals(vm)
    assert said <= set(re.findall(r"\w+", why))


@pytest.mark.row("E11", "E13")
def test_what_cannot_be_followed() -> None:
    """Unknown references and bounds are errors that say what can be, and the old reference stays."""
    vm = Vm(0)
    vm.clock.follow("raw")
    for wrong in ("tai", "", "RAW"):
        with pytest.raises(ConfigError, match="it can be off, raw, monotonic, realtime"):
            vm.clock.follow(wrong)
    with pytest.raises(RangeError, match="max_ppm"):
        vm.clock.follow("monotonic", max_ppm=0)
    with pytest.raises(RangeError, match="max_ppm"):
        vm.clock.follow("off", max_ppm=0)
    assert vm.clock.reference == "raw"
    with pytest.raises(ConfigError):
        GuestClock(vm.memory, backend=vm.backend, reference="tai")
    assert GuestClock(vm.memory, backend=vm.backend, reference="raw").reference == "raw"


@pytest.mark.row("E11")
def test_a_late_tick_loses_nothing() -> None:
    """A VMM that was away for a day: the page has drifted by mul's quantum, and comes back by 1 ns a publish."""
    vm = Vm(Fraction(668, 10))
    vm.clock.follow("raw")
    for _ in range(100):
        vm.tick()
        vm.pass_time()
    begin = vm.now
    vm.pass_time(86_400 * NS_PER_S)
    assert -2 < vm.clock.at(vm.backend.tsc) - vm.guest_ns < 86_400 * Fraction(47, 100) + 2
    assert abs(vm.lag_ns(begin)) < 86_400 * 0.1
    for _ in range(100):
        assert vm.tick() in (0, 1)
        vm.pass_time(MAX_AGE_NS)
    assert abs(vm.lag_ns(begin)) < 50


@pytest.mark.row("E11", "E9")
@pytest.mark.parametrize("back_s", [0.5, 60.0])
def test_a_tsc_that_goes_back(back_s: float) -> None:
    """A host whose TSC was reset: guests go on from the last publish, timeline and pages stay one, and it is told."""
    vm = Vm(Fraction(668, 10))
    vm.pass_time(600 * NS_PER_S)
    vm.clock.follow("raw")
    for _ in range(10):
        vm.tick()
        vm.pass_time()
    vm.clock.tick()
    begin_ns = newest = vm.guest_ns
    vm.backend.tsc = HostTsc(vm.backend.tsc - int(back_s * HZ))
    for second in range(300):
        vm.clock.tick()
        assert vm.guest_ns - newest in (0, 1, 2)
        assert abs(vm.guest_ns - vm.clock.at(vm.backend.tsc)) <= 2
        assert abs(vm.guest_ns - begin_ns - second * NS_PER_S) < 25_000  # at most 67 ppb of 300 s are at stake
        vm.pass_time()
        newest = vm.guest_ns
    assert EventKind.TSC_STEP in {event.kind for event in vm.clock.events.read().events}
    vm.clock.pause()
    moved = GuestClock.restore(vm.clock.save(), vm.memory, backend=vm.backend)
    moved.resume("advance")
    assert vm.guest_ns - newest in (0, 1, 2)


def slewing(vm: Vm, step_ns: int = NS_PER_S) -> None:
    """Have the clock of `vm` work off a step of the host's UTC."""
    for _ in range(10):
        vm.tick()
        vm.pass_time()
    vm.backend.realtime_ns += step_ns
    for _ in range(6):
        vm.tick()
        vm.pass_time()
    assert vm.clock.steering is not None
    assert vm.clock.steering.state is SteeringState.SLEWING


@pytest.mark.row("E11", "E9")
def test_without_samples_the_rate_is_kept() -> None:
    """A source that fails in mid-slew: the clock goes on at the rate that it knows, and its slews and pages go on."""
    vm = Vm(0)
    fails = [False]

    def source() -> Sample:
        if fails[0]:
            raise OSError("gone")
        return Sample(vm.backend.tsc, vm.backend.realtime_ns, 20.0)

    vm.clock.follow(source)
    slewing(vm, NS_PER_S // 100)
    fails[0] = True
    begin, version = vm.guest_ns, page_of(vm.clock).version
    vm.clock.slew(1_000_000)
    for _ in range(60):
        with pytest.raises(OSError, match="gone"):
            vm.clock.tick()
        vm.pass_time()
    assert page_of(vm.clock).version >= version + 120
    assert abs(vm.guest_ns - begin - 60 * NS_PER_S - 1_000_000) < 10


@pytest.mark.row("E1", "E11")
def test_a_pause_is_counted_at_the_known_rate() -> None:
    """A clock that is paused in mid-slew for a day, and told it all at resume: no part of the slew is in that."""
    vm = Vm(0)
    vm.clock.follow("realtime")
    slewing(vm)
    begin_ns = vm.guest_ns
    vm.clock.pause()
    vm.pass_time(86_400 * NS_PER_S)
    assert vm.clock.resume("advance").step_ns == 86_400 * NS_PER_S
    assert abs(vm.guest_ns - begin_ns - 86_400 * NS_PER_S) <= 1


@pytest.mark.row("E23", "E11")
@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("policy", ["freeze", "advance"])
@pytest.mark.parametrize("tsc", ["stops", "restarts", "counts on"])
@pytest.mark.parametrize("reference", ["raw", "realtime"])
def test_a_sleep_is_counted_once(
    reference: str, tsc: Literal["stops", "restarts", "counts on"], policy: str, *, paused: bool
) -> None:
    """What a host slept is a guest's as the policy says, or its TSC, and not once more or less by what is followed."""
    vm, slept_ns = Vm(0), 100 * NS_PER_S
    vm.clock.follow(reference)
    vm.clock.sleep_policy = policy
    for _ in range(10):
        vm.pass_time()
        vm.clock.tick()
    begin = vm.guest_ns
    if paused:
        vm.clock.pause()
    vm.backend.sleep(ns=slept_ns, tsc=tsc)
    if paused:
        vm.clock.resume(policy)
    for _ in range(30):
        vm.pass_time()
        vm.clock.tick()
    has_it = policy == "advance" or (tsc == "counts on" and not paused)
    off_ns = vm.guest_ns - begin - 30 * NS_PER_S - (slept_ns if has_it else 0)
    assert abs(off_ns) < (80 if tsc == "counts on" else 10)  # 0.47 ppb of the sleep, which come back by 1 ns a tick
    assert vm.clock.steering is not None
    assert vm.clock.steering.state is SteeringState.LOCKED


@pytest.mark.row("E11")
def test_another_reference_begins_at_the_known_rate() -> None:
    """Following another clock in mid-slew, or within a lower max_ppm: the slew ends, and the bound is kept at once."""
    vm = Vm(5000)
    vm.clock.follow("realtime")
    slewing(vm)
    vm.clock.follow("monotonic")
    assert abs(vm.page_rate - 1 - 5000 * PPB) < 10 * PPB
    vm.clock.follow("raw", max_ppm=1)
    assert 0 <= Fraction(1, 10**6) - (vm.page_rate - 1) < 1 * PPB


@pytest.mark.row("E11", "P-08")
def test_unslaved_time_follows_no_clock() -> None:
    """Where time passes only while the guest executes, a reference is refused: it would show the VMM's time."""
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), backend=ExecutionTimeBackend(SimulatedBackend(HZ)))
    with pytest.raises(ConfigError, match="only while the guest executes"):
        clock.follow("raw")
    clock.follow("off")
    assert clock.reference == "off"


@pytest.mark.row("E11")
def test_a_source_may_take_its_time() -> None:
    """While a source waits, the clock can be read and changed by others; one that ends the following is no error."""
    vm = Vm(0)

    def ends_it() -> Sample:
        other = threading.Thread(target=vm.clock.skip, args=(5,))
        other.start()
        other.join(HANG_S)
        assert not other.is_alive()
        vm.clock.follow("off")
        return Sample(vm.backend.tsc, vm.backend.ref_ns, 1.0)

    vm.clock.follow(ends_it)
    assert vm.clock.tick() is None
    assert vm.clock.reference == "off"


@pytest.mark.row("E11", "E13")
@pytest.mark.parametrize(
    ("ns", "bound_ns"), [(0, math.inf), (0, math.nan), (0, -1.0), (1 << 63, 1.0), (-(10**400), 1.0)]
)
def test_samples_that_are_none(ns: int, bound_ns: float) -> None:
    """A sample without a bound, or beyond any clock, is an error that names it, and the clock goes on."""
    vm = Vm(0)
    vm.clock.follow(lambda: Sample(vm.backend.tsc, ns, bound_ns))
    begin_ns = vm.guest_ns
    for second in range(2):
        with pytest.raises(RangeError, match=f"{bound_ns}"):
            vm.clock.tick()
        assert abs(vm.guest_ns - begin_ns - second * NS_PER_S) <= 1
        vm.pass_time()


def in_time(*threads: threading.Thread) -> bool:
    """Do they all end?"""
    for thread in threads:
        thread.join(HANG_S)
    return not any(thread.is_alive() for thread in threads)


class HeldSource:
    """A source whose first sample, by another thread than this one, waits to be let go."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.sampling, self.go_on = threading.Event(), threading.Event()
        self.calls = 0

    def __call__(self) -> Sample:
        """Sample."""
        self.calls += 1
        if self.calls == 1:
            self.sampling.set()
            assert self.go_on.wait(HANG_S)
        return Sample(self.vm.backend.tsc, self.vm.backend.ref_ns, 10.0)


@pytest.mark.row("E9")
@pytest.mark.parametrize("call", ["tick", "follow", "tick and follow"])
def test_an_on_dirty_that_ticks_meets_a_tick_at_its_sample(call: str) -> None:
    """One holds the clock's lock and wants to tick or follow, the other samples and wants the lock: both end."""
    vm = Vm(0)
    source, told = HeldSource(vm), list[int]()
    vm.clock.follow(source)
    sampling = threading.Thread(target=vm.clock.tick, daemon=True)
    sampling.start()
    assert source.sampling.wait(HANG_S)

    def on_dirty(gpa: int, _length: int) -> None:
        if threading.current_thread() is not skipping or told:
            return
        told.append(gpa)
        source.go_on.set()
        sampling.join(0.1)  # it gets as far as the clock's lock
        if "tick" in call:
            vm.clock.tick()
        if "follow" in call:
            vm.clock.follow("raw")

    vm.memory.on_dirty = on_dirty
    skipping = threading.Thread(target=vm.clock.skip, args=(1,), daemon=True)
    skipping.start()
    assert in_time(skipping, sampling)
    assert told
    vm.clock.tick()
    assert vm.clock.steering is not None


@pytest.mark.row("E9")
def test_a_source_that_is_held_up_holds_up_no_other_tick() -> None:
    """Meanwhile others publish without a sample, and another reference can be followed; the late sample is dropped."""
    vm = Vm(0)
    source = HeldSource(vm)
    vm.clock.follow(source)
    sampling = threading.Thread(target=vm.clock.tick, daemon=True)
    sampling.start()
    assert source.sampling.wait(HANG_S)
    version = page_of(vm.clock).version
    vm.pass_time()
    assert vm.clock.tick() is None
    assert page_of(vm.clock).version > version
    assert source.calls == 1
    vm.clock.follow("raw")
    steering = vm.clock.tick()
    assert steering is not None
    source.go_on.set()
    assert in_time(sampling)
    assert vm.clock.steering is steering


@pytest.mark.row("E9")
def test_a_sample_from_before_a_break_that_another_operation_found() -> None:
    """The TSC steps while a sample is taken, and an operation finds it before the tick does: the sample is not used."""
    vm = Vm(50)
    breaks = [False]

    def source() -> Sample:
        sample = Sample(vm.backend.tsc, vm.backend.ref_ns, 1.0)
        if breaks[0]:
            vm.backend.tsc = HostTsc(vm.backend.tsc - 5 * 10**9)
            vm.clock.dilate(1)
        return sample

    vm.clock.follow(source)
    for _ in range(60):
        vm.pass_time()
        vm.tick()
    assert vm.clock.steering is not None
    known = vm.clock.steering
    breaks[0] = True
    vm.pass_time()
    vm.tick()
    assert vm.clock.steering == known  # the tick had no sample
    breaks[0] = False
    vm.pass_time()
    vm.tick()
    assert vm.clock.steering.state is known.state
