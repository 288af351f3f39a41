"""Memory that comes and goes, resets, and saved states that come back."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from fractions import Fraction

from pvclock import GuestAddressError, GuestClock, RangeError, StateError
from pvclock.readings import HostStamps
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState
from pvclock.timekeeping.events import EventKind
from tests.model.faulty_host import FaultyHost
from tests.model.model_clock import U64, ModelClock
from tests.model.time_moves import REFERENCES
from tests.model.twins import FAR_BYTES, FAR_SLOT, PAGE_BYTES, Twins

__all__ = ["LifeMoves"]

KEPT = 4


class LifeMoves:
    """A VM's life: every method is one move."""

    def __init__(self, twins: Twins) -> None:
        self._twins = twins
        self._saved: list[tuple[ClockState, ModelClock, HostStamps]] = []

    # Memory

    def add_memory(self) -> None:
        """A slot comes."""
        if FAR_SLOT not in self._twins.slots:
            self._twins.memory.add_slot(FAR_SLOT, bytearray(FAR_BYTES))
            self._twins.slots[FAR_SLOT] = FAR_BYTES

    def remove_memory(self) -> None:
        """It goes."""
        if self._twins.slots.pop(FAR_SLOT, None):
            self._twins.memory.remove_slot(FAR_SLOT)
            for number, vcpu in enumerate(self._twins.model.vcpus):
                if vcpu.page is not None and not self._twins.covers(vcpu.page, PAGE_BYTES):
                    vcpu.is_shown = False
                    assert self._twins.clock.page(number) is None

    # Life

    def reset(self) -> None:
        """The VM is reset."""
        twins = self._twins
        if twins.call(self._twins.clock.reset, publishes=False):
            return
        self._twins.model.boot_vcpu_is_old = False
        for vcpu in self._twins.model.vcpus:
            vcpu.adjust = vcpu.aux = 0
            vcpu.page, vcpu.steal_gpa, vcpu.is_shown = None, None, False
        twins.publish()

    def save(self) -> None:
        """The clock as it is now."""
        states: list[ClockState] = []
        twins, runs = self._twins, not self._twins.model.is_paused
        if twins.call(lambda: states.append(twins.clock.save()), publishes=False, needs_tsc=runs):
            return
        assert not (runs and twins.is_undecided), "save() did not look at the host"
        if not states:  # on_dirty raised
            return
        state, model = states[0], self._twins.model
        if not self._twins.is_undecided:
            missed_at = model.paused_dilation if model.is_paused else model.dilation
            assert (state.timeline.guest_ns, state.timeline.dilation) == (model.guest_ns % U64, model.dilation)
            assert state.timeline.paused == model.is_paused
            assert (state.timeline.paused_dilation or state.timeline.dilation) == missed_at
            assert (state.policy.policy, state.sleep_policy.policy) == (model.policy, model.sleep_policy)
            assert state.wall_clock == model.wall_clock
        assert clock_state.from_json(clock_state.to_json(state)) == state
        self._saved = [*self._saved, (state, deepcopy(model), twins.host.stamps())][-KEPT:]

    def restore(self, which: int, hz: int, tsc: int) -> None:
        """A saved state comes back: on this host, or on one of `hz` (0: this) that may run for long or be younger."""
        twins = self._twins
        if not self._saved or twins.is_undecided or twins.lag:
            return
        state, then, saved_at = self._saved[which % len(self._saved)]
        old, host = self._twins.clock, self._twins.host
        if hz:
            host = FaultyHost(hz, tsc, ref_ns=tsc, realtime_ns=host.realtime_ns + which - 2)
        memory = twins.memory
        offsets = dict(host.tsc_offsets)
        clock = GuestClock.restore(state, memory, backend=host)
        assert host.tsc_offsets == offsets, "offsets are resume()'s to set"
        for refused in (old.refresh, old.save):
            try:
                refused()
            except StateError:
                continue
            raise AssertionError("two clocks live over one memory")
        self._adopt(clock, host, state, then, saved_at)

    def _adopt(
        self, clock: GuestClock, host: FaultyHost, state: ClockState, then: ModelClock, saved_at: HostStamps
    ) -> None:
        twins, model = self._twins, deepcopy(then)
        saved_tsc = state.host.tsc
        for number, vcpu in enumerate(model.vcpus):
            vcpu.standing = vcpu.tsc(saved_tsc)
            vcpu.is_shown, vcpu.last_ns, vcpu.offset = False, 0, 0
            assert state.vcpus[number].guest_tsc == vcpu.standing
            vcpu.told_ns = host.run_delays_ns.get(number, 0)
        if not model.is_paused:
            model.stopped, model.paused_dilation = saved_at, model.dilation
        model.hz, model.tsc, model.rate, model.frequency_adjustment = host.tsc_hz, host.tsc, Fraction(0), Fraction(0)
        model.elsewhere, model.tsc_trusted, model.ever_published, model.debt_ns = True, True, True, Fraction(0)
        model.reference = model.reference if model.reference in REFERENCES[1:4] else "off"
        twins.clock, twins.host, twins.model, twins.published_tsc = clock, host, model, host.tsc
        (told,) = [event for event in clock.events.read().events if event.kind is EventKind.RESTORE]
        assert (told.guest_ns_after, told.rate_after) == (state.timeline.guest_ns, Fraction(0))
        twins.adopt_host()

    def misuse(self, which: int) -> None:
        """What makes no sense is refused, and nothing changes."""
        clock = self._twins.clock
        if self._twins.is_undecided or self._twins.lag:
            return
        refused: tuple[Callable[[], object], ...] = (
            lambda: clock.dilate(0),
            lambda: clock.dilate(1, 2**64),
            lambda: clock.skip(-1),
            lambda: clock.skip(2**64),
            lambda: clock.slew(2**65),
            lambda: clock.run_for(0),
            lambda: clock.host_write_msr(0, 0x11, 1),
            lambda: self._twins.memory.remove_slot(0x77000),
        )
        try:
            refused[which % len(refused)]()
        except (RangeError, StateError, GuestAddressError):
            return
        raise AssertionError("it was not refused")
