"""A running QEMU to watch: by its QMP socket, by its process, or as a domain of libvirt."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from pvclock import ConfigError
from pvclock.errors import VmNotObservable
from pvclock.host.kvm_debugfs import TscOffsetFiles
from pvclock.host.vmm_process import VmmProcess, open_vmm
from pvclock.meter.watch.vm import GuestRam, VmEvent
from qemu_glue.errors import NotKvm, QemuError
from qemu_glue.peer.qmp_socket import connect
from qemu_glue.watch.events import QemuEvents
from qemu_glue.watch.names import shown, socket_name
from qemu_glue.watch.ram import Means, open_guest_ram
from qemu_glue.watch.session import Session
from qemu_glue.watch.virsh import Virsh

__all__ = ["QemuVm", "Target", "open_vm"]

NO_MONITOR: Final = "only QEMU's monitor tells of events; --qmp or --libvirt reach it"
OWN_PACKAGE: Final = "pvclock "
OUT_OF_SIGHT: Final = VmNotObservable(0, "QEMU's own number is not known here: it is in another PID namespace")


class Target(NamedTuple):
    """Which QEMU: one of the three, as open_vm() has them."""

    qmp: str | None = None
    pid: int | None = None
    libvirt: str | None = None

    @property
    def label(self) -> str:
        """What metrics call it."""
        if self.qmp is not None:
            return socket_name(self.qmp)
        return f"pid-{self.pid}" if self.libvirt is None else shown(self.libvirt)


class QemuVm:
    """A WatchedVm that is a QEMU; open_vm() makes it.

    resources: all that it lets go of at its end.  session: with its monitor, if there is one.  vmm: its process,
    or why that cannot be looked at.  program: of what version, for people.
    """

    def __init__(
        self,
        resources: ExitStack,
        session: Session | None,
        vmm: VmmProcess | VmNotObservable,
        ram: GuestRam,
        program: str,
        vcpus: int,
        tsc_hz: int | None,
    ) -> None:
        self._session = session
        self._events = None if session is None else QemuEvents(session)
        if self._events is not None:
            resources.callback(self._events.close)
        self._vmm = vmm
        self.name = _name(program, vmm, vcpus)
        self.vcpus = vcpus
        self.tsc_hz = tsc_hz
        self.is_paused = None if session is None else not session.execute("query-status")["running"]
        self.ram = ram
        self._offset_files, self.why_no_offsets = _offset_files(vmm, vcpus)
        self.why_no_events = NO_MONITOR if session is None else session.why_no_events
        self._resources = resources.pop_all()

    def tsc_offsets(self) -> tuple[int | None, ...]:
        """Each vCPU's by debugfs."""
        return (None,) * self.vcpus if self._offset_files is None else self._offset_files.read()

    def take_events(self) -> list[VmEvent]:
        """What QEMU told since the last call; VmEnded, QmpFailed or VirshFailed once it tells no more."""
        if self._events is None or self.why_no_events is not None:
            return []
        try:
            return self._events.take()
        except QemuError:
            self.check_running()  # says more, if QEMU has ended
            raise

    def check_running(self) -> None:
        """VmEnded, QmpFailed or VirshFailed if QEMU has ended."""
        if isinstance(self._vmm, VmmProcess):
            self._vmm.process.check_running()
        elif self._session is not None:
            self._session.execute("query-status")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._resources.close()


def open_vm(
    *, qmp: str | None = None, pid: int | None = None, libvirt: str | None = None, ram: Means | None = None
) -> QemuVm:
    """The QEMU with the QMP socket `qmp`, or of process `pid`, or of libvirt's domain `libvirt`: one of the three.

    ram: read the guest's memory in this way or not at all; by default, the best that works.
    ConfigError; QmpFailed, VirshFailed or QemuMissing if its monitor cannot be talked to; NotKvm; VmNotObservable if
    `pid` is no process with a KVM guest; MemoryNotReadable; VmEnded.
    """
    if [qmp, pid, libvirt].count(None) != 2:
        raise ConfigError("a QEMU to watch is named in one way: by qmp, by pid or by libvirt")
    with ExitStack() as resources:
        if pid is not None:
            return _by_process(resources, pid, ram)
        if qmp is not None:
            monitor, listener = connect(qmp)
            resources.callback(monitor.close)
            return _by_monitor(resources, monitor, listener, ram)
        assert libvirt is not None  # noqa: S101  # the third of three
        virsh = Virsh(libvirt)
        resources.callback(virsh.close)
        return _by_monitor(resources, virsh, virsh.pid(), ram)


def _by_process(resources: ExitStack, pid: int, means: Means | None) -> QemuVm:
    vmm = resources.enter_context(open_vmm(pid))
    ram = open_guest_ram(resources, None, vmm, means)
    return QemuVm(resources, None, vmm, ram, vmm.process.name, vmm.vcpus, tsc_hz=None)


def _by_monitor(resources: ExitStack, session: Session, pid: int | None, means: Means | None) -> QemuVm:
    if not session.execute("query-kvm")["enabled"]:
        raise NotKvm
    vmm = _process(resources, pid)
    ram = open_guest_ram(resources, session, vmm, means)
    cpus = session.execute("query-cpus-fast")
    program = _program(session.execute("query-version"))
    return QemuVm(resources, session, vmm, ram, program, len(cpus), _tsc_hz(session, cpus[0]["qom-path"]))


def _program(version: Mapping[str, Any]) -> str:
    """Who serves the monitor: a QEMU, or a machine of ours, which tells by its package that it is none."""
    if version["package"].startswith(OWN_PACKAGE):
        return str(version["package"])
    numbers = version["qemu"]
    return f"QEMU {numbers['major']}.{numbers['minor']}.{numbers['micro']}"


def _process(resources: ExitStack, pid: int | None) -> VmmProcess | VmNotObservable:
    """QEMU's process; or why not: what listens at its socket may be a proxy, or another user's."""
    try:
        return OUT_OF_SIGHT if pid is None else resources.enter_context(open_vmm(pid))
    except VmNotObservable as obstacle:
        return obstacle


def _tsc_hz(session: Session, cpu: str) -> int | None:
    hz = int(session.execute("qom-get", {"path": cpu, "property": "tsc-frequency"}))
    return hz or None


def _offset_files(vmm: VmmProcess | VmNotObservable, vcpus: int) -> tuple[TscOffsetFiles | None, str | None]:
    """Where the offsets are read, or why they cannot be."""
    if isinstance(vmm, VmNotObservable):
        return None, str(vmm)
    if vmm.vcpus != vcpus:
        return None, f"KVM has {vmm.vcpus} vCPUs in process {vmm.process.pid} and QEMU {vcpus}: one was unplugged"
    files = TscOffsetFiles(vmm)
    return (None, files.why) if files.why else (files, None)


def _name(program: str, vmm: VmmProcess | VmNotObservable, vcpus: int) -> str:
    process = f"process {vmm.process.pid}, " if isinstance(vmm, VmmProcess) else ""
    return f"{program}, {process}{vcpus} vCPU{'s' if vcpus > 1 else ''}"
