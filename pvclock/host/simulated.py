"""Host time under the caller's control, for tests, simulators and examples."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Literal, TypeAlias, get_args

from pvclock._counter import SimulatedCounter
from pvclock.arguments import flag, text, whole
from pvclock.errors import ConfigError, RangeError, TscOffsetNotHonoured
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, RefNs, quoted, shown, signed64
from pvclock.readings import HostStamps, Reference, Sample

__all__ = ["SimulatedBackend"]

_simulated = count(1)


TscInSleep: TypeAlias = Literal["stops", "restarts", "counts on", "restarts, continued"]


class SimulatedBackend:
    """Host time that moves only when told to, exactly.

    Set `tsc` (ticks), `ref_ns` (the reference clock), `realtime_ns` (UTC since 1970) or `asleep_ns` alone to simulate a
    fault.  `cpu_lag_ticks`: how far the current CPU's TSC, which is `tsc`, is behind the other CPU's.  Each instance is
    a host of its own unless given the same `boot_id`.  honours_tsc_offset=False simulates a host that refuses offsets
    with TscOffsetNotHonoured.
    """

    counter_follows_host = True

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
    ) -> None:
        self.counter = SimulatedCounter(whole("tsc", tsc))
        self.tsc_hz = whole("tsc_hz", tsc_hz, 1, U64_MASK)
        self.tsc_stable = flag("tsc_stable", tsc_stable)
        self.ref_ns = RefNs(whole("ref_ns", ref_ns))
        self.realtime_ns = whole("realtime_ns", realtime_ns)
        self.boot_id = f"simulated {next(_simulated)}" if boot_id is None else text("boot_id", boot_id)
        self.asleep_ns = 0
        self.cpu_lag_ticks = 0
        self.tsc_offsets: dict[int, int] = {}
        self.run_delays_ns: dict[int, int] = {}
        self.kernel_features: Mapping[str, int] = {}
        self._honours_tsc_offset = flag("honours_tsc_offset", honours_tsc_offset)
        self._tick_remainder = 0  # in 1 / NS_PER_S ticks: the part of a tick that advance() has not added yet

    @property
    def tsc(self) -> HostTsc:
        """Ticks modulo 2^64; settable."""
        return HostTsc(self.counter.value)

    @tsc.setter
    def tsc(self, ticks: int) -> None:
        self.counter.value = whole("tsc", ticks)

    def advance(self, *, ns: int) -> None:
        """Advance the reference, UTC and the TSC by `ns`; a remaining fraction of a tick carries over."""
        if whole("ns", ns) < 0:
            raise RangeError(f"advance(ns={shown(ns)}): time goes forward; for a step back set tsc or ref_ns")
        ticks, self._tick_remainder = divmod(ns * self.tsc_hz + self._tick_remainder, NS_PER_S)
        self.counter.value = (self.counter.value + ticks) & U64_MASK
        self.ref_ns = RefNs(self.ref_ns + ns)
        self.realtime_ns += ns

    def sleep(self, *, ns: int, tsc: TscInSleep) -> None:
        """Let the host sleep for `ns`: UTC advances, the reference clock does not, the TSC behaves as `tsc` says.

        A TSC that restarts is 0 when the host wakes.  "restarts, continued" simulates KVM, which then adds the
        difference to every vCPU's offset, so that guest TSCs continue (kvm_arch_enable_virtualization_cpu).
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
        """See Backend: exact to one tick."""
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
        """See Backend: advances host time to that tick."""
        ticks = (tsc - self.tsc) & U64_MASK
        if signed64(ticks) > 0:
            ns = -((self._tick_remainder - ticks * NS_PER_S) // self.tsc_hz)  # rounded up: ticks carry over, ns do not
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

    def vcpus_are_out(self) -> bool | None:
        """See Backend: the VMM guarantees it."""
        return None
