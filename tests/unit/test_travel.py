"""When an idle guest's time may be skipped, by how much, and in which order that is written: pure policy."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Final

import pytest

from pvclock.timekeeping.travel import (
    ClockReading,
    IdleForever,
    MeasuredOffset,
    RateLimit,
    Skip,
    Stay,
    StayReason,
    VcpuSnapshot,
    Wake,
    WakeKind,
    carry_out,
    decide,
    move_kernel_clock,
)

pytestmark = pytest.mark.row("E17")

HZ: Final = 2_000_000_000
LAPIC_BYTES: Final = 1024
EVENTS_BYTES: Final = 64
RUNNABLE, UNINITIALIZED, INIT_RECEIVED, HALTED, SIPI_RECEIVED = range(5)
IRR, LVT_TIMER, TMCCT, TDCR = 0x200, 0x320, 0x390, 0x3E0
MASKED, PERIODIC, DEADLINE_MODE = 1 << 16, 1 << 17, 1 << 18
NOW: Final = 10**12
S: Final = HZ
"""A second, in ticks."""


def lapic(**registers: int) -> bytes:
    """Registers of a local APIC; irr is the whole of it."""
    image = bytearray(LAPIC_BYTES)
    for number in range(8):
        image[IRR + 16 * number : IRR + 16 * number + 4] = struct.pack(
            "<I", registers.get("irr", 0) >> 32 * number & 2**32 - 1
        )
    for name, at in (("timer", LVT_TIMER), ("count", TMCCT), ("divider", TDCR)):
        image[at : at + 4] = struct.pack("<I", registers.get(name, 0))
    return bytes(image)


def vcpu(
    deadline: int | None = None, *, mp_state: int = HALTED, events: bytes = bytes(EVENTS_BYTES), **registers: int
) -> VcpuSnapshot:
    """A halted vCPU whose TSC is NOW, with a TSC deadline that far away."""
    registers.setdefault("timer", DEADLINE_MODE)
    return VcpuSnapshot(mp_state, NOW, 0 if deadline is None else NOW + deadline, lapic(**registers), events)


def counting(count: int, divider: int = 0b1011, mode: int = 0) -> VcpuSnapshot:
    """A halted vCPU whose LAPIC's timer counts; 0b1011 divides by 1."""
    return vcpu(timer=mode, count=count, divider=divider)


def test_it_lands_on_the_earliest_deadline() -> None:
    """Of all vCPUs' TSC deadlines the next one is the target, to the tick."""
    assert decide([vcpu(5 * S), vcpu(3 * S + 7), vcpu()], HZ) == Skip(
        3 * S + 7, Wake(3 * S + 7, WakeKind.TSC_DEADLINE, 1)
    )


@pytest.mark.parametrize(
    ("bits", "divides_by"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)]
)
@pytest.mark.parametrize("mode", [0, PERIODIC])
def test_a_timer_that_counts(bits: int, divides_by: int, mode: int) -> None:
    """Without TSC deadlines the LAPIC's count and divider say what is left, in ns of its bus."""
    left_ns = 1_000_000 * divides_by
    assert decide([counting(1_000_000, bits, mode)], HZ) == Skip(
        2 * left_ns, Wake(2 * left_ns, WakeKind.LAPIC_TIMER, 0)
    )


def test_the_bus_may_be_slower() -> None:
    """A LAPIC's bus of 100 MHz makes a count ten times as long."""
    assert decide([counting(10**8)], HZ, lapic_hz=10**8) == Skip(S, Wake(S, WakeKind.LAPIC_TIMER, 0))


@pytest.mark.parametrize("mp_state", [RUNNABLE, SIPI_RECEIVED, 10])
def test_a_vcpu_that_runs(mp_state: int) -> None:
    """One vCPU that is not halted keeps all in the present."""
    assert decide([vcpu(S), vcpu(S, mp_state=mp_state)], HZ) == Stay(StayReason.RUNS, 1)


@pytest.mark.parametrize("mp_state", [UNINITIALIZED, INIT_RECEIVED])
def test_a_vcpu_that_was_never_started(mp_state: int) -> None:
    """One that waits for its INIT or SIPI is idle."""
    assert isinstance(decide([vcpu(S), vcpu(mp_state=mp_state)], HZ), Skip)


@pytest.mark.parametrize("vector", [0x20, 0xEC, 0xFF])
def test_a_requested_interrupt(vector: int) -> None:
    """A bit in IRR, as of an IPI that came after the vCPU was halted, wakes it now."""
    assert decide([vcpu(S), vcpu(S, irr=1 << vector)], HZ) == Stay(StayReason.PENDING, 1)


@pytest.mark.parametrize("place", [0, 3, 8, 12, 13, 25])
def test_an_event_on_its_way(place: int) -> None:
    """So does an exception, interrupt, NMI or SMI that is being delivered; the other bytes say nothing of that."""
    events = bytearray(EVENTS_BYTES)
    events[place] = 1
    assert decide([vcpu(S, events=bytes(events))], HZ) == Stay(StayReason.PENDING, 0)
    others = bytearray(b"\1" * EVENTS_BYTES)
    for pending in (0, 3, 8, 12, 13, 25):
        others[pending] = 0
    assert isinstance(decide([vcpu(S, events=bytes(others))], HZ), Skip)


def test_a_masked_timer_wakes_nobody() -> None:
    """Linux masks the timer that it shuts down, and leaves its deadline there."""
    masked = vcpu(S, timer=DEADLINE_MODE | MASKED)
    assert decide([masked], HZ) == IdleForever()
    assert decide([masked, vcpu(2 * S)], HZ) == Skip(2 * S, Wake(2 * S, WakeKind.TSC_DEADLINE, 1))


def test_what_is_near_is_waited_for() -> None:
    """50 us or less is left to pass, or what the VMM says, as is what is overdue."""
    near = 50_000 * HZ // 10**9
    assert isinstance(decide([vcpu(near + 1)], HZ), Skip)
    assert isinstance(decide([vcpu(20 * near)], HZ, least_ns=999_999), Skip)
    assert isinstance(decide([vcpu(20 * near)], HZ, least_ns=1_000_000), Stay)
    for ticks in (near, 1, -S):
        assert decide([vcpu(ticks)], HZ) == Stay(StayReason.NEAR, 0, Wake(ticks, WakeKind.TSC_DEADLINE, 0))


def test_idle_for_ever() -> None:
    """No timer, no event; nor is a deadline one that no host will live to see."""
    assert decide([vcpu(), counting(0)], HZ) == IdleForever()
    assert decide([vcpu(2**64 - 1 - NOW)], HZ) == IdleForever()


def test_the_vmms_events() -> None:
    """What the VMM has to come counts as the guest's timers do."""
    event = Wake(S, WakeKind.EVENT)
    assert decide([vcpu(2 * S)], HZ, [event, Wake(3 * S, WakeKind.END)]) == Skip(S, event)
    assert decide([vcpu()], HZ, [Wake(-5, WakeKind.EVENT)]) == Stay(StayReason.NEAR, None, Wake(-5, WakeKind.EVENT))


def test_a_skip_cut_short() -> None:
    """By the highest rate; and one that would be too short is none."""
    cut = decide([vcpu(2 * S)], HZ, most_ticks=S)
    assert cut == Skip(S, Wake(2 * S, WakeKind.TSC_DEADLINE, 0))
    assert isinstance(cut, Skip)
    assert not cut.arrives
    whole = decide([vcpu(2 * S)], HZ, most_ticks=3 * S)
    assert isinstance(whole, Skip)
    assert whole.arrives
    assert decide([vcpu(2 * S)], HZ, most_ticks=0) == Stay(StayReason.RATE, None, Wake(2 * S, WakeKind.TSC_DEADLINE, 0))


def test_a_host_that_moves_no_tsc() -> None:
    """There a TSC deadline comes when it comes, whatever else is first; other waits can be skipped."""
    event = Wake(S, WakeKind.EVENT)
    assert decide([vcpu(9 * S)], HZ, [event], moves_tscs=False) == Stay(StayReason.FIXED, None, event)
    assert decide([counting(10**9 + 5)], HZ, [event], moves_tscs=False) == Skip(S, event)


class Written:
    """Notes what carry_out() and move_kernel_clock() write, in order; the host's clocks go on at each call."""

    def __init__(self, offsets: tuple[int, ...] = (0,), lands_ns: int = 0) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.offsets = list(offsets)
        self.lands_ns = lands_ns  # beside what is asked for
        self._clock_ns, self._host_ns = 5 * 10**9, 7 * 10**9

    def move_time(self, ticks: int) -> None:
        """Note it."""
        self.calls.append(("move", ticks))

    def set_tsc_deadline(self, vcpu: int, deadline: int) -> None:
        """Note it."""
        self.calls.append(("deadline", vcpu, deadline))

    def set_lapic(self, vcpu: int, lapic: bytes) -> None:
        """Note its count."""
        self.calls.append(("lapic", vcpu, int.from_bytes(lapic[TMCCT : TMCCT + 4], "little"), len(lapic)))

    def pass_ns(self, ns: int) -> None:
        """Let the host's clocks go on."""
        self._host_ns += ns
        self._clock_ns += ns

    def get_clock(self) -> ClockReading:
        """All three clocks, a microsecond later."""
        self.pass_ns(1000)
        return ClockReading(self._clock_ns, 10**18 + self._host_ns, self._host_ns * HZ // 10**9)

    def set_clock(self, clock_ns: int, realtime_ns: int) -> None:
        """As KVM does it, and beside that."""
        self.pass_ns(2000)
        self.calls.append(("clock", clock_ns))
        self._clock_ns = clock_ns + (10**18 + self._host_ns - realtime_ns) + self.lands_ns

    def tsc_offsets(self) -> list[int]:
        """The present ones."""
        return list(self.offsets)

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """Note and set it."""
        self.calls.append(("offset", vcpu))
        self.offsets[vcpu] = offset

    def guest_tsc_and_ns(self, vcpu: int = 0) -> tuple[int, int]:
        """At one instant."""
        reading = self.get_clock()
        return (reading.host_tsc + self.offsets[vcpu]) % 2**64, reading.clock_ns


def test_time_moves_before_timers() -> None:
    """The TSC first, then each armed deadline with its own value: else KVM's timer stays where it was."""
    vcpus, written = [vcpu(2 * S), vcpu(), vcpu(5 * S)], Written()
    skip = decide(vcpus, HZ)
    assert isinstance(skip, Skip)
    carry_out(skip, vcpus, written, HZ)
    assert written.calls == [("move", 2 * S), ("deadline", 0, NOW + 2 * S), ("deadline", 2, NOW + 5 * S)]


def test_counts_shrink_by_what_was_skipped() -> None:
    """The one that is due is left with a count of 1, which KVM takes; another one with what it has still to go."""
    vcpus, written = (
        [counting(1_000_000, 0), counting(5_000_000, 0), counting(0), counting(3_000_000, 0b1011)],
        Written(),
    )
    skip = decide(vcpus, HZ)
    assert isinstance(skip, Skip)
    carry_out(skip, vcpus, written, HZ)
    assert written.calls[0] == ("move", skip.ticks)
    assert written.calls[1:] == [
        ("lapic", at, left, LAPIC_BYTES) for at, left in ((0, 1), (1, 4_000_000), (3, 1_000_000))
    ]


@pytest.mark.parametrize("lands_ns", [-700, 0, 700])
def test_clock_and_tsc_stay_together(lands_ns: int) -> None:
    """However far KVM_SET_CLOCK lands beside what was asked for, a thousand skips leave them 1 ns apart at most."""
    written, measured = Written((2**64 - 10**10, 2**64 - 10**10 + 33), lands_ns), MeasuredOffset(HZ)
    first_tsc, first_ns = written.guest_tsc_and_ns()
    for _ in range(1000):
        written.pass_ns(10**6)
        move_kernel_clock(S + 1, written, measured, HZ)
    tsc, ns = written.guest_tsc_and_ns()
    assert ns - first_ns >= 1000 * 10**9
    assert abs((tsc - first_tsc) * 10**9 // HZ - (ns - first_ns)) <= 1
    assert (written.offsets[1] - written.offsets[0]) % 2**64 == 33
    assert written.calls[-3:] == [written.calls[-3], ("offset", 0), ("offset", 1)]
    assert written.calls[-3][0] == "clock"


def test_an_offset_that_others_set_begins_anew() -> None:
    """A TSC that the guest has written, or a clock that the VMM has set, meanwhile stays as it is."""
    written, measured = Written(), MeasuredOffset(HZ)
    move_kernel_clock(S, written, measured, HZ)
    written.offsets[0] += 5 * S
    before_tsc, before_ns = written.guest_tsc_and_ns()
    move_kernel_clock(S, written, measured, HZ)
    tsc, ns = written.guest_tsc_and_ns()
    assert abs((tsc - before_tsc) * 10**9 // HZ - (ns - before_ns)) <= 1
    written.set_clock(10**15, 10**18)
    before_tsc, before_ns = written.guest_tsc_and_ns()
    move_kernel_clock(S, written, measured, HZ)
    tsc, ns = written.guest_tsc_and_ns()
    assert abs((tsc - before_tsc) * 10**9 // HZ - (ns - before_ns)) <= 1


def test_the_highest_rate() -> None:
    """Guest time may go as far as the rate has earned, and what a busy guest did not use is not saved up."""
    limit = RateLimit(Fraction(10), 0, 0)
    assert limit.allowed_ns(10**6, 10**6) == 9 * 10**6
    assert limit.allowed_ns(10**6, 10**7) == 0
    assert limit.allowed_ns(2 * 10**6, 11 * 10**6) == 9 * 10**6
    busy_ns = 10**10
    saved_ns = limit.allowed_ns(busy_ns, busy_ns)
    assert saved_ns == 10 * RateLimit.MOMENT_NS
    assert limit.allowed_ns(busy_ns, busy_ns + saved_ns) == 0
    assert limit.allowed_ns(busy_ns, 2 * busy_ns) == 0  # a step of the VMM's is not owed
    assert limit.allowed_ns(busy_ns + 10**6, 2 * busy_ns) == 10**7
