"""All that a VMM does to time, in any order: against an exact model, and as the guest's own reader sees it.

The model treats a slew as a jump: what is still to be slewed is added to the timeline's value before they are compared.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pvclock import GuestClock, GuestMemory, HostBackend, HostTsc, RangeError, SimulatedBackend, StateError
from pvclock.meter.stress import STRESS_RATES, republish
from pvclock.timekeeping.catchup import VIRTUALBOX, Advance, CatchUpTable, Freeze, Policy, Slew
from pvclock.timekeeping.events import EventKind
from pvclock.timekeeping.timeline import STRETCH_S
from tests.unit.clocks import NS_PER_S, PAGES, SYSTEM_TIME, a_clock, bound_ns, page_of, shown

LOST_NS = Fraction(1, 2**900)
"""A segment's begin keeps 1024 fraction bits; after hundreds of segments no more than this is lost."""

HZ = st.sampled_from([10**6, 999_999_937, 10**9, 2_596_132_000, 2**32 + 1, 10**10])
DILATIONS = st.sampled_from([(1, 1), (1, 10), (10, 1), (355, 113), (7, 3), (999_999, 10**6)])
NS = st.one_of(st.integers(0, 2 * 10**9), st.sampled_from([0, 1, 2, 10**9, 2 * 10**9]))
POLICIES: st.SearchStrategy[Policy] = st.one_of(
    st.just(Freeze()),
    st.builds(Advance, st.sampled_from([0, 1, 10**6, 10**12])),
    st.builds(Slew, st.sampled_from([1, 500, 10**5]), st.sampled_from([0, 10**9, 10**15])),
    st.just(VIRTUALBOX),
)


class TimeOperations(RuleBasedStateMachine):
    """One clock with two vCPUs on a simulated host, refreshed as often as it must be."""

    clock: GuestClock

    @initialize(hz=HZ, tsc=st.integers(0, 2**64 - 1))
    def begin(self, hz: int, tsc: int) -> None:
        """Make the clock and the model of it."""
        self.clock, self.backend, self.memory = a_clock(hz, tsc, vcpus=2)
        self.dilation = Fraction(1)
        self.model_ns = Fraction(0)  # guest time, with all that is still to be slewed in
        self.model_tsc = self.backend.tsc
        self.stopped_tsc: int | None = None
        self.stopped_dilation = Fraction(1)
        self.last_read = [0, 0]

    def host_ns(self, since: int) -> Fraction:
        """Host time from the TSC `since` to now, exactly."""
        return Fraction(((self.backend.tsc - since) % 2**64) * NS_PER_S, self.backend.tsc_hz)

    def catch_up(self) -> None:
        """Bring the model to the present."""
        if self.stopped_tsc is None:
            self.model_ns += self.host_ns(self.model_tsc) * self.dilation
        self.model_tsc = self.backend.tsc

    @rule(ns=NS)
    def advance(self, ns: int) -> None:
        """Host time passes, up to what a page may age."""
        self.backend.advance(ns=int(ns / max(self.dilation * 2, Fraction(1))))
        self.catch_up()
        self.end_of_a_slew(self.clock.refresh)

    @rule()
    def refresh(self) -> None:
        """Nothing changes but the anchor."""
        self.end_of_a_slew(self.clock.refresh)

    def end_of_a_slew(self, operation: Any) -> None:  # noqa: ANN401
        """Do it; where a slew ended by it, what was left undone is no longer owed."""
        seen = self.clock.events.last
        operation()
        for event in self.clock.events.read(seen).events:
            if event.kind == "slew_end":
                left = self.model_ns - self.clock.at(self.backend.tsc)
                assert abs(left) <= VIRTUALBOX.stop_ns
                self.model_ns -= left

    @rule(dilation=DILATIONS)
    def dilate(self, dilation: tuple[int, int]) -> None:
        """Another rate from here on."""
        self.clock.dilate(*dilation)
        self.dilation = Fraction(*dilation)

    @rule(ns=NS)
    def skip(self, ns: int) -> None:
        """A step that was asked for."""
        self.clock.skip(ns)
        self.model_ns += ns
        self.allow_a_step(ns)

    @rule(ns=NS)
    def offset(self, ns: int) -> None:
        """The same; and none backwards, for the guest has read the time."""
        self.clock.offset(ns)
        self.model_ns += ns
        self.allow_a_step(ns)
        with pytest.raises(RangeError, match="not taken back"):
            self.clock.offset(-1)

    def allow_a_step(self, ns: int) -> None:
        """What a guest reads is allowed to be higher by this much, and has to be, while it can read."""
        if self.stopped_tsc is None:
            self.last_read = [last + max(ns - 3, 0) for last in self.last_read]

    @rule(ns=st.integers(-(10**9), 10**9), ppm=st.sampled_from([1, 100, 10**5, 10**6]))
    def slew(self, ns: int, ppm: int) -> None:
        """An error to be worked off."""
        self.model_ns += ns
        self.end_of_a_slew(lambda: self.clock.slew(ns, ppm))

    @precondition(lambda self: self.stopped_tsc is None)
    @rule()
    def pause(self) -> None:
        """Time stands still; another pause is refused, with what to do."""
        self.clock.pause()
        self.stopped_tsc, self.stopped_dilation = self.backend.tsc, self.dilation
        with pytest.raises(StateError, match="resume\\(\\) it first"):
            self.clock.pause()

    @precondition(lambda self: self.stopped_tsc is not None)
    @rule(policy=POLICIES)
    def resume(self, policy: Policy) -> None:
        """Time goes on, as declared."""
        assert self.stopped_tsc is not None
        missed = self.host_ns(self.stopped_tsc) * self.stopped_dilation
        self.model_tsc, self.stopped_tsc = self.backend.tsc, None
        self.model_ns += expected_gain(policy, missed)
        self.end_of_a_slew(lambda: self.clock.resume(policy))

    @precondition(lambda self: self.stopped_tsc is None)
    @rule()
    def resume_while_running(self) -> None:
        """Illegal, and said so."""
        for operation in (self.clock.resume, lambda: self.clock.run_for(1)):
            with pytest.raises(StateError, match="pause\\(\\) it first"):
                operation()

    @precondition(lambda self: self.stopped_tsc is not None)
    @rule(ns=st.integers(1, 10**9))
    def run_for(self, ns: int) -> None:
        """Exactly as long as asked for, to the tick above."""
        begin = self.clock.at(self.backend.tsc)
        self.model_tsc, self.stopped_tsc = self.backend.tsc, None
        report = self.clock.run_for(ns)
        self.catch_up()
        self.stopped_tsc, self.stopped_dilation = self.backend.tsc, self.dilation
        tick_ns = self.clock.rate * NS_PER_S / self.backend.tsc_hz
        assert 0 <= report.overshoot_ns < tick_ns
        assert report.ran_ns == self.clock.at(self.backend.tsc) - begin == ns + report.overshoot_ns

    @invariant()
    def timeline_is_the_models(self) -> None:
        """Guest time, with what is still to be slewed, is the model's: exactly."""
        tsc = self.backend.tsc
        assert abs(self.clock.at(tsc) + self.clock.skew_ns - self.model_ns) <= LOST_NS

    @invariant()
    def guests_read_it_and_never_less(self) -> None:
        """Each vCPU's own arithmetic on its page: within the bound of the timeline, and never less than before."""
        if self.stopped_tsc is not None:
            return
        tsc = self.backend.tsc
        rate = self.clock.rate * NS_PER_S / self.backend.tsc_hz
        for vcpu in range(2):
            ns = shown(self.memory, vcpu, tsc)
            assert ns >= self.last_read[vcpu]
            assert abs(ns - self.clock.at(HostTsc(tsc))) <= bound_ns(page_of(self.clock, vcpu), rate, 0) + 1
            self.last_read[vcpu] = ns


def expected_gain(policy: Policy, missed: Fraction) -> Fraction:
    """What guest time shall have gained in the end, by each policy's own words."""
    match policy:
        case Advance(max_ns):
            return min(missed, Fraction(max_ns))
        case Slew(_, max_ns):
            return min(missed, Fraction(max_ns))
        case CatchUpTable():
            return missed if missed <= policy.give_up_ns else Fraction(0)
        case _:
            return Fraction(0)


@pytest.mark.row("E1", "E2", "E9", "E11", "E12", "P-08", "P-09", "P-10", "P-14", "P-22")
class TestTimeOperations(TimeOperations.TestCase):  # type: ignore[misc, valid-type]  # made at run time
    """Any sequence of operations."""

    settings = settings(stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.row("E11", "E9")
@pytest.mark.stress
def test_a_million_anchors() -> None:
    """After 10^6 publishes at seven rates in turn, pages are as near to the timeline as after one."""
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 1, backend=HostBackend())
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    report = republish(clock, 10**6, STRESS_RATES)
    assert report.publishes == 10**6
    assert clock._keeper.pages.break_tsc == clock.line.tsc  # which the host's TSC is compared with
    assert (report.least_step_ns, report.most_step_ns) == (0, 1)
    assert max(report.most_behind_ns, report.most_ahead_ns) <= 2
    clock.dilate(1)
    before = clock.at(HostTsc(clock.backend.counter.read()))
    shown_ns = shown(memory, 0, clock.backend.counter.read())
    assert before - 4 <= shown_ns <= clock.at(HostTsc(clock.backend.counter.read())) + 4


@pytest.mark.row("P-10", "E1")
@pytest.mark.parametrize(("policy", "gain_ns"), [("freeze", 0), ("advance", 5 * NS_PER_S)])
def test_a_pause_can_be_hidden_from_the_guest(policy: str, gain_ns: int) -> None:
    """By its own page each vCPU reads on from where it stood, or from there and all that passed, as the VMM says."""
    clock, backend, memory = a_clock(2_596_132_000, vcpus=2)
    backend.advance(ns=3 * NS_PER_S)
    clock.pause()
    backend.advance(ns=5 * NS_PER_S)
    clock.resume(policy)
    for passed_ns in (0, NS_PER_S):
        backend.advance(ns=passed_ns)
        for vcpu in range(2):
            assert abs(shown(memory, vcpu, backend.tsc) - 3 * NS_PER_S - gain_ns - passed_ns) <= 2


@pytest.mark.row("E2", "P-14")
@pytest.mark.parametrize("interval_ns", [10**6, 10**8, 2 * 10**9])
@pytest.mark.parametrize("target_ns", [10**9, 10**5, -(10**8)])
def test_a_slew_takes_the_time_that_it_must(target_ns: int, interval_ns: int) -> None:
    """However often it is refreshed: never faster than declared, done in due time, and in few segments."""
    clock, backend, memory = a_clock(2_596_132_000)
    clock.slew(target_ns, 50_000)
    begin = backend.ref_ns
    while clock.skew_ns:
        assert abs(clock.rate - 1) <= Fraction(50_000, 10**6)
        backend.advance(ns=interval_ns)
        clock.refresh()
    took_ns = backend.ref_ns - begin
    assert abs(target_ns) * 20 <= took_ns <= abs(target_ns) * 20 + 4 * STRETCH_S * NS_PER_S
    assert abs(clock.at(backend.tsc) - target_ns - took_ns) < 2
    assert abs(shown(memory, 0, backend.tsc) - target_ns - took_ns) <= 4
    assert clock.events.last <= 8


@pytest.mark.row("E2", "P-14")
@pytest.mark.parametrize("sign", [1, -1])
def test_a_slew_that_a_ticker_ends_does_not_swing(sign: int) -> None:
    """Ticks that come each second, and some us early or late, end it in due time and beyond its target by no more."""
    clock, backend, _ = a_clock(2_596_132_000)
    target_ns, off_ns = sign * 3 * 10**8, 50_000
    clock.slew(target_ns, 50_000)
    begin, furthest_ns = backend.ref_ns, Fraction(0)
    for early_ns in (-off_ns, off_ns, 0, off_ns, -off_ns) * 4:
        backend.advance(ns=NS_PER_S + early_ns)
        furthest_ns = max(furthest_ns, -sign * clock.skew_ns)
        clock.refresh()
        if not clock.skew_ns:
            break
    assert clock.skew_ns == 0
    assert backend.ref_ns - begin <= abs(target_ns) * 20 + 4 * STRETCH_S * NS_PER_S
    assert furthest_ns <= 3 * off_ns * 50_000 / 10**6


@pytest.mark.row("E2", "P-14")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dilation", [1, 10])
def test_a_guest_is_skewed_by_a_tenth_of_each_interval_at_most(sign: int, dilation: int) -> None:
    """By its own page it reads on within 10 % of what passed, whether long or short, until it has gained all of it."""
    clock, backend, memory = a_clock(2_596_132_000)
    clock.dilate(dilation)
    begin, seen = clock.at(backend.tsc), shown(memory, 0, backend.tsc)
    target_ns = sign * dilation * 2 * NS_PER_S
    clock.slew(target_ns, 100_000)
    passed_ns = 0
    for interval_ns in [10**8, 1, 7 * 10**6, 10**6, 2 * 10**8] * 120:
        backend.advance(ns=interval_ns)
        passed_ns += dilation * interval_ns
        clock.refresh()
        now = shown(memory, 0, backend.tsc)
        assert abs(now - seen - dilation * interval_ns) <= dilation * interval_ns / 10 + 4
        seen = now
    assert not clock.skew_ns
    assert abs(seen - begin - passed_ns - target_ns) <= 4 + dilation
    assert abs(clock.at(backend.tsc) - seen) <= 2


@pytest.mark.row("E9")
def test_a_slew_that_goes_on_after_a_pause_at_another_rate_is_an_event() -> None:
    """The last event's rate is the clock's own, though the policy of the resume slews nothing."""
    clock, backend, _ = a_clock(2_600_000_000)
    clock.slew(8533, 7844)
    backend.advance(ns=78_243_403)
    clock.pause()
    clock.resume("freeze")
    resumed, slewed = clock.events.read().events[-2:]
    assert (resumed.kind, slewed.kind) == (EventKind.RESUME, EventKind.SLEW)
    assert resumed.rate_after == slewed.rate_before != slewed.rate_after == clock.rate


@pytest.mark.row("E2", "P-14", "E12")
@pytest.mark.parametrize("dilation", [Fraction(1, 1000), 1, Fraction(3, 2), 100, 10_000, 2**20])
@pytest.mark.parametrize("part", [Fraction(1, 100), Fraction(1, 2), 1, Fraction(199, 100), 3, 10_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_slew_of_any_size_ends_at_any_dilation(dilation: Fraction, part: Fraction, sign: int) -> None:
    """Down to a part of what a host's ns is worth in the guest: it ends, says so, and leaves less than 2 ns undone."""
    backend = SimulatedBackend(10**9, tsc=10**12)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 1, backend=backend)
    clock.dilate(*Fraction(dilation).as_integer_ratio())
    backend.advance(ns=NS_PER_S)
    slewed_ns = sign * max(int(dilation * part), 2)
    begin, at_begin = backend.tsc, clock.at(backend.tsc)
    clock.slew(slewed_ns)
    for _ in range(60):
        backend.advance(ns=NS_PER_S)
        clock.refresh()
    kinds = [event.kind for event in clock.events.read().events]
    assert kinds[-1] == EventKind.SLEW_END
    assert clock.rate == dilation
    assert clock.skew_ns == 0
    gained = clock.at(backend.tsc) - at_begin - (backend.tsc - begin) * Fraction(dilation)
    assert abs(gained - slewed_ns) <= 2


@pytest.mark.row("E2", "P-14")
def test_a_catch_up_table_without_tolerance_ends() -> None:
    """stop_ns is 0: what is less than the least slew works off in a last stretch is left undone, and told."""
    backend = SimulatedBackend(10**9, tsc=10**12)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 1, backend=backend)
    clock.pause()
    backend.advance(ns=1001)
    clock.resume(CatchUpTable(((0, 5),), 0, 10**12))
    for _ in range(60):
        backend.advance(ns=NS_PER_S)
        clock.refresh()
    assert clock.events.read().events[-1].kind == EventKind.SLEW_END
    assert abs(clock.at(backend.tsc) - (backend.tsc - 10**12)) < 2
