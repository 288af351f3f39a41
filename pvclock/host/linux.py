"""What this host's Linux says of itself: boot, sleep, clocksource, CPUs, and how this process fares."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from pvclock._counter import Counter
from pvclock._sampling import sample_clock
from pvclock.quantities import HostTsc

__all__ = [
    "HostReading",
    "LinuxHost",
    "asleep_bounds_ns",
    "boot_id",
    "host_clocksource",
    "read_boot_id",
    "tsc_of_each_cpu",
]

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
CURRENT_CLOCKSOURCE: Final = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
AVAILABLE_CLOCKSOURCES: Final = CURRENT_CLOCKSOURCE.with_name("available_clocksource")
SCHEDSTAT: Final = Path("/proc/thread-self/schedstat")
OWN_CGROUPS: Final = Path("/proc/self/cgroup")
CGROUP2_MOUNTS: Final = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))

ASLEEP_TRIES: Final = 4


class HostReading(NamedTuple):
    """What the host says at one instant.

    host_tsc, raw_ns: one instant on the TSC and on CLOCK_MONOTONIC_RAW, true to width_ticks / 2.
    monotonic_ns: CLOCK_MONOTONIC, which stands still while the host is suspended.  real_ns: UTC since 1970.
    asleep_least_ns, asleep_most_ns: bounds of the time that the host was suspended since it booted.
    process_cpu_ns: CPU time of all threads of this process.
    run_delay_ns: how long the calling thread has waited for a CPU while it could run; None if the kernel does not say.
    frozen_ns: how long this process's cgroup v2 has been frozen; None if the kernel does not say (before Linux 6.18).
    clocksource, clocksources: the kernel's present one, "unknown" if unreadable; all on offer, empty if unreadable.
    """

    host_tsc: HostTsc
    raw_ns: int
    width_ticks: int
    monotonic_ns: int
    real_ns: int
    asleep_least_ns: int
    asleep_most_ns: int
    process_cpu_ns: int
    run_delay_ns: int | None
    frozen_ns: int | None
    clocksource: str
    clocksources: frozenset[str]


def host_clocksource() -> str:
    """The host kernel's clocksource: "tsc" means that it trusts its TSCs to be in step."""
    try:
        return CURRENT_CLOCKSOURCE.read_text().strip()
    except OSError:
        return "unknown"


def asleep_bounds_ns() -> tuple[int, int]:
    """For how long this host has slept since it booted, in ns: at least, and at most.

    CLOCK_BOOTTIME - CLOCK_MONOTONIC, between two readings of the latter: the narrowest bracket of a few.
    """
    bounds = []
    for _ in range(ASLEEP_TRIES):
        earlier_ns = time.monotonic_ns()
        boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        later_ns = time.monotonic_ns()
        # Either clock cuts off a fraction of a ns.
        bounds.append((boottime_ns - later_ns - 1, boottime_ns - earlier_ns + 1))
    return min(bounds, key=lambda each: each[1] - each[0])


def tsc_of_each_cpu(counter: Counter) -> tuple[HostTsc, ...]:
    """`counter` as each CPU reads it that this thread may run on; the thread visits them, and comes back.

    The CPU that it runs on is the first.  Where the kernel refuses the visits it is the only one.
    """
    readings = [HostTsc(counter.read())]
    allowed = os.sched_getaffinity(0)
    try:
        for cpu in sorted(allowed):
            os.sched_setaffinity(0, {cpu})
            readings.append(HostTsc(counter.read()))
    except OSError:  # a cpuset took that CPU away meanwhile
        pass
    finally:
        os.sched_setaffinity(0, allowed)
    return tuple(readings)


def read_boot_id() -> str | None:
    """Which boot of which host this is; None if the kernel does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return None


@cache
def boot_id() -> str | None:
    """As read_boot_id(), read once in a process: most of an event's cost would be to open that file."""
    return read_boot_id()


class LinuxHost:
    """This host.  A reading takes some 0.1 ms, most of it for four small files of /sys and /proc."""

    def __init__(self) -> None:
        self._cgroup_stat = _own_cgroup_stat()

    def read(self) -> HostReading:
        """See HostSource.  What the kernel does not offer reads as unknown; nothing is raised."""
        tsc, raw_ns, width_ticks = sample_clock(time.CLOCK_MONOTONIC_RAW)
        asleep_least_ns, asleep_most_ns = asleep_bounds_ns()
        schedstat = _text(SCHEDSTAT).split()
        return HostReading(
            HostTsc(tsc),
            raw_ns,
            width_ticks,
            time.monotonic_ns(),
            time.time_ns(),
            asleep_least_ns,
            asleep_most_ns,
            time.process_time_ns(),
            int(schedstat[1]) if len(schedstat) > 1 else None,
            self._frozen_ns(),
            host_clocksource(),
            frozenset(_text(AVAILABLE_CLOCKSOURCES).split()),
        )

    def _frozen_ns(self) -> int | None:
        lines = _text(self._cgroup_stat).splitlines() if self._cgroup_stat else []
        return next((int(line.split()[1]) * 1000 for line in lines if line.startswith("frozen_usec ")), None)


def _own_cgroup_stat() -> Path | None:
    """The file that may say how long this process's cgroup v2 was frozen; None if it is in none but the root.

    cgroup.stat.local counts from the order to freeze to that to thaw, its own or an ancestor's.
    """
    paths = [line.removeprefix("0::/") for line in _text(OWN_CGROUPS).splitlines() if line.startswith("0::/")]
    files = [mount / path / "cgroup.stat.local" for mount in CGROUP2_MOUNTS for path in paths]
    return next((file for file in files if file.exists()), None)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
