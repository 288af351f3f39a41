"""Time travel: may an idle guest's time be skipped now, by how much, and in which order is that written to KVM?

A halted guest waits for the next of its timers.  Instead of waiting, a VMM moves guest time to that instant: the TSC,
the clock that is a function of it, and the timer together, so that the guest finds what it would have found later.

For any VMM on KVM with in-kernel local APICs.  With all vCPUs out of KVM_RUN it fills a VcpuSnapshot for each from
KVM's ioctls, asks decide(), and hands a Skip to carry_out() with its own writes; then it lets the vCPUs in.

Source: KVM's lapic.c (start_sw_tscdeadline, set_target_expiration) and Intel's SDM, volume 3, "APIC timer".
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from fractions import Fraction
from operator import itemgetter
from struct import Struct
from typing import Final, NamedTuple, Protocol, TypeAlias

from pvclock.quantities import NS_PER_S, U64_MASK, signed64
from pvclock.timekeeping.lapic import LVT_TIMER, TSC_DEADLINE_MODE, register, timer_mode, with_register

__all__ = [
    "LAPIC_HZ",
    "LEAST_NS",
    "MP_STATE_HALTED",
    "MSR_IA32_TSC_DEADLINE",
    "ClockReading",
    "Decision",
    "IdleForever",
    "KernelClockWrites",
    "MeasuredOffset",
    "RateLimit",
    "Skip",
    "SkipWrites",
    "Stay",
    "StayReason",
    "VcpuSnapshot",
    "Wake",
    "WakeKind",
    "carry_out",
    "decide",
    "move_kernel_clock",
]

MSR_IA32_TSC_DEADLINE: Final = 0x6E0

LEAST_NS: Final = 50_000
"""A wait that is not longer is left to pass, if no other limit is given: a skip takes about as long."""

LAPIC_HZ: Final = NS_PER_S
"""Of the bus by which KVM's LAPIC timers count: a cycle is 1 ns (APIC_BUS_FREQUENCY)."""

FARTHEST_TICKS: Final = 1 << 60
"""A timer that is farther away is none: 14 years at 2.6 GHz.  A guest may have written any number."""

MP_STATE_UNINITIALIZED: Final = 1
MP_STATE_INIT_RECEIVED: Final = 2
MP_STATE_HALTED: Final = 3
IDLE_STATES: Final = (MP_STATE_UNINITIALIZED, MP_STATE_INIT_RECEIVED, MP_STATE_HALTED)

IRR: Final = 0x200
TMCCT: Final = 0x390
TDCR: Final = 0x3E0
"""Registers of a local APIC: requested interrupts, the timer's current count and its divider."""
IRR_REGISTERS: Final = Struct("<" + "I12x" * 8)

LVT_MASKED: Final = 1 << 16

PENDING_BYTES: Final = {
    0: "exception",
    3: "exception",
    8: "interrupt",
    12: "NMI",
    13: "NMI",
    25: "SMI",
}
"""Bytes of struct kvm_vcpu_events that are not 0 while one of these is on its way into the guest."""

_pending_bytes: Final = itemgetter(*PENDING_BYTES)


class VcpuSnapshot(NamedTuple):
    """A vCPU that is out of KVM_RUN, as KVM's ioctls show it.

    mp_state: KVM_GET_MP_STATE.  guest_tsc, tsc_deadline: KVM_GET_MSRS of 0x10 and 0x6e0, in ticks; no deadline is 0.
    lapic: KVM_GET_LAPIC, which also brings posted interrupts into IRR.  events: KVM_GET_VCPU_EVENTS.
    """

    mp_state: int
    guest_tsc: int
    tsc_deadline: int
    lapic: bytes
    events: bytes


class WakeKind(StrEnum):
    """What ends an idle guest's wait."""

    TSC_DEADLINE = "TSC deadline"
    LAPIC_TIMER = "LAPIC timer"
    CLOCK_TIMER = "timer of the clock interface"
    EVENT = "event of the VMM's"
    END = "end of the travel"


class Wake(NamedTuple):
    """The next thing to come of one source, in `ticks` of the TSC from now.  vcpu: whose timer, None for the VMM's."""

    ticks: int
    kind: WakeKind
    vcpu: int | None = None

    def __str__(self) -> str:
        return self.kind.value if self.vcpu is None else f"vCPU {self.vcpu}'s {self.kind.value}"


class StayReason(StrEnum):
    """Why guest time is not skipped now."""

    RUNS = "a vCPU has something to do"
    PENDING = "an interrupt is on its way"
    NEAR = "what comes next is near"
    FIXED = "a TSC deadline comes next, and this host moves no TSC"
    RATE = "the highest rate is reached"
    HOLD = "the VMM waits for its host"


class Stay(NamedTuple):
    """Let the vCPUs run on.  vcpu: which one it is about; wake: what is near."""

    reason: StayReason
    vcpu: int | None = None
    wake: Wake | None = None


class Skip(NamedTuple):
    """Move guest time by so many ticks.  wake: what comes first, then or later, if the skip was cut short."""

    ticks: int
    wake: Wake

    @property
    def arrives(self) -> bool:
        """Does it end at what comes first?"""
        return self.ticks == self.wake.ticks


class IdleForever(NamedTuple):
    """Nothing is to come: no timer of the guest's, and no event of the VMM's."""


Decision: TypeAlias = Skip | Stay | IdleForever


def decide(
    vcpus: Sequence[VcpuSnapshot],
    tsc_hz: int,
    events: Sequence[Wake] = (),
    *,
    most_ticks: int | None = None,
    moves_tscs: bool = True,
    least_ns: int = LEAST_NS,
    lapic_hz: int = LAPIC_HZ,
) -> Decision:
    """What to do about a guest with these vCPUs, all of which are out of KVM_RUN and stay so until it is done.

    tsc_hz: the guest's TSC frequency.  events: what the VMM itself has to come.  most_ticks: how far time may go now.
    moves_tscs: can the vCPUs' TSCs be moved?  Else only a clock's page is, and a TSC deadline stays where it is.
    least_ns: a wait that is not longer is left to pass; what a skip takes the VMM, or a little less.
    lapic_hz: of the LAPIC's bus, unless KVM_CAP_X86_APIC_BUS_CYCLES_NS changed it KVM's own.
    """
    for number, vcpu in enumerate(vcpus):
        if vcpu.mp_state not in IDLE_STATES or _is_pending(vcpu):
            return Stay(StayReason.PENDING if vcpu.mp_state in IDLE_STATES else StayReason.RUNS, number)
    timers = (_wake(number, vcpu, tsc_hz, lapic_hz) for number, vcpu in enumerate(vcpus))
    wakes = [*(timer for timer in timers if timer is not None), *events]
    if not wakes:
        return IdleForever()
    first = min(wakes, key=lambda wake: wake.ticks)
    least_ticks = least_ns * tsc_hz // NS_PER_S
    if first.ticks <= least_ticks:
        return Stay(StayReason.NEAR, first.vcpu, first)
    if not moves_tscs and any(wake.kind is WakeKind.TSC_DEADLINE for wake in wakes):
        return Stay(StayReason.FIXED, first.vcpu, first)
    ticks = first.ticks if most_ticks is None else min(first.ticks, most_ticks)
    return Skip(ticks, first) if ticks > least_ticks else Stay(StayReason.RATE, None, first)


class RateLimit:
    """How far guest time may go: `rate` guest seconds in a host second, 1 or more, and what a moment left unused."""

    MOMENT_NS: Final = 50_000_000

    def __init__(self, rate: Fraction, host_ns: int, guest_ns: int) -> None:
        self._rate = rate
        self._host_ns, self._guest_ns = host_ns, guest_ns  # where the limit's line begins

    def allowed_ns(self, host_ns: int, guest_ns: int) -> int:
        """By how many guest ns time may be moved at that instant; a guest that was busy has not saved them up."""
        earned_ns = (self._guest_ns - guest_ns) + (host_ns - self._host_ns) * self._rate
        most_ns = self._rate * self.MOMENT_NS
        if not 0 <= earned_ns <= most_ns:
            earned_ns = max(Fraction(0), min(earned_ns, most_ns))
            self._host_ns, self._guest_ns = host_ns, guest_ns + int(earned_ns)
        return int(earned_ns)


class SkipWrites(Protocol):
    """The VMM's ioctls for a skip.  Errors go through; what was written before stays."""

    def move_time(self, ticks: int) -> None:
        """Move guest time: KVM_VCPU_TSC_OFFSET of all vCPUs, the same number of ticks, and the clock with them.

        By that attribute, never by a write of MSR 0x10: KVM takes one within a second of the last for an attempt to
        synchronise vCPUs, and ignores the difference.
        """

    def set_tsc_deadline(self, vcpu: int, deadline: int) -> None:
        """KVM_SET_MSRS of 0x6e0."""

    def set_lapic(self, vcpu: int, lapic: bytes) -> None:
        """KVM_SET_LAPIC."""


def carry_out(
    skip: Skip, vcpus: Sequence[VcpuSnapshot], writes: SkipWrites, tsc_hz: int, *, lapic_hz: int = LAPIC_HZ
) -> None:
    """Write a skip that decide() chose for these vCPUs, which are still out of KVM_RUN: time first, then timers.

    KVM arms a timer of the host's for a TSC deadline when that is written, by the guest's TSC of then, and moves it
    along with no offset.  So each deadline is written again, with its own value, and after the offset: before it, or
    not at all, the guest sleeps for as long as without the skip.
    """
    writes.move_time(skip.ticks)
    for number, vcpu in enumerate(vcpus):
        if vcpu.tsc_deadline:
            writes.set_tsc_deadline(number, vcpu.tsc_deadline)
        elif count := register(vcpu.lapic, TMCCT):
            passed = skip.ticks * lapic_hz // (tsc_hz * _divider(vcpu.lapic))
            writes.set_lapic(number, with_register(vcpu.lapic, TMCCT, max(1, count - passed)))


# A clock that the kernel serves


class ClockReading(NamedTuple):
    """KVM_GET_CLOCK with its flags KVM_CLOCK_REALTIME and KVM_CLOCK_HOST_TSC: one instant, by three clocks.

    clock_ns: the guest's.  realtime_ns: the host's UTC.  host_tsc: in ticks.
    """

    clock_ns: int
    realtime_ns: int
    host_tsc: int


class KernelClockWrites(Protocol):
    """The VMM's ioctls for a skip where the kernel serves the clock."""

    def get_clock(self) -> ClockReading:
        """KVM_GET_CLOCK."""

    def set_clock(self, clock_ns: int, realtime_ns: int) -> None:
        """KVM_SET_CLOCK with KVM_CLOCK_REALTIME: the kernel adds what has passed since that instant."""

    def tsc_offsets(self) -> list[int]:
        """KVM_VCPU_TSC_OFFSET of each vCPU."""

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """The same, set."""


AGREEMENT_NS: Final = 1_000_000
"""Clock and TSC that are farther apart than that were set by somebody else meanwhile."""


class MeasuredOffset:
    """The TSC offset that belongs to the kernel's clock, by the pair of both at the beginning.

    KVM_SET_CLOCK lands where it lands, some hundred ns beside what was asked for.  The TSC follows what the clock came
    to, from one pair for all skips, so that errors do not add up.
    """

    def __init__(self, tsc_hz: int) -> None:
        self._tsc_hz = tsc_hz
        self._first_ns = self._first_tsc = self._offset = 0
        self._is_begun = False

    def begin(self, reading: ClockReading, offset: int) -> None:
        """Take this pair as the first, unless the one that there is still holds."""
        if self._is_begun and offset == self._offset:
            apart = signed64(reading.host_tsc + self.offset(reading) - reading.host_tsc - offset)
            if abs(apart) * NS_PER_S <= AGREEMENT_NS * self._tsc_hz:
                return
        self._first_ns, self._first_tsc = reading.clock_ns, reading.host_tsc + offset
        self._offset, self._is_begun = offset & U64_MASK, True

    def offset(self, reading: ClockReading) -> int:
        """The offset by which the guest's TSC belongs to that reading."""
        ticks = (reading.clock_ns - self._first_ns) * self._tsc_hz // NS_PER_S
        return self._first_tsc + ticks - reading.host_tsc & U64_MASK

    def took(self, offset: int) -> None:
        """Note that vCPU 0's was set to this."""
        self._offset = offset


def move_kernel_clock(ticks: int, writes: KernelClockWrites, measured: MeasuredOffset, tsc_hz: int) -> None:
    """move_time() where the kernel serves the clock: the clock first, and then the TSCs to where it has come to."""
    before, offsets = writes.get_clock(), writes.tsc_offsets()
    measured.begin(before, offsets[0])
    writes.set_clock(before.clock_ns - -ticks * NS_PER_S // tsc_hz, before.realtime_ns)
    offset = measured.offset(writes.get_clock())
    for vcpu, old in enumerate(offsets):
        writes.set_tsc_offset(vcpu, offset + old - offsets[0] & U64_MASK)
    measured.took(offset)


# A vCPU's state


def _is_pending(vcpu: VcpuSnapshot) -> bool:
    """Will it wake without any timer?"""
    return any(_pending_bytes(vcpu.events)) or any(IRR_REGISTERS.unpack_from(vcpu.lapic, IRR))


def _wake(number: int, vcpu: VcpuSnapshot, tsc_hz: int, lapic_hz: int) -> Wake | None:
    """When its timer is due.  One that is masked wakes nobody: a Linux before 6.13 leaves it so with its deadline."""
    if register(vcpu.lapic, LVT_TIMER) & LVT_MASKED:
        return None
    if timer_mode(vcpu.lapic) == TSC_DEADLINE_MODE:
        kind, ticks = WakeKind.TSC_DEADLINE, vcpu.tsc_deadline - vcpu.guest_tsc
        is_armed = vcpu.tsc_deadline != 0
    else:
        count = register(vcpu.lapic, TMCCT)
        kind, ticks = WakeKind.LAPIC_TIMER, count * _divider(vcpu.lapic) * tsc_hz // lapic_hz
        is_armed = count != 0
    return Wake(ticks, kind, number) if is_armed and ticks < FARTHEST_TICKS else None


def _divider(lapic: bytes) -> int:
    """By what the bus's cycles are divided: bits 0, 1 and 3 of TDCR; source: KVM's update_divide_count()."""
    bits = register(lapic, TDCR)
    return 1 << ((bits & 0b11 | (bits & 0b1000) >> 1) + 1 & 0b111)
