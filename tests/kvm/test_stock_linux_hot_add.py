"""A stock Linux on our own machine that gets another vCPU while it runs: it finds, starts and trusts it.

Only where KVM runs a stock Linux; elsewhere `make test-lab` does it.  The tests of the guest come in the file's order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from pvclock.lab.kernel import Kernel
from tests.kvm.stock_linux import StockLinux

pytestmark = [pytest.mark.kvm, pytest.mark.row("E22", "E5")]

CPUS: Final = "/sys/devices/system/cpu"
APPEARS: Final = f"while [ ! -e {CPUS}/cpu1/online ]; do sleep 0.1; done"
COMPLAINTS: Final = "TSC warp|TSC ADJUST differs|Marking TSC unstable|BUG:|WARNING:|Oops|soft lockup|not responding"


@pytest.fixture(scope="module")
def guest(kernel: Kernel) -> Iterator[StockLinux]:
    """One with a vCPU of two."""
    with StockLinux(kernel, vcpus=1, max_vcpus=2) as running:
        yield running


def test_a_vcpu_that_is_not_there_yet_is_possible(guest: StockLinux) -> None:
    """Linux boots with one, and leaves room for the one that the MADT calls capable of coming online."""
    assert guest.run(f"cat {CPUS}/present {CPUS}/possible {CPUS}/online") == "0\n0-1\n0\n"


def test_linux_finds_a_vcpu_that_is_added(guest: StockLinux) -> None:
    """The generic event device tells it, the processor's _STA and _MAT say which, and it comes up by its SIPI."""
    assert guest.machine.add_vcpu() == 1
    guest.run(APPEARS)
    assert guest.run(f"echo 1 > {CPUS}/cpu1/online; cat {CPUS}/online") == "0-1\n"
    assert guest.run("grep -c ^processor /proc/cpuinfo") == "2\n"


def test_the_late_vcpu_has_the_clock(guest: StockLinux) -> None:
    """It registers its page, which is STABLE; Linux finds no difference of the TSCs, and keeps its clocksource."""
    clock = guest.machine.clock
    assert clock is not None
    assert [clock.page(vcpu) is not None for vcpu in range(2)] == [True, True]
    assert clock.tsc(0).offset == clock.tsc(1).offset
    assert guest.run(f"dmesg | grep -E '{COMPLAINTS}'") == ""
    assert guest.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "kvm-clock\n"
    assert guest.run("taskset 2 vdso_probe") == "vdso reads 1000000 back 0\n"


def test_it_powers_off_with_both(guest: StockLinux) -> None:
    """The guest ends as ever."""
    assert guest.power_off() == 0
