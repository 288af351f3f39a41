"""How narrow the probe's windows are and how fast its shared cell is, beside plain C that only measures.

A window's half-width is the floor of what an exchange can tell: it should be the plain one's, the time in which a cache
line travels and a clock is read.  The cell names its reader in the same word, which should cost next to nothing.
Figures are of the best of some rounds: another program on one of the two CPUs makes them worse, and nothing better.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Final

import pytest

from bench.comparison import Comparison, Figure

ROOT: Final = Path(__file__).parents[1]
MILLISECONDS: Final = 100
ROUNDS: Final = 9
NS_PER_S: Final = 1e9

Round = dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def rounds(native: Path) -> list[Round]:
    """Return what two threads measured at each cell, in turn."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("an exchange needs two CPUs: widen the affinity (taskset -c 0,1)")
    program = native / "probe_cells"
    source = ROOT / "bench" / "native" / "probe_cells.c"
    flags = ("-std=c11", "-O2", "-pthread", f"-I{ROOT / 'pvclock' / 'probe'}")
    subprocess.run(["cc", *flags, source, "-o", program], check=True)
    arguments = [*map(str, cpus), str(MILLISECONDS), str(ROUNDS)]
    done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def half_width_ns(rounds: list[Round], name: str, tsc_hz: int) -> float:
    """Return half the width of the narrowest window."""
    return min((each[name]["high"] - each[name]["low"]) / 2 for each in rounds) * NS_PER_S / tsc_hz


def operation_ns(rounds: list[Round], name: str, what: str) -> float:
    """Return the time that one of so many took, of 100 ms."""
    return MILLISECONDS * 1e6 / max(each[name][what] for each in rounds)


def test_floor_of_the_window(comparison: Comparison, rounds: list[Round], tsc_hz: int) -> None:
    """Of rounds that share their readings, beside rounds that have two of their own."""
    comparison.benchmark.pedantic(lambda: None)
    floors = [half_width_ns(rounds, name, tsc_hz) for name in ("exchange", "plain_exchange")]
    each_ns = [operation_ns(rounds, name, "rounds") for name in ("exchange", "plain_exchange")]
    comparison.record(
        Figure("half-width of a pair's window", floors[0], "of a plain exchange", floors[1]),
        Figure("one round of it", each_ns[0], "of a plain exchange", each_ns[1]),
    )


def test_readings_at_the_shared_cell(comparison: Comparison, rounds: list[Round]) -> None:
    """The cell that names its reader, beside one that does not."""
    comparison.benchmark.pedantic(lambda: None)
    ns, plain_ns = (operation_ns(rounds, name, "reads") for name in ("cell", "plain_cell"))
    note = f"{NS_PER_S / ns / 1e6:.3g} M readings/s by two CPUs"
    comparison.record(Figure("a reading at the shared cell", ns, "at a plain one", plain_ns, note))
    assert sum(each["cell"]["warps"] + each["plain_cell"]["warps"] for each in rounds) == 0
