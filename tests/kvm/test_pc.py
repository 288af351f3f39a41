"""A machine that is a PC: how guests end the run, which interrupts its serial port gives, what a kernel is told."""

from __future__ import annotations

import threading
from typing import Final

import pytest

from pvclock.boot import BootSource
from pvclock.errors import ConfigError, GuestPanicked, ImageError, KvmError, RangeError, StateError, WrongType
from pvclock.guest_layout import ACPI_TABLES
from pvclock.kvm import Kvm
from pvclock.machine import EXIT_PORT, Ending, Machine, RunState
from tests.kvm.guests import HLT, out
from tests.kvm.pc_guests import ALPHABET, ECHO, WAIT_FOREVER, driver, kernel, out_dx
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E22")]

RAM_BYTES: Final = 2 << 20


class Terminal:
    """What a guest sends, and a way to wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._content = bytearray()

    def write(self, data: bytes) -> None:
        """See Machine's serial_output."""
        with self._changed:
            self._content += data
            self._changed.notify_all()

    def wait_for(self, text: bytes) -> None:
        """Return once it has come."""
        with self._changed:
            assert self._changed.wait_for(lambda: text in self._content, HANG_S), self._content

    @property
    def content(self) -> bytes:
        """All of it."""
        return bytes(self._content)


# How a run ends


@pytest.mark.parametrize(
    ("image", "ending", "state"),
    [
        (out_dx(0x600, 0x34), Ending.POWER_OFF, RunState.SHUTDOWN),
        (out_dx(0x602, 1), Ending.RESET, RunState.SHUTDOWN),
        (out(0x92, 3), Ending.RESET, RunState.SHUTDOWN),
        (out_dx(0xCF9, 2) + out_dx(0xCF9, 6), Ending.RESET, RunState.SHUTDOWN),
        (out(0x64, 0xFE), Ending.RESET, RunState.SHUTDOWN),
        (bytes.fromhex("eaf0ff00f0"), Ending.RESET, RunState.SHUTDOWN),  # ljmp $0xf000, $0xfff0
        (out(EXIT_PORT, 0), Ending.EXIT_CODE, RunState.SHUTDOWN),
    ],
    ids=["power-off", "reset-register", "fast-reset", "reset-control", "keyboard", "firmware", "exit-port"],
)
def test_how_a_guest_ends_its_run(image: bytes, ending: Ending, state: RunState) -> None:
    """wait() returns 0, `ending` says by what, and a reset of the machine forgets it."""
    with Machine(image + WAIT_FOREVER, memory_bytes=RAM_BYTES, platform="pc") as machine:
        machine.start()
        assert (machine.wait(HANG_S), machine.ending, machine.run_state.current) == (0, ending, state)
        machine.reset()
        assert (machine.ending, machine.exit_code) == (None, None)


def test_a_panic() -> None:
    """It is an error of wait() and a run state of its own, which only a reset leaves."""
    with Machine(out_dx(0x505, 1) + WAIT_FOREVER, memory_bytes=RAM_BYTES, platform="pc") as machine:
        machine.start()
        with pytest.raises(GuestPanicked):
            machine.wait(HANG_S)
        assert (machine.ending, machine.run_state.current) == (Ending.PANIC, RunState.GUEST_PANICKED)
        with pytest.raises(StateError, match=r"in state guest-panicked; reset\(\) it"):
            machine.start()
        machine.reset()
        assert machine.run_state.current is RunState.PRELAUNCH


def test_what_nobody_has_reads_as_ones() -> None:
    """But for the keyboard controller's status, which is 0: ready."""
    image = bytes.fromhex("e464 0404 e6f4")  # in $0x64, %al; add $4, %al; out %al, $EXIT_PORT
    with Machine(image, memory_bytes=RAM_BYTES, platform="pc") as machine:
        machine.start()
        assert machine.wait(HANG_S) == 4
    image = bytes.fromhex("e460 e6f4")
    with Machine(image, memory_bytes=RAM_BYTES, platform="pc") as machine:
        machine.start()
        assert machine.wait(HANG_S) == 0xFF


# The serial port


def test_typing_into_a_guest() -> None:
    """It takes an interrupt for what is typed, whether it comes at once or byte by byte, and echoes it."""
    terminal = Terminal()
    image = driver(1, ECHO)
    with Machine(image, memory_bytes=RAM_BYTES, platform="pc", serial_output=terminal.write) as machine:
        machine.start()
        machine.serial.receive(b"hello, ")
        terminal.wait_for(b"hello, ")
        for byte in b"world":
            machine.serial.receive(bytes([byte]))
            terminal.wait_for(bytes([byte]))
        machine.serial.receive(b"q")
        assert machine.wait(HANG_S) == ord("q")
    assert terminal.content == b"hello, worldq"


def test_typing_before_a_guest_is_started() -> None:
    """It waits in the port; after a reset it is gone, and typing works again."""
    terminal = Terminal()
    with Machine(driver(1, ECHO), memory_bytes=RAM_BYTES, platform="pc", serial_output=terminal.write) as machine:
        machine.serial.receive(b"lost")
        machine.reset()
        machine.serial.receive(b"early q")
        machine.start()
        assert machine.wait(HANG_S) == ord("q")
        machine.reset()
        machine.serial.receive(b"again q")
        machine.start()
        assert machine.wait(HANG_S) == ord("q")
    assert terminal.content == b"early qagain q"


def test_a_guest_that_sends_by_interrupts() -> None:
    """It sends a byte for each interrupt of the transmitter: were there no edge for one, it would wait for ever."""
    terminal = Terminal()
    image = driver(2, ALPHABET)
    with Machine(image, memory_bytes=RAM_BYTES, platform="pc", serial_output=terminal.write) as machine:
        machine.start()
        assert machine.wait(HANG_S) == ord("z")
    assert terminal.content == b"abcdefghijklmnopqrstuvwxyz"


def test_what_takes_the_output_fails() -> None:
    """Its error ends the run, and comes out of wait()."""

    def fail(_data: bytes) -> None:
        raise ZeroDivisionError

    image = out_dx(0x3F8, 1) + WAIT_FOREVER
    with Machine(image, memory_bytes=RAM_BYTES, platform="pc", serial_output=fail) as machine:
        machine.start()
        with pytest.raises(ZeroDivisionError):
            machine.wait(HANG_S)


def test_output_that_nobody_takes() -> None:
    """It goes nowhere."""
    with Machine(out_dx(0x3F8, 1) + out(EXIT_PORT, 7), memory_bytes=RAM_BYTES, platform="pc") as machine:
        machine.start()
        assert machine.wait(HANG_S) == 7


# What a kernel is told


def test_a_kernel_on_a_pc() -> None:
    """A bzImage gets a PC by itself; it finds command line, ACPI's root pointer and initrd, sends them, and powers off.

    After a reset all of it is there again.
    """
    terminal = Terminal()
    source = BootSource(kernel(), "quiet", b"initrd")
    with Machine(source, memory_bytes=4 << 20, serial_output=terminal.write) as machine:
        for _ in range(2):
            machine.start()
            assert (machine.wait(HANG_S), machine.ending) == (0, Ending.POWER_OFF)
            assert machine.memory.read(ACPI_TABLES, 8) == b"RSD PTR "
            machine.reset()
    assert terminal.content == b"quietRSD PTR initrd" * 2


# What cannot be


def test_a_kernel_that_is_bad_leaves_nothing() -> None:
    """The error comes out of Machine(), before anything runs."""
    with pytest.raises(ImageError, match="truncated kernel"):
        Machine(kernel()[:-1], memory_bytes=4 << 20)
    with pytest.raises(ImageError, match="no room for the kernel"):
        Machine(kernel(), memory_bytes=1 << 20)


def test_a_flat_image_over_the_firmware() -> None:
    """Its end would lie where a PC's tables are."""
    longest = 0xA0000 - 0x7C00
    with Machine(HLT * longest, memory_bytes=RAM_BYTES, platform="pc") as machine:
        assert machine.memory.read(0x9FFFF, 2) == HLT + b"\0"
    with pytest.raises(ImageError, match="overlaps what the firmware has"):
        Machine(HLT * (longest + 1), memory_bytes=RAM_BYTES, platform="pc")


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"platform": "mainframe"}, ConfigError, "platform 'mainframe'; choose bare, pc, or None by the image"),
        ({"platform": 1}, WrongType, "platform is 1"),
        ({"platform": "pc", "memory_bytes": (1 << 20) - 4096}, ConfigError, "a PC, .* needs 1048576"),
        ({"serial_output": print}, ConfigError, "a bare machine has no serial port"),
        (
            {"platform": "pc", "serial_output": "stdout"},
            WrongType,
            "serial_output is 'stdout', a str; it can be a function of bytes",
        ),
    ],
)
def test_platforms_that_cannot_be(arguments: dict[str, object], kind: type[Exception], said: str) -> None:
    """Each is refused in words."""
    with pytest.raises(kind, match=said):
        Machine(HLT, **arguments)  # type: ignore[arg-type]


def test_a_bare_machine_has_no_serial_port() -> None:
    """Nor has a closed one."""
    with Machine(HLT) as machine, pytest.raises(StateError, match='make it with platform="pc"'):
        machine.serial.receive(b"x")
    with Machine(HLT, memory_bytes=RAM_BYTES, platform="pc") as machine:
        assert machine.serial.receive(b"x") == 1
    with pytest.raises(StateError, match="the machine is closed"):
        machine.serial.receive(b"x")


def test_an_interrupt_line_needs_controllers() -> None:
    """Without them it is an error; so is a level that is neither, and an input beyond 32 bits."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        with pytest.raises(KvmError, match="KVM_IRQ_LINE"):
            vm.set_irq_line(4, is_high=True)
        vm.create_irqchip()
        for is_high in (True, True, False):
            vm.set_irq_line(4, is_high=is_high)
        with pytest.raises(WrongType, match="is_high is 1"):
            vm.set_irq_line(4, is_high=1)  # type: ignore[arg-type]
        for gsi in (-1, 1 << 32):
            with pytest.raises(RangeError):
                vm.set_irq_line(gsi, is_high=True)
