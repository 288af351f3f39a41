"""A machine's clock as the engine serves it: made or restored, ticked, and paused and let go on with the vCPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

from pvclock._memory import GuestMemory
from pvclock.clock.guest_clock import GuestClock
from pvclock.clock.ticker import Ticker
from pvclock.errors import ConfigError, StateError, TscOffsetNotHonoured
from pvclock.host.backend import Backend
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.kvm import KvmBackend, Runner
from pvclock.kvm.backend import SteeredTscBackend
from pvclock.quantities import U64_MASK
from pvclock.readings import RunReport
from pvclock.state.clock_state import ClockState
from pvclock.timekeeping.catchup import Policy, as_policy

__all__ = ["BackendWrapper", "ClockService", "make_clock"]

BackendWrapper: TypeAlias = Callable[[KvmBackend | SteeredTscBackend], Backend]
"""Makes the backend that a machine's clock has of the one for its vCPUs: ExecutionTimeBackend is such.

What it returns must have that one's tsc_hz and ask it whether the vCPUs are held, as one around it does; any other
would be a clock of other vCPUs.
"""


def make_clock(
    memory: GuestMemory,
    vcpus: int,
    inner: KvmBackend | SteeredTscBackend,
    *,
    wrap: BackendWrapper | None = None,
    restore: ClockState | None = None,
    options: dict[str, Any],
) -> GuestClock:
    """The clock of a machine whose vCPUs' backend is `inner`: a new one, or that which was saved as `restore`.

    options: GuestClock's, or those of GuestClock.restore().
    """
    backend = inner if wrap is None else _wrapped(wrap, inner, vcpus)
    if restore is not None:
        return GuestClock.restore(restore, memory, backend=backend, engine="kvm", **options)
    options.setdefault("tsc_offset", inner.initial_tsc_offset if backend.counter_follows_host else 0)
    return GuestClock(memory, vcpus, backend=backend, engine="kvm", **options)


def _wrapped(wrap: BackendWrapper, inner: KvmBackend | SteeredTscBackend, vcpus: int) -> Backend:
    backend = wrap(inner)
    if not hasattr(backend, "counter"):
        raise ConfigError(f"backend={wrap!r} made {backend!r} of the vCPUs' backend; it must return a Backend")
    if backend.tsc_hz != inner.tsc_hz or backend.vcpus_are_out() != inner.vcpus_are_out():
        raise ConfigError(
            f"backend={wrap!r} made a {type(backend).__name__} that is not around the vCPUs' backend: it must have its "
            "tsc_hz, and its vcpus_are_out()"
        )
    if isinstance(backend, ExecutionTimeBackend):
        if not backend.native:
            raise ConfigError("an ExecutionTimeBackend with native=False; a guest on /dev/kvm reads the hardware's TSC")
        if isinstance(inner, SteeredTscBackend):
            raise TscOffsetNotHonoured(
                -inner.counter.read() & U64_MASK, "KVM lets a guest's TSC go forward only here: the host's is unstable"
            )
        for vcpu in range(vcpus):
            backend.set_tsc_offset(vcpu, 0)
    return backend


class ClockService:
    """A machine's clock and its ticker, and what is done with them as its vCPUs start, pause, go on and end.

    clock: None where the kernel serves it; then vCPUs alone are started and stopped.  tick_interval_s: the ticker's;
    None for no ticker.  A clock that is paused, as a restored one is, keeps the vCPUs out until start() or resume().

    Thread-safety: all methods may be called from any thread.
    """

    def __init__(self, runner: Runner, clock: GuestClock | None, tick_interval_s: float | None) -> None:
        self.clock = clock
        self.ticker = None if clock is None or tick_interval_s is None else Ticker(clock, interval_s=tick_interval_s)
        self._runner = runner
        backend = None if clock is None else clock.backend
        self._execution_time = backend if isinstance(backend, ExecutionTimeBackend) else None
        # Around what changes vCPUs and clock: the clock's own lock, which who calls from an on_dirty has already.
        self._changing = threading.RLock() if clock is None else clock.memory.clock_lock
        self._resumes_at_start = clock is not None and clock.is_paused
        if self._resumes_at_start:
            runner.pause()

    def start(self) -> None:
        """Tick the clock, let the vCPUs run, and a restored clock go on."""
        try:
            with self._changing:
                self._begin()
                self._runner.start()
                if self._resumes_at_start:
                    self.resume()
        except BaseException:
            if not self._is_running:
                self._end()  # without the lock, for which a tick may wait
            raise

    def pause(self) -> None:
        """Keep the vCPUs out, and stop the clock."""
        with self._changing:
            self._resumes_at_start = False
            self._runner.pause()
            if self._execution_time is not None:
                self._execution_time.leave()
            if self.clock is not None and not self.clock.is_paused:
                self.clock.pause()

    def resume(self, policy: Policy | str | None = None) -> None:
        """Let the clock go on, by `policy` or its own, and then the vCPUs."""
        if policy is not None:
            as_policy(policy)  # checked also where it settles nothing; the clock's event has the caller's words
        with self._changing:
            self._resumes_at_start = False
            if self.clock is not None and self.clock.is_paused:
                self.clock.resume(policy)
            if self._is_running:
                self._enter()
            self._runner.resume()

    def run_for(self, ns: int) -> RunReport:
        """Let the vCPUs of a paused machine run for `ns` of guest time; StateError if there are none that would."""
        clock = self.engine_clock("run_for")
        if self._runner.gate.has_ended():
            raise StateError("run_for", "the run has ended", "make another machine; this one's clock can be saved")
        if not self._runner.gate.has_begun():
            raise StateError("run_for", "the machine was never started", "start() it and pause() it before")
        return clock.run_for(ns)

    def save(self) -> ClockState:
        """The clock of a paused machine."""
        with self._changing:
            clock = self.engine_clock("save")
            if not clock.is_paused:
                raise StateError("save", "the machine is not paused", "pause() it, and copy its RAM before it goes on")
            return clock.save()

    def engine_clock(self, operation: str) -> GuestClock:
        """The clock, for `operation`; StateError where the kernel serves it."""
        if self.clock is None:
            raise StateError(operation, "the kernel serves this guest's clock", 'make a machine with clock="engine"')
        return self.clock

    def stop(self) -> None:
        """End the run, and then the ticker; on a vCPU's own thread without waiting for them.

        StateError if a tick does not return.
        """
        self._runner.stop()
        if not self._runner.gate.threads():
            self._end()
        elif self.ticker is not None:
            with suppress(StateError):  # a tick may wait for this very thread
                self.ticker.stop(0)

    def close(self) -> None:
        """End what is left of it; for after the run."""
        self._end()

    @property
    def has_threads(self) -> bool:
        """Are there threads that run vCPUs, or tick?"""
        return bool(self._runner.gate.threads()) or (self.ticker is not None and self.ticker.has_threads)

    # Inside

    @property
    def _is_running(self) -> bool:
        gate = self._runner.gate
        return gate.has_begun() and not gate.has_ended()

    def _begin(self) -> None:
        """Before the vCPUs have threads; nothing if they have, or had."""
        gate = self._runner.gate
        if gate.has_begun() or gate.has_ended():
            return
        if self.ticker is not None:
            self.ticker.start()
        if not gate.is_paused():
            self._enter()

    def _enter(self) -> None:
        """Before the first vCPU goes in."""
        if self._execution_time is not None and not self._execution_time.is_running:
            self._execution_time.enter()

    def _end(self) -> None:
        """After the last vCPU is out for good."""
        if self._execution_time is not None:
            self._execution_time.leave()
        if self.ticker is not None:
            self.ticker.stop()
