"""Execution time: a host whose counter advances only while the guest executes.

A GuestClock on an ExecutionTimeBackend keeps the VMM's own work out of guest time.  All its operations are as exact as
on the inner backend, in executed ticks.

Source: Palacios vmm_time.c, whose cores with source=none take the host cycles of each run (P-08, P-11, P-12).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final, NamedTuple
from weakref import WeakSet

from pvclock._counter import Counter, SimulatedCounter
from pvclock.arguments import flag, serving, whole
from pvclock.errors import RangeError, StateError
from pvclock.host.backend import Backend
from pvclock.quantities import U64_MASK, HostTsc, signed64
from pvclock.readings import HostStamps, Reference, Sample

__all__ = ["ExecutionTimeBackend"]

TICKS_MAX: Final = U64_MASK // 2
"""Longest run: more ticks at once look like a counter that went back."""


class _Run(NamedTuple):
    """A run whose ticks are not counted yet; `ticks`, from entry to exit, is None while the guest executes.

    host_tsc: host TSC at the run's begin, plus the ticks of quiesces since, which the run excludes.
    """

    host_tsc: HostTsc
    executed: HostTsc
    ticks: int | None


class ExecutionTimeBackend:
    """`inner`'s host, except that `counter` counts only ticks in which the guest executed, starting at `executed`.

    A run is the VM's, not a vCPU's: call enter() before the first vCPU enters the guest, exit() when the last one is
    out, then ran(); leave() is both.  Clock operations during a run keep the vCPUs out by quiesce().

    native: the guest reads its TSC from the hardware, so enter() sets the hardware's offsets through `inner` to
    continue where the guest stopped.  A run lasts from enter() to exit() and includes their own cost, which the guest
    may have seen pass; it excludes quiesces.  GuestClock() or enter() raises TscOffsetNotHonoured if the host has no
    such offsets.
    native=False is for a VMM that traps RDTSC or is an emulator: `inner` gets no offsets, and any count of cycles that
    fits between enter() and exit() is exact.  Its guest's TSC is GuestClock.guest_tsc(vcpu, counter.read()).

    A halted guest executes nothing, so pass ran() the ticks that it should sleep; else no timer ever wakes it.

    Thread-safety: all methods may be called from any thread.
    """

    counter_follows_host = False

    def __init__(self, inner: Backend, executed: int = 0, *, native: bool = True) -> None:
        self.inner = serving("inner", inner, "sample", "stamps", "set_tsc_offset", "quiesce", wanted="a Backend")
        self.native = flag("native", native)
        self._counter = SimulatedCounter(whole("executed", executed))
        self._offsets: dict[int, int] = {}  # guest TSC - counter, by vCPU
        self._run: _Run | None = None
        self._quiesces: WeakSet[_Quiesce] = WeakSet()  # weak: a dropped one keeps no vCPU out
        self._quiet_since = HostTsc(0)  # valid while there are any
        self._lock = threading.Lock()

    @property
    def vcpu_count(self) -> int | None:
        """See Backend: the inner backend's, None if it has none."""
        return getattr(self.inner, "vcpu_count", None)

    @property
    def vcpu_host(self) -> str | None:
        """See Backend: the inner backend's, None if it has none."""
        return getattr(self.inner, "vcpu_host", None)

    @property
    def kernel_features(self) -> Mapping[str, int]:
        """See Backend: that of the one inside, if it knows."""
        return getattr(self.inner, "kernel_features", {})

    @property
    def boot_id(self) -> str | None:
        """See Backend."""
        return self.inner.boot_id

    # Around the guest's execution

    def enter(self) -> HostTsc:
        """Begin a run: the guest is about to execute.  Returns the host TSC from which its ticks count.

        StateError during a run, or if the last one still needs ran().
        """
        with self._lock:
            if self._run is not None:
                raise StateError("enter", _described(self._run), "exit(), then ran(), first")
            stamp = HostTsc(self.inner.counter.read())
            run = _Run(stamp, HostTsc(self._counter.value), None)
            if self.native:
                self._set_offsets(run)
            self._run, self._quiet_since = run, stamp
            return stamp

    def exit(self) -> int:
        """End a run: the guest stopped executing.  Returns the host ticks since enter(), 0 if the host TSC went back.

        ran() counts them.  StateError without enter().
        """
        with self._lock:
            if self._run is None or self._run.ticks is not None:
                raise StateError("exit", _described(self._run), "enter() first")
            ticks = self._ticks_since(self._run)
            self._run = self._run._replace(ticks=ticks)
            return ticks

    def ran(self, cycles: int) -> None:
        """Advance the counter by `cycles` host ticks, which the guest executed.

        After exit(), what it returned or, unless native, 0 up to that.  Without enter() and exit(), for VMMs that count
        themselves, 0 to 2^63 - 1.  RangeError otherwise, with nothing changed; StateError during a run.
        """
        cycles = whole("cycles", cycles)
        with self._lock:
            run = self._run
            if run is None:
                executed, least, most = self._counter.value, 0, TICKS_MAX
            elif run.ticks is None:
                raise StateError("ran", _described(run), "exit() first")
            else:
                executed, least, most = run.executed, run.ticks if self.native else 0, run.ticks
            if not least <= cycles <= most:
                raise RangeError(f"ran({cycles}): this run can have {least} to {most} host ticks")
            self._counter.value = (executed + cycles) & U64_MASK
            self._run = None

    def leave(self) -> None:
        """End the run, if any, and count all its ticks: exit() and ran() in one."""
        with self._lock:
            if self._run is not None:
                self._count(self._run)
                self._run = None

    @property
    def is_running(self) -> bool:
        """Is the guest in a run, between enter() and exit()?"""
        run = self._run
        return run is not None and run.ticks is None

    # Backend

    @property
    def counter(self) -> Counter:
        """Executed host ticks.  During a run they stand still; if native, reading this attribute updates them."""
        with self._lock:
            if self.native and self._run is not None:
                self._count(self._run)
        return self._counter

    @property
    def tsc_hz(self) -> int:
        """See Backend: executed ticks have the host's frequency."""
        return self.inner.tsc_hz

    @property
    def tsc_stable(self) -> bool:
        """See Backend."""
        return self.inner.tsc_stable

    def sample(self, reference: Reference) -> Sample:
        """See Backend: the host's clock, which runs on while the guest does not execute."""
        seen = self.inner.sample(reference)
        with self._lock:
            run = self._run
            if self.native and run is not None and run.ticks is None and not self._quiesces:
                return seen._replace(tsc=HostTsc((run.executed + seen.tsc - run.host_tsc) & U64_MASK))
            return seen._replace(tsc=HostTsc(self._counter.value))

    def stamps(self) -> HostStamps:
        """See Backend: `tsc` is in executed ticks, all else is the host's."""
        return self.inner.stamps()._replace(tsc=HostTsc(self.counter.read()))

    def tsc_readings(self) -> tuple[HostTsc, ...]:
        """See Backend: one reading, since all CPUs share the count of executed ticks."""
        return (HostTsc(self.counter.read()),)

    def run_delay_ns(self, vcpu: int) -> int | None:
        """See Backend."""
        return self.inner.run_delay_ns(vcpu)

    def run_until(self, tsc: HostTsc) -> None:
        """See Backend: one run, until the counter is at `tsc`, or beyond by what the host takes to stop."""
        missing = signed64(tsc - self.counter.read())
        if missing <= 0:
            return
        begin = self.enter()
        try:
            self.inner.run_until(HostTsc((begin + missing) & U64_MASK))
        finally:
            self.leave()

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """See Backend: vCPU's guest TSC is the counter plus `offset` from now on."""
        with self._lock:
            if self.native:
                run = self._run
                ahead = self._counter.value - self.inner.counter.read() if run is None else run.executed - run.host_tsc
                self.inner.set_tsc_offset(vcpu, (offset + ahead) & U64_MASK)
            self._offsets[vcpu] = offset

    def tsc_offset(self, vcpu: int) -> int | None:
        """See Backend."""
        return None

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """See Backend: if native, no ticks count meanwhile, and the guest's TSCs continue where they stopped."""
        inner = self.inner.quiesce(vcpu)
        return _Quiesce(inner, self._begin_quiesce, self._end_quiesce) if self.native else inner

    def vcpus_are_out(self) -> bool | None:
        """See Backend."""
        return self.inner.vcpus_are_out()

    # Inside

    def _begin_quiesce(self, quiesce: _Quiesce) -> None:
        """Stop counting: the vCPUs are out of the guest, from the first quiesce on."""
        with self._lock:
            if not self._quiesces:
                self._quiet_since = HostTsc(self.inner.counter.read())
            self._quiesces.add(quiesce)
            if self._run is not None:
                self._count(self._run)

    def _end_quiesce(self, quiesce: _Quiesce) -> None:
        """Continue the run where it stopped, if `quiesce` was the last.  Idempotent."""
        with self._lock:
            try:
                run = self._run
                if run is not None and run.ticks is None and list(self._quiesces) == [quiesce]:
                    self._continue(run)
            finally:
                self._quiesces.discard(quiesce)

    def _continue(self, before: _Run) -> None:
        """Exclude the time since the first quiesce from the run."""
        now = HostTsc(self.inner.counter.read())
        run = before._replace(host_tsc=HostTsc((before.host_tsc + now - self._quiet_since) & U64_MASK))
        try:
            self._set_offsets(run)
            self._run, self._quiet_since = run, now  # together, so that a repeat does nothing
        except BaseException:
            self._set_offsets(before)  # keep the vCPUs' TSCs equal; the run then includes the quiesce
            raise

    def _set_offsets(self, run: _Run) -> None:
        """Set the hardware's TSC offsets so that in `run` each vCPU reads its guest TSC."""
        for vcpu, offset in self._offsets.items():
            self.inner.set_tsc_offset(vcpu, (offset + run.executed - run.host_tsc) & U64_MASK)

    def _count(self, run: _Run) -> None:
        """Update the counter to what `run` executed so far."""
        ticks = self._ticks_since(run) if run.ticks is None else run.ticks
        self._counter.value = (run.executed + ticks) & U64_MASK

    def _ticks_since(self, run: _Run) -> int:
        """Host ticks of a run until now, never fewer than the counter has already shown."""
        now = self._quiet_since if self._quiesces else self.inner.counter.read()
        return max(signed64(now - run.host_tsc), (self._counter.value - run.executed) & U64_MASK)


class _Quiesce:
    """Quiesces the vCPUs by `inner` and excludes that time from the run by `begin` and `end`; `end` may run twice."""

    def __init__(
        self,
        inner: AbstractContextManager[None],
        begin: Callable[[_Quiesce], None],
        end: Callable[[_Quiesce], None],
    ) -> None:
        self._inner, self._begin, self._end = inner, begin, end

    def __enter__(self) -> None:
        self._inner.__enter__()
        try:
            self._begin(self)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._end(self)
        except BaseException:
            self._end(self)  # an interrupt may have prevented the first call
            raise
        finally:
            self._inner.__exit__(kind, value, traceback)


def _described(run: _Run | None) -> str:
    if run is None:
        return "the guest is not in a run"
    if run.ticks is None:
        return f"the guest is in a run since host TSC {run.host_tsc}"
    return f"a run of {run.ticks} host ticks is not counted yet"
