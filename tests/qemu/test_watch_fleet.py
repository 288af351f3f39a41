"""`pvclock watch` of a fleet of real QEMUs, as a user runs it: one ends, another appears."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.fleet_of_qemus import FleetOfQemus
from tests.qemu.watch_process import WatchProcess, watching
from tests.watch_document import documented_keys, keys_of

pytestmark = [pytest.mark.row("E10"), pytest.mark.kvm, pytest.mark.qemu]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FleetOfQemus]:
    """QEMUs to be added."""
    with ExitStack() as resources:
        yield FleetOfQemus(tmp_path, resources)


def until(watch: WatchProcess, kind: str, vm: str) -> list[Any]:
    """The lines up to one of this kind and VM."""
    return watch.lines_until_one(lambda line: (line["kind"], line["vm"]) == (kind, vm))


def test_one_ends_and_a_third_appears(fleet: FleetOfQemus) -> None:
    """A pause is told of its VM alone; the VM's end ends no other; one that comes later is watched; Ctrl-C ends all."""
    end = {name: fleet.add(name) for name in ("db", "web")}
    with watching("--qmp", fleet.pattern, "--max-step", "1ns", "--allow-pauses") as watch:
        lines = [watch.found]
        lines += until(watch, "found", {"db": "web", "web": "db"}[watch.found["vm"]])
        fleet.qemus["web"].qemu.pause()
        fleet.qemus["web"].qemu.resume()
        lines += until(watch, "step", "web")
        end["db"]()
        lines += until(watch, "ended", "db")
        fleet.add("new")
        lines += until(watch, "found", "new")
        watch.interrupt()
        more, result, status = watch.end()
    lines += more
    # The third may be found 100 ms before KVM writes its pages once more, which is no length of a step.
    assert {line["vm"] for line in lines if line["kind"] == "step" and line["step_ns"] != 0} == {"web"}
    pauses = [line for line in lines if line.get("what") in {"stop", "resume"}]
    assert [line["vm"] for line in pauses] == ["web", "web"]
    documented = documented_keys()
    for line in lines:
        assert set(keys_of(line)) <= documented[line["kind"]] | {"schema", "kind", "at_s", "utc", "vm"}
    rows = {each["vm"]: each for each in result["vms"]}
    assert rows.keys() == {"db", "web", "new"}
    assert [bool(rows[vm]["why_ended"]) for vm in ("db", "web", "new")] == [True, False, False]
    assert rows["web"]["summary"]["steps"] >= 2
    assert (rows["new"]["summary"]["forward"], rows["new"]["summary"]["backward"]) == (None, None)
    assert {each["budgets"]["verdict"] for each in rows.values()} == {"undecided"}  # no step below 2 ns can be seen
    assert status == 2
