"""A QEMU that runs clockprobe and can be watched: it has a QMP socket that nobody uses yet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from pvclock.meter.findings import TIME_INFO, time_info
from pvclock.payloads import clockprobe, probe
from pvclock.readings import TimeInfo
from qemu_glue.peer.launch import Qemu
from tests.waiting import HANG_S

__all__ = ["PRIVATE_RAM", "RunningQemu", "running_qemu"]

FEATURES: Final = 0x0100_0009
"""CPUID 0x40000001 EAX: kvmclock by its old and new MSRs, and its stable bit."""

PRIVATE_RAM: Final = ("-object", "memory-backend-ram,id=private,size=16M", "-machine", "memory-backend=private")
"""RAM that QEMU shares with nobody, as most do; `qemu.memory` is nothing then."""


WRITTEN_TWICE: Final = 4
"""A page's version then."""
SECOND_WRITE_LIMIT_S: Final = 1.0
"""How long to wait for a KVM that may never do it; ten times what one takes that does."""


class RunningQemu(NamedTuple):
    """qemu: as launched.  qmp: the path of the QMP socket.  place: the directory that it is in, for more files."""

    qemu: Qemu
    qmp: Path
    place: Path

    def pages(self) -> list[TimeInfo]:
        """Each vCPU's page as QEMU reads it."""
        addresses = map(probe.time_page_address, range(self.qemu.vcpus))
        return [time_info(self.qemu.read_by_monitor(address, TIME_INFO.size)) for address in addresses]


@contextmanager
def running_qemu(
    place: Path, *, vcpus: int = 2, machine: str = "microvm", arguments: tuple[str, ...] = ()
) -> Iterator[RunningQemu]:
    """Run clockprobe on `vcpus` vCPUs, which all have a page when this yields; pc and q35 take some seconds until then.

    KVM writes all pages once more 100 ms after a vCPU has registered its own (KVMCLOCK_UPDATE_DELAY), which would be a
    step of no length amid what a test does; so this yields after that.

    arguments: more of QEMU's command line, such as PRIVATE_RAM.
    """
    qmp = place / "qmp"
    more = ("-machine", machine, "-qmp", f"unix:{qmp},server=on,wait=off", *arguments)
    with Qemu(clockprobe(), features=FEATURES, vcpus=vcpus, cmdline=f"cpus={vcpus}", arguments=more) as qemu:
        running = RunningQemu(qemu, qmp, place)
        _await_pages(running)
        _await_second_write(running)
        yield running


def _await_pages(running: RunningQemu) -> None:
    deadline = time.monotonic() + HANG_S
    while not all(page.version and page.tsc_to_system_mul for page in running.pages()):
        assert time.monotonic() < deadline, f"no pages yet; the guest said {running.qemu.console!r}"
        running.qemu.check_running()
        time.sleep(0.02)


def _await_second_write(running: RunningQemu) -> None:
    end_s = time.monotonic() + SECOND_WRITE_LIMIT_S
    while any(page.version < WRITTEN_TWICE for page in running.pages()) and time.monotonic() < end_s:
        time.sleep(0.005)
