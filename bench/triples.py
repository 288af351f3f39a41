"""A million times page, counter, page: two vCPUs read Hyper-V's reference time while all that may change it does.

    .venv/bin/python -m bench.triples --triples 1000000

Not a benchmark of speed, though it prints how long a triple takes.  hvprobe counts each reading below an earlier one of
any vCPU, and whatever else no reference time may show.  1 if it has found any.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import cycle

from pvclock.payloads.hyperv_probe import violations
from tests.kvm.hyperv_guest import OPERATIONS, finish, operate, reading_guest, records_of

EACH = 500
"""Triples of each vCPU during one operation, repeated all the while."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and print what was found, a line each vCPU."""
    parser = argparse.ArgumentParser(prog="bench.triples", description="page <= counter <= page, while time changes")
    parser.add_argument("--triples", type=int, default=10**6, help="of both vCPUs together (default: %(default)s)")
    options = parser.parse_args(arguments)
    begin, times = time.monotonic(), dict.fromkeys((each.__name__ for each in OPERATIONS), 0)
    with reading_guest() as machine:
        for operation in cycle(OPERATIONS):
            if sum(record.triples for record in records_of(machine)) >= options.triples:
                break
            times[operation.__name__] += operate(machine, operation, EACH)
        records = finish(machine)
    seconds = time.monotonic() - begin
    print(f"{seconds:.0f} s; " + ", ".join(f"{name} {count}" for name, count in times.items()))
    for record in records:
        read = f"{record.triples} triples, {record.reads} readings of the page, {record.sequences} sequences"
        print(f"vCPU {record.apic_id}: {read}, {record.fallbacks} by the counter instead, {violations(record)}")
    return int(any(any(violations(record).values()) for record in records))


if __name__ == "__main__":
    sys.exit(main())
