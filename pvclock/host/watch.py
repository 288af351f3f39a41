"""Host trouble, found by comparing two checks: a TSC that cannot be trusted, a suspend, a stall of the VMM.

The VMM's loop or a ticker calls check() on a schedule; this module has no thread and no timer.  It reads the host
through a `HostSource`, so that a test can simulate every fault, and reports only: what a sleep or a step does to guest
time is in clock/host_trust.py.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from pvclock.arguments import flag, serving, whole
from pvclock.errors import RangeError
from pvclock.host.linux import HostReading, LinuxHost
from pvclock.quantities import NS_PER_S, U64_MASK, signed64

__all__ = [
    "RATE_BOUND_PPM",
    "RAW_GRAIN_NS",
    "HostSource",
    "HostWatch",
    "StallCause",
    "Trouble",
    "TroubleKind",
]

STALL_INTERVALS: Final = 4
"""Default stall threshold, in intervals."""

RATE_BOUND_PPM: Final = 1000
"""Twice the error bound of Linux's quick TSC calibration (500 ppm); NTP does not adjust CLOCK_MONOTONIC_RAW."""

RAW_GRAIN_NS: Final = 1000
"""CLOCK_MONOTONIC_RAW moves in steps of the clocksource: up to 280 ns on acpi_pm, the coarsest that hosts use."""


class HostSource(Protocol):
    """Where a HostWatch reads the host."""

    def read(self) -> HostReading:
        """The host at this instant."""


class TroubleKind(StrEnum):
    """What is wrong; each value is also an EventKind's."""

    CLOCKSOURCE = "clocksource"
    """The kernel changed its clocksource: it left tsc, or came back."""
    TSC_UNSTABLE = "tsc_unstable"
    """The kernel no longer offers tsc as a clocksource: it has marked the TSC unstable, for good."""
    TSC_STEP = "tsc_step"
    """The TSC went back, or the thread moved to a CPU whose TSC is behind."""
    TSC_RATE = "tsc_rate"
    """The TSC jumped ahead, fell behind, or left its nominal rate."""
    SUSPEND = "suspend"
    """The host slept."""
    STALL = "stall"
    """The gap between two checks exceeded stall_ns."""


class StallCause(StrEnum):
    """Why checks were late, as far as the stalled process can tell."""

    FROZEN = "frozen"
    """The process's cgroup was frozen."""
    STARVED = "starved"
    """The checking thread was runnable and got no CPU: an overloaded host, or a cgroup's CPU quota used up."""
    RAN = "ran"
    """The process ran but did not check: it was busy, or the checking thread was blocked."""
    HALTED = "halted"
    """The process used next to no CPU and asked for none.  SIGSTOP, a debugger, a frozen cgroup v1 (or v2 before Linux
    6.18) and a process whose threads all slept look alike: the kernel keeps no record of the difference."""


class Trouble(NamedTuple):
    """One trouble of the host.

    unstable: pages must no longer promise that all vCPUs' TSCs run in step (STABLE off).
    amount_ns: for STALL the gap between the two checks; for SUSPEND how long the host slept; for TSC_STEP and TSC_RATE
    how far the TSC ran ahead of (+) or behind (-) its nominal rate in the gap; else 0.
    before, after: the two readings between which it happened.  cause: for STALL, else None.
    """

    kind: TroubleKind
    why: str
    unstable: bool
    amount_ns: int
    before: HostReading
    after: HostReading
    cause: StallCause | None = None


class HostWatch:
    """Compares the host at each check with the check before; the constructor makes the first reading.

    tsc_hz: the TSC's nominal rate.  interval_ns: the caller's check interval.  stall_ns: a longer gap is a stall; more
    than one interval, 4 by default.  rate_bound_ppm: tolerated deviation of the TSC from its rate against
    CLOCK_MONOTONIC_RAW, in [0, 10^6].  source: this host by default.  RangeError outside these.

    If the clocksource is tsc, CLOCK_MONOTONIC_RAW derives from the same TSC: then this detects only a TSC that went
    back, and relies on the kernel's watchdog, which leaves tsc, for the rest.  If an outer hypervisor stops this whole
    host, that shows as a stall at most.

    Thread-safety: always call check() from the same thread, since run delay is per thread.
    """

    def __init__(
        self,
        tsc_hz: int,
        *,
        interval_ns: int,
        stall_ns: int | None = None,
        rate_bound_ppm: int = RATE_BOUND_PPM,
        source: HostSource | None = None,
    ) -> None:
        self.tsc_hz = whole("tsc_hz", tsc_hz, 1, U64_MASK)
        self.interval_ns = whole("interval_ns", interval_ns)
        self.stall_ns = STALL_INTERVALS * interval_ns if stall_ns is None else whole("stall_ns", stall_ns)
        self.rate_bound_ppm = whole("rate_bound_ppm", rate_bound_ppm, 0, 10**6)
        if not 0 < interval_ns < self.stall_ns:
            raise RangeError(
                f"interval_ns is {interval_ns}; it must be positive, and less than stall_ns, {self.stall_ns}"
            )
        self._source = LinuxHost() if source is None else serving("source", source, "read", wanted="a HostSource")
        self._last = self._source.read()
        # The least upper bound since the last suspend, so that a wide bracket cannot hide the next one for long.
        self._asleep_most_ns = self._last.asleep_most_ns
        self._marked_unstable = False
        self._rate_is_off = False
        self._usual_cpu_ns, self._usual_gap_ns = 0, 1

    @property
    def last(self) -> HostReading:
        """The last reading: host stamps for an event."""
        return self._last

    @property
    def tsc_trusted(self) -> bool:
        """Do all host CPUs' TSCs run in step, as far as the checks showed?

        True again if the clocksource comes back to tsc; after any other TSC trouble it stays False, as in KVM.
        """
        return self._last.clocksource == "tsc" and not self._marked_unstable

    def check(self, *, on_schedule: bool = True) -> list[Trouble]:
        """The troubles since the last check; usually none.

        on_schedule=False: no check was due meanwhile (the VM was paused), so a long gap does not count as a stall.  A
        TSC whose rate stays wrong is reported once, when it leaves the bound.
        """
        flag("on_schedule", on_schedule)
        before, after = self._last, self._source.read()
        self._last = after
        suspend = self._suspend(before, after)
        stall = self._stall(before, after) if on_schedule else None
        tsc = self._tsc(before, after, slept=suspend is not None)
        found = (_clocksource(before, after), _lost_tsc(before, after), tsc, suspend, stall)
        troubles = [trouble for trouble in found if trouble]
        self._marked_unstable |= any(it.unstable and it.kind is not TroubleKind.CLOCKSOURCE for it in troubles)
        return troubles

    def _suspend(self, before: HostReading, after: HostReading) -> Trouble | None:
        """A suspend, with its least length: only a suspend changes CLOCK_BOOTTIME - CLOCK_MONOTONIC."""
        slept_ns = after.asleep_least_ns - self._asleep_most_ns
        if slept_ns <= 0:
            self._asleep_most_ns = min(self._asleep_most_ns, after.asleep_most_ns)
            return None
        self._asleep_most_ns = after.asleep_most_ns
        why = f"the host was suspended for {slept_ns} ns: CLOCK_BOOTTIME went on, CLOCK_MONOTONIC did not"
        return Trouble(TroubleKind.SUSPEND, why, False, slept_ns, before, after)

    def _tsc(self, before: HostReading, after: HostReading, *, slept: bool) -> Trouble | None:
        """A TSC trouble: the TSC against its last reading, and against CLOCK_MONOTONIC_RAW.

        The first bracket ended before the second began, so any decrease is a step back.  In a suspend the TSC may keep
        counting while RAW stands still, for a time known only to the second; so more ticks than expected are then not
        an error.
        """
        ticks = signed64(after.host_tsc - before.host_tsc)
        raw_ns = after.raw_ns - before.raw_ns
        # Unit: ticks * NS_PER_S, to stay in whole numbers.
        error = ticks * NS_PER_S - raw_ns * self.tsc_hz
        reading = (before.width_ticks + after.width_ticks) * NS_PER_S // 2 + RAW_GRAIN_NS * self.tsc_hz
        bound = raw_ns * self.tsc_hz * self.rate_bound_ppm // 10**6 + reading
        perhaps_slept = (after.asleep_most_ns - before.asleep_least_ns) * self.tsc_hz
        ahead = error > bound + perhaps_slept and not slept
        was_off, self._rate_is_off = self._rate_is_off, ahead or error < -bound
        if ticks >= 0 and (was_off or not self._rate_is_off):
            return None
        kind = TroubleKind.TSC_STEP if ticks < 0 else TroubleKind.TSC_RATE
        why = (
            f"the TSC counted {ticks} ticks in {raw_ns} ns of CLOCK_MONOTONIC_RAW; its nominal rate is {self.tsc_hz} Hz"
        )
        return Trouble(kind, why, True, error // self.tsc_hz, before, after)

    def _stall(self, before: HostReading, after: HostReading) -> Trouble | None:
        gap_ns = after.monotonic_ns - before.monotonic_ns
        cpu_ns = after.process_cpu_ns - before.process_cpu_ns
        if gap_ns <= self.stall_ns:
            self._usual_cpu_ns, self._usual_gap_ns = cpu_ns, max(gap_ns, 1)
            return None
        cause = self._cause(before, after, gap_ns, cpu_ns)
        waited_ns = _grown(before.run_delay_ns, after.run_delay_ns)
        why = (
            f"no check for {gap_ns} ns, due every {self.interval_ns} ns ({cause}): "
            f"{cpu_ns} ns of CPU used, {waited_ns} ns waited for a CPU"
        )
        return Trouble(TroubleKind.STALL, why, False, gap_ns, before, after, cause)

    def _cause(self, before: HostReading, after: HostReading, gap_ns: int, cpu_ns: int) -> StallCause:
        """The cause of most of the gap.

        A stopped process used at most one interval's CPU time.  So it ran if it used CPU at half the rate of the last
        gap within stall_ns or more; that rate is taken as at least 1/50 of a CPU, since a lower one says too little.
        """
        if 2 * _grown(before.frozen_ns, after.frozen_ns) >= gap_ns:
            return StallCause.FROZEN
        if 2 * _grown(before.run_delay_ns, after.run_delay_ns) >= gap_ns:
            return StallCause.STARVED
        usual_ns = max(self._usual_cpu_ns * gap_ns // self._usual_gap_ns, gap_ns // 50)
        return StallCause.RAN if 2 * cpu_ns >= usual_ns else StallCause.HALTED


def _clocksource(before: HostReading, after: HostReading) -> Trouble | None:
    if before.clocksource == after.clocksource:
        return None
    why = f"the host's clocksource was {before.clocksource} and is {after.clocksource}"
    return Trouble(TroubleKind.CLOCKSOURCE, why, after.clocksource != "tsc", 0, before, after)


def _lost_tsc(before: HostReading, after: HostReading) -> Trouble | None:
    """TSC_UNSTABLE: the kernel shows that mark only by dropping tsc from the available clocksources.

    A kernel booted with nohz=off and highres=off lists even an unstable tsc; there only _clocksource() detects it.
    """
    if "tsc" not in before.clocksources or not after.clocksources or "tsc" in after.clocksources:
        return None
    why = f"the host's kernel has marked its TSC unstable: it offers {', '.join(sorted(after.clocksources))} only"
    return Trouble(TroubleKind.TSC_UNSTABLE, why, True, 0, before, after)


def _grown(before: int | None, after: int | None) -> int:
    return 0 if before is None or after is None else after - before
