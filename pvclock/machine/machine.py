"""A small virtual machine: RAM, vCPUs, a boot image, a clock, an exit port and a debug console."""

from __future__ import annotations

from _thread import start_new_thread
from contextlib import suppress
from threading import Thread
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar
from weakref import finalize

from pvclock import boot
from pvclock._memory import GuestMemory
from pvclock.arguments import number, whole
from pvclock.boot.layout import IDENTITY_MAP, TSS
from pvclock.clock.guest_clock import GuestClock
from pvclock.clock.ticker import Ticker
from pvclock.errors import StateError
from pvclock.kvm import Kvm, Runner, Vcpu, Vm, exit_on_msrs, kvm_backend, open_kvm
from pvclock.kvm.capabilities import kernel_features
from pvclock.machine.arguments import check_arguments, check_vcpus
from pvclock.machine.clock_service import BackendWrapper, ClockService, make_clock
from pvclock.machine.cpuid import KernelClock, set_guest_cpuid
from pvclock.machine.exits import CONSOLE_PORT, GuestExits
from pvclock.machine.ram import Ram
from pvclock.providers.kvm import kernel_clock_features
from pvclock.readings import RunReport
from pvclock.state.clock_state import ClockState
from pvclock.timekeeping.catchup import Policy

__all__ = ["Machine"]


class Resource(Protocol):
    """What can be closed, and then again without harm."""

    def close(self) -> None:
        """Give it back."""


ResourceT = TypeVar("ResourceT", bound=Resource)


class Machine:
    """A VM with `image` in it, ready to start; a context manager that always cleans up.

    image: a multiboot-1 ELF or a flat real-mode image.  clock: who serves the guest's clock, "engine" (`self.clock`,
    a GuestClock, with the rest of the keywords as its options) or "kernel" (in-kernel kvmclock, with `features` or as
    the engine's; `self.clock` is None).

    For the engine's clock:  tick_interval_s: from start() to stop() it is ticked every so many seconds, so that its
    pages do not age; None leaves that to the caller.  backend: called with the backend of the vCPUs, it returns the
    clock's: with ExecutionTimeBackend no guest time passes while the machine is paused.  restore: a saved
    clock, which goes on at start() by `policy`, or the state's own; further options are those of GuestClock.restore()
    then.  The RAM is the caller's to put into `memory` before that; the vCPUs begin anew, at the image's entry.

    The guest's TSC begins at 0 when its first vCPU is made, and all vCPUs have that one offset, as KVM does it, or
    `tsc_offset`.  On a host that honours no offsets it is the host's: see `pvclock doctor`.

    After the run has ended nothing executes any more: run_for() is a StateError, and all else is as for a machine that
    is paused or not, so that its clock can be saved.  After close() only wait(), stop(), close() and what was found
    (exit_code, console) are left; all else that lets it live is a StateError.

    A machine that is dropped without close() stops and gives everything back, by and by.

    WrongType or ConfigError for a wrong argument, before anything is made.  KvmUnavailable, MissingCapability,
    ImageError, RangeError, StateFileError or, for ExecutionTimeBackend without TSC offsets, TscOffsetNotHonoured if it
    cannot be made; nothing is left behind then.
    """

    def __init__(  # noqa: PLR0913  # a machine has so many facts; all but the image are by keyword, with defaults
        self,
        image: bytes,
        *,
        vcpus: int = 1,
        memory_bytes: int = 16 << 20,
        clock: Literal["engine", "kernel"] = "engine",
        cmdline: str = "",
        kvm: Kvm | None = None,
        tick_interval_s: float | None = 1.0,
        backend: BackendWrapper | None = None,
        restore: ClockState | None = None,
        **clock_options: object,
    ) -> None:
        given = {"image": image, "vcpus": vcpus, "memory_bytes": memory_bytes, "clock": clock, "cmdline": cmdline}
        given |= {"kvm": kvm, "tick_interval_s": tick_interval_s, "backend": backend, "restore": restore}
        check_arguments(given, clock_options)
        self.clock: GuestClock | None = None
        self._is_closed = False
        self._resources: list[Resource] = []  # to be given back, the last one first
        try:
            self._kvm = kvm or self._owned(open_kvm())
            check_vcpus(vcpus, self._kvm)
            self._make_memory(memory_bytes)
            self._make_vcpus(vcpus, self._kvm)
            if clock == "engine":
                self._take_the_clock(self._kvm, vcpus, wrap=backend, restore=restore, options=clock_options)
            else:
                self._leave_the_clock_to_the_kernel(**clock_options)  # type: ignore[arg-type]  # an int
            boot.enter(self.vcpus[0], boot.load(self.memory, image, cmdline))
            self._clock_service = self._owned(ClockService(self.runner, self.clock, tick_interval_s))
        except BaseException:
            with suppress(BufferError):  # of an interrupt, whose traceback has the memory until it goes
                _give_back(self._resources)
            raise
        self._if_dropped = finalize(self, _reclaim, self.runner, self._clock_service, self._resources)
        self._if_dropped.atexit = False  # a process that ends takes everything with it

    # Life

    def start(self) -> None:
        """Let the vCPUs run, the ticker tick and a restored clock go on.

        StateError if they were started or stopped before, if it is closed, or if there is no thread for one; no guest
        has run then.
        """
        self._check_open("start")
        self._clock_service.start()

    def wait(self, timeout_s: float | None = None) -> int:
        """The guest's exit code, once it has written one; the vCPUs have stopped then.

        GuestCrashed if it cannot go on; StateError if it has not ended within `timeout_s`.
        """
        if timeout_s is not None:
            number("timeout_s", timeout_s)
        gate = self.runner.gate
        if not gate.has_begun() and not gate.has_ended():
            raise StateError("wait", "the machine was never started", "start() it")
        if not self.runner.join(timeout_s):
            raise StateError("wait", f"the guest has not ended after {timeout_s} s", "wait longer or stop() it")
        with suppress(StateError):  # a tick that does not return: the run has ended all the same
            self.stop()
        if self.runner.failure is not None:
            raise self.runner.failure
        if self._exits.crash is not None:
            raise self._exits.crash
        if self.exit_code is None:
            raise StateError("wait", "the machine was stopped", "there is no exit code")
        return self.exit_code

    def pause(self) -> None:
        """Return once no vCPU is in the guest, and let none in before resume(); the engine's clock stands still.

        The kernel's clock goes on.  Paused twice is paused; a machine whose run has ended can be, too, to be saved.
        StateError once it is closed.
        """
        self._check_open("pause")
        self._clock_service.pause()

    def resume(self, policy: Policy | str | None = None) -> None:
        """Let the vCPUs go on; `policy` says what becomes of the time that the engine's clock missed.

        policy: the clock's own if not given; see GuestClock.policy.  If the run has ended only the clock goes on.
        StateError once it is closed.
        """
        self._check_open("resume")
        self._clock_service.resume(policy)

    def run_for(self, ns: int) -> RunReport:
        """Let a paused machine with the engine's clock run for `ns` of guest time; it is paused again then.

        StateError if no vCPU would run: it was never started, its run has ended, or it is closed.
        """
        whole("ns", ns)
        self._check_open("run_for")
        return self._clock_service.run_for(ns)

    def save(self) -> ClockState:
        """The engine's clock of a paused machine, for Machine(restore=...); to be kept with a copy of its RAM.

        RAM and the vCPUs' registers are no part of it.  StateError unless the machine is paused: else the RAM that goes
        with it would be that of another instant.  And once it is closed, for then there is no RAM.
        """
        self._check_open("save")
        return self._clock_service.save()

    def stop(self) -> None:
        """End the run and the ticker; the machine's memory can still be read.

        StateError, when all else is done, for a tick that does not return (see Ticker.stop).
        """
        self._clock_service.stop()

    def close(self) -> None:
        """Stop the run and give everything back.  May be called twice, and again after an interrupt.

        StateError on a vCPU's own thread, which cannot wait for its end; the run ends all the same.  And as stop().
        """
        self.runner.stop()
        if self.runner.gate.threads():
            self._clock_service.stop()
            raise StateError("close", "this is the thread of a vCPU", "close() the machine on another one")
        self._is_closed = True
        _give_back(self._resources)

    def __enter__(self) -> Self:
        self._check_open("with")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def exit_code(self) -> int | None:
        """What the guest wrote to the exit port; None if it has not."""
        return self._exits.exit_code

    @property
    def console(self) -> str:
        """What the guest wrote to the console port up to now: all of it, or the last MiB."""
        return self._exits.console()

    @property
    def ticker(self) -> Ticker | None:
        """What ticks the engine's clock, its `failures` and the clocks that are `stuck` among it; None without one."""
        return self._clock_service.ticker

    def _check_open(self, operation: str) -> None:
        if self._is_closed:
            raise StateError(operation, "the machine is closed", "make another machine")

    # Making

    def _owned(self, resource: ResourceT) -> ResourceT:
        """Keep what close() is to give back."""
        self._resources.append(resource)
        return resource

    def _make_memory(self, memory_bytes: int) -> None:
        self._ram = Ram(memory_bytes)
        self._resources.insert(0, self._ram)  # given back last, for somebody else may still look at it
        self.memory = self._owned(GuestMemory(self._ram.buffer))

    def _make_vcpus(self, count: int, kvm: Kvm) -> None:
        self.vm: Vm = self._owned(kvm.create_vm())
        self.vm.set_tss_addr(TSS)
        self.vm.set_identity_map_addr(IDENTITY_MAP)
        self.vm.set_user_memory_region(0, 0, self._ram.buffer)
        self.vm.create_irqchip()
        self.vcpus: list[Vcpu] = [self._owned(self.vm.create_vcpu(i)) for i in range(count)]
        for vcpu in self.vcpus:
            vcpu.console_port = CONSOLE_PORT
        self._exits = GuestExits(self.vcpus)
        self.runner = Runner(self.vcpus, self._exits.handle)

    def _take_the_clock(self, kvm: Kvm, vcpus: int, **how: Any) -> None:  # noqa: ANN401  # make_clock()'s keywords
        self.clock = make_clock(self.memory, vcpus, kvm_backend(kvm, self.vcpus, self.runner), **how)
        self._exits.clock = self.clock
        exit_on_msrs(self.vm, self.clock.msr_ranges)
        set_guest_cpuid(kvm, self.vcpus, self.clock)

    def _leave_the_clock_to_the_kernel(self, features: int | None = None) -> None:
        offered = kernel_clock_features(kernel_features(self._kvm)) if features is None else features
        set_guest_cpuid(self._kvm, self.vcpus, KernelClock(offered))


def _give_back(resources: list[Resource]) -> None:
    """Close them all, the last one first.  Each can be closed again, so after an interrupt begin anew."""
    for place in reversed(range(len(resources))):
        try:
            resources[place].close()
        except StateError:  # a tick that does not return
            _give_back(resources[:place])
            raise


def _reclaim(runner: Runner, service: ClockService, resources: list[Resource]) -> None:
    """Give back what a machine held that was dropped without close().

    If it runs, that is left to another thread: the one that dropped it may be one of the machine's own, or hold what
    one of these waits for.
    """
    runner.gate.end()
    if service.has_threads:
        thread = Thread(target=_give_back_after, args=(runner, resources), name="pvclock-reclaim", daemon=True)
        start_new_thread(thread.start, ())  # start() waits, and the one that dropped the machine may not
    else:
        _give_back_after(runner, resources)


def _give_back_after(runner: Runner, resources: list[Resource]) -> None:
    runner.gate.wait_until_departed()
    with suppress(BufferError, StateError):  # somebody looks at the memory: it goes with the last view; a tick is stuck
        _give_back(resources)
