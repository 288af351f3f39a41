"""How long a guest waits for the counter of reference time: KVM's, which is no exit to user space, and the engine's.

    pvclock lab -- python -m bench.hyperv_counter

Where the kernel serves no Hyper-V guests, only the engine's.  What passes between two readings, by the readings
themselves, has the guest's own loop in it on both sides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from statistics import median

from pvclock.kvm import open_kvm
from tests.kvm.hyperv_script import COUNTER, NEEDED, Script, on_engine, on_kernel
from tests.kvm.msr_script import Access, Trace

READINGS = 200
ROUNDS = 5
UNIT_US = 0.1


def main() -> int:
    """Read in turn, and print both medians and their ratio."""
    with open_kvm() as kvm:
        has_kernel = all(kvm.check_extension(name) for name in NEEDED)
    runs: dict[str, Callable[[Script], list[Trace]]] = {"engine": on_engine}
    if has_kernel:
        runs["kernel"] = on_kernel
    passed: dict[str, list[int]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            readings = [trace.value for trace in run([Access(COUNTER)] * READINGS)]
            passed[name] += [later - earlier for earlier, later in pairwise(readings)]
    us = {name: median(found) * UNIT_US for name, found in passed.items()}
    for name, each in us.items():
        print(f"{name}: {each:.1f} us a reading")
    if has_kernel:
        print(f"ratio {us['engine'] / us['kernel']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
