"""Steal time, flush requests and EOIs under fire: a guest uses the record that a host feeds at the same time.

The program is tests/native/record_stress.c.  The product must lose nothing, and hosts with one defect each must.
"""

import pytest

from tests.stress.racing import Stress, built, runs

pytestmark = pytest.mark.stress


@pytest.fixture(scope="session")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Stress:
    """Return a function that runs the program and returns its report."""
    return built("record_stress", tmp_path_factory.mktemp("record_stress"))


@pytest.mark.row("K-29")
def test_no_steal_time_is_torn(stress: Stress) -> None:
    """A reading that its version calls consistent is a sum that the host wrote, and never less than the one before."""
    reads = turns = 0
    for _ in runs():
        report = stress(record="steal")
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
    for _ in runs():
        report = stress(record=record)
        assert report["taken"] == report["given"]
        given += report["given"]
        if given > 100:
            return
    pytest.fail(f"only {given} times did the guest come between: nothing was raced")


@pytest.mark.row("K-29", "K-30", "K-32")
@pytest.mark.parametrize("record", ["steal", "flush", "eoi"])
def test_a_broken_host_is_noticed(stress: Stress, record: str) -> None:
    """Without odd versions readings are torn; with a load and a store in place of an exchange, requests are lost."""
    for _ in runs():
        report = stress("--broken", record=record)
        if report["torn"] or report["taken"] != report["given"]:
            return
    pytest.fail(f"{record}: the defect went unnoticed: {report}")
