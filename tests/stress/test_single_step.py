"""Records of the guest, looked at after every instruction of the host that writes them: no race is left to luck.

The program is tests/native/single_step.c.  The product must pass it, and hosts with one defect each must not.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.waiting import HANG_S

pytestmark = pytest.mark.stress

ROOT = Path(__file__).parents[2]
COMPILE = ("cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'pvclock' / 'include'}")

Report = dict[str, int]
Stepped = Callable[..., Report]


@pytest.fixture(scope="session")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Stepped:
    """Return a function that runs the program on a record and returns its report."""
    program = tmp_path_factory.mktemp("single_step") / "single_step"
    subprocess.run([*COMPILE, str(ROOT / "tests" / "native" / "single_step.c"), "-o", str(program)], check=True)

    def run(record: str, *options: str) -> Report:
        done = subprocess.run([program, "--record", record, *options], check=True, capture_output=True, timeout=HANG_S)
        report: Report = json.loads(done.stdout)
        return report

    return run


def faults(report: Report) -> Report:
    """Return what is wrong in a report of several instructions, of a host that did write."""
    assert report["looks"] > 3
    assert report["written"]
    return {name: report[name] for name in ("torn", "lost") if report[name]}


@pytest.mark.row("K-08")
@pytest.mark.parametrize("record", ["wall", "page"])
def test_an_even_version_is_a_promise(stepped: Stepped, record: str) -> None:
    """After no instruction does the wall clock or a time page have an even version and a part of its new content."""
    assert not faults(stepped(record))


@pytest.mark.row("V-20")
@pytest.mark.parametrize("record", ["own", "own_at_rest"])
def test_an_even_version_of_a_page_with_its_own_line_is_a_promise(stepped: Stepped, record: str) -> None:
    """After no instruction, be the VM running or at rest, is the version even and a part of the record not its own."""
    assert not faults(stepped(record))


@pytest.mark.row("K-29")
def test_an_even_version_of_steal_time_is_a_promise(stepped: Stepped) -> None:
    """After no instruction is the sum new and the version old, or the other way round."""
    assert not faults(stepped("steal"))


@pytest.mark.row("K-32")
def test_an_interrupt_ends_once_wherever_the_guest_comes_between(stepped: Stepped) -> None:
    """After whichever instruction of the host's take the guest takes the bit, one of the two has it, and not both."""
    assert not faults(stepped("eoi"))


@pytest.mark.row("K-30")
def test_a_flush_is_heard_wherever_the_guest_asks_for_it(stepped: Stepped) -> None:
    """After whichever instruction the guest asks, the host hears of it, or the guest knows that it was too late."""
    assert not faults(stepped("flush"))


@pytest.mark.row("K-08", "K-29", "K-30", "K-32", "V-20")
@pytest.mark.parametrize(
    ("record", "defect"),
    [
        ("wall", "even_early"),
        ("wall", "never_odd"),
        ("steal", "never_odd"),
        ("page", "never_odd"),
        ("own", "never_odd"),
        ("flush", "load_and_store"),
        ("eoi", "load_and_store"),
    ],
)
def test_each_defect_is_noticed(stepped: Stepped, record: str, defect: str) -> None:
    """The test has teeth: a version that is even too early, and a load and a store for an exchange, are seen."""
    assert faults(stepped(record, "--broken", defect))
