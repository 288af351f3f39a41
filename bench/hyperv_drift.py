"""How far Hyper-V's reference time drifts in a guest on the kernel's page and in one on the engine's.

    .venv/bin/pvclock lab --writable docs -- python -m bench.hyperv_drift --seconds 30 --output docs/hyperv-drift.json
    .venv/bin/python -m bench.hyperv_drift --draw docs/hyperv-drift.json

The guests, one after the other, are woken by a synthetic timer, and write down their TSC and what their page holds.
That is compared with the TSC itself, divided by the frequency that the guest is told: so the host's clocks have no part
in it.  A page's scale says how it goes on for ever; the picture shows a day.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from pvclock import ClockScale
from pvclock.providers.hyperv.scales import kvm_scale, page_scale
from tests.kvm.hyperv_script import Script, on_engine, on_kernel
from tests.kvm.msr_script import Access, Await, Trace
from tests.oracle import ReferenceTscPage

IA32_TSC: Final = 0x10
TSC_FREQUENCY: Final = 0x40000022
PAGE, SIM_PAGE, SLOT = 0x5000, 0x6000, 0x6200
PERIOD: Final = 5_000_000
"""Half a second, in units of 100 ns."""
SET_UP: Final = (
    *(Access(0x1B, 0xFEE00D00), Access(0x80F, 0x1FF)),  # x2APIC, enabled
    *(Access(0x40000080, 1), Access(0x40000083, SIM_PAGE | 1), Access(0x40000092, 0x40)),  # SynIC, its page, SINT 2
    *(Access(0x40000021, PAGE | 1), Access(TSC_FREQUENCY)),
    *(Access(0x400000B1, PERIOD), Access(0x400000B0, 0x20003)),  # a periodic timer that tells SINT 2
)
EACH: Final = (Await(SLOT), Access(IA32_TSC, None, PAGE), Access(0x40000084, 0, SLOT, bytes(4)))
TICK_S: Final = 1.0
DAY_S: Final = 86_400
COLORS: Final = {"kernel": "tab:red", "engine": "tab:blue"}
FREQUENCIES_HZ: Final = (
    *(1_000_000_000, 2_000_000_000, 2_100_000_000, 2_400_000_000, 2_596_132_000, 2_600_000_000, 2_893_202_000),
    *(2_900_000_000, 3_000_000_000, 3_187_199_000, 3_600_000_000, 4_000_000_000, 4_999_999_000),
)


class Reading(NamedTuple):
    """One reading: s since the first one, and by how many ns it is ahead of the TSC before it is cut to 100 ns."""

    s: float
    exact_ns: float
    sequence: int
    scale: int


def measure(run: Callable[[Script], list[Trace]], seconds: float) -> tuple[int, list[Reading]]:
    """The guest's TSC frequency, and its readings."""
    traces = run([*SET_UP, *EACH * int(seconds * 10_000_000 / PERIOD)])
    hz = traces[SET_UP.index(Access(TSC_FREQUENCY))].value
    seen = [(trace.value, ReferenceTscPage.parse(trace.data[:24])) for trace in traces[len(SET_UP) + 1 :: len(EACH)]]
    (first_tsc, first), *_ = seen
    first_units = units(first, first_tsc)

    def ahead_ns(tsc: int, value: Fraction) -> float:
        return float((value - first_units) * 100 - Fraction((tsc - first_tsc) * 10**9, hz))

    return hz, [
        Reading(
            (tsc - first_tsc) / hz,
            ahead_ns(tsc, units(page, tsc)),
            page.sequence,
            page.scale,
        )
        for tsc, page in seen
    ]


def units(page: ReferenceTscPage, tsc: int) -> Fraction:
    """What the page says at `tsc`, before the guest's product is cut to whole units."""
    return Fraction(tsc * page.scale, 1 << 64) + page.offset


def error_ppb(scale: int, hz: int) -> float:
    """By how much a page with that scale is fast."""
    return float((Fraction(scale * hz, 10_000_000 << 64) - 1) * 10**9)


def rate_errors(hz: int) -> tuple[float, float]:
    """KVM's, and the engine's, in ppb; for a frequency that has a page."""
    kernel, engine = kvm_scale(ClockScale.from_hz(hz)), page_scale(hz)
    assert kernel is not None
    assert engine is not None
    return error_ppb(kernel, hz), error_ppb(engine, hz)


def show_rates(more_hz: Sequence[int]) -> None:
    """Print the rate errors as a table of Markdown."""
    print("| TSC (Hz) | KVM's page (ppb) | in a day | the engine's (ppb) |\n|---|---|---|---|")
    for hz in sorted({*FREQUENCIES_HZ, *more_hz}):
        kernel, engine = rate_errors(hz)
        print(f"| {hz:,} | {kernel:+.4f} | {kernel * DAY_S / 1000:+.1f} us | {engine:+.1e} |")


def draw(found: dict[str, dict[str, object]], output: Path) -> None:
    """Both clocks as measured, and what their pages make of a day."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    measured, day = figure.subplots(2)
    for name, each in found.items():
        readings = [Reading(*reading) for reading in each["readings"]]  # type: ignore[attr-defined]
        s, color = [reading.s for reading in readings], COLORS[name]
        ppb = error_ppb(readings[0].scale, int(each["tsc_hz"])) if name == "kernel" else 0.0  # type: ignore[call-overload]
        measured.plot(s, [reading.exact_ns for reading in readings], ".-", ms=3, color=color, label=f"{name}, measured")
        day.plot([0, 24], [0, ppb * DAY_S / 1000], color=color, label=f"{name}, going on like this: {ppb:+.3f} ppb")
    worst_us = -(10**9) / 2**31 * DAY_S / 1000
    day.fill_between([0, 24], [0, worst_us], color="mistyrose", label="the kernel at other frequencies")
    measured.set(
        xlabel="s",
        ylabel="ahead of the TSC, ns",
        title="Hyper-V's reference time in two guests, before it is cut to 100 ns",
    )
    day.set(xlabel="hours", ylabel="ahead of the TSC, us")
    for axes in (measured, day):
        axes.legend(fontsize="small")
    figure.savefig(output, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or draw what was measured, or show a table of rates."""
    parser = argparse.ArgumentParser(prog="bench.hyperv_drift", description="how far Hyper-V's reference time drifts")
    parser.add_argument("--seconds", type=float, default=30, help="of each guest, 50 at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where to write the readings")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="draw what --output has written, as a PNG beside it")
    parser.add_argument("--rates", type=int, nargs="*", metavar="HZ", help="show rate errors, of these, too")
    options = parser.parse_args(arguments)
    if options.rates is not None:
        show_rates(options.rates)
    elif options.draw:
        draw(json.loads(options.draw.read_text(encoding="ascii")), options.draw.with_suffix(".png"))
    else:
        found = {}
        for name, run in (("kernel", on_kernel), ("engine", partial(on_engine, tick_interval_s=TICK_S))):
            hz, readings = measure(run, options.seconds)
            found[name] = {"tsc_hz": hz, "readings": readings}
            print(f"{name}: TSC {hz} Hz, scale off by {error_ppb(readings[-1].scale, hz):+.6f} ppb, {readings[-1]}")
        if options.output:
            options.output.write_text(json.dumps(found) + "\n", encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main())
