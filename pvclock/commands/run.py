"""Boot a kernel, or an image of your own, on a small virtual machine whose clock is pvclock's.

The terminal is the guest's serial console; Ctrl-A x ends the run.  Ctrl-A z, or SIGTSTP, stops it until it is
continued, its guest paused; --resume-policy says what becomes of the time that the guest has missed.

A kernel needs an initial RAM disk, for there is no other: --initrd is one of your own, and --shell one with busybox's
shell.  --debian boots Debian's kernel, as it is, which it downloads if it has to, to that shell: `pvclock run --debian
--rate 1/10` is a Linux for which time passes at a tenth.

With --time-travel an idle guest's time takes no time: `sleep 86400` ends after seconds.

Exit status: 0 when the guest has powered off, or the user has ended the run; 1 when it wrote another exit code than 0
to port 0xf4; 3 when it asked for a reset, 4 when its kernel panicked and said so, 5 when it crashed: a triple fault, or
what KVM cannot run; 6 when --time-travel found it idle for ever; 124 when --timeout ended it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from pvclock.boot import BootModule, BootSource
from pvclock.boot.initramfs import with_shell
from pvclock.commands import machine_options, run_services, run_time, whole_file
from pvclock.commands.arguments import catch_up_policy, duration_s, memory_bytes, output_file, whole_number
from pvclock.commands.doctor_machine import tell_what_is_wrong
from pvclock.commands.guest_console import GuestConsole
from pvclock.commands.guest_terminal import Keys, Settings, as_it_was, converse, raw_terminal, settings_of
from pvclock.commands.outcome import Outcome
from pvclock.commands.run_ending import End, ended_by_client, ended_by_timeout, ended_by_user, find_end
from pvclock.commands.run_time import IdleEnd
from pvclock.commands.run_why import TRACE_OPTIONS, WakeCounts, wakes_table
from pvclock.commands.screen import Screen
from pvclock.commands.signals import ended_by_signals, told_to_stop
from pvclock.errors import ConfigError, ImageError
from pvclock.host.linux import cpu_flags
from pvclock.machine import Machine, RunState
from pvclock.machine.time_travel import Look
from pvclock.quantities import NS_PER_S

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock run --debian                    Debian's kernel, to a shell
  pvclock run --debian --rate 1/10        the same, at a tenth of real time
  pvclock run --debian --time-travel      the same; its idle time takes no time
  pvclock run --kernel bzImage --shell    a kernel of your own, to a shell
  pvclock run --kernel bzImage --initrd initrd"""

MEMORY_BYTES: Final = 256 << 20
CMDLINE: Final = "console=ttyS0 panic=-1"
ENDED: Final = frozenset((RunState.SHUTDOWN, RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR))

DYNAMIC_LOADER: Final = b"/ld-linux"
"""The interpreter that a dynamically linked program names, near its beginning."""
ELF_BEGIN_BYTES: Final = 4096
DEBUG_CONSOLE_TOLD: Final = 2000

VIRTUALISATION: Final = ("vmx", "svm")
MAY_NOT_RUN: Final = (
    "this host's CPU shows neither vmx nor svm, so its KVM may not run a stock kernel; "
    "`pvclock lab -- pvclock run ...` does, where there is nobody to type, and /tmp is empty"
)

NOTHING_TO_BOOT: Final = (
    "nothing to boot: name an IMAGE, or a kernel with --kernel (a bzImage, such as /boot/vmlinuz-*, or a vmlinux), or "
    "have --debian download one"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("image", nargs="?", type=Path, metavar="IMAGE", help="a multiboot, PVH, Linux or flat image")
    parser.add_argument("--kernel", type=Path, metavar="FILE", help="a Linux kernel: bzImage or vmlinux")
    parser.add_argument("--debian", action="store_true", help="Debian's kernel, and --shell if there is no --initrd")
    parser.add_argument("--initrd", type=Path, metavar="FILE", help="an initial RAM disk: a cpio archive with /init")
    parser.add_argument("--shell", action="store_true", help="an initial RAM disk with busybox's shell")
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="FILE[,STRING]",
        help="a module of a multiboot or PVH image, with a string for it; can be given several times",
    )
    parser.add_argument(
        "--append",
        metavar="TEXT",
        help=f"the command line (default for a Linux kernel: {CMDLINE!r}; quiet with --debian)",
    )
    parser.add_argument(
        "--cpus", type=whole_number(1, machine_options.CPUS_MAX), default=1, metavar="N", help="vCPUs (default 1)"
    )
    parser.add_argument(
        "--memory", type=memory_bytes, default=MEMORY_BYTES, metavar="SIZE", help="RAM, such as 512M (default 256M)"
    )
    machine_options.add_arguments(parser)
    run_time.add_arguments(parser)
    parser.add_argument(
        "--resume-policy",
        type=catch_up_policy,
        metavar="POLICY",
        help="what becomes of time that the guest missed, stopped or in a sleep of the host's: freeze (default: it is "
        "none of the guest's), advance (a step), slew:max_ppm=N (so much faster until it is made up for)",
    )
    parser.add_argument(
        "--events", type=output_file, metavar="FILE", help="write what the engine's clock did, as JSON lines"
    )
    run_services.add_arguments(parser)
    parser.add_argument("--timeout", type=duration_s, metavar="SECONDS", help="end the run after so long")


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Boot it, pass on what is typed and printed until it ends, and say how it ended."""
    source = _boot_source(arguments, screen)
    options = _clock_options(arguments) | run_time.machine_options(arguments)
    wakes = WakeCounts() if arguments.why else None
    output = (sys.stderr if arguments.json else sys.stdout).fileno()
    with (
        ended_by_signals(),
        GuestConsole(output, None if wakes is None else wakes.line) as console,
        Machine(
            source,
            vcpus=arguments.cpus,
            memory_bytes=arguments.memory,
            platform="pc",
            serial_output=console.write,
            **options,
        ) as machine,
    ):
        _tell_beforehand(machine, screen, is_linux=_is_linux(arguments, source), is_for_people=not arguments.json)
        begun_s = time.monotonic()
        machine_options.set_rate(machine, arguments)
        if arguments.resume_policy is not None and machine.clock is not None:
            machine.clock.policy = machine.clock.sleep_policy = arguments.resume_policy
        end = _run_to_its_end(machine, console, arguments, _watched(machine, arguments, screen, wakes))
        machine.time_travel.close()  # the guest may have ended while its last look is still to be told
        result = {
            **end._asdict(),
            "exit_code": machine.exit_code,
            "guest_s": machine.clock_service.now_ns() / NS_PER_S,
            "host_s": time.monotonic() - begun_s,
            "debug_console": machine.console[-DEBUG_CONSOLE_TOLD:],
            "events": None if arguments.events is None else str(arguments.events),
            "time_travel": run_time.travelled(machine, is_asked_for=arguments.time_travel),
            "wakes": None if wakes is None else wakes.documented(),
        }
        if arguments.events is not None and machine.clock is not None:
            whole_file.write(str(arguments.events), machine.clock.events.json_lines().encode())
        if arguments.time_travel:
            screen.tell(f"pvclock run: {run_time.told(machine.time_travel)}")
    screen.tell(f"pvclock run: {end.lines()}")
    if wakes is not None:
        screen.show(wakes_table(wakes))
    return Outcome(end.status == 0, result, end.status)


def _tell_beforehand(machine: Machine, screen: Screen, *, is_linux: bool, is_for_people: bool) -> None:
    """What the user should know before the guest runs."""
    if is_linux and cpu_flags().isdisjoint(VIRTUALISATION):
        screen.tell(f"pvclock run: {MAY_NOT_RUN}")
    if sys.stdin.isatty():
        screen.tell("pvclock run: the terminal is the guest's; Ctrl-A x ends the run, and Ctrl-A z stops it")
    if is_for_people:
        tell_what_is_wrong(machine, screen)


def _watched(machine: Machine, arguments: argparse.Namespace, screen: Screen, wakes: WakeCounts | None) -> IdleEnd:
    """What looks at the decisions of the machine's travel."""
    idle = IdleEnd(
        machine,
        lambda text: screen.tell(f"\rpvclock run: {text}\r"),  # the terminal may be raw
        has_clients=run_services.is_any_asked_for(arguments),
    )

    def look(look: Look) -> None:
        idle.look(look)
        if wakes is not None:
            wakes.look(look)

    machine.time_travel.on_look = look
    return idle


# What to boot


def _boot_source(arguments: argparse.Namespace, screen: Screen) -> BootSource:
    """The image with command line and initrd; ConfigError or ImageError, which says how to get one, if it cannot be."""
    named = [each for each in (arguments.image, arguments.kernel) if each is not None]
    if len(named) + arguments.debian != 1:
        raise ConfigError("IMAGE, --kernel and --debian: give one of them" if named else NOTHING_TO_BOOT)
    initrd = _initrd(arguments)
    if arguments.debian:
        from pvclock.lab.kernel import find_kernel

        kernel = find_kernel(None, lambda text: screen.tell(f"pvclock run: {text}"))
        named = [kernel.image]
    modules = tuple(_module(each, arguments.memory) for each in arguments.module)
    source = BootSource(_content(named[0], arguments.memory), arguments.append or "", initrd, modules=modules)
    if not arguments.image and source.entered_by == "flat":
        raise ImageError(f"{named[0]} is not a Linux kernel: neither a bzImage nor an ELF file (vmlinux)")
    if arguments.append is None and _is_linux(arguments, source):
        source = source._replace(cmdline=" ".join(_default_cmdline(arguments)))
    if arguments.why and _is_linux(arguments, source):
        source = source._replace(cmdline=f"{source.cmdline} {TRACE_OPTIONS}")
    return source


def _default_cmdline(arguments: argparse.Namespace) -> list[str]:
    """A Linux kernel's, where --append is not given."""
    options = [CMDLINE]
    if arguments.debian:
        options.append("quiet")
    if arguments.time_travel:
        options.append(run_time.GUEST_OPTIONS)
    return options


def _is_linux(arguments: argparse.Namespace, source: BootSource) -> bool:
    """A stock kernel: one that is said to be, or a bzImage; other images may be anybody's."""
    return arguments.image is None or source.entered_by == "bzimage"


def _initrd(arguments: argparse.Namespace) -> bytes:
    """The one that is named, or one with a shell; none is empty."""
    if arguments.initrd is None:
        return with_shell(_busybox()) if arguments.shell or arguments.debian else b""
    if arguments.shell:
        raise ConfigError("--initrd, --shell: give one of them")
    return _content(arguments.initrd, arguments.memory)


def _module(given: str, memory_bytes: int) -> BootModule:
    """FILE[,STRING] of --module."""
    file, _, string = given.partition(",")
    return BootModule(_content(Path(file), memory_bytes), string)


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
        raise ConfigError("the shell is busybox's, which is not here: apt-get install busybox-static, or give --initrd")
    content = Path(found).read_bytes()
    if DYNAMIC_LOADER in content[:ELF_BEGIN_BYTES]:
        raise ConfigError(f"{found} is not statically linked: apt-get install busybox-static, or give --initrd")
    return content


def _clock_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The Machine's options of its clock; ConfigError for those that the kernel's does not have."""
    if arguments.clock == "kernel" and (arguments.events or arguments.resume_policy is not None):
        raise ConfigError("--clock kernel: it takes none of --events and --resume-policy: they are the engine's")
    return machine_options.clock_options(arguments)


# From start to end


def _run_to_its_end(machine: Machine, console: GuestConsole, arguments: argparse.Namespace, idle: IdleEnd) -> End:
    timeout_s = arguments.timeout
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    typed = sys.stdin.fileno()
    settings = settings_of(typed)
    with (
        _told_of_the_end(machine, console) as the_end,
        run_services.served(machine, arguments, lambda: the_end.ask_for(ended_by_client())),
        told_to_stop(),
        raw_terminal(typed) as is_terminal,
    ):
        keys = Keys(has_escape=is_terminal)
        idle.end = the_end.ask_for
        run_time.schedule(machine, arguments, the_end.ask_for)
        machine.start()
        stop = partial(_stop, machine, typed, settings)
        has_ended = converse(typed, the_end.over, keys, idle.receive, deadline_s, stop, idle.input_has_ended)
        if not has_ended or the_end.asked:
            console.give_up()
            machine.stop()
    if the_end.asked:
        return the_end.asked[0]
    if has_ended:
        return find_end(machine, console.panic)
    if keys.ended or timeout_s is None:
        return ended_by_user()
    return ended_by_timeout(timeout_s)


def _stop(machine: Machine, typed: int, settings: Settings | None) -> None:
    """Stop this process, its guest paused and its terminal as it was, until it is continued."""
    machine.pause()
    with as_it_was(typed, settings):
        os.kill(os.getpid(), signal.SIGSTOP)
    machine.resume()


class _TheEnd:
    """What the main thread waits for: that the guest has ended its run, or that something else ends it.

    over: a descriptor that can be read then.  asked: what else has ended it, the first one first.
    """

    def __init__(self) -> None:
        self.asked: list[End] = []
        self.over, self._tell = os.pipe()
        self._lock = threading.Lock()  # around the descriptor: others' threads may be late
        self._is_closed = False

    def come(self) -> None:
        """The guest has ended its run."""
        with self._lock:
            if not self._is_closed:
                os.write(self._tell, b".")

    def ask_for(self, end: End) -> None:
        """End it so."""
        self.asked.append(end)
        self.come()

    def close(self) -> None:
        """Give the descriptors back."""
        with self._lock:
            self._is_closed = True
            os.close(self.over)
            os.close(self._tell)


@contextmanager
def _told_of_the_end(machine: Machine, console: GuestConsole) -> Iterator[_TheEnd]:
    """What tells of the end of the run; it has ended when this ends."""
    the_end = _TheEnd()

    def handler(_before: RunState, now: RunState) -> None:
        if now in ENDED:
            the_end.come()

    machine.run_state.add_handler(handler)
    try:
        yield the_end
    finally:
        console.give_up()
        machine.stop()  # before the pipe goes
        machine.run_state.remove_handler(handler)
        the_end.close()
