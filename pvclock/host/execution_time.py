"""Execution time: a host whose counter advances only while the guest executes.

A GuestClock on an ExecutionTimeBackend keeps the VMM's own work out of guest time.  The clock does not know: all its
operations are as exact as on the backend inside, in executed ticks.

Source: Palacios vmm_time.c, whose unslaved cores are told how many host cycles each run took (P-08, P-11, P-12).
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
from pvclock.quantities import U64_MASK, HostTsc
from pvclock.readings import HostStamps, Reference, Sample

__all__ = ["ExecutionTimeBackend"]

TICKS_MAX: Final = U64_MASK // 2
"""More at once could not be told from a counter that went back."""


class _Run(NamedTuple):
    """A run whose ticks are not counted yet; `ticks`, from entry to exit, is None while the guest executes.

    host_tsc: the host's when the run began, plus the holds since then, which are no part of it.
    """

    host_tsc: HostTsc
    executed: HostTsc
    ticks: int | None


class ExecutionTimeBackend:
    """`inner`'s host, but that `counter` has only the ticks in which the guest executed; it begins at `executed`.

    A run is the VM's, not a vCPU's: enter() before the first vCPU goes in, exit() when the last one is out, then
    ran(); leave() is both.  An operation on the clock in a run keeps the vCPUs out by quiesce().

    native: the guest reads its TSC from the hardware, so enter() sets the hardware's offsets through `inner` to where
    the guest left off, and a run lasts from enter() to exit(), what they cost included: the guest may have seen it
    pass; what quiesce() kept the vCPUs out for is no part of the run.  TscOffsetNotHonoured, from GuestClock() or from
    enter(), where the host has no such offsets.
    native=False is for a VMM that traps RDTSC or is an emulator: `inner` gets no offsets, and any count of cycles that
    fits between enter() and exit() is exact.  Its guest's TSC is GuestClock.guest_tsc(vcpu, counter.read()).

    A guest that halts executes nothing, so give ran() the ticks that it is to have slept: else no timer ever wakes it.

    Thread-safety: all methods may be called from any thread.
    """

    counter_follows_host = False

    def __init__(self, inner: Backend, executed: int = 0, *, native: bool = True) -> None:
        self.inner = serving("inner", inner, "sample", "stamps", "set_tsc_offset", "quiesce", wanted="a Backend")
        self.native = flag("native", native)
        self._counter = SimulatedCounter(whole("executed", executed))
        self._offsets: dict[int, int] = {}  # guest TSC - counter, by vCPU
        self._run: _Run | None = None
        self._holds: WeakSet[_Hold] = WeakSet()  # one that is dropped keeps nobody out
        self._held_since = HostTsc(0)  # while there are any
        self._lock = threading.Lock()

    @property
    def vcpu_count(self) -> int | None:
        """See Backend: that of the one inside, if it knows."""
        return getattr(self.inner, "vcpu_count", None)

    @property
    def guest_engine(self) -> str | None:
        """See Backend: that of the one inside, if it knows."""
        return getattr(self.inner, "guest_engine", None)

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
        """The guest is about to execute; returns the host's TSC from which on it counts.

        StateError during a run, or after one that ran() was not told of.
        """
        with self._lock:
            if self._run is not None:
                raise StateError("enter", _described(self._run), "exit(), then ran(), first")
            stamp = HostTsc(self.inner.counter.read())
            run = _Run(stamp, HostTsc(self._counter.value), None)
            if self.native:
                self._give_offsets(run)
            self._run, self._held_since = run, stamp
            return stamp

    def exit(self) -> int:
        """The guest has stopped executing; returns the host ticks since enter(); none pass if the host's TSC goes back.

        They count when ran() says so.  StateError without enter().
        """
        with self._lock:
            if self._run is None or self._run.ticks is not None:
                raise StateError("exit", _described(self._run), "enter() first")
            ticks = self._ticks_since(self._run)
            self._run = self._run._replace(ticks=ticks)
            return ticks

    def ran(self, cycles: int) -> None:
        """The guest executed for `cycles` host ticks: the counter goes on by exactly that.

        After exit() they are what it returned or, unless native, any exact count from 0 to that.  Without enter() and
        exit(), for VMMs that count by themselves, they are 0 to 2^63 - 1.  RangeError otherwise, with nothing changed;
        StateError during a run.
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
                raise RangeError(f"ran({cycles}): host ticks of this run, which can be {least} to {most}")
            self._counter.value = (executed + cycles) & U64_MASK
            self._run = None

    def leave(self) -> None:
        """End the run, if there is one, and count all its ticks: exit() and ran() in one."""
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
        """Executed host ticks.  During a run they stand still or, if native, are brought up to date by asking here."""
        with self._lock:
            if self.native and self._run is not None:
                self._count(self._run)
        return self._counter

    @property
    def tsc_hz(self) -> int:
        """See Backend: of executed ticks, which are the host's."""
        return self.inner.tsc_hz

    @property
    def tsc_stable(self) -> bool:
        """See Backend."""
        return self.inner.tsc_stable

    def sample(self, reference: Reference) -> Sample:
        """See Backend: the clock is the host's, and goes on while the guest does not execute."""
        seen = self.inner.sample(reference)
        with self._lock:
            run = self._run
            if self.native and run is not None and run.ticks is None and not self._holds:
                return seen._replace(tsc=HostTsc((run.executed + seen.tsc - run.host_tsc) & U64_MASK))
            return seen._replace(tsc=HostTsc(self._counter.value))

    def stamps(self) -> HostStamps:
        """See Backend: `tsc` is in executed ticks, all else is the host's."""
        return self.inner.stamps()._replace(tsc=HostTsc(self.counter.read()))

    def tsc_readings(self) -> tuple[HostTsc, ...]:
        """See Backend: executed ticks are counted in one place, whatever CPU asks."""
        return (HostTsc(self.counter.read()),)

    def run_delay_ns(self, vcpu: int) -> int | None:
        """See Backend."""
        return self.inner.run_delay_ns(vcpu)

    def run_until(self, tsc: HostTsc) -> None:
        """See Backend: one run, until `tsc` - counter ticks more are executed, or as many more as the host takes."""
        missing = (tsc - self.counter.read()) & U64_MASK
        if not 0 < missing <= TICKS_MAX:
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
        """See Backend: if native, nothing is executed meanwhile, and the guest's TSCs go on from where they were."""
        inner = self.inner.quiesce(vcpu)
        return _Hold(inner, self._begin_hold, self._end_hold) if self.native else inner

    def vcpus_are_out(self) -> bool | None:
        """See Backend."""
        return self.inner.vcpus_are_out()

    # Inside

    def _begin_hold(self, hold: _Hold) -> None:
        """The vCPUs are out by `hold`: what has been executed stands from the first such hold on."""
        with self._lock:
            if not self._holds:
                self._held_since = HostTsc(self.inner.counter.read())
            self._holds.add(hold)
            if self._run is not None:
                self._count(self._run)

    def _end_hold(self, hold: _Hold) -> None:
        """The vCPUs may go in by `hold`; after the last one a run goes on from where it was.  Twice is once."""
        with self._lock:
            try:
                run = self._run
                if run is not None and run.ticks is None and list(self._holds) == [hold]:
                    self._go_on(run)
            finally:
                self._holds.discard(hold)

    def _go_on(self, before: _Run) -> None:
        """Leave the time since the first hold out of the run."""
        now = HostTsc(self.inner.counter.read())
        run = before._replace(host_tsc=HostTsc((before.host_tsc + now - self._held_since) & U64_MASK))
        try:
            self._give_offsets(run)
            self._run, self._held_since = run, now  # in one step: done again it does nothing
        except BaseException:
            self._give_offsets(before)  # else its vCPUs' TSCs differ; the hold is part of the run then
            raise

    def _give_offsets(self, run: _Run) -> None:
        """Let the hardware's TSCs be in `run` what the guest's are."""
        for vcpu, offset in self._offsets.items():
            self.inner.set_tsc_offset(vcpu, (offset + run.executed - run.host_tsc) & U64_MASK)

    def _count(self, run: _Run) -> None:
        """Let the counter show what was executed of `run` so far."""
        ticks = self._ticks_since(run) if run.ticks is None else run.ticks
        self._counter.value = (run.executed + ticks) & U64_MASK

    def _ticks_since(self, run: _Run) -> int:
        """Host ticks of a run until now, and no fewer than the counter has shown of it."""
        now = self._held_since if self._holds else self.inner.counter.read()
        ticks = (now - run.host_tsc) & U64_MASK
        return max(ticks if ticks <= TICKS_MAX else 0, (self._counter.value - run.executed) & U64_MASK)


class _Hold:
    """Keeps the vCPUs out of the guest by `inner`, and that out of the run by `begin` and `end`, which may be twice."""

    def __init__(
        self,
        inner: AbstractContextManager[None],
        begin: Callable[[_Hold], None],
        end: Callable[[_Hold], None],
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
            self._end(self)  # an interrupt may have come before it began
            raise
        finally:
            self._inner.__exit__(kind, value, traceback)


def _described(run: _Run | None) -> str:
    if run is None:
        return "the guest is not in a run"
    if run.ticks is None:
        return f"the guest is in a run since host TSC {run.host_tsc}"
    return f"a run of {run.ticks} host ticks is not counted yet"
