"""A stock Linux's time of day while NTP's own call slews its host's clock, which it follows."""

import json
import sys
from pathlib import Path

import pytest

from tests.lab.laboratory import run_lab
from tests.lab.slewed_linux import PHASES_PPM, Recorded

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kernel")]

WITHIN_NS = 1_000_000
SLEWED_NS = 1_200_000
"""At least so far the host's clock goes from its TSC: further than a guest may be off that does not follow it."""


@pytest.mark.row("E11", "E22")
def test_a_stock_linux_follows_a_slewed_host(scratch: Path) -> None:
    """Its CLOCK_REALTIME keeps its distance to the host's CLOCK_MONOTONIC, slewed by +200 and -300 ppm, within 1 ms."""
    program = [sys.executable, "-m", "tests.lab.slewed_linux"]
    done = run_lab("--timeout", "280", "--", *program, scratch=scratch)
    assert done.status == 0, done.stderr
    recorded = Recorded(**json.loads(done.stdout))
    assert [ppm for _, ppm in recorded.phases] == list(PHASES_PPM)
    ahead_ns = [ns for _, ns in recorded.host]
    assert max(ahead_ns) - min(ahead_ns) > SLEWED_NS
    apart_ns = [abs(ns) for _, ns in recorded.apart_ns()]
    assert len(apart_ns) > len(PHASES_PPM)
    assert max(apart_ns) < WITHIN_NS
