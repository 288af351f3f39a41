"""`pvclock drift` of a real QEMU's guest that runs already, of which it knows nothing."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvclock.commands import main
from pvclock.meter.drift.clocks import DriftingClock, take_readings
from pvclock.meter.drift.host_reference import HostReference
from pvclock.meter.watch.outside_clock import OutsideClock
from pvclock.payloads import probe
from pvclock.readings import Reference
from qemu_glue.watch.target import open_vm
from tests.command_line import ROOT, command
from tests.qemu.running_qemu import RunningQemu, running_qemu
from tests.waiting import HANG_S

pytestmark = [pytest.mark.row("E10"), pytest.mark.kvm, pytest.mark.qemu]

STEP_NS = 5_000_000
PAGE = probe.time_page_address(0)
SYSTEM_TIME = 16
"""Where it is in a page."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningQemu]:
    """A QEMU whose vCPUs read their clock."""
    with running_qemu(tmp_path_factory.mktemp("qemu")) as made:
        yield made


def step_page(running: RunningQemu) -> None:
    """Put the guest's clock forward by STEP_NS, as whoever may write its memory can: the page is odd meanwhile."""
    memory = running.qemu.memory
    (version,) = struct.unpack("<I", memory.read(PAGE, 4))
    (system_time,) = struct.unpack("<Q", memory.read(PAGE + SYSTEM_TIME, 8))
    memory.write(PAGE, struct.pack("<I", version + 1))
    memory.write(PAGE + SYSTEM_TIME, struct.pack("<Q", system_time + STEP_NS))
    memory.write(PAGE, struct.pack("<I", version + 2))


def test_a_step_of_a_running_guest(running: RunningQemu) -> None:
    """Is in its step and in what it is ahead, by as much as it was; before that there is none."""
    with open_vm(qmp=str(running.qmp)) as vm:
        guest = OutsideClock(vm, lambda _done, _total: None)
        clock = DriftingClock("qemu", HostReference(Reference.RAW).readings(vm.name, guest, 0.0), guest.check_running)
        rounds = iter(range(4))

        def wait(_seconds: float) -> bool:
            place = next(rounds)
            if place == 1:
                step_page(running)
            return place == 3

        list(take_readings([clock], seconds=HANG_S, interval_s=0.0, wait=wait))
    assert clock.readings.steps_ns == [0, 0, STEP_NS, 0]
    for point, stepped_ns in zip(clock.readings.points, [0, 0, STEP_NS, STEP_NS], strict=True):
        slack_ns = point.bound_ns + clock.readings.points[0].bound_ns + 1e6 * point.s
        assert abs(point.ahead_ns - stepped_ns) <= slack_ns
    assert guest.found.pages[0] == PAGE


def test_the_command_beside_a_running_guest(running: RunningQemu) -> None:
    """It ends with the report, and the guest has not noticed: its pages are as they were, and it reads on."""
    before = running.pages()
    arguments = ("drift", "qemu", "--pid", str(running.qemu.pid), "--seconds", "1", "--interval", "0.05", "--json")
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=True)
    begin, *readings, report = map(json.loads, done.stdout.splitlines())
    assert (begin["settle_s"], [each["clock"] for each in begin["clocks"]]) == (0.0, ["qemu"])
    assert str(running.qemu.pid) in begin["clocks"][0]["name"]
    assert len(readings) >= 2
    (clock,) = report["result"]["clocks"]
    assert abs(clock["rate_ppb"]) < 1e6
    assert (clock["least_step_ns"], clock["most_step_ns"], clock["reanchors_ns"]) == (0, 0, {})
    assert running.pages() == before
    running.qemu.check_running()


def test_a_stopped_guest(running: RunningQemu, capsys: pytest.CaptureFixture[str]) -> None:
    """Is told as stopped before its clock is read and after, and has no drift."""
    running.qemu.pause()
    assert main(["drift", "qemu", "--qmp", str(running.qmp), "--seconds", "1", "--interval", "0.05"]) == 0
    running.qemu.resume()
    shown = capsys.readouterr().out
    assert "The guest is stopped" in shown
    assert "the guest was stopped all the while" in shown
    assert "ppb" not in shown


def test_a_guest_that_ends(tmp_path: Path) -> None:
    """Ends the measurement with an error that says so, after what was found."""
    with running_qemu(tmp_path, vcpus=1) as running:
        arguments = ("drift", "qemu", "--pid", str(running.qemu.pid), "--json", "--interval", "0.05")
        with subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["kind"] == "begin"
            running.qemu.close()
            *_, last = map(json.loads, process.stdout)
            assert process.wait(HANG_S) == 2
    assert last["error"]["kind"] == "VmEnded"
