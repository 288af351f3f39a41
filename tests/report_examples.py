"""Reports made by hand, for tests of how they are drawn."""

import math
import random
from itertools import accumulate

from pvclock.meter.report.model import (
    Axis,
    Interval,
    Intervals,
    Line,
    Mark,
    Plot,
    Report,
    Section,
    Standing,
    Table,
    Unit,
)

TIME = Axis("time", Unit.S)
AHEAD = Axis("ahead of the reference", Unit.NS)
HOSTILE = '</script><script>document.title="taken"</script>"><img src=x onerror=alert(1)>\u202egnp.exe\x00\ud800'
LONG_WORD = "w" * 10_000


def watched(points: int = 600) -> Plot:
    """Two vCPUs of a guest over ten minutes, with a pause, steps and a gap."""
    noise = random.Random(17)  # noqa: S311 - the same drawing each time
    x = [600 * it / (points - 1) for it in range(points)]
    walk = list(accumulate(noise.gauss(0, 3) for _ in x))
    first = [it + 0.08 * at for it, at in zip(walk, x, strict=True)]
    second = [math.nan if 300 < at < 330 else it + 40 + noise.gauss(0, 4) for it, at in zip(first, x, strict=True)]
    return Plot(
        "Guest ahead of the reference",
        TIME,
        AHEAD,
        (
            Line("vCPU 0", x, first, [it - 14 for it in first], [it + 14 for it in first]),
            Line("vCPU 1", x, second, [it - 9 for it in second], [it + 9 for it in second]),
        ),
        (
            Mark(120.0, "step", "vCPU 1 stepped by +38 ns, within 2 ns", Standing.BAD, size=38),
            Mark(210.0, "pause", "STOP, RESUME 30 s later", until=240.0, size=30e9),
            Mark(330.0, "page", "a new line of vCPU 1", Standing.GOOD),
            Mark(470.0, "step", "vCPU 0 stepped, by how much is unknown", Standing.OPEN),
        ),
        "The truth is within the bands. vCPU 1 was not read from 300 s to 330 s.",
    )


def rates() -> Plot:
    """A rate that holds until the next one, whose bound shrinks."""
    x = [10.0 * it for it in range(1, 61)]
    y = [-29.0 + 4 * math.sin(it / 60) for it in x]
    bounds = [20e3 / it for it in x]
    low, high = ([value + sign * bound for value, bound in zip(y, bounds, strict=True)] for sign in (-1, 1))
    return Plot("Rate", TIME, Axis("rate against raw", Unit.PPB), (Line("vCPU 0", x, y, low, high, is_stepped=True),))


def deviations() -> Plot:
    """Allan deviations of three clocks, on two logarithmic axes."""
    taus = [2.0**it for it in range(12)]
    lines = tuple(
        Line(name, taus, [factor * 1e-9 * (1 / tau + tau / 3e4) for tau in taus])
        for name, factor in (("pvclock, raw", 1.0), ("kernel kvmclock", 6.0), ("QEMU", 30.0))
    )
    axes = Axis("averaged over", Unit.S, is_log=True), Axis("Allan deviation", Unit.NONE, is_log=True)
    return Plot("Allan deviation", *axes, lines)


def promises() -> Intervals:
    """What was seen, beside 0."""
    rows = (
        Interval("vCPU 0 against vCPU 1", -12.0, 9.0, -1.0, Standing.GOOD),
        Interval("pvclock against KVM", 4.0, 31.0, 17.0, Standing.BAD),
        Interval("a name that is longer than there is room for it", -40.0, 52.0, None, Standing.OPEN),
        Interval("TSC", 2.0, 2.0),
    )
    return Intervals("Differences", Axis("difference", Unit.NS), rows, "Bars are bounds, not deviations.")


def findings() -> Table:
    """Rows of texts and numbers."""
    rows = (
        ("step", "vCPU 1", "+38 ns", "at 120.004 s, against the TSC; the page's line had not changed for 110 s"),
        ("pause", "all", "-30.002 s", "STOP to RESUME"),
        ("step", "vCPU 0", "unknown", "its TSC may have been changed"),
    )
    standings = (Standing.BAD, Standing.PLAIN, Standing.OPEN)
    return Table("Findings", ("what", "of", "size", "how"), rows, standings)


def example() -> Report:
    """A report with all kinds of parts and standings."""
    watch = Section(
        "A guest's clock, watched from outside",
        "clock.jsonl",
        "vCPU 1's clock stepped by +38 ns, 37 ns more than its budget.",
        Standing.BAD,
        ("Watched for 600 s, 60 000 looks; the longest stall took 64 ms.",),
        (watched(), rates(), findings()),
    )
    drift = Section(
        "Drift of three clocks",
        "drift.jsonl",
        "All rates are within 100 ppb.",
        Standing.GOOD,
        (),
        (deviations(), promises()),
    )
    doctor = Section(
        "This host", "doctor.json", "Kept open by a bound.", Standing.OPEN, ("TSC is the clocksource.",), ()
    )
    return Report("Clocks of vm1", "2026-11-26 14:03 UTC", "1.0", (watch, drift, doctor))


def hostile() -> Report:
    """A report in which each text tries to be more than text."""
    text = HOSTILE + LONG_WORD
    axis = Axis(text, Unit.NS)
    line = Line(text, [0.0, 1.0, 2.0], [1.0, math.inf, -1.0], [0.0, -math.inf, -2.0], [2.0, math.inf, 0.0])
    marks = tuple(Mark(it / 20, f"{it}{text}", text, Standing.BAD) for it in range(20))
    parts = (
        Plot(text, axis, axis, (line,), marks, text),
        Intervals(text, axis, (Interval(text, -1.0, math.inf, 0.0, Standing.OPEN),), text),
        Table(text, (text, text), ((text, text),), (Standing.BAD,)),
    )
    section = Section(text, text, text, Standing.BAD, (text,), parts)
    return Report(text, text, text, (section, section))


def of_one_plot(plot: Plot) -> Report:
    """A report of a plot alone."""
    section = Section("Measured", "measured.jsonl", "", Standing.PLAIN, (), (plot,))
    return Report("A plot", "2026-11-26 14:03 UTC", "1.0", (section,))
