"""`pvclock drift` of the engine's clock and the kernel's, on real vCPUs."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from pvclock import Reference
from pvclock.commands import main
from pvclock.meter.drift.clocks import engine_clock, take_readings
from pvclock.meter.drift.host_reference import HostReference

pytestmark = pytest.mark.kvm


@pytest.mark.row("E3", "E10", "E11")
def test_the_drift_of_both_clocks(capsys: pytest.CaptureFixture[str]) -> None:
    """Both against the host's clock: the engine's steps by 0 or +1 ns, and every way to a new anchor is tried."""
    arguments = ["--seconds", "1.5", "--interval", "0.05", "--settle", "0.5"]
    assert main(["drift", *arguments, "--json"]) == 0
    begin, *readings, report = map(json.loads, capsys.readouterr().out.splitlines())
    assert [each["clock"] for each in begin["clocks"]] == ["engine", "kernel"]
    engine, kernel = report["result"]["clocks"]
    assert readings
    assert len(kernel["reanchors_ns"]) == 4
    assert len(engine["reanchors_ns"]) == 3
    assert max(abs(step_ns) for step_ns in engine["reanchors_ns"].values()) <= 5
    engines = [reading["readings"][0] for reading in readings]
    assert all(-each["step_bound_ns"] <= each["step_ns"] <= 1 + each["step_bound_ns"] for each in engines)
    assert engine["most_step_ns"] in {None, *(each["step_ns"] for each in engines)}  # of those after it had settled


@pytest.mark.row("E10")
def test_a_step_of_the_engines_clock() -> None:
    """One that is put forward by 5 us between two readings is found out, in its step and in what it is ahead."""
    with ExitStack() as resources:
        clock = engine_clock(HostReference(Reference.RAW), 0.0, resources)._replace(correct=None)
        guest = clock.readings.guest
        list(take_readings([clock], seconds=0.0, interval_s=1.0, wait=lambda _seconds: True))
        guest.engine_clock.skip(5000)  # type: ignore[attr-defined]  # it is an EngineGuest
        list(take_readings([clock], seconds=0.0, interval_s=1.0, wait=lambda _seconds: True))
        first, last = clock.readings.points
        assert (abs(first.step_ns) <= 2, 4998 <= last.step_ns <= 5002) == (True, True)
        drifted_ns = 1e-3 * (last.s - first.s) * 1e9
        assert abs(last.ahead_ns - 5000) <= first.bound_ns + last.bound_ns + drifted_ns
