"""The storm without a virtual machine: threads of this process read the pages that a guest would read.

The pages, their publishing and the readers' arithmetic are those of a VM; the vCPUs and their MSR exits are not there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from fractions import Fraction

from pvclock._memory import GuestMemory
from pvclock.clock.guest_clock import GuestClock
from pvclock.errors import PvclockError
from pvclock.host.this_host import HostBackend
from pvclock.meter.observe import STORM_DILATIONS, Storm
from pvclock.payloads.probe import ProbeRecord

__all__ = ["in_process_storm"]

MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01
PAGE = 0x1000
WILD_NS = 1 << 40
CHUNK_S = 0.05


class Reader(threading.Thread):
    """Reads one vCPU's page over and over and checks it against itself and against the other readers."""

    def __init__(self, clock: GuestClock, vcpu: int, shared_last: list[int]) -> None:
        super().__init__(daemon=True)
        self.clock, self.vcpu, self.shared_last = clock, vcpu, shared_last
        self.ended = False
        self.error: PvclockError | None = None
        self.reads = self.backward_own = self.backward_cross = self.wild = 0

    def run(self) -> None:
        """Read until `ended`; an error that ends it earlier is kept for record()."""
        try:
            self._read()
        except PvclockError as error:
            self.error = error

    def _read(self) -> None:
        read, vcpu, shared = self.clock.read, self.vcpu, self.shared_last
        last = read(vcpu)
        while not self.ended:
            before = max(shared)  # what any reader had before this read begins
            now = read(vcpu)
            self.backward_own += now < last
            self.backward_cross += now < before
            self.wild += abs(now - last) > WILD_NS
            self.reads += 1
            last = shared[vcpu] = now

    def record(self) -> ProbeRecord:
        """The findings in the form of clockprobe's; what only a guest can find is 0.  Raises what ended the reading."""
        if self.error is not None:
            raise self.error
        blank = ProbeRecord._make([0] * len(ProbeRecord._fields))
        return blank._replace(
            reads=self.reads, backward_own=self.backward_own, backward_cross=self.backward_cross, wild=self.wild
        )


def in_process_storm(
    seconds: float,
    vcpus: int = 2,
    dilations: list[Fraction] = STORM_DILATIONS,
    progress: Callable[[Storm], None] = lambda _: None,
) -> Storm:
    """As pvclock.meter.observe.storm(), with threads for vCPUs."""
    with GuestMemory(bytearray((vcpus + 1) * PAGE)) as memory:
        clock = GuestClock(memory, vcpus, backend=HostBackend())
        for vcpu in range(vcpus):
            clock.write_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, (vcpu + 1) * PAGE | 1)
        shared_last = [0] * vcpus
        readers = [Reader(clock, vcpu, shared_last) for vcpu in range(vcpus)]
        for reader in readers:
            reader.start()
        begin = time.monotonic()
        churn = clock.churn(1, dilations)
        while (passed := time.monotonic() - begin) < seconds:
            churn = churn.plus(clock.churn(1 << 40, dilations, seconds=CHUNK_S))
            progress(Storm(passed, churn, [reader.record() for reader in readers]))
        for reader in readers:
            reader.ended = True
            reader.join()
        return Storm(time.monotonic() - begin, churn, [reader.record() for reader in readers])
