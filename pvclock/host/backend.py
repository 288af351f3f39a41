"""The Backend protocol: what a clock needs of its host, which is host time, TSC offsets and a way to stop vCPUs.

Backends: `simulated.py` (host time set by hand), `this_host.py` (this host, no virtual machine), `execution_time.py`
(time that passes only while the guest executes) and `kvm/backend.py` (vCPUs on /dev/kvm).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from pvclock._counter import Counter
from pvclock.quantities import HostTsc
from pvclock.readings import HostStamps, Reference, Sample

__all__ = ["Backend", "stamps_anew"]


class Backend(Protocol):
    """Host time and TSC offsets, for one VM.

    Optional attributes, the first two of which must agree with GuestClock's arguments: `vcpu_count`; `vcpu_host`,
    what runs the guest ("kvm"); `kernel_features`, the paravirtual features that the host's kernel serves without the
    engine, as the feature word of its CPUID by the provider's name.
    """

    @property
    def counter(self) -> Counter:
        """The host TSC."""

    @property
    def tsc_hz(self) -> int:
        """The host TSC's nominal frequency in Hz."""

    @property
    def tsc_stable(self) -> bool:
        """Do all host CPUs' TSCs run in step?"""

    @property
    def counter_follows_host(self) -> bool:
        """Does the counter advance with host time, whatever the guest does?"""

    @property
    def boot_id(self) -> str | None:
        """Identifies the host's boot; None if unknown.  Read anew each time: CRIU may have moved the process."""

    def sample(self, reference: Reference) -> Sample:
        """One instant on the counter and on a host clock."""

    def stamps(self) -> HostStamps:
        """One instant on all host clocks."""

    def tsc_readings(self) -> tuple[HostTsc, ...]:
        """The counter read on each CPU of this process in turn, the current CPU first."""

    def run_delay_ns(self, vcpu: int) -> int | None:
        """Total ns that vCPU was runnable but had no CPU; None if unknown."""

    def run_until(self, tsc: HostTsc) -> None:
        """Run the vCPUs until the host TSC is `tsc` or more, then keep them out of the guest."""

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """Make vCPU's guest TSC the host's plus `offset`; TscOffsetNotHonoured if the guest would not see it."""

    def tsc_offset(self, vcpu: int) -> int | None:
        """vCPU's offset now (KVM itself changes it after a host sleep); None: as it was set."""

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """A context manager that keeps all vCPUs out of the guest.  `vcpu`: the caller's own, already out."""

    def vcpus_are_out(self) -> bool | None:
        """Are all vCPUs paused or not started?  None if the VMM guarantees that they are out of the guest.

        A mere quiesce() does not count as out.  Call this inside quiesce() and stay there while no vCPU may run: a
        resume or start in between lets none in before quiesce() ends.
        """


def stamps_anew(backend: Backend) -> HostStamps:
    """The backend's stamps() with the boot id read anew, to compare with stamps of another process or host."""
    return backend.stamps()._replace(boot_id=backend.boot_id)
