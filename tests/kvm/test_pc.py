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
from tests.unit.kernel_images import bzimage

pytestmark = [pytest.mark.kvm, pytest.mark.row("E22")]

LIMIT_S: Final = 60.0
RAM_BYTES: Final = 2 << 20
WAIT_FOREVER: Final = bytes.fromhex("ebfe")
COM1_VECTOR: Final = 0x0C
"""IRQ 4 of a PIC whose vectors begin at 8, as a PC's do."""


def out_dx(port: int, value: int) -> bytes:
    """`out` of one byte to any port."""
    return b"\xba" + port.to_bytes(2, "little") + bytes([0xB0, value]) + b"\xee"


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
            assert self._changed.wait_for(lambda: text in self._content, LIMIT_S), self._content

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
        (out(EXIT_PORT, 0), Ending.EXIT_CODE, RunState.SHUTDOWN),
    ],
    ids=["power-off", "reset-register", "fast-reset", "reset-control", "keyboard", "exit-port"],
)
def test_how_a_guest_ends_its_run(image: bytes, ending: Ending, state: RunState) -> None:
    """wait() returns 0, `ending` says by what, and a reset of the machine forgets it."""
    with Machine(image + WAIT_FOREVER, memory_bytes=RAM_BYTES, platform="pc") as machine:
        machine.start()
        assert (machine.wait(LIMIT_S), machine.ending, machine.run_state.current) == (0, ending, state)
        machine.reset()
        assert (machine.ending, machine.exit_code) == (None, None)


def test_a_panic() -> None:
    """It is an error of wait() and a run state of its own, which only a reset leaves."""
    with Machine(out_dx(0x505, 1) + WAIT_FOREVER, memory_bytes=RAM_BYTES, platform="pc") as machine:
        machine.start()
        with pytest.raises(GuestPanicked):
            machine.wait(LIMIT_S)
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
        assert machine.wait(LIMIT_S) == 4
    image = bytes.fromhex("e460 e6f4")
    with Machine(image, memory_bytes=RAM_BYTES, platform="pc") as machine:
        machine.start()
        assert machine.wait(LIMIT_S) == 0xFF


# The serial port


def driver(enable: int, handler: bytes) -> bytes:
    """A guest that has `handler` called for COM1's interrupts, enables some of these, and waits; BL is 'a'."""
    # xor %ax, %ax; mov %ax, %ds; mov %ax, %ss; mov $0x7000, %sp; mov $'a', %bl
    start = bytes.fromhex("31c0 8ed8 8ed0 bc0070 b361")
    pics = out(0x20, 0x11) + out(0x21, 8) + out(0x21, 4) + out(0x21, 1) + out(0x21, 0xEF)
    wait = bytes.fromhex("fb f4 ebfc")  # 1: sti; hlt; jmp 1b
    enabled = out_dx(0x3F9, enable)
    at = 0x7C00 + len(start) + 12 + len(pics) + len(enabled) + len(wait)
    vector = b"".join(
        b"\xc7\x06" + (4 * COM1_VECTOR + place).to_bytes(2, "little") + value.to_bytes(2, "little")  # movw
        for place, value in ((0, at), (2, 0))
    )
    return start + vector + pics + enabled + wait + handler


END_OF_INTERRUPT: Final = out(0x20, 0x20) + b"\xcf"  # iret

ECHO: Final = (
    bytes.fromhex("bafd03 ec a801 740b")  # 1: mov $0x3fd, %dx; in %dx, %al; test $1, %al; jz 2f
    + bytes.fromhex("baf803 ec ee")  # mov $0x3f8, %dx; in %dx, %al; out %al, %dx
    + bytes.fromhex("3c71 75ef e6f4")  # cmp $'q', %al; jne 1b; out %al, $EXIT_PORT
    + END_OF_INTERRUPT  # 2:
)

ALPHABET: Final = (
    bytes.fromhex("bafa03 ec 3c02 750e")  # mov $0x3fa, %dx; in %dx, %al; cmp $2, %al; jne 1f
    + bytes.fromhex("baf803 88d8 ee fec3")  # mov $0x3f8, %dx; mov %bl, %al; out %al, %dx; inc %bl
    + bytes.fromhex("3c7a 7502 e6f4")  # cmp $'z', %al; jne 1f; out %al, $EXIT_PORT
    + END_OF_INTERRUPT  # 1:
)


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
        assert machine.wait(LIMIT_S) == ord("q")
    assert terminal.content == b"hello, worldq"


def test_typing_before_a_guest_is_started() -> None:
    """It waits in the port; after a reset it is gone, and typing works again."""
    terminal = Terminal()
    with Machine(driver(1, ECHO), memory_bytes=RAM_BYTES, platform="pc", serial_output=terminal.write) as machine:
        machine.serial.receive(b"lost")
        machine.reset()
        machine.serial.receive(b"early q")
        machine.start()
        assert machine.wait(LIMIT_S) == ord("q")
        machine.reset()
        machine.serial.receive(b"again q")
        machine.start()
        assert machine.wait(LIMIT_S) == ord("q")
    assert terminal.content == b"early qagain q"


def test_a_guest_that_sends_by_interrupts() -> None:
    """It sends a byte for each interrupt of the transmitter: were there no edge for one, it would wait for ever."""
    terminal = Terminal()
    image = driver(2, ALPHABET)
    with Machine(image, memory_bytes=RAM_BYTES, platform="pc", serial_output=terminal.write) as machine:
        machine.start()
        assert machine.wait(LIMIT_S) == ord("z")
    assert terminal.content == b"abcdefghijklmnopqrstuvwxyz"


def test_what_takes_the_output_fails() -> None:
    """Its error ends the run, and comes out of wait()."""

    def fail(_data: bytes) -> None:
        raise ZeroDivisionError

    image = out_dx(0x3F8, 1) + WAIT_FOREVER
    with Machine(image, memory_bytes=RAM_BYTES, platform="pc", serial_output=fail) as machine:
        machine.start()
        with pytest.raises(ZeroDivisionError):
            machine.wait(LIMIT_S)


def test_output_that_nobody_takes() -> None:
    """It goes nowhere."""
    with Machine(out_dx(0x3F8, 1) + out(EXIT_PORT, 7), memory_bytes=RAM_BYTES, platform="pc") as machine:
        machine.start()
        assert machine.wait(LIMIT_S) == 7


# What a kernel is told

KERNEL_CODE: Final = bytes.fromhex(
    "66baf803 8b9e28020000"  # mov $0x3f8, %dx; mov 0x228(%rsi), %ebx: the command line
    "8a03 84c0 7406 ee 48ffc3 ebf4"  # 1: mov (%rbx), %al; test %al, %al; jz 2f; out %al, %dx; inc %rbx; jmp 1b
    "488b5e70 b908000000"  # 2: mov 0x70(%rsi), %rbx: the RSDP; mov $8, %ecx
    "8a03 ee 48ffc3 ffc9 75f6"  # 3: mov (%rbx), %al; out %al, %dx; inc %rbx; dec %ecx; jnz 3b
    "8b9e18020000 8b8e1c020000"  # mov 0x218(%rsi), %ebx; mov 0x21c(%rsi), %ecx: the initrd
    "8a03 ee 48ffc3 ffc9 75f6"  # 4: as 3
    "66ba0006 b034 ee ebfe"  # mov $0x600, %dx; mov $0x34, %al; out %al, %dx; jmp .: power-off
)


def kernel() -> bytes:
    """A bzImage of this code, at its 64-bit entry."""
    image = bytearray(bzimage(pref_address=1 << 20, kernel_alignment=1 << 20, init_size=1 << 20))
    entry = len(image) - 2048 + 0x200
    image[entry : entry + len(KERNEL_CODE)] = KERNEL_CODE
    return bytes(image)


def test_a_kernel_on_a_pc() -> None:
    """A bzImage gets a PC by itself; it finds command line, ACPI's root pointer and initrd, sends them, and powers off.

    After a reset all of it is there again.
    """
    terminal = Terminal()
    source = BootSource(kernel(), "quiet", b"initrd")
    with Machine(source, memory_bytes=4 << 20, serial_output=terminal.write) as machine:
        for _ in range(2):
            machine.start()
            assert (machine.wait(LIMIT_S), machine.ending) == (0, Ending.POWER_OFF)
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
        ({"platform": "pc", "serial_output": "stdout"}, WrongType, "serial_output is 'stdout'"),
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
