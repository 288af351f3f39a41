"""A guest without a virtual machine: threads of this process read the pages that a guest would read.

The pages, their publishing and the readers' arithmetic are those of a VM; the vCPUs and their MSR exits are not there.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Final, Self

from pvclock._core import GUEST_STOPPED
from pvclock._memory import GuestMemory
from pvclock.clock.guest_clock import GuestClock
from pvclock.errors import PvclockError, StateError
from pvclock.host.this_host import HostBackend
from pvclock.meter.findings import time_info, wall_clock_ns
from pvclock.meter.guest import ENGINE, ClockServer, GuestReading
from pvclock.meter.machine_guest import engine_epoch_ns
from pvclock.payloads.probe import ProbeRecord, State
from pvclock.providers.interface import CPUID_BASE
from pvclock.providers.kvm.features import MSR_KVM_SYSTEM_TIME_NEW, MSR_KVM_WALL_CLOCK_NEW
from pvclock.quantities import U64_MASK, HostTsc
from pvclock.readings import TimeInfo

__all__ = ["InProcessGuest"]

PAGE: Final = 0x1000
WALL_CLOCK_GPA: Final = 0x100
FLAGS_AT: Final = 29
WILD_NS: Final = 1 << 40
READS_PER_FLUSH: Final = 1 << 10
START_LIMIT_S: Final = 60.0
ODD_LIMIT_S = 5.0
"""Far beyond the time for which a busy host keeps a thread waiting; a guest would spin for ever."""
NO_FINDINGS: Final = ProbeRecord._make([0] * len(ProbeRecord._fields))


class Reader(threading.Thread):
    """A vCPU: reads its page over and over and checks it against itself and against the other readers."""

    def __init__(self, clock: GuestClock, vcpu: int, shared_last: list[int]) -> None:
        super().__init__(name=f"pvclock-reader-{vcpu}", daemon=True)
        self.clock, self.vcpu, self.shared_last = clock, vcpu, shared_last
        self.ended = False
        self.error: PvclockError | None = None
        self.first = self.last = clock.reading(vcpu)
        shared_last[vcpu] = self.first.ns
        self.reads = self.stopped = 0
        self.backward_own = self.backward_cross = self.wild = self.largest_gap_ns = self.worst_back_ns = 0

    def run(self) -> None:
        """Read until `ended`; record() raises an error that ended it earlier."""
        try:
            while not self.ended:
                self._read_on()
            self.last = self.clock.reading(self.vcpu)
        except PvclockError as error:
            self.error = error

    def _read_on(self) -> None:
        """Read many times.  A page that stays odd, as when its publisher loses its CPU, is tried again for a while."""
        deadline = time.monotonic() + ODD_LIMIT_S
        while True:
            try:
                self._read_often()
                self._clear_guest_stopped()
            except StateError:
                if self.ended or time.monotonic() > deadline:
                    raise
            else:
                return

    def _read_often(self) -> None:
        read, vcpu, shared = self.clock.read, self.vcpu, self.shared_last
        last = shared[vcpu]
        for _ in range(READS_PER_FLUSH):
            before = max(shared)  # the newest time that any reader had before this read begins
            now = read(vcpu)
            if now < before:
                self.backward_own += now < last
                self.backward_cross += 1
                self.worst_back_ns = max(self.worst_back_ns, before - now)
            self.largest_gap_ns = max(self.largest_gap_ns, now - last)
            self.wild += abs(now - last) > WILD_NS
            last = shared[vcpu] = now
            self.reads += 1

    def _clear_guest_stopped(self) -> None:
        """As a guest's watchdog does: see GUEST_STOPPED, count it and clear it."""
        if self.clock.reading(self.vcpu).flags & GUEST_STOPPED:
            gpa = time_page_gpa(self.vcpu) + FLAGS_AT
            memory = self.clock.memory
            memory.write(gpa, bytes([memory.read(gpa, 1)[0] & ~GUEST_STOPPED]))
            self.stopped += 1

    def record(self) -> ProbeRecord:
        """The findings in clockprobe's form; 0 for what only a guest can find.  Raises the error that ended it."""
        if self.error is not None:
            raise self.error
        signature, features = (self.clock.cpuid(leaf) for leaf in (CPUID_BASE, CPUID_BASE + 1))
        return NO_FINDINGS._replace(
            state=State.READING if self.is_alive() else State.DONE,
            apic_id=self.vcpu,
            signature_leaf=CPUID_BASE if signature else 0,
            features=features.eax if features else 0,
            msr=MSR_KVM_SYSTEM_TIME_NEW,
            msr_value=self.clock.read_msr(self.vcpu, MSR_KVM_SYSTEM_TIME_NEW),
            reads=self.reads,
            backward_own=self.backward_own,
            backward_cross=self.backward_cross,
            wild=self.wild,
            stopped=self.stopped,
            largest_gap_ns=self.largest_gap_ns,
            first_tsc=self.first.tsc,
            first_ns=self.first.ns,
            last_tsc=self.last.tsc,
            last_ns=self.last.ns,
            worst_back_ns=self.worst_back_ns,
        )


class InProcessGuest:
    """`vcpus` threads that read the pages of an engine's clock, which has this host's time."""

    def __init__(self, vcpus: int = 2) -> None:
        self._memory = GuestMemory(bytearray((vcpus + 1) * PAGE))
        self._clock = GuestClock(self._memory, vcpus, backend=HostBackend())
        self._readers: list[Reader] = []
        self._vcpus = vcpus

    @property
    def server(self) -> ClockServer:
        """The engine."""
        return ENGINE

    @property
    def engine_clock(self) -> GuestClock:
        """The engine's clock."""
        return self._clock

    @property
    def vcpus(self) -> int:
        """How many threads read."""
        return self._vcpus

    @property
    def tsc_hz(self) -> int:
        """The host's, as its backend measured it."""
        return self._clock.backend.tsc_hz

    def start(self) -> None:
        """Register the pages and the wall clock, and return when every thread reads."""
        self._clock.write_msr(0, MSR_KVM_WALL_CLOCK_NEW, WALL_CLOCK_GPA)
        for vcpu in range(self._vcpus):
            self._clock.write_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, time_page_gpa(vcpu) | 1)
        shared_last = [0] * self._vcpus
        self._readers = [Reader(self._clock, vcpu, shared_last) for vcpu in range(self._vcpus)]
        for reader in self._readers:
            reader.start()
        deadline = time.monotonic() + START_LIMIT_S
        while not all(reader.reads for reader in self._readers):
            self.check_running()
            if time.monotonic() > deadline:
                raise StateError("observe", f"not all threads read within {START_LIMIT_S:g} s", "try again")
            time.sleep(0.001)

    def check_running(self) -> None:
        """Raise the error that ended a thread's reading."""
        self.records()

    def pause(self) -> None:
        """Stop the clock; the threads go on reading it."""
        self._clock.pause()

    def resume(self) -> None:
        """Continue."""
        self._clock.resume()

    def finish(self) -> list[ProbeRecord]:
        """End the threads; their findings."""
        self._end()
        return self.records()

    def newest_ns(self) -> int:
        """A reading by this thread: those of the others are as old as their turn at the interpreter."""
        return self._clock.read(0)

    def reading(self) -> GuestReading:
        """A reading by this thread, too."""
        seen = self._clock.reading(0)
        host_tsc = HostTsc((seen.tsc - self._clock.tsc(0).offset) & U64_MASK)
        return GuestReading(seen.tsc, seen.ns, host_tsc, 0)

    def records(self) -> list[ProbeRecord]:
        """The findings so far."""
        return [reader.record() for reader in self._readers]

    def pages(self) -> list[TimeInfo]:
        """The pages in this process."""
        return [time_info(self._memory.read(time_page_gpa(vcpu), 32)) for vcpu in range(self._vcpus)]

    def pages_by_server(self) -> list[TimeInfo]:
        """Empty: no other program reads these pages."""
        return []

    def wall_clock_ns(self) -> int:
        """The wall clock record."""
        return wall_clock_ns(self._memory, WALL_CLOCK_GPA)

    def epoch_ns(self) -> int:
        """UTC at guest time 0 by the engine's timeline."""
        return engine_epoch_ns(self._clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
        self._memory.close()

    def _end(self) -> None:
        for reader in self._readers:
            reader.ended = True
        for reader in self._readers:
            if reader.is_alive():  # one that was never started cannot be joined
                reader.join()


def time_page_gpa(vcpu: int) -> int:
    """Where a vCPU's page is; the first page of memory holds the wall clock record."""
    return (vcpu + 1) * PAGE
