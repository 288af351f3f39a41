"""How a watch begins: its VM is opened and its pages are found, at once or as soon as they are there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from pvclock import ConfigError
from pvclock.commands.arguments import THE_ONLY_PID
from pvclock.errors import PagesNotFound, VmNotObservable
from pvclock.host.vmm_process import running_vms
from pvclock.meter.watch.loop import WatchLoop
from pvclock.meter.watch.page_finder import PagesFound, Progress
from pvclock.meter.watch.vm import WatchedVm
from pvclock.meter.watch.words import counted
from qemu_glue.errors import QmpFailed, VirshFailed
from qemu_glue.watch.options import WatchOptions
from qemu_glue.watch.target import QemuVm, Target, open_vm

__all__ = ["Interrupted", "Patience", "WaitsForEnd", "begun", "opened", "target_of"]

RETRY_S: Final = 0.5
STOPPED: Final = "the guest was stopped when the watch began; if it has not booted so far, have it go on"
NOT_YET: Final = (PagesNotFound, QmpFailed, VirshFailed, VmNotObservable)

T = TypeVar("T")


class WaitsForEnd(Protocol):
    """Interrupts, or what a fleet tells its VMs' threads of them."""

    @property
    def came(self) -> bool:
        """Is it the end?"""

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds` or until the end; is it the end?"""


class Interrupted(Exception):  # no error: the user wants it
    """Ctrl-C or SIGTERM, before the watch began."""


class Patience:
    """Tries again, for wait_s in all."""

    def __init__(self, wait_s: float, interrupts: WaitsForEnd) -> None:
        self._end_s = time.monotonic() + wait_s
        self._interrupts = interrupts

    def check(self) -> None:
        """Interrupted if Ctrl-C came."""
        if self._interrupts.came:
            raise Interrupted

    def have(self, make: Callable[[], T], is_good: Callable[[T], bool] = lambda _made: True) -> T:
        """What `make` makes, as soon as it is good; at last whatever it makes, or its error.  Interrupted."""
        while True:
            begin_s = time.monotonic()
            is_last = begin_s >= self._end_s
            try:
                made = make()
            except NOT_YET:
                if is_last:
                    raise
            else:
                if is_last or is_good(made):
                    return made
            self._interrupts.wait(max(RETRY_S, time.monotonic() - begin_s))
            self.check()


def target_of(qmp: str | None = None, pid: int | None = None, libvirt: str | None = None) -> Target:
    """The QEMU that a command's arguments name.  ConfigError where `pid` is THE_ONLY_PID and there is not one VM."""
    return Target(qmp, _only_pid() if pid == THE_ONLY_PID else pid, libvirt)


def opened(target: Target) -> QemuVm:
    """As open_vm(), with the VMs that there are where the target's `pid` is none of them."""
    try:
        return open_vm(qmp=target.qmp, pid=target.pid, libvirt=target.libvirt)
    except VmNotObservable as error:
        raise VmNotObservable(error.pid, f"{error.why}; {_running_in_words()}") from None


def begun(
    vm: WatchedVm,
    options: WatchOptions,
    patience: Patience,
    *,
    wait: Callable[[float], bool],
    progress: Progress = lambda _done_bytes, _total_bytes: None,
    begin: Callable[[WatchLoop], PagesFound] = WatchLoop.begin,
) -> tuple[WatchLoop, PagesFound]:
    """The watch of a VM, with its pages found by `begin`.  wait, progress: as WatchLoop's.  Interrupted."""

    def checked_progress(done_bytes: int, total_bytes: int) -> None:
        patience.check()
        progress(done_bytes, total_bytes)

    loop = WatchLoop(
        vm,
        options.reference,
        wait=wait,
        interval_s=options.interval_s,
        given=options.pages,
        progress=checked_progress,
    )
    try:
        return loop, patience.have(lambda: begin(loop), lambda _found: loop.finder.doubt is None)
    except PagesNotFound as error:
        why = PagesNotFound(error.searched_bytes, error.looked_for, STOPPED) if vm.is_paused else error
        raise why from None


def _only_pid() -> int:
    pids = [vm.pid for vm in running_vms()]
    if len(pids) != 1:
        raise ConfigError(f"--pid is which? {_running_in_words()}")
    return pids[0]


def _running_in_words() -> str:
    """The VMs that --pid can be."""
    told = [f"{vm.pid} ({vm.name}, {counted(vm.vcpus, 'vCPU')})" for vm in running_vms()]
    return f"KVM guests run in {', '.join(told)}" if told else "no process that can be looked at here runs a KVM guest"
