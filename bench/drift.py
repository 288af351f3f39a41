"""Two VMs at once on one host, kernel kvmclock and engine, and how far their guests' clocks drift from the host's.

    .venv/bin/python -m bench.drift --seconds 600 --output docs/drift

Both guests run clockprobe, which reads its clock all the time.  Once a second each is stopped for some us, and its
newest reading, a pair (tsc, ns), is laid beside the reference at that very TSC.  At the end both clocks are made to
re-anchor in every way there is, and the step that a guest sees is what its next reading has more than the page of
before would have given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pvclock import GuestClock, Machine, PvclockError, Reference, Sample, TimeInfo
from pvclock._core import read_time_info
from pvclock.host.this_host import HostBackend
from pvclock.kvm import open_kvm
from pvclock.kvm.tsc_offset import TscOffsets, probe_tsc_offsets
from pvclock.meter.observe import finish, newest_reading, probe_machine, shown_by, wait_until_reading
from pvclock.payloads import probe
from pvclock.quantities import NS_PER_S
from pvclock.timekeeping.sampling import Sampler

INTERVAL_S: Final = 1
SETTLE_S: Final = 20
"""The engine's clock has found its reference's rate by then; that time is shown, and not counted."""
ENDS: Final = 10
"""Readings at either end, whose median counts."""
REFRESHES: Final = 1000

KVM_CLOCK_REALTIME: Final = 1 << 2
KVM_PUBLISHES_S: Final = 0.3
"""KVM may publish 100 ms late."""
CLOCK_NAMES: Final = {Reference.RAW: "MONOTONIC_RAW", Reference.MONOTONIC: "MONOTONIC"}


class Reading(NamedTuple):
    """A guest's clock beside the reference: how far ahead (ns) since the beginning, and how far that can be wrong."""

    s: float
    ahead_ns: float
    bound_ns: float


class Watched:
    """A machine whose guest's clock is watched."""

    def __init__(self, name: str, machine: Machine, sampler: Sampler, tsc_hz: int) -> None:
        self.name = name
        self.machine = machine
        self.readings: list[Reading] = []
        self.steps_ns: list[int] = []
        """At each look: what the guest's clock had more than the page of before would have given."""
        self.reanchors: dict[str, int] = {}
        """The step in ns of each way to re-anchor the clock."""
        self._sampler = sampler
        self._tsc_hz = tsc_hz
        self._first: tuple[int, int, float] | None = None
        self._last: Sample | None = None
        self._tsc_offset = _tsc_offset(machine)
        self._page = self.page()

    def look(self, before: TimeInfo | None = None) -> None:
        """Take a reading; steps are against the page `before`, by default that of the look before."""
        sample = self._sampler.sample()
        tsc, ns = newest_reading(self.machine)
        last, self._last = self._last, sample
        # The reference's own rate, by the last second: far from nominal, a ms between sample and reading would show.
        ns_per_tick = (sample.ns - last.ns) / (sample.tsc - last.tsc) if last else NS_PER_S / self._tsc_hz
        since_ns = (tsc - self._tsc_offset - sample.tsc) * ns_per_tick
        first_ns, first_sample_ns, first_since_ns = self._first = self._first or (ns, sample.ns, since_ns)
        reference_ns = sample.ns - first_sample_ns + since_ns - first_since_ns
        self.readings.append(Reading(reference_ns / NS_PER_S, ns - first_ns - reference_ns, sample.bound_ns + 1))
        self.steps_ns.append(ns - shown_by(before or self._page, tsc))
        self._page = self.page()

    def reanchor(self, name: str, do: Callable[[], object], wait_s: float = 0.0) -> None:
        """Do what re-anchors the clock, and keep the step that the guest sees after so long."""
        before = self.page()
        do()
        time.sleep(wait_s)
        tsc, ns = newest_reading(self.machine)
        self.reanchors[name] = ns - shown_by(before, tsc)

    @property
    def settled(self) -> list[Reading]:
        """The readings after SETTLE_S."""
        return [reading for reading in self.readings if reading.s >= SETTLE_S]

    @property
    def rate_ppb(self) -> tuple[float, float]:
        """How much faster than the reference it was, and how far that can be wrong."""
        begin, end = self.settled[:ENDS], self.settled[-ENDS:]
        span_s = _middle(end, "s") - _middle(begin, "s")
        rise_ns = _middle(end, "ahead_ns") - _middle(begin, "ahead_ns")
        return rise_ns / span_s, (_middle(end, "bound_ns") + _middle(begin, "bound_ns")) / span_s

    def page(self) -> TimeInfo:
        """The guest's page as it is."""
        return read_time_info(self.machine.memory, probe.time_page_address(0))


def _tsc_offset(machine: Machine) -> int:
    """Guest TSC less host TSC; on a host that does not honour offsets there is none."""
    if machine.clock is not None:
        seen = machine.clock.tsc(0).offset
    else:
        with open_kvm() as kvm:
            if probe_tsc_offsets(kvm) is not TscOffsets.HONOURED:
                return 0
        with machine.runner.quiesce(None):
            seen = machine.vcpus[0].get_tsc_offset()
    return seen if seen < 1 << 63 else seen - (1 << 64)


def _middle(readings: list[Reading], field: str) -> float:
    return float(median(getattr(reading, field) for reading in readings))


def watch(seconds: float, reference: Reference, progress: Callable[[float, list[Watched]], None]) -> list[Watched]:
    """Watch both VMs for `seconds` after the settling, and then re-anchor them."""
    with ExitStack() as resources:
        machines = [resources.enter_context(probe_machine(clock, 1)) for clock in ("kernel", "engine")]
        tsc_hz = machines[0].vcpus[0].get_tsc_khz() * 1000
        for machine in machines:
            machine.start()
            wait_until_reading(machine)
        backend = HostBackend(tsc_hz)
        sampler = Sampler(lambda: backend.sample(reference))
        kernel, engine = watched = [
            Watched(name, machine, sampler, tsc_hz)
            for name, machine in zip(("kernel kvmclock", f"pvclock, {reference}"), machines, strict=True)
        ]
        clock = engine.machine.clock
        assert clock is not None
        clock.follow(reference)
        begin = due = time.monotonic()
        while (passed := time.monotonic() - begin) < SETTLE_S + seconds or not kernel.settled:
            kernel.look()
            before = engine.page()  # a rate that is corrected is no step, so compare at once
            clock.tick()
            engine.look(before)
            progress(passed, watched)
            due += INTERVAL_S
            time.sleep(max(due - time.monotonic(), 0))
        reanchor_kernel(kernel, resources)
        reanchor_engine(engine, clock)
        for machine in machines:
            finish(machine)
    return watched


def reanchor_kernel(kernel: Watched, resources: ExitStack) -> None:
    """Make KVM anchor its clock anew in every way there is, the one that shows all of the drift first."""
    machine, vm, vcpu = kernel.machine, kernel.machine.vm, kernel.machine.vcpus[0]

    def set_clock(*, with_realtime: bool) -> None:
        now = vm.get_clock()
        flags = KVM_CLOCK_REALTIME if with_realtime else 0
        vm.set_clock(now["clock"], flags=flags, realtime=now["realtime"] if with_realtime else 0)

    def refresh_master_clock() -> None:
        with machine.runner.quiesce(None):
            vcpu.set_tsc_offset(vcpu.get_tsc_offset())

    kernel.reanchor("master clock refreshed (TSC offset set to what it is)", refresh_master_clock, KVM_PUBLISHES_S)
    kernel.reanchor(
        "KVM_GET_CLOCK, KVM_SET_CLOCK with KVM_CLOCK_REALTIME", lambda: set_clock(with_realtime=True), KVM_PUBLISHES_S
    )
    kernel.reanchor("KVM_GET_CLOCK, KVM_SET_CLOCK", lambda: set_clock(with_realtime=False), KVM_PUBLISHES_S)
    kernel.reanchor("vCPU hot-plugged", lambda: resources.enter_context(vm.create_vcpu(1)), KVM_PUBLISHES_S)


def reanchor_engine(engine: Watched, clock: GuestClock) -> None:
    """The same of the engine's clock."""

    def refresh_often() -> None:
        for _ in range(REFRESHES):
            clock.refresh()

    def pause_and_resume() -> None:
        engine.machine.pause()
        time.sleep(0.1)
        engine.machine.resume("advance")

    engine.reanchor("refresh()", clock.refresh)
    engine.reanchor(f"{REFRESHES} refresh()", refresh_often)
    engine.reanchor('pause(), resume("advance") after 0.1 s', pause_and_resume)


# Results


def report(watched: list[Watched], reference: Reference) -> dict[str, object]:
    """Everything that was found, for JSON."""
    return {
        "reference": str(reference),
        "clocks": [
            {
                "name": each.name,
                "rate_ppb": each.rate_ppb[0],
                "rate_bound_ppb": each.rate_ppb[1],
                "least_step_ns": min(each.steps_ns),
                "most_step_ns": max(each.steps_ns),
                "reanchors_ns": each.reanchors,
                "readings": [reading._asdict() for reading in each.readings],
            }
            for each in watched
        ],
    }


def table(watched: list[Watched], reference: Reference) -> Table:
    """The report for people."""
    shown_table = Table("", *(each.name for each in watched), title=f"Guests' clocks against {reference}")
    rates = (f"{rate:+.3f} ppb, within {bound:.3f}" for rate, bound in (each.rate_ppb for each in watched))
    shown_table.add_row("rate", *rates)
    days = (f"{each.rate_ppb[0] * 86_400 / 1e6:+.3f} ms" for each in watched)
    shown_table.add_row("in a day", *days)
    steps = (f"{min(each.steps_ns)} to {max(each.steps_ns)} ns" for each in watched)
    shown_table.add_row("steps meanwhile, true to 1 ns", *steps)
    for place, each in enumerate(watched):
        for name, step_ns in each.reanchors.items():
            shown_table.add_row(name, *("" if other != place else f"{step_ns:+d} ns" for other in range(len(watched))))
    return shown_table


def plot(watched: list[Watched], reference: Reference, output: Path) -> list[Path]:
    """Draw how far ahead each clock was, as PNG and SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    both, close = figure.subplots(2, sharex=True)
    colors = ["tab:red", "tab:blue"]
    for each, color in zip(watched, colors, strict=True):
        s, ahead_ns = [reading.s for reading in each.readings], [reading.ahead_ns for reading in each.readings]
        rate, bound = each.rate_ppb
        both.plot(s, [ns / 1000 for ns in ahead_ns], color=color, label=f"{each.name}: {rate:+.2f} ppb, ±{bound:.2f}")
    both.set(ylabel="ahead of the host, us", title=f"Two guests' clocks against CLOCK_{CLOCK_NAMES[reference]}")
    both.legend()
    engine = watched[-1]
    close.errorbar(
        [reading.s for reading in engine.readings],
        [reading.ahead_ns for reading in engine.readings],
        [reading.bound_ns for reading in engine.readings],
        fmt=".",
        color=colors[-1],
        ecolor="lightsteelblue",
        label=f"{engine.name}, with the bound of each reading",
    )
    close.axvspan(0, SETTLE_S, color="whitesmoke", label="settling")
    close.set(xlabel="s", ylabel="ahead of the host, ns")
    close.legend()
    files = [output.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=110)
    return files


def main(arguments: list[str] | None = None) -> int:
    """Measure, show and write; 1 if it could not be done."""
    parser = argparse.ArgumentParser(prog="bench.drift", description="how far guests' clocks drift, and step")
    parser.add_argument("--seconds", type=float, default=600, help="how long to watch (default: %(default)s)")
    parser.add_argument("--reference", type=Reference, choices=list(Reference)[:2], default=Reference.RAW)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, .png and .svg; the latter two need matplotlib")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if options.seconds < 2 * ENDS * INTERVAL_S:
        parser.error(f"{options.seconds:g} s is too short for {ENDS} readings at either end; at least {2 * ENDS} s")
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=errors) as progress:
            task = progress.add_task("watching", total=SETTLE_S + options.seconds)

            def show(passed_s: float, watched: list[Watched]) -> None:
                ahead = ", ".join(f"{each.name} {each.readings[-1].ahead_ns:+.0f} ns" for each in watched)
                progress.update(task, completed=passed_s, description=ahead)

            watched = watch(options.seconds, options.reference, show)
    except PvclockError as error:
        errors.print(f"bench.drift: {error}", highlight=False)
        return 1
    found = report(watched, options.reference)
    if options.json:
        print(json.dumps(found))
    else:
        Console().print(table(watched, options.reference))
    if options.output:
        options.output.with_suffix(".json").write_text(json.dumps(found) + "\n", encoding="ascii")
        try:
            plot(watched, options.reference, options.output)
        except ImportError:
            errors.print("no plot without matplotlib; to get it: pip install 'pvclock[plot]'", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
