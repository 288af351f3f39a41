"""The probe's line of JSON, found in what a console printed, and what it says of offsets between vCPUs."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from pvclock.meter.inside import FindingCode, judge, parse_record

__all__ = ["ONE_CPU", "Window", "clock_of", "one_line", "vcpus_named", "vcpus_off", "windows"]

Line = dict[str, Any]

ONE_CPU: Final = "vCPUs that share one CPU exchange at its time slices only; the lab with two CPUs runs this"
"""Why a test of offsets is skipped there."""


class Window(NamedTuple):
    """b's clock is ahead of a's by no less than `low` and no more than `high`, in the clock's units."""

    low: int
    high: int

    def __contains__(self, offset: object) -> bool:
        """Whether the offset can be this one."""
        return isinstance(offset, int) and self.low <= offset <= self.high


def one_line(console: str) -> Line:
    """The object of the only line that is one."""
    (line,) = [line for line in console.splitlines() if line.startswith("{")]
    parsed: Line = json.loads(line)
    assert parsed["schema"] == "pvclock.probe/1"
    return parsed


def clock_of(line: Line, name: str = "tsc") -> Line:
    """What the line says of one clock."""
    (clock,) = [clock for clock in line["clocks"] if clock["name"] == name]
    found: Line = clock
    return found


def windows(line: Line, name: str = "tsc") -> dict[tuple[int, int], Window]:
    """Of each pair of vCPUs, what all slices of the run together leave of the offset."""
    result = {}
    for pair in clock_of(line, name)["pairs"]:
        bounds = [(low, high) for _, low, high in (each for each in pair["slices"] if len(each) == 3)]
        a, b = pair["cpus"]
        result[a, b] = Window(max(low for low, _ in bounds), min(high for _, high in bounds))
    return result


def vcpus_off(line: Line) -> set[int]:
    """The vCPUs whose TSC is shown to differ from that of every other one; with two, both or none."""
    vcpus = range(len(line["cpus"]))
    differ = {pair for pair, window in windows(line).items() if 0 not in window}
    return {one for one in vcpus if all(tuple(sorted((one, other))) in differ for other in vcpus if other != one)}


def vcpus_named(line: Line) -> set[int]:
    """The vCPUs that the judge's findings about the TSC's offsets name."""
    findings = judge(parse_record(json.dumps(line))).findings
    return {cpu for each in findings if (each.code, each.clock) == (FindingCode.OFFSET, "tsc") for cpu in each.cpus}
