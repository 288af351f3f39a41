"""Trouble of the host, found by comparing two looks at it: a TSC that cannot be trusted, a suspend, a stall of the VMM.

Whoever has a schedule looks: the VMM's loop, or a ticker.  There is no thread and no timer here.  What the host says
comes through a `HostSource`, so that a test can play every fault.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from pvclock.arguments import flag, serving, whole
from pvclock.errors import RangeError
from pvclock.host.linux import HostReading, LinuxHost
from pvclock.quantities import NS_PER_S, U64_MASK, signed64

__all__ = ["HostSource", "HostWatch", "StallCause", "Trouble", "TroubleKind"]

STALL_INTERVALS: Final = 4
"""A stall is a gap of more intervals than this, unless told otherwise."""

RATE_BOUND_PPM: Final = 1000
"""Twice what Linux's quick calibration of the TSC may be wrong (500 ppm); NTP does not touch CLOCK_MONOTONIC_RAW."""

RAW_GRAIN_NS: Final = 1000
"""CLOCK_MONOTONIC_RAW moves in steps of the clocksource: up to 280 ns on acpi_pm, the coarsest that hosts use."""


class HostSource(Protocol):
    """Where a HostWatch looks."""

    def read(self) -> HostReading:
        """The host at this instant."""


class TroubleKind(StrEnum):
    """What is wrong; each word is an EventKind, too."""

    CLOCKSOURCE = "clocksource"
    """The kernel's clocksource is another one: it left tsc, or came back."""
    TSC_UNSTABLE = "tsc_unstable"
    """The kernel no longer offers tsc as a clocksource: it has marked the TSC unstable, for good."""
    TSC_STEP = "tsc_step"
    """The TSC went back, or the thread moved to a CPU whose TSC is behind."""
    TSC_RATE = "tsc_rate"
    """The TSC jumped ahead, fell behind, or runs at another rate than its nominal one."""
    SUSPEND = "suspend"
    """The host slept."""
    STALL = "stall"
    """Nobody looked for longer than was declared."""


class StallCause(StrEnum):
    """Why nobody looked, as well as it can be told from where the stalled process stands."""

    FROZEN = "frozen"
    """The process's cgroup was frozen."""
    STARVED = "starved"
    """The looking thread could run and got no CPU: an overloaded host, or a cgroup's CPU quota used up."""
    RAN = "ran"
    """The process ran, and did not look: it was busy, or the looking thread was held up."""
    HALTED = "halted"
    """The process used next to no CPU and asked for none.  SIGSTOP, a debugger, a frozen cgroup v1 (or v2 before Linux
    6.18) and a process of which every thread just slept look alike: the kernel keeps no record of the difference."""


class Trouble(NamedTuple):
    """One thing that is wrong with the host.

    unstable: it must not be promised any longer that all vCPUs' TSCs run in step (STABLE off).
    amount_ns: of STALL the gap between the two looks; of SUSPEND how long the host slept; of TSC_STEP and TSC_RATE how
    far the TSC went beyond (+) or stayed behind (-) its nominal rate in the gap; else 0.
    before, after: the two looks; what happened, happened between them.  cause: of STALL, else None.
    """

    kind: TroubleKind
    why: str
    unstable: bool
    amount_ns: int
    before: HostReading
    after: HostReading
    cause: StallCause | None = None


class HostWatch:
    """Compares the host with what it was at the look before; making one is the first look.

    tsc_hz: the TSC's nominal rate.  interval_ns: how often the caller means to look.  stall_ns: a longer gap is a
    stall; 4 intervals by default, and more than one.  rate_bound_ppm: how far the TSC may be off its rate against
    CLOCK_MONOTONIC_RAW, in [0, 10^6].  source: this host by default.  RangeError for what is outside of that.

    Where the clocksource is tsc, CLOCK_MONOTONIC_RAW is made of the same TSC: then only a TSC that went back shows by
    itself, and for all else the kernel's own watchdog must speak, by leaving tsc.  A hypervisor around this host that
    stopped all of it shows, if at all, as a stall.

    Thread-safety: one thread looks, always the same, for run delay is a thread's own.
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
        # The least upper bound since the last suspend: a wide bracket after one cannot hide it for long.
        self._asleep_most_ns = self._last.asleep_most_ns
        self._marked_unstable = False
        self._rate_is_off = False
        self._usual_cpu_ns, self._usual_gap_ns = 0, 1

    @property
    def last(self) -> HostReading:
        """The last look: host stamps for an event."""
        return self._last

    @property
    def tsc_stable(self) -> bool:
        """Do all host CPUs' TSCs run in step, by what was seen so far?

        A clocksource that left tsc may come back; after any other TSC trouble the answer stays no, as KVM's does.
        """
        return self._last.clocksource == "tsc" and not self._marked_unstable

    def check(self, *, on_schedule: bool = True) -> list[Trouble]:
        """What went wrong since the look before; nothing, most of the time.

        on_schedule=False: no look was due meanwhile (the VM was paused), so that a long gap is no stall.  A TSC whose
        rate stays wrong is said once, when it leaves the bound.
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
        """For how long the host slept at the least: CLOCK_BOOTTIME - CLOCK_MONOTONIC changes by nothing else."""
        slept_ns = after.asleep_least_ns - self._asleep_most_ns
        if slept_ns <= 0:
            self._asleep_most_ns = min(self._asleep_most_ns, after.asleep_most_ns)
            return None
        self._asleep_most_ns = after.asleep_most_ns
        why = f"the host was suspended for {slept_ns} ns: CLOCK_BOOTTIME went on, CLOCK_MONOTONIC did not"
        return Trouble(TroubleKind.SUSPEND, why, False, slept_ns, before, after)

    def _tsc(self, before: HostReading, after: HostReading, *, slept: bool) -> Trouble | None:
        """The TSC against its own past, and against CLOCK_MONOTONIC_RAW.

        The one bracket ended before the other began: fewer ticks than before are a step back, however few.  A TSC may
        count on in a suspend, in which RAW stands still, and how long that was is known to the second only: then more
        ticks than expected are no fault.
        """
        ticks = signed64(after.host_tsc - before.host_tsc)
        raw_ns = after.raw_ns - before.raw_ns
        # In ticks * NS_PER_S, to stay in whole numbers.
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
            f"no look for {gap_ns} ns, due every {self.interval_ns} ns ({cause}): "
            f"{cpu_ns} ns of CPU used, {waited_ns} ns waited for a CPU"
        )
        return Trouble(TroubleKind.STALL, why, False, gap_ns, before, after, cause)

    def _cause(self, before: HostReading, after: HostReading, gap_ns: int, cpu_ns: int) -> StallCause:
        """What most of the gap was.

        A process that was stopped has used the CPU of one interval at the most.  So it ran if it kept up half its pace
        of the last gap that was in time; a pace below 1/50 of a CPU says too little, and is taken as that.
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
    """The kernel's mark shows in the list of clocksources alone.

    A kernel booted with nohz=off and highres=off lists an unstable tsc as well; there only _clocksource() sees it go.
    """
    if "tsc" not in before.clocksources or not after.clocksources or "tsc" in after.clocksources:
        return None
    why = f"the host's kernel has marked its TSC unstable: it offers {', '.join(sorted(after.clocksources))} only"
    return Trouble(TroubleKind.TSC_UNSTABLE, why, True, 0, before, after)


def _grown(before: int | None, after: int | None) -> int:
    return 0 if before is None or after is None else after - before
