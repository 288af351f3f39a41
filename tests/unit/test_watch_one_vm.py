"""`pvclock watch` of one VM that is made by hand: what its lines of JSON have in common."""

from __future__ import annotations

import argparse
import json
from itertools import count
from types import SimpleNamespace

import pytest

from pvclock.commands import main
from qemu_glue import QmpFailed
from qemu_glue.watch.command import _only_target, add_arguments
from qemu_glue.watch.instants import Instants
from qemu_glue.watch.interrupts import Interrupts
from tests.unit.test_watch_loop import ARRAY, HandMadeVm

pytestmark = pytest.mark.row("E3")

LOOKS = 3


@pytest.fixture
def vm(monkeypatch: pytest.MonkeyPatch) -> HandMadeVm:
    """The VM that the command finds, whatever it is asked for; it gives no answer from some look on."""
    made = HandMadeVm()
    made.put(ARRAY)
    looks = iter(range(LOOKS))

    def wait(_interrupts: Interrupts, _seconds: float) -> bool:
        if next(looks, None) is None:
            made.fault = QmpFailed("query-status", "no answer")
        return False

    monkeypatch.setattr(Interrupts, "wait", wait)
    monkeypatch.setattr("pvclock.meter.watch.loop.END_LIMIT_S", 0.01)
    monkeypatch.setattr("qemu_glue.watch.beginning.open_vm", lambda **_target: made)
    return made


def test_each_line_has_its_instant(vm: HandMadeVm, capsys: pytest.CaptureFixture[str]) -> None:
    """From where the metrics are to the summary before an error; what is read later does not come before."""
    assert main(["watch", "--qmp", "web.qmp", "--json", "--prometheus", "0"]) == 2
    *lines, report = map(json.loads, capsys.readouterr().out.splitlines())
    assert report["error"]["message"] == "QMP query-status: no answer"
    metrics, found, *others, summary = lines
    assert [metrics["kind"], found["kind"], summary["kind"]] == ["metrics", "found", "summary"]
    assert all(line["at_s"] >= 0 and line["utc"].endswith("Z") for line in lines)
    assert "reading" in {line["kind"] for line in others}
    assert found["utc"] <= min(line["utc"] for line in (*others, summary))
    assert found["vm"] == found["description"] == vm.name


class StallingClocks:
    """Stands for `time`: each reading of either clock comes a second after the one before."""

    def __init__(self) -> None:
        self._read = count()

    def monotonic(self) -> float:
        """In s."""
        return float(next(self._read))

    def time_ns(self) -> int:
        """The same clock in ns."""
        return next(self._read) * 10**9


def test_no_instant_is_before_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the process stalls between its readings of the two clocks."""
    clocks = StallingClocks()
    monkeypatch.setattr("qemu_glue.watch.instants.time", clocks)
    instants = Instants(10**9)
    for _ in range(3):
        now_ns = clocks.time_ns()
        assert instants.since_begin_s(now_ns) >= now_ns / 1e9


@pytest.mark.parametrize(
    ("words", "label"),
    [
        (["--pid"], "pid-4711"),
        (["--pid", "4712"], "pid-4712"),
        (["--qmp", "/run/web.qmp"], "web"),
        (["--libvirt", "web\n"], r"web\n"),
    ],
)
def test_what_metrics_call_it(words: list[str], label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/prometheus.md says; the only VM here by its process."""
    monkeypatch.setattr("qemu_glue.watch.beginning.running_vms", lambda: [SimpleNamespace(pid=4711)])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    target = _only_target(parser.parse_args(words))
    assert target is not None
    assert target.label == label
