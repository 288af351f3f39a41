"""A PC's ways to reset and to power off, and its panic device: what each takes, and what it ignores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pvclock.errors import GuestCrashed, GuestPanicked, StateError
from pvclock.machine.bus import Device
from pvclock.machine.devices.acpi_registers import AcpiRegisters
from pvclock.machine.devices.pvpanic import Pvpanic
from pvclock.machine.devices.reset_ports import KeyboardController, ResetControl, SystemControl
from pvclock.machine.exits import Ending, Outcome

pytestmark = pytest.mark.row("E22")


def asked_by(device: Callable[[Callable[[], object]], Device], *values: int) -> list[int]:
    """How often each of these writes of a byte made the device ask."""
    asked: list[str] = []
    made = device(lambda: asked.append("reset"))
    counts = []
    for value in values:
        made.write(0, bytes([value]))
        counts.append(len(asked))
        asked.clear()
    return counts


def test_the_fast_reset() -> None:
    """Bit 0 of port 0x92 as it goes to 1; the rest is kept, A20 is on from the beginning."""
    assert asked_by(SystemControl, 0x02, 0x03, 0x03, 0x02, 0x01, 0xFE) == [0, 1, 0, 0, 1, 0]
    control = SystemControl(lambda: None)
    assert control.read(0, 1) == b"\x02"
    control.write(0, b"\x0c")
    assert control.read(0, 2) == b"\x0c\xff"
    control.reset()
    assert control.read(0, 1) == b"\x02"


def test_the_chipsets_reset() -> None:
    """Bit 2 of port 0xcf9 as it goes to 1, which kind of reset before it; Linux writes 0x02 and then 0x06 or 0x0e."""
    assert asked_by(ResetControl, 0x02, 0x06, 0x06, 0x02, 0x0E, 0xFB) == [0, 1, 0, 0, 1, 0]
    control = ResetControl(lambda: None)
    assert control.read(0, 1) == b"\x00"
    control.write(0, b"\x06")
    assert control.read(0, 1) == b"\x06"
    control.reset()
    assert control.read(0, 1) == b"\x00"


def test_the_keyboard_controllers_reset() -> None:
    """Command 0xfe, and no other; its status is always ready."""
    assert asked_by(KeyboardController, 0xFE, 0xFF, 0xD1, 0x00, 0xFE) == [1, 0, 0, 0, 1]
    assert KeyboardController(lambda: None).read(0, 1) == b"\x00"


def test_acpi_registers() -> None:
    """Soft off is type 5 with the enable bit; the reset value is 1; all else is ignored, and they read as 0."""
    asked: list[str] = []
    registers = AcpiRegisters(lambda: asked.append("off"), lambda: asked.append("reset"))
    for offset, value in ((0, 5 << 2), (0, 1 << 5), (0, 4 << 2 | 1 << 5), (1, 0x80), (1, 0x34), (2, 0), (2, 6)):
        registers.write(offset, bytes([value]))
    assert asked == []
    registers.write(0, b"\x34")
    registers.write(0, b"\xf4")  # the bits above are reserved
    registers.write(2, b"\x01")
    assert asked == ["off", "off", "reset"]
    assert [registers.read(offset, 1) for offset in range(3)] == [b"\0"] * 3


def test_pvpanic() -> None:
    """It takes the event PANICKED and says so; others, such as a crash kernel's start, are ignored."""
    assert asked_by(Pvpanic, 0x02, 0x01, 0x00, 0x03) == [0, 1, 0, 1]
    assert Pvpanic(lambda: None).read(0, 2) == b"\x01\x00"


# What comes of it


def test_what_came_first_is_the_outcome() -> None:
    """The other vCPUs go on for a while: what they say does not count."""
    outcome = Outcome()
    assert (outcome.ending, outcome.exit_code) == (None, None)
    outcome.end(Ending.RESET)
    outcome.end(Ending.PANIC)
    outcome.exit(7)
    outcome.fail(GuestCrashed(0, "a triple fault"))
    assert (outcome.ending, outcome.exit_code, outcome.crash, outcome.result()) == (Ending.RESET, 0, None, 0)
    outcome.forget()
    outcome.exit(7)
    assert (outcome.ending, outcome.result()) == (Ending.EXIT_CODE, 7)


def test_outcomes_that_are_errors() -> None:
    """A crash, a panic, and a run that the guest did not end."""
    outcome = Outcome()
    with pytest.raises(StateError, match="the machine was stopped"):
        outcome.result()
    outcome.fail(GuestCrashed(0, "a triple fault"))
    with pytest.raises(GuestCrashed, match="a triple fault"):
        outcome.result()
    outcome.forget()
    outcome.end(Ending.PANIC)
    with pytest.raises(GuestPanicked, match="panicked"):
        outcome.result()


def test_endings_have_qmps_names() -> None:
    """As QMP's SHUTDOWN event gives its reason; QEMU's exit port has none."""
    assert [str(ending) for ending in Ending] == ["guest-exit", "guest-shutdown", "guest-reset", "guest-panic"]
