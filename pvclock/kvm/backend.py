"""Host time and TSC offsets for a GuestClock on real vCPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from pvclock._core import HostCounter
from pvclock._sampling import sample_clock
from pvclock.backend import host_clocksource
from pvclock.errors import TscOffsetNotHonoured
from pvclock.kvm._ioctls import Vcpu
from pvclock.quantities import HostTsc

__all__ = ["KvmBackend"]


UNSTABLE = (
    "its TSC is unstable: KVM moves a guest's offset whenever the vCPU is scheduled; use a host on clocksource tsc"
)


class KvmBackend:
    """See pvclock.backend.Backend.

    vcpus: by number, not running yet.  honours_tsc_offset: as probed on this host.  quiesce: the runner's.
    """

    def __init__(
        self,
        vcpus: list[Vcpu],
        *,
        honours_tsc_offset: bool,
        quiesce: Callable[[int | None], AbstractContextManager[None]],
        kernel_features: int = 0,
    ) -> None:
        self.counter = HostCounter()
        self.tsc_hz = vcpus[0].get_tsc_khz() * 1000
        self.tsc_stable = host_clocksource() == "tsc"
        self.kernel_features = kernel_features
        self.quiesce = quiesce
        self._vcpus = vcpus
        self._honours_tsc_offset = honours_tsc_offset

    def realtime(self) -> tuple[HostTsc, int]:
        """See Backend; true to within half of the narrowest bracket of 8, some 20 ns."""
        tsc, ns, _ = sample_clock(time.CLOCK_REALTIME)
        return HostTsc(tsc), ns

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """See Backend.  For a vCPU that is out of the guest; a host without offsets has offset 0 and no other."""
        if not self._honours_tsc_offset:
            if offset:
                raise TscOffsetNotHonoured(offset)
            return
        before = self._vcpus[vcpu].get_tsc_offset()
        self._vcpus[vcpu].set_tsc_offset(offset)
        if self._vcpus[vcpu].get_tsc_offset() != offset:
            self._vcpus[vcpu].set_tsc_offset(before)
            raise TscOffsetNotHonoured(offset, UNSTABLE if not self.tsc_stable else "it reads back differently")
