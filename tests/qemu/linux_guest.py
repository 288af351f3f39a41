"""A stock Linux in QEMU/KVM, launched as a user would launch it, whose init samples its clock: guest_sampler.c.

The kernel is the lab's, as Debian built it, and the initramfs holds nothing but that init.  What the sampler finds
comes out of the debug console, so that the kernel's own messages do not mix with it.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

from pvclock.boot.initramfs import archive
from pvclock.lab.kernel import Kernel
from qemu_glue.peer.launch import CPU_MODEL, find_program
from qemu_glue.peer.monitor import Monitor
from tests.guest_programs import INIT_SAMPLER, Triple, compiled

__all__ = [
    "BOOT_LIMIT_S",
    "Back",
    "Gap",
    "LinuxGuest",
    "SamplerLog",
    "initramfs",
]

BOOT_LIMIT_S: Final = 600.0
"""With two vCPUs on one emulated CPU of a busy host; 25 s on an idle one."""
END_LIMIT_S: Final = 20.0
POLL_S: Final = 0.02
CONSOLE_TOLD: Final = 2000

CMDLINE: Final = (
    "console=ttyS0",
    "quiet",
    "noxsave",  # an emulated CPU's XSAVE sizes contradict each other, of which the kernel warns at length
)

MACHINES: Final = {
    "q35": "q35",
    "microvm": "microvm,rtc=on",  # Linux waits a second of reads for an RTC that is not there; emulated, for much more
}

T = TypeVar("T")


class Gap(NamedTuple):
    """Two triples in succession on one CPU, between which the clock did not go on as the TSC did."""

    cpu: int
    older: Triple
    newer: Triple


class Back(NamedTuple):
    """On `cpu` the clock gave `triple` after a read that had ended, on whatever CPU, had given highest_ns."""

    cpu: int
    highest_ns: int
    triple: Triple

    @property
    def by_ns(self) -> int:
        """How far back."""
        return self.highest_ns - self.triple.ns


def initramfs() -> bytes:
    """One with the sampler as /init."""
    return archive({"dev": b"", "init": compiled(INIT_SAMPLER)})


class SamplerLog:
    """What the sampler said so far, in lines that it ended.  after: only what is beyond so many lines."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __len__(self) -> int:
        return len(self._lines())

    def of(self, kind: str, after: int = 0) -> list[list[str]]:
        """The words after `kind` of all lines that begin with it."""
        return [words[1:] for words in self._lines()[after:] if words[0] == kind]

    def gaps(self, after: int = 0) -> list[Gap]:
        """Where the clock did not go on as the TSC did."""
        return [Gap(int(words[0]), _triple(words[1:4]), _triple(words[4:7])) for words in self.of("gap", after)]

    def backs(self, after: int = 0) -> list[Back]:
        """Where the clock went back."""
        return [Back(int(words[0]), int(words[1]), _triple(words[2:5])) for words in self.of("back", after)]

    def triples(self, after: int = 0) -> list[Triple]:
        """A few of them."""
        return [_triple(words[1:4]) for words in self.of("alive", after)]

    def tail(self) -> list[list[str]]:
        """The last lines, for people."""
        return self._lines()[-5:]

    def _lines(self) -> list[list[str]]:
        return [line.split() for line in self._path.read_text().split("\n")[:-1]]


class LinuxGuest:
    """A running guest; a context manager.

    folder: an empty one for its files.  machine: of MACHINES.  sample_on: the CPUs to sample on, such as
    "0,1"; the others are left idle.  cpu_flags: more of -cpu.  files: what its initramfs has instead of the sampler.
    log: what the sampler said.  console: its console's output, a file.
    qmp_path: a monitor for others; the guest has one of its own.
    """

    def __init__(
        self,
        folder: Path,
        kernel: Kernel,
        *,
        machine: str = "microvm",
        vcpus: int = 1,
        sample_on: str = "",
        cpu_flags: tuple[str, ...] = (),
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.machine, self.vcpus = machine, vcpus
        self.qmp_path = folder / "qmp"
        self.log = SamplerLog(folder / "log")
        self.console, self._output = folder / "console", folder / "output"
        (folder / "initramfs").write_bytes(archive(files) if files else initramfs())
        with ExitStack() as resources:
            ours, theirs = (resources.enter_context(end) for end in socket.socketpair())
            command = [
                *(find_program("setpriv", "util-linux"), "--pdeathsig", "KILL", "--"),
                *(find_program(), "-nodefaults", "-no-user-config", "-display", "none"),
                *("-accel", "kvm", "-machine", MACHINES[machine], "-m", "256", "-smp", str(vcpus)),
                *("-cpu", ",".join((CPU_MODEL, *cpu_flags))),
                *("-kernel", str(kernel.image), "-initrd", str(folder / "initramfs")),
                *("-append", " ".join((*CMDLINE, *((f"SAMPLE_ON={sample_on}",) if sample_on else ())))),
                *("-serial", f"file:{self.console}"),
                *("-chardev", f"file,id=log,path={folder / 'log'}"),
                *("-device", "isa-debugcon,iobase=0xe9,chardev=log"),
                *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
                *("-chardev", f"socket,id=own,fd={theirs.fileno()}", "-mon", "chardev=own,mode=control"),
            ]
            self._launch(resources, command, theirs)
            self._monitor = resources.enter_context(Monitor(ours, BOOT_LIMIT_S))
            self._resources = resources.pop_all()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._process.pid

    def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401  # JSON
        """QEMU's answer to a QMP command."""
        return self._monitor.execute(command, arguments)

    def fact(self, name: str, after: int = 0) -> str:
        """What the sampler says once a boot, as soon as it does: its clocksource, cpus, pages; beyond `after` lines."""
        return self.wait_for(lambda: next((words[0] for words in self.log.of(name, after)), None), name)

    def wait_for(self, look: Callable[[], T | None], what: str) -> T:
        """What look() gives, once it gives something; AssertionError with the guest's words if it never does."""
        deadline = time.monotonic() + BOOT_LIMIT_S
        while (found := look()) is None:
            assert self._process.poll() is None, self._output.read_text()
            console = self.console.read_text(errors="replace")
            in_time = "Kernel panic" not in console and time.monotonic() < deadline
            assert in_time, f"no {what}: {self.log.tail()}\n{console[-CONSOLE_TOLD:]}"
            time.sleep(POLL_S)
        return found

    # Beginning and end

    def close(self) -> None:
        """End QEMU."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _launch(self, resources: ExitStack, command: list[str], monitor: socket.socket) -> None:
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[monitor.fileno()]
            )
        monitor.close()
        resources.callback(_end, self._process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_LIMIT_S)
    process.kill()
    process.wait()


def _triple(words: list[str]) -> Triple:
    return Triple._make(map(int, words))
