"""A timeline with the TSCs of its vCPUs: what guest and VMM write to them, and what then becomes of the pages."""

from __future__ import annotations

from typing import Literal

from pvclock._memory import GuestMemory
from pvclock.backend import Backend
from pvclock.disciplined import DisciplinedTimeline
from pvclock.errors import RangeError, TscOffsetNotHonoured
from pvclock.events import EventKind
from pvclock.quantities import U64_MASK, GuestTsc, HostTsc
from pvclock.tsc import MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, VcpuTsc
from pvclock.tsc_sync import OffsetWrite, repair_plan

__all__ = ["TscTimeline"]


class TscTimeline(DisciplinedTimeline):
    """The time of one VM, and its vCPUs' TSCs, each at first the host's plus `tsc_offset`."""

    def __init__(self, memory: GuestMemory, vcpus: int, backend: Backend, tsc_offset: int = 0) -> None:
        super().__init__(memory, vcpus, backend)
        self.refused_offset: TscOffsetNotHonoured | None = None
        """The last guest write of a TSC that this host could not honour, and that was therefore ignored."""

        self._tsc = [VcpuTsc(tsc_offset) for _ in range(vcpus)]
        self._offsets_agree = True
        for vcpu in range(vcpus):
            backend.set_tsc_offset(vcpu, tsc_offset & U64_MASK)
            self._pages.set_tsc_offset(vcpu, tsc_offset & U64_MASK)

    def tsc(self, vcpu: int) -> VcpuTsc:
        """A copy of vCPU's TSC state."""
        return self._tsc[self._vcpu(vcpu)].copy()

    def guest_tsc(self, vcpu: int, host_tsc: HostTsc) -> GuestTsc:
        """What vCPU's RDTSC returns at `host_tsc`."""
        return self._tsc[self._vcpu(vcpu)].read(host_tsc)

    def host_write_msr(self, vcpu: int, index: int, value: int) -> None:
        """Restore IA32_TSC or IA32_TSC_ADJUST, each without touching the other, as KVM_SET_MSRS does.

        TscOffsetNotHonoured if the host cannot; RangeError for any other MSR.
        """
        if index not in (MSR_IA32_TSC, MSR_IA32_TSC_ADJUST):
            raise RangeError(f"host write of MSR {index:#x}; it can be 0x10 or 0x3b")
        with self._changing(), self.backend.quiesce(None):
            tsc = self._tsc[self._vcpu(vcpu)].copy()
            if index == MSR_IA32_TSC:
                tsc.host_write_tsc(value, self._host_tsc())
            else:
                tsc.host_write_adjust(value)
            self._set_tsc(vcpu, tsc)

    def repair_tsc(self, *, target: int | None = None, adjust: Literal["keep", "carry"] = "keep") -> list[OffsetWrite]:
        """Put all vCPUs' TSCs on one offset, and give STABLE back; returns what was written.

        target: that offset, the one furthest ahead by default, so that no guest's TSC goes back.  adjust: see
        tsc_sync.repair_plan(), whose errors come out, as TscOffsetNotHonoured does.
        """
        with self._changing(), self.backend.quiesce(None):
            plan = repair_plan(self._tsc, target=target, adjust=adjust)
            for write in plan:
                self._set_tsc(write.vcpu, write.applied(self._tsc[write.vcpu]))
        return plan

    # For those who derive from this; the lock is held

    def _guest_write_tsc(self, vcpu: int, value: int) -> None:
        tsc = self._tsc[vcpu].copy()
        tsc.guest_write_tsc(value, self._host_tsc())
        self._apply_guest_tsc(vcpu, tsc)

    def _guest_write_adjust(self, vcpu: int, value: int) -> None:
        tsc = self._tsc[vcpu].copy()
        tsc.guest_write_adjust(value)
        self._apply_guest_tsc(vcpu, tsc)

    def _apply_guest_tsc(self, vcpu: int, tsc: VcpuTsc) -> None:
        """Let vCPU have that TSC, if the host can give it; else leave things as they are, with an event."""
        try:
            self._set_tsc(vcpu, tsc)
        except TscOffsetNotHonoured as refused:
            self.refused_offset = refused
            self._tell(EventKind.REFUSED, str(refused))

    def _set_tsc(self, vcpu: int, tsc: VcpuTsc) -> None:
        self.backend.set_tsc_offset(vcpu, tsc.offset)
        before, self._tsc[vcpu] = self._tsc[vcpu].offset, tsc
        self._offsets_agree = len({each.offset for each in self._tsc}) == 1
        self._pages.set_tsc_offset(vcpu, tsc.offset)
        self._republish(vcpu)
        self._tell(EventKind.TSC, f"vCPU {vcpu}: offset {before:#x} becomes {tsc.offset:#x}")

    def _tell(self, kind: EventKind, why: str) -> None:
        """Record what leaves guest time alone, as of now."""
        now = self._host_tsc()
        self._record(kind, why, now, self._moment(now))

    def _host_tsc(self) -> HostTsc:
        return HostTsc(self.backend.counter.read())

    def _vcpu(self, vcpu: int) -> int:
        if not 0 <= vcpu < self.vcpus:
            raise RangeError(f"vCPU {vcpu}; this VM has vCPUs 0 to {self.vcpus - 1}")
        return vcpu
