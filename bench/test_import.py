"""The cost of importing: a new interpreter each time, beside one that imports nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from bench.comparison import Comparison

ROUNDS = 40


def interpreter(statement: str) -> Callable[[], object]:
    """Return a function that starts Python to execute `statement`."""
    return lambda: subprocess.run([sys.executable, "-c", statement], check=True)


@pytest.mark.parametrize("statement", ["import pvclock", "from pvclock import GuestClock"])
def test_import(comparison: Comparison, statement: str) -> None:
    """From start to end of a process."""
    twin = ("python -c pass", interpreter("pass"))
    comparison.measure(f"python -c '{statement}'", interpreter(statement), twin, operations=1, rounds=ROUNDS)
