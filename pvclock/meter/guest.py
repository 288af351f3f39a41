"""What the meter measures: a guest that runs clockprobe (pvclock.payloads), whose vCPUs read their clock all the time.

The meter's functions take a `Guest` and do not ask which one it is.  Guests are in `machine_guest` (the engine's clock
and the kernel's), `in_process_guest` (pages in this process) and `qemu_glue.guest` (a QEMU).
"""

from __future__ import annotations

from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self

from pvclock.clock.guest_clock import GuestClock
from pvclock.payloads.probe import ProbeRecord
from pvclock.quantities import GuestNs, GuestTsc, HostTsc
from pvclock.readings import TimeInfo

__all__ = ["ENGINE", "KERNEL", "ClockServer", "EngineGuest", "Guest", "GuestReading"]


class ClockServer(NamedTuple):
    """The software that serves a guest's clock, and how its clock differs from the others'.

    name: in tables and JSON.  is_kvm: KVM publishes the pages, not user space.  stops_when_paused: guest time stands
    still while the guest is paused; afterwards the guest finds GUEST_STOPPED in its pages.
    """

    name: str
    is_kvm: bool
    stops_when_paused: bool


ENGINE: Final = ClockServer("engine", is_kvm=False, stops_when_paused=True)
KERNEL: Final = ClockServer("kernel", is_kvm=True, stops_when_paused=False)


class GuestReading(NamedTuple):
    """One reading that a guest took of its clock, placed on the host's TSC.

    ns: the guest's clock.  tsc: the guest's TSC at that instant; host_tsc: the host's, known to bound_ticks either way.
    """

    tsc: GuestTsc
    ns: GuestNs
    host_tsc: HostTsc
    bound_ticks: int


class Guest(Protocol):
    """A guest whose vCPUs read their clock all the time; a context manager that ends it."""

    @property
    def server(self) -> ClockServer:
        """The software that serves its clock."""

    @property
    def vcpus(self) -> int:
        """How many vCPUs read."""

    @property
    def tsc_hz(self) -> int:
        """The TSC frequency that the guest's pages are made for; of a started guest."""

    def start(self) -> None:
        """Return when every vCPU reads its clock.  StateError, or the server's own error, if they do not."""

    def check_running(self) -> None:
        """Raise the reason if the guest has ended."""

    def pause(self) -> None:
        """Stop the vCPUs, and the clock if the server does that."""

    def resume(self) -> None:
        """Continue both."""

    def finish(self) -> list[ProbeRecord]:
        """End the guest and return each vCPU's findings."""

    def newest_ns(self) -> int:
        """The newest time that a vCPU has read."""

    def reading(self) -> GuestReading:
        """A reading of vCPU 0 by the page that it has now, some ms old at most.  StateError if there is none."""

    def records(self) -> list[ProbeRecord]:
        """Each vCPU's findings so far."""

    def pages(self) -> list[TimeInfo]:
        """Each vCPU's page as it lies in guest memory; torn if it is being changed."""

    def pages_by_server(self) -> list[TimeInfo]:
        """The same pages as the server itself reads them; empty if it offers no such way."""

    def wall_clock_ns(self) -> int:
        """UTC at guest time 0, in ns, as the wall clock record tells the guest."""

    def epoch_ns(self) -> int | None:
        """UTC at guest time 0, in ns, by the server's own account; None if it gives none."""

    def __enter__(self) -> Self:
        """The guest, not started yet."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it and give everything back."""


class EngineGuest(Guest, Protocol):
    """A guest with the engine's clock, which the meter can change under it."""

    @property
    def engine_clock(self) -> GuestClock:
        """Its clock."""
