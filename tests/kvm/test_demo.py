"""The demonstration on real vCPUs, as a newcomer runs it."""

from __future__ import annotations

import json

import pytest

from pvclock.commands import main

pytestmark = pytest.mark.kvm


@pytest.mark.stress
@pytest.mark.row("E13", "K-08", "K-14")
def test_demo_shows_engine_and_kernel_agreeing(capsys: pytest.CaptureFixture[str]) -> None:
    """`pvclock demo` ends well here: no wrong reading, and every row of the comparison agrees."""
    assert main(["demo", "--seconds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["kvm"] == "used"
    assert report["storm"]["publishes"] > 10_000
    assert len(report["comparison"]) == 9
    assert all(row["agree"] for row in report["comparison"])
