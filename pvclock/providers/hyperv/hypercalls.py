"""The hypercalls that are served: those on vCPUs and of the debugger, messages, and the extended ones.

Source: TLFS "Hypercall Reference"; Linux kvm_hv_hypercall() and QEMU hw/hyperv/hyperv.c; VirtualBox gimHvHypercall().
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from pvclock._memory import GuestMemory
from pvclock.errors import GuestAddressError, MsrFault
from pvclock.providers.hyperv.debug import SyntheticDebugger
from pvclock.providers.hyperv.debug_calls import debug_calls, without_debugger
from pvclock.providers.hyperv.features import Privilege, Recommendation
from pvclock.providers.hyperv.hypercall_abi import (
    HvStatus,
    Hypercall,
    Parameters,
    Refused,
    Request,
    read_request,
    result,
)
from pvclock.providers.hyperv.page_msr import page_of
from pvclock.providers.hyperv.vp_calls import ipi_calls, register_calls
from pvclock.providers.interface import (
    ClockServices,
    HypercallRegisters,
    HypercallResult,
    InterruptServices,
    Status,
)

__all__ = ["Hypercalls"]

HVCALL_NOTIFY_LONG_SPIN_WAIT: Final = 0x08
HVCALL_POST_MESSAGE: Final = 0x5C
HV_EXT_CALL_QUERY_CAPABILITIES: Final = 0x8001
HV_EXT_CALL_GET_BOOT_ZEROED_MEMORY: Final = 0x8002

MESSAGE: Final = struct.Struct("<IIII")
PAYLOAD_BYTES_MAX: Final = 240
VMBUS_CONNECTION: Final = 1
VMBUS_MESSAGE: Final = 1
VMBUS_ANSWER: Final = struct.pack("<IB3xQQ232x", VMBUS_MESSAGE, 0xF, 0, 0xF)
"""A message slot, 256 bytes: type, payload size, flags, sender; and a payload that the guest's VMBus client expects."""

HV_X64_MSR_SIMP: Final = 0x40000083
HV_X64_MSR_SINT0: Final = 0x40000090
VMBUS_SINT: Final = 2
SINT_MASKED: Final = 1 << 16

NO_CAPABILITIES: Final = bytes(8)
KNOWS_ZEROED_MEMORY: Final = struct.pack("<Q", 1)
NO_ZEROED_MEMORY: Final = bytes(16)
"""From page 0 on, 0 pages: nobody here knows which memory is still zero."""


class Hypercalls:
    """A VM's hypercalls, once its guest has enabled them.

    read_msr: (vcpu, index) as the guest would, or MsrFault.  debugger: None without a debug interface.
    as_virtualbox: VirtualBox checks neither the reserved bits of the control word, which its shifts miss, nor the form
    of a call, nor whether parameters cross a page; and it serves nothing on vCPUs.
    vs_interface: only there, may messages be posted?
    """

    def __init__(
        self,
        clock: ClockServices,
        vcpus: int,
        *,
        read_msr: Callable[[int, int], int],
        debugger: SyntheticDebugger | None = None,
        as_virtualbox: bool = False,
        vs_interface: bool = False,
    ) -> None:
        self._checks_form = not as_virtualbox
        if as_virtualbox:
            parameters = Parameters(clock.memory, within_page=False, not_ram=HvStatus.INVALID_PARAMETER)
            slot = partial(_vmbus_slot, read_msr) if vs_interface else None
            served = _virtualbox_calls(clock.memory, parameters, slot)
        else:
            parameters = Parameters(clock.memory, within_page=True, not_ram=HvStatus.INVALID_HYPERCALL_INPUT)
            served = _plain_calls(parameters) | register_calls(read_msr, vcpus, parameters)
            vmm: object = clock.vmm
            if isinstance(vmm, InterruptServices):
                served |= ipi_calls(vmm, vcpus, parameters)
        if debugger is not None:
            served |= debug_calls(debugger, parameters, by_options=not as_virtualbox)
        self._served = served
        self._denied: set[int] = set()
        self.privileges = Privilege(0)
        """What the calls need."""
        self.recommendations = Recommendation(0)
        """Those that guests can follow by hypercalls."""
        for each in served.values():
            self.privileges |= each.privilege
            self.recommendations |= each.recommendations

    def deny_all_but(self, privileges: Privilege, recommendations: Recommendation) -> None:
        """Serve only what CPUID tells a guest of that is offered these, as KVM does (hv_check_hypercall_access())."""
        self._denied = {code for code, each in self._served.items() if not each.is_offered(privileges, recommendations)}

    def call(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """Execute the call; ACCESS_DENIED, which is the guest's #UD, outside ring 0 of protected mode."""
        if registers.cpl != 0 or not registers.protected_mode:
            return HypercallResult(Status.ACCESS_DENIED)
        status, reps = self._outcome(read_request(vcpu, registers))
        return result(status, reps, long_mode=registers.long_mode)

    def _outcome(self, request: Request) -> tuple[HvStatus, int]:
        """Status, and how many repetitions are completed, those before the start index included."""
        try:
            served = self._checked(request)
            return served.serve(request), request.rep_count if served.takes_reps else 0
        except Refused as refused:
            return refused.status, refused.reps

    def _checked(self, request: Request) -> Hypercall:
        """How the call is served; checked in Linux's order."""
        served = self._served.get(request.code)
        if request.code in self._denied:
            raise Refused(HvStatus.ACCESS_DENIED)
        if self._checks_form and request.reserved:
            raise Refused(HvStatus.INVALID_HYPERCALL_INPUT)
        if served is None:
            raise Refused(HvStatus.INVALID_HYPERCALL_CODE)
        if self._checks_form and not served.accepts(request):
            raise Refused(HvStatus.INVALID_HYPERCALL_INPUT)
        return served


def _plain_calls(parameters: Parameters) -> dict[int, Hypercall]:
    """Linux's calls that need no more than guest memory."""

    def post_message(request: Request) -> HvStatus:
        """There is no connection to post to, but what is posted is checked as if there were."""
        *_, payload_bytes = MESSAGE.unpack(parameters.read(request.input, MESSAGE.size))
        if payload_bytes > PAYLOAD_BYTES_MAX:
            raise Refused(HvStatus.INVALID_PARAMETER)
        parameters.check(request.input, MESSAGE.size + payload_bytes)
        return HvStatus.INVALID_CONNECTION_ID

    extended = Privilege.EXTENDED_HYPERCALLS
    return {
        # Leaf 0x40000004 EBX tells every guest never to make it.
        HVCALL_NOTIFY_LONG_SPIN_WAIT: Hypercall(lambda _: HvStatus.SUCCESS, is_told=False, takes_fast=True),
        HVCALL_POST_MESSAGE: Hypercall(post_message, Privilege.POST_MESSAGES),
        HV_EXT_CALL_QUERY_CAPABILITIES: Hypercall(partial(_answer, parameters, NO_CAPABILITIES), extended),
    }


def _virtualbox_calls(
    memory: GuestMemory, parameters: Parameters, vmbus_slot: Callable[[int], int | None] | None
) -> dict[int, Hypercall]:
    """VirtualBox's, but for those of a debugger that there is."""

    def post_message(request: Request) -> HvStatus:
        """Make the guest give VMBus up, and turn to the debugger's MSRs, by an answer and an error."""
        if vmbus_slot is None:
            raise Refused(HvStatus.ACCESS_DENIED)
        try:
            connection, _, kind, _ = MESSAGE.unpack(parameters.read(request.input, MESSAGE.size))
        except Refused as refused:
            raise Refused(HvStatus.INVALID_PARAMETER) from refused
        slot = vmbus_slot(request.vcpu)
        if (connection, kind) == (VMBUS_CONNECTION, VMBUS_MESSAGE) and slot is not None:
            _write_if_ram(memory, slot, VMBUS_ANSWER)
        return HvStatus.NOT_ACKNOWLEDGED

    extended = Privilege.EXTENDED_HYPERCALLS
    return {
        HVCALL_POST_MESSAGE: Hypercall(post_message),
        HV_EXT_CALL_QUERY_CAPABILITIES: Hypercall(partial(_answer, parameters, KNOWS_ZEROED_MEMORY), extended),
        HV_EXT_CALL_GET_BOOT_ZEROED_MEMORY: Hypercall(partial(_answer, parameters, NO_ZEROED_MEMORY), extended),
        **without_debugger(),
    }


def _vmbus_slot(read_msr: Callable[[int, int], int], vcpu: int) -> int | None:
    """Where a vCPU expects VMBus's messages; None if it expects none."""
    try:
        simp, sint = read_msr(vcpu, HV_X64_MSR_SIMP), read_msr(vcpu, HV_X64_MSR_SINT0 + VMBUS_SINT)
    except MsrFault:
        return None
    page = page_of(simp)
    return None if page is None or sint & SINT_MASKED else page + len(VMBUS_ANSWER) * VMBUS_SINT


def _answer(parameters: Parameters, answer: bytes, request: Request) -> HvStatus:
    parameters.write(request.output, answer)
    return HvStatus.SUCCESS


def _write_if_ram(memory: GuestMemory, gpa: int, data: bytes) -> None:
    with suppress(GuestAddressError):  # the guest may have placed its page anywhere
        memory.write(gpa, data)
