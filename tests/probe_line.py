"""The probe's line of JSON, found in what was printed, and what it says of clocks and of offsets between CPUs."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from pvclock.meter.inside import FindingCode, judge, parse_record

__all__ = [
    "ONE_CPU",
    "Line",
    "Window",
    "clock_of",
    "one_line",
    "slices",
    "slices_ns",
    "vcpus_named",
    "vcpus_off",
    "windows",
]

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
    assert parsed["schema"] == "pvclock.probe-record/1"
    return parsed


def clock_of(line: Line, name: str = "tsc") -> Line:
    """What the line says of one clock."""
    (clock,) = [clock for clock in line["clocks"] if clock["name"] == name]
    found: Line = clock
    return found


def slices(line: Line, name: str = "tsc") -> dict[tuple[int, int], list[Window]]:
    """Of each pair of CPUs, what each slice of the run that has a round leaves of the offset."""
    pairs = {tuple(pair["cpus"]): pair["slices"] for pair in clock_of(line, name)["pairs"]}
    return {(a, b): [Window(*bounds) for _, *bounds in each if bounds] for (a, b), each in pairs.items()}


def slices_ns(line: Line, name: str = "tsc") -> list[Window]:
    """The same of all pairs, in ns."""
    hz = clock_of(line, name)["hz"]
    every = [window for of_pair in slices(line, name).values() for window in of_pair]
    return [Window(low * 10**9 // hz, high * 10**9 // hz) for low, high in every]


def windows(line: Line, name: str = "tsc") -> dict[tuple[int, int], Window]:
    """Of each pair of CPUs, what all slices of the run together leave of the offset."""
    return {
        pair: Window(max(low for low, _ in found), min(high for _, high in found))
        for pair, found in slices(line, name).items()
    }


def vcpus_off(line: Line) -> set[int]:
    """The vCPUs whose TSC is shown to differ from that of every other one; with two, both or none."""
    vcpus = range(len(line["cpus"]))
    differ = {pair for pair, window in windows(line).items() if 0 not in window}
    return {one for one in vcpus if all(tuple(sorted((one, other))) in differ for other in vcpus if other != one)}


def vcpus_named(line: Line) -> set[int]:
    """The vCPUs that the judge's findings about the TSC's offsets name."""
    findings = judge(parse_record(json.dumps(line))).findings
    return {cpu for each in findings if (each.code, each.clock) == (FindingCode.OFFSET, "tsc") for cpu in each.cpus}
