"""What the TSC is read after, in the code that a compiler makes: a race shows each lack too rarely for a test."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import pvclock

PROGRAM = """
#include "pvclock_tsc.h"

uint64_t ordered(void) { return pvclock_rdtsc_ordered(); }
uint64_t after_stores(void) { return pvclock_rdtsc_after_stores(); }
"""


@pytest.mark.row("K-08", "E9")
@pytest.mark.parametrize("level", ["-O1", "-O2", "-O3"])
def test_the_tsc_is_read_after_what_it_has_to_follow(level: str, tmp_path: Path) -> None:
    """Loads, by lfence; for the break point stores, too: mfence makes them visible, lfence holds rdtsc until then."""
    source, assembly = tmp_path / "it.c", tmp_path / "it.s"
    source.write_text(PROGRAM)
    subprocess.run(["cc", level, "-S", f"-I{pvclock.get_include()}", source, "-o", assembly], check=True)
    ordered, after_stores = re.split(r"^after_stores:$", assembly.read_text(), flags=re.MULTILINE)
    instructions = re.compile(r"^\s+(mfence|lfence|rdtsc)\s*$", re.MULTILINE)
    assert instructions.findall(ordered)[-2:] == ["lfence", "rdtsc"]
    assert instructions.findall(after_stores)[:3] == ["mfence", "lfence", "rdtsc"]
