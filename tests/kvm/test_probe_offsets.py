"""TSC offsets that were set by hand under the probe: on our runner it names the vCPU of three, and the pair of two."""

from __future__ import annotations

import os
from typing import Final

import pytest

from pvclock import Machine
from tests.kvm.probe_machine import run_on_machine
from tests.probe_line import ONE_CPU, Line, vcpus_named, vcpus_off, windows

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.row("E18"),
    pytest.mark.usefixtures("offsets_are_honoured"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason=ONE_CPU),
]

OFFSET_MS: Final = 50
"""An exchange of vCPUs that share a CPU may take some time slices of 4 ms."""


def measured(vcpus: int, moved: int | None, seconds: float = 1.0) -> tuple[Line, int]:
    """What the probe prints where vCPU `moved` was put forward, and by how many ticks."""
    ticks = []

    def put_forward(machine: Machine) -> None:
        ticks.append(machine.vcpus[0].get_tsc_khz() * OFFSET_MS)
        if moved is not None:
            vcpu = machine.vcpus[moved]
            vcpu.set_tsc_offset((vcpu.get_tsc_offset() + ticks[0]) % 2**64)

    return run_on_machine(f"seconds={seconds}", vcpus=vcpus, prepare=put_forward), ticks[0]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_of_three_the_vcpu_is_named(moved: int) -> None:
    """50 ms on one vCPU: both its pairs exclude 0 and hold that offset, and the third pair does neither."""
    line, ticks = measured(3, moved)
    found = windows(line)
    assert vcpus_off(line) == vcpus_named(line) == {moved}
    for (a, b), window in found.items():
        offset = ticks * ((b == moved) - (a == moved))
        assert offset in window, (a, b)


def test_of_two_the_pair_is_named() -> None:
    """50 ms between two vCPUs: nobody can say which is off, only that they differ, by how much and which way."""
    line, ticks = measured(2, 1)
    assert vcpus_off(line) == vcpus_named(line) == {0, 1}
    assert ticks in windows(line)[0, 1]
    assert 0 not in windows(line)[0, 1]


def test_nothing_is_found_where_nothing_was_moved() -> None:
    """Three vCPUs with one offset: all windows hold 0, and no warp is seen."""
    line, _ = measured(3, None)
    assert vcpus_off(line) == vcpus_named(line) == set()
    assert all(0 in window for window in windows(line).values())
    assert not any(clock["warps"] for clock in line["clocks"] if clock["name"] == "tsc")
