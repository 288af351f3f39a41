"""A stock Linux on our own machine: the lab's kernel, a root file system of busybox, and a shell to type into."""

from __future__ import annotations

import lzma
import shutil
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from pvclock.boot import BootSource
from pvclock.boot.initramfs import with_shell
from pvclock.boot.source import Protocol
from pvclock.lab.kernel import Kernel
from pvclock.machine import Machine
from tests.guest_programs import BUILD, CLOCK_SAMPLER, VDSO_PROBE, compiled
from tests.kvm.guest_shell import BOOT_LIMIT_S, Command, GuestShell

__all__ = ["CMDLINE", "COMPLAINTS", "StockLinux", "root_file_system", "uncompressed"]

XZ_MAGIC: Final = bytes.fromhex("fd377a585a00")

CMDLINE: Final = (
    "console=ttyS0",
    "quiet",
    "panic=-1",  # reset at once, which ends the run
    "noxsave",  # an emulated CPU's XSAVE sizes contradict each other, of which the kernel warns at length
)

COMPLAINTS: Final = (
    "dmesg | grep -E 'BUG:|WARNING:|Oops|soft lockup|blocked for more|detected stalls|kvm-clock. as unstable'"
    " | grep -v 'Speculative Return Stack Overflow'"  # said on every AMD
)
"""A command that prints what a kernel says whose clock or timers are not right."""


def uncompressed(kernel: Kernel) -> bytes:
    """The ELF file (vmlinux) inside a bzImage; kept, too, for the same reason."""
    path = BUILD / f"vmlinux-{kernel.release}"
    if not path.exists():
        image = kernel.image.read_bytes()
        sectors, at, length = image[0x1F1], *struct.unpack_from("<II", image, 0x248)  # as boot.rst has it
        begin = (sectors + 1) * 512 + at
        assert image[begin : begin + 6] == XZ_MAGIC, "not compressed as Debian's kernels are"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(image[begin : begin + length]))
    return path.read_bytes()


def root_file_system() -> bytes:
    """An initramfs with a shell and our programs."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "apt-get install busybox-static"
    programs = {source.stem: compiled(source) for source in (CLOCK_SAMPLER, VDSO_PROBE)}
    return with_shell(Path(busybox).read_bytes(), programs)


class StockLinux:
    """A running guest; a context manager that returns once its shell is there.

    machine: the one that it runs on.  rate: guest seconds in a host's second, from boot on.  protocol: "pvh" and
    "linux64" enter the uncompressed kernel.  before_start: called with the machine before it starts.
    parameters: more of the kernel's.  options: more of Machine's arguments.
    """

    def __init__(
        self,
        kernel: Kernel,
        *,
        rate: Fraction | None = None,
        protocol: Protocol = "bzimage",
        before_start: Callable[[Machine], object] | None = None,
        parameters: Sequence[str] = (),
        **options: Any,  # noqa: ANN401  # Machine's
    ) -> None:
        self.shell = GuestShell(self._send)
        image = kernel.image.read_bytes() if protocol == "bzimage" else uncompressed(kernel)
        source = BootSource(image, " ".join((*CMDLINE, *parameters)), root_file_system(), protocol)
        self.machine = Machine(source, platform="pc", memory_bytes=256 << 20, serial_output=self.shell.take, **options)
        try:
            if rate is not None and self.machine.clock is not None:
                self.machine.clock.dilate(*rate.as_integer_ratio())
            if before_start is not None:
                before_start(self.machine)
            self.machine.start()
            self.shell.wait_for_prompt()
        except BaseException:
            self.machine.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.machine.close()

    def run(self, command: str, limit_s: float = BOOT_LIMIT_S) -> str:
        """What a command prints, typed at the shell."""
        return self.shell.run(command, limit_s)

    def begin(self, command: str) -> Command:
        """Type one at the shell, and do not wait for its end."""
        return self.shell.begin(command)

    def type(self, text: str) -> None:
        """Type it, without waiting for anything."""
        self.shell.type(text)

    def power_off(self) -> int:
        """Have it power off; what the machine's wait() gives then."""
        self.type("poweroff -f\n")
        return self.machine.wait(BOOT_LIMIT_S)

    def _send(self, data: bytes) -> None:
        assert self.machine.serial.receive(data) == len(data)
