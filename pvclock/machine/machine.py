"""A small virtual machine: RAM, vCPUs, a boot source, a clock, and devices on a bus."""

from __future__ import annotations

import time
from _thread import start_new_thread
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from threading import RLock, Thread, current_thread
from types import TracebackType
from typing import Any, Literal, Self
from weakref import WeakMethod, finalize

from pvclock.arguments import instance, number, whole
from pvclock.boot import BootSource
from pvclock.clock.guest_clock import GuestClock
from pvclock.clock.guest_side import usual_msr_ranges
from pvclock.clock.ticker import Ticker
from pvclock.errors import StateError
from pvclock.kvm import Kvm, Runner
from pvclock.kvm.capabilities import kernel_features
from pvclock.kvm.exits import Exit
from pvclock.machine.arguments import Platform, check_arguments, check_restore_options, choose_platform
from pvclock.machine.clock_service import (
    BackendWrapper,
    ClockService,
    KernelClockService,
    engine_clock,
)
from pvclock.machine.cpuid import CpuidChange
from pvclock.machine.devices.uart import Uart
from pvclock.machine.exits import Ending, Outcome
from pvclock.machine.guest_reset import GuestReset
from pvclock.machine.guest_timers import GuestTimers
from pvclock.machine.hardware import Hardware
from pvclock.machine.run_state import RunState, RunStates
from pvclock.machine.travel_options import Travel
from pvclock.machine.vmm_services import MachineServices
from pvclock.providers.kvm import kernel_clock_features
from pvclock.readings import RunReport
from pvclock.state.clock_state import ClockState
from pvclock.timekeeping.catchup import Policy

__all__ = ["Machine"]


class Machine:
    """A VM with `image` in it, ready to start; a context manager that always cleans up.

    max_vcpus: with how many vCPUs it can end up, by add_vcpu(); by default no more than `vcpus`.
    image: a multiboot-1, PVH or 64-bit Linux image, a flat real-mode image, or a BootSource with its command line.
    platform: "bare" has an exit port and a debug console, "pc" also what a stock kernel needs: a serial port, ACPI
    tables, power-off and reset, which end the run, and pvpanic.  By default a bzImage gets a PC, and all else does not.
    serial_output: called with each byte that a PC's guest sends to its serial port, on a vCPU's thread.
    cpuid: a function of a vCPU's number and its CPUID, a list of CpuidEntry, which returns the list that it gets.
    on_exit: called with a vCPU's number and each of its exits before that is answered, on its thread; what it raises
    ends the run.
    time_travel: True or a Travel skips the time that the guest idles away, from its start on; `self.time_travel` turns
    that on and off, and has what came of it (time_travel.py).
    clock: what serves the guest's clock, "engine" (`self.clock`, a GuestClock, with the rest of the keywords as its
    options) or "kernel" (in-kernel kvmclock, with `features` or as the engine's; `self.clock` is None).

    For the engine's clock:  tick_interval_s: from start() to stop() it is ticked every so many seconds, so that its
    pages do not age; None leaves that to the caller.  backend: called with the backend of the vCPUs, it returns the
    clock's: with ExecutionTimeBackend no guest time passes while the machine is paused.  vmm: by default the machine's
    own services for the guest's interface, whose timers have a thread (vmm_services.py).  restore: a saved clock, which
    goes on at start() by `policy`, or the state's own; further options are those of GuestClock.restore() then.  The RAM
    is the caller's to put into `memory` before that; the vCPUs begin anew, at the image's entry.

    The guest's TSC begins at 0 when its first vCPU is made, and all vCPUs have that one offset, as KVM does it, or
    `tsc_offset`.  On a host that honours no offsets it is the host's: see `pvclock doctor`.

    bus: devices are added to it (Bus.add_ports, Bus.add_mmio).  run_state: in which state it is, and handlers of the
    changes.  clock_service: the clock as the engine or the kernel serves it, by one interface.  timers: what the VMM
    does at an instant of guest time (GuestTimers).

    After the run has ended nothing executes any more until start(), so run_for() is a StateError; all else is as for a
    machine that is paused or not, and its clock can be saved.  After close() only wait(), stop(), close() and what was
    found (exit_code, console) are left; everything else is a StateError.

    A machine that is dropped without close() stops and gives everything back, on another thread if need be.

    WrongType or ConfigError for a wrong argument, before anything is made.  KvmUnavailable, MissingCapability,
    ImageError, RangeError, StateFileError or, for ExecutionTimeBackend without TSC offsets, TscOffsetNotHonoured if it
    cannot be made; nothing is left behind then.
    """

    def __init__(  # noqa: PLR0913  # a machine has so many facts; all but the image are by keyword, with defaults
        self,
        image: bytes | BootSource,
        *,
        vcpus: int = 1,
        max_vcpus: int | None = None,
        memory_bytes: int = 16 << 20,
        clock: Literal["engine", "kernel"] = "engine",
        cmdline: str = "",
        kvm: Kvm | None = None,
        tick_interval_s: float | None = 1.0,
        backend: BackendWrapper | None = None,
        restore: ClockState | None = None,
        platform: Platform | None = None,
        serial_output: Callable[[bytes], object] | None = None,
        cpuid: CpuidChange | None = None,
        on_exit: Callable[[int, Exit], object] | None = None,
        time_travel: Travel | bool = False,
        **clock_options: object,
    ) -> None:
        given: dict[str, object] = {"image": image, "vcpus": vcpus, "max_vcpus": max_vcpus, "cmdline": cmdline}
        given |= {"memory_bytes": memory_bytes, "clock": clock, "kvm": kvm, "tick_interval_s": tick_interval_s}
        given |= {"backend": backend, "restore": restore, "platform": platform, "serial_output": serial_output}
        check_arguments(given | {"on_exit": on_exit, "cpuid": cpuid, "time_travel": time_travel}, clock_options)
        self.boot_source = image if isinstance(image, BootSource) else BootSource(image, cmdline)
        platform = choose_platform(self.boot_source, platform, memory_bytes, serial_output)
        self._is_closed = False
        self.run_state = RunStates()
        self._booting = RLock()  # around start(), reset() and what must not come within them
        self._outcome = Outcome()
        self._run_end = _RunEnd(self.run_state, self._outcome)
        # Weak: threads have the clock, and the clock its services; a machine that is dropped ends the threads.
        self._guest_reset = GuestReset(partial(_call_if_alive, WeakMethod(self._reset_for_guest)))
        hardware = self._hardware = Hardware(
            kvm,
            self._outcome,
            vcpus=vcpus,
            max_vcpus=vcpus if max_vcpus is None else max_vcpus,
            memory_bytes=memory_bytes,
            platform=platform,
            msr_ranges=usual_msr_ranges() if clock == "engine" else (),
            serial_output=serial_output,
            on_exit=on_exit,
            on_end=self._run_end,
        )
        self.vm, self.memory, self.vcpus = hardware.vm, hardware.memory, hardware.vcpus
        self.bus, self.runner = hardware.board.bus, hardware.runner
        try:
            if clock == "engine":
                service = self._engine_clock(tick_interval_s, wrap=backend, restore=restore, options=clock_options)
            else:
                service = self._kernel_clock(**clock_options)  # type: ignore[arg-type]  # an int
            self.clock_service = service
            hardware.take_clock(service, cpuid, limits_rates=platform == "pc")
            hardware.boot(self.boot_source)
            self.time_travel = hardware.time_travel(service, self.run_state, self.boot_source, time_travel)
            self.timers = GuestTimers(service, self.runner, self.run_state, self.time_travel)
        except BaseException:
            hardware.abandon()
            raise
        self._if_dropped = finalize(self, _reclaim, self.runner, service, hardware)
        self._if_dropped.atexit = False  # a process that ends takes everything with it

    # Life

    def start(self) -> None:
        """Let the vCPUs run from where they stand, the ticker tick, and a restored or reset clock go on.

        Again after the run has ended, too, which is then forgotten; reset() before boots anew.  StateError while they
        run, if the guest cannot go on, if the machine is closed, on a vCPU's own thread, or if there is no thread for
        a vCPU; no guest has run then.
        """
        self._check_thread("start")
        with self._booting:
            self._check_open("start")
            self._update_run_state()
            self.run_state.check("start", RunState.RUNNING)
            self.time_travel.check()
            if self.runner.gate.has_ended():
                self.runner.stop()  # else an exit that is still served would be this run's outcome
                self._outcome.forget()
            try:
                with self.runner.quiesce():  # no vCPU goes in before the change of the run state is known
                    self.clock_service.start()
                    self._update_run_state()
            except BaseException:
                self._update_run_state()
                raise
            self._guest_reset.go_on()

    def wait(self, timeout_s: float | None = None) -> int:
        """The guest's exit code, once it has written one, or 0, once it has powered off or reset the machine.

        The vCPUs have stopped then, and `ending` says which it was.  A reset() meanwhile of a machine that goes on
        running does not end it.  GuestCrashed or GuestPanicked if it cannot go on; StateError if it has not ended
        within `timeout_s`.
        """
        _check_timeout(timeout_s)
        gate = self.runner.gate
        if not gate.has_begun() and not gate.has_ended():
            raise StateError("wait", "the machine was never started", "start() it")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if not gate.wait_until_ended(None if deadline is None else deadline - time.monotonic()):
                raise StateError("wait", f"the guest has not ended after {timeout_s} s", "wait longer or stop() it")
            with self._booting:
                if gate.has_ended() or not gate.threads():
                    return self._result()

    def _result(self) -> int:
        """How the run ended: see wait()."""
        gate = self.runner.gate
        if not gate.has_begun() and not gate.has_ended():
            raise StateError("wait", "the machine was reset", "start() it")
        with suppress(StateError):  # a tick that does not return: the run has ended all the same
            self.stop()
        if self.runner.failure is not None:
            raise self.runner.failure
        return self._outcome.result()

    def run(self, timeout_s: float | None = None) -> int:
        """start() and wait() in one: lets the guest run until it ends the run, and returns its exit code.

        If it raises anything, a timeout and an interrupt among that, the run has ended, too: no vCPU executes, the
        machine can be looked at and saved, and start() or run() lets the guest go on from there.  But a machine that
        runs already goes on, with start()'s StateError.
        """
        _check_timeout(timeout_s)
        gate = self.runner.gate
        ran_before = gate.has_begun() and not gate.has_ended()
        try:
            self.start()
            return self.wait(timeout_s)
        except BaseException:
            if not ran_before:
                self.stop()
            raise

    def add_vcpu(self) -> int:
        """Another vCPU, up to `max_vcpus`, at any time until close(); returns its number, which is its APIC id.

        It waits for INIT and SIPI, as a PC's do; a PC's guest is told of it by ACPI.  Its TSC and IA32_TSC_ADJUST are
        vCPU 0's, also where the guest has written that one's, and what the guest's clock interface has for a vCPU it
        has.  It stays: a reset() does not take it away.  StateError if all are there, on a vCPU's own thread, if there
        is no thread for it, and once the machine is closed.  After an error or an interrupt, call it again.
        """
        self._check_thread("add_vcpu")
        with self._booting:
            self._check_open("add_vcpu")
            with self.time_travel.stopped(), self.runner.quiesce():  # its TSC is the others', which stay meanwhile
                return self._hardware.add_vcpu()

    def pause(self) -> None:
        """Return once no vCPU is in the guest, and let none in before resume(); the engine's clock stands still.

        The kernel's clock goes on.  Paused twice is paused; a machine whose run has ended can be, too, to be saved.
        StateError once it is closed.
        """
        self._check_open("pause")
        self.clock_service.pause()
        self._update_run_state()

    def resume(self, policy: Policy | str | None = None) -> None:
        """Let the vCPUs go on; `policy` says what becomes of the time that the engine's clock missed.

        policy: the clock's own if not given; see GuestClock.policy.  If the run has ended only the clock goes on.
        StateError once it is closed.
        """
        self._check_open("resume")
        with self.runner.quiesce():  # see start()
            self.clock_service.resume(policy)
            self._update_run_state()
        self._guest_reset.go_on()

    def run_for(self, ns: int) -> RunReport:
        """Let a paused machine with the engine's clock run for `ns` of guest time; it is paused again then.

        StateError if no vCPU would run: it was never started, its run has ended, or it is closed.
        """
        whole("ns", ns)
        self._check_open("run_for")
        return self.clock_service.run_for(ns)

    def save(self) -> ClockState:
        """The engine's clock of a paused machine, for Machine(restore=...); to be kept with a copy of its RAM.

        RAM and the vCPUs' registers are not part of it.  StateError unless the machine is paused: else the RAM that
        goes with it would be that of another instant.  And once it is closed, for then there is no RAM.
        """
        self._check_open("save")
        return self.clock_service.save()

    def roll_back(self, state: ClockState, **options: object) -> None:
        """Go back to a clock that save() gave, in a paused machine into whose `memory` the RAM of then was put back.

        options: those of GuestClock.restore().  `clock` is another object then, which resume() lets go on by its
        policy.  The vCPUs' registers stay.  StateError unless the machine is paused and the clock the engine's.
        """
        self._check_open("roll_back")
        instance("state", state, ClockState, "a ClockState, as save() or clock_state.read() gives it")
        check_restore_options(options)
        self.clock_service.roll_back(state, **options)

    def reset(self) -> None:
        """Boot anew: vCPUs, interrupt controllers, RAM, devices and the clock's MSRs are as when the machine was made.

        A machine that runs goes on running; any other is in state prelaunch then, until start().  Guest time goes on;
        a paused clock goes on at start().  With the engine's clock the vCPUs' TSCs begin at 0, unless `tsc_offset` or
        `backend` was given or the host honours no offsets; with the kernel's they go on.  StateError on a vCPU's own
        thread, and once the machine is closed.  After an error or an interrupt, call it again.

        A guest whose clock interface has a way to ask for a reset gets one, too, while it runs; what fails in that one
        is raised by wait().
        """
        self._check_thread("reset")
        with self._booting:
            self._check_open("reset")
            self._reset()

    def _reset(self) -> None:
        self._update_run_state()
        goes_on = self.run_state.current is RunState.RUNNING
        self._run_end.is_silent = True  # its end is not one that anybody is to hear of
        try:
            self.clock_service.stop()
            self.time_travel.settle()  # it would give the vCPUs back what they had before
            self._guest_reset.is_wanted = False
            self.bus.reset()
            self.runner.gate.renew()
            self.clock_service.reset()
            self._outcome.forget()
            self._hardware.boot_anew(self.boot_source)
            if goes_on:
                self.clock_service.start()
        finally:
            self._run_end.is_silent = False
            self._update_run_state()

    def _reset_for_guest(self) -> None:
        """The reset that a guest has asked for.  While the machine is paused it has to wait; see GuestReset."""
        with self._booting:
            if self._is_closed or not self._guest_reset.is_wanted:
                return
            try:
                self._update_run_state()
                if self.run_state.current is RunState.RUNNING:
                    self._reset()
            except BaseException as failure:  # noqa: BLE001  # wait() raises it
                self.runner.fail(failure)
                self._update_run_state()

    def stop(self) -> None:
        """End the run and the ticker; the machine's memory can still be read, and start() lets it go on.

        StateError, when all else is done, for a tick that does not return (see Ticker.stop).
        """
        with nullcontext() if current_thread() in self.runner.threads else self._booting:
            try:
                self.clock_service.stop()
            finally:
                if not self._is_closed:
                    self._update_run_state()

    def close(self) -> None:
        """Stop the run for good and give everything back.  May be called twice, and again after an interrupt.

        StateError on a vCPU's own thread, which cannot wait for its end; the run ends all the same.  And as stop().
        What a device or a handler of the run state raises comes when all is given back.
        """
        self.runner.close()
        if self.runner.gate.threads():
            self.clock_service.stop()
            raise StateError("close", "this is the thread of a vCPU", "close() the machine on another one")
        with self._booting:
            try:
                if not self._is_closed:
                    self._take_leave()
            finally:
                self._is_closed = True
                self._hardware.close()

    def __enter__(self) -> Self:
        self._check_open("with")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def max_vcpus(self) -> int:
        """How many vCPUs the machine can have, by add_vcpu()."""
        return self._hardware.max_vcpus

    @property
    def clock(self) -> GuestClock | None:
        """The engine's clock; None where the kernel serves it."""
        return self.clock_service.clock

    @property
    def exit_code(self) -> int | None:
        """What the guest wrote to the exit port, or 0 where it ended the run otherwise; None if it has not."""
        return self._outcome.exit_code

    @property
    def ending(self) -> Ending | None:
        """What the guest ended the run by; None if it has not, or crashed."""
        return self._outcome.ending

    @property
    def console(self) -> str:
        """What the guest wrote to the console port up to now: all of it, or the last MiB."""
        self.bus.flush()
        return self._hardware.board.console.text()

    @property
    def serial(self) -> Uart:
        """COM1: what its receive() takes is typed into the guest.  StateError unless the platform is "pc"."""
        self._check_open("serial")
        return self._hardware.board.serial_port()

    @property
    def ticker(self) -> Ticker | None:
        """What ticks the engine's clock, its `failures` and the clocks that are `stuck` among it; None without one."""
        return self.clock_service.ticker

    def _take_leave(self) -> None:
        """Tell devices and handlers what close() has to tell them."""
        self.timers.close()
        try:
            self.bus.flush()  # the ring goes with the vCPUs
        finally:
            self._update_run_state()

    def _update_run_state(self) -> None:
        self.run_state.update(self._found_state, self.runner.quiesce)

    def _found_state(self) -> RunState:
        """The state, by what vCPUs and clock are doing."""
        gate = self.runner.gate
        if gate.has_ended():
            return _ended_by(self._outcome, self.runner.failure)
        if gate.is_paused():
            return RunState.PRELAUNCH if self.clock_service.starts_paused else RunState.PAUSED
        return RunState.RUNNING if gate.has_begun() else RunState.PRELAUNCH

    def _check_thread(self, operation: str) -> None:
        """For what waits for the vCPUs' threads."""
        if current_thread() in self.runner.threads:
            raise StateError(operation, "this is the thread of a vCPU", f"{operation}() the machine on another one")

    def _check_open(self, operation: str) -> None:
        if self._is_closed:
            raise StateError(operation, "the machine is closed", "make another machine")

    # Making

    def _engine_clock(self, tick_interval_s: float | None, **how: Any) -> ClockService:  # noqa: ANN401  # engine_clock()'s
        how["options"].setdefault("vmm", MachineServices(self.vm, self.vcpus, self.runner, self._guest_reset.request))
        return engine_clock(self.runner, self.memory, self.max_vcpus, self._hardware.backend(), tick_interval_s, **how)

    def _kernel_clock(self, features: int | None = None) -> ClockService:
        offered = kernel_clock_features(kernel_features(self._hardware.kvm)) if features is None else features
        return KernelClockService(self.runner, self.vm, offered)


class _RunEnd:
    """Called at the end of a run, on the thread of the last vCPU: tells the run state why it ended."""

    def __init__(self, run_state: RunStates, outcome: Outcome) -> None:
        self.is_silent = False
        self._run_state = run_state
        self._outcome = outcome

    def __call__(self, failure: BaseException | None) -> None:
        if not self.is_silent:
            self._run_state.update(lambda: _ended_by(self._outcome, failure))


def _check_timeout(timeout_s: float | None) -> None:
    if timeout_s is not None:
        number("timeout_s", timeout_s)


def _call_if_alive(method: WeakMethod[Callable[[], None]]) -> None:
    if (call := method()) is not None:
        call()


def _ended_by(outcome: Outcome, failure: BaseException | None) -> RunState:
    if failure is not None or outcome.crash is not None:
        return RunState.INTERNAL_ERROR
    return RunState.GUEST_PANICKED if outcome.ending is Ending.PANIC else RunState.SHUTDOWN


def _reclaim(runner: Runner, service: ClockService, hardware: Hardware) -> None:
    """Give back what a machine had that was dropped without close().

    If it runs, that is left to another thread: the one that dropped it may be one of the machine's own, or hold what
    one of these waits for.
    """
    runner.gate.end()
    if service.has_threads:
        thread = Thread(target=_give_back_after, args=(runner, hardware), name="pvclock-reclaim", daemon=True)
        start_new_thread(thread.start, ())  # start() waits, and the one that dropped the machine may not
    else:
        _give_back_after(runner, hardware)


def _give_back_after(runner: Runner, hardware: Hardware) -> None:
    runner.gate.wait_until_departed()
    with suppress(BufferError, StateError):  # a view of the memory is open, and it goes with that; a tick is stuck
        hardware.close()
