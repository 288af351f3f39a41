"""How long a stock Linux's sleeps take with time travel: a day and a week, on either clock, with 1 and 2 vCPUs.

    pvclock lab -- python -m bench.time_travel [CLOCK-VCPUS...]

In the lab, or on any host whose KVM runs a stock Linux.  Beside it a guest without the options for it, for a while.
"""

from __future__ import annotations

import sys
import time

from pvclock.commands.run_time import GUEST_OPTIONS
from pvclock.lab.kernel import Kernel, find_kernel
from tests.kvm.stock_linux import StockLinux

SETUPS = ("engine-1", "engine-2", "kernel-1", "kernel-2")
DAY_S = 86_400
SLEEPS_S = {"a day": DAY_S, "a week": 7 * DAY_S}
WITHOUT_OPTIONS_S = 1800
"""A day of one that wakes several times a second takes too long to wait for."""
LIMIT_S = 600.0


def measure(kernel: Kernel, setup: str, options: str, sleeps_s: dict[str, int]) -> None:
    """Boot, sleep, and print what each sleep took."""
    clock, _, vcpus = setup.partition("-")
    with StockLinux(kernel, clock=clock, vcpus=int(vcpus), parameters=options.split()) as guest:
        travel = guest.machine.time_travel
        travel.enable()
        for name, sleep_s in sleeps_s.items():
            before, begun_s = travel.log, time.monotonic()
            guest.run(f"sleep {sleep_s}", LIMIT_S)
            host_s, now = time.monotonic() - begun_s, travel.log
            skips, ours_s = now.skips - before.skips, (now.host_ns - before.host_ns) / 1e9
            print(
                f"{setup}: {name} in {host_s:.2f} s: {skips} skips, of {host_s / skips * 1e3:.2f} ms each, "
                f"of which the vCPUs were out of the guest for {ours_s / skips * 1e3:.2f} ms; "
                f"a day in {host_s * DAY_S / sleep_s:.1f} s",
                flush=True,
            )


def main(*setups: str) -> int:
    """Measure the setups one after the other, all by default."""
    kernel = find_kernel(None, print)
    for setup in setups or SETUPS:
        measure(kernel, setup, GUEST_OPTIONS, SLEEPS_S)
        measure(kernel, setup, "", {"half an hour without the options": WITHOUT_OPTIONS_S})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
