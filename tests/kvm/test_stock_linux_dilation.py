"""Debian's kernel at the limits of dilation: what it takes its TSC for, and how its timers keep up with its clock.

Only where KVM runs a stock Linux; elsewhere `make test-lab` does it.  The tests of a guest come in the file's order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Final

import pytest

from pvclock import GuestClock, RangeError
from pvclock.lab.kernel import Kernel
from pvclock.machine.dilation_limits import uses_deadlines
from tests.kvm.stock_linux import StockLinux

pytestmark = [pytest.mark.kvm, pytest.mark.row("E12", "E22")]

RATES: Final = (Fraction(1), Fraction(1, 13))
TIMING: Final = 0x40000010
SLEEP_NS: Final = 200_000_000


@pytest.fixture(scope="module")
def guest(kernel: Kernel, request: pytest.FixtureRequest) -> Iterator[StockLinux]:
    """One that has booted to its shell at a rate."""
    with StockLinux(kernel, rate=request.param) as running:
        yield running


on_all = pytest.mark.parametrize("guest", RATES, indirect=True, ids=lambda rate: f"at {rate}".replace("/", ":"))
on_undilated = pytest.mark.parametrize("guest", RATES[:1], indirect=True, ids=["at 1"])


def clock_of(guest: StockLinux) -> GuestClock:
    """The engine's."""
    assert guest.machine.clock is not None
    return guest.machine.clock


def slept_ns(guest: StockLinux) -> int:
    """At least how much guest time a sleep of SLEEP_NS took, by two readings of the engine's clock around it."""
    before = clock_of(guest).now()
    guest.run(f"usleep {SLEEP_NS // 1000}")
    return clock_of(guest).now() - before


@on_all
def test_it_takes_its_tsc_for_what_its_page_shows(guest: StockLinux) -> None:
    """At 1 that is what leaf 0x40000010 says, to a kHz, which a page rounds; at 1/13 no leaf contradicts it."""
    found = re.search(r"tsc: Detected (\d+)\.(\d{3}) MHz", guest.run("dmesg | grep 'tsc: Detected'"))
    assert found is not None
    page = clock_of(guest).page(0)
    assert page is not None
    detected_khz = int(found[1] + found[2])
    assert abs(detected_khz - page.shown_khz) <= page.shown_khz * 1e-6
    leaf = clock_of(guest).cpuid(TIMING)
    assert (leaf is not None) == (clock_of(guest).dilation == 1)
    assert leaf is None or abs(leaf.eax - detected_khz) <= 1


@on_all
def test_a_sleep_is_as_long_by_its_clock(guest: StockLinux) -> None:
    """Not shorter at any rate; its LAPIC's timer is in TSC-deadline mode, which is what the limits are of."""
    guest.machine.pause()
    assert uses_deadlines(guest.machine.vcpus[0].get_lapic())
    guest.machine.resume()
    assert slept_ns(guest) >= SLEEP_NS


@on_undilated
def test_a_slower_clock_is_no_shorter_sleep(guest: StockLinux) -> None:
    """At run time its deadlines come early, and it sets them again; a faster clock than at the boot is refused."""
    clock = clock_of(guest)
    clock.dilate(1, 10)
    assert slept_ns(guest) >= SLEEP_NS
    clock.dilate(1)
    with pytest.raises(RangeError, match="booted at 1"):
        clock.dilate(2)
    assert slept_ns(guest) >= SLEEP_NS


@on_all
def test_it_powers_off(guest: StockLinux) -> None:
    """With no lockup in its log, at any rate that it had."""
    assert guest.run("dmesg | grep -E 'BUG:|soft lockup|detected stalls'") == ""
    assert guest.power_off() == 0
