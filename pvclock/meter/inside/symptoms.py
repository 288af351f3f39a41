"""What software in the guest sees of a fault."""

from __future__ import annotations

from typing import Final

__all__ = ["sees_apart", "sees_behind", "sees_drift", "sees_step", "title"]

TITLES: Final = {
    "tsc": "TSC",
    "monotonic": "CLOCK_MONOTONIC",
    "monotonic_raw": "CLOCK_MONOTONIC_RAW",
    "pvclock": "kvmclock",
    "hyperv": "Hyper-V reference time",
    "pit": "PIT",
    "acpi_pm": "ACPI PM timer",
}

WHO_FAILS: Final = {
    "tsc": "what reads RDTSC itself (profilers, tracers, databases, DPDK), and every clock that Linux makes of it,",
    "monotonic": "std::chrono::steady_clock, Java's nanoTime(), Go's and Rust's monotonic time and Erlang's clock",
    "monotonic_raw": "what reads CLOCK_MONOTONIC_RAW (time daemons, tracers)",
    "pvclock": "every clock that a guest's kernel makes of kvmclock",
    "hyperv": "every clock that a guest's kernel makes of Hyper-V's reference time",
}
CRASHES: Final = " Programs that take that for impossible end themselves: Erlang's runtime and Chromium do."


def title(clock: str) -> str:
    """A clock as software calls it."""
    return TITLES.get(clock, clock)


def sees_apart(clock: str, most: str) -> str:
    """What software sees where two CPUs' readings of a clock differ by `most`, in words."""
    crashes = CRASHES if clock in {"monotonic", "pvclock", "hyperv"} else ""
    return f"{_who(clock)} can see time go back by {most} when a thread moves from one CPU to another.{crashes}"


def sees_step(clock: str, size: str, *, is_back: bool) -> str:
    """What software sees of a step."""
    if is_back:
        return (
            f"{_who(clock)} see time go back by {size}.{CRASHES if clock in {'monotonic', 'pvclock', 'hyperv'} else ''}"
        )
    return f"{_who(clock)} see {size} pass at once: timeouts expire, leases end, watchdogs may fire."


def sees_drift(clock: str) -> str:
    """What software sees of an offset that moves."""
    return (
        f"{_who(clock)} can see time go back when a thread moves between these CPUs, by more the longer the guest runs."
    )


def sees_behind(size: str) -> str:
    """What software sees of a clock that fell behind the TSC."""
    return (
        f"what reads this clock misses {size}: timeouts come late and leases last longer by so much; if the TSC jumped "
        f"instead, what reads RDTSC itself sees {size} pass at once."
    )


def _who(clock: str) -> str:
    return WHO_FAILS.get(clock, f"what reads {title(clock)}")
