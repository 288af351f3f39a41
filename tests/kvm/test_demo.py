"""The demonstration on real vCPUs, as a newcomer runs it."""

from __future__ import annotations

import json

import pytest

from pvclock.commands import main
from qemu_glue import crosscheck

pytestmark = pytest.mark.kvm


@pytest.mark.stress
@pytest.mark.row("E13", "K-08")
def test_demo_shows_engine_and_kernel_agreeing(capsys: pytest.CaptureFixture[str]) -> None:
    """`pvclock demo` ends well here: no wrong reading, and every row agrees, with QEMU where there is one."""
    assert main(["demo", "--seconds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    result = report["result"]
    assert result["kvm_guests"]
    assert result["stress"]["publishes"] > 0
    assert len(result["comparison"]) == (22 if crosscheck.obstacle() is None else 9)
    assert all(row["ok"] for row in result["comparison"])


@pytest.mark.row("E13")
def test_demo_without_qemu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no QEMU the demonstration says how to get it, and lays engine and kernel side by side."""
    monkeypatch.setattr(crosscheck, "obstacle", lambda: "no QEMU: apt-get install it")
    assert main(["demo", "--seconds", "0.2", "--vcpus", "1"]) == 0
    shown = capsys.readouterr().out
    assert "no QEMU: apt-get install it" in shown
    assert "backward, wild or torn" in shown
