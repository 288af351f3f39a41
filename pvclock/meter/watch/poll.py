"""One look at all pages of a VM, and what belongs to it: the raw material of a watch.

Pages are read twice.  What was the same both times lay there at the instant between, so such pages can be compared
with each other; and TSC offsets that were the same before and after were those of that instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pvclock._counter import read_tsc
from pvclock.meter.findings import TIME_INFO, time_info
from pvclock.meter.watch.vm import VmEvent, WatchedVm
from pvclock.quantities import Gpa, HostTsc
from pvclock.readings import TimeInfo

__all__ = ["Poll", "steady", "take_poll"]


class Poll(NamedTuple):
    """One look.

    begin, middle, end: the host's TSC before the first look, between both, and after the second.
    pages: each vCPU's as it lay there at `middle`; None if it was changed during the poll, or is being written.
    tsc_offsets: each vCPU's at `middle`; None if it was changed during the poll, or cannot be read.
    events: what the VMM told since the last poll.
    """

    begin: HostTsc
    middle: HostTsc
    end: HostTsc
    pages: tuple[TimeInfo | None, ...]
    tsc_offsets: tuple[int | None, ...]
    events: tuple[VmEvent, ...]


def take_poll(vm: WatchedVm, addresses: Sequence[Gpa]) -> Poll:
    """Look at the pages at `addresses`, one for each vCPU.  Errors of the VM and its RAM."""
    offsets = vm.tsc_offsets()
    begin = HostTsc(read_tsc())
    first = vm.ram.read_many(addresses, TIME_INFO.size)
    middle = HostTsc(read_tsc())
    second = vm.ram.read_many(addresses, TIME_INFO.size)
    end = HostTsc(read_tsc())
    offsets_after = vm.tsc_offsets()
    return Poll(
        begin,
        middle,
        end,
        tuple(steady(*pair) for pair in zip(first, second, strict=True)),
        tuple(one if one == other else None for one, other in zip(offsets, offsets_after, strict=True)),
        tuple(vm.take_events()),
    )


def steady(first: bytes, second: bytes) -> TimeInfo | None:
    """A page that was looked at twice; None if it was changed between, or is being written."""
    info = time_info(second)
    return info if first == second and info.version % 2 == 0 else None
