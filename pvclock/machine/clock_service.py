"""A machine's clock, served by the engine or by the kernel: how it starts, pauses, goes on and ends with the vCPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

from pvclock._memory import GuestMemory
from pvclock.clock.guest_clock import GuestClock
from pvclock.clock.ticker import Ticker
from pvclock.clock.timer_thread import TimerThread
from pvclock.errors import ConfigError, MissingCapability, StateError, TscOffsetNotHonoured
from pvclock.host.backend import Backend
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.kvm import KvmBackend, Runner, Vcpu, Vm
from pvclock.kvm.backend import SteeredTscBackend
from pvclock.kvm.tsc_offset import share_tsc
from pvclock.machine.cpuid import CpuidSource, GuestCpuid, KernelClock
from pvclock.machine.dilation_limits import DilationLimits
from pvclock.msr_ranges import MsrRange
from pvclock.providers.interface import HypercallRegisters, HypercallResult
from pvclock.quantities import U64_MASK
from pvclock.readings import RunReport
from pvclock.state.clock_state import ClockState
from pvclock.timekeeping.catchup import Policy, as_policy
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC

__all__ = ["BackendWrapper", "ClockService", "EngineClockService", "KernelClockService", "engine_clock"]

BackendWrapper: TypeAlias = Callable[[KvmBackend | SteeredTscBackend], Backend]
"""Makes the backend of a machine's clock from the one for its vCPUs, as ExecutionTimeBackend does.

What it returns must have that one's tsc_hz and its answer whether the vCPUs are kept out; any other would be a clock of
other vCPUs.
"""


def _wrapped(wrap: BackendWrapper, inner: KvmBackend | SteeredTscBackend) -> Backend:
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
        for vcpu in range(inner.vcpu_count):
            backend.set_tsc_offset(vcpu, 0)
    return backend


class ClockService(Protocol):
    """A machine's clock, served by the engine or by the kernel.  All methods may be called from any thread."""

    @property
    def clock(self) -> GuestClock | None:
        """The engine's clock; None where the kernel serves it."""

    @property
    def ticker(self) -> Ticker | None:
        """What ticks the engine's clock; None without one."""

    @property
    def cpuid(self) -> CpuidSource:
        """What the guest's CPUID says of its clock."""

    def take_cpuid(self, cpuid: GuestCpuid, *, limits_rates: bool) -> None:
        """Keep what the vCPUs were given.  limits_rates: does the guest live by timers that not all rates suit?"""

    def update_cpuid(self) -> None:
        """Give vCPUs that have not run what they would start with."""

    @property
    def msr_ranges(self) -> tuple[MsrRange, ...]:
        """The MSRs whose accesses exit and reach read_msr() and write_msr()."""

    def read_msr(self, vcpu: int, index: int) -> int:
        """RDMSR; MsrFault for #GP."""

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """WRMSR; MsrFault for #GP."""

    @property
    def hypercall_port(self) -> int | None:
        """The port to which the guest's hypercalls write; None without."""

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """A hypercall by that port."""

    @property
    def timer_thread(self) -> TimerThread | None:
        """What expires the timers of the engine's clock; None without timers."""

    def now_ns(self) -> int:
        """Guest time in ns, as this clock's page shows it."""

    def host_ns_until(self, guest_ns: int) -> int | None:
        """Host ns until now_ns() is `guest_ns` at the present rate, 0 if it was; None while time stands still."""

    def next_timer_ns(self) -> int | None:
        """Guest ns at which the next timer of the guest's interface is due; 0 while one is served, None without one."""

    def tell_of_time(self, told: Callable[[], object]) -> None:
        """Call `told` whenever guest time may run otherwise; it neither waits nor raises, nor refers to the machine."""

    @property
    def starts_paused(self) -> bool:
        """Does start() end a pause that is the clock's own: of a restored or a reset machine?"""

    @property
    def has_threads(self) -> bool:
        """Are there threads that run vCPUs, or tick?"""

    def start(self) -> None:
        """Let the vCPUs run, and the clock with them."""

    def pause(self) -> None:
        """Keep the vCPUs out; the engine's clock stops, too."""

    def resume(self, policy: Policy | str | None = None) -> None:
        """Let the clock go on, by `policy` or its own, and then the vCPUs."""

    def run_for(self, ns: int) -> RunReport:
        """Let the vCPUs of a paused machine run for `ns` of guest time; StateError if they would not run."""

    def save(self) -> ClockState:
        """The clock of a paused machine; StateError where the kernel serves it."""

    def roll_back(self, state: ClockState, /, **options: Any) -> None:  # noqa: ANN401  # GuestClock.restore()'s
        """Go back to a saved clock, in a paused machine; StateError where the kernel serves it."""

    def add_vcpu(self, number: int, vcpu: Vcpu) -> None:
        """Let this vCPU have the clock, too, before it runs; all others are kept out.  Again without harm."""

    def reset(self) -> None:
        """The clock as at the guest's start; for after the run.  Guest time goes on; see GuestClock.reset()."""

    def stop(self) -> None:
        """End the run and what ticks; on a vCPU's own thread without waiting for them."""

    def close(self) -> None:
        """End what is left of it; for after the run."""


class EngineClockService:
    """The engine's clock, its ticker and its timers' thread: what is done with them as the vCPUs start, pause and end.

    tick_interval_s: the ticker's; None for no ticker.  resets_tscs: TSCs begin at 0 again with a reset, as hardware's.
    A clock that is paused, as a restored one is, keeps the vCPUs out until start() or resume().
    """

    def __init__(
        self, runner: Runner, clock: GuestClock, tick_interval_s: float | None, *, resets_tscs: bool = False
    ) -> None:
        self._cpuid: GuestCpuid | None = None
        self._limits: DilationLimits | None = None
        self._told_of_time: list[Callable[[], object]] = []
        self._runner = runner
        self._serve(clock)
        self._resets_tscs = resets_tscs
        self.ticker = None if tick_interval_s is None else Ticker(clock, interval_s=tick_interval_s)
        self._execution_time = clock.backend if isinstance(clock.backend, ExecutionTimeBackend) else None
        # Around what changes vCPUs and clock: the clock's own lock, because a caller in an on_dirty has it already.
        self._changing = clock.memory.clock_lock
        self.starts_paused = clock.is_paused
        if self.starts_paused:
            runner.pause()

    @property
    def cpuid(self) -> CpuidSource:
        """See ClockService."""
        return self.clock

    def take_cpuid(self, cpuid: GuestCpuid, *, limits_rates: bool) -> None:
        """See ClockService."""
        self._cpuid = cpuid
        if limits_rates and cpuid.offers_deadlines:
            self._limits = DilationLimits(cpuid.vcpus, self.clock.dilation)
            self.clock.limit_dilation(self._limits)

    def update_cpuid(self) -> None:
        """See ClockService."""
        with self._changing:
            if self._cpuid is not None:
                self._cpuid.update()

    @property
    def msr_ranges(self) -> tuple[MsrRange, ...]:
        """See ClockService."""
        return self.clock.msr_ranges

    @property
    def hypercall_port(self) -> int | None:
        """See ClockService."""
        return self.clock.interface.hypercall_port

    def now_ns(self) -> int:
        """See ClockService."""
        return self.clock.now()

    def host_ns_until(self, guest_ns: int) -> int | None:
        """See ClockService."""
        return self.clock.timers.host_ns_until(guest_ns)

    def next_timer_ns(self) -> int | None:
        """See ClockService."""
        due_ns = self.clock.timers.next_due_ns()  # before the question whether what was due is being delivered
        return 0 if self.timer_thread is not None and self.timer_thread.is_delivering else due_ns

    def tell_of_time(self, told: Callable[[], object]) -> None:
        """See ClockService: of a clock to which the machine was rolled back, too."""
        self._told_of_time.append(told)
        self.clock.timers.watch(told)

    def start(self) -> None:
        """See ClockService: tick the clock, let the vCPUs run, and a restored or reset clock go on."""
        if self._runner.gate.has_ended():
            self._runner.stop()  # without the lock, for which a thread of the last run may wait
        if not self._is_running:
            self._end_soon()  # what an interrupted start() or stop() left
        try:
            with self._changing:
                if self._cpuid is not None:
                    self._cpuid.settle()
                self._begin()
                self._runner.start()
                if self.starts_paused:
                    self.resume()
        except BaseException:
            if not self._is_running:
                self._end()  # without the lock, for which a tick may wait
            raise

    def pause(self) -> None:
        """See ClockService."""
        with self._changing:
            self.starts_paused = False
            self._runner.pause()
            if self._execution_time is not None:
                self._execution_time.leave()
            if not self.clock.is_paused:
                self.clock.pause()
        if self.timer_thread is not None:
            self.timer_thread.settle()  # without the lock, for which a delivery may wait

    def resume(self, policy: Policy | str | None = None) -> None:
        """See ClockService."""
        _check_policy(policy)
        with self._changing:
            self.starts_paused = False
            if self.clock.is_paused:
                self.clock.resume(policy)
            if self._is_running:
                self._enter()
            self._runner.resume()

    def run_for(self, ns: int) -> RunReport:
        """See ClockService."""
        gate = self._runner.gate
        if gate.has_ended():
            raise StateError("run_for", "the run has ended", "start() it again, or save() its clock")
        if not gate.has_begun():
            raise StateError("run_for", "the machine was never started", "start() it and pause() it before")
        return self.clock.run_for(ns)

    def save(self) -> ClockState:
        """See ClockService."""
        with self._changing:
            if not self.clock.is_paused:
                raise StateError("save", "the machine is not paused", "pause() it, and copy its RAM before it goes on")
            return self.clock.save()

    def roll_back(self, state: ClockState, /, **options: Any) -> None:  # noqa: ANN401  # GuestClock.restore()'s
        """See ClockService: the saved clock, paused, takes the place of this one for exits and ticker, too."""
        with self._changing:
            old = self.clock
            if not old.is_paused:
                raise StateError("roll_back", "the machine is not paused", "pause() it, and put its RAM back")
            options.setdefault("vmm", old.vmm)
            options["vcpus_present"] = old.vcpus_present
            expires = self._end_timers_soon()
            self._serve(GuestClock.restore(state, old.memory, backend=old.backend, vcpu_host="kvm", **options))
            if expires and self.timer_thread is not None:
                self.timer_thread.start()
            if self.ticker is not None:  # a tick of the old clock that waits for the lock is among its failures
                self.ticker.add(self.clock)
                self.ticker.remove(old)

    def add_vcpu(self, number: int, _vcpu: Vcpu) -> None:
        """See ClockService."""
        with self._changing:
            if self.clock.vcpus_present == number:
                self.clock.add_vcpu()

    def reset(self) -> None:
        """See ClockService; a clock that is paused, or vCPUs that are, go on at start()."""
        with self._changing:
            self.clock.reset()
            if self._limits is not None:
                self._limits.begin_anew(self.clock.dilation)
            if self._resets_tscs:
                self._reset_tscs()
            # One without the other after a pause() that was interrupted.
            self.starts_paused = self.clock.is_paused or self._runner.gate.is_paused()

    def stop(self) -> None:
        """See ClockService.  StateError if a tick does not return."""
        self._runner.stop()
        if not self._runner.gate.threads():
            self._end()
        else:
            self._end_soon()

    def close(self) -> None:
        """See ClockService."""
        self._end()

    @property
    def has_threads(self) -> bool:
        """See ClockService."""
        threads = (each for each in (self.ticker, self.timer_thread) if each is not None)
        return bool(self._runner.gate.threads()) or any(each.has_threads for each in threads)

    # Inside

    def _serve(self, clock: GuestClock) -> None:
        """Let `clock` be the machine's; its MSR calls are attributes here, for a guest's exits call nothing else."""
        self.clock = clock
        clock.limit_dilation(self._limits)
        self.read_msr, self.write_msr, self.hypercall = clock.read_msr, clock.write_msr, clock.hypercall
        self._runner.serve_writes(clock.serve_tsc_write)
        self.timer_thread = TimerThread(clock) if clock.timers.exist else None
        for told in self._told_of_time:
            clock.timers.watch(told)
            told()

    def _reset_tscs(self) -> None:
        """Let all vCPUs' TSCs begin at 0, with one offset; they go on where the host lets them not go back."""
        with suppress(TscOffsetNotHonoured, StateError):  # StateError: this CPU's TSC is behind
            for vcpu in range(self.clock.vcpus_present):
                self.clock.host_write_msr(vcpu, MSR_IA32_TSC, 0)
            self.clock.repair_tsc()

    @property
    def _is_running(self) -> bool:
        gate = self._runner.gate
        return gate.has_begun() and not gate.has_ended()

    def _begin(self) -> None:
        """Before the vCPUs have threads; nothing if they have."""
        if self._is_running or self._runner.gate.threads():
            return
        if self.ticker is not None:
            self.ticker.start()
        if self.timer_thread is not None:
            self.timer_thread.start()
        if not self._runner.gate.is_paused():
            self._enter()

    def _enter(self) -> None:
        """Before the first vCPU goes in."""
        if self._execution_time is not None and not self._execution_time.is_running:
            self._execution_time.enter()

    def _end_soon(self) -> None:
        """_end(), but without waiting for a tick or a timer, which may wait for this very thread."""
        self._end_timers_soon()
        if self.ticker is not None:
            with suppress(StateError):
                self.ticker.stop(0)

    def _end_timers_soon(self) -> bool:
        """Stop expiring timers, without waiting for a delivery; were they expired?"""
        if self.timer_thread is None or not self.timer_thread.is_running:
            return False
        with suppress(StateError):
            self.timer_thread.stop(0)
        return True

    def _end(self) -> None:
        """After the last vCPU is out for good."""
        if self._execution_time is not None:
            self._execution_time.leave()
        try:
            if self.timer_thread is not None:
                self.timer_thread.stop()
        finally:
            if self.ticker is not None:
                self.ticker.stop()


def engine_clock(
    runner: Runner,
    memory: GuestMemory,
    max_vcpus: int,
    inner: KvmBackend | SteeredTscBackend,
    tick_interval_s: float | None,
    *,
    wrap: BackendWrapper | None = None,
    restore: ClockState | None = None,
    options: dict[str, Any],
) -> EngineClockService:
    """The clock of a machine whose vCPUs' backend is `inner`: a new one, or the one saved as `restore`.

    max_vcpus: how many there can be.  tick_interval_s: see EngineClockService.
    options: GuestClock's, or those of GuestClock.restore().
    """
    backend = inner if wrap is None else _wrapped(wrap, inner)
    resets_tscs = wrap is None and "tsc_offset" not in options
    options["vcpus_present"] = inner.vcpu_count
    if restore is not None:
        clock = GuestClock.restore(restore, memory, backend=backend, vcpu_host="kvm", **options)
    else:
        options.setdefault("tsc_offset", inner.initial_tsc_offset if backend.counter_follows_host else 0)
        clock = GuestClock(memory, max_vcpus, backend=backend, vcpu_host="kvm", **options)
    return EngineClockService(runner, clock, tick_interval_s, resets_tscs=resets_tscs)


class KernelClockService:
    """The kernel's kvmclock: it runs by itself, also while the vCPUs are paused, so they alone are started and stopped.

    features: the KVM features that the guest's CPUID offers.
    """

    clock = None
    ticker = None
    timer_thread = None
    hypercall_port = None
    msr_ranges: tuple[MsrRange, ...] = ()
    """See ClockService."""

    def __init__(self, runner: Runner, vm: Vm, features: int) -> None:
        self.cpuid: CpuidSource = KernelClock(features)
        self.starts_paused = False
        self._runner = runner
        self._vm = vm
        self._changing = threading.RLock()

    def take_cpuid(self, cpuid: GuestCpuid, *, limits_rates: bool) -> None:
        """See ClockService: nothing of it changes."""

    def update_cpuid(self) -> None:
        """See ClockService: nothing of it changes."""

    def read_msr(self, _vcpu: int, _index: int) -> int:
        """See ClockService: no access arrives here, because no MSR is filtered."""
        raise _nobody_serves_msrs()

    def write_msr(self, _vcpu: int, _index: int, _value: int) -> None:
        """See ClockService: no access arrives here, because no MSR is filtered."""
        raise _nobody_serves_msrs()

    def hypercall(self, _vcpu: int, _registers: HypercallRegisters) -> HypercallResult:
        """See ClockService: none arrives here, because there is no port."""
        raise _kernel_serves("hypercall")

    def now_ns(self) -> int:
        """See ClockService: by KVM_GET_CLOCK."""
        return self._vm.get_clock()["clock"]

    def host_ns_until(self, guest_ns: int) -> int | None:
        """See ClockService."""
        return max(guest_ns - self.now_ns(), 0)

    def next_timer_ns(self) -> int | None:
        """See ClockService: the kernel has none."""
        return None

    def tell_of_time(self, _told: Callable[[], object]) -> None:
        """See ClockService: the kernel's runs on, and who sets it has to tell."""

    def start(self) -> None:
        """See ClockService."""
        if self._runner.gate.has_ended():
            self._runner.stop()
        with self._changing:
            self._runner.start()
            if self.starts_paused:
                self.resume()

    def pause(self) -> None:
        """See ClockService."""
        with self._changing:
            self.starts_paused = False
            self._runner.pause()

    def resume(self, policy: Policy | str | None = None) -> None:
        """See ClockService: `policy` has nothing to settle."""
        _check_policy(policy)
        with self._changing:
            self.starts_paused = False
            self._runner.resume()

    def run_for(self, _ns: int) -> RunReport:
        """See ClockService."""
        raise _kernel_serves("run_for")

    def save(self) -> ClockState:
        """See ClockService."""
        raise _kernel_serves("save")

    def roll_back(self, _state: ClockState, /, **_options: Any) -> None:  # noqa: ANN401  # GuestClock.restore()'s
        """See ClockService."""
        raise _kernel_serves("roll_back")

    def add_vcpu(self, _number: int, vcpu: Vcpu) -> None:
        """See ClockService."""
        share_tsc(list(self._runner.gate.vcpus), vcpu)

    def reset(self) -> None:
        """See ClockService: its MSRs are among the vCPUs' registers, which the machine resets; its time goes on."""
        self.starts_paused = self._runner.gate.is_paused()

    def stop(self) -> None:
        """See ClockService."""
        self._runner.stop()

    def close(self) -> None:
        """See ClockService: nothing is left."""

    @property
    def has_threads(self) -> bool:
        """See ClockService."""
        return bool(self._runner.gate.threads())


def _check_policy(policy: Policy | str | None) -> None:
    """Check it also where it settles nothing; the clock's event has the caller's words."""
    if policy is not None:
        as_policy(policy)


def _kernel_serves(operation: str) -> StateError:
    return StateError(operation, "the kernel serves this guest's clock", 'make a machine with clock="engine"')


def _nobody_serves_msrs() -> MissingCapability:
    return MissingCapability("KVM_CAP_X86_MSR_FILTER", "by nobody: the kernel serves this guest's clock")
