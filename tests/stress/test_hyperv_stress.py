"""Hyper-V's page beside pvclock's under fire: readers of both and of the counter race a writer that changes the rate.

The program is tests/native/hyperv_stress.c.  The product must pass it, and kinds with one defect each must not.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.stress

ROOT = Path(__file__).parents[2]
INCLUDE = ROOT / "pvclock" / "include"
SOURCE = ROOT / "tests" / "native" / "hyperv_stress.c"
COMPILE = ("cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")

# What no guest may see, and what would let it: readings on the wrong side of a break point.
FAULTS = ("backward_own", "backward_cross", "backward_kinds", "torn", "late_old", "early_new")

# How far a page may be off its timeline, after any number of changes.
UNITS_OFF_MAX = 2

# One run is enough unless other programs keep the CPUs from running both threads at once; so many end a hopeless test.
RUNS_MAX = 60

RACED_LEAST = {"page_reads": 1000, "counter_reads": 1000, "pvclock_reads": 1000, "publishes": 1000, "generations": 1}

Report = dict[str, Any]
Stress = Callable[..., Report]


class Defect(NamedTuple):
    """A broken kind, the counter that gives it away, and the reader that it takes."""

    kind: str
    fault: str
    reader: str = "linux"


DEFECTS = (
    Defect("no_zero_phase", "torn"),
    Defect("no_zero_phase", "backward_own", reader="windows"),
    Defect("same_sequence", "torn", reader="preempted"),
    Defect("sequence_read_back", "torn", reader="preempted"),
    Defect("bare_rdtsc", "late_old"),
    Defect("bare_rdtsc", "backward_own", reader="windows"),
    Defect("busy_after_a", "late_old"),
    Defect("released_before_b", "early_new"),
    Defect("released_before_b", "backward_kinds"),
    Defect("counter_taken_over_late", "backward_own"),
)


@pytest.fixture(scope="session")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Stress:
    """Return a function that runs the program, with its options as keywords, and returns its report."""
    program = tmp_path_factory.mktemp("hyperv_stress") / "hyperv_stress"
    subprocess.run([*COMPILE, f"-I{INCLUDE}", str(SOURCE), "-o", str(program)], check=True)

    def run(**options: str | float) -> Report:
        arguments = [f"--{name}={value}" for name, value in options.items()]
        done = subprocess.run([program, *arguments], check=True, capture_output=True, timeout=60)
        report: Report = json.loads(done.stdout)
        return report

    return run


def race(stress: Stress, **options: str | float) -> list[Report]:
    """Run the program until there was something to count, on however slow a machine."""
    reports: list[Report] = []
    while any(sum(report[name] for report in reports) < least for name, least in RACED_LEAST.items()):
        assert len(reports) < RUNS_MAX, f"nothing was raced: {reports[-1]}"
        reports.append(stress(**options))
    return reports


@pytest.mark.row("K-08", "H-50", "H-51", "H-54", "E4", "E9", "E11")
@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("reader", ["linux", "windows", "unfenced", "preempted"])
def test_reference_time_never_goes_back(stress: Stress, reader: str, readers: int) -> None:
    """Page, counter and pvclock's page are one clock: nothing is torn or goes back, whichever is read after which."""
    for report in race(stress, reader=reader, readers=readers):
        assert {name: report[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
        assert (report["least_step_units"], report["most_step_units"]) == (0, 1)
        assert report["most_off_units"] <= UNITS_OFF_MAX


needs_two_cpus = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="a race needs two CPUs: widen the affinity (taskset -c 0,1)"
)


@pytest.mark.row("K-08", "H-54", "E9")
@needs_two_cpus
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: f"{defect.kind}-{defect.fault}")
def test_a_broken_kind_is_noticed(stress: Stress, defect: Defect) -> None:
    """Each rule of the kind, left out alone, is noticed in some short races."""
    options = {"kind": defect.kind, "reader": defect.reader, "readers": 1, "seconds": 0.3}
    assert any(stress(**options)[defect.fault] for _ in range(RUNS_MAX))


@pytest.mark.row("E4", "E11", "E9")
def test_fractions_that_add_up_are_noticed(stress: Stress) -> None:
    """A break point that does not wait for the timeline lets the page walk away."""
    reports = [stress(kind="no_extra_unit", readers=1)]
    while sum(report["publishes"] for report in reports) < 100_000 and len(reports) < RUNS_MAX:
        reports.append(stress(kind="no_extra_unit", readers=1))
    assert max(report["most_off_units"] for report in reports) > UNITS_OFF_MAX
