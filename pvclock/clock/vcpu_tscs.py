"""The TSCs of a VM's vCPUs: guest and VMM writes, the host's offsets, and the pages that follow them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal

from pvclock._transaction import attempt
from pvclock.arguments import whole
from pvclock.clock.timekeeper import Timekeeper, TimeState, nothing
from pvclock.errors import RangeError, StateError, TscOffsetNotHonoured
from pvclock.quantities import U64_MASK, GuestTsc, HostTsc, signed64
from pvclock.readings import HostStamps
from pvclock.timekeeping.events import Event, EventCause, EventKind
from pvclock.tsc.agreement import OffsetWrite, repair_plan
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_TSC_AUX, VcpuTsc

__all__ = ["VcpuTscs", "moved"]


class VcpuTscs:
    """The vCPUs' TSCs.  Each begins as the host's plus `tsc_offset`; None keeps the offset that the host has.

    In a restored clock they are stopped at their saved values until resume().

    present: how many vCPUs there are; the others come by add().  One that is not there yet has vCPU 0's TSC, here and
    not on the host, so that it makes no difference to whether they agree.
    """

    def __init__(self, keeper: Timekeeper, tsc_offset: int | None, present: int) -> None:
        self.present = present
        """How many vCPUs there are."""
        self.refused_offset: TscOffsetNotHonoured | None = None
        """The last TSC offset that this host did not honour."""
        self.agree = True
        """True if all vCPUs have the same offset."""
        self._keeper = keeper
        offset = 0 if tsc_offset is None else whole("tsc_offset", tsc_offset)
        self._tscs = [VcpuTsc(offset) for _ in range(keeper.vcpus)]
        self._stopped: list[int] | None = None  # RDTSC values by vCPU, until a restored clock is resumed
        self._stopped_at = HostTsc(0)
        if tsc_offset is None:
            for vcpu, tsc in enumerate(self._tscs[:present]):
                tsc.offset = self._current_offset(vcpu)
        self.take(self._tscs)

    def __len__(self) -> int:
        return len(self._tscs)

    def begin(self) -> None:
        """Set the initial offsets on the host: all, or none and TscOffsetNotHonoured."""
        wanted = dict(enumerate(self._tscs[: self.present]))
        change = OffsetChange(self._keeper, self, self._tscs, wanted, self.host_offsets)
        attempt(change.apply_all, change.undo_on_host, lambda reached: reached())

    def at(self, vcpu: int, host_tsc: HostTsc) -> VcpuTsc:
        """A copy of vCPU's TSC, valid at `host_tsc`, and after it unless the TSC is stopped."""
        tsc = self._tscs[self._keeper.check_vcpu(vcpu)].copy()
        if self._stopped is not None:
            tsc.host_write_tsc(self._stopped[vcpu], host_tsc)
        return tsc

    def read(self, vcpu: int, host_tsc: HostTsc) -> GuestTsc:
        """What vCPU's RDTSC returns at `host_tsc`."""
        return self.at(vcpu, host_tsc).read(host_tsc)

    def adjust(self, vcpu: int) -> int:
        """vCPU's IA32_TSC_ADJUST."""
        return self._tscs[vcpu].adjust

    def aux(self, vcpu: int) -> int:
        """vCPU's IA32_TSC_AUX."""
        return self._tscs[vcpu].aux

    def write(self, vcpu: int, index: int, value: int, cause: EventCause) -> None:
        """WRMSR by the guest (TSC and ADJUST move together, AUX alone) or by the VMM (each alone)."""
        if cause is EventCause.VMM:  # GuestSide.write_msr() has checked a guest's
            index, value = whole("index", index), whole("value", value)
        now = self._keeper.host_tsc()
        tsc = self.at(vcpu, now)
        if vcpu >= self.present:
            raise StateError("write_msr", f"vCPU {vcpu} is not there yet", "add_vcpu() brings it")
        if cause is EventCause.GUEST:
            tsc.wrmsr(index, value, now)
        elif index == MSR_IA32_TSC:
            tsc.host_write_tsc(value, now)
        elif index == MSR_IA32_TSC_ADJUST:
            tsc.host_write_adjust(value)
        elif index == MSR_TSC_AUX:
            tsc.guest_write_aux(value)
        else:
            raise RangeError(f"host write of MSR {index:#x}; it can be 0x10, 0x3b or 0xc0000103")
        if index == MSR_TSC_AUX:
            self._tscs[vcpu].aux = tsc.aux
            return
        stamps = self._keeper.backend.stamps()
        try:
            self._set({vcpu: tsc}, now, cause, vcpu if cause is EventCause.GUEST else None, stamps)
        except TscOffsetNotHonoured as refused:
            if cause is not EventCause.GUEST:
                raise
            # As KVM on such a host: the MSR changes, the TSC does not.
            self._refuse(refused, cause, stamps, partial(setattr, self._tscs[vcpu], "adjust", tsc.adjust))

    def repair(self, *, target: int | None, adjust: Literal["keep", "carry"]) -> list[OffsetWrite]:
        """Put all vCPUs' TSCs on one offset; see GuestClock.repair_tsc()."""
        now = self._keeper.host_tsc()
        tscs = [self.at(vcpu, now) for vcpu in range(self.present)]
        plan = repair_plan(tscs, target=target, adjust=adjust)
        wanted = {write.vcpu: write.applied(tscs[write.vcpu]) for write in plan}
        self._set(wanted, now, EventCause.VMM, None, self._keeper.backend.stamps())
        return plan

    def add(self) -> int:
        """Let the next vCPU be there, out of the guest; its number.

        It gets vCPU 0's TSC and IA32_TSC_ADJUST, whatever KVM gave it: KVM puts a late vCPU on the offset of the last
        TSC that was written to synchronise them, and a guest's own writes are not among those.  TscOffsetNotHonoured
        with nothing changed.
        """
        if self.present == len(self):
            raise StateError("add_vcpu", f"all {len(self)} vCPUs are there", "make the clock of more vCPUs")
        number, late = self.present, self._tscs[0].copy()
        late.aux = 0
        if self._stopped is None:  # else plan_start() sets it
            self._keeper.backend.set_tsc_offset(number, late.offset)
        why = f"vCPU {number} is there, with vCPU 0's TSC: offset {late.offset:#x}"
        event = self._keeper.event(EventKind.TSC, why, self._keeper.backend.stamps())
        self._keeper.record((event,), partial(self._take_late, number, late))
        return number

    def alone(self, vcpu: int) -> VcpuTsc | None:
        """vCPU's TSC itself, for TscWrites to move; None if that could change more, as whether they agree."""
        is_apart = len(self) == 1 or not self.agree
        return self._tscs[vcpu] if self._stopped is None and self.present == len(self) and is_apart else None

    def reset(self) -> None:
        """Set IA32_TSC_ADJUST and TSC_AUX to 0; TSCs keep counting."""
        for tsc in self._tscs:
            tsc.host_write_adjust(0)
            tsc.aux = 0

    @property
    def host_offsets(self) -> list[int]:
        """The vCPUs' offsets as read from the host now; vCPU 0's for those that are not there yet."""
        there = [self._current_offset(vcpu) for vcpu in range(self.present)]
        return there + there[:1] * (len(self) - self.present)

    # Restore, and steps of the host's TSC

    def restore_stopped(self, saved: Sequence[tuple[int, int, int]], host_tsc: HostTsc) -> None:
        """Set each vCPU's saved (TSC, ADJUST, AUX); TSCs are stopped from host_tsc on, until start()."""
        for tsc, (_, adjust, aux) in zip(self._tscs, saved, strict=True):
            tsc.adjust, tsc.aux = adjust, aux
        self._stopped, self._stopped_at = [tsc for tsc, _, _ in saved], host_tsc
        self.show_stopped()

    def plan_start(self, now: HostTsc, gain_ticks: int) -> OffsetChange:
        """The change that starts stopped TSCs at `now`, `gain_ticks` ahead; an empty one if they run."""
        wanted = {}
        for vcpu, stopped in enumerate((self._stopped or ())[: self.present]):
            wanted[vcpu] = self._tscs[vcpu].copy()
            wanted[vcpu].host_write_tsc((stopped + gain_ticks) & U64_MASK, now)
        return OffsetChange(self._keeper, self, self._tscs, wanted, self.host_offsets if wanted else None)

    def plan_move(self, ticks: int) -> OffsetChange:
        """The change that puts all vCPUs' TSCs forward by so many ticks."""
        wanted = {vcpu: tsc.copy() for vcpu, tsc in enumerate(self._tscs[: self.present])}
        for tsc in wanted.values():
            tsc.offset = tsc.offset + ticks & U64_MASK
        return OffsetChange(self._keeper, self, self._tscs, wanted)

    def start(self) -> None:
        """Let stopped TSCs run, by the offsets that plan_start() set."""
        self._stopped = None

    def plan_renumbering(self, before: HostTsc, after: HostTsc) -> OffsetChange:
        """The change of offsets that keeps guest TSCs continuous when the host's steps from `before` to `after`.

        If KVM has adjusted an offset already, as it does when the host wakes, that offset stays.
        """
        if self._stopped is not None:
            since = HostTsc((self._stopped_at + after - before) & U64_MASK)
            return OffsetChange(self._keeper, self, self._tscs, {}, stopped_at=(self._stopped_at, since))
        wanted = {}
        for vcpu, tsc in enumerate(self._tscs[: self.present]):
            wanted[vcpu] = tsc.copy()
            wanted[vcpu].offset = (tsc.offset + before - after) & U64_MASK
            current = self._current_offset(vcpu)
            if abs(signed64(current - wanted[vcpu].offset)) < abs(signed64(current - tsc.offset)):
                wanted[vcpu].offset = current
        return OffsetChange(self._keeper, self, self._tscs, wanted, self.host_offsets)

    def read_back(self, vcpu: int | None) -> None:
        """Read the vCPUs' offsets from the host, after something that may have changed them."""
        if self._stopped is None:
            self._keeper.with_vcpus_out(vcpu, self._take_current_offsets)

    def take(self, tscs: list[VcpuTsc]) -> None:
        """Use these TSCs, whose offsets the host has already; pages show them from the next publish on."""
        there = tscs[: self.present]
        every = there + [there[0].copy() for _ in range(len(tscs) - len(there))]
        self._tscs, self.agree = every, len({tsc.offset for tsc in there}) == 1
        for vcpu, tsc in enumerate(every):
            self._keeper.pages.set_tsc_offset(vcpu, tsc.offset)

    def show_stopped(self, at: HostTsc | None = None) -> None:
        """Show stopped TSCs to readers in this process.  at: the host TSC of the stop, if renumbered."""
        self._stopped_at = self._stopped_at if at is None else at
        for vcpu, stopped in enumerate(self._stopped or ()):
            self._keeper.pages.set_tsc_offset(vcpu, (stopped - self._stopped_at) & U64_MASK)

    # Inside

    def _take_late(self, number: int, late: VcpuTsc) -> None:
        tscs = [*self._tscs[:number], late, *self._tscs[number + 1 :]]
        if self._stopped is not None:
            self._stopped = [*self._stopped[:number], self._stopped[0], *self._stopped[number + 1 :]]
        self.present = number + 1
        self.take(tscs)
        self.show_stopped()

    def _take_current_offsets(self) -> None:
        before, current = self._tscs, [tsc.copy() for tsc in self._tscs]
        for vcpu, tsc in enumerate(current[: self.present]):
            tsc.offset = self._current_offset(vcpu)
        if [tsc.offset for tsc in current] != [tsc.offset for tsc in before]:
            why = "the host's KVM has changed the vCPUs' TSC offsets; pages follow"
            event = self._keeper.event(EventKind.TSC, why, self._keeper.backend.stamps())
            self._keeper.publish_with(partial(self.take, current), partial(self.take, before), lambda: (event,))

    def _current_offset(self, vcpu: int) -> int:
        offset = self._keeper.backend.tsc_offset(vcpu)
        return self._tscs[vcpu].offset if offset is None else offset

    def _set(
        self,
        wanted: dict[int, VcpuTsc],
        now: HostTsc,
        cause: EventCause,
        out_of_guest: int | None,
        stamps: HostStamps,
    ) -> None:
        """Set those TSCs and publish: all, or none and TscOffsetNotHonoured.  stamps: the events'."""
        keeper, before = self._keeper, self._tscs
        if self._stopped is not None:
            stopped, tscs = list(self._stopped), [tsc.copy() for tsc in before]
            for vcpu, tsc in wanted.items():
                stopped[vcpu], tscs[vcpu].adjust = tsc.read(now), tsc.adjust
            self._stopped, self._tscs = stopped, tscs
            self.show_stopped()
            return
        offsets = {vcpu: tsc.offset for vcpu, tsc in wanted.items()}
        whys = [moved(vcpu, before[vcpu].offset, new) for vcpu, new in offsets.items()]

        def events() -> tuple[Event, ...]:
            return tuple(keeper.event(EventKind.TSC, why, stamps, cause=cause) for why in whys)

        change = OffsetChange(keeper, self, before, wanted)
        publish = partial(keeper.publish_with, change.apply_all, change.undo, events, out_of_guest)
        if out_of_guest is None:
            keeper.with_vcpus_out(None, publish)
        else:
            publish(tsc_only=True)  # that vCPU is out, and the others' pages do not depend on its TSC

    def _refuse(
        self, refused: TscOffsetNotHonoured, cause: EventCause, stamps: HostStamps, on_commit: Callable[[], object]
    ) -> None:
        """Record that the host did not honour an offset, in one step with on_commit()."""
        event = self._keeper.event(EventKind.REFUSED, str(refused), stamps, cause=cause)

        def take() -> None:
            on_commit()
            self.refused_offset = refused

        self._keeper.record((event,), take)


def moved(vcpu: int, before: int, after: int) -> str:
    """The event's words: that vCPU's TSC has another offset."""
    return f"vCPU {vcpu}: offset {before:#x} becomes {after:#x}"


class OffsetChange:
    """New TSCs for some vCPUs: applied to the host, and to pages from the next publish on, or undone.

    host_offsets: the host's present offsets, if not those of `before`.  stopped_at: the host TSC of the stop of stopped
    TSCs, before and after.
    """

    def __init__(
        self,
        keeper: Timekeeper,
        tscs: VcpuTscs,
        before: list[VcpuTsc],
        wanted: dict[int, VcpuTsc],
        host_offsets: list[int] | None = None,
        stopped_at: tuple[HostTsc, HostTsc] | None = None,
    ) -> None:
        self.refused: TscOffsetNotHonoured | None = None
        """The last offset that this host did not honour."""
        self._stopped_at = stopped_at
        self._is_recorded = False  # that the host kept some offsets after undo()
        self._keeper, self._tscs, self._before, self._wanted = keeper, tscs, before, wanted
        self._host_offsets = [tsc.offset for tsc in before] if host_offsets is None else host_offsets

    def apply_all(self) -> None:
        """Set all offsets on the host, or none and TscOffsetNotHonoured.

        TSCs that go back come first: a host that only moves TSCs forward refuses those before it has set any other.
        """
        for vcpu, tsc in sorted(self._wanted.items(), key=self._ahead_ticks):
            self._keeper.backend.set_tsc_offset(vcpu, tsc.offset)
        self._take()

    def apply_honoured(self) -> None:
        """Set the offsets that the host honours; a vCPU whose offset it refuses keeps its present one."""
        for vcpu, tsc in self._wanted.items():
            try:
                if tsc.offset != self._host_offsets[vcpu]:
                    self._keeper.backend.set_tsc_offset(vcpu, tsc.offset)
            except TscOffsetNotHonoured as refused:
                self.refused, tsc.offset = refused, self._host_offsets[vcpu]
        self._take()

    def undo(self) -> None:
        """Restore host and pages; an offset that the host does not restore stays in both, and is an event."""
        kept, tscs = self.undo_on_host(), list(self._before)
        for vcpu, offset in kept.items():
            wanted = self._wanted[vcpu]
            tscs[vcpu] = wanted.copy() if offset == wanted.offset else self._before[vcpu].copy()
            tscs[vcpu].offset = offset
        if self._wanted:
            self._tscs.take(tscs)
            self._tscs.show_stopped()
        if self._stopped_at is not None:
            self._tscs.show_stopped(self._stopped_at[0])
        if kept and not self._is_recorded:
            self._keeper.publish_with(nothing, nothing, partial(self._kept_events, kept, self._keeper.backend.stamps()))

    def undo_on_host(self) -> dict[int, int]:
        """Restore the host's offsets; returns those that the host keeps instead, by vCPU."""
        kept = {}
        for vcpu in self._wanted:
            before, backend = self._host_offsets[vcpu], self._keeper.backend
            try:
                backend.set_tsc_offset(vcpu, before)
            except Exception:  # noqa: BLE001  # the error that led to undo() is raised instead
                with suppress(Exception):
                    current = backend.tsc_offset(vcpu)
                    if current not in (None, before):
                        kept[vcpu] = current
        return kept

    def _kept_events(self, kept: dict[int, int], stamps: HostStamps) -> tuple[Event, ...]:
        self._is_recorded = True
        whys = [
            f"vCPU {vcpu}: offset {offset:#x} stays: the host does not restore the previous one"
            for vcpu, offset in kept.items()
        ]
        return tuple(self._keeper.event(EventKind.TSC, why, stamps) for why in whys)

    def _ahead_ticks(self, wanted: tuple[int, VcpuTsc]) -> int:
        vcpu, tsc = wanted
        return signed64(tsc.offset - self._host_offsets[vcpu])

    def refusal(self, stamps: HostStamps, state: TimeState) -> tuple[Event, ...]:
        """The event, at an instant of `state`, for an offset that the host did not honour; sets refused_offset."""
        if self.refused is None:
            return ()
        self._tscs.refused_offset = self.refused
        return (self._keeper.event(EventKind.REFUSED, str(self.refused), stamps, before=state),)

    def _take(self) -> None:
        if self._stopped_at is not None:
            self._tscs.show_stopped(self._stopped_at[1])
        if self._wanted:
            self._tscs.take([self._wanted.get(vcpu, tsc) for vcpu, tsc in enumerate(self._before)])
