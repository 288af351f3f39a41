"""The probe's Linux executable in a stock Debian guest without Python, its console's capture judged outside."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import pytest

from pvclock.commands import main
from pvclock.lab.kernel import Kernel
from pvclock.meter.inside import ProbeRecord, parse_record, promises
from pvclock.meter.inside.windows import all_windows
from pvclock.probe import linux_executable
from tests.qemu.linux_guest import LinuxGuest

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.row("E18")]

INIT: Final = b"""\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
exec </dev/console >/dev/console 2>&1
echo "ready to measure"
/probe --seconds 2
echo "status $?"
exec /bin/busybox sleep 1000000
"""


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory, kernel: Kernel) -> Path:
    """What such a guest's console said, kernel and all."""
    busybox = shutil.which("busybox")
    assert busybox, "apt-get install busybox-static, which the lab needs, too"
    files = {
        **dict.fromkeys(("bin", "dev", "proc", "sys"), b""),
        "bin/busybox": Path(busybox).read_bytes(),
        "probe": linux_executable(),
        "init": INIT,
    }
    with LinuxGuest(tmp_path_factory.mktemp("debian"), kernel, vcpus=2, files=files) as guest:
        guest.wait_for(lambda: "\nstatus " in guest.console.read_text(errors="replace") or None, "end of the probe")
    return guest.console


@pytest.fixture(scope="module")
def record(console: Path) -> ProbeRecord:
    """The line in it."""
    return parse_record(console.read_bytes())


def test_the_guest_says_what_it_has(record: ProbeRecord) -> None:
    """KVM's signature, its kvmclock, the kernel's own choice and both CPUs stand in the record of a stock Debian."""
    told = promises(record)
    assert (record.form, len(record.cpus)) == ("linux", 2)
    assert told.hypervisor == "KVM"
    assert "CLOCKSOURCE2" in told.kvm_features
    assert record.kernel is not None
    assert record.kernel.clocksource in {"kvm-clock", "tsc"}


def test_both_cpus_are_compared(record: ProbeRecord) -> None:
    """Exchanges of the two vCPUs bound their offset by each clock, even where both run on one CPU that is emulated."""
    for name in ("tsc", "monotonic"):
        clock = next(clock for clock in record.clocks if clock.name == name)
        window = all_windows(clock, 2)[0, 1]
        assert window is not None
        assert window.low <= 0 <= window.high


def test_the_capture_of_a_console_is_judged(console: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`pvclock probe --judge` finds the line among the kernel's, finds no fault, and says how far it could see."""
    assert main(["probe", "--judge", str(console)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("Nothing is wrong with this guest's clock, as far as can be told from inside; ")
    assert any(line.startswith("The hypervisor is KVM, which offers kvmclock") for line in rest)
