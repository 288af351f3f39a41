"""Lines as a probe prints them: of a guest of KVM with two CPUs, whose clock is right or has one fault."""

from __future__ import annotations

import json
from typing import Any, Final

from pvclock.meter.inside.record import SCHEMA

TSC_HZ: Final = 2_000_000_000
BEGUN: Final = 10**12
SECONDS: Final = 10
EIGHTH: Final = TSC_HZ * SECONDS // 8

KVM_LEAVES: Final = [
    [1, 0, 0x50654, 0x20800, 0x81202000, 0x178BFBFF],
    [0x40000000, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D],
    [0x40000001, 0, 0x01000009, 0, 0, 0],
    [0x80000000, 0, 0x80000008, 0, 0, 0],
    [0x80000007, 0, 0, 0, 0, 0x100],
]
NO_STEPS: Final = {"reads": 1000, "floor": 100, "forward": None, "backward": None, "count": 0}


def clock(name: str, hz: int, low: int = -60, high: int = 65, **changes: object) -> dict[str, Any]:
    """One clock's part: CPU 1's reading less CPU 0's is from low to high, at all times."""
    samples = [
        [BEGUN + EIGHTH * eighth, EIGHTH * eighth * hz // TSC_HZ, BEGUN + EIGHTH * eighth + 40] for eighth in range(9)
    ]
    slices = [[BEGUN + EIGHTH * eighth + EIGHTH // 2, low, high] for eighth in range(8)]
    pairs = [{"cpus": [0, 1], "rounds": 80_000, "slices": slices}]
    found = {"pairs": pairs, "warps": [], "cell_reads": 1_000_000, "steps": NO_STEPS}
    return {"name": name, "hz": hz, "samples": samples, **found, **changes}


def document(**changes: object) -> dict[str, Any]:
    """A whole line as an object: nothing is wrong."""
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "form": "linux",
        "tsc_hz": TSC_HZ,
        "tsc_hz_from": "monotonic_raw",
        "milliseconds": SECONDS * 1000,
        "cpus": [{"cpu": 0, "apic_id": 0}, {"cpu": 1, "apic_id": 1}],
        "cpuid": KVM_LEAVES,
        "pages": [],
        "clocks": [clock("tsc", TSC_HZ, -120, 130), clock("monotonic", 10**9)],
        "kernel": {
            "release": "6.1.0-56-amd64",
            "clocksource": "kvm-clock",
            "available": ["kvm-clock", "tsc", "acpi_pm"],
            "command_line": "quiet",
            "complaints": None,
        },
        **changes,
    }


def faulty_document() -> dict[str, Any]:
    """CPU 1's CLOCK_MONOTONIC is 1.2 ms behind, and went back for who had read CPU 0's."""
    warps = [{"from": 0, "to": 1, "count": 5000, "largest": 1_199_950}]
    behind = clock("monotonic", 10**9, -1_200_060, -1_199_940, warps=warps)
    raw = clock("monotonic_raw", 10**9, pairs=[], cell_reads=0)
    return document(clocks=[clock("tsc", TSC_HZ, -120, 130), behind, raw])


def line(of: dict[str, Any]) -> str:
    """As it is printed."""
    return json.dumps(of, separators=(",", ":")) + "\n"


CLEAN: Final = line(document())
FAULTY: Final = line(faulty_document())
