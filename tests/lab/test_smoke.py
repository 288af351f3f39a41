"""A command in the lab: its output and status come back, and it finds what it needs."""

import json
import shutil
import sys
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from pvclock.boot.initramfs import archive
from pvclock.lab.kernel import Kernel
from tests.lab.laboratory import ROOT, Result, run_lab

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
GUEST_INIT: Final = b"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox cat /sys/devices/system/clocksource/clocksource0/current_clocksource
/bin/busybox poweroff -f
"""
GUEST_CMDLINE: Final = "console=ttyS0 panic=-1 quiet noxsave"
"""noxsave: an emulated CPU's XSAVE sizes contradict each other, of which the kernel warns at length."""

BULK = "".join(map(chr, range(32, 127))) * 4096


def test_a_commands_output_and_status_come_back(kernel: Kernel, scratch: Path) -> None:
    """Python, pvclock, /dev/kvm and the working directory are there; stdout, stderr and status 130 come back apart."""
    done = run_lab("--timeout", "240", "--", "python", "-c", INSIDE, scratch=scratch)
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


class Run(NamedTuple):
    """What a lab made of its command, and the folder that it could write to."""

    done: Result
    kept: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A lab in which a stock Linux is booted, with an initrd of one's own, and which ends by no such command."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    kept, scratch = (tmp_path_factory.mktemp(name) for name in ("kept", "scratch"))
    files = {"bin": b"", "proc": b"", "sys": b"", "dev": b"", "bin/busybox": Path(busybox).read_bytes()}
    (kept / "initrd").write_bytes(archive({**files, "init": GUEST_INIT}))
    guest = f"pvclock run --debian --initrd {kept}/initrd --append '{GUEST_CMDLINE}'"
    program = f"{guest} >{kept}/console 2>{kept}/said; echo $? >{kept}/status; echo $*; exec no-such-command"
    lab = ("--json", "--writable", kept, "--timeout", "480")
    return Run(run_lab(*lab, "sh", "-c", program, "sh", "--json", scratch=scratch), kept)


def test_a_writable_folder_keeps_what_is_written(kernel: Kernel, run: Run) -> None:
    """What is written in --writable stays, 127 is no such command, and --json has its object alone on stdout."""
    done, kept = run
    assert done.status == 127
    assert "no-such-command" in done.stderr
    assert "\n--json\n" in done.stderr
    document = json.loads(done.stdout)
    assert (document["schema"], document["ok"]) == ("pvclock.lab/1", False)
    assert (document["result"]["kernel"], document["result"]["status"]) == (kernel.release, 127)
    assert (kept / "status").read_text().splitlines()[0].isdigit()


@pytest.mark.row("E22")
def test_a_stock_linux_boots_on_our_clock(run: Run) -> None:
    """`pvclock run --debian`, with an initrd of one's own: it takes kvm-clock, does not complain, and powers off."""
    console, said, status = ((run.kept / name).read_text() for name in ("console", "said", "status"))
    assert status == "0\n", console + said
    assert "kvm-clock" in console.splitlines()
    assert said.splitlines()[-1] == "pvclock run: the guest has powered off"
    assert "WARNING:" not in console
