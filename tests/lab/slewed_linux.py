"""A stock Linux whose clock follows its host's CLOCK_MONOTONIC, while that is slewed: for the lab, as slewed_host.py.

    .venv/bin/pvclock lab --writable docs -- python -m tests.lab.slewed_linux --output docs/stock-linux.json
    .venv/bin/python -m tests.lab.slewed_linux --draw docs/stock-linux.json

The guest reads its CLOCK_REALTIME between two readings of its TSC; that is the host's TSC, so each reading can be held
against the host's own clock of that instant, within a microsecond.
"""

from __future__ import annotations

import argparse
import json
import time
from bisect import bisect
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Final, NamedTuple

from pvclock import Reference
from pvclock.clock.guest_clock import GuestClock
from pvclock.lab.kernel import find_kernel
from pvclock.meter.drift.drawing import stacked
from pvclock.meter.report.model import Axis, Line, Mark, Plot, Unit
from pvclock.quantities import NS_PER_S, HostTsc
from pvclock.readings import Sample
from tests.guest_programs import Triple
from tests.kvm.guest_clocks import ClockSampler, Offsets
from tests.kvm.stock_linux import StockLinux
from tests.lab.slewed_host import slew_host

PHASES_PPM: Final = (0, 200, -300, 0)
PHASE_S: Final = 8.0
TICK_S: Final = 0.25
"""A change of the host's rate is noticed after three ticks."""
HOST_INTERVAL_S: Final = 0.02
GUEST_INTERVAL_MS: Final = 500
REFRESHES: Final = 100
"""In a phase, at once."""


class Recorded(NamedTuple):
    """A run.

    phases: s since its beginning, and the host's slew in ppm from there on.  host: s, and how far its CLOCK_MONOTONIC
    was ahead of its TSC, in ns since the beginning.  guest: s, and the same for the guest's CLOCK_REALTIME, at least
    and at most.  boot_offset_ns: by how much that was ahead of the host's CLOCK_REALTIME when it began.
    """

    phases: list[tuple[float, int]]
    host: list[tuple[float, float]]
    guest: list[tuple[float, float, float]]
    boot_offset_ns: float

    def apart_ns(self) -> list[tuple[float, float]]:
        """s, and the guest's clock less the host's, both since the beginning: the middle of what is known."""
        s, ns = zip(*self.host, strict=True)
        return [(at, (low + high) / 2 - _between(s, ns, at)) for at, low, high in self.guest]


def record() -> Recorded:
    """Boot it, and slew the host's clock through all phases."""
    with StockLinux(find_kernel(None, lambda _text: None), reference="monotonic", tick_interval_s=TICK_S) as guest:
        clock = guest.machine.clock
        assert clock is not None
        sampler = ClockSampler(guest, GUEST_INTERVAL_MS, timer_ms=0, points_of="realtime")
        utc = clock.backend.sample(Reference.REALTIME)
        try:
            phases, samples = _slew_through(clock)
        finally:
            slew_host(0)
        points = sampler.finish()["realtime"].points
        return _against_tsc(clock, phases, samples, points, utc)


def _slew_through(clock: GuestClock) -> tuple[list[tuple[HostTsc, int]], list[Sample]]:
    """Phases, as the TSC of their beginnings and ppm, and samples of the host's clock."""
    phases, samples = [], []
    for ppm in PHASES_PPM:
        slew_host(ppm)
        phases.append((clock.backend.stamps().tsc, ppm))
        for _ in range(REFRESHES):
            clock.refresh()
        end_s = time.monotonic() + PHASE_S
        while time.monotonic() < end_s:
            samples.append(clock.backend.sample(Reference.MONOTONIC))
            time.sleep(HOST_INTERVAL_S)
    samples.append(clock.backend.sample(Reference.MONOTONIC))
    return phases, samples


def _against_tsc(
    clock: GuestClock,
    phases: list[tuple[HostTsc, int]],
    samples: list[Sample],
    points: Sequence[Triple],
    utc: Sample,
) -> Recorded:
    """The run, with each clock's first value as 0."""
    hz, begin, offsets = clock.backend.tsc_hz, samples[0], Offsets(clock)

    def nominal_ns(tsc: int) -> Fraction:
        return Fraction((tsc - begin.tsc) * NS_PER_S, hz)

    def seconds(tsc: int) -> float:
        return float(nominal_ns(tsc) / NS_PER_S)

    read = [(offsets.host_tsc(each.before), each.ns, offsets.host_tsc(each.after)) for each in points]
    spans = [
        (before, ns - nominal_ns(after), ns - nominal_ns(before))
        for before, ns, after in read
        if samples[0].tsc <= before <= samples[-1].tsc
    ]
    zero_ns = spans[0][1]
    return Recorded(
        [(seconds(tsc), ppm) for tsc, ppm in phases],
        [(seconds(each.tsc), float(each.ns - begin.ns - nominal_ns(each.tsc))) for each in samples],
        [(seconds(tsc), float(low - zero_ns), float(high - zero_ns)) for tsc, low, high in spans],
        float(zero_ns - (utc.ns - nominal_ns(utc.tsc))),
    )


def _between(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """The straight line's value at `at`, which is among x."""
    place = min(max(bisect(x, at), 1), len(x) - 1)
    part = (at - x[place - 1]) / (x[place] - x[place - 1])
    return y[place - 1] + part * (y[place] - y[place - 1])


# The picture


def draw(recorded: Recorded) -> str:
    """Both clocks against the host's TSC, and their difference, as an SVG file."""
    marks = tuple(Mark(s, "slew", f"the host's clock is slewed by {ppm} ppm") for s, ppm in recorded.phases[1:])
    time_axis, ahead = Axis("Time", Unit.S), Axis("Ahead of the host's TSC", Unit.NS)
    host_s, host_ns = zip(*recorded.host, strict=True)
    guest_s, low, high = zip(*recorded.guest, strict=True)
    middle = [(least + most) / 2 for least, most in zip(low, high, strict=True)]
    lines = (Line("host, CLOCK_MONOTONIC", host_s, host_ns), Line("guest, CLOCK_REALTIME", guest_s, middle, low, high))
    apart_s, apart_ns = zip(*recorded.apart_ns(), strict=True)
    apart = Line("guest less host", apart_s, apart_ns)
    return stacked(
        [
            Plot("A stock Linux and its host, whose clock is slewed", time_axis, ahead, lines, marks),
            Plot("Their difference", time_axis, Axis("Guest less host", Unit.NS), (apart,), marks),
        ]
    )


def main() -> None:
    """Record a run, or draw one."""
    parser = argparse.ArgumentParser(prog="tests.lab.slewed_linux", description="a stock Linux that follows its host")
    parser.add_argument("--output", type=Path, help="where the run goes (default: standard output)")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="draw what --output has written, as an SVG beside it")
    options = parser.parse_args()
    if options.draw:
        recorded = Recorded(**json.loads(options.draw.read_text(encoding="ascii")))
        options.draw.with_suffix(".svg").write_text(draw(recorded), encoding="utf-8")
        return
    text = json.dumps(record()._asdict()) + "\n"
    if options.output:
        options.output.write_text(text, encoding="ascii")
    else:
        print(text, end="")  # noqa: T201  # what it is for


if __name__ == "__main__":
    main()
