"""clockprobe in another process's VM: a `Guest` of pvclock.meter, read in the RAM that this shares, paused over QMP.

The process is a QEMU/KVM, or `pvclock run --qmp`: nothing here asks which.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from types import TracebackType
from typing import Final, Self

from pvclock import GuestMemory, GuestNs, GuestTsc, HostTsc, StateError, TimeInfo, read_tsc
from pvclock.host.kvm_debugfs import TscOffsetFiles
from pvclock.host.vmm_process import open_vmm
from pvclock.meter.findings import (
    EXIT_LIMIT_S,
    READING_LIMIT_S,
    await_reading,
    newest_ns,
    read_pages,
    read_records,
    time_info,
    vcpu0_reading,
    wall_clock_ns,
)
from pvclock.meter.guest import ENGINE, ClockServer, GuestReading
from pvclock.payloads import clockprobe, probe
from pvclock.payloads.probe import ProbeRecord
from qemu_glue.peer.launch import Qemu
from qemu_glue.peer.lifecycle import saved, wait_until_loaded
from qemu_glue.peer.own_machine import OwnMachine
from qemu_glue.peer.vmm import Vmm

__all__ = ["QEMU", "QmpGuest", "own_guest", "qemu_guest"]

QEMU: Final = ClockServer("qemu", is_kvm=True, stops_when_paused=True)
PAGE_BYTES: Final = 32
BRACKETS: Final = 10
SHARED_CPU_BRACKETS: Final = 50
SHARED_CPU_PAUSE_S: Final = 0.001


def qemu_guest(features: int, vcpus: int = 2) -> QmpGuest:
    """A QEMU whose guest is offered `features` (CPUID 0x40000001 EAX)."""
    return QmpGuest(QEMU, partial(Qemu, clockprobe(), features=features, vcpus=vcpus, cmdline=f"cpus={vcpus}"))


def own_guest(vcpus: int = 2) -> QmpGuest:
    """`pvclock run` with the engine's clock."""
    return QmpGuest(ENGINE, partial(OwnMachine, clockprobe(), vcpus=vcpus, cmdline=f"cpus={vcpus}"))


class QmpGuest:
    """A VM whose vCPUs run clockprobe; a context manager.

    server: who serves its clock.  launch: starts the VMM.  Errors of Qemu, here and in all that asks it for something.
    """

    def __init__(self, server: ClockServer, launch: Callable[..., Vmm]) -> None:
        self._server, self._launch = server, launch
        self.vmm = launch()

    @property
    def server(self) -> ClockServer:
        """A QEMU has KVM publish the pages and sets its clock at cont."""
        return self._server

    @property
    def vcpus(self) -> int:
        """How many read."""
        return self.vmm.vcpus

    @property
    def memory(self) -> GuestMemory:
        """The RAM that the VMM shares."""
        return self.vmm.memory

    @cached_property
    def tsc_hz(self) -> int:
        """As the VMM has it of vCPU 0."""
        return self.vmm.tsc_hz()

    def start(self) -> None:
        """Return when every vCPU reads; the VMM boots the guest when it is launched."""
        await_reading(self.vmm.memory, self.vcpus, self._has_ended, lambda: self.vmm.console)

    def check_running(self) -> None:
        """QemuExited if the VMM has ended."""
        self.vmm.check_running()

    def pause(self) -> None:
        """QMP stop."""
        self.vmm.pause()

    def resume(self) -> None:
        """QMP cont."""
        self.vmm.resume()

    def tsc_offsets(self) -> tuple[int | None, ...]:
        """As debugfs has them."""
        with open_vmm(self.vmm.pid) as process:
            return TscOffsetFiles(process).read()

    def reset(self) -> None:
        """QMP system_reset; return when every vCPU reads again."""
        probe.forget(self.vmm.memory)  # QEMU leaves RAM as it is
        self.vmm.reset()
        self.start()

    def save_and_load(self) -> None:
        """Save it as a stream, end the QEMU, and load that in another QEMU, which is paused then; QmpFailed of ours."""
        with saved(self.vmm) as incoming:
            self.vmm.close()
            self.vmm = self._launch(arguments=incoming)
            wait_until_loaded(self.vmm)

    def finish(self) -> list[ProbeRecord]:
        """Let clockprobe end; its findings.  StateError if it did not end well."""
        probe.stop(self.vmm.memory)
        code = self.vmm.wait(EXIT_LIMIT_S)
        records = self.records()
        if code != probe.EXIT_FINE or any(record.state != probe.State.DONE for record in records):
            said = self.vmm.console.strip() or "nothing"
            what = f"clockprobe ended with {code} in its VMM, and said {said}; its vCPUs: {records}"
            raise StateError("observe", what, "try again")
        return records

    def newest_ns(self) -> int:
        """The newest time that a vCPU has read."""
        return newest_ns(self.vmm.memory)

    def reading(self) -> GuestReading:
        """vCPU 0's newest reading, between two reads of the host's TSC: QMP does not tell the guest's TSC offset.

        The narrowest bracket of many, some us wide; some ms where the vCPU and this thread have one CPU between them.
        No vCPU leaves the guest.
        """
        tries, pause_s, deadline = BRACKETS, 0.0, time.monotonic() + READING_LIMIT_S
        while time.monotonic() < deadline:
            brackets = [bracket for _ in range(tries) if (bracket := self._bracketed_reading(pause_s)) is not None]
            if brackets:
                return min(brackets, key=lambda bracket: bracket.bound_ticks)
            tries, pause_s = SHARED_CPU_BRACKETS, SHARED_CPU_PAUSE_S
        raise StateError("observe", "vCPU 0 of clockprobe does not read", "give it a CPU")

    def records(self) -> list[ProbeRecord]:
        """The findings so far."""
        return read_records(self.vmm.memory, self.vcpus)

    def pages(self) -> list[TimeInfo]:
        """The pages in the RAM that the VMM shares."""
        return read_pages(self.vmm.memory, self.vcpus)

    def pages_by_server(self) -> list[TimeInfo]:
        """The pages as the VMM reads them (QMP pmemsave)."""
        addresses = map(probe.time_page_address, range(self.vcpus))
        return [time_info(self.vmm.read_by_monitor(address, PAGE_BYTES)) for address in addresses]

    def wall_clock_ns(self) -> int:
        """The wall clock record of the boot vCPU."""
        return wall_clock_ns(self.vmm.memory)

    def epoch_ns(self) -> int | None:
        """None: the VMM does not tell."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.vmm.close()

    def _has_ended(self) -> bool:
        """Never without an error: the VMM ends with its guest."""
        self.vmm.check_running()
        time.sleep(0.001)
        return False

    def _bracketed_reading(self, pause_s: float) -> GuestReading | None:
        """A reading that vCPU 0 took between two reads of the host's TSC; None if none was surely taken in between.

        The first new one may have read its TSC before `begin`, if the vCPU then lost its CPU; the second has not.
        pause_s: how long the vCPU has the CPU before each.
        """
        begin = read_tsc()
        before = self._newest_tsc()
        time.sleep(pause_s)
        first = self._newest_tsc()
        time.sleep(pause_s)
        tsc, ns = vcpu0_reading(self.vmm.memory, nullcontext)
        end = read_tsc()
        if first in (before, tsc):
            return None
        half = (end - begin + 1) // 2
        return GuestReading(GuestTsc(tsc), GuestNs(ns), HostTsc(begin + half), half)

    def _newest_tsc(self) -> int:
        return probe.read_record(self.vmm.memory, 0).last_tsc
