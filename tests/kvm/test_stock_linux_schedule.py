"""A stock Linux that travels in time, as its users have it: a day of cron, a run of the command, a test of theirs.

Only where KVM runs a stock Linux; elsewhere `make test-lab` does it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Final

import pytest

from pvclock.commands.run_time import GUEST_OPTIONS
from pvclock.lab.kernel import Kernel, cache_folder
from tests.command_line import ROOT, command
from tests.kvm.guest_shell import BOOT_LIMIT_S
from tests.kvm.stock_linux import CMDLINE, COMPLAINTS, StockLinux

pytest_plugins = ("pytester",)
pytestmark = [pytest.mark.kvm, pytest.mark.row("E17")]

DAY_S: Final = 86_400
HOUR_S: Final = 3600
MINUTE_S: Final = 60
MINUTES: Final = 3
BETWEEN_S: Final = 20
"""After a full minute: its job has run, and the next is not due for long."""
SET_UP_CRON: Final = (
    "mkdir -p /etc /crontabs",
    "echo root::0:0:root:/:/bin/sh >/etc/passwd",
    "echo '0 * * * * date +%s >>/log' >/crontabs/root",
    "crond -c /crontabs -L /dev/null",
)
LATE_S: Final = MINUTE_S
"""By which busybox's crond, which looks once a minute, may begin a job late on however busy a machine."""


def test_a_day_of_cron(kernel: Kernel) -> None:
    """A job of each full hour has run at each full hour of the day, once, when it should."""
    with StockLinux(kernel, parameters=GUEST_OPTIONS.split()) as guest:
        guest.machine.time_travel.enable()
        for line in SET_UP_CRON:
            guest.run(line)
        begun_s, ended_s = map(int, guest.run(f"date +%s; sleep {DAY_S}; date +%s").split())
        hours = range(-(-begun_s // HOUR_S) * HOUR_S, ended_s - LATE_S, HOUR_S)
        # The shell was idle, too, until that line was typed, and hours may have passed.
        ran_s = [second for second in map(int, guest.run("cat /log").split()) if second >= hours.start]
        assert len(hours) in (23, 24, 25)
        assert [second // HOUR_S * HOUR_S for second in ran_s][: len(hours)] == list(hours)
        assert all(second % HOUR_S < LATE_S for second in ran_s)
        assert guest.run(COMPLAINTS) == ""
        assert guest.machine.time_travel.failure is None


@pytest.mark.long  # it waits
def test_the_log_is_that_of_plain_waiting(kernel: Kernel) -> None:
    """A job of each full minute has run in the same minutes after some that a guest travelled as after waiting."""
    ran_minutes = []
    for travels in (True, False):
        with StockLinux(kernel, parameters=GUEST_OPTIONS.split()) as guest:
            if travels:
                guest.machine.time_travel.enable()
            for line in SET_UP_CRON:
                guest.run(line.replace("'0 * * * *", "'* * * * *"))
            settle = f"sleep $(({MINUTE_S} - $(date +%s) % {MINUTE_S} + {BETWEEN_S})); rm -f /log"
            wait = f"date +%s; sleep {MINUTES * MINUTE_S}; cat /log"  # in one line: a shell that waits for one is idle
            begun_s, *jobs = map(int, guest.run(f"{settle}; {wait}", 2 * BOOT_LIMIT_S).split())
            ran_minutes.append([second // MINUTE_S - begun_s // MINUTE_S for second in jobs])
    assert ran_minutes == [[*range(1, MINUTES + 1)]] * 2


def test_the_command(kernel: Kernel) -> None:
    """A shell is typed into at guest times, and powers off at one: it boots and lives in travelled time."""
    linux = ("--kernel", str(kernel.image), "--shell", "--append", " ".join((*CMDLINE, GUEST_OPTIONS)))
    typed = ("--input-at", "1h", "cat /proc/uptime", "--input-at", "2h", "poweroff -f")
    done = subprocess.run(
        command("run", "--json", "--time-travel", *linux, *typed),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=BOOT_LIMIT_S,
        check=False,
    )
    console = done.stderr.decode(errors="replace")
    result = json.loads(done.stdout)["result"]
    assert (done.returncode, result["ending"]) == (0, "guest-shutdown"), console[-1000:]
    assert 2 * HOUR_S <= result["guest_s"] < 2 * HOUR_S + result["host_s"]
    assert result["time_travel"]["skips"] > 0
    (uptime,) = re.findall(r"^(\d+\.\d\d) \d+\.\d\d\r$", console, re.MULTILINE)
    assert (
        abs(HOUR_S - float(uptime)) < result["host_s"]
    )  # from where the kernel sets up its clocks, to when it is read


DOCUMENT: Final = ROOT / "docs" / "time-travel.md"
EXAMPLE: Final = re.compile(r"```python\n(\"\"\"Thirty days.*?)```", re.DOTALL)
DAYS_HERE: Final = 2


@pytest.fixture
def cache() -> Path:
    """Where the kernel is; asked before `pytester`, which is another home."""
    return cache_folder().parent


@pytest.mark.usefixtures("kernel")
def test_a_test_authors_test(cache: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document's, of a service's thirty days: it passes, here of fewer."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", os.fspath(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(cache))
    (example,) = EXAMPLE.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert "DAYS = 30\n" in example
    pytester.makepyfile(
        test_service=example.replace("DAYS = 30\n", f"DAYS = {DAYS_HERE}\n").replace("quiet", "quiet noxsave")
    )
    outcome = pytester.runpytest_subprocess("-p", "pvclock.testing.plugin", "-p", "no:cacheprovider").parseoutcomes()
    assert outcome == {"passed": 1}
