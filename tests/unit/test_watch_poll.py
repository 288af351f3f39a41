"""A poll of a watched VM's pages: what counts as having lain there at one instant."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pvclock.meter.findings import TIME_INFO
from pvclock.meter.watch.poll import take_poll
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.quantities import Gpa
from pvclock.readings import TimeInfo

LINE = (1000, 2000, 0x8000_0000, 0, 1)
EVENT = VmEvent(VmEventKind.STOP, 5)


class ChangingVm:
    """A VM of which each read of RAM, and of the offsets, gives the next of those that it was made with."""

    name, vcpus, tsc_hz, chunk_bytes, pause_s, means = "a VM", 3, None, 1, 0.0, "by hand"
    why_no_offsets = why_no_events = is_paused = None

    def __init__(self, looks: list[list[bytes]], offsets: list[tuple[int | None, ...]]) -> None:
        self.looks, self.offsets, self.asked = looks, offsets, list[tuple[Sequence[Gpa], int]]()
        self.ram = self

    def read_many(self, addresses: Sequence[Gpa], length: int) -> list[bytes]:
        """Give the next look."""
        self.asked.append((addresses, length))
        return self.looks.pop(0)

    def tsc_offsets(self) -> tuple[int | None, ...]:
        """Give the next offsets."""
        return self.offsets.pop(0)

    def take_events(self) -> list[VmEvent]:
        """Give one event."""
        return [EVENT]


def page(version: int) -> bytes:
    """Return a page as it lies in memory."""
    return TIME_INFO.pack(version, *LINE)


@pytest.mark.row("E3")
def test_what_changes_during_a_poll_does_not_count() -> None:
    """A page or an offset that is not the same at both looks, or a page that is being written, is None."""
    looks = [[page(2), page(2), page(5)], [page(2), page(4), page(5)]]
    vm = ChangingVm(looks, [(7, 7, None), (7, 8, None)])
    poll = take_poll(vm, [Gpa(0), Gpa(64), Gpa(128)])  # type: ignore[arg-type]  # what take_poll() uses of a VM
    assert poll.pages == (TimeInfo(2, *LINE), None, None)  # type: ignore[arg-type]  # units
    assert poll.tsc_offsets == (7, None, None)
    assert poll.events == (EVENT,)
    assert poll.begin < poll.middle < poll.end
    assert vm.asked == [([0, 64, 128], 32)] * 2
