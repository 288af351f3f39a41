"""A guest whose first instructions write a byte to its serial port, and how long that takes from a process's start."""

from __future__ import annotations

import shutil
import signal
import struct
import subprocess
from contextlib import suppress

__all__ = ["MARK", "MULTIBOOT_IMAGE", "microvm", "wait_for", "wait_for_byte"]

MARK = b"!"
SERIAL_PORT = 0x3F8
EXIT_PORT = 0xF4
LOAD_ADDRESS = 1 << 20

HAS_ADDRESSES = 1 << 16
HEADER_MAGIC = 0x1BADB002
HEADER_BYTES = 32
CODE = (
    (b"\x66\xba" + SERIAL_PORT.to_bytes(2, "little"))  # mov $port, %dx
    + (b"\xb0" + MARK + b"\xee")  # mov $mark, %al; out %al, %dx
    + bytes([0xB0, 0, 0xE6, EXIT_PORT, 0xF4])  # mov $0, %al; out %al, $EXIT_PORT; hlt
)


def _multiboot(code: bytes) -> bytes:
    end = LOAD_ADDRESS + HEADER_BYTES + len(code)
    header = (HEADER_MAGIC, HAS_ADDRESSES, -(HEADER_MAGIC + HAS_ADDRESSES) % (1 << 32))
    addresses = (LOAD_ADDRESS, LOAD_ADDRESS, end, end, LOAD_ADDRESS + HEADER_BYTES)
    return struct.pack("<8I", *header, *addresses) + code


MULTIBOOT_IMAGE = _multiboot(CODE)


def microvm(*arguments: str, memory_mib: int = 256, cpu: str = "host,-arch-capabilities") -> list[str] | None:
    """The command line of QEMU's microvm with its serial port on standard output; None without QEMU."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        return None
    return [
        *(program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-accel", "kvm", "-machine", "microvm", "-cpu", cpu, "-m", f"{memory_mib}M"),
        *("-serial", "stdio", "-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"),
        *arguments,
    ]


def wait_for_byte(command: list[str]) -> None:
    """Start the command and return when its guest's byte is on standard output; it is killed then."""
    wait_for(command, MARK)


def wait_for(command: list[str], text: bytes) -> None:
    """Start the command and return when it has printed `text`; it is killed then.  RuntimeError if it ends before."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        printed = b""
        try:
            while text not in printed:
                piece = process.stdout.read(4096)
                if not piece:
                    raise RuntimeError(f"{command[0]} has ended and printed {printed[-500:]!r} up to then")
                printed += piece
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
