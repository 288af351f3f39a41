"""`pvclock run --time-travel`: guests that sleep for days, what is typed at a guest time, and how such runs end.

They are payloads, which travel on every host; test_stock_linux_travel.py has a Linux.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest

from pvclock.commands import main
from pvclock.commands.run_why import WakeCounts
from pvclock.machine import Machine
from pvclock.machine.time_travel import Look
from qemu_glue.errors import QmpFailed
from qemu_glue.face.served import serve
from tests.command_line import ROOT, command
from tests.kvm.pc_guests import ECHO, driver, out_dx
from tests.kvm.test_qmp_machine import a_client
from tests.kvm.test_run_command import Ran
from tests.kvm.timer_guests import waking
from tests.waiting import alarm_after, wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.row("E17")]

SERVICE: Final = waking(500, 20, out_dx(0x3F8, ord(".")))
"""Sends a dot every 500 s, and ends after 10,000 s."""
SERVICE_S: Final = 10_000
RATE_ERROR: Final = 1e-3
"""Of the TSC's nominal frequency, by which the engine counts, and of the local APIC's clock: far less."""

LIMIT_S: Final = 60
"""Less than mutants have, so that one that waits for ever fails here."""


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Turn a wait for ever into a failure."""
    with alarm_after(LIMIT_S):
        yield


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ran]]:
    """Run `pvclock run` in this process, with nothing to read."""
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)

        def call(*arguments: str) -> Ran:
            return Ran(main(["run", *arguments]), *capfd.readouterr())

        yield call


def result_of(done: Ran) -> Any:  # noqa: ANN401  # JSON
    """What --json told."""
    return json.loads(done.stdout)["result"]


def test_hours_of_sleep(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """The guest does all that it does, at its times, and the report has each skip."""
    done = run("--time-travel", image(SERVICE))
    assert (done.status, done.stdout) == (0, "." * 20)
    told = re.search(
        r"^pvclock run: time travel: 20 skips over \d+\.\d{3} s of guest time, the largest (\d+\.\d{3}) s, "
        r"in (\d+\.\d{3}) s$",
        done.stderr,
        re.MULTILINE,
    )
    assert told is not None, done.stderr
    assert 499 <= float(told[1]) <= 500 * (1 + RATE_ERROR) + float(told[2])  # with what a skip itself takes
    result = result_of(run("--json", "--time-travel", image(SERVICE)))
    travel = result["time_travel"]
    assert SERVICE_S * (1 - RATE_ERROR) <= result["guest_s"] < SERVICE_S * (1 + RATE_ERROR) + result["host_s"]
    assert travel["skips"] == len(travel["last_skips"]) + 4 == 20
    assert travel["largest_s"] < 500 * (1 + RATE_ERROR) + travel["host_s"]
    assert SERVICE_S - result["host_s"] < travel["skipped_s"] < SERVICE_S * (1 + RATE_ERROR) + travel["host_s"]
    assert {each["to"] for each in travel["last_skips"]} == {"vCPU 0's LAPIC timer"}
    assert (travel["failure"], travel["is_idle_forever"]) == (None, False)
    times = [each["guest_s"] for each in travel["last_skips"]]
    assert all(later - earlier >= 500 * (1 - RATE_ERROR) for earlier, later in pairwise(times))


def test_input_at_its_time(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """It is typed, with Enter, in the order of the guest's time; the guest finds it there."""
    lines = ("--input-at", "30d", "q", "--input-at", "1h", "first", "--input-at", "1.5h", "second")
    done = run("--json", "--time-travel", *lines, image(driver(1, ECHO)))
    result = result_of(done)
    assert (done.status, result["ending"]) == (1, "guest-exit")  # its q is 113
    assert done.stderr.startswith("first\nsecond\nq")
    assert 30 * 86_400 <= result["guest_s"] < 30 * 86_400 + result["host_s"]
    assert {each["to"] for each in result["time_travel"]["last_skips"]} == {"event of the VMM's"}


@pytest.mark.parametrize("more", [(), ("--rate", "1000")], ids=["in real time", "at a rate"])
def test_input_without_travel(more: tuple[str, ...], image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """What is scheduled comes at its guest time there, too."""
    result = result_of(run("--json", "--input-at", "300ms", "q", *more, image(driver(1, ECHO))))
    assert (result["ending"], result["time_travel"]) == ("guest-exit", None)
    assert result["guest_s"] >= 0.3


def test_the_end_at_a_guest_time(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """The run ends there, well; what is scheduled for later does not come."""
    done = run("--json", "--time-travel", "--end-at", "700s", "--input-at", "1h", "q", image(SERVICE))
    result = result_of(done)
    assert (done.status, result["ending"], done.stderr[0]) == (0, "guest-time", ".")
    assert result["why"] == "ended by --end-at at guest time 700 s"
    assert 700 <= result["guest_s"] < 700 + result["host_s"]


def test_up_to_a_guest_time(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """From there on time passes as it does."""
    result = result_of(run("--json", "--time-travel", "--until", "800s", "--end-at", "801s", image(SERVICE)))
    assert result["ending"] == "guest-time"
    assert 801 <= result["guest_s"] < 800 + result["host_s"]
    assert result["time_travel"]["skipped_s"] < 800 + result["time_travel"]["host_s"]


def test_no_faster_than_that(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """Guest time passes by that factor at most."""
    result = result_of(run("--json", "--time-travel", "--max-rate", "1000", "--end-at", "501s", image(SERVICE)))
    assert result["ending"] == "guest-time"
    assert result["guest_s"] <= 1000 * result["host_s"]


def test_idle_for_ever(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """A guest without a timer, to which nobody can type, will never wake: the run ends, and says so."""
    done = run("--json", "--time-travel", "--input-at", "1h", "hello", image(driver(1, ECHO)))
    result = result_of(done)
    assert (done.status, result["ending"], result["status"]) == (6, "idle", 6)
    assert done.stderr.startswith("hello\n")
    since = re.search(r"the guest is idle for ever since guest time (\d+\.\d+) s", result["why"])
    assert since is not None, result["why"]
    assert 3600 <= float(since[1]) < 3600 + result["host_s"]
    assert result["time_travel"]["is_idle_forever"]


def test_idle_until_somebody_types(image: Callable[[bytes], str]) -> None:
    """While its standard input is open the run goes on, and says once what it waits for."""
    arguments = command("run", "--time-travel", image(driver(1, ECHO)))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, cwd=ROOT, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert any(b"idle for ever" in line for line in iter(process.stderr.readline, b""))
            told, errors = process.communicate(b"aq")
        finally:
            process.kill()
    assert (process.returncode, told) == (1, b"aq")
    assert b"idle for ever" not in errors


def test_what_woke_it(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """--why counts the timers that travel went to; a Linux's console has more to count."""
    said = b"workqueue_execute_start: work struct 0: function vmstat_update\n"
    done = run("--time-travel", "--why", image(waking(500, 3, b"".join(out_dx(0x3F8, byte) for byte in said))))
    assert (done.status, done.stdout.count(said.decode())) == (0, 3)
    rows = [re.split(" {2,}", line.strip()) for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows if len(row) == 3] == [
        ["what woke it", "times"],
        ["vCPU 0's LAPIC timer", "3"],
        ["work vmstat_update", "3"],
    ]
    result = result_of(run("--json", "--time-travel", "--why", image(SERVICE)))
    (timer,) = result["wakes"]["timers"]
    assert (timer["cause"], timer["times"], result["wakes"]["work"]) == ("vCPU 0's LAPIC timer", 20, [])
    assert 0 <= timer["first_s"] < 500 < 9500 * (1 - RATE_ERROR) <= timer["last_s"] <= result["guest_s"]  # from where


def test_a_look_that_is_told_late(
    image: Callable[[bytes], str], run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one, after which the guest ends at once, is counted."""
    look = WakeCounts.look

    def look_late(wakes: WakeCounts, seen: Look) -> None:
        time.sleep(0.2)
        look(wakes, seen)

    monkeypatch.setattr(WakeCounts, "look", look_late)
    result = result_of(run("--json", "--time-travel", "--why", image(waking(500, 3))))
    assert [timer["times"] for timer in result["wakes"]["timers"]] == [3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--until", "1d"), "--until: of a run with --time-travel; give that, too"),
        (("--max-rate", "10", "--why"), "--max-rate, --why: of a run with --time-travel"),
        (("--time-travel", "--until", "1w"), "'1w' is not a guest time, such as 90s, 1.5h or 30d"),
        (("--time-travel", "--max-rate", "0"), "'0' is not a factor"),
        (("--time-travel", "--max-rate", "1/2"), "max_rate"),
        (("--input-at", "soon", "x"), "'soon' is not a guest time"),
        (("--end-at", "-1s"), "--end-at"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals(
    arguments: tuple[str, ...], said: str, image: Callable[[bytes], str], run: Callable[..., Ran]
) -> None:
    """In one line, before anything has run."""
    done = run(*arguments, image(SERVICE))
    assert (done.status, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_client_switches_it(tmp_path: Path) -> None:
    """By QMP: on, with where it is to end; off; and how it is."""
    path = tmp_path / "qmp.sock"
    with Machine(waking(500, 20)) as machine, serve(machine, path, list), a_client(path) as monitor:
        idle = monitor.execute("x-pvclock-travel")
        assert (idle["is-on"], idle["why-not"], idle["skips"]) == (False, None, 0)
        machine.start()
        until_ns = 1700 * 10**9
        assert monitor.execute("x-pvclock-travel", {"on": True, "until-ns": until_ns})["until-ns"] == until_ns
        wait_until(lambda: not monitor.execute("x-pvclock-travel")["is-on"])
        found = monitor.execute("x-pvclock-travel")
        assert (found["skips"], found["is-idle-forever"], found["failure"]) == (4, False, None)
        assert found["largest-ns"] <= 500 * 10**9 * (1 + RATE_ERROR) + found["host-ns"]
        assert until_ns <= monitor.execute("x-pvclock-query")["guest-ns"]
        with pytest.raises(QmpFailed, match="with them, on is true"):
            monitor.execute("x-pvclock-travel", {"on": False, "max-rate": 10.0})
        assert monitor.execute("x-pvclock-travel", {"on": True})["is-on"]
        assert machine.wait() == 0
        assert not monitor.execute("x-pvclock-travel", {"on": False})["is-on"]
