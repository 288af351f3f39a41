"""A guest's clock that follows CLOCK_MONOTONIC, while NTP's own call slews that on a real kernel."""

import json
import sys
from pathlib import Path

import pytest

from tests.lab.laboratory import run_lab
from tests.lab.slewed_host import PHASE_TICKS, PHASES_PPM

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kernel")]

SETTLED_TICKS = 72
"""Of each phase: by then a slew of 500 ppm more or less has been found and worked off."""


@pytest.mark.row("E11")
def test_a_guest_follows_a_slewed_host(scratch: Path) -> None:
    """The host's clock is slewed by +200, -300 and 0 ppm: the guest steps by nothing and ends within the bound."""
    program = [sys.executable, "-m", "tests.lab.slewed_host"]
    done = run_lab("--timeout", "240", "--", *program, scratch=scratch)
    assert done.status == 0, done.stderr
    ticks = json.loads(done.stdout)
    assert [tick["ppm"] for tick in ticks] == [ppm for ppm in PHASES_PPM for _ in range(PHASE_TICKS)]
    # A reading comes some time after the break, so the two pages' rates are in it, too.
    assert not [tick for tick in ticks if abs(tick["step_ns"]) > 2 + tick["turned_ns"]]
    assert max(abs(tick["correction_ppm"]) for tick in ticks) <= 500
    settled = [tick for tick in ticks if tick["place"] >= SETTLED_TICKS]
    first_bound_ns = ticks[0]["bound_ns"]
    assert not [tick for tick in settled if abs(tick["ahead_ns"]) > tick["bound_ns"] + first_bound_ns]
    for ppm in PHASES_PPM[1:]:
        last = [tick["correction_ppm"] for tick in settled if tick["ppm"] == ppm][-1]
        assert last == pytest.approx(ppm, abs=5)
