"""What a watcher costs: the load that polling a guest's pages puts on the host, and how fast the guest's own loop is.

    .venv/bin/python -m bench.watch_load [--seconds S] [--rounds N] [--json]

The guest is clockprobe in a process of its own, one vCPU that reads its clock all the time.  For each means, number of
pages and interval its rate without a watcher and with one are taken in turn, and the medians of the rounds are shown:
by the clock on the wall, which needs two free CPUs, and by the CPU time that the guest had.  Each has a CPU of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from statistics import median
from typing import Final, NamedTuple

from pvclock.errors import PvclockError
from pvclock.host.kvm_debugfs import TscOffsetFiles
from pvclock.host.process import Process
from pvclock.host.vmm_process import open_vmm
from pvclock.meter.findings import TIME_INFO, time_info
from pvclock.meter.watch.process_ram import ProcessRam
from pvclock.meter.watch.ram_blocks import blocks_of
from pvclock.meter.watch.ram_means import open_ram
from pvclock.meter.watch.vm import GuestRam
from pvclock.payloads import probe
from pvclock.quantities import NS_PER_S, Gpa
from tests.kvm.watched_machine import watched_machine

PAGES: Final = (1, 100)
INTERVALS_S: Final = (0.01, 0.001)
STRIDE: Final = 64


class Load(NamedTuple):
    """One way to watch.

    cpu_percent: of one CPU, what the watcher takes.  polls_per_s: as many as there were.  guest_rate: how often the
    guest read its clock in a second meanwhile, against the same without a watcher just before.  guest_cpu_rate: in a
    second of its own CPU time, which does not go by what else runs on this host.
    """

    means: str
    pages: int
    interval_s: float
    cpu_percent: float
    polls_per_s: float
    guest_rate: float
    guest_cpu_rate: float


class Run(NamedTuple):
    """The watcher's CPU time and polls in a second; the guest's reads in a second, and in one of its CPU time."""

    cpu: float
    polls: float
    reads: float
    cpu_reads: float


class Watched(NamedTuple):
    """The guest's process, and its RAM by one means."""

    process: Process
    ram: GuestRam

    def reads(self) -> int:
        """How often the guest has read its clock."""
        return probe.read_record(self.ram, 0).reads  # type: ignore[arg-type]  # units

    def cpu_s(self) -> float:
        """What all threads of its process have run, of which the vCPU's is nearly all."""
        return (
            sum(int(self.process.read(f"task/{tid}/schedstat").split()[0]) for tid in self.process.threads()) / NS_PER_S
        )


def run(guest: Watched, seconds: float, poll: Callable[[], object] | None, interval_s: float) -> Run:
    """Poll every interval_s for `seconds`, or sleep as long."""
    begin, cpu, before, guest_cpu_s = time.monotonic(), time.process_time(), guest.reads(), guest.cpu_s()
    polls = 0
    while poll is not None and (due := begin + polls * interval_s) < begin + seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        poll()
        polls += 1
    time.sleep(max(0.0, begin + seconds - time.monotonic()))
    cpu, took, reads = time.process_time() - cpu, time.monotonic() - begin, guest.reads() - before
    return Run(cpu / took, polls / took, reads / took, reads / (guest.cpu_s() - guest_cpu_s))


def poll_of(ram: GuestRam, pages: int) -> Callable[[], object]:
    """Return what looks at the pages twice and unpacks them, as a poll of a watch does."""
    addresses = [Gpa(probe.time_page_address(0) + STRIDE * page) for page in range(pages)]

    def poll() -> object:
        first = ram.read_many(addresses, TIME_INFO.size)
        second = ram.read_many(addresses, TIME_INFO.size)
        return [time_info(page) for page, other in zip(second, first, strict=True) if page == other]

    return poll


def separate(guest: Process) -> None:
    """Give the guest the last CPU, and the watcher the others: neither takes the other's time."""
    *others, last = sorted(os.sched_getaffinity(0))
    for tid in guest.threads():
        os.sched_setaffinity(tid, {last})
    os.sched_setaffinity(0, others or {last})


def measure(guests: Sequence[Watched], seconds: float, rounds: int) -> list[Load]:
    """Watch in each way in turn, `rounds` times."""
    ways = list(product(guests, PAGES, INTERVALS_S))
    taken: list[list[tuple[Run, Run]]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, (guest, pages, interval_s) in enumerate(ways):
            alone = run(guest, seconds, None, interval_s)
            taken[way].append((alone, run(guest, seconds, poll_of(guest.ram, pages), interval_s)))
    return [
        Load(
            guest.ram.means,
            pages,
            interval_s,
            100 * median(watched.cpu for _, watched in runs),
            median(watched.polls for _, watched in runs),
            median(watched.reads / alone.reads for alone, watched in runs),
            median(watched.cpu_reads / alone.cpu_reads for alone, watched in runs),
        )
        for (guest, pages, interval_s), runs in zip(ways, taken, strict=True)
    ]


def noise(guest: Watched, seconds: float, rounds: int) -> tuple[float, float]:
    """Return the least and the most that two runs without a watcher differ by, as guest_cpu_rate."""
    runs = [run(guest, seconds, None, 1.0).cpu_reads for _ in range(2 * rounds)]
    ratios = [later / earlier for earlier, later in zip(runs[::2], runs[1::2], strict=True)]
    return min(ratios), max(ratios)


def offset_us(offsets: TscOffsetFiles, readings: int = 200) -> float:
    """Return what a reading of one vCPU's TSC offset takes."""
    begin = time.perf_counter()
    for _ in range(readings):
        offsets.read()
    return (time.perf_counter() - begin) / readings * 1e6


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if it could not be done."""
    parser = argparse.ArgumentParser(prog="bench.watch_load", description="what a watcher of a guest's clock costs")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each run (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="of each way to watch (default: 7)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        with watched_machine("engine", vcpus=1) as machine, open_vmm(machine.pid) as vmm:
            separate(vmm.process)
            blocks = blocks_of(vmm.process)
            rams = [open_ram(vmm.process, blocks), ProcessRam(vmm.process, blocks)]
            guests = [Watched(vmm.process, ram) for ram in rams]
            loads = measure(guests, options.seconds, options.rounds)
            least, most = noise(guests[0], options.seconds, options.rounds)
            offsets = TscOffsetFiles(vmm)
            one_offset_us = None if offsets.why else offset_us(offsets)
    except PvclockError as error:
        print(f"bench.watch_load: {error}", file=sys.stderr)
        return 1
    if options.json:
        found = {"loads": [load._asdict() for load in loads], "noise": [least, most], "tsc_offset_us": one_offset_us}
        print(json.dumps(found, indent=2))
        return 0
    for load in loads:
        print(
            f"{load.means}, {load.pages} pages every {load.interval_s * 1000:g} ms: {load.cpu_percent:.1f} % of a CPU, "
            f"{load.polls_per_s:.0f} polls/s, the guest's rate x {load.guest_rate:.3f}, "
            f"by its CPU time x {load.guest_cpu_rate:.4f}"
        )
    print(f"by its CPU time two runs without a watcher differ by x {least:.4f} to x {most:.4f}")
    print(offsets.why if one_offset_us is None else f"a TSC offset: {one_offset_us:.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
