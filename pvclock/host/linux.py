"""Facts from this host's Linux: boot, sleep, clocksource, TSC by CPU, and this process's scheduling."""

from __future__ import annotations

import os
import time
from functools import cache
from typing import Final, NamedTuple

from pvclock._counter import Counter
from pvclock._sampling import sample_clock
from pvclock.quantities import HostTsc

__all__ = [
    "HostReading",
    "LinuxHost",
    "asleep_bounds_ns",
    "boot_id",
    "cpu_flags",
    "host_clocksource",
    "read_boot_id",
    "tsc_of_each_cpu",
]

BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
CURRENT_CLOCKSOURCE: Final = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
AVAILABLE_CLOCKSOURCES: Final = "/sys/devices/system/clocksource/clocksource0/available_clocksource"
CPUINFO: Final = "/proc/cpuinfo"
SCHEDSTAT: Final = "/proc/thread-self/schedstat"
OWN_CGROUPS: Final = "/proc/self/cgroup"
CGROUP2_MOUNTS: Final = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")

ASLEEP_TRIES: Final = 4


class HostReading(NamedTuple):
    """The host at one instant.

    host_tsc, raw_ns: one instant on the TSC and on CLOCK_MONOTONIC_RAW, exact to width_ticks / 2.
    monotonic_ns: CLOCK_MONOTONIC, which stands still while the host is suspended.  real_ns: UTC since 1970.
    asleep_least_ns, asleep_most_ns: bounds of the time that the host was suspended since boot.
    process_cpu_ns: CPU time of all threads of this process.
    run_delay_ns: how long the calling thread was runnable without a CPU; None if the kernel does not report it.
    frozen_ns: how long this process's cgroup v2 was frozen; None if the kernel does not report it (before Linux 6.18).
    clocksource: the kernel's current one, "unknown" if unreadable.  clocksources: all available, empty if unreadable.
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
    """The host kernel's clocksource, "unknown" if unreadable; "tsc" means that it trusts its TSCs to be in step."""
    return _text(CURRENT_CLOCKSOURCE).strip() or "unknown"


def cpu_flags() -> frozenset[str]:
    """The CPU's features by the kernel's names; "hypervisor": this is a VM.  Empty if unreadable."""
    _, _, rest = _text(CPUINFO).partition("\nflags\t\t: ")
    return frozenset(rest.partition("\n")[0].split())


def asleep_bounds_ns() -> tuple[int, int]:
    """(least, most) ns that this host has slept since boot.

    CLOCK_BOOTTIME - CLOCK_MONOTONIC: the former read between two readings of the latter, the narrowest of 4 brackets.
    """
    bounds = []
    for _ in range(ASLEEP_TRIES):
        earlier_ns = time.monotonic_ns()
        boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        later_ns = time.monotonic_ns()
        # Each clock truncates to whole ns.
        bounds.append((boottime_ns - later_ns - 1, boottime_ns - earlier_ns + 1))
    return min(bounds, key=lambda each: each[1] - each[0])


def tsc_of_each_cpu(counter: Counter) -> tuple[HostTsc, ...]:
    """Read `counter` on each CPU in this thread's affinity mask, by moving the thread there and back.

    The current CPU's reading is first, and the only one if the kernel refuses to move the thread.
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
    """The kernel's random id of this boot; None if unreadable."""
    return _text(BOOT_ID).strip() or None


@cache
def boot_id() -> str | None:
    """read_boot_id(), read once a process: opening that file would be most of an event's cost."""
    return read_boot_id()


class LinuxHost:
    """This host as a HostSource.  A reading takes about 0.1 ms, mostly for four small files of /sys and /proc."""

    def __init__(self) -> None:
        self._cgroup_stat = _own_cgroup_stat()

    def read(self) -> HostReading:
        """See HostSource.  What the kernel does not offer reads as unknown; raises nothing."""
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


def _own_cgroup_stat() -> str | None:
    """This process's cgroup.stat.local (cgroup v2), which has frozen_usec; None if absent, or in the root cgroup.

    The kernel counts from the freeze request to the thaw request, of the cgroup or an ancestor.
    """
    paths = [line.removeprefix("0::/") for line in _text(OWN_CGROUPS).splitlines() if line.startswith("0::/")]
    files = [f"{mount}/{path}/cgroup.stat.local" for mount in CGROUP2_MOUNTS for path in paths]
    return next((file for file in files if os.access(file, os.F_OK)), None)


def _text(file: str) -> str:
    try:
        with open(file, encoding="ascii", errors="replace") as opened:  # noqa: PTH123  # pathlib takes 6 ms to import
            return opened.read()
    except OSError:
        return ""
