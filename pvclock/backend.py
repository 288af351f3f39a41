"""Where host time comes from and where TSC offsets go: what a clock needs of the machine under it.

`Backend` is the interface; `SimulatedBackend` is host time by hand, for tests and simulators; `HostBackend` is this
host without virtual machines.  The one for vCPUs on /dev/kvm is pvclock.kvm.backend.KvmBackend.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from operator import index
from pathlib import Path
from typing import Final, Protocol

from pvclock._counter import Counter, HostCounter, SimulatedCounter
from pvclock._sampling import sample_clock
from pvclock.errors import RangeError, TscOffsetNotHonoured
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, RefNs
from pvclock.readings import HostStamps, Reference, Sample

__all__ = [
    "Backend",
    "HostBackend",
    "CLOCK_GRAIN_NS",
    "CLOCK_IDS",
    "SimulatedBackend",
    "bracketed",
    "host_clocksource",
    "host_stamps",
    "measure_tsc_hz",
    "wait_until",
]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CURRENT_CLOCKSOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")

CLOCK_IDS: Final = {
    Reference.RAW: time.CLOCK_MONOTONIC_RAW,
    Reference.MONOTONIC: time.CLOCK_MONOTONIC,
    Reference.REALTIME: time.CLOCK_REALTIME,
}
CLOCK_GRAIN_NS: Final = 1
"""Linux's clocks are cut to whole ns."""


class Backend(Protocol):
    """Host time and TSC offsets, for one VM."""

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
    def kernel_features(self) -> int:
        """KVM feature bits (CPUID 0x40000001 EAX) that the host kernel serves beside the engine."""

    @property
    def is_slaved(self) -> bool:
        """Does the counter go on with host time, whatever the guest does?"""

    def sample(self, reference: Reference) -> Sample:
        """One instant on the counter and on a clock of the host."""

    def stamps(self) -> HostStamps:
        """One instant on all host clocks."""

    def run_delay_ns(self, vcpu: int) -> int | None:
        """How long vCPU could have run and did not, since it began; None where nobody says."""

    def run_until(self, tsc: HostTsc) -> None:
        """Let the vCPUs into the guest, and keep them out again once the host TSC is `tsc` or more."""

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """Make vCPU's guest TSC the host's plus `offset`; TscOffsetNotHonoured if its guest would not see that."""

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """Keep all vCPUs out of the guest meanwhile.  `vcpu` is the caller's own, which is out already."""

    def vcpus_held(self) -> bool | None:
        """Are all vCPUs out of the guest until they are resumed or started?  None where the VMM answers for it.

        What quiesce() does is not counted.  Ask inside it: the answer holds for as long as that is kept.
        """


_simulated = count(1)


class SimulatedBackend:
    """Host time that moves when told to, exactly.

    `tsc` (ticks), `ref_ns` (the reference clock) and `realtime_ns` (UTC since 1970) can be set one by one to play a
    fault.  Each is a host of its own, unless `boot_id` says otherwise.
    With honours_tsc_offset=False it plays a host that takes offsets and ignores them.
    """

    is_slaved = True

    def __init__(
        self,
        tsc_hz: int,
        tsc: int = 0,
        ref_ns: int = 0,
        realtime_ns: int = 0,
        *,
        boot_id: str | None = None,
        tsc_stable: bool = True,
        honours_tsc_offset: bool = True,
        kernel_features: int = 0,
    ) -> None:
        if not 0 < tsc_hz < 1 << 64:
            raise RangeError(f"tsc_hz is {tsc_hz}; it must be in [1, 2^64)")
        self.counter = SimulatedCounter(tsc)
        self.tsc_hz = tsc_hz
        self.tsc_stable = tsc_stable
        self.kernel_features = kernel_features
        self.ref_ns = RefNs(ref_ns)
        self.realtime_ns = realtime_ns
        self.boot_id = f"simulated {next(_simulated)}" if boot_id is None else boot_id
        self.tsc_offsets: dict[int, int] = {}
        self.run_delays_ns: dict[int, int] = {}
        self._honours_tsc_offset = honours_tsc_offset
        self._tick_remainder = 0  # of NS_PER_S: the part of a tick that advance() still owes

    @property
    def tsc(self) -> HostTsc:
        """Ticks modulo 2^64; settable."""
        return HostTsc(self.counter.value)

    @tsc.setter
    def tsc(self, ticks: int) -> None:
        self.counter.value = ticks

    def advance(self, *, ns: int) -> None:
        """Let `ns` of host time pass: on the reference, in UTC and, to the last fraction of a tick, on the TSC."""
        if index(ns) < 0:
            raise RangeError(f"advance(ns={ns}): time passes forwards; set tsc or ref_ns to play a step back")
        ticks, self._tick_remainder = divmod(ns * self.tsc_hz + self._tick_remainder, NS_PER_S)
        self.counter.value = (self.counter.value + ticks) & U64_MASK
        self.ref_ns = RefNs(self.ref_ns + ns)
        self.realtime_ns += ns

    def sample(self, reference: Reference) -> Sample:
        """See Backend: within a tick."""
        ns = self.realtime_ns if reference is Reference.REALTIME else self.ref_ns
        return Sample(self.tsc, ns, NS_PER_S / self.tsc_hz)

    def stamps(self) -> HostStamps:
        """See Backend."""
        return HostStamps(self.tsc, self.ref_ns, self.realtime_ns, self.boot_id)

    def run_delay_ns(self, vcpu: int) -> int | None:
        """See Backend: as set in `run_delays_ns`."""
        return self.run_delays_ns.get(vcpu)

    def run_until(self, tsc: HostTsc) -> None:
        """See Backend: host time passes, to the tick."""
        ticks = (tsc - self.tsc) & U64_MASK
        if 0 < ticks <= U64_MASK // 2:
            ns = -((self._tick_remainder - ticks * NS_PER_S) // self.tsc_hz)  # rounded up: ticks can be owed, ns not
            self._tick_remainder += ns * self.tsc_hz - ticks * NS_PER_S
            self.counter.value = tsc
            self.ref_ns = RefNs(self.ref_ns + ns)
            self.realtime_ns += ns

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """See Backend."""
        if offset and not self._honours_tsc_offset:
            raise TscOffsetNotHonoured(offset)
        self.tsc_offsets[vcpu] = offset

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """See Backend: no vCPU runs here."""
        return nullcontext()

    def vcpus_held(self) -> bool | None:
        """See Backend: the VMM answers for it."""
        return None


class HostBackend:
    """This host's own TSC and clocks, and no vCPU: for readers in this process.  It honours no TSC offset."""

    kernel_features = 0
    is_slaved = True

    def __init__(self, tsc_hz: int | None = None) -> None:
        self.counter = HostCounter()
        self.tsc_hz = measure_tsc_hz() if tsc_hz is None else tsc_hz
        self.tsc_stable = host_clocksource() == "tsc"
        if not 0 < self.tsc_hz < 1 << 64:
            raise RangeError(f"tsc_hz is {tsc_hz}; it must be in [1, 2^64)")

    def sample(self, reference: Reference) -> Sample:
        """See Backend; some 20 ns are its bound."""
        return bracketed(reference, self.tsc_hz)

    def stamps(self) -> HostStamps:
        """See Backend."""
        return host_stamps(self.sample(Reference.REALTIME))

    def run_delay_ns(self, vcpu: int) -> int | None:
        """See Backend: no vCPU runs here."""
        return None

    def run_until(self, tsc: HostTsc) -> None:
        """See Backend: no vCPU runs here, so this waits."""
        wait_until(self.counter, tsc, self.tsc_hz)

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """See Backend."""
        if offset:
            raise TscOffsetNotHonoured(offset)

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """See Backend: no vCPU runs here."""
        return nullcontext()

    def vcpus_held(self) -> bool | None:
        """See Backend: the VMM answers for it."""
        return None


def host_clocksource() -> str:
    """The host kernel's clocksource: "tsc" means that it trusts its TSCs to be in step."""
    try:
        return CURRENT_CLOCKSOURCE.read_text().strip()
    except OSError:
        return "unknown"


def bracketed(reference: Reference, tsc_hz: int) -> Sample:
    """One instant on this host's TSC and on a clock of it: the narrowest of 8 brackets."""
    tsc, ns, width_ticks = sample_clock(CLOCK_IDS[reference])
    return Sample(HostTsc(tsc), ns, width_ticks * NS_PER_S / (2 * tsc_hz) + CLOCK_GRAIN_NS)


def host_stamps(real: Sample) -> HostStamps:
    """The rest of an instant of which TSC and time of day are known; CLOCK_MONOTONIC_RAW is read a moment later."""
    raw_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    return HostStamps(real.tsc, RefNs(raw_ns), real.ns, _boot_id())


def wait_until(counter: Counter, tsc: HostTsc, tsc_hz: int) -> None:
    """Return once `counter` is at `tsc` or beyond: as soon after as this thread gets a CPU."""
    while 0 < (left := (tsc - counter.read()) & U64_MASK) <= U64_MASK // 2:
        time.sleep(left / tsc_hz)


def _boot_id() -> str | None:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return None


def measure_tsc_hz(seconds: float = 0.1) -> int:
    """This host's TSC frequency against CLOCK_MONOTONIC_RAW, to the kHz nearest, in Hz.

    For hosts that do not say it (KVM does: Kvm.host_tsc_khz()).  Good to about 100 ns / seconds.
    """
    tsc0, ns0, _ = sample_clock(time.CLOCK_MONOTONIC_RAW)
    time.sleep(seconds)
    tsc1, ns1, _ = sample_clock(time.CLOCK_MONOTONIC_RAW)
    return round((tsc1 - tsc0) * 10**6 / (ns1 - ns0)) * 1000
