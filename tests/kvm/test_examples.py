"""The VMM of examples/vmm.py on real vCPUs: what its guest reads, beside what the clock says."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest

from pvclock.kvm import TscOffsets
from tests.command_line import run_python

pytestmark = pytest.mark.kvm

ROOT = Path(__file__).parents[2]
VMM, GUEST_SOURCE = ROOT / "examples" / "vmm.py", ROOT / "examples" / "clock_guest.s"

BOUND_NS = 4.0
"""A reading against the timeline: 2 ns, the tick that a shift of -1 cuts, and 0.47 ppb of 2 s."""
STEERED_BOUND_NS = 1e6
"""Where the host's KVM steers guests' TSCs they are off by microseconds; a wrong page is off by much more."""

READING = re.compile(r"vCPU (\d): guest (\d+) ns, host ([\d.]+) ns, apart ([+-][\d.]+) ns")
PAUSE_NS = 300_000_000

# The guest asks for asynchronous page faults, which are not offered: its #GP handler shows 0xdead.
FAULTING_GUEST = """
	.code16
start:	movl	$handler - start + 0x1000, 0x34
	mov	$0x4b564d02, %ecx
	cdq
	wrmsr
	jmp	out
handler:
	movl	$0xdead, 8(%di)
out:	rdtsc
	mov	%eax, (%di)
	mov	%edx, 4(%di)
	out	%al, $0x10
	jmp	out
"""
FAULTED = 0xDEAD


def run(program: str, *arguments: str) -> str:
    """Run a Python program with the examples' names, and return what it prints."""
    done = run_python("-c", program, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def assembled(source: str, folder: Path) -> bytes:
    """Assemble 16-bit code to the bytes that it is."""
    thing, image = folder / "guest.o", folder / "guest.bin"
    subprocess.run(["as", "--32", "-o", thing, "-"], input=source.encode(), check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", thing, image], check=True)
    return image.read_bytes()


@pytest.mark.row("K-12")
def test_the_guest_reads_what_the_clock_says(tsc_offsets: TscOffsets) -> None:
    """Each reading is within 4 ns of the timeline at its TSC, none goes back, and the pause is left out."""
    printed = run("import runpy; runpy.run_path('examples/vmm.py', run_name='__main__')")
    bound_ns = STEERED_BOUND_NS if tsc_offsets is TscOffsets.STEERED else BOUND_NS
    readings: dict[str, list[int]] = {"0": [], "1": []}
    for vcpu, guest_ns, host_ns, apart_ns in READING.findall(printed):
        assert abs(float(apart_ns)) <= bound_ns
        assert abs(int(guest_ns) - float(host_ns)) <= bound_ns + 1
        readings[vcpu].append(int(guest_ns))
    for each in readings.values():
        assert each
        assert each == sorted(each)
    (left_out,) = re.findall(r"^paused: (\d+) ns are left out", printed, re.MULTILINE)
    assert int(left_out) >= PAUSE_NS


@pytest.mark.row("E13")
@pytest.mark.parametrize("redirect", ["| true", ">/dev/full"])
def test_nobody_reads_the_vmm(redirect: str) -> None:
    """It ends with one line of why, and without a traceback."""
    done = run_python(VMM, redirect=redirect)
    assert re.fullmatch(r"\[Errno \d+\] (Broken pipe|No space left on device)\n", done.stderr)


@pytest.mark.row("E13")
def test_what_the_clock_refuses_is_gp_in_the_guest(tmp_path: Path) -> None:
    """A WRMSR that the clock does not serve runs the guest's handler for #GP, and the VMM goes on."""
    program = (
        "import runpy, sys; vmm = runpy.run_path('examples/vmm.py');"
        "vmm['main'].__globals__['GUEST'] = bytes.fromhex(sys.argv[1]); vmm['main'](vmm['open_kvm']())"
    )
    printed = run(program, assembled(FAULTING_GUEST, tmp_path).hex())
    shown = {int(guest_ns) for _, guest_ns, _, _ in READING.findall(printed)}
    assert shown == {FAULTED}


@pytest.mark.row("style")
def test_the_guests_bytes_are_its_source(tmp_path: Path) -> None:
    """What vmm.py holds is clock_guest.s, assembled."""
    source = GUEST_SOURCE.read_text(encoding="utf-8")
    assert runpy.run_path(str(VMM))["GUEST"] == assembled(source, tmp_path)
