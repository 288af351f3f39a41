"""The demonstration on real vCPUs, as a newcomer runs it."""

from __future__ import annotations

import json

import pytest

from pvclock import GuestClock
from pvclock.commands import main
from pvclock.meter.reference_time import compare_reference_time, observe_engine
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
    stress = result["stress"]
    assert stress["publishes"] > 0 < stress["reads"]
    assert [stress[kind] for kind in ("backward_own", "backward_cross", "wild", "torn")] == [0] * 4
    assert (stress["least_step_ns"], stress["most_step_ns"]) == (0, 1)
    assert len(result["comparison"]) == (22 if crosscheck.obstacle() is None else 9)
    assert all(row["ok"] for row in result["comparison"])
    same = [row for row in result["comparison"] if row["name"] in ("tsc_to_system_mul", "tsc_shift", "flags")]
    assert [row["engine"] for row in same] == [row["kernel"] for row in same]
    assert len(same) == 3
    assert len(result["reference_time"]) == 7
    assert all(row["ok"] for row in result["reference_time"])


@pytest.mark.row("E13")
def test_demo_without_qemu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no QEMU the demonstration says how to get it, and lays engine and kernel side by side."""
    monkeypatch.setattr(crosscheck, "obstacle", lambda: "no QEMU: apt-get install it")
    assert main(["demo", "--seconds", "0.2", "--vcpus", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    (qemu,) = [finding for finding in result["host"] if finding["name"] == "QEMU"]
    assert not qemu["ok"]
    assert "no QEMU: apt-get install it" in qemu["advice"]
    assert all(row.keys() == {"name", "engine", "kernel", "ok"} and row["ok"] for row in result["comparison"])
    assert len(result["comparison"]) == 9


@pytest.mark.row("E4", "H-50", "H-51")
@pytest.mark.parametrize("vcpus", [1, 2])
def test_reference_time_is_guest_time(vcpus: int) -> None:
    """A guest with both clocks reads a valid page on every vCPU, and by it the VM's guest time, within 2 units."""
    observed = observe_engine(vcpus, 0.2)
    assert [check.name for check in compare_reference_time([observed]) if not check.ok] == []
    assert len(observed.records) == vcpus
    assert observed.ahead_ns is not None
    assert abs(observed.ahead_ns) <= 200
    assert {record.max_leaf for record in observed.records} == {0x4000000A}


@pytest.mark.row("E4", "E9")
def test_a_page_of_another_time_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timeline that is 300 ns from what the page shows is found out."""
    monkeypatch.setattr(GuestClock, "at", lambda clock, tsc: clock._keeper.at(tsc) + 300)
    (check,) = [each for each in compare_reference_time([observe_engine(1, 0.1)]) if not each.ok]
    assert check.name == "page against guest time"
