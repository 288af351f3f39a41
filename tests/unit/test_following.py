"""A guest clock that follows a reference, in simulated time: what a guest reads, tick by tick."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest

from pvclock import ConfigError, GuestClock, GuestMemory, HostTsc, RangeError, Reference, Sample, SimulatedBackend
from pvclock.discipline import SteeringState
from pvclock.events import EventKind
from tests.unit.clocks import MAX_AGE_NS, NS_PER_S, PAGES, SYSTEM_TIME, bound_ns, page_of, shown

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
        """How much more the reference than the guest's time has gone on since then."""
        guest_ns, ref_ns = since
        return float(self.backend.ref_ns - ref_ns - (self.clock.at(self.backend.tsc) - guest_ns))

    @property
    def now(self) -> tuple[Fraction, int]:
        """Guest time and reference, at this instant."""
        return self.clock.at(self.backend.tsc), self.backend.ref_ns


@pytest.mark.row("E11", "K-08", "K-15")
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
                assert abs(error_ns) <= bound_ns(page, vm.clock.pace * NS_PER_S / HZ, age_ticks)
            assert shown(vm.memory, 0, vm.backend.tsc) == shown(vm.memory, 1, vm.backend.tsc)
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
    begin = vm.now
    for _ in range(300):
        assert vm.tick() in (0, 1)
        vm.pass_time()
    assert abs(vm.lag_ns(begin)) < 31 + 10**9 / hz


@pytest.mark.row("E11", "E2")
@pytest.mark.parametrize("step_ns", [NS_PER_S // 100, -NS_PER_S // 100])
def test_a_host_step_becomes_a_slew(step_ns: int) -> None:
    """UTC is set on the host: guests follow at 500 ppm, never back, and all their clocks with them."""
    vm = Vm(0)
    vm.clock.follow("realtime")
    for _ in range(5):
        vm.tick()
        vm.pass_time()
    begin = vm.clock.at(vm.backend.tsc), vm.backend.realtime_ns
    vm.backend.realtime_ns += step_ns
    for _ in range(60):
        before_ns = vm.clock.read(0)
        assert vm.tick() in (0, 1)
        vm.pass_time()
        assert abs(vm.clock.read(0) - before_ns - NS_PER_S) <= 500_000 + 2
    assert abs(vm.backend.realtime_ns - begin[1] - (vm.clock.at(vm.backend.tsc) - begin[0])) < 20


@pytest.mark.row("E11", "E12", "P-09", "P-10", "P-14")
@pytest.mark.parametrize("operation", ["dilate", "skip", "offset", "slew", "pause", "churn"])
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
        "churn": lambda: vm.clock.churn(100, [Fraction(1), Fraction(3, 7), Fraction(1)]),
    }
    operations[operation]()
    for _ in range(10):
        vm.clock.tick()
        vm.pass_time()
    if operation == "pause":
        missed_ns = vm.clock.resume("advance").gain_ns
        assert abs(missed_ns - 10 * NS_PER_S * (1 + 5000 * PPB)) < 10  # what the reference missed, not what the TSC did
    for _ in range(10):
        vm.clock.tick()
        vm.pass_time()
    assert vm.clock.steering is not None
    assert vm.clock.steering.state is SteeringState.LOCKED
    assert abs(vm.clock.steering.error_ns) < 3
    assert vm.clock.pace == vm.clock.dilation * (1 + vm.clock.steering.correction)


@pytest.mark.row("E11", "K-15")
def test_off_is_the_nominal_rate() -> None:
    """Without a reference the page is Linux's to the bit; after one, "off" goes back to that without a step."""
    vm = Vm(5000)
    nominal = vm.clock.scale
    assert (vm.clock.reference, vm.clock.tick()) == ("off", None)
    vm.clock.follow("raw")
    for _ in range(5):
        vm.tick()
        vm.pass_time()
    assert vm.clock.scale != nominal
    assert vm.clock.reference == "raw"
    before = vm.clock.read(0)
    vm.clock.follow("off")
    assert vm.clock.read(0) - before in (0, 1)
    assert vm.clock.tick() is None
    assert (vm.clock.scale, vm.clock.pace) == (nominal, Fraction(1))


@pytest.mark.row("E11", "E13")
def test_an_injected_source() -> None:
    """A source of the caller's is followed like any other; what it raises comes out, and the clock stays as it was."""
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
    before = vm.clock.line, page_of(vm.clock)
    with pytest.raises(OSError, match="gone"):
        vm.clock.tick()
    assert (vm.clock.line, page_of(vm.clock)) == before


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
    assert vm.clock.reference == "raw"
    with pytest.raises(ConfigError):
        GuestClock(vm.memory, backend=vm.backend, reference="tai")
    assert GuestClock(vm.memory, backend=vm.backend, reference="raw").reference == "raw"


@pytest.mark.row("E11", "K-12")
def test_a_late_tick_loses_nothing() -> None:
    """A VMM that was away for a day: the page has drifted by mul's quantum, and comes back by 1 ns a publish."""
    vm = Vm(Fraction(668, 10))
    vm.clock.follow("raw")
    for _ in range(100):
        vm.tick()
        vm.pass_time()
    begin = vm.now
    vm.pass_time(86_400 * NS_PER_S)
    behind_ns = vm.clock.at(vm.backend.tsc) - vm.clock.read(0)
    assert behind_ns < 86_400 * Fraction(47, 100) + 2
    assert abs(vm.lag_ns(begin)) < 86_400 * 0.1
    for _ in range(100):
        assert vm.tick() in (0, 1)
        vm.pass_time(MAX_AGE_NS)
    assert abs(vm.lag_ns(begin)) < 50


@pytest.mark.row("E11", "E9")
def test_a_tsc_that_goes_back_harms_nobody() -> None:
    """A host whose TSC was reset: guests' time stands still until the TSC is beyond, and no tick fails."""
    vm = Vm(0)
    vm.clock.follow("raw")
    for _ in range(10):
        vm.tick()
        vm.pass_time()
    newest = vm.clock.read(0)
    vm.backend.tsc = HostTsc(vm.backend.tsc - HZ // 2)
    for _ in range(10):
        vm.clock.tick()
        vm.pass_time()
    assert vm.clock.read(0) >= newest
