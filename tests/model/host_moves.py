"""What a host can do to a clock: time that passes, sleep, TSCs that step, and what fails in the next call."""

from __future__ import annotations

import errno
from fractions import Fraction

from pvclock import HostTsc, KvmError, TscOffsetNotHonoured
from tests.model.model_clock import NS_PER_S
from tests.model.twins import Twins

__all__ = ["SLEEPS", "HostMoves"]

SLEEPS = ("stops", "restarts", "counts on", "restarts, continued")


class HostMoves:
    """The host: every method is one move, and does nothing where it makes no sense."""

    def __init__(self, twins: Twins) -> None:
        self._twins = twins

    # The host

    def advance(self, ns: int) -> None:
        """Host time passes, but no more guest time than 2 s between publishes."""
        rate = max(self._twins.model.rate, Fraction(1))
        self._twins.host.advance(ns=int(ns / rate))
        self._twins.pass_time()

    def set_utc(self, ns: int) -> None:
        """UTC is set."""
        self._twins.host.realtime_ns += ns

    def sleep(self, ns: int, regime: int) -> None:
        """The host sleeps."""
        twins, host = self._twins, self._twins.host
        if twins.is_undecided or twins.lag or twins.published_tsc < 200 * host.tsc_hz:
            return
        before, mode = host.tsc, SLEEPS[regime]
        host.sleep(ns=ns, tsc=mode)  # type: ignore[arg-type]  # one of them
        if mode.startswith("restarts"):
            twins.step, twins.model.tsc = before, 0
            twins.has_continued = mode.endswith("continued")
        twins.sleep = ns, mode == "counts on"
        twins.pass_time()

    def step_back(self, ns: int) -> None:
        """The TSC steps back on all CPUs, to `ns` before the last publish."""
        twins, host = self._twins, self._twins.host
        ticks = host.tsc - twins.published_tsc + ns * host.tsc_hz // NS_PER_S
        if not twins.is_undecided and not twins.lag and ticks <= host.tsc:
            self._step(ticks)

    def come_back(self) -> None:
        """The TSC that stepped back is what it was."""
        if self._twins.went_back and not self._twins.is_undecided and not self._twins.lag:
            self._step(-self._twins.went_back)

    def _step(self, ticks: int) -> None:
        self._twins.host.tsc = HostTsc(self._twins.host.tsc - ticks)
        self._twins.model.tsc -= ticks
        self._twins.step = ticks

    def read_low(self, ticks: int) -> None:
        """The next look at the TSC, and no other, is of a reading before the last publish."""
        self._twins.low_ticks = ticks

    def cpu_behind(self, ns: int) -> None:
        """The CPU that we run on is behind, by `ns` and the time since the last publish."""
        twins, host = self._twins, self._twins.host
        ticks = host.tsc - twins.published_tsc + ns * host.tsc_hz // NS_PER_S
        if not twins.is_undecided and not twins.low_ticks and not twins.lag and ticks <= host.tsc:
            host.tsc, host.cpu_lag_ticks = HostTsc(host.tsc - ticks), ticks

    def cpu_good(self) -> None:
        """It is no longer."""
        self._twins.host.tsc, self._twins.host.cpu_lag_ticks = HostTsc(self._twins.host.true_tsc), 0

    # What fails in the next call

    def refuse_offset(self, vcpu: int, with_errno: int) -> None:
        """The host does not take vCPU's next offset."""
        error = KvmError("KVM_SET_MSRS", errno.EIO) if with_errno else TscOffsetNotHonoured(1)
        self._twins.host.refuse = vcpu % len(self._twins.model.vcpus), error

    def hold_none(self) -> None:
        """The vCPUs do not leave the guest."""
        self._twins.host.holds_vcpus = self._twins.is_undecided or self._twins.low_ticks != 0
        self._twins.raises_dirty = False

    def raise_dirty(self) -> None:
        """on_dirty raises."""
        self._twins.raises_dirty, self._twins.host.holds_vcpus = True, True
