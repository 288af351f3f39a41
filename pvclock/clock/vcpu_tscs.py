"""The TSCs of a VM's vCPUs: what guest and VMM write to them, and what then becomes of the pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pvclock.clock.timekeeper import Timekeeper
from pvclock.errors import RangeError, TscOffsetNotHonoured
from pvclock.events import Event, EventCause, EventKind
from pvclock.quantities import U64_MASK, GuestTsc, HostTsc, signed64
from pvclock.tsc import MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_TSC_AUX, VcpuTsc
from pvclock.tsc_sync import OffsetWrite, repair_plan

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
        self._tscs = [VcpuTsc(tsc_offset or 0) for _ in range(keeper.vcpus)]
        self._stands_since = HostTsc(0)
        self._standing: list[int] | None = None  # what RDTSC returns, by vCPU, until a restored clock is resumed
        if tsc_offset is None:
            for vcpu, tsc in enumerate(self._tscs):
                tsc.offset = self._offset_that_is(vcpu)
        self._show(self._tscs)

    def __len__(self) -> int:
        return len(self._tscs)

    def begin(self) -> None:
        """Give the host the offsets that these TSCs begin with, all or (TscOffsetNotHonoured) none."""
        self._set_offsets({vcpu: tsc.offset for vcpu, tsc in enumerate(self._tscs)})

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
            self._tscs[vcpu].adjust = tsc.adjust  # as KVM has it on such a host: the MSR moves, the TSC does not
            self._refuse(refused, cause)

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

    # Restored, and after a host's TSC stepped

    def stand(self, saved: Sequence[tuple[int, int, int]]) -> None:
        """Each vCPU's (TSC, ADJUST, AUX) as they were saved; its TSC stands until go_on()."""
        self._standing, self._stands_since = [tsc for tsc, _, _ in saved], self._keeper.timeline.begin_tsc
        for tsc, (_, adjust, aux) in zip(self._tscs, saved, strict=True):
            tsc.adjust, tsc.aux = adjust, aux
        self._show_standing(self._standing)

    def prepare_to_go_on(self, now: HostTsc, gain_ticks: int) -> tuple[Callable[[], None], TscOffsetNotHonoured | None]:
        """Give the host the offsets by which TSCs that stand go on from `now`, `gain_ticks` ahead.

        What this raises leaves them as they stood.  Returns what makes it so when time goes on, and may be called
        twice; and the offset that the host could not give, if any.
        """
        if self._standing is None:
            return (lambda: None), None
        going, refused = [], None
        for vcpu, standing in enumerate(self._standing):
            tsc = self._tscs[vcpu].copy()
            tsc.host_write_tsc((standing + gain_ticks) & U64_MASK, now)
            try:
                self._keeper.backend.set_tsc_offset(vcpu, tsc.offset)
            except TscOffsetNotHonoured as error:
                refused, tsc.offset = error, self._offset_that_is(vcpu)
            going.append(tsc)
        self._show(going)

        def go_on() -> None:
            self._tscs, self._standing = going, None
            self.refused_offset = refused or self.refused_offset

        return go_on, refused

    def renumber(self, before: HostTsc, after: HostTsc) -> None:
        """The host's TSC stepped from `before` to `after`: the guests' go on where they were, as far as may be.

        KVM may have seen to that already, when the host woke; then its offsets are taken as they are.
        """
        if self._standing is not None:
            return
        going, refused = [tsc.copy() for tsc in self._tscs], None
        for vcpu, tsc in enumerate(going):
            wanted = (tsc.offset + before - after) & U64_MASK
            there = self._offset_that_is(vcpu)
            if abs(signed64(there - wanted)) < abs(signed64(there - tsc.offset)):
                tsc.offset = there
                continue
            try:
                self._keeper.backend.set_tsc_offset(vcpu, wanted)
                tsc.offset = wanted
            except TscOffsetNotHonoured as error:
                refused = error
        self._tscs = going
        self._show(going)
        if refused is not None:
            self._refuse(refused, EventCause.VMM)

    def read_back(self, vcpu: int | None) -> None:
        """Take the vCPUs' offsets as the host has them now, after something that may have changed them."""
        if self._standing is None:
            self._keeper.while_held(vcpu, self._take_offsets_that_are)

    # Inside

    def _take_offsets_that_are(self) -> None:
        there = [tsc.copy() for tsc in self._tscs]
        for vcpu, tsc in enumerate(there):
            tsc.offset = self._offset_that_is(vcpu)
        if [tsc.offset for tsc in there] != [tsc.offset for tsc in self._tscs]:
            why = "the host's KVM has changed the vCPUs' TSC offsets; pages follow"
            self._take(there, (self._keeper.event(EventKind.TSC, why, self._keeper.backend.stamps()),))

    def _offset_that_is(self, vcpu: int) -> int:
        offset = self._keeper.backend.tsc_offset(vcpu)
        return self._tscs[vcpu].offset if offset is None else offset

    def _show(self, tscs: list[VcpuTsc]) -> None:
        """Have these offsets in the pages from the next publish on."""
        self.agree = len({tsc.offset for tsc in tscs}) == 1
        for vcpu, tsc in enumerate(tscs):
            self._keeper.pages.set_tsc_offset(vcpu, tsc.offset)

    def _show_standing(self, standing: list[int]) -> None:
        """Have readers in this process find these TSCs while time stands still."""
        for vcpu, tsc in enumerate(standing):
            self._keeper.pages.set_tsc_offset(vcpu, (tsc - self._stands_since) & U64_MASK)

    def _set(self, wanted: dict[int, VcpuTsc], now: HostTsc, cause: EventCause, out_of_guest: int | None) -> None:
        """Let the vCPUs have those TSCs, all or (TscOffsetNotHonoured) none, and publish."""
        if self._standing is not None:
            for vcpu, tsc in wanted.items():
                self._standing[vcpu], self._tscs[vcpu].adjust = tsc.read(now), tsc.adjust
            self._show_standing(self._standing)
            return
        keeper, before = self._keeper, self._tscs
        stamps = keeper.backend.stamps()
        tscs = [wanted.get(vcpu, tsc) for vcpu, tsc in enumerate(before)]
        offsets = {vcpu: tsc.offset for vcpu, tsc in wanted.items()}
        whys = [f"vCPU {vcpu}: offset {before[vcpu].offset:#x} becomes {new:#x}" for vcpu, new in offsets.items()]
        events = tuple(keeper.event(EventKind.TSC, why, stamps, cause=cause) for why in whys)

        def set_all() -> None:
            self._set_offsets(offsets)
            self._take(tscs, events)

        keeper.while_held(out_of_guest, set_all)

    def _take(self, tscs: list[VcpuTsc], events: tuple[Event, ...]) -> None:
        """Have these, which the host has already; vCPUs are out of the guest."""
        self._tscs = tscs
        self._show(tscs)
        self._keeper.republish()
        for event in events:
            self._keeper.events.record(event)

    def _set_offsets(self, offsets: dict[int, int]) -> None:
        """Give the host these offsets, or take back what it took and raise."""
        backend, done = self._keeper.backend, list[tuple[int, int]]()
        try:
            for vcpu, offset in offsets.items():
                before = self._offset_that_is(vcpu)
                backend.set_tsc_offset(vcpu, offset)
                done.append((vcpu, before))
        except BaseException:
            for vcpu, before in done:
                backend.set_tsc_offset(vcpu, before)
            raise

    def _refuse(self, refused: TscOffsetNotHonoured, cause: EventCause) -> None:
        self.refused_offset = refused
        self._keeper.tell(EventKind.REFUSED, str(refused), cause)
