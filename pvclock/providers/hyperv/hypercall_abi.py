"""How a Hyper-V guest passes a hypercall: the control word, parameters in registers or in memory, and the result.

Source: TLFS "Hypercall Interface"; Linux kvm_hv_hypercall().
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final, NamedTuple

from pvclock._memory import GuestMemory
from pvclock.errors import GuestAddressError
from pvclock.providers.hyperv.features import Privilege, Recommendation
from pvclock.providers.hyperv.page_msr import PAGE_BYTES
from pvclock.providers.interface import HypercallRegisters, HypercallResult, Status
from pvclock.quantities import U32_MASK

__all__ = ["HvStatus", "Hypercall", "Parameters", "Refused", "Request", "read_request", "result"]

FAST: Final = 1 << 16
RESERVED: Final = 0xF << 60 | 0xF << 44 | 0xF << 27
"""Bit 31 is not among them: it says that the call is for the hypervisor below, and there is none."""
REPS_SHIFT: Final = 32

ALIGNMENT: Final = 8


class HvStatus(IntEnum):
    """HV_STATUS_*: the low 16 bits of a result."""

    SUCCESS = 0
    INVALID_HYPERCALL_CODE = 2
    INVALID_HYPERCALL_INPUT = 3
    INVALID_ALIGNMENT = 4
    INVALID_PARAMETER = 5
    ACCESS_DENIED = 6
    OPERATION_DENIED = 8
    INVALID_PARTITION_ID = 0xD
    INVALID_VP_INDEX = 0xE
    INVALID_CONNECTION_ID = 0x12
    NOT_ACKNOWLEDGED = 0x14
    NO_DATA = 0x1B
    INSUFFICIENT_BUFFER = 0x33


class Refused(Exception):
    """The call ends with `status`, after `reps` repetitions were completed."""

    def __init__(self, status: HvStatus, reps: int = 0) -> None:
        super().__init__(status)
        self.status, self.reps = status, reps


class Request(NamedTuple):
    """A decoded call.  input, output: addresses of the parameters, or the parameters themselves if it is fast."""

    vcpu: int
    code: int
    fast: bool
    header_words: int
    """Size of the variable header, in units of 8 bytes."""
    rep_count: int
    rep_start: int
    reserved: int
    """The bits that have to be 0."""
    input: int
    output: int

    @property
    def is_rep(self) -> bool:
        """Is it a list of repetitions?"""
        return bool(self.rep_count or self.rep_start)


class Parameters:
    """Parameters that lie in guest memory; Refused for those that may not lie where the guest says.

    within_page: they may not cross the end of a page.  not_ram: the status of those that are not all in guest memory.
    """

    def __init__(self, memory: GuestMemory, *, within_page: bool, not_ram: HvStatus) -> None:
        self._memory, self._within_page, self._not_ram = memory, within_page, not_ram

    def check(self, gpa: int, length: int) -> int:
        """`gpa`, if `length` bytes of parameters may lie there."""
        self._check_alignment(gpa, length)
        if not self._memory.contains(gpa, length):
            raise Refused(self._not_ram)
        return gpa

    def read(self, gpa: int, length: int) -> bytes:
        """The `length` bytes there."""
        self._check_alignment(gpa, length)
        try:
            return self._memory.read(gpa, length)
        except GuestAddressError as error:
            raise Refused(self._not_ram) from error

    def write(self, gpa: int, data: bytes) -> None:
        """Write results there."""
        self._check_alignment(gpa, len(data))
        try:
            self._memory.write(gpa, data)
        except GuestAddressError as error:
            raise Refused(self._not_ram) from error

    def _check_alignment(self, gpa: int, length: int) -> None:
        if gpa % ALIGNMENT or (self._within_page and gpa % PAGE_BYTES + length > PAGE_BYTES):
            raise Refused(HvStatus.INVALID_ALIGNMENT)


class Hypercall(NamedTuple):
    """A hypercall that is served: how, what a guest is offered that may make it, and the form that it may have."""

    serve: Callable[[Request], HvStatus]
    """May raise Refused."""
    privilege: Privilege = Privilege(0)
    recommendations: Recommendation = Recommendation(0)
    is_told: bool = True
    """Does any CPUID tell guests to make it?"""
    takes_fast: bool = False
    takes_reps: bool = False
    takes_header: bool = False

    def is_offered(self, privileges: Privilege, recommendations: Recommendation) -> bool:
        """May a guest make it that is offered these?"""
        return self.is_told and self.privilege in privileges and self.recommendations in recommendations

    def accepts(self, request: Request) -> bool:
        """Has the call that form?  One with repetitions has one to do."""
        if (request.fast and not self.takes_fast) or (request.header_words and not self.takes_header):
            return False
        return request.rep_start < request.rep_count if self.takes_reps else not request.is_rep


def read_request(vcpu: int, registers: HypercallRegisters) -> Request:
    """Decode the registers: RCX, RDX and R8, or outside 64-bit code EDX:EAX, EBX:ECX and EDI:ESI."""
    if registers.long_mode:
        control, parameter, output = registers.rcx, registers.rdx, registers.r8
    else:
        control = _pair(registers.rdx, registers.rax)
        parameter, output = _pair(registers.rbx, registers.rcx), _pair(registers.rdi, registers.rsi)
    return Request(
        vcpu=vcpu,
        code=control & 0xFFFF,
        fast=bool(control & FAST),
        header_words=control >> 17 & 0x3FF,
        rep_count=control >> 32 & 0xFFF,
        rep_start=control >> 48 & 0xFFF,
        reserved=control & RESERVED,
        input=parameter,
        output=output,
    )


def result(status: HvStatus, reps: int, *, long_mode: bool) -> HypercallResult:
    """The result word: status, and repetitions completed in bits 32 to 43; in RAX, or in EDX:EAX."""
    if long_mode:
        return HypercallResult(Status.SUCCESS, status | reps << REPS_SHIFT)
    return HypercallResult(Status.SUCCESS, int(status), reps)


def _pair(high: int, low: int) -> int:
    return (high & U32_MASK) << 32 | low & U32_MASK
