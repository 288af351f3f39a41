"""vCPUs that come while a machine runs, and run(): late vCPUs have the time that the others have."""

from __future__ import annotations

from typing import Final, Literal

import pytest

from pvclock import ConfigError, Machine, StateError
from pvclock.kvm.tsc_offset import TscOffsets
from pvclock.machine import RunState
from tests.kvm.tsc_guest import TSC, TSC_ADJUST, Step, TscGuest, sipi_steps, tsc_guest

pytestmark = [pytest.mark.kvm, pytest.mark.row("E5")]

Clock = Literal["engine", "kernel"]
both = pytest.mark.parametrize("clock", ["engine", "kernel"])

MOVED: Final = 1 << 44
"""Ticks, more than an hour: what a guest moves its TSC by, and no run takes as long."""
RDTSC, READ_ADJUST = Step("rdtsc"), Step("rdmsr", TSC_ADJUST)
SYSTEM_TIME: Final = 0x4B564D01
PAGE: Final = 0x6000
PAGE_BYTES: Final = 32
SPIN: Final = b"\xeb\xfe"


def wait(mark: int) -> Step:
    """Until the host lets the guest pass."""
    return Step("wait", value=mark)


def register_page(vcpu: int) -> Step:
    """vCPU's clock page, behind the one before."""
    return Step("wrmsr", SYSTEM_TIME, PAGE + vcpu * PAGE_BYTES | 1)


FIRST: Final = [register_page(0), wait(1), *sipi_steps(1), wait(2), RDTSC, wait(3), wait(4), RDTSC, READ_ADJUST]
LATE: Final = [register_page(1), wait(2), wait(3), RDTSC, READ_ADJUST, wait(4)]
"""vCPU 0 reads its TSC before and after vCPU 1 does, as the marks have it."""


def let_both_read(guest: TscGuest) -> tuple[list[int], list[int]]:
    """What the two vCPUs find, from mark 1 on, at which vCPU 1 was added."""
    for mark in (1, 2, 3, 4):
        guest.let_pass(mark)
        guest.wait_until_all_reach(mark + 1 if mark < 4 else 255)
    return guest.results(0), guest.results(1)


def wait_until_first_reaches(guest: TscGuest, mark: int) -> None:
    """Return once vCPU 0, the only one yet, waits at `mark`."""
    TscGuest(guest.machine, guest.steps[:1]).wait_until_all_reach(mark)


@both
def test_a_late_vcpu_reads_the_same_tsc(clock: Clock, tsc_offsets: TscOffsets) -> None:
    """Started by INIT and SIPI it reads a TSC between two of vCPU 0's, and has the same offset on a host with such."""
    with tsc_guest(clock, FIRST, LATE, present=1) as guest:
        wait_until_first_reaches(guest, 1)
        assert guest.machine.add_vcpu() == 1
        (before, after, adjust), (late, late_adjust) = let_both_read(guest)
        assert before <= late <= after
        assert (late_adjust, adjust) == (0, 0)
        guest.machine.pause()
        if tsc_offsets is TscOffsets.HONOURED:
            assert len({vcpu.get_tsc_offset() for vcpu in guest.machine.vcpus}) == 1
