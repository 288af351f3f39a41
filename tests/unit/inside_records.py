"""Records as a probe makes them, from clocks whose truth is known: offsets, rates, and how long each reading takes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from math import floor
from typing import Any, Final

from pvclock.meter.inside import ProbeRecord, parse_record

TSC_HZ: Final = 2_900_000_000
BEGAN: Final = 5_000_000_000_000
INVARIANT: Final = [0x80000007, 0, 0, 0, 0, 1 << 8]
STABLE_FEATURES: Final = 1 << 24 | 1 << 3 | 1
PAGE: Final = {"cpu": 0, "version": 4, "mul": 2_961_853_280, "shift": -1, "flags": 1, "looks": 9, "stopped_looks": 0}


def text_words(text: str, count: int = 3) -> list[int]:
    """A text as CPUID's registers hold it."""
    padded = text.encode("ascii").ljust(count * 4, b"\0")
    return [int.from_bytes(padded[at : at + 4], "little") for at in range(0, count * 4, 4)]


def leaf(number: int, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> list[int]:
    """A leaf as the probe prints it."""
    return [number, 0, eax, ebx, ecx, edx]


def signature_leaf(signature: str, base: int = 0x40000000, last: int | None = None) -> list[int]:
    """The leaf that names a hypervisor."""
    return [base, 0, base + 1 if last is None else last, *text_words(signature)]


HYPERVISOR: Final = leaf(1, ecx=1 << 31)
KVM_LEAVES: Final = [HYPERVISOR, signature_leaf("KVMKVMKVM"), leaf(0x40000001, STABLE_FEATURES)]


# The exchange and the samples, simulated

Offset = Callable[[Fraction], Fraction]
"""A CPU's clock minus true time, in ns, at a true time in s."""


def still(ns: float) -> Offset:
    """An offset that stands still."""
    return lambda _: Fraction(ns)


def drifting(ppb: int, ns: int = 0) -> Offset:
    """An offset that grows by so many ns a second."""
    return lambda at: ns + at * ppb


def simulated_pairs(
    offsets: Sequence[Offset],
    hz: int = TSC_HZ,
    seconds: int = 1,
    seed: int = 1,
    travel_ns: tuple[int, int] = (30, 90),
    rounds: int = 12,
    lasts: Fraction = Fraction(0),
) -> list[dict[str, object]]:
    """What exchanges find between clocks of these offsets: each way of a cache line takes its own time.

    lasts: how much of its eighth an exchange takes; its rounds are anywhere in it.
    """
    chance = random.Random(seed)  # noqa: S311  # no secret
    pairs = []
    for a, b in combinations(range(len(offsets)), 2):
        slices: list[list[int]] = []
        for eighth in range(8):
            middle = Fraction(seconds * (2 * eighth + 1), 16)
            reach = int(lasts * seconds * 10**9 / 16)
            begun = [middle + Fraction(chance.randint(-reach, reach), 10**9) for _ in range(rounds)]
            low, high = _window(chance, (offsets[a], offsets[b]), hz, begun, travel_ns)
            slices.append([floor(BEGAN + middle * TSC_HZ), low, high])
        pairs.append({"cpus": [a, b], "rounds": 8 * rounds, "slices": slices})
    return pairs


def _window(
    chance: random.Random,
    offsets: tuple[Offset, Offset],
    hz: int,
    begun: Sequence[Fraction],
    travel_ns: tuple[int, int],
) -> tuple[int, int]:
    def reading(offset: Offset, at: Fraction) -> int:
        return floor((at * 10**9 + offset(at)) * hz / 10**9)

    (a, b), low, high = offsets, -(1 << 63), (1 << 63) - 1
    for now in begun:
        there, back = (Fraction(chance.randint(*travel_ns), 10**9) for _ in range(2))
        before, remote, after = reading(a, now), reading(b, now + there), reading(a, now + there + back)
        low, high = max(low, remote - after), min(high, remote - before)
    return low, high


def samples(hz: int, rate: Fraction = Fraction(1), seconds: int = 1, width_ns: int = 40) -> list[list[int]]:
    """Nine readings of a clock that runs at `rate` of its `hz`, each between two of the TSC."""
    found = []
    for eighth in range(9):
        tsc = BEGAN + eighth * seconds * TSC_HZ // 8
        clock = floor(Fraction(tsc - BEGAN, TSC_HZ) * rate * hz) + 77
        around = width_ns * TSC_HZ // 2 // 10**9
        found.append([tsc - around, clock, tsc + around])
    return found


def a_clock(name: str = "tsc", hz: int = TSC_HZ, pairs: Sequence[object] = (), **more: object) -> dict[str, object]:
    """A clock of which nothing was found, unless `more` says so."""
    steps = {"reads": 1000, "floor": hz // 10**6 or 1, "forward": None, "backward": None, "count": 0}
    clock = {"name": name, "hz": hz, "samples": samples(hz), "pairs": list(pairs), "warps": [], "cell_reads": 1_000_000}
    return {**clock, "steps": steps, **more}


def a_record(
    clocks: Sequence[Mapping[str, object]], cpus: int = 2, leaves: Sequence[object] = KVM_LEAVES, **more: object
) -> dict[str, Any]:
    """A whole record, as the probe would print it."""
    return {
        "schema": "pvclock.probe-record/1",
        "version": "0.9",
        "form": "linux",
        "tsc_hz": TSC_HZ,
        "tsc_hz_from": "monotonic_raw",
        "milliseconds": 1000,
        "cpus": [{"cpu": cpu, "apic_id": 2 * cpu} for cpu in range(cpus)],
        "cpuid": list(leaves),
        "pages": [],
        "clocks": list(clocks),
        **more,
    }


def a_kernel(**more: object) -> dict[str, object]:
    """A Linux guest with kvmclock, that complains of nothing."""
    available = ["kvm-clock", "tsc", "acpi_pm"]
    kernel = {"release": "6.12.1", "clocksource": "kvm-clock", "available": available, "command_line": "ro quiet"}
    return {**kernel, "complaints": [], **more}


def line(document: Mapping[str, object]) -> str:
    """The line that a probe prints."""
    return json.dumps(document, separators=(",", ":"))


def record_of(document: Mapping[str, object]) -> ProbeRecord:
    """That line, read."""
    return parse_record(line(document))
