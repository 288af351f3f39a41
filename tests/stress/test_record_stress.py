"""Steal time, flush requests and EOIs under fire: a guest uses the record that a host feeds at the same time.

The program is tests/native/record_stress.c.  The product must lose nothing, and hosts with one defect each must.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.stress

ROOT = Path(__file__).parents[2]
COMPILE = ("cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'pvclock' / 'include'}")

# One run is enough unless other programs keep the CPUs from running both threads at once; so many end a hopeless test.
RUNS_MAX = 60

Report = dict[str, int]
Stress = Callable[..., Report]


@pytest.fixture(scope="session")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Stress:
    """Return a function that runs the program and returns its report."""
    program = tmp_path_factory.mktemp("record_stress") / "record_stress"
    subprocess.run([*COMPILE, str(ROOT / "tests" / "native" / "record_stress.c"), "-o", str(program)], check=True)

    def run(record: str, *options: str) -> Report:
        done = subprocess.run([program, "--record", record, *options], check=True, capture_output=True, timeout=60)
        report: Report = json.loads(done.stdout)
        return report

    return run


@pytest.mark.row("K-29")
def test_no_steal_time_is_torn(stress: Stress) -> None:
    """A reading that its version calls consistent is a sum that the host wrote, and never less than the one before."""
    reads = turns = 0
    for _ in range(RUNS_MAX):
        report = stress("steal")
        assert (report["torn"], report["backward"]) == (0, 0)
        reads, turns = reads + report["reads"], turns + report["turns"]
        if min(reads, turns) > 1000:
            return
    pytest.fail(f"only {reads} readings of {turns} sums: nothing was raced")


@pytest.mark.row("K-30", "K-32")
@pytest.mark.parametrize("record", ["flush", "eoi"])
def test_nothing_said_is_lost(stress: Stress, record: str) -> None:
    """Each flush that the guest asked for, and each interrupt that it ended without an exit, is taken once."""
    given = 0
    for _ in range(RUNS_MAX):
        report = stress(record)
        assert report["taken"] == report["given"]
        given += report["given"]
        if given > 100:
            return
    pytest.fail(f"only {given} times did the guest come between: nothing was raced")


@pytest.mark.row("K-29", "K-30", "K-32")
@pytest.mark.parametrize("record", ["steal", "flush", "eoi"])
def test_a_broken_host_is_noticed(stress: Stress, record: str) -> None:
    """Without odd versions readings are torn; with a load and a store in place of an exchange, requests are lost."""
    for _ in range(RUNS_MAX):
        report = stress(record, "--broken")
        if report["torn"] or report["taken"] != report["given"]:
            return
    pytest.fail(f"{record}: the defect went unnoticed: {report}")
