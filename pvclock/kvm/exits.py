"""Why KVM_RUN returned: a type for each exit, with what the VMM needs to handle it.

An exit that pvclock does not know is an `UnknownExit` with its number, not an error.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final, NamedTuple, TypeAlias

__all__ = [
    "CoalescedWrite",
    "Exit",
    "FailEntry",
    "Halt",
    "InternalError",
    "Interrupted",
    "IoIn",
    "IoOut",
    "Mmio",
    "MsrExitReason",
    "RdmsrExit",
    "Shutdown",
    "SystemEvent",
    "UnknownExit",
    "WrmsrExit",
]


class MsrExitReason(IntFlag):
    """Why an MSR access came to user space (KVM_MSR_EXIT_REASON_*)."""

    INVAL = 1
    UNKNOWN = 2
    FILTER = 4


class Interrupted(NamedTuple):
    """A kick or a signal; the guest did not exit by itself."""


class IoOut(NamedTuple):
    """OUT: `data` holds all repetitions, `size` bytes each."""

    port: int
    size: int
    data: bytes


class IoIn(NamedTuple):
    """IN of `repeats` items of `size` bytes; answer with Vcpu.complete_io()."""

    port: int
    size: int
    repeats: int


class Mmio(NamedTuple):
    """An access to guest-physical memory without a slot; `data` of a write; a read is answered by complete_mmio()."""

    gpa: int
    length: int
    data: bytes | None


class CoalescedWrite(NamedTuple):
    """A write that KVM kept in its coalesced ring: not an exit; see Vcpu.take_coalesced().

    address: a port where is_port, else guest-physical.
    """

    is_port: bool
    address: int
    data: bytes


class RdmsrExit(NamedTuple):
    """RDMSR; answer with Vcpu.complete_msr()."""

    msr: int
    reason: MsrExitReason


class WrmsrExit(NamedTuple):
    """WRMSR; answer with Vcpu.complete_msr()."""

    msr: int
    value: int
    reason: MsrExitReason


class Halt(NamedTuple):
    """HLT, on a VM without an in-kernel irqchip."""

    def __str__(self) -> str:
        return "HLT, and there is no interrupt controller to wake it"


class Shutdown(NamedTuple):
    """A triple fault."""

    def __str__(self) -> str:
        return "a triple fault (KVM_EXIT_SHUTDOWN)"


class SystemEvent(NamedTuple):
    """KVM_EXIT_SYSTEM_EVENT."""

    type: int

    def __str__(self) -> str:
        return f"system event {self.type} (KVM_EXIT_SYSTEM_EVENT)"


class FailEntry(NamedTuple):
    """The hardware refused the guest's state."""

    reason: int

    def __str__(self) -> str:
        return f"the CPU refused the guest's state, reason {self.reason:#x} (KVM_EXIT_FAIL_ENTRY)"


EMULATION: Final = 1
"""KVM_INTERNAL_ERROR_EMULATION."""
HAS_INSTRUCTION_BYTES: Final = 1 << 0
"""KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, since Linux 5.14."""
SUBERRORS: Final = {
    EMULATION: "KVM cannot emulate an instruction",
    2: "KVM met with two exceptions at once",
    3: "KVM could not deliver an event",
    4: "KVM does not know the hardware's exit",
}


class InternalError(NamedTuple):
    """KVM gave up, mostly on an instruction that it cannot emulate."""

    suberror: int
    data: tuple[int, ...]

    @property
    def fetched(self) -> bytes:
        """What KVM has of the instruction that it cannot emulate, and behind it, up to 15 bytes; it may have none."""
        if self.suberror != EMULATION or len(self.data) < 3 or not self.data[0] & HAS_INSTRUCTION_BYTES:
            return b""
        length, *content = b"".join(word.to_bytes(8, "little") for word in self.data[1:3])
        return bytes(content[:length])

    def __str__(self) -> str:
        what = SUBERRORS.get(self.suberror, "KVM gave up")
        if self.fetched:
            found = f"it fetched {self.fetched.hex(' ')}"
        else:
            found = f"data {', '.join(map(hex, self.data)) or 'none'}"
        return f"{what}, suberror {self.suberror}, {found} (KVM_EXIT_INTERNAL_ERROR)"


class UnknownExit(NamedTuple):
    """An exit without a type here."""

    number: int

    def __str__(self) -> str:
        return f"exit {self.number}, which pvclock does not know"


Exit: TypeAlias = (
    Interrupted
    | IoOut
    | IoIn
    | Mmio
    | RdmsrExit
    | WrmsrExit
    | Halt
    | Shutdown
    | SystemEvent
    | FailEntry
    | InternalError
    | UnknownExit
)
