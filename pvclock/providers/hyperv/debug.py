"""The guest's debugger stub: MSRs through which it exchanges buffers with the VMM's debugger.

Source: TLFS's synthetic debugging facility as Linux has it (syndbg_set_msr(), QEMU hw/hyperv/syndbg.c) and VirtualBox.
The bytes are handed on as they are: neither framed as UDP nor unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from pvclock.errors import GuestAddressError, MsrFault
from pvclock.providers.hyperv.features import Feature
from pvclock.providers.hyperv.msr import Msr
from pvclock.providers.hyperv.saved_numbers import saved_number
from pvclock.providers.interface import ClockServices, DebugLink, DebugSetup, MsrValue

__all__ = ["SyntheticDebugger"]

HV_X64_MSR_SYNDBG_CONTROL: Final = 0x400000F1
HV_X64_MSR_SYNDBG_STATUS: Final = 0x400000F2
HV_X64_MSR_SYNDBG_SEND_BUFFER: Final = 0x400000F3
HV_X64_MSR_SYNDBG_RECV_BUFFER: Final = 0x400000F4
HV_X64_MSR_SYNDBG_PENDING_BUFFER: Final = 0x400000F5
HV_X64_MSR_SYNDBG_OPTIONS: Final = 0x400000FF

SEND: Final = 1 << 0
RECEIVE: Final = 1 << 1
SEND_SUCCESS: Final = 1 << 0
RECEIVE_SUCCESS: Final = 1 << 2
SIZE_SHIFT: Final = 16
USE_HYPERCALLS: Final = 1 << 2

BUFFER_BYTES: Final = 4096


class SyntheticDebugger:
    """The debugger stub's MSRs, one set for the VM, and its end of the debug channel.

    suggests_hypercalls: the options MSR tells the guest to use hypercalls from the start.
    as_virtualbox: only the status can be read, the options cannot be written, and a control word that asks for both
    directions faults; otherwise everything can be read and written, and sending wins.
    """

    def __init__(self, clock: ClockServices, *, suggests_hypercalls: bool = False, as_virtualbox: bool = False) -> None:
        self._memory, self._as_virtualbox = clock.memory, as_virtualbox
        self._initial_options = USE_HYPERCALLS if suggests_hypercalls else 0
        self._link: DebugLink | None = None
        self.setup = DebugSetup(BUFFER_BYTES, self._connect, self._tell_guest)
        self.reset()

    @property
    def msrs(self) -> Mapping[int, Msr]:
        """See Part."""
        readable = not self._as_virtualbox
        options = Msr(
            Feature.DEBUG_MSRS, self._reader("options"), None if self._as_virtualbox else self._writer("options")
        )
        return {
            HV_X64_MSR_SYNDBG_CONTROL: Msr(
                Feature.DEBUG_MSRS, self._reader("control") if readable else None, self._write_control
            ),
            HV_X64_MSR_SYNDBG_STATUS: Msr(
                Feature.DEBUG_MSRS, self._reader("status"), self._writer("status") if readable else None
            ),
            HV_X64_MSR_SYNDBG_SEND_BUFFER: self._buffer("send", readable),
            HV_X64_MSR_SYNDBG_RECV_BUFFER: self._buffer("receive", readable),
            HV_X64_MSR_SYNDBG_PENDING_BUFFER: self._buffer("pending", readable),
            HV_X64_MSR_SYNDBG_OPTIONS: options,
        }

    @property
    def uses_hypercalls(self) -> bool:
        """Do the options say that the guest uses hypercalls?"""
        return bool(self._values["options"] & USE_HYPERCALLS)

    def send(self, data: bytes) -> int:
        """Hand the guest's bytes to the VMM's debugger; returns how many it took, from the first on."""
        return 0 if self._link is None else self._link.write(data)[1]

    def receive(self, count_max: int) -> bytes:
        """Bytes for the guest, `count_max` at most; empty if none have arrived.  The pending byte is cleared."""
        data = b"" if self._link is None else self._link.read(count_max)[1]
        self._write_pending(0)
        return data

    # Life

    def reset(self) -> None:
        """See Part."""
        self._values = dict.fromkeys(("control", "status", "send", "receive", "pending"), 0)
        self._values["options"] = self._initial_options

    def save(self) -> Mapping[str, MsrValue]:
        """See Part."""
        return {f"debug_{name}": value for name, value in self._values.items()}

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """See Part."""
        values = {name: saved_number(saved, f"debug_{name}") for name in self._values}
        return partial(setattr, self, "_values", values)

    # Inside

    def _connect(self, link: DebugLink) -> None:
        self._link = link

    def _tell_guest(self) -> None:
        self._write_pending(1)

    def _write_pending(self, byte: int) -> None:
        gpa = self._values["pending"]
        if gpa:
            self._put(gpa, bytes([byte]))

    def _put(self, gpa: int, data: bytes) -> bool:
        try:
            self._memory.write(gpa, data)
        except GuestAddressError:
            return False
        return True

    def _reader(self, name: str) -> Callable[[int], int]:
        return lambda _vcpu: self._values[name]

    def _writer(self, name: str) -> Callable[[int, int], None]:
        return lambda _vcpu, value: self._values.update({name: value})

    def _buffer(self, name: str, readable: bool) -> Msr:
        return Msr(Feature.DEBUG_MSRS, self._reader(name) if readable else None, self._writer(name))

    def _write_control(self, _vcpu: int, value: int) -> None:
        if self._as_virtualbox and value & SEND and value & RECEIVE:
            raise MsrFault(HV_X64_MSR_SYNDBG_CONTROL, value, "sending and receiving at once")
        self._values["control"] = value
        if value & SEND:
            self._send_buffer(value >> SIZE_SHIFT & 0xFFFF)
        elif value & RECEIVE:
            self._receive_buffer()

    def _send_buffer(self, count: int) -> None:
        """Send `count` bytes; a count or a buffer that cannot be is ignored."""
        if not 0 < count < BUFFER_BYTES:
            return
        try:
            data = self._memory.read(self._values["send"], count)
        except GuestAddressError:
            return
        self._values["status"] = SEND_SUCCESS if self.send(data) == count else 0

    def _receive_buffer(self) -> None:
        """Fill the receive buffer; one that is not in guest memory is ignored, with nothing taken from the channel."""
        gpa = self._values["receive"]
        if not self._memory.contains(gpa, BUFFER_BYTES):
            return
        data = self.receive(BUFFER_BYTES)
        done = bool(data) and self._put(gpa, data)
        self._values["status"] = len(data) << SIZE_SHIFT | RECEIVE_SUCCESS if done else 0
