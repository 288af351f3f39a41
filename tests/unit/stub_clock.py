"""A clock for providers to talk to: real guest memory and real pages on a simulated host, and a VMM with a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from pvclock import ClockLine, ClockScale, Gpa, GuestMemory, GuestNs, GuestTsc, HostTsc
from pvclock._core import TSC_STABLE_BIT, TimePages
from pvclock._counter import SimulatedCounter
from pvclock._records import publish_wall_clock
from pvclock.clock.timekeeper import nothing
from pvclock.providers.interface import OwnPage, Pairing, ReferenceTime, VcpuHost, VmmServices
from pvclock.providers.kvm import KvmProvider
from pvclock.timekeeping.events import EventKind

SIZE: Final = 1 << 20
GUARD: Final = 0xA5
PAGE: Final = 1 << 12
GUARDED_PAGE: Final = bytes([GUARD]) * PAGE
TSC_HZ: Final = 2_596_132_000
NOW: Final = Pairing(real_ns=1_700_000_007 * 10**9 + 5, guest_tsc=GuestTsc(7 * TSC_HZ))
UPTIME_NS: Final = 7 * 10**9


class NotedVmm:
    """Does what hypercalls ask by writing it down; every IPI is taken by all that it was for."""

    def __init__(self) -> None:
        self.notes: list[tuple[object, ...]] = []

    def kick(self, apic_id: int) -> None:
        """Note it."""
        self.notes.append(("kick", apic_id))

    def yield_to(self, apic_id: int) -> None:
        """Note it."""
        self.notes.append(("yield_to", apic_id))

    def send_ipi(self, apic_ids: list[int], icr: int) -> int:
        """Note it."""
        self.notes.append(("send_ipi", apic_ids, icr))
        return len(apic_ids)

    def inject(self, vcpu: int, vector: int) -> None:
        """Note it."""
        self.notes.append(("inject", vcpu, vector))

    def request_reset(self) -> None:
        """Note it."""
        self.notes.append(("request_reset",))


class StubClock:
    """ClockServices at one instant: `paired`, UPTIME_NS after guest time 0."""

    def __init__(
        self,
        vcpus: int = 2,
        *,
        vcpu_host: VcpuHost = VcpuHost.EMULATOR,
        vmm: VmmServices | None = None,
        kernel_features: int = 0,
        paired: Pairing | None = NOW,
    ) -> None:
        self.memory = GuestMemory(bytearray([GUARD]) * SIZE)
        self.vcpu_host, self.vmm, self.kernel_features = vcpu_host, vmm, {"KVM": kernel_features}
        self.tsc_hz = self.host_tsc_hz = TSC_HZ
        self.keeps_tsc_rate = False
        self.paired = paired
        self.quiesced: list[int | None] = []
        self.inside: list[int | None] = []
        self.told: list[tuple[EventKind, str]] = []
        self.stable: Callable[[], bool] = lambda: False
        self.own_page: Callable[[int], OwnPage | None] = lambda _: None
        self.reference_page: Gpa | None = None
        self.reference_time = ReferenceTime(UPTIME_NS // 100)
        self.timer_changes = 0
        self._pages = TimePages(self.memory, vcpus, SimulatedCounter(NOW.guest_tsc))
        self._scale = ClockScale.from_hz(TSC_HZ)

    def place_time_page(
        self,
        vcpu: int,
        gpa: Gpa | None,
        begin: Callable[[], object] = nothing,
        undo: Callable[[], object] = nothing,
    ) -> None:
        """Keep it there, and publish."""
        begin()
        self._pages.register(vcpu, gpa, self.own_page(vcpu))
        self.refresh(vcpu)

    def place_time_pages(
        self,
        pages: Mapping[int, Gpa | None],
        begin: Callable[[], object],
        undo: Callable[[], object],
        vcpu: int | None = None,
    ) -> None:
        """Keep them there, and publish."""
        begin()
        for each, gpa in pages.items():
            self._pages.register(each, gpa, self.own_page(each))
        self.refresh(vcpu)

    def place_reference_page(
        self,
        gpa: Gpa | None,
        begin: Callable[[], object] = nothing,
        undo: Callable[[], object] = nothing,
        vcpu: int | None = None,
    ) -> None:
        """Note where it is."""
        begin()
        self.reference_page = gpa

    def reference_units(self, vcpu: int) -> int:
        """Of the instant that it always is, unless a test has set another."""
        return self.reference_time.units

    def adopt_reference_time(self, saved: ReferenceTime, gpa: Gpa | None) -> None:
        """Note it."""
        self.reference_time, self.reference_page = saved, gpa

    def timers_changed(self) -> None:
        """Count it."""
        self.timer_changes += 1

    def guest_tsc(self, vcpu: int) -> GuestTsc:
        """The TSC of the instant that it always is."""
        return NOW.guest_tsc

    def keep_time_page(self, vcpu: int, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """Publish with vCPU's page where it is."""
        begin()
        self.refresh(vcpu)

    def page_at(self, vcpu: int) -> int | None:
        """Where vCPU's page is."""
        return self._pages.registered(vcpu)

    def refresh(self, vcpu: int | None = None) -> None:
        """Publish all pages."""
        line = ClockLine(HostTsc(NOW.guest_tsc), GuestNs(UPTIME_NS), 0, 10**9, TSC_HZ)
        flags = TSC_STABLE_BIT if self.stable() else 0
        own = () if vcpu is None else (vcpu,)
        self._pages.publish(line, self._scale, flags=flags, out_of_guest=own, step=True)
        self._pages.mark_dirty()

    def write_wall_clock(self, gpa: Gpa, on_commit: Callable[[], object] = nothing) -> None:
        """Write the time of day of guest time 0."""
        on_commit()
        publish_wall_clock(self.memory, gpa, NOW.real_ns - UPTIME_NS)

    def utc_ns(self) -> int:
        """UTC of the instant that it always is."""
        return NOW.real_ns

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """There is no vCPU; notes that it was asked, and `inside` who is within."""
        self.quiesced.append(vcpu)
        return self._noted(vcpu)

    @contextmanager
    def _noted(self, vcpu: int | None) -> Iterator[None]:
        self.inside.append(vcpu)
        yield
        self.inside.remove(vcpu)

    def tell(self, kind: EventKind, why: str) -> None:
        """Note it."""
        self.told.append((kind, why))

    def pairing(self, vcpu: int) -> Pairing | None:
        """The instant that it always is."""
        return self.paired


def a_provider(
    vcpus: int = 2,
    *,
    clock: StubClock | None = None,
    **options: object,
) -> tuple[KvmProvider, StubClock]:
    """A KVM provider and its clock, which says STABLE where the provider allows it."""
    clock = clock or StubClock(vcpus)
    provider = KvmProvider(clock, vcpus, **options)  # type: ignore[arg-type]  # a test's own choice
    clock.stable = lambda: provider.allows_stable
    clock.own_page = provider.own_page
    return provider, clock


def written(memory: GuestMemory) -> list[int]:
    """Where guard bytes are gone: the first address of each place, places 64 bytes or more apart."""
    gone = guards_gone(memory)
    return [at for i, at in enumerate(gone) if i == 0 or at - gone[i - 1] >= 64]


def guards_gone(memory: GuestMemory, size: int = SIZE) -> list[int]:
    """All addresses where guard bytes are gone; whole pages of them are passed over at C speed."""
    ram = memory.read(0, size)
    touched = (at for at in range(0, size, PAGE) if ram[at : at + PAGE] != GUARDED_PAGE)
    return [at for page in touched for at in range(page, page + PAGE) if ram[at] != GUARD]


def u32(memory: GuestMemory, gpa: int) -> int:
    """A little-endian word of guest memory."""
    return int.from_bytes(memory.read(gpa, 4), "little")


def u64(memory: GuestMemory, gpa: int) -> int:
    """A little-endian double word of guest memory."""
    return int.from_bytes(memory.read(gpa, 8), "little")
