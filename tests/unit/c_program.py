"""Small C programs over the headers: what a VMM in C gets of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pvclock
from tests.waiting import HANG_S

FLAGS = ("-std=c11", "-Wall", "-Wextra")


def printed_by(program: str, folder: Path, *flags: str) -> list[str]:
    """Compile a program in a folder, with further flags, and return the lines that it prints."""
    source, binary = folder / "it.c", folder / "it"
    source.write_text(program)
    subprocess.run(["cc", *FLAGS, f"-I{pvclock.get_include()}", *flags, source, "-o", binary], check=True)
    done = subprocess.run([binary], capture_output=True, text=True, check=True, timeout=HANG_S)
    return [line.strip() for line in done.stdout.splitlines()]


def told(printed: list[str], what: str) -> list[str]:
    """Return the rest of each line that begins with `what`."""
    return [line.removeprefix(f"{what} ") for line in printed if line.startswith(f"{what} ")]
