"""Lines as a probe prints them: of a guest of KVM with two CPUs, whose clock is right or has one fault."""

from __future__ import annotations

from typing import Any, Final

from tests.unit.inside_records import BEGAN, TSC_HZ, a_clock, a_kernel, a_record, leaf, line, samples, signature_leaf

__all__ = ["CLEAN", "FAULTY", "KVM_LEAVES", "clock", "document", "faulty_document", "line", "one_cpu_document"]

SECONDS: Final = 10
KVM_LEAVES: Final = [
    leaf(1, 0x50654, 0x20800, 0x81202000, 0x178BFBFF),
    signature_leaf("KVMKVMKVM"),
    leaf(0x40000001, 0x01000009),
    leaf(0x80000007, edx=0x100),
]
NO_STEPS: Final = {"reads": 1000, "floor": 100, "forward": None, "backward": None, "count": 0}


def clock(name: str, hz: int, low: int = -60, high: int = 65, **changes: object) -> dict[str, Any]:
    """One clock's part: CPU 1's reading minus CPU 0's is from low to high, at all times."""
    slices = [[BEGAN + TSC_HZ * SECONDS * (2 * eighth + 1) // 16, low, high] for eighth in range(8)]
    pairs = [{"cpus": [0, 1], "rounds": 80_000, "slices": slices}]
    more = {"samples": samples(hz, seconds=SECONDS), "steps": NO_STEPS, **changes}
    return a_clock(name, hz, more.pop("pairs", pairs), **more)  # type: ignore[arg-type]  # keys of the record


def document(**changes: object) -> dict[str, Any]:
    """A whole line as an object: nothing is wrong."""
    clocks = [clock("tsc", TSC_HZ, -174, 188), clock("monotonic", 10**9)]
    found = {"milliseconds": SECONDS * 1000, "kernel": a_kernel(complaints=None), "leaves": KVM_LEAVES}
    return a_record(clocks, **found) | changes  # type: ignore[arg-type]  # keys of the record


def one_cpu_document() -> dict[str, Any]:
    """What `taskset -c 0` leaves to measure: nothing was compared, and nothing is wrong."""
    clocks = [clock("tsc", TSC_HZ, pairs=[]), clock("monotonic", 10**9, pairs=[])]
    return document(cpus=[{"cpu": 0, "apic_id": 0}], clocks=clocks)


def faulty_document() -> dict[str, Any]:
    """CPU 1's CLOCK_MONOTONIC is 1.2 ms behind, and went back for who had read CPU 0's."""
    warps = [{"from": 0, "to": 1, "count": 5000, "largest": 1_199_950}]
    behind = clock("monotonic", 10**9, -1_200_060, -1_199_940, warps=warps)
    raw = clock("monotonic_raw", 10**9, pairs=[], cell_reads=0)
    return document(clocks=[clock("tsc", TSC_HZ, -174, 188), behind, raw])


CLEAN: Final = line(document()) + "\n"
FAULTY: Final = line(faulty_document()) + "\n"
