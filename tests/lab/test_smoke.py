"""A command in the lab: its output and status come back, and it finds what it needs."""

import json
import sys
from pathlib import Path

import pytest

from pvclock.lab.kernel import Kernel
from tests.lab.laboratory import ROOT, run_lab

pytestmark = [pytest.mark.lab, pytest.mark.smoke, pytest.mark.row("style"), pytest.mark.usefixtures("kernel")]

INSIDE = """
import os, sys, pvclock
os.close(os.open("/dev/kvm", os.O_RDWR))
print(os.uname().release, os.getcwd(), sys.prefix, pvclock.__file__, sep="|")
print(open("/sys/devices/system/clocksource/clocksource0/current_clocksource").read().strip())
with open("/dev/stderr", "a") as stderr:
    stderr.write("opened again\\n")
sys.stdout.flush()
sys.stdout.buffer.write(bytes(range(32, 127)) * 4096)
open("stray", "w").close()
sys.exit(130)
"""
BULK = "".join(map(chr, range(32, 127))) * 4096


def test_a_commands_output_and_status_come_back(kernel: Kernel, scratch: Path) -> None:
    """Python, pvclock, /dev/kvm and the working directory are there; stdout, stderr and status 130 come back apart."""
    done = run_lab("--timeout", "120", "--", "python", "-c", INSIDE, scratch=scratch)
    assert done.status == 130, done.stderr
    first, clocksource, bulk = done.stdout.split("\n", 2)
    expected = [kernel.release, str(ROOT), sys.prefix, str(ROOT / "pvclock" / "__init__.py")]
    assert first.split("|") == expected
    assert clocksource == "tsc"
    assert bulk == BULK
    assert not (ROOT / "stray").exists()
    told, said = done.stderr.splitlines()
    assert f"Linux {kernel.version}" in told
    assert said == "opened again"


def test_a_writable_folder_keeps_what_is_written(kernel: Kernel, scratch: Path, tmp_path: Path) -> None:
    """What is written in --writable stays, 127 is no such command, and --json has its object alone on stdout."""
    kept = tmp_path / "kept"
    kept.mkdir()
    write = f"echo done > {kept}/result; echo $*; exec no-such-command"
    lab = ("--json", "--writable", kept, "--timeout", "120")
    done = run_lab(*lab, "sh", "-c", write, "sh", "--json", scratch=scratch)
    assert done.status == 127
    assert "no-such-command" in done.stderr
    assert "\n--json\n" in done.stderr
    document = json.loads(done.stdout)
    assert (document["schema"], document["ok"]) == ("pvclock.lab/1", False)
    assert (document["result"]["kernel"], document["result"]["status"]) == (kernel.release, 127)
    assert (kept / "result").read_text() == "done\n"
