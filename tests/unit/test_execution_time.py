"""Time that only the guest's execution moves: exactly that, through every operation, and never back for its guest."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pvclock import Backend, GuestClock, GuestMemory, HostTsc, RangeError, Reference, SimulatedBackend, StateError
from pvclock.errors import TscOffsetNotHonoured, WrongType
from pvclock.host.execution_time import ExecutionTimeBackend
from tests.unit.clocks import NS_PER_S, PAGES, SYSTEM_TIME, bound_ns, guest_ns, guest_tsc, page_of, shown

HZ = 2_596_132_000
NS = st.one_of(st.integers(0, 10**9), st.sampled_from([0, 1, 2, 10**9]))
TSC = st.integers(0, 2**64 - 1)
RUNS = st.lists(st.tuples(NS, NS, st.fractions(0, 1)), max_size=20)


def unslaved(
    host_tsc: int = 10**15, *, native: bool = True, tsc_hz: int = HZ
) -> tuple[ExecutionTimeBackend, SimulatedBackend]:
    """An unslaved backend on a simulated host."""
    host = SimulatedBackend(tsc_hz, host_tsc, ref_ns=5, realtime_ns=7)
    return ExecutionTimeBackend(host, native=native), host


def a_clock(backend: Backend, vcpus: int = 1) -> tuple[GuestClock, GuestMemory]:
    """A clock whose vCPUs have registered their pages."""
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, vcpus, backend=backend)
    for vcpu in range(vcpus):
        clock.write_msr(vcpu, SYSTEM_TIME, PAGES[vcpu] | 1)
    return clock, memory


def run(backend: ExecutionTimeBackend, host: SimulatedBackend, ns: int) -> int:
    """Let the guest execute for so long, and return the host ticks that it took, by the host's TSC."""
    backend.enter()
    begin = host.tsc
    host.advance(ns=ns)
    ticks = (host.tsc - begin) % 2**64
    assert backend.exit() == ticks
    backend.ran(ticks)
    return ticks


@pytest.mark.row("P-08", "P-11")
@given(host_tsc=TSC, runs=RUNS)
def test_vmm_time_is_hidden_exactly(host_tsc: int, runs: list[tuple[int, int, Fraction]]) -> None:
    """After any VMM time and runs, guest time is the executed ticks at the nominal rate; slaved, it is all ticks."""
    backend, host = unslaved(host_tsc)
    clock, memory = a_clock(backend)
    slaved, _ = a_clock(host)
    executed, rate = 0, Fraction(NS_PER_S, HZ)
    for vmm_ns, run_ns, _ in runs:
        host.advance(ns=vmm_ns)
        executed += run(backend, host, run_ns)
        assert backend.counter.read() == executed
        assert clock.at(HostTsc(executed)) == executed * rate
        page = page_of(clock)
        assert abs(shown(memory, 0, executed) - executed * rate) <= bound_ns(page, rate, executed - page.tsc_timestamp)
        assert slaved.at(host.tsc) == Fraction(((host.tsc - host_tsc) % 2**64) * NS_PER_S, HZ)


@pytest.mark.row("P-08", "P-12")
@given(runs=RUNS)
def test_exact_cycles(runs: list[tuple[int, int, Fraction]]) -> None:
    """Where the VMM traps RDTSC and knows the exact cycles, they alone count; what entries cost is hidden."""
    backend, host = unslaved(native=False)
    clock, memory = a_clock(backend)
    executed, last = 0, 0
    for vmm_ns, run_ns, part in runs:
        host.advance(ns=vmm_ns)
        backend.enter()
        host.advance(ns=run_ns)
        cycles = int(backend.exit() * part)
        backend.ran(cycles)
        executed += cycles
        clock.refresh()
        assert clock.now() == executed * NS_PER_S // HZ
        ns = shown(memory, 0, executed)
        assert last <= ns
        assert abs(ns - executed * Fraction(NS_PER_S, HZ)) <= 2
        last = ns
    assert host.tsc_offsets == {}


class ExecutionTimeOperations(RuleBasedStateMachine):
    """A guest of two vCPUs with the hardware's TSC: VMM time, runs and operations in any order."""

    clock: GuestClock

    @initialize(hz=st.sampled_from([10**6, 999_999_937, HZ, 10**10]), host_tsc=TSC)
    def begin(self, hz: int, host_tsc: int) -> None:
        """Make the clock and the model of it."""
        self.backend, self.host = unslaved(host_tsc, tsc_hz=hz)
        self.clock, self.memory = a_clock(self.backend, vcpus=2)
        self.model_ns = Fraction(0)
        self.dilation = Fraction(1)
        self.executed, self.offsets = 0, [0, 0]
        self.last_read = [0, 0]

    @rule(ns=NS)
    def vmm_time(self, ns: int) -> None:
        """The host does something else, for as long as it likes."""
        self.host.advance(ns=ns * 1000)

    @rule(parts=st.lists(st.integers(0, 3 * 10**8), max_size=3))
    def run(self, parts: list[int]) -> None:
        """The guest executes, and reads its clock now and then, by its own TSC."""
        self.backend.enter()
        begin = self.host.tsc
        self.guest_reads(0)
        for ns in parts:
            self.host.advance(ns=ns)
            self.guest_reads((self.host.tsc - begin) % 2**64)
        ticks = self.backend.exit()
        assert ticks == (self.host.tsc - begin) % 2**64
        self.backend.ran(ticks)
        self.execute(ticks)
        self.clock.refresh()

    @property
    def rate(self) -> Fraction:
        """Guest ns that an executed tick is."""
        return self.dilation * NS_PER_S / self.host.tsc_hz

    def execute(self, ticks: int) -> None:
        """Move the model on by so many executed ticks."""
        self.executed += ticks
        self.model_ns += ticks * self.rate

    def guest_reads(self, ticks: int) -> None:
        """Each vCPU, `ticks` into a run: its own arithmetic on its page and the hardware's TSC is as the model's."""
        for vcpu in range(2):
            tsc = guest_tsc(self.host, vcpu)
            assert tsc == (self.executed + ticks + self.offsets[vcpu]) % 2**64
            page = page_of(self.clock, vcpu)
            ns = shown(self.memory, vcpu, tsc)
            assert ns >= self.last_read[vcpu]
            bound = bound_ns(page, self.rate, (tsc - page.tsc_timestamp) % 2**64) + 1
            assert abs(ns - self.model_ns - ticks * self.rate) <= bound
            self.last_read[vcpu] = ns

    @rule(dilation=st.sampled_from([(1, 1), (1, 10), (2, 1), (355, 113)]))
    def dilate(self, dilation: tuple[int, int]) -> None:
        """Another rate from here on."""
        self.clock.dilate(*dilation)
        self.dilation = Fraction(*dilation)

    @rule(ns=NS)
    def skip(self, ns: int) -> None:
        """A step that was asked for."""
        self.clock.skip(ns)
        self.model_ns += ns

    @rule(ns=NS)
    def pause(self, ns: int) -> None:
        """Under every policy nothing is missed in a pause, for nothing was executed."""
        self.clock.pause()
        self.host.advance(ns=ns)
        assert self.clock.resume("advance").step_ns == 0

    @rule(ns=st.integers(1, 10**9))
    def run_for(self, ns: int) -> None:
        """Exactly as much guest time as asked for, to the tick above."""
        self.clock.pause()
        report = self.clock.run_for(ns)
        ticks = ceil(ns / self.rate)
        assert (report.ran_ns, report.overshoot_ns) == (ticks * self.rate, ticks * self.rate - ns)
        self.execute(ticks)
        self.clock.resume()

    @rule(value=TSC, vcpu=st.sampled_from([0, 1]))
    def write_tsc(self, value: int, vcpu: int) -> None:
        """A guest's write of its TSC moves its TSC alone."""
        self.clock.write_msr(vcpu, 0x10, value)
        self.offsets[vcpu] = value - self.executed

    @invariant()
    def guest_time_is_what_was_executed(self) -> None:
        """The executed ticks at the rates that were declared, and the skips: exactly."""
        assert self.backend.counter.read() == self.executed
        assert self.clock.at(HostTsc(self.executed)) == self.model_ns


@pytest.mark.row("P-01", "P-08", "P-10", "P-11", "P-18", "E9", "E12")
class TestUnslavedOperations(ExecutionTimeOperations.TestCase):  # type: ignore[misc, valid-type]  # made at run time
    """Any sequence of operations."""

    settings = settings(stateful_step_count=20)


def in_a_run(backend: ExecutionTimeBackend) -> bool:
    """Asked by a function, since a type checker takes a property for a constant."""
    return backend.is_running


@pytest.mark.row("P-11")
def test_a_run_has_two_ends() -> None:
    """exit() without enter(), enter() or ran() in a run, and an untold run are refused, with what to do instead."""
    backend, host = unslaved()
    with pytest.raises(StateError, match=r"exit: .*enter\(\)"):
        backend.exit()
    assert backend.enter() == 10**15
    assert in_a_run(backend)
    with pytest.raises(StateError, match=r"enter: .* 1000000000000000.*exit\(\)"):
        backend.enter()
    with pytest.raises(StateError, match=r"ran: .*exit\(\)"):
        backend.ran(0)
    host.tsc = HostTsc(10**15 + 12)
    assert backend.exit() == 12
    assert not in_a_run(backend)
    for operation in (backend.exit, backend.enter):
        with pytest.raises(StateError, match="12 host ticks"):
            operation()
    backend.ran(12)
    assert backend.counter.read() == 12


@pytest.mark.row("P-08", "P-12")
def test_cycles_that_cannot_be() -> None:
    """Negative ones, and more than passed or than a counter can tell, are refused with the range; nothing changes."""
    backend, host = unslaved(native=False)
    for cycles in (-1, 2**63):
        with pytest.raises(RangeError, match=rf"ran\({cycles}\): this run can have 0 to {2**63 - 1} host ticks"):
            backend.ran(cycles)
    backend.ran(5)
    for native, wrong, least in ((False, (-1, 13), 0), (True, (11, 13), 12)):
        backend.native = native
        backend.enter()
        host.tsc = HostTsc(host.tsc + 12)
        backend.exit()
        for cycles in wrong:
            with pytest.raises(RangeError, match=rf"ran\({cycles}\): .* {least} to 12"):
                backend.ran(cycles)
        backend.ran(12)
    assert backend.counter.read() == 5 + 12 + 12
    with pytest.raises(WrongType, match=r"cycles is 1.5, a float"):
        backend.ran(1.5)  # type: ignore[arg-type]


@pytest.mark.row("P-12")
def test_a_guest_that_halts_is_given_its_sleep() -> None:
    """A VMM that counts by itself says how long the guest is to have slept, without entering it."""
    backend, _ = unslaved()
    clock, _ = a_clock(backend)
    backend.ran(HZ)
    assert clock.now() == NS_PER_S


@pytest.mark.row("P-11", "P-18")
def test_a_native_guests_own_writes_within_a_run() -> None:
    """An MSR write between enter() and exit() finds the counter up to date, and the guest's TSC goes on from it."""
    backend, host = unslaved()
    clock, _ = a_clock(backend)
    backend.enter()
    host.tsc = HostTsc(10**15 + 1000)
    assert clock.read_msr(0, 0x10) == 1000
    clock.write_msr(0, 0x10, 77)
    host.tsc = HostTsc(10**15 + 1500)
    assert (host.tsc + host.tsc_offsets[0]) % 2**64 == 77 + 500
    backend.ran(backend.exit())
    assert clock.read_msr(0, 0x10) == 77 + 500
    host.tsc = HostTsc(10**16)
    backend.enter()
    assert (host.tsc + host.tsc_offsets[0]) % 2**64 == 77 + 500


@pytest.mark.row("P-01")
def test_a_host_whose_tsc_goes_back() -> None:
    """What the counter showed within a run stays; the run takes no ticks beyond that."""
    backend, host = unslaved()
    backend.enter()
    host.tsc = HostTsc(10**15 + 100)
    assert backend.counter.read() == 100
    host.tsc = HostTsc(10**14)
    assert backend.counter.read() == 100
    assert backend.exit() == 100
    backend.ran(100)
    assert backend.counter.read() == 100


@pytest.mark.row("P-18", "E11")
def test_a_host_that_ignores_offsets() -> None:
    """No native guest can have unslaved time there, and it is said before one runs; one whose RDTSC traps can."""
    host = SimulatedBackend(HZ, 10**12, honours_tsc_offset=False)
    with pytest.raises(TscOffsetNotHonoured):
        a_clock(ExecutionTimeBackend(host))
    backend = ExecutionTimeBackend(host, native=False)
    clock, _ = a_clock(backend)
    run(backend, host, NS_PER_S)
    assert clock.now() == NS_PER_S


@pytest.mark.row("P-08", "E9")
def test_the_rest_is_the_hosts() -> None:
    """Time of day, reference clock, frequency and trust are those of the backend inside; the TSC is executed ticks."""
    host = SimulatedBackend(HZ, 10**12, 5, 7, tsc_stable=False, boot_id="a boot")
    host.kernel_features = {"KVM": 0x80}
    backend = ExecutionTimeBackend(host, executed=3)
    host.advance(ns=1000)
    assert backend.sample(Reference.REALTIME)[:2] == (3, 1007)
    assert backend.stamps() == (3, 1005, 1007, "a boot", 0)
    assert (backend.tsc_hz, backend.tsc_stable, backend.kernel_features) == (HZ, False, {"KVM": 0x80})
    with backend.quiesce(None):
        backend.run_until(HostTsc(3))
    assert backend.counter.read() == 3
    backend.run_until(HostTsc(50))
    assert backend.counter.read() == 50


@pytest.mark.row("P-10", "E21")
@pytest.mark.parametrize("slept", [False, True])
@pytest.mark.parametrize("restored", [False, True])
def test_a_pause_misses_nothing(slept: bool, restored: bool) -> None:
    """The guest did not execute in it, so resume("advance") gives it nothing, whether or not the host slept."""
    backend, host = unslaved()
    clock, memory = a_clock(backend)
    run(backend, host, NS_PER_S)
    clock.pause()
    host.advance(ns=10 * NS_PER_S)
    if slept:
        host.sleep(ns=NS_PER_S, tsc="restarts")
    if restored:
        clock = GuestClock.restore(clock.save(), memory, backend=backend)
        host.advance(ns=NS_PER_S)
    assert clock.resume("advance").step_ns == 0
    assert clock.at(HostTsc(HZ)) == NS_PER_S
    for ran_ns in (0, 5):
        host.advance(ns=NS_PER_S)
        backend.enter()
        host.advance(ns=ran_ns)
        assert abs(guest_ns(host, memory) - NS_PER_S - ran_ns) <= 1
        backend.ran(backend.exit())
