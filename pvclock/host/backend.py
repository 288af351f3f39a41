"""Where host time comes from and where TSC offsets go: what a clock needs of the machine under it.

`Backend` is the interface; `SimulatedBackend` is host time by hand, for tests and simulators; `HostBackend` is this
host without virtual machines.  The one for vCPUs on /dev/kvm is pvclock.kvm.backend.KvmBackend.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import count
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias, get_args

from pvclock._counter import Counter, HostCounter, SimulatedCounter
from pvclock._sampling import sample_clock
from pvclock.arguments import flag, text, whole
from pvclock.errors import ConfigError, RangeError, TscOffsetNotHonoured
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, RefNs, quoted, shown, signed64
from pvclock.readings import HostStamps, Reference, Sample

__all__ = [
    "Backend",
    "HostBackend",
    "CLOCK_GRAIN_NS",
    "CLOCK_IDS",
    "SimulatedBackend",
    "asleep_bounds_ns",
    "bracketed",
    "host_clocksource",
    "host_stamps",
    "measure_tsc_hz",
    "tsc_of_each_cpu",
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

ASLEEP_TRIES: Final = 4
U32_MASK: Final = (1 << 32) - 1


class Backend(Protocol):
    """Host time and TSC offsets, for one VM.

    One may have two attributes more, which GuestClock's arguments must agree with then: `vcpu_count`, and
    `guest_engine`, who runs its guest ("kvm").
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
    def kernel_features(self) -> int:
        """KVM feature bits (CPUID 0x40000001 EAX) that the host's kernel can offer vCPUs by itself; 0 without."""

    @property
    def is_slaved(self) -> bool:
        """Does the counter go on with host time, whatever the guest does?"""

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

    def vcpus_held(self) -> bool | None:
        """Are all vCPUs out of the guest until they are resumed or started?  None where the VMM answers for it.

        What quiesce() does is not counted.  Ask inside it, and stay there for as long as no vCPU may run: a resume or a
        start that comes meanwhile lets none in before.
        """


_simulated = count(1)


TscInSleep: TypeAlias = Literal["stops", "restarts", "counts on", "restarts, continued"]


class SimulatedBackend:
    """Host time that moves when told to, exactly.

    `tsc` (ticks), `ref_ns` (the reference clock), `realtime_ns` (UTC since 1970) and `asleep_ns` can be set one by one
    to play a fault.  `cpu_lag_ticks` is how far the CPU that we run on is behind the others: `tsc` is what it reads.
    Each is a host of its own, unless `boot_id` says otherwise.
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
        self.counter = SimulatedCounter(whole("tsc", tsc))
        self.tsc_hz = whole("tsc_hz", tsc_hz, 1, U64_MASK)
        self.tsc_stable = flag("tsc_stable", tsc_stable)
        self.kernel_features = whole("kernel_features", kernel_features, 0, U32_MASK)
        self.ref_ns = RefNs(whole("ref_ns", ref_ns))
        self.realtime_ns = whole("realtime_ns", realtime_ns)
        self.boot_id = f"simulated {next(_simulated)}" if boot_id is None else text("boot_id", boot_id)
        self.asleep_ns = 0
        self.cpu_lag_ticks = 0
        self.tsc_offsets: dict[int, int] = {}
        self.run_delays_ns: dict[int, int] = {}
        self._honours_tsc_offset = flag("honours_tsc_offset", honours_tsc_offset)
        self._tick_remainder = 0  # of NS_PER_S: the part of a tick that advance() still owes

    @property
    def tsc(self) -> HostTsc:
        """Ticks modulo 2^64; settable."""
        return HostTsc(self.counter.value)

    @tsc.setter
    def tsc(self, ticks: int) -> None:
        self.counter.value = whole("tsc", ticks)

    def advance(self, *, ns: int) -> None:
        """Let `ns` of host time pass: on the reference, in UTC and, to the last fraction of a tick, on the TSC."""
        if whole("ns", ns) < 0:
            raise RangeError(f"advance(ns={shown(ns)}): time passes forwards; set tsc or ref_ns to play a step back")
        ticks, self._tick_remainder = divmod(ns * self.tsc_hz + self._tick_remainder, NS_PER_S)
        self.counter.value = (self.counter.value + ticks) & U64_MASK
        self.ref_ns = RefNs(self.ref_ns + ns)
        self.realtime_ns += ns

    def sleep(self, *, ns: int, tsc: TscInSleep) -> None:
        """Let the host sleep for `ns`: UTC goes on, the reference clock does not, and the TSC does what is said.

        A TSC that restarts is 0 when the host wakes.  "restarts, continued" is a KVM that has added the difference to
        every vCPU's offset, so that the guests' TSCs go on where they were (kvm_arch_enable_virtualization_cpu).
        """
        if whole("ns", ns) < 0:
            raise RangeError(f"sleep(ns={shown(ns)}): time passes forwards")
        if text("tsc", tsc) not in get_args(TscInSleep):
            raise ConfigError(f"tsc is {quoted(tsc)}; it can be {', '.join(get_args(TscInSleep))}")
        before = self.tsc
        if tsc == "counts on":
            self.advance(ns=ns)
            self.ref_ns = RefNs(self.ref_ns - ns)
        else:
            self.realtime_ns += ns
            self.tsc = before if tsc == "stops" else 0
        if tsc == "restarts, continued":
            self.tsc_offsets = {vcpu: (offset + before) & U64_MASK for vcpu, offset in self.tsc_offsets.items()}
        self.asleep_ns += ns

    def sample(self, reference: Reference) -> Sample:
        """See Backend: within a tick."""
        ns = self.realtime_ns if reference is Reference.REALTIME else self.ref_ns
        return Sample(self.tsc, ns, NS_PER_S / self.tsc_hz)

    def stamps(self) -> HostStamps:
        """See Backend."""
        return HostStamps(self.tsc, self.ref_ns, self.realtime_ns, self.boot_id, self.asleep_ns)

    def tsc_readings(self) -> tuple[HostTsc, ...]:
        """See Backend: two CPUs."""
        return self.tsc, HostTsc((self.tsc + self.cpu_lag_ticks) & U64_MASK)

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

    def tsc_offset(self, vcpu: int) -> int | None:
        """See Backend."""
        return self.tsc_offsets.get(vcpu, 0)

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
        self.tsc_hz = measure_tsc_hz() if tsc_hz is None else whole("tsc_hz", tsc_hz, 1, U64_MASK)
        self.tsc_stable = host_clocksource() == "tsc"

    def sample(self, reference: Reference) -> Sample:
        """See Backend; some 20 ns are its bound."""
        return bracketed(reference, self.tsc_hz)

    def stamps(self) -> HostStamps:
        """See Backend."""
        return host_stamps(self.sample, self.tsc_hz)

    def tsc_readings(self) -> tuple[HostTsc, ...]:
        """See Backend."""
        return tsc_of_each_cpu(self.counter)

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

    def tsc_offset(self, vcpu: int) -> int | None:
        """See Backend."""
        return None

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


def host_stamps(sample: Callable[[Reference], Sample], tsc_hz: int) -> HostStamps:
    """One instant on this host's clocks, by a backend's sample(): that on CLOCK_MONOTONIC_RAW.

    UTC is that of the sample before it, some us ago, plus the ticks since.
    """
    real, raw = sample(Reference.REALTIME), sample(Reference.RAW)
    passed_ns = signed64(raw.tsc - real.tsc) * NS_PER_S // tsc_hz
    return HostStamps(raw.tsc, RefNs(raw.ns), real.ns + passed_ns, boot_id(), asleep_bounds_ns()[0])


def wait_until(counter: Counter, tsc: HostTsc, tsc_hz: int) -> None:
    """Return once `counter` is at `tsc` or beyond: as soon after as this thread gets a CPU."""
    while 0 < (left := (tsc - counter.read()) & U64_MASK) <= U64_MASK // 2:
        time.sleep(left / tsc_hz)


def asleep_bounds_ns() -> tuple[int, int]:
    """For how long this host has slept since it booted, in ns: at least, and at most.

    CLOCK_BOOTTIME - CLOCK_MONOTONIC, between two readings of the latter: the narrowest bracket of a few.
    """
    bounds = []
    for _ in range(ASLEEP_TRIES):
        earlier_ns = time.monotonic_ns()
        boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        later_ns = time.monotonic_ns()
        # Either clock cuts off a fraction of a ns.
        bounds.append((boottime_ns - later_ns - 1, boottime_ns - earlier_ns + 1))
    return min(bounds, key=lambda each: each[1] - each[0])


def tsc_of_each_cpu(counter: Counter) -> tuple[HostTsc, ...]:
    """`counter` as each CPU reads it that this thread may run on; the thread visits them, and comes back.

    The CPU that it runs on is the first.  Where the kernel refuses the visits it is the only one.
    """
    readings = [HostTsc(counter.read())]
    allowed = os.sched_getaffinity(0)
    try:
        for cpu in sorted(allowed):
            os.sched_setaffinity(0, {cpu})
            readings.append(HostTsc(counter.read()))
    except OSError:  # a cpuset took that CPU away meanwhile
        pass
    finally:
        os.sched_setaffinity(0, allowed)
    return tuple(readings)


@cache
def boot_id() -> str | None:
    """Which boot of which host this is; read once in a process."""
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
