"""Slew this host's clock as NTP does, while a guest's clock follows it: for the lab, whose host is nobody else's.

Prints a JSON list, an object for each tick.
"""

from __future__ import annotations

import ctypes
import json
import time

from pvclock import Reference
from pvclock.meter.drift.host_reference import HostReference
from pvclock.meter.findings import failures
from pvclock.meter.machine_guest import MachineGuest

PHASES_PPM = (0, 200, -300, 0)
PHASE_TICKS = 88
INTERVAL_S = 0.25

ADJ_FREQUENCY = 0x2
FREQUENCY_UNIT = 1 << 16
"""A ppm of struct timex's freq."""


class Timex(ctypes.Structure):
    """struct timex as far as it is used here; the kernel fills all of it."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("rest", ctypes.c_byte * 512),
    )


def slew_host(ppm: int) -> None:
    """Let this host's CLOCK_MONOTONIC and CLOCK_REALTIME run `ppm` fast."""
    timex = Timex(modes=ADJ_FREQUENCY, freq=ppm * FREQUENCY_UNIT)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.adjtimex(ctypes.byref(timex)) < 0:
        raise OSError(ctypes.get_errno(), "adjtimex")


def main() -> None:
    """Follow CLOCK_MONOTONIC through all phases."""
    ticks: list[dict[str, object]] = []
    with MachineGuest("engine", 1) as guest:
        clock = guest.engine_clock
        guest.start()
        readings = HostReference(Reference.MONOTONIC).readings("guest", guest, 0.0)
        clock.follow(Reference.MONOTONIC)
        for ppm in PHASES_PPM:
            slew_host(ppm)
            for place in range(PHASE_TICKS):
                before, rate, tick_ns = readings.page(), clock.rate, time.monotonic_ns()
                steering = clock.tick()
                readings.take(before)
                assert steering is not None
                turned_ns = abs(clock.rate - rate) * (time.monotonic_ns() - tick_ns)
                point, bound_ns = readings.points[-1], steering.bound_ns
                ticks.append(
                    {
                        "ppm": ppm,
                        "place": place,
                        "ahead_ns": point.ahead_ns,
                        "step_ns": readings.steps_ns[-1],
                        "turned_ns": float(turned_ns),
                        "bound_ns": point.bound_ns + bound_ns,
                        "correction_ppm": float(steering.frequency_adjustment) * 1e6,
                        "state": str(steering.state),
                    }
                )
                time.sleep(INTERVAL_S)
        records = guest.finish()
    assert not any(failures(records).values()), records
    print(json.dumps(ticks))  # noqa: T201  # what it is for


if __name__ == "__main__":
    main()
