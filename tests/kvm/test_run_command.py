"""`pvclock run`: images booted as a user boots them, with a console to type into, and how each end is told."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from pvclock.commands import main
from pvclock.host.linux import cpu_flags
from pvclock.machine import Machine
from pvclock.timekeeping.events import Event, EventKind
from qemu_glue.peer.monitor import Monitor
from tests.command_line import ROOT, command, run_pvclock
from tests.kvm.guests import out
from tests.kvm.pc_guests import ECHO, WAIT_FOREVER, driver, first_module_sender, kernel, module_lister, out_dx
from tests.unit.kernel_images import bzimage
from tests.waiting import HANG_S, alarm_after

pytestmark = [pytest.mark.kvm, pytest.mark.row("E22")]

READY: Final = ord("!")
HELLO: Final = out_dx(0x3F8, READY) + out_dx(0x3F8, ord("\n"))
BEYOND_RAM: Final = bytes.fromhex("ea1000ffff")
"""ljmp $0xffff, $0x10: to 1 MiB, where a machine of that size has nothing to execute."""


class Ran(NamedTuple):
    """What a run in this process came to."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ran]]:
    """Run `pvclock run` in this process, with nothing to read."""
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)

        def call(*arguments: str) -> Ran:
            return Ran(main(["run", *arguments]), *capfd.readouterr())

        yield call


@pytest.mark.parametrize(
    ("code", "status", "ending", "why"),
    [
        (out_dx(0x600, 0x34), 0, "guest-shutdown", "the guest has powered off"),
        (out(0xF4, 0), 0, "guest-exit", "the guest's exit code is 0"),
        (out(0xF4, 7), 1, "guest-exit", "the guest's exit code is 7"),
        (out(0x64, 0xFE), 3, "guest-reset", "the guest asked for a reset"),
        (out_dx(0x505, 1), 4, "guest-panic", "the guest's kernel panicked"),
        (BEYOND_RAM, 5, "crash", "the guest crashed on vCPU 0"),
    ],
    ids=["power-off", "exit-0", "exit-7", "reset", "panic", "crash"],
)
def test_each_end_has_its_status(
    code: bytes, status: int, ending: str, why: str, image: Callable[[bytes], str], run: Callable[..., Ran]
) -> None:
    """The guest's console is standard output, and why it ended is on standard error; with --json both are there."""
    path = image(HELLO + code + WAIT_FOREVER)
    done = run(path, "--memory", "1M")
    assert (done.status, done.stdout) == (status, "!\n")
    assert done.stderr.startswith(f"pvclock run: {why}")
    done = run("--json", path, "--memory", "1M")
    document = json.loads(done.stdout)
    assert (document["ok"], document["result"]["ending"], done.status) == (status == 0, ending, status)
    assert document["result"]["why"].startswith(why)
    assert done.stderr.startswith("!\n")


def test_a_panic_on_the_console(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """A kernel that panics and has panic=-1 says so, and resets: that is a panic; a reset after other words is none."""
    said = b"[ 1.0] Kernel panic - not syncing: VFS\r\nbye\r\n"
    done = run(image(b"".join(out_dx(0x3F8, byte) for byte in said) + out(0x64, 0xFE) + WAIT_FOREVER))
    assert (done.status, done.stdout.encode()) == (4, said)
    assert done.stderr == "pvclock run: the guest's kernel panicked: Kernel panic - not syncing: VFS\n"
    other = b"no Kernel\npanic - \n"
    done = run(image(b"".join(out_dx(0x3F8, byte) for byte in other) + out(0x64, 0xFE) + WAIT_FOREVER))
    assert done.status == 3


def test_a_panic_that_says_what_to_do(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """A kernel without a root file system: there is no disk, and this is how to give it one."""
    said = b"Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\n"
    done = run(image(b"".join(out_dx(0x3F8, byte) for byte in said) + out(0x64, 0xFE) + WAIT_FOREVER))
    assert done.status == 4
    assert done.stderr.endswith("; there is no disk: give it a root file system by --initrd FILE, or --shell\n")


@pytest.fixture
def busybox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Have the only busybox that is found be a file of this content."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def install(content: bytes) -> None:
        (folder / "busybox").write_bytes(content)
        (folder / "busybox").chmod(0o755)

    return install


def test_a_shell_for_a_kernel_of_ones_own(
    image: Callable[[bytes], str], run: Callable[..., Ran], busybox: Callable[[bytes], None]
) -> None:
    """--shell is an initial RAM disk with busybox; without it, or with one that needs libraries, it says what to do."""
    path = image(first_module_sender(6))
    assert "apt-get install busybox-static, or give --initrd" in run(path, "--shell").stderr
    busybox(b"\x7fELF /lib64/ld-linux-x86-64.so.2")
    assert "busybox is not statically linked: apt-get install busybox-static" in run(path, "--shell").stderr
    busybox(b"\x7fELF")
    done = run(path, "--shell", "--timeout", f"{HANG_S:g}")
    assert (done.status, done.stdout) == (0, "070701")  # a cpio archive's magic number


NOT_EMULATED: Final = bytes.fromhex("b8ffff 8ed8 d9061000")
"""mov $0xffff, %ax; mov %ax, %ds; flds 0x10: of 1 MiB, where a machine of that size has no memory.  KVM has to emulate
that access, and knows no x87 instruction."""


def test_a_crash_tells_code_and_registers(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """By which people look for its cause, and, with --json, programs."""
    path = image(NOT_EMULATED)
    done = run(path, "--memory", "1M")
    assert done.status == 5
    assert "KVM cannot emulate an instruction, suberror 1, " in done.stderr
    assert " code at 0x7c05: " in done.stderr
    assert " ff ff 8e d8 <d9> 06 10 00 " in done.stderr
    assert {"rax=0xffff", "rip=0x7c05", "cr0=0x60000010"} <= set(done.stderr.split())
    crash = json.loads(run("--json", path, "--memory", "1M").stdout)["result"]["crash"]
    assert (crash["vcpu"], crash["suberror"], crash["linear_rip"]) == (0, 1, 0x7C05)
    assert (crash["registers"]["rax"], crash["registers"]["rip"]) == (0xFFFF, 0x7C05)
    assert crash["code"] == NOT_EMULATED[5:].ljust(16, b"\0").hex()
    assert crash["code_before"] == NOT_EMULATED[:5].rjust(16, b"\0").hex()
    assert crash["code"].startswith(crash["fetched"])
    assert json.loads(run("--json", image(out(0xF4, 0))).stdout)["result"]["crash"] is None


def test_a_kernel_with_an_initrd_and_a_command_line(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """By default its console is the serial port's, by the command line; --append is another one."""
    (tmp_path / "kernel").write_bytes(kernel())
    (tmp_path / "initrd").write_bytes(b"initrd")
    files = ("--kernel", str(tmp_path / "kernel"), "--initrd", str(tmp_path / "initrd"), "--memory", "4M")
    done = run(*files)
    assert done.stdout == "console=ttyS0 panic=-1RSD PTR initrd"
    assert ("may not run a stock kernel" in done.stderr) == cpu_flags().isdisjoint(("vmx", "svm"))
    assert run(*files, "--append", "quiet").stdout == "quietRSD PTR initrd"
    assert run(*files[1:]).stdout == "console=ttyS0 panic=-1RSD PTR initrd"  # a bzImage tells itself what it is


def test_modules_of_a_multiboot_image(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """A guest reads how many there are and each one's content and string: the initrd, then each --module's."""
    for name, content in (("image", module_lister()), ("first", b"one"), ("second", b"two"), ("third", b"")):
        (tmp_path / name).write_bytes(content)
    files = {name: str(tmp_path / name) for name in ("image", "first", "second", "third")}
    ends = ("--timeout", f"{HANG_S:g}")
    assert run(files["image"], *ends).stdout == "0"
    modules = ("--initrd", files["first"], "--module", f"{files['second']},a=1,b=2", "--module", files["third"])
    done = run(files["image"], *ends, *modules)
    assert (done.status, done.stdout) == (0, "3one[]two[a=1,b=2][]")


RATE_ERROR = 1e-3
"""Of the TSC's nominal frequency, by which the engine counts, and of CLOCK_MONOTONIC: far less."""


def test_time_at_another_rate(image: Callable[[bytes], str], run: Callable[..., Ran], tmp_path: Path) -> None:
    """From boot on guest time passes at the rate, and --timeout counts the host's."""
    to_file = ("--events", str(tmp_path / "events"))
    done = run("--json", "--rate", "1/10", "--timeout", "1", *to_file, image(WAIT_FOREVER))
    result = json.loads(done.stdout)["result"]
    assert (done.status, result["ending"]) == (124, "timeout")
    assert result["host_s"] >= 1
    events = [Event.from_json(line) for line in (tmp_path / "events").read_text().splitlines()]
    (dilated,) = (event for event in events if event.kind is EventKind.DILATE)
    passed_s = result["guest_s"] - float(dilated.guest_ns_after) / 1e9
    assert 0 < passed_s < result["host_s"] / 10 * (1 + RATE_ERROR)


@pytest.mark.row("E12")
def test_a_rate_that_its_timers_cannot_follow(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """It is refused before the guest has run, in a line that says where the limit comes from, unless it is forced."""
    slow = (image(out(0xF4, 0)), "--rate", "1/1000")
    refused = run(*slow)
    assert refused.status == 2
    assert "tsc_khz * 125: up to 34359738 kHz" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert run(*slow, "--force-rate").status == 0


@pytest.mark.row("E1")
def test_a_sleep_of_the_hosts_has_the_same_policy(
    image: Callable[[bytes], str], run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--resume-policy is the clock's for pauses, and for a sleep of the host's through which it ran."""
    made: list[Machine] = []

    def keep(*arguments: Any, **options: Any) -> Machine:  # noqa: ANN401  # Machine's
        made.append(Machine(*arguments, **options))
        return made[-1]

    monkeypatch.setattr("pvclock.commands.run.Machine", keep)
    assert run(image(out(0xF4, 0)), "--resume-policy", "slew:max_ppm=100").status == 0
    clock = made[0].clock
    assert clock is not None
    assert (str(clock.policy), str(clock.sleep_policy)) == ("slew:max_ppm=100", "slew:max_ppm=100")


def test_what_the_clock_did(image: Callable[[bytes], str], run: Callable[..., Ran], tmp_path: Path) -> None:
    """--events has it as JSON lines, from the change of rate before boot on."""
    done = run(image(out(0xF4, 0)), "--rate", "1/10", "--events", str(tmp_path / "events"))
    assert done.status == 0
    events = [Event.from_json(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert EventKind.DILATE in {event.kind for event in events}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to boot: name an IMAGE, or a kernel with --kernel"),
        (("@image", "--kernel", "@kernel"), "IMAGE, --kernel and --debian: give one of them"),
        (("--kernel", "@image"), "is not a Linux kernel: neither a bzImage nor an ELF file"),
        (("--kernel", "@kernel"), "a truncated kernel"),
        (("--kernel", "@nothing"), "No such file or directory"),
        (("@",), "is not a file"),
        (("@big", "--memory", "1M"), "has 1048577 bytes, the guest 1048576 of memory"),
        (("@image", "--memory", "64K"), "a PC, whose ACPI tables are in it"),
        (("@image", "--memory", "much"), "'much' is not a size of memory"),
        (("@image", "--rate", "0"), "'0' is not a factor"),
        (("@image", "--rate", "1/0"), "'1/0' is not a factor"),
        (("@image", "--clock", "kernel", "--rate", "2"), "--clock kernel: it takes none of"),
        (("@image", "--clock", "kernel", "--provider", "KVM"), "--clock kernel: it takes none of"),
        (("@image", "--clock", "kernel", "--events", "@events"), "--clock kernel: it takes none of"),
        (("@image", "--events", "@"), "cannot be written: it is there, and is no file"),
        (("@image", "--events", "@not/there"), "cannot be written: in its folder: No such file"),
        (("@image", "--clock", "kernel", "--resume-policy", "freeze"), "--clock kernel: it takes none of"),
        (("@image", "--resume-policy", "sleep"), "policy 'sleep'; choose from freeze, advance, slew"),
        (("@image", "--resume-policy", "slew:max_ppm=0"), "Slew.max_ppm"),
        (("@image", "--provider", "Xen"), "Xen"),
        (("@image", "--cpus", "0"), "'0' is not a whole number"),
        (("@image", "--initrd", "@image"), "a flat image takes no initrd"),
        (("@image", "--module", "@image"), "a flat image takes no modules"),
        (("--kernel", "@kernel", "--module", "@image,text"), "Linux takes one initrd and no modules"),
        (("@image", "--module", "@nothing"), "No such file or directory"),
        (("@image", "--initrd", "@image", "--shell"), "--initrd, --shell: give one of them"),
        (("@image", "--shell"), "a flat image takes no initrd"),
        (("@empty",), "the image is empty"),
        (("--kernel", "@empty"), "is not a Linux kernel"),
        (("--kernel", "@"), "is not a file"),
        (("--kernel", "/dev/zero"), "/dev/zero is not a file"),
        (("--kernel", "@kernel32"), "a 32-bit kernel: XLF_KERNEL_64 is not set"),
        (("--kernel", "@huge"), "no room for the kernel, which needs 512.0 MiB"),
        (("--kernel", "@whole", "--initrd", "/dev/zero"), "/dev/zero is not a file"),
        (
            ("--kernel", "@whole", "--initrd", "@big", "--memory", "3M"),
            "no room for an initrd or module of 1048577 bytes",
        ),
        (
            ("--kernel", "@whole", "--initrd", "@big", "--memory", "1M"),
            "has 1048577 bytes, the guest 1048576 of memory",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_run(arguments: tuple[str, ...], said: str, tmp_path: Path, run: Callable[..., Ran]) -> None:
    """It is refused in one line, and nothing has run."""
    (tmp_path / "image").write_bytes(HELLO + out(0xF4, 0))
    (tmp_path / "kernel").write_bytes(kernel()[:-1])
    (tmp_path / "big").write_bytes(bytes((1 << 20) + 1))
    (tmp_path / "whole").write_bytes(kernel())
    (tmp_path / "kernel32").write_bytes(bzimage(xloadflags=0))
    (tmp_path / "huge").write_bytes(bzimage(init_size=512 << 20))
    (tmp_path / "empty").touch()
    done = run(*(each.replace("@", f"{tmp_path}/") for each in arguments))
    assert (done.status, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_may_not_be_read(image: Callable[[bytes], str]) -> None:
    """It is told by its name, before anything else that this user may not."""
    path = image(b"kernel")
    Path(path).chmod(0)
    done = run_pvclock("run", "--kernel", path, nobody=True)
    assert (done.status, done.stderr) == (2, f"pvclock run: {path}: Permission denied\n")


# Pipes


def test_input_from_a_pipe(image: Callable[[bytes], str]) -> None:
    """It is typed into the guest, Ctrl-A too; its end is not the guest's."""
    done = subprocess.run(
        command("run", image(driver(1, ECHO))), cwd=ROOT, input=b"\x01x, q", capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"\x01x, q")


FLOOD: Final = bytes.fromhex("baf803 b061 ee ebfd")
"""mov $0x3f8, %dx; mov $'a', %al; 1: out %al, %dx; jmp 1b"""


def test_a_reader_that_does_not_read(image: Callable[[bytes], str]) -> None:
    """A signal ends the run all the same, once the guest waits for the reader."""
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 8192)
    full = 4097  # poll() says so once all of its pages are in use
    run = [*AS_A_SHELL, *command("run", image(FLOOD))]
    with alarm_after(HANG_S), subprocess.Popen(run, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=writes) as process:
        while waiting_in(reads) < full:
            time.sleep(0.001)
        process.terminate()
        assert process.wait() == 143
    assert os.read(reads, 1 << 16) == b"a" * full
    os.close(reads)
    os.close(writes)


def waiting_in(pipe: int) -> int:
    """How many bytes can be read."""
    count = array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def test_input_from_a_file(image: Callable[[bytes], str], tmp_path: Path) -> None:
    """It is typed into the guest as fast as that takes it."""
    text = b"a line\n" * 100 + b"q"
    (tmp_path / "typed").write_bytes(text)
    with (tmp_path / "typed").open("rb") as file:
        done = subprocess.run(
            command("run", image(driver(1, ECHO))), cwd=ROOT, stdin=file, capture_output=True, check=False
        )
    assert (done.returncode, done.stdout) == (1, text)


def test_a_reader_that_goes(image: Callable[[bytes], str]) -> None:
    """The run ends as soon as nobody reads its console."""
    done = run_pvclock("run", image(FLOOD), redirect="| head -c 5")
    assert done.stdout == "aaaaa"
    assert "Traceback" not in done.stderr


# In a terminal


AS_A_SHELL: Final = ("env", "--default-signal=INT,HUP,TERM,TSTP")
"""What runs the tests may ignore these, as nohup and background jobs do."""

IN_ITS_TERMINAL: Final = ("setsid", "--ctty")
"""So that the terminal's end sends SIGHUP."""


class Session:
    """`pvclock run` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, self._theirs = pty.openpty()
        self.before = self.settings
        self.process = subprocess.Popen(
            [*AS_A_SHELL, *IN_ITS_TERMINAL, *command("run", *arguments)],
            cwd=ROOT,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=subprocess.DEVNULL,
        )

    def type(self, keys: bytes) -> None:
        """Press them."""
        os.write(self._ours, keys)

    def read_to(self, text: bytes) -> bytes:
        """What comes out, up to `text`."""
        found = b""
        while text not in found:
            found += os.read(self._ours, 4096)
        return found

    @property
    def settings(self) -> list[Any]:
        """The terminal's."""
        return termios.tcgetattr(self._theirs)

    def make_usual(self) -> None:
        """Make it as before, as a shell does."""
        termios.tcsetattr(self._theirs, termios.TCSANOW, self.before)

    def wait_until_raw(self) -> None:
        """Return once it passes on every key."""
        while self.settings[3] & termios.ISIG:
            time.sleep(0.001)

    def hang_up(self) -> None:
        """Close the terminal."""
        os.close(self._ours)
        self._ours = os.open(os.devnull, os.O_RDONLY)

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        for descriptor in (self._ours, self._theirs):
            os.close(descriptor)


@pytest.fixture
def session(image: Callable[[bytes], str]) -> Iterator[Session]:
    """With a guest that says that it is there and echoes what is typed."""
    begun = Session(image(HELLO + driver(1, ECHO, at=len(HELLO))))
    with alarm_after(HANG_S), contextlib.closing(begun):
        begun.read_to(b"!")
        yield begun


def test_keys_go_to_the_guest(session: Session) -> None:
    """Ctrl-C and Ctrl-Z, too, and Ctrl-A that is pressed twice; the guest's end leaves the terminal as it was."""
    session.type(b"\x03\x1a\x01\x01.")
    assert b"\x03\x1a\x01." in session.read_to(b".")
    session.type(b"q")
    assert session.process.wait() == 1
    assert session.settings == session.before


def test_the_escape_key_ends_the_run(session: Session) -> None:
    """Ctrl-A x: status 0, and the terminal is as it was."""
    session.type(b"\x01x")
    assert session.process.wait() == 0
    assert session.settings == session.before


@pytest.mark.parametrize(
    ("code", "arguments", "status"),
    [(NOT_EMULATED, ("--memory", "1M"), 5), (WAIT_FOREVER, ("--timeout", "0.1"), 124)],
    ids=["crash", "timeout"],
)
def test_other_ends_leave_the_terminal_as_it_was(
    code: bytes, arguments: tuple[str, ...], status: int, image: Callable[[bytes], str]
) -> None:
    """A crash, and the time limit."""
    with alarm_after(HANG_S), contextlib.closing(Session(image(code), *arguments)) as begun:
        assert begun.process.wait() == status
        assert begun.settings == begun.before


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["int", "term", "hup"],
)
def test_a_signal_ends_the_run(number: signal.Signals, status: int, session: Session) -> None:
    """Its status is a shell's for that signal, and the terminal is as it was."""
    session.process.send_signal(number)
    assert session.process.wait() == status
    assert session.settings == session.before


def test_a_terminal_that_is_closed(session: Session) -> None:
    """It ends the run as SIGHUP does."""
    session.hang_up()
    assert session.process.wait() == 129


def test_a_terminal_that_is_closed_while_the_run_is_stopped(session: Session) -> None:
    """It goes on for that, and ends as by SIGHUP."""
    session.type(b"\x01z")
    os.waitpid(session.process.pid, os.WUNTRACED)
    session.hang_up()
    assert session.process.wait() == 129


def test_a_run_that_was_stopped_goes_on(session: Session) -> None:
    """The terminal, which a shell made its own meanwhile, is the guest's again, and at last as before."""
    session.process.send_signal(signal.SIGSTOP)
    os.waitpid(session.process.pid, os.WUNTRACED)
    session.make_usual()
    session.process.send_signal(signal.SIGCONT)
    session.wait_until_raw()
    session.type(b"\x03.q")
    assert b"\x03." in session.read_to(b".")
    assert session.process.wait() == 1
    assert session.settings == session.before


STOPPING_KEY: Final = b"\x01z"


@pytest.mark.row("E1")
@pytest.mark.parametrize(("by_key", "policy"), [(False, "advance"), (True, "freeze")], ids=["signal", "key"])
def test_a_stop_is_a_pause(by_key: bool, policy: str, image: Callable[[bytes], str], tmp_path: Path) -> None:
    """SIGTSTP or Ctrl-A z: the terminal is as it was, and once continued its guest goes on by --resume-policy."""
    options = ("--resume-policy", policy, "--events", str(tmp_path / "events"))
    begun = Session(*options, image(HELLO + driver(1, ECHO, at=len(HELLO))))
    with alarm_after(HANG_S), contextlib.closing(begun):
        begun.read_to(b"!")
        if by_key:
            begun.type(STOPPING_KEY)
        else:
            begun.process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(begun.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert begun.settings == begun.before
        begun.process.send_signal(signal.SIGCONT)
        begun.type(b".q")
        begun.read_to(b".")
        assert begun.process.wait() == 1
    events = [Event.from_json(line) for line in (tmp_path / "events").read_text().splitlines()]
    paused, resumed = (
        next(each for each in events if each.kind is kind) for kind in (EventKind.PAUSE, EventKind.RESUME)
    )
    assert resumed.policy == policy
    assert paused.host_tsc is not None
    assert resumed.host_tsc is not None
    assert resumed.host_tsc > paused.host_tsc
    assert (resumed.jump_ns > 0) == (policy == "advance")


# By QMP


@pytest.mark.row("E15")
@pytest.mark.qemu
def test_a_client_of_qmp_ends_it(image: Callable[[bytes], str], tmp_path: Path) -> None:
    """`pvclock run --qmp PATH`: a client sees it run, stops and resets it, has it go on, and quit with status 0."""
    path = tmp_path / "qmp.sock"
    begun = Session("--qmp", str(path), image(HELLO + driver(1, ECHO, at=len(HELLO))))
    with alarm_after(HANG_S), contextlib.closing(begun):
        begun.read_to(b"!")
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        with Monitor(connection) as monitor:
            assert monitor.execute("query-status")["status"] == "running"
            monitor.execute("stop")
            monitor.execute("system_reset")
            assert monitor.execute("query-status")["status"] == "prelaunch"
            monitor.execute("cont")
            monitor.execute("quit")
            assert begun.process.wait() == 0
        assert begun.settings == begun.before
    assert not path.exists()


@pytest.mark.row("E15")
def test_where_no_socket_can_be(image: Callable[[bytes], str], run: Callable[..., Ran], tmp_path: Path) -> None:
    """A line that says so, before the guest has run."""
    ran = run(image(out(0xF4, 0)), "--qmp", str(tmp_path / "none" / "qmp.sock"))
    assert ran.status == 2
    assert "no QMP socket at" in ran.stderr
    assert ran.stderr.count("\n") == 1
