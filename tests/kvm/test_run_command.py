"""`pvclock run`: images booted as a user boots them, with a console to type into, and how each end is told."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from pvclock.commands import main
from pvclock.machine import Machine
from pvclock.timekeeping.events import Event, EventKind
from tests.command_line import ROOT, command, run_pvclock
from tests.kvm.guests import out
from tests.kvm.pc_guests import ECHO, WAIT_FOREVER, driver, kernel, out_dx
from tests.waiting import HANG_S, alarm_after

pytestmark = [pytest.mark.kvm, pytest.mark.row("E22")]

READY: Final = ord("!")
HELLO: Final = out_dx(0x3F8, READY) + out_dx(0x3F8, ord("\n"))
BEYOND_RAM: Final = bytes.fromhex("ea1000ffff")
"""ljmp $0xffff, $0x10: to 1 MiB, where a machine of that size has nothing to execute."""


@pytest.fixture
def image(tmp_path: Path) -> Callable[[bytes], str]:
    """Put an image into a file; its path."""

    def write(content: bytes) -> str:
        path = tmp_path / "image"
        path.write_bytes(content)
        return str(path)

    return write


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


def test_a_crash_tells_the_registers(image: Callable[[bytes], str], run: Callable[..., Ran]) -> None:
    """By which people look for its cause."""
    done = run(image(bytes.fromhex("b83412") + BEYOND_RAM), "--memory", "1M")  # mov $0x1234, %ax
    assert done.status == 5
    assert "rax=0x1234 " in done.stderr
    assert "rip=0x10 " in done.stderr


def test_a_kernel_with_an_initrd_and_a_command_line(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """By default its console is the serial port's, by the command line; --append is another one."""
    (tmp_path / "kernel").write_bytes(kernel())
    (tmp_path / "initrd").write_bytes(b"initrd")
    files = ("--kernel", str(tmp_path / "kernel"), "--initrd", str(tmp_path / "initrd"), "--memory", "4M")
    assert run(*files).stdout == "console=ttyS0 panic=-1RSD PTR initrd"
    assert run(*files, "--append", "quiet").stdout == "quietRSD PTR initrd"


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
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_run(arguments: tuple[str, ...], said: str, tmp_path: Path, run: Callable[..., Ran]) -> None:
    """It is refused in one line, and nothing has run."""
    (tmp_path / "image").write_bytes(HELLO + out(0xF4, 0))
    (tmp_path / "kernel").write_bytes(kernel()[:-1])
    (tmp_path / "big").write_bytes(bytes((1 << 20) + 1))
    done = run(*(each.replace("@", f"{tmp_path}/") for each in arguments))
    assert (done.status, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


# Pipes


def test_input_from_a_pipe(image: Callable[[bytes], str]) -> None:
    """It is typed into the guest, Ctrl-A too; its end is not the guest's."""
    done = subprocess.run(
        command("run", image(driver(1, ECHO))), cwd=ROOT, input=b"\x01x, q", capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"\x01x, q")


def test_a_reader_that_goes(image: Callable[[bytes], str]) -> None:
    """The run ends as soon as nobody reads its console."""
    flood = bytes.fromhex("baf803 b061 ee ebfd")  # mov $0x3f8, %dx; mov $'a', %al; 1: out %al, %dx; jmp 1b
    done = run_pvclock("run", image(flood), redirect="| head -c 5")
    assert done.stdout == "aaaaa"
    assert "Traceback" not in done.stderr


# In a terminal


AS_A_SHELL: Final = ("env", "--default-signal=INT,HUP,TERM,TSTP")
"""What runs the tests may ignore these, as nohup and background jobs do."""


class Session:
    """`pvclock run` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, self._theirs = pty.openpty()
        self.before = self.settings
        self.process = subprocess.Popen(
            [*AS_A_SHELL, *command("run", *arguments)],
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
    def settings(self) -> object:
        """The terminal's."""
        return termios.tcgetattr(self._theirs)

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
    with alarm_after(int(HANG_S)), contextlib.closing(begun):
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
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["int", "term", "hup"],
)
def test_a_signal_ends_the_run(number: signal.Signals, status: int, session: Session) -> None:
    """Its status is a shell's for that signal, and the terminal is as it was."""
    session.process.send_signal(number)
    assert session.process.wait() == status
    assert session.settings == session.before


STOPPING_KEY: Final = b"\x01z"


@pytest.mark.row("E1")
@pytest.mark.parametrize(("by_key", "policy"), [(False, "advance"), (True, "freeze")], ids=["signal", "key"])
def test_a_stop_is_a_pause(by_key: bool, policy: str, image: Callable[[bytes], str], tmp_path: Path) -> None:
    """SIGTSTP or Ctrl-A z: the terminal is as it was, and once continued its guest goes on by --resume-policy."""
    options = ("--resume-policy", policy, "--events", str(tmp_path / "events"))
    begun = Session(*options, image(HELLO + driver(1, ECHO, at=len(HELLO))))
    with alarm_after(int(HANG_S)), contextlib.closing(begun):
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
