"""The probe's image in QEMU: machines pc, q35 and microvm, multiboot and PVH entries, and each way that a run ends.

A PC's own firmware is emulated code for most of ten seconds on some hosts, so `make test` has qboot in its place.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from pvclock.probe import bootable_image
from qemu_glue.peer.launch import CPU_MODEL, PROGRAM
from tests.probe_image import pvh_image
from tests.probe_line import clock_of, one_line, windows
from tests.qemu.probe_qemu import DEBUG_EXIT, run_in_qemu

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.row("E18")]

DONE: Final = 1
"""isa-debug-exit makes 2v + 1 of the image's v, which is 0 where it measured."""
POWERED_OFF: Final = 0
QBOOT: Final = ("-bios", "qboot.rom")
DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "probe-vmms.md"


entries = pytest.mark.parametrize("image", [bootable_image, pvh_image], ids=["multiboot", "pvh"])


def assert_measured(serial: str, vcpus: int) -> None:
    """The serial port has one line: a measurement of so many vCPUs and all their pairs."""
    line = one_line(serial)
    assert (line["form"], line["milliseconds"], line["console"]["com1"]) == ("bare", 100, 1)
    assert [cpu["cpu"] for cpu in line["cpus"]] == list(range(vcpus))
    assert list(windows(line)) == [(a, b) for a in range(vcpus) for b in range(a + 1, vcpus)]
    assert vcpus == 1 or clock_of(line)["cell_reads"] > 0


@entries
def test_microvm(image: Callable[[], bytes], tmp_path: Path) -> None:
    """With both entries."""
    ended = run_in_qemu(tmp_path, image(), "-machine", "microvm", *DEBUG_EXIT)
    assert ended.status == DONE, ended
    assert_measured(ended.serial, 2)


@pytest.mark.parametrize(("machine", "image"), [("pc", bootable_image), ("q35", pvh_image)])
def test_pc_and_q35_with_a_quick_firmware(machine: str, image: Callable[[], bytes], tmp_path: Path) -> None:
    """Both have the devices of a PC, and the one is entered by multiboot, the other by PVH."""
    ended = run_in_qemu(tmp_path, image(), "-machine", machine, *QBOOT, *DEBUG_EXIT)
    assert ended.status == DONE, ended
    assert_measured(ended.serial, 2)
    assert {"pit", "acpi_pm"} <= {clock["name"] for clock in one_line(ended.serial)["clocks"]}


@pytest.mark.long
@pytest.mark.parametrize("machine", ["pc", "q35"])
@entries
def test_pc_and_q35(machine: str, image: Callable[[], bytes], tmp_path: Path) -> None:
    """With the firmware that QEMU has by default."""
    ended = run_in_qemu(tmp_path, image(), "-machine", machine, *DEBUG_EXIT)
    assert ended.status == DONE, ended
    assert_measured(ended.serial, 2)


def test_the_debug_console_has_the_same_line(tmp_path: Path) -> None:
    """Port 0xe9 prints what the serial port does, and a machine without a serial port has the line there."""
    console = tmp_path / "console"
    port = ("-chardev", f"file,id=e9,path={console}", "-device", "isa-debugcon,iobase=0xe9,chardev=e9")
    ended = run_in_qemu(tmp_path, bootable_image(), "-machine", "microvm", *port, *DEBUG_EXIT, vcpus=1)
    assert one_line(console.read_text()) == one_line(ended.serial)


@pytest.mark.long
def test_many_vcpus(tmp_path: Path) -> None:
    """Eight vCPUs are found and all 28 pairs of them, however few CPUs they share."""
    ended = run_in_qemu(tmp_path, bootable_image(), "-machine", "microvm", *DEBUG_EXIT, vcpus=8)
    assert ended.status == DONE, ended
    line = one_line(ended.serial)
    assert (len(line["cpus"]), len(clock_of(line)["pairs"])) == (8, 28)


# As documented


def shell_blocks(word: str) -> list[str]:
    """The shell commands of docs/probe-vmms.md that begin with `word`."""
    blocks: list[str] = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if block.startswith(word)]


@pytest.mark.long
def test_documented_command_lines(tmp_path: Path) -> None:
    """QEMU's command lines as they stand, but for the time and a CPU flag that some hosts want, print the line."""
    (tmp_path / "probe.img").write_bytes(bootable_image())
    commands = shell_blocks("qemu-system-x86_64")
    assert [re.findall(r"-machine (\w+)", command) for command in commands] == [["pc"], ["q35"], ["microvm"]]
    for command in commands:
        quick = command.replace("seconds=10", "seconds=0.1").replace("-cpu host", f"-cpu {CPU_MODEL}")
        done = subprocess.run(
            ["sh", "-c", quick], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == DONE, done
        assert_measured(done.stdout, 4)


@pytest.mark.long
def test_documented_grub_iso(tmp_path: Path) -> None:
    """The ISO that the document makes boots from a CD-ROM; under TCG, for real mode is slow in some KVMs."""
    if not shutil.which("grub-mkrescue"):
        pytest.skip("no grub-mkrescue; to get it: apt-get install grub-pc-bin grub-common xorriso mtools")
    (tmp_path / "probe.img").write_bytes(bootable_image())
    (commands,) = shell_blocks("mkdir")
    subprocess.run(["sh", "-ec", commands.replace("seconds=10", "seconds=0.1")], cwd=tmp_path, check=True)
    serial = tmp_path / "serial"
    qemu = [PROGRAM, "-nodefaults", "-display", "none", "-no-reboot", "-machine", "pc", "-accel", "tcg", "-m", "64"]
    subprocess.run([*qemu, "-smp", "2", "-serial", f"file:{serial}", "-cdrom", str(tmp_path / "probe.iso")], check=True)
    assert_measured(serial.read_text(errors="replace"), 2)


# Ends


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param(("microvm",), id="microvm"),
        pytest.param(("pc", *QBOOT), id="pc-qboot"),
        pytest.param(("pc",), id="pc", marks=pytest.mark.long),
        pytest.param(("q35",), id="q35", marks=pytest.mark.long),
    ],
)
def test_it_ends_by_power_off(machine: tuple[str, ...], tmp_path: Path) -> None:
    """Without isa-debug-exit ACPI's power-off ends QEMU: a reset would have begun another run, and printed again."""
    ended = run_in_qemu(tmp_path, bootable_image(), "-machine", *machine)
    assert ended.status == POWERED_OFF, ended
    assert_measured(ended.serial, 2)


def test_it_ends_by_a_reset(tmp_path: Path) -> None:
    """A machine that has neither isa-debug-exit nor ACPI is reset, which ends a QEMU with -no-reboot."""
    ended = run_in_qemu(tmp_path, bootable_image(), "-machine", "microvm,acpi=off", "-no-reboot")
    assert ended.status == POWERED_OFF, ended
    assert_measured(ended.serial, 2)
