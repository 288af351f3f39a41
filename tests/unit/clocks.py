"""Clocks on a simulated host for the tests, and what the oracle makes of their pages."""

from __future__ import annotations

from fractions import Fraction

from pvclock import GuestClock, GuestMemory, SimulatedBackend, TimeInfo
from pvclock.clock.guest_clock import MAX_AGE_S
from tests import oracle

SYSTEM_TIME = 0x4B564D01
PAGES = (0x2000, 0x2040)
NS_PER_S = 10**9
MAX_AGE_NS = int(MAX_AGE_S * NS_PER_S)


def a_clock(tsc_hz: int, tsc: int = 0, vcpus: int = 1) -> tuple[GuestClock, SimulatedBackend, GuestMemory]:
    """A clock whose vCPUs have registered their pages, its backend and its memory."""
    backend = SimulatedBackend(tsc_hz, tsc)
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, vcpus, backend=backend)
    for vcpu in range(vcpus):
        clock.write_msr(vcpu, SYSTEM_TIME, PAGES[vcpu] | 1)
    return clock, backend, memory


def shown(memory: GuestMemory, vcpu: int, tsc: int) -> int:
    """What a guest makes of its page at `tsc`, by the oracle's reader."""
    return oracle.TimeInfo.parse(memory.read(PAGES[vcpu], 32)).read(tsc)


def guest_tsc(backend: SimulatedBackend, vcpu: int = 0) -> int:
    """What vCPU's RDTSC gives: the host's TSC and the offset that the host was given last."""
    return (backend.tsc + backend.tsc_offsets.get(vcpu, 0)) % 2**64


def guest_ns(backend: SimulatedBackend, memory: GuestMemory, vcpu: int = 0) -> int:
    """What vCPU's guest reads now: its page in memory, and its own RDTSC."""
    return shown(memory, vcpu, guest_tsc(backend, vcpu))


def bound_ns(page: TimeInfo, rate: Fraction, age_ticks: int) -> Fraction:
    """Design 2.3: 2 ns, the ticks that the right shift cuts, and 0.47 ppb of the page's age."""
    cut_ticks = (1 << max(-page.tsc_shift, 0)) - 1
    return 2 + cut_ticks * rate + Fraction(47, 10**11) * age_ticks * rate


def page_of(clock: GuestClock, vcpu: int = 0) -> TimeInfo:
    """vCPU's page, which must be there."""
    page = clock.page(vcpu)
    assert page is not None
    return page
