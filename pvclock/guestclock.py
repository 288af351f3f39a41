"""One VM's clock: its timeline, its vCPUs' TSCs, its pages and the provider that its guest talks to, wired together.

This is what a VMM embeds.  It hands in guest memory and a backend, routes the guest's MSR accesses and CPUID leaves
here, and calls refresh() at least every `MAX_AGE_S`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from fractions import Fraction
from typing import Final

from pvclock import providers
from pvclock._core import (
    GUEST_STOPPED,
    TSC_STABLE_BIT,
    ClockScale,
    GuestMemory,
    TimePages,
    publish_wall_clock,
    read_time_info,
)
from pvclock.backend import Backend
from pvclock.errors import GuestAddressError, RangeError, TscOffsetNotHonoured
from pvclock.providers.interface import CpuidLeaf
from pvclock.quantities import U64_MASK, Gpa, GuestNs, GuestTsc, HostTsc
from pvclock.readings import Churn, ClockLine, Reading, TimeInfo
from pvclock.timeline import Timeline
from pvclock.tsc import VcpuTsc

__all__ = ["GUEST_STOPPED", "MAX_AGE_S", "TSC_STABLE_BIT", "GuestClock"]

MAX_AGE_S: Final = 2.0
"""Refresh pages at least this often, in seconds of guest time.  mul is up to 0.47 ppb slow, so an older page has lost
more than the 1 ns that a refresh can give back; the rest comes back at the next ones."""

MSR_IA32_TSC: Final = 0x10
MSR_IA32_TSC_ADJUST: Final = 0x3B


class GuestClock:
    """The clock of one VM; guest time 0 is now.

    memory, vcpus: the VM's.  provider: "KVM" or "None", with its options as keywords (`features`, `enforce_cpuid`).
    tsc_offset: ticks added to the host's TSC on every vCPU.  offer_tsc_adjust, offer_invariant_tsc: what patch_cpuid()
    shows; a guest with an invariant TSC prefers its TSC to this clock.

    Thread-safety: all methods may be called from any thread, vCPU threads included; a vCPU's own `write_msr` must come
    while that vCPU is out of the guest, as it is after the exit.
    """

    def __init__(
        self,
        memory: GuestMemory,
        vcpus: int = 1,
        provider: str = "KVM",
        *,
        backend: Backend,
        tsc_offset: int = 0,
        offer_tsc_adjust: bool = True,
        offer_invariant_tsc: bool = False,
        **provider_options: object,
    ) -> None:
        self.memory = memory
        self.vcpus = vcpus
        self.backend = backend
        self.offer_tsc_adjust = offer_tsc_adjust
        self.offer_invariant_tsc = offer_invariant_tsc
        self.refused_offset: TscOffsetNotHonoured | None = None
        """The last guest write of a TSC that this host could not honour, and that was therefore ignored."""

        # Taken for every change; held while other vCPUs are kept out of the guest, never while waiting for a guest.
        self._lock = threading.RLock()
        self._pages = TimePages(memory, vcpus, backend.counter)
        self._timeline = Timeline(HostTsc(backend.counter.read()), backend.tsc_hz)
        self._line = self._timeline.line()
        self._scale = self._timeline.scale(Fraction(1))
        self._shown_flags = 0
        self._tsc = [VcpuTsc(tsc_offset) for _ in range(vcpus)]
        self._offsets_agree = True
        self._provider = providers.create(provider, self, vcpus, **provider_options)
        for vcpu in range(vcpus):
            backend.set_tsc_offset(vcpu, tsc_offset & U64_MASK)
            self._pages.set_tsc_offset(vcpu, tsc_offset & U64_MASK)

        # The compiled method itself: a Python one around it would cost as much again.
        self.read = self._pages.read
        """read(vcpu) -> GuestNs: what vCPU's guest would compute at this instant.

        StateError before it registered a page.
        """

    # The guest's side

    def read_msr(self, vcpu: int, index: int) -> int:
        """RDMSR by vCPU's guest: 64 bits, or MsrFault for #GP."""
        tsc = self._tsc[self._vcpu(vcpu)]
        if index == MSR_IA32_TSC:
            return tsc.read(HostTsc(self.backend.counter.read()))
        if index == MSR_IA32_TSC_ADJUST:
            return tsc.adjust
        return self._provider.read_msr(vcpu, index)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """WRMSR by vCPU's guest: `value` of 64 bits; MsrFault is #GP, with nothing changed."""
        self._vcpu(vcpu)
        if not 0 <= value <= U64_MASK:
            raise RangeError(f"WRMSR {index:#x} := {value:#x}; an MSR has 64 bits")
        with self._lock:
            if index == MSR_IA32_TSC:
                tsc = self._tsc[vcpu].copy()
                tsc.guest_write_tsc(value, HostTsc(self.backend.counter.read()))
                self._apply_guest_tsc(vcpu, tsc)
            elif index == MSR_IA32_TSC_ADJUST:
                self._write_tsc_adjust(vcpu, value)
            else:
                self._provider.write_msr(vcpu, index, value)

    def cpuid(self, leaf: int, subleaf: int = 0) -> CpuidLeaf | None:
        """The clock's own hypervisor leaf, or None where CPUID `leaf` is not the clock's to answer."""
        return self._provider.cpuid_leaves.get(leaf)

    @property
    def cpuid_leaves(self) -> dict[int, CpuidLeaf]:
        """All hypervisor leaves of the clock, by number."""
        return dict(self._provider.cpuid_leaves)

    def patch_cpuid(self, leaf: int, subleaf: int, registers: CpuidLeaf) -> CpuidLeaf:
        """The VMM's answer to an ordinary CPUID leaf with the bits in it that are the clock's business."""
        if leaf == 1:
            return registers._replace(ecx=_with_bit(registers.ecx, 31, bool(self._provider.cpuid_leaves)))
        if (leaf, subleaf) == (7, 0):
            return registers._replace(ebx=_with_bit(registers.ebx, 1, self.offer_tsc_adjust))
        if leaf == 0x80000007 and not self.offer_invariant_tsc:
            return registers._replace(edx=_with_bit(registers.edx, 8, False))
        return registers

    # The VMM's side

    def host_write_msr(self, vcpu: int, index: int, value: int) -> None:
        """Restore IA32_TSC or IA32_TSC_ADJUST, each without touching the other, as KVM_SET_MSRS does.

        TscOffsetNotHonoured if the host cannot; RangeError for any other MSR.
        """
        if index not in (MSR_IA32_TSC, MSR_IA32_TSC_ADJUST):
            raise RangeError(f"host write of MSR {index:#x}; it can be 0x10 or 0x3b")
        with self._lock, self.backend.quiesce(None):
            tsc = self._tsc[self._vcpu(vcpu)].copy()
            if index == MSR_IA32_TSC:
                tsc.host_write_tsc(value, HostTsc(self.backend.counter.read()))
            else:
                tsc.host_write_adjust(value)
            self._set_tsc(vcpu, tsc)

    def refresh(self, vcpu: int | None = None) -> None:
        """Re-anchor and publish all pages; the clock goes on by 0 or +1 ns at the break.

        vcpu: a vCPU that is out of the guest, the caller's own, whose flags can be written too.
        """
        with self._lock:
            self._publish_and_tell(vcpu)

    def dilate(self, numerator: int, denominator: int = 1) -> None:
        """Let guest time run at numerator/denominator of host time from now on, without a step.

        RangeError if no page can show that rate.
        """
        if numerator < 1 or denominator < 1:
            raise RangeError(f"dilation {numerator}/{denominator}; two whole numbers from 1 on: dilate(1, 2) halves")
        dilation = Fraction(numerator, denominator)
        with self._lock:
            scale = self._timeline.scale(dilation)
            self._timeline.turn(self._publish(None, scale), dilation)
            self._line, self._scale = self._timeline.line(), scale
            self._pages.mark_dirty()

    def churn(self, publishes: int, dilations: list[Fraction], *, seconds: float = float("inf")) -> Churn:
        """Publish `publishes` times, or for `seconds`, as fast as it goes, taking `dilations` in turn.

        For stress, benchmarks and demonstration.  At least once; the last rate used stays.  A simulated counter stands
        still meanwhile, so `seconds` do not pass on it.
        """
        rates = [(*self._timeline.rate(dilation), self._timeline.scale(dilation)) for dilation in dilations]
        max_ticks = min(seconds * self.backend.tsc_hz, 2**63 - 1)
        with self._lock:
            self._publish(None)
            line, churn = self._pages.churn(self._line, rates, publishes, int(max_ticks))
            last = (churn.publishes - 1) % len(rates)
            self._timeline.resume_from(line, dilations[last])
            self._line, self._scale = line, rates[last][2]
            self._pages.mark_dirty()
        return churn

    def now(self) -> GuestNs:
        """Guest time at this instant by the timeline itself, page or no page."""
        return GuestNs(self.at(HostTsc(self.backend.counter.read())).__floor__() & U64_MASK)

    def at(self, host_tsc: HostTsc) -> Fraction:
        """Guest time in ns at `host_tsc` by the present segment, exactly."""
        with self._lock:  # three numbers make a segment
            return self._timeline.at(host_tsc)

    def reading(self, vcpu: int) -> Reading:
        """As `read`, with the guest TSC, the page's version and its flags."""
        return self._pages.reading(vcpu)

    def shown_at(self, host_tsc: HostTsc) -> GuestNs:
        """What a guest computes at `host_tsc` from the pages as published last, in ns."""
        with self._lock:
            return GuestNs(self._pages.shown_at(host_tsc))

    def page(self, vcpu: int) -> TimeInfo | None:
        """vCPU's page as it lies in guest memory; None if it has none there."""
        gpa = self._pages.registered(vcpu)
        try:
            return None if gpa is None else read_time_info(self.memory, gpa)
        except GuestAddressError:
            return None

    def tsc(self, vcpu: int) -> VcpuTsc:
        """A copy of vCPU's TSC state."""
        return self._tsc[self._vcpu(vcpu)].copy()

    def guest_tsc(self, vcpu: int, host_tsc: HostTsc) -> GuestTsc:
        """What vCPU's RDTSC returns at `host_tsc`."""
        return self._tsc[self._vcpu(vcpu)].read(host_tsc)

    @property
    def line(self) -> ClockLine:
        """The timeline's present segment."""
        return self._line

    @property
    def scale(self) -> ClockScale:
        """The (mul, shift) that pages show."""
        return self._scale

    # What the provider asks for (ClockServices)

    @property
    def kernel_features(self) -> int:
        """KVM feature bits that the host kernel serves beside this engine."""
        return self.backend.kernel_features

    def place_time_page(self, vcpu: int, gpa: Gpa | None) -> None:
        """Keep vCPU's pvclock page at `gpa` (None: nowhere) from now on, and publish."""
        self._pages.register(vcpu, gpa)
        self._publish_and_tell(vcpu)

    def write_wall_clock(self, gpa: Gpa) -> None:
        """Write the time of day of guest time 0 into the wall-clock record at `gpa`, once; ignored if not in memory."""
        tsc, realtime_ns = self.backend.realtime()
        publish_wall_clock(self.memory, gpa, realtime_ns - self._timeline.at(tsc).__floor__())

    # Inside

    def _vcpu(self, vcpu: int) -> int:
        if not 0 <= vcpu < self.vcpus:
            raise RangeError(f"vCPU {vcpu}; this VM has vCPUs 0 to {self.vcpus - 1}")
        return vcpu

    def _write_tsc_adjust(self, vcpu: int, value: int) -> None:
        # Linux ignores the write where CPUID does not offer the MSR; hardware would fault.
        if self.offer_tsc_adjust:
            tsc = self._tsc[vcpu].copy()
            tsc.guest_write_adjust(value)
            self._apply_guest_tsc(vcpu, tsc)

    def _apply_guest_tsc(self, vcpu: int, tsc: VcpuTsc) -> None:
        try:
            self._set_tsc(vcpu, tsc)
        except TscOffsetNotHonoured as refused:
            self.refused_offset = refused

    def _set_tsc(self, vcpu: int, tsc: VcpuTsc) -> None:
        self.backend.set_tsc_offset(vcpu, tsc.offset)
        self._tsc[vcpu] = tsc
        self._offsets_agree = len({each.offset for each in self._tsc}) == 1
        self._pages.set_tsc_offset(vcpu, tsc.offset)
        self._publish_and_tell(vcpu)

    def _publish_and_tell(self, vcpu: int | None) -> None:
        self._publish(vcpu)
        self._pages.mark_dirty()

    def _publish(self, vcpu: int | None, scale: ClockScale | None = None) -> HostTsc:
        """Publish the present segment, going on at `scale`; returns the break point.

        `vcpu`, if any, is known to be out of the guest.  Flags, and pages that newly came, take all vCPUs out of it.
        """
        stable = self._offsets_agree and self._provider.allows_stable and self.backend.tsc_stable
        flags = TSC_STABLE_BIT if stable else 0
        if flags == self._shown_flags and not self._pages.lacks_flags(vcpu):
            return self._publish_to(() if vcpu is None else (vcpu,), flags, scale)
        with self.backend.quiesce(vcpu):
            return self._publish_to(range(self.vcpus), flags, scale)

    def _publish_to(self, out_of_guest: Iterable[int], flags: int, scale: ClockScale | None) -> HostTsc:
        break_tsc = self._pages.publish(self._line, scale or self._scale, flags=flags, out_of_guest=out_of_guest)
        self._shown_flags = flags
        return HostTsc(break_tsc)


def _with_bit(register: int, bit: int, is_set: bool) -> int:
    return register | 1 << bit if is_set else register & ~(1 << bit)
