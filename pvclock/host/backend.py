"""What a clock needs of the machine under it: host time, TSC offsets, and vCPUs that can be kept out of the guest.

Backends: `simulated.py` (host time by hand), `this_host.py` (this host without virtual machines), `execution_time.py`
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

    One may have three attributes more: `vcpu_count` and `guest_engine`, what runs its guest ("kvm"), with which
    GuestClock's arguments must agree then; and `kernel_features`, what the host's kernel can serve vCPUs without the
    engine: by paravirtual interface, under the name of its provider, the feature word in its CPUID.
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
        """Does the counter go on with host time, whatever the guest does?"""

    @property
    def boot_id(self) -> str | None:
        """Which boot of which host this is, read anew: CRIU may have moved the process.  None if unknown."""

    def sample(self, reference: Reference) -> Sample:
        """One instant on the counter and on a clock of the host."""

    def stamps(self) -> HostStamps:
        """One instant on all host clocks."""

    def tsc_readings(self) -> tuple[HostTsc, ...]:
        """The counter as each CPU of this process reads it now, one after the other; this CPU's own is the first."""

    def run_delay_ns(self, vcpu: int) -> int | None:
        """How long vCPU could have run and did not, since it began; None where nobody says."""

    def run_until(self, tsc: HostTsc) -> None:
        """Let the vCPUs into the guest, and keep them out again once the host TSC is `tsc` or more."""

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """Make vCPU's guest TSC the host's plus `offset`; TscOffsetNotHonoured if its guest would not see that."""

    def tsc_offset(self, vcpu: int) -> int | None:
        """vCPU's offset as it is now, which KVM itself changes after a host sleep; None: as it was set."""

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """Keep all vCPUs out of the guest meanwhile.  `vcpu` is the caller's own, which is out already."""

    def vcpus_are_out(self) -> bool | None:
        """Are all vCPUs out of the guest until they are resumed or started?  None where the VMM answers for it.

        What quiesce() does is not counted.  Ask inside it, and stay there for as long as no vCPU may run: a resume or a
        start that comes meanwhile lets none in before.
        """


def stamps_anew(backend: Backend) -> HostStamps:
    """The backend's stamps() with its boot read anew: for what is compared with another process's or another host's."""
    return backend.stamps()._replace(boot_id=backend.boot_id)
