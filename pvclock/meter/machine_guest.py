"""clockprobe in a `Machine`, with the engine's clock or the kernel's: a `Guest` of the meter."""

from __future__ import annotations

import time
from functools import cached_property, partial
from types import TracebackType
from typing import Final, Literal, Self

from pvclock._memory import GuestMemory
from pvclock.clock.guest_clock import GuestClock
from pvclock.kvm.capabilities import open_kvm
from pvclock.kvm.tsc_offset import TscOffsets, probe_tsc_offsets
from pvclock.machine.machine import Machine
from pvclock.machine.run_state import RunState
from pvclock.meter.findings import (
    EXIT_LIMIT_S,
    await_reading,
    newest_ns,
    read_pages,
    read_records,
    vcpu0_reading,
    wall_clock_ns,
)
from pvclock.meter.guest import ENGINE, KERNEL, ClockServer, GuestReading
from pvclock.payloads import clockprobe, probe
from pvclock.payloads.probe import ProbeRecord
from pvclock.quantities import U64_MASK, GuestNs, GuestTsc, HostTsc, signed64
from pvclock.readings import Reference, TimeInfo
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState

__all__ = ["MachineGuest", "engine_epoch_ns", "finish", "newest_reading", "probe_machine", "wait_until_reading"]

EPOCH_BRACKETS: Final = 8


class MachineGuest:
    """A machine whose vCPUs run clockprobe, with the engine's clock or the kernel's.

    machine: for a caller that changes something under the guest and measures the effect.
    """

    def __init__(self, clock: Literal["engine", "kernel"], vcpus: int = 2) -> None:
        self.machine = probe_machine(clock, vcpus)
        self._server = ENGINE if clock == "engine" else KERNEL
        self._tsc_hz = self.machine.vcpus[0].get_tsc_khz() * 1000  # now: the ioctl waits for a vCPU that runs

    @property
    def server(self) -> ClockServer:
        """The engine or the kernel."""
        return self._server

    @property
    def engine_clock(self) -> GuestClock:
        """The engine's clock."""
        clock = self.machine.clock
        assert clock is not None  # noqa: S101  # asked of engine guests only
        return clock

    @property
    def vcpus(self) -> int:
        """How many read."""
        return len(self.machine.vcpus)

    @property
    def tsc_hz(self) -> int:
        """As KVM_GET_TSC_KHZ has it."""
        return self._tsc_hz

    @property
    def memory(self) -> GuestMemory:
        """The machine's RAM."""
        return self.machine.memory

    def start(self) -> None:
        """Boot clockprobe, and return when every vCPU reads."""
        self.machine.start()
        wait_until_reading(self.machine)

    def check_running(self) -> None:
        """Raise why the guest has ended, if it ended badly."""
        _has_ended(self.machine, 0)

    def pause(self) -> None:
        """Stop the vCPUs; the engine's clock stops with them."""
        self.machine.pause()

    def resume(self) -> None:
        """Continue; a machine that was loaded boots, and this returns when every vCPU reads."""
        if self.machine.run_state.current is RunState.PRELAUNCH:
            self.start()
        else:
            self.machine.resume()

    def reset(self) -> None:
        """Machine.reset(); return when every vCPU reads again."""
        self.machine.reset()
        wait_until_reading(self.machine)

    def save_and_load(self) -> None:
        """Machine.save(), through its document, into another machine, which is to boot clockprobe anew.

        Guest time and TSCs go on from there; vCPUs' registers and RAM are not part of a saved clock.  StateError with
        the kernel's clock.
        """
        document = clock_state.to_json(self.machine.save())
        self.machine.close()
        self.machine = probe_machine("engine", self.vcpus, restore=clock_state.from_json(document))

    def finish(self) -> list[ProbeRecord]:
        """Let clockprobe end; its findings."""
        return finish(self.machine)

    def newest_ns(self) -> int:
        """The newest time that a vCPU has read."""
        return newest_ns(self.machine.memory)

    def reading(self) -> GuestReading:
        """vCPU 0's newest reading; all vCPUs leave the guest for some us."""
        tsc, ns = newest_reading(self.machine)
        return GuestReading(GuestTsc(tsc), GuestNs(ns), HostTsc((tsc - self._tsc_offset()) & U64_MASK), 0)

    def records(self) -> list[ProbeRecord]:
        """The findings so far."""
        return read_records(self.machine.memory, self.vcpus)

    def pages(self) -> list[TimeInfo]:
        """The pages in the machine's RAM."""
        return read_pages(self.machine.memory, self.vcpus)

    def pages_by_server(self) -> list[TimeInfo]:
        """Empty: the pages are in this process's memory, and no other program reads them."""
        return []

    def wall_clock_ns(self) -> int:
        """The wall clock record of the boot vCPU."""
        return wall_clock_ns(self.machine.memory)

    def epoch_ns(self) -> int:
        """UTC at guest time 0: by the engine's timeline, or by KVM_GET_CLOCK."""
        return engine_epoch_ns(self.engine_clock) if self._server is ENGINE else _kernel_epoch_ns(self.machine)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.machine.close()

    def tsc_offsets(self) -> tuple[int, ...]:
        """By the engine, or as the kernel has them: all vCPUs' are one there, as clockprobe does not write its TSC."""
        if self._server is ENGINE:
            return tuple(signed64(self.engine_clock.tsc(vcpu).offset) for vcpu in range(self.vcpus))
        return (signed64(self._kernel_tsc_offset),) * self.vcpus

    def _tsc_offset(self) -> int:
        """Guest TSC less host TSC, modulo 2^64."""
        return self.engine_clock.tsc(0).offset if self._server is ENGINE else self._kernel_tsc_offset

    @cached_property
    def _kernel_tsc_offset(self) -> int:
        """As the kernel has it: a guest's TSC write would change it, and clockprobe does not write."""
        with open_kvm() as kvm:
            if probe_tsc_offsets(kvm) is not TscOffsets.HONOURED:
                return 0  # the guest's TSC is the host's, whatever KVM says
        with self.machine.runner.quiesce(None):
            return self.machine.vcpus[0].get_tsc_offset()


def probe_machine(clock: Literal["engine", "kernel"], vcpus: int, restore: ClockState | None = None) -> Machine:
    """A machine with clockprobe in it, not started yet; nothing ticks its clock.  restore: a saved engine's clock."""
    command = f"cpus={vcpus}"
    return Machine(clockprobe(), vcpus=vcpus, clock=clock, cmdline=command, tick_interval_s=None, restore=restore)


def wait_until_reading(machine: Machine) -> None:
    """Return when all vCPUs of a started clockprobe read their clock; StateError if they do not."""
    await_reading(machine.memory, len(machine.vcpus), partial(_has_ended, machine, 0.001), lambda: machine.console)


def newest_reading(machine: Machine) -> tuple[int, int]:
    """vCPU 0's newest reading, its TSC and ns, by the page that it has now; all vCPUs leave the guest for some us."""
    return vcpu0_reading(machine.memory, lambda: machine.runner.quiesce(None))


def finish(machine: Machine) -> list[ProbeRecord]:
    """Let clockprobe end, and return what its vCPUs found."""
    probe.stop(machine.memory)
    machine.wait(EXIT_LIMIT_S)
    return read_records(machine.memory, len(machine.vcpus))


def engine_epoch_ns(clock: GuestClock) -> int:
    """UTC at guest time 0, in ns, by an engine's timeline and its backend's time of day."""
    real = clock.backend.sample(Reference.REALTIME)
    return real.ns - clock.at(real.tsc).__floor__()


def _has_ended(machine: Machine, wait_s: float) -> bool:
    """Has the guest ended within `wait_s`?  Raises why if it ended badly."""
    if not machine.runner.join(wait_s):
        return False
    machine.wait()
    return True


def _kernel_epoch_ns(machine: Machine) -> int:
    """UTC at guest time 0, in ns, by KVM_GET_CLOCK."""
    now = machine.vm.get_clock()
    if now["realtime"]:
        return now["realtime"] - now["clock"]
    # Without a master clock KVM does not say what time of day it was at that instant.
    return min((_bracketed_epoch_ns(machine) for _ in range(EPOCH_BRACKETS)), key=lambda epoch: epoch[1])[0]


def _bracketed_epoch_ns(machine: Machine) -> tuple[int, int]:
    """UTC at guest time 0, and the width of the bracket, in ns."""
    begin = time.time_ns()
    clock = machine.vm.get_clock()["clock"]
    width = time.time_ns() - begin
    return begin + width // 2 - clock, width
