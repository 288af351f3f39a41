"""A GuestClock and the model of it, driven together: what one says the other must say, after every step."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from pvclock import GuestClock, GuestMemory, KvmError, PvclockError, StateError
from pvclock.quantities import HostTsc
from pvclock.timekeeping.catchup import CatchUpTable
from pvclock.timekeeping.events import Event, EventKind
from tests import oracle
from tests.model.faulty_host import FaultyHost, NoQuiesce
from tests.model.model_clock import NS_PER_S, SLOWEST, ModelClock, ModelVcpu, settled

__all__ = ["DirtyLogError", "SourceError", "Twins"]

BASE_BYTES = 1 << 16
FAR_SLOT, FAR_BYTES = 0x100000, 0x1000  # a slot that comes and goes
PAGE_BYTES, STEAL_BYTES = 32, 64
ROUNDING_NS = Fraction(1, 2**900)
"""A timeline cuts its fractions at 2^-1024 ns."""

MOVING = {
    *(EventKind.PAUSE, EventKind.RESUME, EventKind.SKIP, EventKind.OFFSET, EventKind.DILATE, EventKind.SLEW),
    *(EventKind.SLEW_END, EventKind.RATE, EventKind.RESTORE, EventKind.SUSPEND),
}
"""Events of what a timeline does; all others leave it alone."""


class DirtyLogError(Exception):
    """What the VMM's on_dirty raises."""


class SourceError(Exception):
    """What a source of samples raises."""


class Twins:
    """A clock on a faulty host, and its model.

    step, sleep: what the host did that the clock has not looked at yet: ticks that its TSC went back by (forward if
    negative), and (ns asleep, did the TSC count on).
    """

    def __init__(self, tsc_hz: int, tsc: int, vcpus: int, tsc_offset: int) -> None:
        self.host = FaultyHost(tsc_hz, tsc, ref_ns=5 * 10**12, realtime_ns=17 * 10**17)
        self.memory = GuestMemory(bytearray(BASE_BYTES))
        self.slots = {0: BASE_BYTES}
        self.clock = GuestClock(self.memory, vcpus, backend=self.host, tsc_offset=tsc_offset)
        self.model = ModelClock(tsc_hz, tsc, [ModelVcpu(tsc_offset) for _ in range(vcpus)])
        self.published_tsc = tsc
        self.raises_dirty = False
        self.complaints = 0
        self.low_ticks = 0  # how far below the last publish the next call reads the TSC, once
        self.adopt_host()

    def adopt_host(self) -> None:
        """Begin with this host, and with the clock's log from its end on."""
        self.seen = self.clock.events.last
        self.rebuilt = self.model.tsc, self.model.guest_ns, self.model.rate
        self.step: int | None = None
        self.sleep: tuple[int, bool] | None = None
        self.went_back: int | None = None
        self.has_continued = False
        self.past: dict[int, Fraction] = {}

    # Calls

    @property
    def is_undecided(self) -> bool:
        """Has the host done what the clock has not looked at yet?"""
        return self.step is not None or self.sleep is not None

    @property
    def lag(self) -> int:
        """How far this CPU is behind the others."""
        return self.host.cpu_lag_ticks

    def call(
        self,
        operation: Callable[[], object],
        *,
        steps: dict[EventKind, Fraction] | None = None,
        refusals: tuple[type[PvclockError], ...] = (),
        publishes: bool = True,
        needs_tsc: bool = False,
    ) -> Exception | None:
        """Have the clock do it, and hold its events against the model; returns what kept it from that, if anything.

        steps: by how much guest time is to step, by the event that tells of it; these events must come.  refusals: the
        errors that may come out.  needs_tsc: must a CPU that is behind be refused?
        """
        refused: Exception | None = None
        self.host.refused_vcpu = None
        self._read_low()
        if self.raises_dirty:
            self.memory.on_dirty = self._complain
        try:
            operation()
        except (DirtyLogError, SourceError):
            pass  # of others: the operation is whole all the same
        except NoQuiesce as error:
            assert not self.host.holds_vcpus, "quiesce() was not to fail"
            refused = error
        except PvclockError as error:
            refused = error
            failed = isinstance(error, KvmError) and self.host.refused_vcpu is not None
            is_behind = isinstance(error, StateError) and self.lag > 0 and needs_tsc
            if not (failed or is_behind or any(isinstance(error, kind) for kind in refusals)):
                raise
        assert refused or not (self.lag and needs_tsc), "done by a CPU that is behind"
        self.memory.on_dirty, self.raises_dirty = None, False
        self.host.look_again()
        self._take_events({} if refused else dict(steps or {}))
        self.pass_time()
        self.model.frequency_adjustment = self.clock._keeper.timeline.terms.frequency_adjustment
        self.host.holds_vcpus, self.host.refuse = True, None
        if publishes and not refused:
            self.publish()
        return refused

    def publish(self) -> None:
        """All pages were published, if that can be."""
        if not self.model.is_paused and not self.lag:
            self.published_tsc = self.model.tsc
            self.show()

    def _read_low(self) -> None:
        """Have the TSC read low, if that is due."""
        below, self.low_ticks = self.low_ticks, 0
        ticks = self.host.tsc - self.published_tsc + below
        if below and not self.is_undecided and not self.lag and ticks <= self.host.tsc:
            self.host.read_low(ticks)

    def pass_time(self) -> None:
        """Let the model have the host time that has passed."""
        self.model.run_to(self.host.true_tsc)

    def show(self) -> None:
        """Pages are as they should be."""
        self.model.published()
        for number, vcpu in enumerate(self.model.vcpus):
            vcpu.is_shown = vcpu.page is not None and self.covers(vcpu.page, PAGE_BYTES)
            if vcpu.is_shown and not vcpu.is_spoilt:
                flags = self._info(vcpu).flags
                assert flags & oracle.TSC_STABLE == self.model.stable, f"vCPU {number}: flags {flags}"

    def covers(self, gpa: int, length: int) -> bool:
        """Is there memory?"""
        return any(begin <= gpa and gpa + length <= begin + size for begin, size in self.slots.items())

    def _complain(self, gpa: int, length: int) -> None:
        self.complaints += 1
        raise DirtyLogError(gpa, length)

    # Events

    def _take_events(self, steps: dict[EventKind, Fraction]) -> None:
        batch = self.clock.events.read(since=self.seen)
        self.seen = batch.last
        for event in batch.events:
            if event.kind is EventKind.TSC_STEP:
                self._take_tsc_step(event)
            elif event.kind in MOVING:
                self._take_move(event, steps)
        assert not steps, f"no event of {steps}"

    def _take_move(self, event: Event, steps: dict[EventKind, Fraction]) -> None:
        model = self.model
        assert event.host_tsc is not None
        assert event.host_tsc >= model.tsc, f"{event} is of the past"
        model.run_to(event.host_tsc)
        jump_ns = self._slept() if event.kind is EventKind.SUSPEND else steps.pop(event.kind, Fraction(0))
        if event.kind is EventKind.RESUME:
            self.published_tsc = event.host_tsc
        self._same("before", event.guest_ns_before, model.guest_ns)
        assert event.rate_before == model.rate, f"{event}: before it was {model.rate}"
        self._same("jump", event.jump_ns, jump_ns)
        model.guest_ns, model.rate = event.guest_ns_after, event.rate_after
        if event.kind is EventKind.SLEW_END:
            done_ns = model.slewing.stop_ns if isinstance(model.slewing, CatchUpTable) else 2
            assert abs(model.skew_ns) <= done_ns, f"a slew ended {model.skew_ns} ns before its end"
            model.skew_ns, model.slewing = Fraction(0), None
        self.rebuilt = event.host_tsc, event.guest_ns_after, event.rate_after
        self.past[event.host_tsc] = event.guest_ns_after

    def _slept(self) -> Fraction:
        """What guest time gains by the host's sleep."""
        model = self.model
        assert self.sleep is not None, "the host did not sleep"
        (slept_ns, counted_on), self.sleep = self.sleep, None
        if model.is_paused or counted_on:
            return Fraction(0)
        step_ns, owed_ns, policy = settled(model.sleep_policy, slept_ns * model.dilation)
        model.owe(owed_ns, policy)
        return step_ns

    def _take_tsc_step(self, event: Event) -> None:
        """The TSC stepped: what was unknown meanwhile is known to a tick or two, and taken from the clock."""
        model = self.model
        model.tsc_trusted = False
        if self.step is None:
            assert "read low once" in event.why or self.lag, f"the TSC did not step: {event}"
            return
        told = re.search(r"(\d+) ticks", event.why)
        assert told is not None
        ticks = int(told[1]) if self.step > 0 else -int(told[1])
        tolerance_ns = 2 + 3 * Fraction(NS_PER_S, model.hz)  # the raw clock's whole ns, and some ticks
        assert abs(ticks - self.step) * NS_PER_S <= tolerance_ns * model.hz, f"{event}: it stepped by {self.step}"
        assert event.host_tsc == model.tsc
        self._near("guest time", event.guest_ns_before, model.guest_ns, tolerance_ns * model.rate)
        off_ns, model.guest_ns = event.guest_ns_before - model.guest_ns, event.guest_ns_before
        if model.rate:
            model.skew_ns -= off_ns * (1 - model.dilation * (1 + model.frequency_adjustment) / model.rate)
        elif not model.elsewhere:
            self._settle_missed(2 * tolerance_ns)
        model.ever_published |= not model.is_paused
        self._renumber_vcpus(ticks)
        self.went_back = ticks if ticks > 0 and self.sleep is None else None  # what began anew does not come back
        self.step, self.past = None, {}
        self.rebuilt = event.host_tsc, event.guest_ns_after, event.rate_after
        self.published_tsc -= ticks

    def _settle_missed(self, tolerance_ns: Fraction) -> None:
        missed_ns = self.clock._keeper.timeline.missed_at(HostTsc(self.model.tsc))
        if self.clock.is_paused:
            self._near("time missed", missed_ns, self.model.missed_ns, tolerance_ns)
            self.model.missed_ns = missed_ns

    def _renumber_vcpus(self, ticks: int) -> None:
        for number, vcpu in enumerate(self.model.vcpus):
            vcpu.last_ns = 0
            if vcpu.standing is not None or number == self.host.refused_vcpu:
                continue
            vcpu.offset = (
                self.host.tsc_offsets.get(number, 0) if self.has_continued else (vcpu.offset + ticks) % oracle.U64
            )
        self.has_continued = False

    # Comparisons

    def check(self) -> None:
        """All that the clock says, against the model."""
        if self.is_undecided:
            return
        clock, model = self.clock, self.model
        now = HostTsc(model.tsc)
        self._same("at()", clock.at(now), model.guest_ns)
        model.guest_ns = clock.at(now)
        if not self.lag:
            assert clock.now() == model.guest_ns.__floor__() % oracle.U64
            self._same("skew_ns", clock.skew_ns, model.skew_ns)
            model.skew_ns = clock.skew_ns
        assert (clock.is_paused, clock.dilation) == (model.is_paused, model.dilation)
        self._check_rate()
        self._check_rebuilt()
        self._check_past(now)
        for number, vcpu in enumerate(model.vcpus):
            self._check_tsc(number, vcpu)
            self._check_page(number, vcpu)

    def _check_rate(self) -> None:
        clock, model = self.clock, self.model
        terms = clock._keeper.timeline.terms
        if not model.is_paused:
            assert model.rate == clock.rate, f"rate is {clock.rate}; by the events it is {model.rate}"
        assert clock.rate == model.dilation * (1 + terms.frequency_adjustment + terms.slew)
        assert abs(terms.frequency_adjustment) <= (Fraction(1, 2000) if model.reference != "off" else 0)
        most = model.most_boost()
        assert -min(most, SLOWEST) <= terms.slew <= most, f"a slew of {terms.slew}, at most {most}"

    def _check_rebuilt(self) -> None:
        tsc, ns, rate = self.rebuilt
        told_ns = ns + (self.model.tsc - tsc) * rate * NS_PER_S / self.model.hz
        self._same("guest time by the events alone", told_ns, self.model.guest_ns)

    def _check_past(self, now: HostTsc) -> None:
        self.past[now] = self.model.guest_ns
        if len(self.past) > 100:
            del self.past[next(iter(self.past))]
        then = min(self.past, key=lambda tsc: hash((tsc, len(self.past))))
        self._same("at() in the past", self.clock.at(HostTsc(then)), self.past[then])

    def _check_tsc(self, number: int, vcpu: ModelVcpu) -> None:
        clock, now = self.clock, HostTsc(self.model.tsc)
        assert clock.guest_tsc(number, now) == vcpu.tsc(now), f"vCPU {number}: its TSC"
        assert clock.read_msr(number, 0x3B) == vcpu.adjust
        assert clock.read_msr(number, 0xC0000103) == vcpu.aux
        if vcpu.standing is None:
            assert self.host.tsc_offsets.get(number, 0) == vcpu.offset, f"vCPU {number}: its offset on the host"

    def _info(self, vcpu: ModelVcpu) -> oracle.TimeInfo:
        assert vcpu.page is not None
        return oracle.TimeInfo.parse(self.memory.read(vcpu.page, PAGE_BYTES))

    def _check_page(self, number: int, vcpu: ModelVcpu) -> None:
        """Design 2.3: 2 ns, the ticks that the right shift cuts, and 0.47 ppb of the page's age."""
        model = self.model
        if not vcpu.is_shown:
            return
        info = self._info(vcpu)
        assert not info.is_being_updated
        bound_ns = 2 + model.debt_ns
        if model.is_paused:
            shown_ns = int(self.clock.read(number))
            bound_ns += (2 ** max(-info.tsc_shift, 0)) * 12 * model.dilation * NS_PER_S / model.hz
        else:
            shown_ns = info.read(vcpu.tsc(model.tsc))
            bound_ns += (2 ** max(-info.tsc_shift, 0) - 1) * model.rate * NS_PER_S / model.hz
            if not self.lag:
                assert self.clock.read(number) == shown_ns
        self._near(f"vCPU {number}'s page", Fraction(shown_ns), model.guest_ns, bound_ns)
        assert shown_ns >= vcpu.last_ns, f"vCPU {number}: {vcpu.last_ns} ns, then {shown_ns}"
        vcpu.last_ns = shown_ns

    def _same(self, what: str, found: Fraction, wanted: Fraction) -> None:
        self._near(what, found, wanted, ROUNDING_NS)

    def _near(self, what: str, found: Fraction, wanted: Fraction, tolerance: Fraction) -> None:
        assert abs(found - wanted) <= tolerance, (
            f"{what} is {float(found):.9f}, {float(found - wanted):.3g} more than {float(wanted):.9f}"
        )
