"""What VirtualBox does and profile "virtualbox" does not: the right values, for when each vCPU has a line of its own.

docs/interfaces.md says what is done instead.  All pages of a VM share one anchor and are written together, at a pause's
end if it is paused; VirtualBox writes one vCPU's page at a time, once.
"""

from __future__ import annotations

import pytest

from pvclock import GuestClock, GuestMemory, SimulatedBackend
from tests.unit.test_saved_unit import FEATURES, a_clock, a_virtualbox_unit

SYSTEM_TIME = 0x4B564D01
ONE_ANCHOR = "deviates: pages share one anchor, so none has a line of its own that is written once"
GUEST_TSC = 1_015_000_000_007


@pytest.mark.row("V-11")
@pytest.mark.xfail(strict=True, reason=ONE_ANCHOR)
@pytest.mark.parametrize(("hz", "ns"), [(2_500_000_000, 406_000_000_002), (5_000_000_000, 1_439_649_528_664)])
def test_ns_count_from_tsc_0(hz: int, ns: int) -> None:
    """ns are TSC x 10^9 / Hz, rounded down, whenever the VM was started; the frequency is cut to 32 bits (T8)."""
    backend = SimulatedBackend(hz, tsc=10**12)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend, profile="virtualbox")
    backend.tsc = GUEST_TSC
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    assert clock.reading(0)[:2] == (GUEST_TSC, ns)


@pytest.mark.row("V-20", "V-38")
@pytest.mark.xfail(strict=True, reason=ONE_ANCHOR)
def test_a_load_writes_each_page_once() -> None:
    """While the VM does not run, a load writes each page at once: saved version (even), TSC and ns, and STABLE."""
    clock = a_clock(profile="virtualbox")
    clock.pause()
    clock.interface.load_unit(a_virtualbox_unit())
    pages = [clock.page(vcpu) for vcpu in range(2)]
    assert [page and (page.version, page.tsc_timestamp, page.system_time, page.flags) for page in pages] == [
        (8, 5 * 10**6, 7 * 10**9, 3),
        (20, 6 * 10**6, 8 * 10**9, 1),
    ]


@pytest.mark.row("V-20")
@pytest.mark.xfail(strict=True, reason=ONE_ANCHOR)
def test_a_registration_writes_its_own_page_alone() -> None:
    """While the VM runs, a registration writes that vCPU's page and no other's."""
    backend = SimulatedBackend(10**9)
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 2, backend=backend, profile="virtualbox", features=FEATURES)
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    before = memory.read(0x2000, 32)
    backend.advance(ns=10**9)
    clock.write_msr(1, SYSTEM_TIME, 0x3001)
    assert memory.read(0x2000, 32) == before
