"""The pages of a guest in a real QEMU are found in its RAM, by the frequency that QEMU tells and by no other."""

from __future__ import annotations

import pytest

from pvclock import GuestTsc, read_tsc
from pvclock.errors import PagesNotFound
from pvclock.meter.findings import read_pages
from pvclock.meter.watch.page_search import SearchTerms, find_pages
from pvclock.payloads import probe
from qemu_glue.guest import qemu_guest
from tests.guest_ram import MemoryRam

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.row("E3")]

FEATURES = 0x0100_0009


def test_pages_in_a_qemu() -> None:
    """One page for each vCPU; with a wrong frequency there are none, and the one that pages show is told."""
    with qemu_guest(FEATURES) as guest:
        guest.start()
        ram = MemoryRam(guest.vmm.memory)
        terms = SearchTerms(guest.tsc_hz, newest_tsc=GuestTsc(read_tsc()))
        found = find_pages(ram, guest.vcpus, terms)
        assert found.pages == tuple(map(probe.time_page_address, range(guest.vcpus)))
        khz = read_pages(guest.vmm.memory, 1)[0].shown_khz
        with pytest.raises(PagesNotFound, match=f"{khz} kHz"):
            find_pages(ram, guest.vcpus, terms._replace(tsc_hz=guest.tsc_hz * 1001 // 1000))
