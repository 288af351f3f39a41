"""A running guest's pages are found in its memory, without knowing where it has them."""

from __future__ import annotations

from typing import Literal

import pytest

from pvclock import GuestTsc, read_tsc
from pvclock.meter.findings import time_info
from pvclock.meter.machine_guest import MachineGuest
from pvclock.meter.watch.page_choice import PageChoice
from pvclock.meter.watch.page_search import SearchTerms, find_pages, is_legal
from pvclock.payloads import probe
from tests.guest_ram import MemoryRam

pytestmark = [pytest.mark.kvm, pytest.mark.row("E3")]


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("clock", ["engine", "kernel"])
def test_clockprobes_pages_are_found(clock: Literal["engine", "kernel"], vcpus: int) -> None:
    """While its vCPUs read them, beside the copies that clockprobe keeps of them."""
    with MachineGuest(clock, vcpus) as guest:
        guest.start()
        terms = SearchTerms(guest.tsc_hz, newest_tsc=GuestTsc(read_tsc()))
        found = find_pages(MemoryRam(guest.machine.memory), vcpus, terms)
        assert found.pages == tuple(map(probe.time_page_address, range(vcpus)))
        assert found.searched_bytes == sum(length for _, length in guest.machine.memory.slots)
        assert found.even_and_zero_pads >= found.legal >= vcpus + len(found.others)


def test_what_moves_settles_it() -> None:
    """A pause of the guest changes its pages, and its copies of them no earlier."""
    with MachineGuest("engine") as guest:
        guest.start()
        memory, terms = guest.machine.memory, SearchTerms(guest.tsc_hz)
        choice = PageChoice.of(find_pages(MemoryRam(memory), guest.vcpus, terms), terms)
        assert not choice.is_settled
        pages = choice.pages
        choice = choice.after([time_info(memory.read(gpa, 32)) for gpa in choice.places])
        guest.pause()
        guest.resume()
        seen = [time_info(memory.read(gpa, 32)) for gpa in choice.places]
        assert all(is_legal(info, terms) for info in seen[: len(pages)])
        choice = choice.after(seen)
        assert (choice.pages, choice.is_settled) == (pages, True)
