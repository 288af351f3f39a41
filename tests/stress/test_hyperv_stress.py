"""Hyper-V's page beside pvclock's under fire: readers of both and of the counter race a writer that changes the rate.

The program is tests/native/hyperv_stress.c.  The product must pass it, and kinds with one defect each must not.
"""

from typing import NamedTuple

import pytest

from tests.stress.racing import Stress, built, needs_two_cpus, race, runs

pytestmark = pytest.mark.stress

# What no guest may see, and what would let it: readings on the wrong side of a break point.
FAULTS = ("backward_own", "backward_cross", "backward_kinds", "torn", "late_old", "early_new")

# How far a page may be off its timeline, after any number of changes.
UNITS_OFF_MAX = 2

RACED_LEAST = {"page_reads": 1000, "counter_reads": 1000, "pvclock_reads": 1000, "publishes": 1000, "generations": 1}


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
    return built("hyperv_stress", tmp_path_factory.mktemp("hyperv_stress"))


@pytest.mark.row("K-08", "H-50", "H-51", "H-54", "E4", "E9", "E11")
@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("reader", ["linux", "windows", "unfenced", "preempted"])
def test_reference_time_never_goes_back(stress: Stress, reader: str, readers: int) -> None:
    """Page, counter and pvclock's page are one clock: nothing is torn or goes back, whichever is read after which."""
    for report in race(stress, RACED_LEAST, reader=reader, readers=readers):
        assert {name: report[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
        assert (report["least_step_units"], report["most_step_units"]) == (0, 1)
        assert report["most_off_units"] <= UNITS_OFF_MAX


@pytest.mark.row("K-08", "H-54", "E9")
@needs_two_cpus
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: f"{defect.kind}-{defect.fault}")
def test_a_broken_kind_is_noticed(stress: Stress, defect: Defect) -> None:
    """Each rule of the kind, left out alone, is noticed in some short races."""
    options = {"kind": defect.kind, "reader": defect.reader, "readers": 1, "seconds": 0.3}
    assert any(stress(**options)[defect.fault] for _ in runs())


@pytest.mark.row("E4", "E11", "E9")
def test_fractions_that_add_up_are_noticed(stress: Stress) -> None:
    """A break point that does not wait for the timeline lets the page walk away."""
    assert any(stress(kind="no_extra_unit", readers=1)["most_off_units"] > UNITS_OFF_MAX for _ in runs())
