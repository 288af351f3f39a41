"""The gate, model-checked: SPIN tries every order in which vCPUs, holders, pause and resume can take their steps.

The model is gate.pml, beside this file.  In no order may a vCPU be in the guest that is kept out, or wait for ever; and
with one rule left out there must be an order in which it is or does.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.model.test_publish_model import ERRORS, INCOMPLETE, STATES

pytestmark = [
    pytest.mark.skipif(shutil.which("spin") is None, reason="no spin: apt-get install spin"),
    pytest.mark.row("E9"),
]

MODEL = Path(__file__).with_name("gate.pml")

COMPILE = ("cc", "-O2", "-w", "-DSAFETY", "-DMEMLIM=2000", "pan.c", "-o", "pan")
SEARCH = ("./pan", "-m100000")

# What pan says of a fault; in every report a line tells that it looks for "invalid end states".
FAULT = re.compile(r"^pan:\d+: (assertion violated|invalid end state) ", re.MULTILINE)

# What each rule is there to prevent, and how pan looks for the first of those alone.
IN_THE_GUEST, FOR_EVER = "assertion violated", "invalid end state"
FIRST = {IN_THE_GUEST: ("-c1", "-E"), FOR_EVER: ("-c1", "-A")}
DEFECTS = {
    "VCPU_LOOKS_FIRST": IN_THE_GUEST,
    "HOLDER_LOOKS_FIRST": IN_THE_GUEST,
    "LEAVES_IN_SILENCE": FOR_EVER,
    "OPENS_IN_SILENCE": FOR_EVER,
    "SEEN_TOO_LATE": FOR_EVER,
    "NO_KICK": FOR_EVER,
}


def search(folder: Path, how: tuple[str, ...], *defects: str) -> tuple[str, int]:
    """Return pan's report of the model with these defects, and how many states there were."""
    subprocess.run(["spin", "-a", *(f"-D{defect}" for defect in defects), MODEL], cwd=folder, check=True)
    subprocess.run(COMPILE, cwd=folder, check=True)
    done = subprocess.run([*SEARCH, *how], cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    states = STATES.search(done.stdout)
    assert states, done.stdout
    return done.stdout, int(states[1])


def test_the_gate_holds(tmp_path: Path) -> None:
    """In every order each vCPU that is kept out is out, and every wait ends, without a timeout."""
    report, states = search(tmp_path, ("-c0",))
    assert not [words for words in INCOMPLETE if words in report]
    errors = ERRORS.search(report)
    assert errors, report
    assert errors[1] == "0", report
    assert FAULT.findall(report) == []
    assert states > 100_000


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_rule_is_needed(tmp_path: Path, defect: str) -> None:
    """With one rule left out there is an order in which a vCPU is in that is kept out, or somebody waits for ever."""
    report, _ = search(tmp_path, FIRST[DEFECTS[defect]], defect)
    assert FAULT.findall(report) == [DEFECTS[defect]]
