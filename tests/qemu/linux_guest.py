"""A stock Linux in QEMU/KVM, launched as a user would launch it, whose init samples its clock: guest_sampler.c.

The kernel is the lab's, as Debian built it, and the initramfs holds nothing but that init.  What the sampler finds
comes out of the debug console, so that the kernel's own messages do not mix with it.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

from pvclock.lab.kernel import Kernel
from qemu_glue.peer.launch import CPU_MODEL, find_program
from qemu_glue.peer.monitor import Monitor

__all__ = ["Back", "Gap", "LinuxGuest", "Triple", "compiled_sampler", "initramfs", "runs_linux"]

SOURCE: Final = Path(__file__).with_name("guest_sampler.c")
PROGRAM: Final = Path(__file__).parents[2] / "build" / "guest_sampler"
COMPILE: Final = ("cc", "-std=gnu11", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror")

BOOT_LIMIT_S: Final = 300.0
"""With two vCPUs on one emulated CPU of a busy host; 25 s on an idle one."""
END_LIMIT_S: Final = 20.0
POLL_S: Final = 0.02

CMDLINE: Final = (
    "console=ttyS0",
    "quiet",
    "panic=-1",
    "noxsave",  # an emulated CPU's XSAVE sizes contradict each other, of which the kernel warns at length
)

T = TypeVar("T")


class Triple(NamedTuple):
    """The guest's TSC, its CLOCK_MONOTONIC in ns, and its TSC again."""

    before: int
    ns: int
    after: int


class Gap(NamedTuple):
    """Two triples in succession on one CPU, between which the clock did not go on as the TSC did."""

    cpu: int
    older: Triple
    newer: Triple


class Back(NamedTuple):
    """On `cpu` the clock read `ns` although a read that had ended, on whatever CPU, gave highest_ns."""

    cpu: int
    highest_ns: int
    ns: int


def runs_linux() -> bool:
    """Does this host's CPU virtualise, so that KVM runs whatever a kernel does?  kvm-pvm has KVM's API without it."""
    flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    return not {"vmx", "svm"}.isdisjoint(flags)


def compiled_sampler() -> Path:
    """The compiled guest_sampler.c, which is kept: where the CPU is emulated, linking it takes most of a minute."""
    if not PROGRAM.exists() or PROGRAM.stat().st_mtime < SOURCE.stat().st_mtime:
        PROGRAM.parent.mkdir(exist_ok=True)
        subprocess.run([*COMPILE, "-o", PROGRAM, SOURCE], check=True)
    return PROGRAM


def initramfs() -> bytes:
    """One with the sampler as /init."""
    return _archive({"dev": b"", "init": compiled_sampler().read_bytes()})


class LinuxGuest:
    """A running guest; a context manager.

    folder: an empty one for its files.  machine: QEMU's "q35" or "microvm".  sample_on: the CPUs to sample on, such as
    "0,1"; the others are left idle.  cpu_flags: more of -cpu.  qmp_path: a monitor for others; it has one of its own.
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
    ) -> None:
        self.vcpus = vcpus
        self.qmp_path = folder / "qmp"
        self._findings, self._console, self._output = folder / "findings", folder / "console", folder / "output"
        (folder / "initramfs").write_bytes(initramfs())
        with ExitStack() as resources:
            ours, theirs = (resources.enter_context(end) for end in socket.socketpair())
            command = [
                *(find_program("setpriv", "util-linux"), "--pdeathsig", "KILL", "--"),
                *(find_program(), "-nodefaults", "-no-user-config", "-display", "none"),
                *("-accel", "kvm", "-machine", machine, "-m", "256", "-smp", str(vcpus)),
                *("-cpu", ",".join((CPU_MODEL, *cpu_flags))),
                *("-kernel", str(kernel.image), "-initrd", str(folder / "initramfs")),
                *("-append", " ".join((*CMDLINE, *((f"SAMPLE_ON={sample_on}",) if sample_on else ())))),
                *("-serial", f"file:{self._console}"),
                *("-chardev", f"file,id=findings,path={self._findings}"),
                *("-device", "isa-debugcon,iobase=0xe9,chardev=findings"),
                *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
                *("-chardev", f"socket,id=own,fd={theirs.fileno()}", "-mon", "chardev=own,mode=control"),
            ]
            self._launch(resources, command, theirs)
            self._monitor = resources.enter_context(Monitor(ours))
            self._resources = resources.pop_all()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._process.pid

    def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401  # JSON
        """QEMU's answer to a QMP command."""
        return self._monitor.execute(command, arguments)

    def interrupt(self, seconds: float) -> None:
        """QMP stop, and cont after so long."""
        self.execute("stop")
        time.sleep(seconds)
        self.execute("cont")

    # What the sampler says

    def fact(self, name: str, after: int = 0) -> str:
        """What it says once of itself, as soon as it does: clocksource, cpus, pages; the first beyond `after` lines."""
        return self.await_line(name, after)[0]

    def lines(self) -> list[list[str]]:
        """All whole lines so far, in words."""
        return [line.split() for line in self._findings.read_text().split("\n")[:-1]]

    def gaps(self, after: int = 0) -> list[Gap]:
        """Its gaps, beyond `after` lines."""
        return [
            Gap(int(words[1]), _triple(words[2:5]), _triple(words[5:8]))
            for words in self.lines()[after:]
            if words[0] == "gap"
        ]

    def backs(self, after: int = 0) -> list[Back]:
        """Its steps back, beyond `after` lines."""
        return [Back._make(map(int, words[1:])) for words in self.lines()[after:] if words[0] == "back"]

    def newest_triple(self, after: int = 0) -> Triple:
        """The newest that was told, on whatever CPU; waits for one beyond `after` lines."""
        self.await_line("alive", after)
        return _triple([words for words in self.lines()[after:] if words[0] == "alive"][-1][2:5])

    def await_line(self, kind: str, after: int = 0) -> list[str]:
        """The words of the first line of that kind beyond `after` lines."""

        def first() -> list[str] | None:
            return next((words[1:] for words in self.lines()[after:] if words[0] == kind), None)

        return self.wait_for(first, f"{kind!r} beyond line {after}")

    def wait_for(self, look: Callable[[], T | None], what: str) -> T:
        """What look() gives, once it gives something; AssertionError with the guest's words if it never does."""
        deadline = time.monotonic() + BOOT_LIMIT_S
        while (found := look()) is None:
            ended = self._process.poll() is not None
            assert not ended, f"QEMU has ended: {self._output.read_text()}"
            assert time.monotonic() < deadline, f"no {what}: {self.lines()[-5:]}\n{self._console.read_text()[-2000:]}"
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


def _archive(files: dict[str, bytes]) -> bytes:
    """A cpio archive as Documentation/driver-api/early-userspace/buffer-format.rst has it; b"": a folder."""
    entries = [(name, 0o100755 if contents else 0o40755, contents) for name, contents in files.items()]
    return b"".join(
        _padded(_header(number, mode, len(contents), name) + name.encode() + b"\0") + _padded(contents)
        for number, (name, mode, contents) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1)
    )


def _header(number: int, mode: int, length: int, name: str) -> bytes:
    links, name_length = 1, len(name) + 1
    fields = (number, mode, 0, 0, links, 0, length, 0, 0, 0, 0, name_length, 0)
    return b"070701" + b"".join(b"%08x" % field for field in fields)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)
