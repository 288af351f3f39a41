"""A stock Linux on our own machine that gets another vCPU while it runs: it finds, starts and trusts it.

Only where KVM runs a stock Linux; elsewhere `make test-lab` does it.  The tests of the guest come in the file's order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import pytest

from pvclock._core import TSC_STABLE_BIT
from pvclock.lab.kernel import Kernel
from tests.kvm.stock_linux import StockLinux

pytestmark = [pytest.mark.kvm, pytest.mark.row("E22", "E5")]

CPUS: Final = "/sys/devices/system/cpu"
CLOCKSOURCE: Final = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"
APPEARS: Final = f"while [ ! -e {CPUS}/cpu1/online ]; do sleep 0.1; done"
COMPLAINTS: Final = r"TSC warp|TSC ADJUST differs|[Uu]nstable|BUG:|WARNING:|Oops|soft lockup|failed|not responding"


@pytest.fixture(scope="module")
def guest(kernel: Kernel) -> Iterator[StockLinux]:
    """One with a vCPU of two.  Its TSC is invariant: else Linux with two CPUs does not trust it, and tests no warp."""
    with StockLinux(kernel, vcpus=1, max_vcpus=2, offer_invariant_tsc=True) as running:
        yield running


def test_a_vcpu_that_is_not_there_yet_is_possible(guest: StockLinux) -> None:
    """Linux boots with one, and leaves room for the one that the MADT calls capable of coming online."""
    assert guest.run(f"cat {CPUS}/present {CPUS}/possible {CPUS}/online") == "0\n0-1\n0\n"


def test_linux_finds_a_vcpu_that_is_added(guest: StockLinux) -> None:
    """The generic event device tells it, it comes up by its SIPI, and Linux measures no warp of the TSCs."""
    lines, clocksource = int(guest.run("dmesg | wc -l")), guest.run(CLOCKSOURCE)
    assert guest.machine.add_vcpu() == 1
    guest.run(APPEARS)
    assert guest.run(f"echo 1 > {CPUS}/cpu1/online; cat {CPUS}/online") == "0-1\n"
    assert guest.run("grep -c ^processor /proc/cpuinfo") == "2\n"
    log = guest.run(f"dmesg | tail -n +{lines + 1}")
    assert "CPU1 has been hot-added\n" in log
    assert re.search(COMPLAINTS, log) is None, log
    assert guest.run(CLOCKSOURCE) in (clocksource, "tsc\n")  # to trust its TSC takes a young Linux some time


def test_the_late_vcpu_has_the_clock(guest: StockLinux) -> None:
    """It has registered its page, which shows the first one's line and STABLE, and programs on it read on."""
    clock = guest.machine.clock
    assert clock is not None
    clock.refresh()
    first, second = clock.page(0), clock.page(1)
    assert first is not None
    assert second is not None
    assert first[1:] == second[1:]
    assert second.flags & TSC_STABLE_BIT
    assert clock.tsc(0).offset == clock.tsc(1).offset
    assert guest.run("taskset 2 vdso_probe") == "vdso reads 1000000 back 0\n"


def test_it_powers_off_with_both(guest: StockLinux) -> None:
    """The guest ends as ever."""
    assert guest.power_off() == 0
