"""Programs of a stock Linux guest, statically linked: where the CPU is emulated, linking one takes most of a minute."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["CLOCK_SAMPLER", "INIT_SAMPLER", "VDSO_PROBE", "Triple", "compile_all", "compiled"]

TESTS: Final = Path(__file__).parent
BUILD: Final = TESTS.parent / "build"
"""Where they are kept."""
HEADER: Final = TESTS / "guest_triple.h"
COMPILE: Final = ("cc", "-std=gnu11", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror")

CLOCK_SAMPLER: Final = TESTS / "kvm" / "clock_sampler.c"
VDSO_PROBE: Final = TESTS / "kvm" / "vdso_probe.c"
INIT_SAMPLER: Final = TESTS / "qemu" / "guest_sampler.c"
PROGRAMS: Final = (CLOCK_SAMPLER, VDSO_PROBE, INIT_SAMPLER)


class Triple(NamedTuple):
    """The guest's TSC, one of its clocks in ns, and its TSC again."""

    before: int
    ns: int
    after: int


def compiled(source: Path) -> bytes:
    """One of PROGRAMS, which is kept."""
    program = BUILD / source.stem
    newest_s = max(each.stat().st_mtime for each in (source, HEADER))
    if not program.exists() or program.stat().st_mtime < newest_s:
        program.parent.mkdir(exist_ok=True)
        subprocess.run([*COMPILE, "-o", program, source], check=True)
    return program.read_bytes()


def compile_all() -> None:
    """For a lab, to have them before it begins."""
    for source in PROGRAMS:
        compiled(source)
