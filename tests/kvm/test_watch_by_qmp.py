"""`pvclock watch --qmp` on a machine of ours: what it says of a QEMU's guest it says of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from pvclock import __version__
from tests.kvm.watched_machine import watched_machine
from tests.qemu.watch_process import watching

pytestmark = [pytest.mark.kvm, pytest.mark.row("E3", "E15")]

STEP_MAX_NS = 1000
"""Far below the jump: a page that was not refreshed for a while adds a ns or more to the next one's step."""


def test_a_clock_that_is_left_alone_keeps_its_budgets(tmp_path: Path) -> None:
    """It is known for what it is, and neither steps nor drifts."""
    path = tmp_path / "qmp.sock"
    budgets = ("--max-step", "1us", "--max-drift", "100ppm", "--tsc-unchanged")
    with watched_machine(qmp=path), watching("--qmp", str(path), "--seconds", "1", *budgets) as watch:
        assert watch.found["vm"].startswith(f"pvclock {__version__}, process ")
        _, result, status = watch.end()
    assert status == 0, result


def test_a_jump_and_a_pause_are_found(tmp_path: Path) -> None:
    """A skip is a step of that size of each vCPU's clock, a stop is told by its event, and the budget is broken."""
    path = tmp_path / "qmp.sock"
    budget = ("--max-step", f"{STEP_MAX_NS}ns", "--tsc-unchanged")
    with watched_machine(qmp=path) as machine, watching("--qmp", str(path), *budget) as watch:
        jump_ns = machine.ask("skip")
        jumps_ns: dict[int, int] = {}
        while jumps_ns.keys() != {0, 1}:
            step = watch.lines_until("step")[-1]
            if step["step_ns"] > jump_ns // 2:  # else it is a new line's, of some ns
                jumps_ns[step["vcpu"]] = step["step_ns"]
        assert all(abs(step_ns - jump_ns) <= STEP_MAX_NS for step_ns in jumps_ns.values())
        machine.ask("pause")
        assert watch.lines_until("event")[-1]["what"] == "stop"
        machine.ask("resume")
        watch.interrupt()
        _, result, status = watch.end()
    assert status == 1, result
