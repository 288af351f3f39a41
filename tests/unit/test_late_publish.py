"""A publish that comes later than its operation's look at the host: pages are on the timeline all the same.

Between the two the thread may lose its CPU; on a simulated host, whose time stands still, they are one instant.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest

from pvclock import GuestClock, GuestMemory, HostBackend, HostTsc, SimulatedBackend
from pvclock.readings import HostStamps
from pvclock.timekeeping.event_timeline import timeline_of
from pvclock.timekeeping.events import EventKind
from tests.unit.clock_twins import HZ, OPERATIONS, Twin
from tests.unit.clocks import NS_PER_S, SYSTEM_TIME, bound_ns, page_of

LATE_NS = 100_000
PAGES_LEFT = {"reset": 0, "reset, paused": 0, "term": 0, "guest disables its page": 1}
"""How many vCPUs have a page after these operations; after all others both have, of lines of their own by VirtualBox's
profile."""


class LateHost(SimulatedBackend):
    """A host on which `late_ns` pass where a publish asks if its TSC is stable."""

    late_ns = 0

    @property
    def tsc_stable(self) -> bool:
        """See Backend."""
        self.advance(ns=self.late_ns)
        return True

    @tsc_stable.setter
    def tsc_stable(self, _: bool) -> None:
        """It always is."""


def off_ns(clock: GuestClock, vcpu: int) -> Fraction:
    """By how much vCPU's reading is off the timeline, beyond what is promised for a page of its age."""
    reading, page = clock.reading(vcpu), page_of(clock, vcpu)
    host_tsc = HostTsc((reading.tsc - clock.tsc(vcpu).offset) % 2**64)
    age_ticks = max(reading.tsc - page.tsc_timestamp, 0)
    return max(abs(reading.ns - clock.at(host_tsc)) - bound_ns(page, clock.rate, age_ticks), Fraction(0))


@pytest.mark.row("E1", "E9", "E11")
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in {"republish", "restore and resume"}])
def test_an_operation_whose_publish_is_late(name: str) -> None:
    """After each operation, and a resume if time stands still then, readings are within the bound, and events agree."""
    backend = LateHost(HZ, 10**9, 10**12, 17 * 10**17, boot_id="twin")
    twin = Twin(backend)
    OPERATIONS[name].prepare(twin)
    backend.late_ns = LATE_NS
    OPERATIONS[name].operate(twin)
    if twin.clock.is_paused:
        twin.clock.resume()
    backend.late_ns = 0
    for _ in range(3):
        has_own_line = twin.clock.interface.provider.own_page
        pages = [vcpu for vcpu in range(2) if twin.clock.page(vcpu) is not None and has_own_line(vcpu) is None]
        assert len(pages) == (0 if "virtualbox" in name else PAGES_LEFT.get(name, 2))
        assert [off_ns(twin.clock, vcpu) for vcpu in pages] == [0] * len(pages)
        assert timeline_of(twin.clock.events.json_lines()).at(backend.tsc) == twin.clock.at(backend.tsc)
        backend.advance(ns=1000)
        twin.clock.refresh()


@pytest.mark.row("E1", "E11", "E12")
@pytest.mark.parametrize("dilation", [(1000, 1), (1, 1000), (1, 1)])
def test_a_dilation_that_comes_into_effect_at_resume(dilation: tuple[int, int]) -> None:
    """On this host's own TSC a clock dilated while paused goes on where it stood, by the timeline and by its page."""
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 1, backend=HostBackend())
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    clock.pause()
    stood_ns = clock.read(0)
    clock.dilate(*dilation)
    clock.resume("freeze")
    resumed = clock.events.read().events[-1]
    assert abs(resumed.guest_ns_after - stood_ns) <= 2
    for _ in range(3):
        assert off_ns(clock, 0) == 0
        clock.refresh()


class SleepyHost(HostBackend):
    """This host, which has slept for `slept_ns` more."""

    slept_ns = 0

    def stamps(self) -> HostStamps:
        """See Backend."""
        found = super().stamps()
        return found._replace(asleep_ns=found.asleep_ns + self.slept_ns)


@pytest.mark.row("E2", "E23")
@pytest.mark.parametrize("policy", ["freeze", "advance", "slew:max_ppm=500", "slew:max_ppm=10000000", "virtualbox"])
def test_a_sleep_that_is_slewed(policy: str) -> None:
    """A sleep settled while vCPUs run leaves pages on the timeline, whose rate changes at the break point only."""
    host = SleepyHost()
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 1, backend=host)
    clock.sleep_policy = policy
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    host.slept_ns = 50 * NS_PER_S
    reads = []
    for _ in range(3):
        clock.tick()
        assert off_ns(clock, 0) == 0
        reads.append(clock.read(0))
    assert all(later >= earlier for earlier, later in pairwise(reads))
    kinds = [event.kind for event in clock.events.read().events]
    assert kinds.count(EventKind.SUSPEND) == 1
    assert (EventKind.SLEW in kinds) == (policy not in {"freeze", "advance"})
