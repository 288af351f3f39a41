"""From a pause of a real QEMU's guest to what `pvclock report` makes of the watch beside it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from pvclock.meter.report.model import Plot, Standing
from pvclock.meter.report.sources import read
from tests.qemu.running_qemu import running_qemu
from tests.qemu.watch_process import watching

pytestmark = [pytest.mark.row("E10"), pytest.mark.kvm, pytest.mark.qemu]

FAR_LESS = 20


def test_a_pause_from_the_guest_to_the_report(tmp_path: Path) -> None:
    """It is a span from STOP to RESUME, and a step that is upright at its time; without it the clock just went on."""
    with running_qemu(tmp_path) as running, watching("--qmp", str(running.qmp)) as watch:
        lines = [watch.found, *watch.lines_until("reading")]
        running.qemu.pause()
        # From one reading to the next, which is a second: long beside what a busy host adds.
        lines += [*watch.lines_until("event"), *watch.lines_until("reading", 2)]
        running.qemu.resume()
        lines += [*watch.lines_until("step", 2), *watch.lines_until("reading")]
        watch.interrupt()
        more, result, _ = watch.end()
    end = {"schema": "pvclock.watch/1", "version": "0", "ok": True, "result": result}
    file = tmp_path / "watch.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, *more, end]), encoding="utf-8")
    (section,) = read([str(file)], lambda _bytes, _name: None).sections
    assert section.standing is Standing.PLAIN

    stop, resume = (line["at_s"] for line in lines if line["kind"] == "event")
    step = next(line for line in lines if (line["kind"], line.get("vcpu")) == ("step", 0))
    against, stepless = (part for part in section.parts if isinstance(part, Plot) and part.title.startswith("Clock"))
    marks = {mark.kind: mark for mark in against.marks}
    assert (marks["pause"].x, marks["pause"].until) == (stop, resume)
    assert marks["step"].standing is Standing.PLAIN
    assert "STOP, RESUME" in marks["step"].text
    points = pairwise(zip(against.lines[0].x, against.lines[0].y, strict=True))
    (stepped_ns,) = (after[1] - before[1] for before, after in points if before[0] == after[0] == step["at_s"])
    assert stepped_ns == pytest.approx(step["step_ns"])
    assert max(map(abs, stepless.lines[0].y)) * FAR_LESS < abs(stepped_ns)
