"""From a process's start to the shell of Debian's kernel: `pvclock run`, beside QEMU's microvm, in turn.

    pvclock lab -- python -m bench.shell_start [ROUNDS]

In the lab, or on any host whose KVM runs a stock Linux.  Kernel, root file system, command line and memory are alike.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench.comparison import readable
from bench.first_byte import microvm, wait_for
from pvclock.boot.initramfs import with_shell
from pvclock.lab.kernel import find_kernel

ROUNDS = 3
MEMORY_MIB = 256
CMDLINE = "console=ttyS0 quiet panic=-1 noxsave"
"""noxsave: an emulated CPU's XSAVE sizes contradict each other, of which the kernel warns at length."""
PROMPT = b"/ # "


def commands(folder: Path) -> dict[str, list[str]]:
    """The command lines, by what they start."""
    kernel, initrd = str(find_kernel(None, print).image), folder / "initrd"
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("no busybox for the guest: apt-get install busybox-static")
    initrd.write_bytes(with_shell(Path(busybox).read_bytes()))
    guest = ("-kernel", kernel, "-initrd", str(initrd), "-append", CMDLINE)
    ours = [f"-{each}" if each.startswith("-") else each for each in guest]
    run = [sys.executable, "-m", "pvclock", "run", "--memory", f"{MEMORY_MIB}M"]
    theirs = microvm(*guest, memory_mib=MEMORY_MIB)
    if theirs is None:
        raise SystemExit("no QEMU to compare with: apt-get install qemu-system-x86")
    return {
        "pvclock run": [*run, *ours],
        "pvclock run --clock kernel": [*run, "--clock", "kernel", *ours],
        "QEMU microvm": theirs,
    }


def main(rounds: int = ROUNDS) -> int:
    """Boot in turn, and print the medians and their ratios."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, command in commands(Path(folder)).items():
                begun_s = time.monotonic()
                wait_for(command, PROMPT)
                seconds.setdefault(name, []).append(time.monotonic() - begun_s)
                print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    twin_s = median(seconds["QEMU microvm"])
    for name, each in seconds.items():
        print(f"{name}: {readable(median(each) * 1e9)}, {median(each) / twin_s:.2f} of QEMU's")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
