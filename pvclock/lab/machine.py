"""The lab's machine: QEMU's command line, which virtme-ng composes for a kernel and this root file system."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from pvclock.errors import ConfigError, LabError
from pvclock.lab.inside import PORTS
from pvclock.lab.kernel import Kernel
from pvclock.lab.tools import find_program
from pvclock.quantities import quoted

__all__ = ["CPUS_MAX", "LabConfig", "memory_mib", "qemu_command"]

CPU = "EPYC,+svm,+npt"
STEADY = ("nohz=off", "highres=off")
"""Without these the emulated machine sometimes loses its timer interrupt, and freezes."""

CPUS_MAX: Final = 255
"""QEMU's limit without an emulated IOMMU."""
MEMORY_LEAST_MIB: Final = 256
"""With less, the initramfs is not unpacked."""
MEMORY_SIZE: Final = re.compile(r"([0-9]{1,9})([MG]?)B?", re.ASCII | re.IGNORECASE)

TAKING_TURNS = ("-accel", "tcg,thread=single")
"""Emulated in parallel, two CPUs that run guests deadlock within minutes: each waits for the other's interrupt."""


class LabConfig(NamedTuple):
    """The lab's configuration.  With two CPUs its kernel finds the TSC unstable, unless tsc_reliable is set."""

    cpus: int = 1
    memory: str = "3G"
    kernel: str | None = None
    tsc_reliable: bool = False
    writable: tuple[Path, ...] = ()
    timeout_s: float = 600.0

    @property
    def kernel_parameters(self) -> tuple[str, ...]:
        """Additions to the kernel's command line."""
        return (*STEADY, *(("tsc=reliable",) if self.tsc_reliable else ()))


def memory_mib(size: str) -> int:
    """A memory size such as "512M" or "3G", in MiB, also where no unit is given; ConfigError for anything else."""
    found = MEMORY_SIZE.fullmatch(size)
    mib = int(found[1]) * (1024 if found[2].upper() == "G" else 1) if found else 0
    if mib < MEMORY_LEAST_MIB:
        raise ConfigError(
            f"{quoted(size)} is not a memory size for a lab; give it {MEMORY_LEAST_MIB}M or more, in M or G, such as 3G"
        )
    return mib


def qemu_command(config: LabConfig, kernel: Kernel, scratch: Path, script: Path, ports: Sequence[int]) -> list[str]:
    """Have virtme-ng write the initramfs into `scratch`, and return QEMU's command; `ports` are descriptors to write.

    We start QEMU, not virtme-ng, so that there is one process to watch and to end; the script's output goes through
    ports of our own, because virtme-ng's need udev.
    """
    if not 1 <= config.cpus <= CPUS_MAX:
        raise ConfigError(f"a lab with {config.cpus} CPUs; give it 1 to {CPUS_MAX}")
    virtme = [
        *(sys.executable, "-m", "virtme.commands.run", "--dry-run", "--show-command"),
        *("--save-initramfs", str(scratch / "initramfs")),
        *("--kimg", str(kernel.image), "--mods", "auto", "--disable-kvm", "--force-9p"),
        *("--busybox", find_program("busybox") or "", "--qemu-bin", find_program("qemu-system-x86_64") or ""),
        *("--cpus", str(config.cpus), "--memory", f"{memory_mib(config.memory)}M"),
        *(f"--kopt={parameter}" for parameter in config.kernel_parameters),
        *(f"--overlay-rwdir={folder}" for folder in _overlaid()),
        *(f"--rwdir={folder}" for folder in config.writable),
        *("--show-boot-console", "--script-sh", f"exec sh {shlex.quote(str(script))}"),
        *("--qemu-opts", "-cpu", CPU, *(TAKING_TURNS if config.cpus > 1 else ()), *_port_options(ports)),
    ]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(
        virtme, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode or not done.stdout.strip():
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise LabError(f"virtme-ng failed ({done.returncode}): {said[-1]}")
    return shlex.split(done.stdout.splitlines()[-1])


def _overlaid() -> list[Path]:
    """Folders that the lab can write, without keeping it: the working directory, /tmp, and /lib for /lib/modules."""
    folders = [Path("/tmp"), Path("/lib")]  # noqa: S108 - the lab's, not ours
    cwd = Path.cwd()
    if cwd != Path("/") and not any(cwd.is_relative_to(folder) for folder in folders):
        folders.append(cwd)
    return folders


def _port_options(ports: Sequence[int]) -> list[str]:
    options = ["-device", "virtio-serial-pci,id=pvclock-ports"]
    for number, (name, descriptor) in enumerate(zip(PORTS, ports, strict=True), start=1):
        chardev = f"pvclock{number}"
        options += ["-chardev", f"file,id={chardev},path=/proc/self/fd/{descriptor}"]
        options += ["-device", f"virtserialport,bus=pvclock-ports.0,nr={number},name={name},chardev={chardev}"]
    return options
