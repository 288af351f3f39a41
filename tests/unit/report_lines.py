"""JSON lines as a watch, a drift and a clock's log write them, for tests of what a report makes of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from pvclock import GuestClock
from pvclock.meter.report.model import Intervals, Plot, Report, Section, Table
from pvclock.meter.report.sources import read
from tests.unit.clocks import a_clock

__all__ = [
    "drift_begin",
    "drift_reading",
    "drift_result",
    "event_lines",
    "found",
    "of_kind",
    "plot",
    "reading",
    "rows",
    "section_of",
    "step",
    "vmm_event",
    "watch_result",
    "written",
]

HZ: Final = 2_596_132_000
UTC: Final = "2026-11-27T12:00:00.000000Z"
PAGE: Final = {"version": 2, "tsc_timestamp": 1, "system_time": 1, "tsc_to_system_mul": 1, "tsc_shift": -1, "flags": 1}


def found(**changes: object) -> dict[str, Any]:
    """A watch's first line."""
    began = {
        "vm": "QEMU 7.2.22, process 17, 2 vCPUs",
        "vcpus": 2,
        "tsc_hz": HZ,
        "host_tsc_hz": HZ,
        "reference": "raw",
        "why_no_offsets": None,
        "why_no_events": None,
    }
    return _watch("found", 0.0, **{"why": "as Linux lays them", **began, **changes})


def reading(at_s: float, *ahead_ns: float | None, bound_ns: float = 10.0) -> dict[str, Any]:
    """A second's readings, a vCPU each; None: unknown."""
    each = [
        {"vcpu": vcpu, "ahead_ns": ns, "bound_ns": None if ns is None else bound_ns, "why": None if ns else "no page"}
        for vcpu, ns in enumerate(ahead_ns)
    ]
    return _watch("reading", at_s, reference="raw", readings=each)


def step(at_s: float, vcpu: int, step_ns: int | None, *what: str, **changes: object) -> dict[str, Any]:
    """A step, and what the VMM told meanwhile, a second apart."""
    events = [{"what": each, "utc": f"2026-11-27T12:00:{second:02}Z"} for second, each in enumerate(what)]
    more = {"bound_ns": None if step_ns is None else 2, "seen_ns": None, "seen_bound_ns": None, "basis": "offsets"}
    return _watch(
        "step",
        at_s,
        **{
            "vcpu": vcpu,
            "step_ns": step_ns,
            **more,
            "lines": 1,
            "before": PAGE,
            "after": PAGE,
            "events": events,
            **changes,
        },
    )


def vmm_event(at_s: float, what: str) -> dict[str, Any]:
    """What the VMM told."""
    return _watch("event", at_s, what=what)


def watch_result(verdict: str | None = None, *reasons: str, **changes: object) -> dict[str, Any]:
    """A watch's last line."""
    budgets = {"max_step_ns": 1000, "max_drift_ppb": None, "allow_pauses": False, "tsc_unchanged": False}
    result = {
        "vm": "QEMU 7.2.22, process 17, 2 vCPUs",
        "reference": "raw",
        "summary": {"polls": 900, "duration_ns": 9_000_000_000},
        "rates": [{"vcpu": vcpu, "rate_ppb": -29.0, "bound_ppb": 16.0, "why": None} for vcpu in range(2)],
        "host_troubles": [],
        "budgets": {**budgets, "verdict": verdict, "reasons": list(reasons)},
        **changes,
    }
    return {"schema": "pvclock.watch/1", "version": "0.1.0", "ok": verdict != "broken", "result": result}


def _watch(kind: str, at_s: float, **fields: object) -> dict[str, Any]:
    return {"schema": "pvclock.watch/1", "kind": kind, "at_s": at_s, "utc": UTC, **fields}


def drift_begin(**changes: object) -> dict[str, Any]:
    """A drift's first line, of two clocks."""
    clocks = [{"clock": "engine", "name": "pvclock, raw"}, {"clock": "kernel", "name": "kernel kvmclock"}]
    return _drift("begin", 0.0, **{"reference": "raw", "interval_s": 1.0, "settle_s": 2.0, "clocks": clocks, **changes})


def drift_reading(at_s: float, ahead_ns: Mapping[str, float | None], step_ns: float = 0) -> dict[str, Any]:
    """An interval's readings."""
    each = [
        {"clock": clock, "ahead_ns": ns, "bound_ns": 20.0, "step_ns": step_ns, "step_bound_ns": 2}
        for clock, ns in ahead_ns.items()
    ]
    return _drift("reading", at_s, readings=each)


def drift_result(**changes: object) -> dict[str, Any]:
    """A drift's last line."""
    clocks = [
        {"clock": "engine", "name": "pvclock, raw", "rate_ppb": 0.25, "bound_ppb": 0.5, "least_step_ns": 0}
        | {"most_step_ns": 1, "reanchors_ns": {"MSR written again": 1}},
        {"clock": "kernel", "name": "kernel kvmclock", "rate_ppb": -52.0, "bound_ppb": 0.5, "least_step_ns": -1}
        | {"most_step_ns": 1, "reanchors_ns": {"MSR written again": -1400, "KVM_SET_CLOCK": 12}},
    ]
    result = {"reference": "raw", "seconds": 8.0, "settle_s": 2.0, "clocks": clocks, **changes}
    return {"schema": "pvclock.drift/1", "version": "0.1.0", "ok": True, "result": result}


def _drift(kind: str, at_s: float, **fields: object) -> dict[str, Any]:
    return {"schema": "pvclock.drift/1", "kind": kind, "at_s": at_s, "utc": UTC, **fields}


def event_lines(steps: int = 60, seed: int = 1) -> tuple[list[dict[str, Any]], GuestClock]:
    """The events of a clock that lived on a simulated host, and the clock: pauses, skips, slews and dilations."""
    source = random.Random(seed)  # noqa: S311  # no secret
    clock, backend, _ = a_clock(HZ, tsc=10**12)
    for _ in range(steps):
        backend.advance(ns=source.randint(1000, 10**9))
        match source.randrange(5):
            case 0:
                clock.pause()
                backend.advance(ns=source.randint(1000, 10**9))
                clock.resume(source.choice(("freeze", "advance", "slew:max_ppm=500")))
            case 1:
                clock.skip(source.randint(1, 10**7))
            case 2:
                clock.slew(source.randint(-1000, 1000))
            case 3:
                clock.dilate(source.randint(1, 3), 2)
            case _:
                clock.refresh()
    return [json.loads(line) for line in clock.events.json_lines().splitlines()], clock


def written(path: Path, lines: Iterable[Mapping[str, object]]) -> str:
    """Write JSON lines; the file's name."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def section_of(path: Path, lines: Iterable[Mapping[str, object]]) -> Section:
    """What a report says of a file of these lines, which is one section."""
    (section,) = report_of(path, lines).sections
    return section


def report_of(path: Path, lines: Iterable[Mapping[str, object]]) -> Report:
    """The report of a file of these lines."""
    return read([written(path, lines)], lambda _bytes, _name: None)


def of_kind(section: Section, kind: type[Plot | Intervals | Table], title: str) -> Any:  # noqa: ANN401  # a part
    """The one part of a section with that title."""
    (part,) = (part for part in section.parts if isinstance(part, kind) and part.title == title)
    return part


def plot(section: Section, title: str) -> Plot:
    """A section's plot with that title."""
    found_plot = of_kind(section, Plot, title)
    assert isinstance(found_plot, Plot)
    return found_plot


def rows(section: Section, title: str) -> tuple[tuple[str, ...], ...]:
    """The rows of a section's table."""
    table = of_kind(section, Table, title)
    assert isinstance(table, Table)
    return table.rows
