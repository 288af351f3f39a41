"""The serial port: what goes out and comes in, when its interrupt line is high, and how a driver finds a 16550A."""

from __future__ import annotations

from threading import Thread

import pytest

from pvclock.machine.devices.uart import WAITING_BYTES_MAX, Uart

pytestmark = pytest.mark.row("E22")

DATA, ENABLE, ID, LINE_CONTROL, MODEM_CONTROL, LINE_STATUS, MODEM_STATUS, SCRATCH = range(8)
FIFO = ID

RECEIVED, EMPTY, ERRORS, MODEM = 1, 2, 4, 8
NONE_PENDING, MODEM_CHANGED, TRANSMITTER, RECEIVER, ERROR, TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
FIFOS = 0xC0
LOOP = 0x10


class Port:
    """A UART, what it sent, and the levels that its line took."""

    def __init__(self) -> None:
        self._sent = bytearray()
        self.levels: list[bool] = []
        self.log: list[str] = []
        self.uart = Uart(self._take, self._set)

    def _take(self, data: bytes) -> None:
        self._sent += data
        self.log.append(f"sent {data!r}")

    def _set(self, is_high: bool) -> None:
        self.levels.append(is_high)
        self.log.append("high" if is_high else "low")

    def read(self, register: int) -> int:
        """One register."""
        return self.uart.read(register, 1)[0]

    def write(self, register: int, value: int) -> None:
        """One register."""
        self.uart.write(register, bytes([value]))

    @property
    def sent(self) -> bytes:
        """What went out."""
        return bytes(self._sent)

    @property
    def is_high(self) -> bool:
        """The line's level."""
        return bool(self.levels) and self.levels[-1]

    def drain(self) -> bytes:
        """Read as a driver does: while there is data."""
        found = bytearray()
        while self.read(LINE_STATUS) & 1:
            found.append(self.read(DATA))
        return bytes(found)


@pytest.fixture
def port() -> Port:
    """As after power-on."""
    return Port()


# Sending


def test_bytes_go_out_in_order(port: Port) -> None:
    """The transmitter is always ready; no interrupt is enabled, so the line stays low."""
    for byte in b"boot\n":
        assert port.read(LINE_STATUS) == 0x60
        port.write(DATA, byte)
    assert (port.sent, port.levels) == (b"boot\n", [])


def test_each_byte_sent_is_an_edge(port: Port) -> None:
    """The line goes low, the byte goes out, and the line goes high: an edge-triggered input sees each."""
    port.write(ENABLE, EMPTY)
    assert port.is_high  # it is empty already
    port.write(DATA, ord("a"))
    port.write(DATA, ord("b"))
    assert port.log == ["high", "low", "sent b'a'", "high", "low", "sent b'b'", "high"]


def test_the_transmitters_interrupt_ends_when_it_is_identified(port: Port) -> None:
    """Reading the identification takes it away; enabling it anew brings it back, which drivers test for."""
    port.write(ENABLE, EMPTY)
    assert (port.read(ID), port.is_high) == (TRANSMITTER, False)
    assert port.read(ID) == NONE_PENDING
    port.write(ENABLE, EMPTY | RECEIVED)
    assert not port.is_high  # it was enabled before
    port.write(ENABLE, 0)
    port.write(ENABLE, EMPTY)
    assert (port.is_high, port.read(ID)) == (True, TRANSMITTER)


def test_disabling_an_interrupt_lowers_the_line(port: Port) -> None:
    """And it is not identified."""
    port.write(ENABLE, EMPTY)
    port.write(ENABLE, 0)
    assert (port.is_high, port.read(ID)) == (False, NONE_PENDING)


# Receiving


def test_input_raises_the_line_until_it_is_read(port: Port) -> None:
    """Byte by byte; without FIFOs the UART holds one, and each next one comes when that was read."""
    port.write(ENABLE, RECEIVED)
    assert port.uart.receive(b"ls\n") == 3
    assert (port.is_high, port.read(ID), port.read(LINE_STATUS)) == (True, RECEIVER, 0x61)
    assert (port.drain(), port.is_high) == (b"ls\n", False)
    assert (port.read(ID), port.read(LINE_STATUS), port.read(DATA)) == (NONE_PENDING, 0x60, 0)


def test_input_before_it_is_enabled(port: Port) -> None:
    """It waits, and the line goes high once somebody wants to know."""
    port.uart.receive(b"x")
    assert port.levels == []
    port.write(ENABLE, RECEIVED)
    assert (port.is_high, port.drain()) == (True, b"x")


@pytest.mark.parametrize(("control", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_fifo_levels(control: int, level: int, port: Port) -> None:
    """Below the level it is a timeout, from it on received data; both are pending until all is read."""
    port.write(FIFO, control)
    port.write(ENABLE, RECEIVED)
    port.uart.receive(b"x" * (level - 1))
    assert port.read(ID) == FIFOS | (TIMEOUT if level > 1 else NONE_PENDING)
    port.uart.receive(b"y")
    assert port.read(ID) == FIFOS | RECEIVER
    assert (port.drain(), port.is_high) == (b"x" * (level - 1) + b"y", False)


def test_clearing_the_receiver_loses_what_is_in_it(port: Port) -> None:
    """16 bytes at most; what is on the wire still comes."""
    port.write(FIFO, 0x01)
    port.uart.receive(bytes(range(20)))
    port.write(FIFO, 0x03)
    assert port.drain() == bytes(range(16, 20))


def test_changing_to_fifos_and_back_clears_the_receiver(port: Port) -> None:
    """As the chip does it."""
    port.uart.receive(b"ab")
    port.write(FIFO, 0x01)
    assert port.drain() == b"b"
    port.write(FIFO, 0x00)
    assert port.read(ID) == NONE_PENDING


def test_input_is_bounded(port: Port) -> None:
    """More than WAITING_BYTES_MAX is not taken, and receive() says so."""
    assert port.uart.receive(b"x" * (WAITING_BYTES_MAX + 5)) == WAITING_BYTES_MAX
    assert port.uart.receive(b"yy") == 1  # one byte is in the UART
    assert port.uart.receive(b"z") == 0
    assert port.drain() == b"x" * WAITING_BYTES_MAX + b"y"


def test_input_from_what_is_sent() -> None:
    """A terminal that answers within the write: an echo comes back, and nothing waits for itself."""
    echoing = Uart(lambda data: echoing.receive(data.upper()), lambda _level: None)
    echoing.write(DATA, b"a")
    assert echoing.read(DATA, 1) == b"A"


def test_input_from_another_thread(port: Port) -> None:
    """All of it arrives, while the guest reads, and the line is low at last."""
    sent = bytes(range(256)) * 64
    port.write(ENABLE, RECEIVED)

    def type_it() -> None:
        for byte in sent:
            port.uart.receive(bytes([byte]))

    typing = Thread(target=type_it)
    typing.start()
    found = bytearray()
    while len(found) < len(sent):
        found += port.drain()
    typing.join()
    assert (bytes(found), port.is_high) == (sent, False)
    assert all(level != after for level, after in zip(port.levels, port.levels[1:], strict=False))


# Which interrupt, and which chip


def test_priorities(port: Port) -> None:
    """Errors before input before the transmitter before the modem's lines."""
    port.write(MODEM_CONTROL, LOOP)  # the lines fall: a change
    port.write(DATA, ord("a"))
    port.write(DATA, ord("b"))  # no room
    port.write(ENABLE, RECEIVED | EMPTY | ERRORS | MODEM)
    assert (port.read(ID), port.read(LINE_STATUS)) == (ERROR, 0x63)
    assert (port.read(ID), port.read(DATA)) == (RECEIVER, ord("a"))
    assert port.read(ID) == TRANSMITTER
    assert (port.read(ID), port.read(MODEM_STATUS)) == (MODEM_CHANGED, 0x0B)
    assert (port.read(ID), port.is_high) == (NONE_PENDING, False)


def test_a_driver_finds_a_16550a(port: Port) -> None:
    """By Linux's steps: only 4 bits of the enable register stay, the scratch register does, FIFOs show in both bits."""
    port.write(ENABLE, 0xFF)
    assert port.read(ENABLE) == 0x0F
    port.write(ENABLE, 0)
    for value in (0xA5, 0x5A):
        port.write(SCRATCH, value)
        assert port.read(SCRATCH) == value
    assert port.read(ID) >> 6 == 0
    port.write(FIFO, 0x01)
    assert port.read(ID) >> 6 == 3
    port.write(LINE_CONTROL, 0x80)
    port.write(FIFO, 0x21)  # a 16750 has FIFOs of 64 bytes by this bit
    assert port.read(ID) & 0x20 == 0


def test_the_divisor(port: Port) -> None:
    """It is in the first two registers while DLAB is set, and these are untouched."""
    port.write(ENABLE, RECEIVED)
    port.write(LINE_CONTROL, 0x83)
    assert (port.read(DATA), port.read(ENABLE)) == (12, 0)
    port.write(DATA, 0x34)
    port.write(ENABLE, 0x12)
    assert (port.read(DATA), port.read(ENABLE), port.read(LINE_CONTROL)) == (0x34, 0x12, 0x83)
    port.write(LINE_CONTROL, 0x03)
    assert (port.read(ENABLE), port.sent) == (RECEIVED, b"")


@pytest.mark.parametrize(("control", "lines"), [(0x02, 0x10), (0x01, 0x20), (0x04, 0x40), (0x08, 0x80), (0x0A, 0x90)])
def test_the_loop(control: int, lines: int, port: Port) -> None:
    """Controls come back as lines (Linux tests for 0x90), bytes as input; none goes out, and none comes in."""
    port.write(MODEM_CONTROL, LOOP | control)
    assert port.read(MODEM_STATUS) & 0xF0 == lines
    port.uart.receive(b"typed")
    port.write(DATA, ord("a"))
    assert (port.drain(), port.sent) == (b"a", b"")
    port.write(MODEM_CONTROL, control)
    assert port.drain() == b"typed"


def test_each_byte_in_the_loop_is_an_edge(port: Port) -> None:
    """As of one that is sent."""
    port.write(MODEM_CONTROL, LOOP)
    port.write(ENABLE, EMPTY)
    port.write(DATA, ord("a"))
    assert port.log == ["high", "low", "high"]


def test_the_modems_lines(port: Port) -> None:
    """A terminal is there: CTS, DSR and DCD; a change is told once, of RI only that it ended."""
    assert (port.read(MODEM_STATUS), port.read(MODEM_STATUS)) == (0xB0, 0xB0)
    port.write(MODEM_CONTROL, LOOP | 0x0F)
    assert port.read(MODEM_STATUS) == 0xF0
    port.write(MODEM_CONTROL, LOOP | 0x0B)
    assert (port.read(MODEM_STATUS), port.read(MODEM_STATUS)) == (0xB4, 0xB0)
    port.write(MODEM_CONTROL, 0xFF)
    assert (port.read(MODEM_CONTROL), port.read(LINE_CONTROL)) == (0x1F, 0)


def test_the_status_registers_cannot_be_written(port: Port) -> None:
    """They say what is."""
    port.write(LINE_STATUS, 0xFF)
    port.write(MODEM_STATUS, 0x00)
    assert (port.read(LINE_STATUS), port.read(MODEM_STATUS), port.levels) == (0x60, 0xB0, [])


def test_wider_accesses(port: Port) -> None:
    """The first byte is the register's; the rest reads as ones and is not taken."""
    port.uart.write(DATA, b"ab")
    assert (port.sent, port.uart.read(LINE_STATUS, 4)) == (b"a", b"\x60\xff\xff\xff")


def test_reset_is_power_on(port: Port) -> None:
    """Input is lost, the line goes low, and every register is as at first."""
    first = [port.read(register) for register in range(8)]
    port.write(FIFO, 0xC1)
    port.write(ENABLE, 0x0F)
    for register in (LINE_CONTROL, MODEM_CONTROL, SCRATCH):
        port.write(register, 0x13)
    port.uart.receive(b"x" * 100)
    assert port.is_high
    port.uart.reset()
    assert ([port.read(register) for register in range(8)], port.is_high) == (first, False)
