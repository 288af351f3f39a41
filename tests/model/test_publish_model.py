"""The two-phase publish, model-checked: SPIN tries every order in which its stores, loads and rdtsc can happen.

The model is publish.pml, beside this file.  The design must keep its promises in all orders, and with one rule left out
there must be an order that breaks one.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.skipif(shutil.which("spin") is None, reason="no spin: apt-get install spin")

MODEL = Path(__file__).with_name("publish.pml")

# What each rule is there to prevent.
DEFECTS = {
    "NO_ODD": {"torn", "late_old", "backward"},
    "NO_DRAIN": {"late_old", "backward"},
    "NO_MARGIN": {"late_old", "backward"},
    "EARLY=3": {"late_old", "backward"},
    "NO_WAIT": {"early_new", "backward"},
    # Each page is right by itself: only who compares the readings of two vCPUs notices.
    "PAGE_BY_PAGE": {"backward"},
    # Of Hyper-V's page beside the first; in the last, beside its counter.
    "TWO_KINDS NO_DRAIN": {"late_old", "backward"},
    "TWO_KINDS BUSY_AFTER_A": {"late_old", "backward"},
    "TWO_KINDS RELEASED_BEFORE_B": {"early_new", "backward"},
    "TWO_KINDS NO_ZERO": {"torn", "late_old", "backward"},
    "TWO_KINDS SAME_SEQUENCE": {"torn", "late_old", "early_new", "backward"},
    "TWO_KINDS READ_BACK": {"torn", "late_old", "early_new", "backward"},
    "TWO_KINDS COUNTER_LATE": {"late_old", "backward"},
}

# Every order is tried, also of steps that SPIN finds to be independent; it would save nothing here.
COMPILE = ("cc", "-O1", "-w", "-DSAFETY", "-DNOREDUCE", "-DMEMLIM=1000", "pan.c", "-o", "pan")

# -c0: find all faults, not the first. -E: that all wait when the last tick is over is no deadlock.
SEARCH = ("./pan", "-c0", "-E", "-m10000")

# What pan says of a search that left something out.
INCOMPLETE = ("max search depth too small", "Search not completed", "MEMLIM", "out of memory", "Bit statespace")

FAULT = re.compile(r"assertion violated +!\((\w+)\)")
STATES = re.compile(r"^ *(\d+) states, stored", re.MULTILINE)
ERRORS = re.compile(r"errors: (\d+)")
UNREACHED = re.compile(r"\.pml:(\d+), state \d+, \"(?!-end-)")


class Search(NamedTuple):
    """What a search of all states found."""

    faults: set[str]
    states: int
    unreached_lines: set[int]


def search(folder: Path, *options: str) -> Search:
    """Return what SPIN finds in the model with these options, having looked everywhere."""
    subprocess.run(["spin", "-a", *(f"-D{option}" for option in options), MODEL], cwd=folder, check=True)
    subprocess.run(COMPILE, cwd=folder, check=True)
    done = subprocess.run(SEARCH, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    report = done.stdout
    assert not [words for words in INCOMPLETE if words in report]
    errors, states = ERRORS.search(report), STATES.search(report)
    assert errors, report
    assert states, report
    faults = set(FAULT.findall(report))
    assert bool(faults) == (errors[1] != "0"), report
    return Search(faults, int(states[1]), {int(line) for line in UNREACHED.findall(report)})


@pytest.mark.row("E9", "K-08")
@pytest.mark.parametrize(
    "options",
    [(), ("TWO_KINDS",), ("PUBLISHES=1", "TICKS=4", "READS_AT_ONCE=2")],
    ids=["two publishes", "two kinds of page", "overlapping reads"],
)
def test_the_design_holds(tmp_path: Path, options: tuple[str, ...]) -> None:
    """In no order is a reading torn, on the wrong side of a break point, or less than one that had returned before."""
    found = search(tmp_path, *options)
    assert not found.faults
    assert not found.unreached_lines
    assert found.states > 1_000_000


@pytest.mark.row("E9", "K-08")
def test_the_search_reaches_the_last_line(tmp_path: Path) -> None:
    """The design does not hold for want of readings: those of the last line are among them."""
    assert search(tmp_path, "WITNESS", "TICKS=5").faults == {"last_line"}


@pytest.mark.row("E9", "K-08")
@pytest.mark.parametrize("defect", DEFECTS)
def test_every_rule_is_needed(tmp_path: Path, defect: str) -> None:
    """With one rule left out, a single publish has counterexamples, of the kinds that the rule is there to prevent."""
    found = search(tmp_path, "PUBLISHES=1", "TICKS=4", *defect.split())
    assert found.faults == DEFECTS[defect]
    assert found.states > 10_000
