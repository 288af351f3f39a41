"""Both kinds of host clock can be had in the lab: TSCs that its kernel trusts, and TSCs that it does not."""

from pathlib import Path

import pytest

from tests.lab.laboratory import run_lab

pytestmark = [pytest.mark.lab, pytest.mark.row("style"), pytest.mark.usefixtures("kernel")]

LOOK = "sleep 3; cat /sys/devices/system/clocksource/clocksource0/current_clocksource; nproc"


@pytest.mark.parametrize(
    ("options", "trusted"), [((), False), (("--tsc-reliable",), True)], ids=["unstable", "tsc=reliable"]
)
def test_clock_regimes_of_two_cpus(scratch: Path, options: tuple[str, ...], trusted: bool) -> None:
    """With two CPUs the lab's kernel distrusts its TSCs, unless it is told that they are reliable."""
    done = run_lab("--cpus", "2", *options, "--timeout", "120", "--", "sh", "-c", LOOK, scratch=scratch)
    clocksource, cpus = done.stdout.split()
    assert (clocksource == "tsc", cpus) == (trusted, "2")
