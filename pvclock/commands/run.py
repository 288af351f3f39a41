"""Boot a kernel, or an image of your own, on a small virtual machine whose clock is pvclock's.

The terminal is the guest's serial console; Ctrl-A x ends the run.  --debian boots Debian's kernel, as it is, which it
downloads if it has to, to a shell: `pvclock run --debian --rate 1/10` is a Linux for which time passes at a tenth.

Exit status: 0 when the guest has powered off, or the user has ended the run; 1 when it wrote another exit code than 0
to port 0xf4; 3 when it asked for a reset, 4 when its kernel panicked and said so, 5 when it crashed: a triple fault, or
what KVM cannot run; 124 when --timeout ended it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from pvclock.boot import BootSource
from pvclock.boot.initramfs import with_shell
from pvclock.commands import whole_file
from pvclock.commands.arguments import duration_s, factor, memory_bytes, output_file, whole_number
from pvclock.commands.guest_terminal import Keys, converse, raw_terminal
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.commands.signals import ended_by_signals
from pvclock.errors import ConfigError, GuestCrashed, GuestPanicked, ImageError
from pvclock.host.linux import cpu_flags
from pvclock.machine import Ending, Machine, RunState
from pvclock.quantities import NS_PER_S

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock run --debian                    Debian's kernel, to a shell
  pvclock run --debian --rate 1/10        the same, at a tenth of real time
  pvclock run --kernel bzImage --initrd initrd"""

MEMORY_BYTES: Final = 256 << 20
CPUS_MAX: Final = 255
CMDLINE: Final = "console=ttyS0 panic=-1"
ENDED: Final = frozenset((RunState.SHUTDOWN, RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR))

WORDS: Final = {Ending.POWER_OFF: "the guest has powered off", Ending.RESET: "the guest asked for a reset"}
STATUSES: Final = {Ending.POWER_OFF: 0, Ending.RESET: 3, Ending.PANIC: 4}
CRASHED: Final = 5
TIMED_OUT: Final = 124
"""As of timeout(1)."""

DYNAMIC_LOADER: Final = b"/ld-linux"
"""The interpreter that a dynamically linked program names, near its beginning."""
ELF_BEGIN_BYTES: Final = 4096
PANIC: Final = b"Kernel panic - "
LINE_KEPT_BYTES: Final = 1000
"""Of the console's line, which a guest need not end."""
DEBUG_CONSOLE_TOLD: Final = 2000

VIRTUALISATION: Final = ("vmx", "svm")
MAY_NOT_RUN: Final = (
    "this host's CPU shows neither vmx nor svm, so its KVM may not run a stock kernel; "
    "`pvclock lab -- pvclock run ...` does"
)

NOTHING_TO_BOOT: Final = (
    "nothing to boot: name an IMAGE, or a kernel with --kernel (a bzImage, such as /boot/vmlinuz-*, or a vmlinux), or "
    "have --debian download one"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("image", nargs="?", type=Path, metavar="IMAGE", help="a multiboot, PVH, Linux or flat image")
    parser.add_argument("--kernel", type=Path, metavar="FILE", help="a Linux kernel: bzImage or vmlinux")
    parser.add_argument("--debian", action="store_true", help="Debian's kernel, and a shell if there is no --initrd")
    parser.add_argument("--initrd", type=Path, metavar="FILE", help="an initial RAM disk")
    parser.add_argument(
        "--append",
        metavar="TEXT",
        help=f"the command line (default for kernels: {CMDLINE!r}; quiet with --debian)",
    )
    parser.add_argument("--cpus", type=whole_number(1, CPUS_MAX), default=1, metavar="N", help="vCPUs (default 1)")
    parser.add_argument(
        "--memory", type=memory_bytes, default=MEMORY_BYTES, metavar="SIZE", help="RAM, such as 512M (default 256M)"
    )
    parser.add_argument("--clock", choices=("engine", "kernel"), default="engine", help="who serves its clock")
    parser.add_argument("--provider", metavar="NAME", help="the engine's: KVM (default), HyperV, HyperV+KVM, None, ...")
    parser.add_argument(
        "--reference",
        choices=("off", "raw", "monotonic", "realtime"),
        help="which clock of the host's the engine's follows (default off)",
    )
    parser.add_argument(
        "--rate", type=factor, metavar="N/D", help="guest seconds in a host's second, from boot on: 1/10 is a tenth"
    )
    parser.add_argument("--invtsc", action="store_true", help="show the guest an invariant TSC, which it prefers")
    parser.add_argument(
        "--events", type=output_file, metavar="FILE", help="write what the engine's clock did, as JSON lines"
    )
    parser.add_argument("--timeout", type=duration_s, metavar="SECONDS", help="end the run after so long")


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Boot it, pass on what is typed and printed until it ends, and say how it ended."""
    source = _boot_source(arguments, screen)
    options = _clock_options(arguments)
    console = _Console((sys.stderr if arguments.json else sys.stdout).fileno())
    with (
        ended_by_signals(),
        Machine(
            source,
            vcpus=arguments.cpus,
            memory_bytes=arguments.memory,
            platform="pc",
            serial_output=console.write,
            **options,
        ) as machine,
    ):
        if not arguments.image and cpu_flags().isdisjoint(VIRTUALISATION):
            screen.tell(f"pvclock run: {MAY_NOT_RUN}")
        begun_s = time.monotonic()
        if arguments.rate is not None and machine.clock is not None:
            machine.clock.dilate(*arguments.rate.as_integer_ratio())
        end = _run_to_its_end(machine, console, arguments.timeout)
        result = {
            **end._asdict(),
            "exit_code": machine.exit_code,
            "guest_s": machine.clock_service.now_ns() / NS_PER_S,
            "host_s": time.monotonic() - begun_s,
            "debug_console": machine.console[-DEBUG_CONSOLE_TOLD:],
        }
        if arguments.events is not None and machine.clock is not None:
            whole_file.write(str(arguments.events), machine.clock.events.json_lines().encode())
    screen.tell(f"pvclock run: {end.why}")
    return Outcome(end.status == 0, result, end.status)


# What to boot


def _boot_source(arguments: argparse.Namespace, screen: Screen) -> BootSource:
    """The image with command line and initrd; ConfigError or ImageError, which says how to get one, if it cannot be."""
    named = [each for each in (arguments.image, arguments.kernel) if each is not None]
    if len(named) + arguments.debian != 1:
        raise ConfigError("IMAGE, --kernel and --debian: give one of them" if named else NOTHING_TO_BOOT)
    initrd = b"" if arguments.initrd is None else _content(arguments.initrd, arguments.memory)
    if arguments.debian:
        from pvclock.lab.kernel import find_kernel

        kernel = find_kernel(None, lambda text: screen.tell(f"pvclock run: {text}"))
        named = [kernel.image]
        initrd = initrd or with_shell(_busybox())
    cmdline = arguments.append
    if cmdline is None:
        cmdline = "" if arguments.image else f"{CMDLINE} quiet" if arguments.debian else CMDLINE
    source = BootSource(_content(named[0], arguments.memory), cmdline, initrd)
    if not arguments.image and source.entered_by == "flat":
        raise ImageError(f"{named[0]} is not a Linux kernel: neither a bzImage nor an ELF file (vmlinux)")
    return source


def _content(path: Path, memory_bytes: int) -> bytes:
    """A file's, if guest memory could hold it."""
    length = path.stat().st_size
    if not path.is_file():
        raise ConfigError(f"{path} is not a file")
    if length > memory_bytes:
        raise ConfigError(f"{path} has {length} bytes, the guest {memory_bytes} of memory; give it more by --memory")
    return path.read_bytes()


def _busybox() -> bytes:
    """A statically linked busybox, for a root file system."""
    found = shutil.which("busybox")
    if found is None:
        raise ConfigError("--debian gives its guest busybox's shell: apt-get install busybox-static, or give --initrd")
    content = Path(found).read_bytes()
    if DYNAMIC_LOADER in content[:ELF_BEGIN_BYTES]:
        raise ConfigError(f"{found} is not statically linked: apt-get install busybox-static, or give --initrd")
    return content


def _clock_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The Machine's options of its clock; ConfigError for those that the kernel's does not have."""
    given = {"provider": arguments.provider, "reference": arguments.reference}
    options = {name: value for name, value in given.items() if value is not None}
    if arguments.invtsc:
        options["offer_invariant_tsc"] = True
    if arguments.clock == "kernel" and (options or arguments.rate or arguments.events):
        raise ConfigError("--clock kernel: it takes none of --provider, --reference, --rate, --invtsc and --events")
    return {"clock": arguments.clock, **options}


# From start to end


class _End(NamedTuple):
    """ending: an Ending, "crash", "user" or "timeout".  why: for people.  status: the process's exit status."""

    ending: str
    why: str
    status: int


def _run_to_its_end(machine: Machine, console: _Console, timeout_s: float | None) -> _End:
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    typed = sys.stdin.fileno()
    with _told_of_the_end(machine) as over, raw_terminal(typed) as is_terminal:
        keys = Keys(has_escape=is_terminal)
        machine.start()
        has_ended = converse(typed, over, keys, machine.serial.receive, deadline_s)
        if not has_ended:
            machine.stop()
    if has_ended:
        return _end_of(machine, console)
    if keys.ended:
        return _End("user", "ended by Ctrl-A x", 0)
    return _End("timeout", f"ended by --timeout after {timeout_s:g} s", TIMED_OUT)


@contextmanager
def _told_of_the_end(machine: Machine) -> Iterator[int]:
    """A descriptor that can be read once the run has ended."""
    over, tell = os.pipe()

    def handler(_before: RunState, now: RunState) -> None:
        if now in ENDED:
            os.write(tell, b".")

    machine.run_state.add_handler(handler)
    try:
        yield over
    finally:
        machine.stop()  # before the pipe goes
        machine.run_state.remove_handler(handler)
        os.close(over)
        os.close(tell)


def _end_of(machine: Machine, console: _Console) -> _End:
    """How the guest ended its run.  A kernel that panics and has panic=-1 says so on its console, and resets."""
    try:
        exit_code = machine.wait()
    except GuestPanicked as panic:
        return _End(Ending.PANIC, str(panic), STATUSES[Ending.PANIC])
    except GuestCrashed as crash:
        registers = machine.vcpus[crash.vcpu].get_regs()
        shown = " ".join(f"{name}={value:#x}" for name, value in registers.items())
        return _End("crash", f"{crash}; {shown}", CRASHED)
    ending = machine.ending
    if ending is Ending.EXIT_CODE or ending is None:
        return _End(Ending.EXIT_CODE, f"the guest's exit code is {exit_code}", int(exit_code != 0))
    if ending is Ending.RESET and console.panic:
        return _End(Ending.PANIC, f"the guest's kernel panicked: {console.panic}", STATUSES[Ending.PANIC])
    return _End(ending, WORDS[ending], STATUSES[ending])


class _Console:
    """Passes on what the guest sends, to `descriptor`; panic: the last line by which a kernel told of one."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._line = bytearray()
        self.panic = ""

    def write(self, data: bytes) -> None:
        """See Machine's serial_output."""
        left = data
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._line += data
        if data.endswith(b"\n"):
            if PANIC in self._line:
                self.panic = self._line[self._line.index(PANIC) :].decode(errors="replace").strip()
            self._line.clear()
        del self._line[:-LINE_KEPT_BYTES]
