"""The gate, model-checked: SPIN tries every order in which vCPUs, holders, pause and resume can take their steps.

The model is gate.pml, beside this file.  In no order may a vCPU be in the guest that is kept out, or wait for ever; and
with one rule left out there must be an order in which it is or does.
"""

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
SEARCH = ("./pan", "-c0", "-m100000")

# What each rule is there to prevent.
IN_THE_GUEST, FOR_EVER = "assertion violated", "invalid end state"
DEFECTS = {
    "VCPU_LOOKS_FIRST": IN_THE_GUEST,
    "HOLDER_LOOKS_FIRST": IN_THE_GUEST,
    "LEAVES_IN_SILENCE": FOR_EVER,
    "OPENS_IN_SILENCE": FOR_EVER,
    "SEEN_TOO_LATE": FOR_EVER,
    "NO_KICK": FOR_EVER,
}


def search(folder: Path, *options: str) -> tuple[str, int]:
    """Return the report of a search of all states, and how many states there were."""
    subprocess.run(["spin", "-a", *(f"-D{option}" for option in options), MODEL], cwd=folder, check=True)
    subprocess.run(COMPILE, cwd=folder, check=True)
    done = subprocess.run(
        ("./pan", "-c0", "-m100000"), cwd=folder, check=True, capture_output=True, text=True, timeout=300
    )
    states = STATES.search(done.stdout)
    assert states, done.stdout
    return done.stdout, int(states[1])


def test_the_gate_holds(tmp_path: Path) -> None:
    """In every order each vCPU that is kept out is out, and every wait ends, without a timeout."""
    report, states = search(tmp_path)
    assert not [words for words in INCOMPLETE if words in report]
    errors = ERRORS.search(report)
    assert errors, report
    assert errors[1] == "0", report
    assert states > 100_000


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_rule_is_needed(tmp_path: Path, defect: str) -> None:
    """With one rule left out there is an order in which a vCPU is in that is kept out, or somebody waits for ever."""
    report, _ = search(tmp_path, defect)
    assert DEFECTS[defect] in report
