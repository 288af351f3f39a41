"""A stock Linux on our own machine: the lab's kernel, a root file system of busybox, and a shell to type into."""

from __future__ import annotations

import lzma
import shutil
import struct
import threading
import time
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

__all__ = ["BOOT_LIMIT_S", "COMPLAINTS", "Command", "StockLinux", "uncompressed"]

XZ_MAGIC: Final = bytes.fromhex("fd377a585a00")

BOOT_LIMIT_S: Final = 300.0
"""With two vCPUs on one emulated CPU of a busy host; 10 s on an idle one."""
TOLD_BYTES: Final = 2000

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

PROMPT: Final = b"/ # "


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


class Command:
    """A command that was typed at the shell.  Its lines end as a terminal's do until they are given to the caller."""

    def __init__(self, wait_for: Callable[..., Any], begin: bytes, end: bytes) -> None:
        self._wait_for, self._begin, self._end = wait_for, begin, end

    def wait_for_line(self, line: str, limit_s: float = BOOT_LIMIT_S) -> None:
        """Return once it has printed this one."""
        wanted = line.encode() + b"\r\n"
        self._wait_for(lambda output: wanted in output.partition(self._begin)[2] or None, limit_s)

    def printed(self, limit_s: float = BOOT_LIMIT_S) -> str:
        """All that it has printed, once it has ended."""
        output: bytes = self._wait_for(lambda output: bytes(output) if self._end in output else None, limit_s)
        text = output.partition(self._begin)[2].partition(self._end)[0]
        return text.decode(errors="replace").replace("\r\n", "\n")


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
        self._changed = threading.Condition()
        self._output = bytearray()
        self._commands = 0
        image = kernel.image.read_bytes() if protocol == "bzimage" else uncompressed(kernel)
        source = BootSource(image, " ".join((*CMDLINE, *parameters)), root_file_system(), protocol)
        self.machine = Machine(source, platform="pc", memory_bytes=256 << 20, serial_output=self._take, **options)
        try:
            if rate is not None and self.machine.clock is not None:
                self.machine.clock.dilate(*rate.as_integer_ratio())
            if before_start is not None:
                before_start(self.machine)
            self.machine.start()
            self._wait_for(lambda output: PROMPT in output or None)
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
        return self.begin(command).printed(limit_s)

    def begin(self, command: str) -> Command:
        """Type one at the shell, and do not wait for its end.  Its marks are sums, so that their echo is none."""
        self._commands += 1
        begin, end = 2 * self._commands, 2 * self._commands + 1
        self.type(f'echo "<mark $(({begin}))"; {command}; echo "$(({end})) mark>"\n')
        return Command(self._wait_for, b"<mark %d\r\n" % begin, b"%d mark>\r\n" % end)

    def type(self, text: str) -> None:
        """Type it, without waiting for anything."""
        data = text.encode()
        assert self.machine.serial.receive(data) == len(data)

    def power_off(self) -> int:
        """Have it power off; what the machine's wait() gives then."""
        self.type("poweroff -f\n")
        return self.machine.wait(BOOT_LIMIT_S)

    def _take(self, data: bytes) -> None:
        with self._changed:
            self._output += data
            if data == b"\n" or self._output.endswith(PROMPT):  # what is waited for ends so
                self._changed.notify_all()

    def _wait_for(self, look: Callable[[bytearray], Any], limit_s: float = BOOT_LIMIT_S) -> Any:  # noqa: ANN401
        """What look() gives of the output, once it gives something; AssertionError with its end if it never does."""
        deadline = time.monotonic() + limit_s
        with self._changed:
            while (found := look(self._output)) is None:
                has_come = self._changed.wait(timeout=deadline - time.monotonic())
                assert has_come, bytes(self._output[-TOLD_BYTES:]).decode(errors="replace")
                assert b"Kernel panic" not in self._output, self._output.decode(errors="replace")
        return found
