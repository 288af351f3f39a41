"""Programs in C that have some sources of the probe, and stand in for what those call."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from tests.unit.c_program import FLAGS
from tests.waiting import HANG_S

__all__ = ["PROBE", "Compiled"]

PROBE: Final = Path(__file__).parents[2] / "pvclock" / "probe"


class Compiled:
    """Such programs, each compiled once, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Path] = {}

    def prints(self, program: str, sources: tuple[str, ...], *arguments: str) -> list[str]:
        """The lines that such a program prints when it is run with these arguments."""
        if program not in self.made:
            self.made[program] = self.compile(program, sources)
        done = subprocess.run(
            [self.made[program], *arguments], capture_output=True, text=True, check=True, timeout=HANG_S
        )
        return done.stdout.splitlines()

    def compile(self, program: str, sources: tuple[str, ...]) -> Path:
        """The program, in a file."""
        binary = self.folder / f"{len(self.made)}"
        source = binary.with_suffix(".c")
        source.write_text(program, encoding="utf-8")
        files = [source, *(PROBE / each for each in sources)]
        subprocess.run(
            ["cc", *FLAGS, f"-I{PROBE}", '-DPVCLOCK_VERSION="0"', "-pthread", *files, "-o", binary], check=True
        )
        return binary
