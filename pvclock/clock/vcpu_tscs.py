"""The TSCs of a VM's vCPUs: what guest and VMM write to them, and what then becomes of the pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal

from pvclock._transaction import attempt
from pvclock.arguments import whole
from pvclock.clock.timekeeper import Timekeeper, TimeState, nothing
from pvclock.errors import RangeError, TscOffsetNotHonoured
from pvclock.quantities import U64_MASK, GuestTsc, HostTsc, signed64
from pvclock.readings import HostStamps
from pvclock.timekeeping.events import Event, EventCause, EventKind
from pvclock.tsc.agreement import OffsetWrite, repair_plan
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_TSC_AUX, VcpuTsc

__all__ = ["VcpuTscs"]


class VcpuTscs:
    """The vCPUs' TSCs, each at first the host's plus `tsc_offset`, or (None) plus the offset that it has.

    Those of a restored clock stand at what they were saved as, until resume() lets them go on.
    """

    def __init__(self, keeper: Timekeeper, tsc_offset: int | None) -> None:
        self.refused_offset: TscOffsetNotHonoured | None = None
        """The last TSC offset that this host could not give."""
        self.agree = True
        """Have all vCPUs one offset?"""
        self._keeper = keeper
        offset = 0 if tsc_offset is None else whole("tsc_offset", tsc_offset)
        self._tscs = [VcpuTsc(offset) for _ in range(keeper.vcpus)]
        self._standing: list[int] | None = None  # what RDTSC returns, by vCPU, until a restored clock is resumed
        self._standing_since = HostTsc(0)
        if tsc_offset is None:
            for vcpu, tsc in enumerate(self._tscs):
                tsc.offset = self._offset_that_is(vcpu)
        self.take(self._tscs)

    def __len__(self) -> int:
        return len(self._tscs)

    def begin(self) -> None:
        """Give the host the offsets that these TSCs begin with, all or (TscOffsetNotHonoured) none."""
        change = OffsetChange(self._keeper, self, self._tscs, dict(enumerate(self._tscs)), self.host_offsets)
        attempt(change.give_all, change.hand_back, lambda reached: reached())

    def at(self, vcpu: int, host_tsc: HostTsc) -> VcpuTsc:
        """A copy of vCPU's TSC, which reads right at `host_tsc`, and from there on if it does not stand."""
        tsc = self._tscs[self._keeper.check_vcpu(vcpu)].copy()
        if self._standing is not None:
            tsc.host_write_tsc(self._standing[vcpu], host_tsc)
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
        """WRMSR by the guest (TSC and ADJUST move together, AUX is alone) or by the VMM (each alone)."""
        if cause is EventCause.VMM:  # the guest's are checked
            index, value = whole("index", index), whole("value", value)
        now = self._keeper.host_tsc()
        tsc = self.at(vcpu, now)
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
        try:
            self._set({vcpu: tsc}, now, cause, vcpu if cause is EventCause.GUEST else None)
        except TscOffsetNotHonoured as refused:
            if cause is not EventCause.GUEST:
                raise
            # As KVM has it on such a host: the MSR moves, the TSC does not.
            self._refuse(refused, cause, partial(setattr, self._tscs[vcpu], "adjust", tsc.adjust))

    def repair(self, *, target: int | None, adjust: Literal["keep", "carry"]) -> list[OffsetWrite]:
        """Put all vCPUs' TSCs on one offset; see GuestClock.repair_tsc()."""
        now = self._keeper.host_tsc()
        tscs = [self.at(vcpu, now) for vcpu in range(len(self))]
        plan = repair_plan(tscs, target=target, adjust=adjust)
        self._set({write.vcpu: write.applied(tscs[write.vcpu]) for write in plan}, now, EventCause.VMM, None)
        return plan

    def reset(self) -> None:
        """IA32_TSC_ADJUST and TSC_AUX become 0; TSCs go on."""
        for tsc in self._tscs:
            tsc.host_write_adjust(0)
            tsc.aux = 0

    @property
    def host_offsets(self) -> list[int]:
        """The vCPUs' offsets as the host has them now."""
        return [self._offset_that_is(vcpu) for vcpu in range(len(self))]

    # Restored, and after a host's TSC stepped

    def stand(self, saved: Sequence[tuple[int, int, int]], host_tsc: HostTsc) -> None:
        """Each vCPU's (TSC, ADJUST, AUX) as they were saved; its TSC stands, from host_tsc on, until it may go on."""
        for tsc, (_, adjust, aux) in zip(self._tscs, saved, strict=True):
            tsc.adjust, tsc.aux = adjust, aux
        self._standing, self._standing_since = [tsc for tsc, _, _ in saved], host_tsc
        self.show_standing()

    def going_on(self, now: HostTsc, gain_ticks: int) -> OffsetChange:
        """What is to change so that TSCs that stand go on from `now`, `gain_ticks` ahead; nothing where none stands."""
        wanted = {}
        for vcpu, standing in enumerate(self._standing or ()):
            wanted[vcpu] = self._tscs[vcpu].copy()
            wanted[vcpu].host_write_tsc((standing + gain_ticks) & U64_MASK, now)
        return OffsetChange(self._keeper, self, self._tscs, wanted, self.host_offsets if wanted else None)

    def stand_no_more(self) -> None:
        """What stood goes on, by the offsets that it was given."""
        self._standing = None

    def renumbering(self, before: HostTsc, after: HostTsc) -> OffsetChange:
        """What is to change when the host's TSC steps from `before` to `after`, so that the guests' go on, if possible.

        KVM may have seen to that already, when the host woke; then its offsets are taken as they are.
        """
        if self._standing is not None:
            since = HostTsc((self._standing_since + after - before) & U64_MASK)
            return OffsetChange(self._keeper, self, self._tscs, {}, standing_since=(self._standing_since, since))
        wanted = {}
        for vcpu, tsc in enumerate(self._tscs):
            wanted[vcpu] = tsc.copy()
            wanted[vcpu].offset = (tsc.offset + before - after) & U64_MASK
            there = self._offset_that_is(vcpu)
            if abs(signed64(there - wanted[vcpu].offset)) < abs(signed64(there - tsc.offset)):
                wanted[vcpu].offset = there
        return OffsetChange(self._keeper, self, self._tscs, wanted, self.host_offsets)

    def read_back(self, vcpu: int | None) -> None:
        """Take the vCPUs' offsets as the host has them now, after something that may have changed them."""
        if self._standing is None:
            self._keeper.with_vcpus_out(vcpu, self._take_offsets_that_are)

    def take(self, tscs: list[VcpuTsc]) -> None:
        """Have these, which the host has already, in the pages from the next publish on."""
        self._tscs, self.agree = tscs, len({tsc.offset for tsc in tscs}) == 1
        for vcpu, tsc in enumerate(tscs):
            self._keeper.pages.set_tsc_offset(vcpu, tsc.offset)

    def show_standing(self, since: HostTsc | None = None) -> None:
        """Readers in this process find the TSCs that stand; since: which host TSC is it now since when they do?"""
        self._standing_since = self._standing_since if since is None else since
        for vcpu, standing in enumerate(self._standing or ()):
            self._keeper.pages.set_tsc_offset(vcpu, (standing - self._standing_since) & U64_MASK)

    # Inside

    def _take_offsets_that_are(self) -> None:
        before, there = self._tscs, [tsc.copy() for tsc in self._tscs]
        for vcpu, tsc in enumerate(there):
            tsc.offset = self._offset_that_is(vcpu)
        if [tsc.offset for tsc in there] != [tsc.offset for tsc in before]:
            why = "the host's KVM has changed the vCPUs' TSC offsets; pages follow"
            event = self._keeper.event(EventKind.TSC, why, self._keeper.backend.stamps())
            self._keeper.adopt(partial(self.take, there), partial(self.take, before), lambda: (event,))

    def _offset_that_is(self, vcpu: int) -> int:
        offset = self._keeper.backend.tsc_offset(vcpu)
        return self._tscs[vcpu].offset if offset is None else offset

    def _set(self, wanted: dict[int, VcpuTsc], now: HostTsc, cause: EventCause, out_of_guest: int | None) -> None:
        """Let the vCPUs have those TSCs, all or (TscOffsetNotHonoured) none, and publish."""
        keeper, before = self._keeper, self._tscs
        if self._standing is not None:
            standing, tscs = list(self._standing), [tsc.copy() for tsc in before]
            for vcpu, tsc in wanted.items():
                standing[vcpu], tscs[vcpu].adjust = tsc.read(now), tsc.adjust
            self._standing, self._tscs = standing, tscs
            self.show_standing()
            return
        stamps = keeper.backend.stamps()
        offsets = {vcpu: tsc.offset for vcpu, tsc in wanted.items()}
        whys = [f"vCPU {vcpu}: offset {before[vcpu].offset:#x} becomes {new:#x}" for vcpu, new in offsets.items()]
        events = tuple(keeper.event(EventKind.TSC, why, stamps, cause=cause) for why in whys)
        change = OffsetChange(keeper, self, before, wanted)
        keeper.with_vcpus_out(out_of_guest, partial(keeper.adopt, change.give_all, change.give_back, lambda: events))

    def _refuse(self, refused: TscOffsetNotHonoured, cause: EventCause, taking: Callable[[], object]) -> None:
        """Record that the host cannot give an offset, in one step with what changes all the same."""
        event = self._keeper.event(EventKind.REFUSED, str(refused), self._keeper.backend.stamps(), cause=cause)

        def take() -> None:
            taking()
            self.refused_offset = refused

        self._keeper.record((event,), take)


class OffsetChange:
    """Other TSCs for some vCPUs: given to the host and shown in pages from the next publish on, or given back.

    host_offsets: what the host has before, if not the offsets of `before`.  standing_since: as of which host TSC those
    stand that stand, before and after.
    """

    def __init__(
        self,
        keeper: Timekeeper,
        tscs: VcpuTscs,
        before: list[VcpuTsc],
        wanted: dict[int, VcpuTsc],
        host_offsets: list[int] | None = None,
        standing_since: tuple[HostTsc, HostTsc] | None = None,
    ) -> None:
        self.refused: TscOffsetNotHonoured | None = None
        """The last offset that this host could not give."""
        self._since = standing_since
        self._is_told = False  # that it did not take some back
        self._keeper, self._tscs, self._before, self._wanted = keeper, tscs, before, wanted
        self._host_offsets = [tsc.offset for tsc in before] if host_offsets is None else host_offsets

    def give_all(self) -> None:
        """Give the host all, or (TscOffsetNotHonoured) none.

        TSCs that go back come first: a host that puts them forward only refuses those before it has taken any other.
        """
        for vcpu, tsc in sorted(self._wanted.items(), key=self._ahead_ticks):
            self._keeper.backend.set_tsc_offset(vcpu, tsc.offset)
        self._take()

    def give_what_it_takes(self) -> None:
        """Give the host what it honours; vCPUs whose offset it does not stay at the one that it has."""
        for vcpu, tsc in self._wanted.items():
            try:
                if tsc.offset != self._host_offsets[vcpu]:
                    self._keeper.backend.set_tsc_offset(vcpu, tsc.offset)
            except TscOffsetNotHonoured as refused:
                self.refused, tsc.offset = refused, self._host_offsets[vcpu]
        self._take()

    def give_back(self) -> None:
        """All as before, on the host and in pages; what the host does not take back stays in both, and is told."""
        stays, tscs = self.hand_back(), list(self._before)
        for vcpu, offset in stays.items():
            wanted = self._wanted[vcpu]
            tscs[vcpu] = wanted.copy() if offset == wanted.offset else self._before[vcpu].copy()
            tscs[vcpu].offset = offset
        if self._wanted:
            self._tscs.take(tscs)
            self._tscs.show_standing()
        if self._since is not None:
            self._tscs.show_standing(self._since[0])
        if stays and not self._is_told:
            self._keeper.adopt(nothing, nothing, partial(self._tell, stays, self._keeper.backend.stamps()))

    def hand_back(self) -> dict[int, int]:
        """Have the host take back what it was given; by vCPU, the offsets that it has and does not take back."""
        stays = {}
        for vcpu in self._wanted:
            before, backend = self._host_offsets[vcpu], self._keeper.backend
            try:
                backend.set_tsc_offset(vcpu, before)
            except Exception:  # noqa: BLE001  # what made us give back comes out
                with suppress(Exception):
                    there = backend.tsc_offset(vcpu)
                    if there not in (None, before):
                        stays[vcpu] = there
        return stays

    def _tell(self, stays: dict[int, int], stamps: HostStamps) -> tuple[Event, ...]:
        self._is_told = True
        whys = [
            f"vCPU {vcpu}: offset {offset:#x} stays, for the host does not take it back"
            for vcpu, offset in stays.items()
        ]
        return tuple(self._keeper.event(EventKind.TSC, why, stamps) for why in whys)

    def _ahead_ticks(self, wanted: tuple[int, VcpuTsc]) -> int:
        vcpu, tsc = wanted
        return signed64(tsc.offset - self._host_offsets[vcpu])

    def refusal(self, stamps: HostStamps, state: TimeState) -> tuple[Event, ...]:
        """What is to be recorded, at an instant of `state`, of an offset that this host could not give.

        It is known from now on.
        """
        if self.refused is None:
            return ()
        self._tscs.refused_offset = self.refused
        return (self._keeper.event(EventKind.REFUSED, str(self.refused), stamps, before=state),)

    def _take(self) -> None:
        if self._since is not None:
            self._tscs.show_standing(self._since[1])
        if self._wanted:
            self._tscs.take([self._wanted.get(vcpu, tsc) for vcpu, tsc in enumerate(self._before)])
