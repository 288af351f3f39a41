"""What a guest does to a clock and its model, and a VMM that restores its MSRs."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

from pvclock import MsrFault, RangeError, TscOffsetNotHonoured
from pvclock.clock.wall_clock import WallClockBase
from pvclock.quantities import signed64
from tests.model.model_clock import NS_PER_S, U64
from tests.model.ticking import looked
from tests.model.twins import BASE_BYTES, FAR_SLOT, PAGE_BYTES, Twins

__all__ = ["PLACES", "STEAL_PLACES", "WALL_PLACES", "GuestMoves"]

TSC, ADJUST, AUX = 0x10, 0x3B, 0xC0000103
SYSTEM_TIME, SYSTEM_TIME_OLD, WALL_CLOCK, STEAL_TIME = 0x4B564D01, 0x12, 0x4B564D00, 0x4B564D03
PLACES = (0x2000, 0x3004, 0x5002, FAR_SLOT, 0x90000, BASE_BYTES - 16, 0xFFFFFFFFFFFF0000)
STEAL_PLACES = (0x7000, FAR_SLOT + 0x400, 0x90000)
WALL_PLACES = (0x8000, 0x8003, FAR_SLOT + 0x800, 0x90000)


class GuestMoves:
    """MSRs and records: every method is one move."""

    def __init__(self, twins: Twins) -> None:
        self._twins = twins

    # The guest

    def write_tsc(self, vcpu: int, value: int, by: int) -> None:
        """IA32_TSC, by the guest or the VMM; a small `value` is a difference to what it reads."""
        number = vcpu % len(self._twins.model.vcpus)
        if not looked(self._twins):
            return
        target = self._twins.model.vcpus[number]
        value = (target.tsc(self._twins.host.true_tsc) + value) % U64 if abs(value) < 2**40 else value
        now = self._twins.host.tsc if self._twins.lag else self._twins.host.true_tsc
        before = target.tsc(now)

        def then() -> None:
            target.write_tsc(value, now)
            if by == 0:
                target.adjust = (target.adjust + value - before) % U64

        self._write(number, TSC, value, by, then, lambda: (target.adjust + value - before) % U64)

    def write_adjust(self, vcpu: int, value: int, by: int) -> None:
        """IA32_TSC_ADJUST, by the guest or the VMM."""
        number = vcpu % len(self._twins.model.vcpus)
        target, value = self._twins.model.vcpus[number], value % U64
        if not looked(self._twins):
            return

        def then() -> None:
            if by == 0:
                now = self._twins.model.tsc
                target.write_tsc(target.tsc(now) + value - target.adjust, now)
            target.adjust = value

        self._write(number, ADJUST, value, by, then, lambda: value)

    def _write(
        self, vcpu: int, index: int, value: int, by: int, then: Callable[[], None], adjust: Callable[[], int]
    ) -> None:
        """WRMSR of what moves a TSC."""
        twins, target = self._twins, self._twins.model.vcpus[vcpu]
        refusing = (
            target.standing is None and self._twins.host.refuse is not None and self._twins.host.refuse[0] == vcpu
        )
        is_guest, saved = by == 0, deepcopy(target)
        refused_adjust = adjust()
        write = self._twins.clock.write_msr if is_guest else self._twins.clock.host_write_msr
        if not refusing:
            then()
        refused = twins.call(
            lambda: write(vcpu, index, value),
            refusals=() if is_guest else (TscOffsetNotHonoured,),
            publishes=not refusing,
            needs_tsc=not is_guest,
        )
        if refused:
            target.__dict__.update(saved.__dict__)
        elif refusing:
            assert is_guest, "an offset that failed was not told"
            target.adjust = refused_adjust
        elif twins.lag:
            self._unpublished(vcpu)

    def write_aux(self, vcpu: int, value: int, by: int) -> None:
        """TSC_AUX, which faults beyond 32 bits."""
        number = vcpu % len(self._twins.model.vcpus)
        write = self._twins.clock.write_msr if by == 0 else self._twins.clock.host_write_msr
        operation = lambda: write(number, AUX, value)  # noqa: E731  # said once
        refusals = (MsrFault,) if value >> 32 else ()
        if not self._twins.call(operation, refusals=refusals, publishes=False, needs_tsc=by != 0):
            assert not value >> 32
            self._twins.model.vcpus[number].aux = value

    def repair(self) -> None:
        """One offset for all."""
        model, clock = self._twins.model, self._twins.clock
        if model.vcpus[0].standing is not None:
            return
        if not looked(self._twins):
            return
        before = [vcpu.offset for vcpu in model.vcpus]
        refusals = (TscOffsetNotHonoured, RangeError)
        if self._twins.call(clock.repair_tsc, refusals=refusals, publishes=False, needs_tsc=True):
            return
        offset = clock.tsc(0).offset
        assert offset in before
        for vcpu in model.vcpus:
            assert signed64(offset - vcpu.offset) >= 0, "a guest's TSC was put back"
            vcpu.offset = offset
        self._twins.publish()

    def place_page(self, vcpu: int, place: int, old: int) -> None:
        """The guest registers its page; beyond the places, it takes it back."""
        number = vcpu % len(self._twins.model.vcpus)
        gpa = PLACES[place] + 0x40 * number if place < len(PLACES) else None
        value = 0 if gpa is None else gpa | 1
        model, msr = self._twins.model, SYSTEM_TIME_OLD if old else SYSTEM_TIME
        target = model.vcpus[number]
        before = target.page, target.is_shown, model.boot_vcpu_is_old
        target.is_shown = False
        if gpa is None or gpa % 4096 + PAGE_BYTES <= 4096:  # else Linux keeps the old one
            target.page, target.is_spoilt = gpa, False
        model.boot_vcpu_is_old = bool(old) if number == 0 else model.boot_vcpu_is_old
        if self._twins.call(lambda: self._twins.clock.write_msr(number, msr, value)):
            target.page, target.is_shown, model.boot_vcpu_is_old = before
            target.is_shown &= gpa is not None  # read() has let go of it, until the next publish

    def _unpublished(self, vcpu: int) -> None:
        self._twins.model.vcpus[vcpu].is_shown = False

    def scribble(self, vcpu: int, value: int) -> None:
        """The guest writes anything over its page."""
        number = vcpu % len(self._twins.model.vcpus)
        target = self._twins.model.vcpus[number]
        if target.page is not None and self._twins.covers(target.page, PAGE_BYTES):
            self._twins.memory.write(target.page, value.to_bytes(PAGE_BYTES, "little"))
            target.is_shown, target.is_spoilt = False, True

    def place_steal(self, vcpu: int, place: int) -> None:
        """The guest registers its steal time record."""
        number = vcpu % len(self._twins.model.vcpus)
        gpa = STEAL_PLACES[place] + 0x40 * number if place < len(STEAL_PLACES) else None
        value = 0 if gpa is None else gpa | 1
        if not self._twins.call(lambda: self._twins.clock.write_msr(number, STEAL_TIME, value), publishes=False):
            self._twins.model.vcpus[number].steal_gpa = gpa

    def delay(self, vcpu: int, ns: int, anew: int) -> None:
        """The host keeps a vCPU waiting; `anew`: its thread was made anew."""
        number, delays = vcpu % len(self._twins.model.vcpus), self._twins.host.run_delays_ns
        delays[number] = ns if anew else delays.get(number, 0) + ns

    def ask_wall_clock(self, vcpu: int, place: int) -> None:
        """The guest asks for the time of day."""
        twins, model = self._twins, self._twins.model
        if twins.lag:
            return
        if not looked(self._twins):
            return
        gpa, number = WALL_PLACES[place], vcpu % len(model.vcpus)
        twins.call(lambda: self._twins.clock.write_msr(number, WALL_CLOCK, gpa), publishes=False)
        if not twins.covers(gpa, 12):
            return
        version, sec, nsec = (int.from_bytes(twins.memory.read(gpa + at, 4), "little") for at in (0, 4, 8))
        offset_ns, fixed_ns = model.wall_clock
        epoch_ns = fixed_ns if fixed_ns is not None else self._twins.host.realtime_ns - model.guest_ns.__floor__()
        assert version % 2 == 0
        assert (sec, nsec) == ((epoch_ns + offset_ns) // NS_PER_S % 2**32, (epoch_ns + offset_ns) % NS_PER_S)

    def base_wall_clock(self, offset_ns: int, fixed_ns: int) -> None:
        """The time of day is made of something else."""
        base = WallClockBase(offset_ns, fixed_ns or None)
        self._twins.clock.wall_clock, self._twins.model.wall_clock = base, (base.offset_ns, base.fixed_ns)
