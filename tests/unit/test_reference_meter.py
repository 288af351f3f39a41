"""The rows of Hyper-V's reference time: each of them is right for a right clock, and wrong for a wrong one."""

from __future__ import annotations

from typing import Final

import pytest

from pvclock.meter.reference_time import ReferenceObservation, compare_reference_time
from pvclock.payloads.hyperv_probe import HvRecord, violations
from pvclock.providers.hyperv.scales import page_scale

HZ: Final = 2_596_132_000
SCALE: Final = page_scale(HZ) or 0
NOTHING: Final = HvRecord._make([0] * len(HvRecord._fields))
RIGHT: Final = NOTHING._replace(rounds=10, reads=320, triples=10, fallbacks=2, scale=SCALE, sequence=3)
ROWS: Final = (
    "page: scale",
    "page: rate by the TSC",
    "page: sequence",
    "readings of the page",
    "page, counter, page",
    "backward, torn or out of order",
    "page against guest time",
)


def observed(*records: HvRecord, server: str = "engine", ahead_ns: int | None = 150) -> ReferenceObservation:
    """Two vCPUs' findings, the second one's as given."""
    return ReferenceObservation(server, HZ, [RIGHT, *(records or (RIGHT,))], ahead_ns)


def wrong(*observations: ReferenceObservation) -> list[str]:
    """The names of the rows that are not as they should be."""
    return [check.name for check in compare_reference_time(observations) if not check.ok]


@pytest.mark.row("E13", "H-51")
def test_a_right_clock_is_right_in_every_row() -> None:
    """Each server's figures are in its column, with a dash where there are none, and every row says yes."""
    checks = compare_reference_time([observed()])
    assert tuple(check.name for check in checks) == ROWS
    assert all(check.ok and check.why for check in checks)
    assert [check.figures["engine"].text for check in checks] == [
        f"{SCALE:#018x}",
        "-0.000000 ppb",
        "3",
        "636",
        "20",
        "0",
        "+150 ns",
    ]
    assert {check.figures["qemu"].text for check in checks} == {"-"}
    both = compare_reference_time([observed(), observed(server="qemu", ahead_ns=None)])
    assert all(check.ok for check in both)
    assert [check.figures["qemu"].text for check in both][-2:] == ["0", "-"]


@pytest.mark.row("E13", "E9")
@pytest.mark.parametrize(
    ("change", "row"),
    [
        ({"scale": SCALE + 1}, "page: scale"),
        ({"sequence": 0}, "page: sequence"),
        ({"sequence": 2**32 - 1}, "page: sequence"),
        ({"fallbacks": 320}, "readings of the page"),
        ({"triples": 0}, "page, counter, page"),
        *(({kind: 1}, "backward, torn or out of order") for kind in violations(NOTHING)),
    ],
)
def test_a_wrong_vcpu_is_named(change: dict[str, int], row: str) -> None:
    """What is wrong on the second vCPU alone is one row's, whichever server it is."""
    for server in ("engine", "qemu"):
        assert wrong(observed(RIGHT._replace(**change), server=server)) == [row]


@pytest.mark.row("E13", "H-52", "E4")
@pytest.mark.parametrize(("wrong_by", "is_wrong"), [(0, False), (2**20, False), (2**27, True), (-(2**27), True)])
def test_a_wrong_rate_is_named(wrong_by: int, is_wrong: bool) -> None:
    """A scale that is more than 1 ppb off is the rate's row, as VirtualBox's would be."""
    records = [RIGHT._replace(scale=SCALE + wrong_by)] * 2
    assert wrong(ReferenceObservation("engine", HZ, records)) == ["page: rate by the TSC"] * is_wrong


@pytest.mark.row("E4")
@pytest.mark.parametrize("ahead_ns", [201, -201, 10**9])
def test_a_page_that_shows_another_time_is_named(ahead_ns: int) -> None:
    """More than 2 units from the same VM's guest time is wrong; 2 units are not."""
    assert wrong(observed(ahead_ns=ahead_ns)) == ["page against guest time"]
    assert wrong(observed(ahead_ns=200), observed(server="qemu", ahead_ns=-200)) == []
