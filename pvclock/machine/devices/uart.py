"""A serial port: a 16550A UART, its receiver fed by the host and its transmitter always ready.

Source: National Semiconductor PC16550D, and how Linux's 8250 driver tells the kinds apart.  The baud rate is kept and
has no effect.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["COM1_GSI", "COM1_PORT", "PORTS", "WAITING_BYTES_MAX", "Uart"]

COM1_PORT: Final = 0x3F8
COM1_GSI: Final = 4
PORTS: Final = 8

WAITING_BYTES_MAX: Final = 1 << 16
"""Of input that the guest has not read: no more is taken, as a terminal's driver does it."""

# Registers, by offset.
DATA, INTERRUPT_ENABLE, INTERRUPT_ID, LINE_CONTROL, MODEM_CONTROL, LINE_STATUS, MODEM_STATUS, SCRATCH = range(PORTS)
DIVISOR: Final = range(2)
"""In place of the first two, while DIVISOR_ACCESS is set."""
FIFO_CONTROL: Final = INTERRUPT_ID
"""The same port, written."""

# Interrupt enable.
RECEIVED, TRANSMITTER_EMPTY, RECEIVER_LINE_STATUS, MODEM = 1, 2, 4, 8
INTERRUPTS: Final = 0xF
# Interrupt identification.
NO_INTERRUPT, MODEM_ID, TRANSMITTER_ID, RECEIVED_ID, LINE_STATUS_ID, TIMEOUT_ID = 1, 0, 2, 4, 6, 0xC
FIFOS_ENABLED: Final = 0xC0
# FIFO control.
ENABLE_FIFOS, CLEAR_RECEIVER = 1, 2
TRIGGER_LEVELS: Final = (1, 4, 8, 14)
TRIGGER_SHIFT: Final = 6
FIFO_BYTES: Final = 16
# Line control.
DIVISOR_ACCESS: Final = 0x80
# Modem control.
DTR, RTS, OUT1, OUT2, LOOPBACK = 1, 2, 4, 8, 0x10
MODEM_CONTROLS: Final = 0x1F
# Line status.
DATA_READY, OVERRUN, TRANSMITTER_READY = 1, 2, 0x60
# Modem status: lines, each of which has a bit 4 below that says whether it has changed since the last read.
CTS, DSR, RING, CARRIER = 0x10, 0x20, 0x40, 0x80
LINES_SHIFT: Final = 4
CONNECTED: Final = CTS | DSR | CARRIER
"""What a terminal that is there shows."""

DIVISOR_AT_RESET: Final = 12
"""9600 baud."""


class Uart:
    """A device that calls `output` with each byte sent, and `set_line` with the level of its interrupt line.

    The line is high while an enabled interrupt is pending.  A byte that is sent takes the transmitter's interrupt away
    and then brings it back: for an edge-triggered input that is the edge by which a driver goes on.

    Thread-safety: receive() may be called from any thread, also by `output`.
    """

    name = "serial port"

    def __init__(self, output: Callable[[bytes], object], set_line: Callable[[bool], object]) -> None:
        self._output = output
        self._set_line = set_line
        self._lock = threading.Lock()  # of all that follows, and of the line's order; never taken around `output`
        self._waiting: deque[int] = deque()  # on the wire
        self._line_is_high = False
        self._power_on()

    def receive(self, data: bytes) -> int:
        """Input for the guest, as typed; returns how many bytes were taken, for no more than WAITING_BYTES_MAX wait."""
        with self._lock:
            taken = data[: WAITING_BYTES_MAX - len(self._waiting)]
            self._waiting.extend(taken)
            self._update()
        return len(taken)

    def read(self, offset: int, length: int) -> bytes:
        """See Device: a register; of a wider access the rest is ones."""
        with self._lock:
            value = self._read(offset)
            self._update()
        return bytes([value]) + b"\xff" * (length - 1)

    def write(self, offset: int, data: bytes) -> None:
        """See Device: a register; of a wider access the rest is ignored."""
        with self._lock:
            sent = self._write(offset, data[0])
            self._update()
        if sent:
            self._output(data[:1])
            with self._lock:
                self._transmitter_pending = True
                self._update()

    def reset(self) -> None:
        """See Device: input that the guest has not read is lost."""
        with self._lock:
            self._waiting.clear()
            self._power_on()
            self._update()

    # Inside

    def _power_on(self) -> None:
        self._interrupt_enable = self._line_control = self._modem_control = self._scratch = 0
        self._divisor = bytearray(DIVISOR_AT_RESET.to_bytes(2, "little"))
        self._fifo: deque[int] = deque()  # received, and not read
        self._has_fifos = False
        self._trigger = TRIGGER_LEVELS[0]
        self._transmitter_pending = False  # has it become empty since that was identified?
        self._overrun = False
        self._modem_lines, self._modem_changes = CONNECTED, 0

    def _read(self, offset: int) -> int:
        if offset in DIVISOR and self._line_control & DIVISOR_ACCESS:
            return self._divisor[offset]
        return self._READS[offset](self)

    def _read_data(self) -> int:
        return self._fifo.popleft() if self._fifo else 0

    def _read_interrupt_id(self) -> int:
        found = self._pending()
        if found == TRANSMITTER_ID:
            self._transmitter_pending = False
        return found | (FIFOS_ENABLED if self._has_fifos else 0)

    def _read_line_status(self) -> int:
        status = TRANSMITTER_READY | (DATA_READY if self._fifo else 0) | (OVERRUN if self._overrun else 0)
        self._overrun = False
        return status

    def _read_modem_status(self) -> int:
        changes, self._modem_changes = self._modem_changes, 0
        return self._modem_lines | changes

    _READS: Final = (
        _read_data,
        lambda self: self._interrupt_enable,
        _read_interrupt_id,
        lambda self: self._line_control,
        lambda self: self._modem_control,
        _read_line_status,
        _read_modem_status,
        lambda self: self._scratch,
    )

    def _write(self, offset: int, value: int) -> bool:
        """Is `value` to be sent?"""
        if offset in DIVISOR and self._line_control & DIVISOR_ACCESS:
            self._divisor[offset] = value
        elif offset == DATA:
            return self._send(value)
        elif offset == INTERRUPT_ENABLE:
            self._enable_interrupts(value & INTERRUPTS)
        elif offset == FIFO_CONTROL:
            self._control_fifos(value)
        elif offset == LINE_CONTROL:
            self._line_control = value
        elif offset == MODEM_CONTROL:
            self._control_modem(value & MODEM_CONTROLS)
        elif offset == SCRATCH:
            self._scratch = value
        return False

    def _send(self, value: int) -> bool:
        """Is `value` to be sent, rather than received in the loop?"""
        self._transmitter_pending = False
        if not self._modem_control & LOOPBACK:
            return True
        if len(self._fifo) < self._capacity:
            self._fifo.append(value)
        else:
            self._overrun = True
        self._update()  # the line goes low
        self._transmitter_pending = True
        return False

    def _enable_interrupts(self, enabled: int) -> None:
        if enabled & ~self._interrupt_enable & TRANSMITTER_EMPTY:
            self._transmitter_pending = True  # it is empty now
        self._interrupt_enable = enabled

    def _control_fifos(self, value: int) -> None:
        has_fifos = bool(value & ENABLE_FIFOS)
        if has_fifos != self._has_fifos or value & CLEAR_RECEIVER:
            self._fifo.clear()
        self._has_fifos = has_fifos
        self._trigger = TRIGGER_LEVELS[value >> TRIGGER_SHIFT] if has_fifos else TRIGGER_LEVELS[0]

    def _control_modem(self, value: int) -> None:
        """In the loop the controls are the lines, and what the other side shows is cut off."""
        self._modem_control = value
        lines = CONNECTED
        if value & LOOPBACK:
            pairs = ((RTS, CTS), (DTR, DSR), (OUT1, RING), (OUT2, CARRIER))
            lines = sum(line for control, line in pairs if value & control)
        changed = lines ^ self._modem_lines
        if lines & RING:
            changed &= ~RING  # only its end is told
        self._modem_changes |= changed >> LINES_SHIFT
        self._modem_lines = lines

    @property
    def _capacity(self) -> int:
        return FIFO_BYTES if self._has_fifos else 1

    def _pending(self) -> int:
        """The first of the enabled interrupts that are pending, by their priority."""
        enabled = self._interrupt_enable
        if enabled & RECEIVER_LINE_STATUS and self._overrun:
            return LINE_STATUS_ID
        if enabled & RECEIVED and self._fifo:
            return RECEIVED_ID if len(self._fifo) >= self._trigger else TIMEOUT_ID
        if enabled & TRANSMITTER_EMPTY and self._transmitter_pending:
            return TRANSMITTER_ID
        if enabled & MODEM and self._modem_changes:
            return MODEM_ID
        return NO_INTERRUPT

    def _update(self) -> None:
        """Take from the wire what there is room for, and set the interrupt line."""
        if not self._modem_control & LOOPBACK:
            while self._waiting and len(self._fifo) < self._capacity:
                self._fifo.append(self._waiting.popleft())
        is_high = self._pending() != NO_INTERRUPT
        if is_high != self._line_is_high:
            self._line_is_high = is_high
            self._set_line(is_high)
