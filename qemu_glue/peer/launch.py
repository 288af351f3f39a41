"""A QEMU/KVM that ends with this process, with RAM that both share.

RAM, kernel image, console and output are memfds, which QEMU opens through its /proc/self/fd, and QMP is a socket pair:
so no file is left, however either process ends.  QEMU is not left either: the kernel kills it with the thread that
launched it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self

from pvclock import GuestMemory
from pvclock.machine import CONSOLE_PORT, EXIT_PORT
from pvclock.machine.ram import Ram
from qemu_glue.errors import QemuExited, QemuMissing, QmpFailed
from qemu_glue.peer.cpu_model import cpu_property
from qemu_glue.peer.monitor import Monitor
from qemu_glue.peer.vmm import MonitoredProcess, end

__all__ = ["LAUNCHER", "PROGRAM", "Qemu", "find_program", "require_programs"]

PROGRAM: Final = "qemu-system-x86_64"
PACKAGE: Final = "qemu-system-x86"
LAUNCHER: Final = ("setpriv", "util-linux")
"""Sets PR_SET_PDEATHSIG for QEMU; and the Debian package that has it."""

CPU_MODEL: Final = "host,-arch-capabilities"
"""KVM may offer IA32_ARCH_CAPABILITIES and then refuse QEMU's write of it, which ends QEMU; no clock needs it."""

OUTPUT_KEPT_BYTES: Final = 1 << 16


def find_program(program: str = PROGRAM, package: str = PACKAGE) -> str:
    """The path of `program`; QemuMissing if the PATH has none."""
    path = shutil.which(program)
    if path is None:
        raise QemuMissing(program, package)
    return path


def require_programs() -> None:
    """QemuMissing unless QEMU, and what launches it, are on the PATH."""
    find_program()
    find_program(*LAUNCHER)


class Qemu:
    """A running QEMU/KVM (machine type microvm) with the multiboot `image` in it; a context manager.

    features: CPUID 0x40000001 EAX that the guest sees.  cpu_flags: more of its -cpu, such as "hv-time".  program:
    QEMU's name or path.  arguments: more of its command line.

    QemuMissing, QemuExited (with exit code, command and output), QmpFailed or ConfigError if it cannot be launched;
    nothing is left behind then.
    """

    def __init__(
        self,
        image: bytes,
        *,
        features: int,
        cpu_flags: tuple[str, ...] = (),
        vcpus: int = 1,
        memory_bytes: int = 16 << 20,
        cmdline: str = "",
        program: str = PROGRAM,
        arguments: tuple[str, ...] = (),
    ) -> None:
        launcher = [find_program(*LAUNCHER), "--pdeathsig", "KILL", "--"]
        path = find_program(program)
        cpu = ",".join((cpu_property(features, CPU_MODEL, known=_cpu_flags(path)), *cpu_flags))
        self.vcpus = vcpus
        with ExitStack() as resources:
            ram = Ram(memory_bytes)
            resources.callback(ram.close)
            self.memory = resources.enter_context(GuestMemory(ram.buffer))
            self._make_files(resources, image)
            ours, theirs = (resources.enter_context(end) for end in socket.socketpair())
            self.command = [
                *launcher,
                path,
                *_machine(vcpus, cpu, memory_bytes, ram.fd),
                *("-kernel", _path(self._image), "-append", cmdline),
                *_ports(self._console, theirs.fileno()),
                *arguments,
            ]
            self._launch(resources, [ram.fd, self._image, self._console, self._dump, theirs.fileno()])
            theirs.close()  # the last copy in this process: when QEMU ends, the connection closes
            self._connect(resources, ours)
            self._resources = resources.pop_all()

    # The guest

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._process.pid

    @property
    def console(self) -> str:
        """The guest's output on the debug console so far."""
        return _contents(self._console).decode(errors="replace")

    def pause(self) -> None:
        """Stop the guest's vCPUs and its clock: QMP stop."""
        self.execute("stop")

    def resume(self) -> None:
        """Continue both: QMP cont."""
        self.execute("cont")

    def reset(self) -> None:
        """Boot the guest anew: QMP system_reset."""
        self.execute("set-action", reboot="reset")  # else QEMU ends, as it is launched with -no-reboot
        self.execute("system_reset")

    def wait(self, limit_s: float) -> int:
        """The guest's exit code, once it has written one; QEMU has ended then.

        0 may also be QEMU's own failure (its exit code is 1 then, too): check what the guest was to do.
        QemuExited if it ended otherwise; StateError if it is still running after `limit_s`.
        """
        code = self._process.wait(limit_s)
        if code < 0 or code % 2 == 0:  # isa-debug-exit makes 2v + 1 of v; 0 is QEMU's own, when it is told to quit
            raise self._exited(code)
        return code // 2

    def check_running(self) -> None:
        """QemuExited if QEMU has ended."""
        self._process.check_running()

    # QEMU

    def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401  # JSON
        """QEMU's answer to a QMP command; QmpFailed if there is none, QemuExited if QEMU has ended."""
        return self._process.execute(self._monitor, command, arguments)

    def read_by_monitor(self, gpa: int, length: int) -> bytes:
        """Guest-physical memory as QEMU itself reads it (QMP pmemsave); errors of execute()."""
        self.execute("pmemsave", val=gpa, size=length, filename=_path(self._dump))
        return _contents(self._dump)

    def tsc_hz(self) -> int:
        """vCPU 0's TSC frequency by QEMU; errors of execute()."""
        return self._process.tsc_hz(self._monitor)

    def close(self) -> None:
        """End QEMU and release everything.  May be called twice."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Beginning and end

    def _make_files(self, resources: ExitStack, image: bytes) -> None:
        self._image, self._console, self._output, self._dump = (
            _memfd(resources, name, contents)
            for name, contents in (("image", image), ("console", b""), ("output", b""), ("dump", b""))
        )

    def _launch(self, resources: ExitStack, fds: list[int]) -> None:
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=fds,
            process_group=0,  # Ctrl-C reaches this process alone, which ends QEMU in order
        )
        resources.callback(end, process)
        self._process = MonitoredProcess(process, self._exited)

    def _connect(self, resources: ExitStack, connection: socket.socket) -> None:
        try:
            self._monitor = resources.enter_context(Monitor(connection))
        except QmpFailed:
            self._process.raise_if_ending()
            raise
        resources.callback(self._process.ask_to_quit, self._monitor)

    def _exited(self, code: int) -> QemuExited:
        return QemuExited(code, self.command, _contents(self._output).decode(errors="replace"))


def _machine(vcpus: int, cpu: str, memory_bytes: int, ram_fd: int) -> list[str]:
    # microvm has hardly any firmware: 0.1 s until the image runs, where a PC takes 3 s.
    ram = f"memory-backend-file,id=ram,share=on,size={memory_bytes},mem-path={_path(ram_fd)}"
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-accel", "kvm", "-machine", "microvm,memory-backend=ram", "-object", ram),
        *("-m", f"{memory_bytes >> 20}M", "-smp", str(vcpus), "-cpu", cpu),
    ]


def _ports(console_fd: int, monitor_fd: int) -> list[str]:
    return [
        *("-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"),
        *("-chardev", f"file,id=console,path={_path(console_fd)}"),
        *("-device", f"isa-debugcon,iobase={CONSOLE_PORT:#x},chardev=console"),
        *("-chardev", f"socket,id=qmp,fd={monitor_fd}", "-mon", "chardev=qmp,mode=control"),
    ]


def _cpu_flags(path: str) -> frozenset[str]:
    """All words of `-cpu help`, among them the CPU flags that this QEMU knows."""
    command = [path, "-cpu", "help"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise QemuExited(done.returncode, command, done.stdout)
    return frozenset(done.stdout.split())


def _memfd(resources: ExitStack, name: str, contents: bytes) -> int:
    fd = os.memfd_create(f"pvclock-{name}", os.MFD_CLOEXEC)
    resources.callback(os.close, fd)
    os.write(fd, contents)  # a memfd takes it in one write
    return fd


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _contents(fd: int) -> bytes:
    """The newest OUTPUT_KEPT_BYTES in a memfd."""
    return os.pread(fd, OUTPUT_KEPT_BYTES, max(0, os.fstat(fd).st_size - OUTPUT_KEPT_BYTES))
