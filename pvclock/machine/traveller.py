"""One look at a machine whose guest seems idle: what its vCPUs wait for, and the skip there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from fractions import Fraction
from threading import Lock
from typing import Final, NamedTuple

from pvclock.errors import StateError
from pvclock.kvm import Runner, Vcpu
from pvclock.machine.guest_time import GuestTime
from pvclock.machine.travel_options import Travel
from pvclock.timekeeping.travel import (
    LEAST_NS,
    MSR_IA32_TSC_DEADLINE,
    Decision,
    RateLimit,
    Skip,
    Stay,
    StayReason,
    VcpuSnapshot,
    Wake,
    WakeKind,
    carry_out,
    decide,
    expired,
)
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC

__all__ = ["Arrival", "Look", "Traveller"]

COSTS: Final = 16
"""So many of the last skips' are known; the least of them is what one takes, whatever a busy host made of others."""


class Arrival(NamedTuple):
    """A skip.  guest_ns: the time after it.  skipped_ns: of guest time.  wake: what it went to.

    arrives: did it get there, or was it cut short by the highest rate?  host_ns: for how long the vCPUs were kept out.
    """

    guest_ns: int
    skipped_ns: int
    wake: Wake
    arrives: bool
    host_ns: int


class Look(NamedTuple):
    """A decision.  guest_ns: when it was taken.  host_ns: for how long the vCPUs were kept out."""

    guest_ns: int
    decision: Decision
    host_ns: int


class Traveller:
    """Looks at the vCPUs of `runner`, and moves `guest_time`.

    skipping: one that begins while another one's last look is under way waits for that one's skip with it.
    has_hold: may no skip begin now?  next_event: the VMM's, in guest ns.  arrived: called after each skip, the vCPUs
    still out.
    """

    def __init__(
        self,
        runner: Runner,
        vcpus: list[Vcpu],
        guest_time: GuestTime,
        options: Travel,
        *,
        skipping: Lock,
        has_hold: Callable[[], bool],
        next_event: Callable[[], int | None],
        arrived: Callable[[Arrival], object],
    ) -> None:
        self._runner, self._vcpus, self._guest_time = runner, vcpus, guest_time
        self._until_ns = options.until_ns
        self._rate = None if options.max_rate is None else Fraction(options.max_rate)
        self._limit: RateLimit | None = None
        self._costs_ns = deque[int](maxlen=COSTS)  # of a skip, once it is decided on
        self._expired: set[int] = set()  # of the vCPUs' timers, at the last look
        self._skipping = skipping
        self._has_hold, self._next_event, self._arrived = has_hold, next_event, arrived
        with runner.quiesce():
            self._tsc_hz = vcpus[0].get_tsc_khz() * 1000
        self.is_at_end = False
        """Is it the guest time until which it was to go?"""

    def begin_anew(self) -> None:
        """After time in which the machine did not run, none of which is to be made up for."""
        self._limit = None

    def look(self, note: Callable[[], bool]) -> Look | None:
        """Decide with all vCPUs out of the guest, and skip; None for a machine that does not run.

        note: called when they are out; it returns whether they have blocked since it was called last, and not executed.
        """
        began_ns = time.monotonic_ns()
        with self._runner.quiesce():
            with self._skipping:
                if not self._is_running():
                    return None
                has_rested = note()
                before_ns = self._guest_time.now_ns()
                decision = self._decide_and_skip(before_ns, began_ns, has_rested=has_rested)
                now_ns = self._guest_time.now_ns() if isinstance(decision, Skip) else before_ns
            self.is_at_end = self._until_ns is not None and now_ns >= self._until_ns
            if isinstance(decision, Skip):
                host_ns = time.monotonic_ns() - began_ns
                self._arrived(Arrival(now_ns, now_ns - before_ns, decision.wake, decision.arrives, host_ns))
        return Look(before_ns, decision, time.monotonic_ns() - began_ns)

    # Inside

    def _is_running(self) -> bool:
        gate = self._runner.gate
        return gate.has_begun() and not gate.has_ended() and not gate.is_paused()

    def _decide_and_skip(self, now_ns: int, began_ns: int, *, has_rested: bool) -> Decision:
        snapshots = _snapshots(self._vcpus)
        out_ns = time.monotonic_ns() - began_ns
        decision = self._decide(snapshots, now_ns, out_ns, self._served(snapshots, has_rested=has_rested))
        if isinstance(decision, Skip):
            writes = VcpuWrites(self._vcpus, self._guest_time, f"to {decision.wake}")
            decided_ns = time.monotonic_ns()
            try:
                carry_out(decision, snapshots, writes, self._tsc_hz)
            except StateError:  # it stands still: a pause that came after the look at it
                return Stay(StayReason.HOLD)
            self._costs_ns.append(time.monotonic_ns() - decided_ns)
        return decision

    def _decide(self, snapshots: list[VcpuSnapshot], now_ns: int, out_ns: int, served: Collection[int]) -> Decision:
        if self._has_hold():
            return Stay(StayReason.HOLD)
        return decide(
            snapshots,
            self._tsc_hz,
            self._events(),
            out_ns=out_ns,
            served=served,
            most_ticks=self._most_ticks(now_ns),
            least_ns=max(LEAST_NS, min(self._costs_ns, default=0)),
            moves_tscs=self._guest_time.moves_tscs,
        )

    def _served(self, snapshots: list[VcpuSnapshot], *, has_rested: bool) -> Collection[int]:
        """See decide()."""
        before, self._expired = self._expired, {at for at, vcpu in enumerate(snapshots) if expired(vcpu)}
        return before & self._expired if has_rested else ()

    def _events(self) -> list[Wake]:
        due = ((WakeKind.EVENT, self._next_event()), (WakeKind.END, self._until_ns))
        wakes = [Wake(self._guest_time.ticks_until(ns), kind) for kind, ns in due if ns is not None]
        timer_ticks = self._guest_time.ticks_until_timer()
        return wakes if timer_ticks is None else [Wake(timer_ticks, WakeKind.CLOCK_TIMER), *wakes]

    def _most_ticks(self, now_ns: int) -> int | None:
        if self._rate is None:
            return None
        host_ns = time.monotonic_ns()
        if self._limit is None:
            self._limit = RateLimit(self._rate, host_ns, now_ns)
        return self._guest_time.ticks_until(now_ns + self._limit.allowed_ns(host_ns, now_ns))


class VcpuWrites:
    """SkipWrites of a machine's vCPUs.  why: for the clock's event."""

    def __init__(self, vcpus: list[Vcpu], guest_time: GuestTime, why: str) -> None:
        self._vcpus, self._guest_time, self._why = vcpus, guest_time, why

    def move_time(self, ticks: int) -> None:
        """See SkipWrites."""
        self._guest_time.move(ticks, self._why)

    def set_tsc_deadline(self, vcpu: int, deadline: int) -> None:
        """See SkipWrites."""
        self._vcpus[vcpu].set_msr(MSR_IA32_TSC_DEADLINE, deadline)

    def get_lapic(self, vcpu: int) -> bytes:
        """See SkipWrites."""
        return self._vcpus[vcpu].get_lapic()

    def set_lapic(self, vcpu: int, lapic: bytes) -> None:
        """See SkipWrites."""
        self._vcpus[vcpu].set_lapic(lapic)


def _snapshots(vcpus: list[Vcpu]) -> list[VcpuSnapshot]:
    """Their states; the TSCs last, so that little time passes from there to the skip."""
    states = [(vcpu.get_mp_state(), vcpu.get_lapic(), vcpu.get_vcpu_events()) for vcpu in vcpus]
    tscs = [vcpu.get_msrs([MSR_IA32_TSC_DEADLINE, MSR_IA32_TSC]) for vcpu in vcpus]
    return [
        VcpuSnapshot(mp_state, msrs[MSR_IA32_TSC], msrs[MSR_IA32_TSC_DEADLINE], lapic, events)
        for (mp_state, lapic, events), msrs in zip(states, tscs, strict=True)
    ]
