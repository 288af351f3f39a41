"""examples/vmm.c, as docs/c.md says to build it: a VMM in C whose guest's clock changes its rate while it is read."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from pvclock.host.linux import host_clocksource
from tests.waiting import HANG_S

pytestmark = pytest.mark.kvm

ROOT = Path(__file__).parents[2]
COMPILE = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'pvclock' / 'include'}")
CHANGES = 1000
REPORT = re.compile(
    r"vCPU (\d+): (\d+) rate changes, (\d+) readings on (\d+) lines, (\d+) backward, (\d+) beyond the bound, "
    r"([-+][\d.]+) to ([-+][\d.]+) ns off"
)
UNTRUSTED = "vmm: TSC: this host's kernel does not trust it"


class Report(NamedTuple):
    """What the example prints of a vCPU."""

    vcpu: int
    changes: int
    readings: int
    lines_read: int
    backward: int
    beyond_bound: int
    least_ns: float
    most_ns: float


def run_vmm(scratch: Path, *flags: str, compiler: str = "gcc") -> tuple[int, list[Report]]:
    """Build the example and run it; returns its exit status and what it found."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}: apt-get install {compiler}")
    program = scratch / "vmm"
    subprocess.run([compiler, *COMPILE, *flags, ROOT / "examples" / "vmm.c", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=HANG_S, check=False)
    if host_clocksource() != "tsc":
        assert (done.returncode, done.stdout, done.stderr.strip()) == (2, "", UNTRUSTED)
        pytest.skip("this host's kernel does not trust its TSC, and the example has said so")
    matches = [REPORT.fullmatch(line) for line in done.stdout.splitlines()]
    assert all(matches), done
    assert not done.stderr
    return done.returncode, [
        Report(*map(int, match.groups()[:6]), *map(float, match.groups()[6:])) for match in matches if match
    ]


@pytest.mark.row("E11", "E9", "K-08", "K-14")
@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_vmm_in_c_changes_the_rate_under_its_guest(tmp_path: Path, compiler: str, vcpus: int) -> None:
    """Over 1000 changes no reading of the guest goes back, and each is within the bound of the exact timeline."""
    status, reports = run_vmm(tmp_path, f"-DVCPUS={vcpus}", compiler=compiler)
    assert status == 0, reports
    assert [report.vcpu for report in reports] == list(range(vcpus))
    assert max(report.lines_read for report in reports) > 1  # one of them may wait for a CPU all the while
    for report in reports:
        assert report.changes == CHANGES
        assert report.readings > report.lines_read > 0
        assert (report.backward, report.beyond_bound) == (0, 0)
        assert report.least_ns <= 0 <= report.most_ns <= 3  # a page is never fast, however old


@pytest.mark.row("E11")
def test_the_order_that_suggests_itself_is_found_out(tmp_path: Path) -> None:
    """A timeline that turns before the publish leaves its guest beyond the bound, and the example says so."""
    status, reports = run_vmm(tmp_path, "-DNAIVE")
    assert status == 1, reports
    assert reports[0].beyond_bound > 0
    assert reports[0].backward == 0
