"""A machine of ours by QMP: run states, resets, memory and time, as a client sees them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pvclock.machine import Machine, RunState
from pvclock.meter.machine_guest import wait_until_reading
from pvclock.payloads import probe
from pvclock.testing.machines import made
from qemu_glue.errors import QmpFailed
from qemu_glue.face.served import serve
from qemu_glue.peer.monitor import Monitor
from tests.waiting import HANG_S, alarm_after

pytestmark = [pytest.mark.kvm, pytest.mark.row("E15")]


class Served(NamedTuple):
    """A machine, a client's session with its server, and what it asked to quit."""

    machine: Machine
    monitor: Monitor
    quits: list[None]

    def ask(self, command: str, **arguments: object) -> Any:  # noqa: ANN401  # JSON
        """The answer; `_` in a name is `-`."""
        return self.monitor.execute(command, {name.replace("_", "-"): each for name, each in arguments.items()})

    def events(self, last: str) -> list[str]:
        """The names of events up to `last`."""
        names: list[str] = []
        with alarm_after(HANG_S):
            while last not in names:
                names += [event.name for event in self.monitor.take_events()]
                time.sleep(0.001)
        return names


def a_client(path: Path) -> Monitor:
    """A session with the server at `path`, however long that takes."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return Monitor(connection)


def served(tmp_path: Path, **options: Any) -> Iterator[Served]:  # noqa: ANN401  # Machine's
    """A machine whose guest reads its clock, and a client."""
    quits: list[None] = []
    path = tmp_path / "qmp.sock"
    with (
        made(None, vcpus=2, **options) as machine,
        serve(machine, path, lambda: quits.append(None)),
        a_client(path) as monitor,
    ):
        yield Served(machine, monitor, quits)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Served]:
    """Return one with the engine's clock."""
    yield from served(tmp_path)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Served]:
    """Return one with the kernel's clock."""
    yield from served(tmp_path, clock="kernel")


def test_stop_and_cont(engine: Served) -> None:
    """States by QEMU's names, events before the answers; each twice is once."""
    assert engine.ask("query-status") == {"status": "running", "singlestep": False, "running": True}
    for _ in range(2):
        assert engine.ask("stop") == {}
    assert engine.ask("query-status")["status"] == "paused"
    assert engine.machine.run_state.current is RunState.PAUSED
    for _ in range(2):
        assert engine.ask("cont") == {}
    assert [name for name in engine.events("RESUME") if not name.startswith("X_")] == ["STOP", "RESUME"]
    assert engine.ask("query-status")["running"]


def test_a_reset_boots_anew(engine: Served) -> None:
    """The guest reads its clock again, and the client is told."""
    assert engine.ask("system_reset") == {}
    wait_until_reading(engine.machine)
    assert "RESET" in engine.events("RESET")


def test_a_machine_that_was_not_started_is_started_by_cont(tmp_path: Path) -> None:
    """And one whose guest has ended has to be reset first."""
    path = tmp_path / "qmp.sock"
    image = bytes.fromhex("b000 e6f4 f4")  # mov $0, %al; out %al, $0xf4; hlt
    with Machine(image) as machine, serve(machine, path, list), a_client(path) as monitor:
        assert monitor.execute("query-status")["status"] == "prelaunch"
        monitor.execute("cont")
        machine.wait(HANG_S)
        assert monitor.execute("query-status")["status"] == "shutdown"
        with pytest.raises(QmpFailed, match="Resetting the Virtual Machine is required"):
            monitor.execute("cont")
        monitor.execute("system_reset")
        assert monitor.execute("query-status")["status"] == "prelaunch"
        names = [event.name for event in monitor.take_events()]
        assert [name for name in names if not name.startswith("X_")] == ["RESUME", "SHUTDOWN", "RESET"]


def test_quit_is_answered_and_told(engine: Served) -> None:
    """The VMM is asked to end, after the event and before the answer has come."""
    assert engine.ask("quit") == {}
    assert engine.quits == [None]
    assert "SHUTDOWN" in engine.events("SHUTDOWN")


def test_what_it_is(engine: Served) -> None:
    """vCPUs with their threads, KVM, a version, and each command by name."""
    assert [vcpu["cpu-index"] for vcpu in engine.ask("query-cpus-fast")] == [0, 1]
    threads = [thread.native_id for thread in engine.machine.runner.threads]
    assert [vcpu["thread-id"] for vcpu in engine.ask("query-cpus-fast")] == threads
    assert engine.ask("query-kvm") == {"enabled": True, "present": True}
    assert engine.ask("query-version")["package"].startswith("pvclock ")
    names = {command["name"] for command in engine.ask("query-commands")}
    assert {"stop", "x-pvclock-query", "query-commands", "qmp_capabilities"} <= names


def test_memory_is_saved(engine: Served, tmp_path: Path) -> None:
    """As it is there; what is no RAM, or a file that cannot be, is refused."""
    file = tmp_path / "memory"
    engine.ask("stop")
    gpa = probe.time_page_address(0)
    engine.ask("pmemsave", val=gpa, size=32, filename=str(file))
    assert file.read_bytes() == engine.machine.memory.read(gpa, 32)
    engine.ask("pmemsave", val=0, size=16 << 20, filename=str(file))
    assert file.stat().st_size == 16 << 20
    for val, size in ((16 << 20, 1), (-1, 1), (0, -1), (0, 2**63 - 1)):
        with pytest.raises(QmpFailed, match="Invalid addr"):
            engine.ask("pmemsave", val=val, size=size, filename=str(file))
    with pytest.raises(QmpFailed, match="Could not open"):
        engine.ask("pmemsave", val=0, size=1, filename=str(tmp_path / "none" / "file"))


def test_time_is_changed_and_told(engine: Served) -> None:
    """Skip, rate, policy and reference do what GuestClock's methods do, and each is an event."""
    clock = engine.machine.clock
    assert clock is not None
    before = engine.ask("x-pvclock-query")
    engine.ask("x-pvclock-skip", ns=10**15)
    assert engine.ask("x-pvclock-query")["guest-ns"] >= before["guest-ns"] + 10**15
    engine.ask("x-pvclock-set-rate", numerator=1, denominator=2)
    pages = [vcpu["page"] for vcpu in engine.ask("x-pvclock-query")["vcpus"]]
    assert [page["tsc-to-system-mul"] for page in pages] == [clock.page(0).tsc_to_system_mul] * 2  # type: ignore[union-attr]
    engine.ask("x-pvclock-slew", ns=1000, max_ppm=100)
    engine.ask("x-pvclock-set-policy", policy="advance")
    engine.ask("x-pvclock-follow", reference="raw")
    now = engine.ask("x-pvclock-query")
    assert tuple(now["dilation"].values()) == (1, 2) == clock.dilation.as_integer_ratio()
    assert (now["policy"], now["reference"]) == ("advance", "raw") == (str(clock.policy), str(clock.reference))
    engine.events("X_PVCLOCK_CHANGE")


def test_what_a_clock_refuses_is_refused(engine: Served) -> None:
    """In the words of its error."""
    with pytest.raises(QmpFailed, match="guest time goes forward only"):
        engine.ask("x-pvclock-skip", ns=-1)
    with pytest.raises(QmpFailed, match="choose from freeze, advance"):
        engine.ask("x-pvclock-set-policy", policy="later")


def test_the_kernel_s_clock_is_not_ours_to_change(kernel: Served) -> None:
    """All else works."""
    with pytest.raises(QmpFailed, match="the kernel serves this machine's clock"):
        kernel.ask("x-pvclock-query")
    kernel.ask("stop")
    assert kernel.ask("query-status")["status"] == "paused"
