"""The debugger's hypercalls: exchange of bytes with the VMM's debugger through parameters in guest memory.

Source: VirtualBox gimR3HvHypercallPostDebugData() and gimR3HvHypercallRetrieveDebugData(); QEMU hw/hyperv/hyperv.c.
"""

from __future__ import annotations

import struct
from typing import Final

from pvclock.providers.hyperv.debug import SyntheticDebugger
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.hyperv.hypercall_abi import (
    HvStatus,
    Hypercall,
    Parameters,
    Refused,
    Request,
)
from pvclock.quantities import U32_MASK

__all__ = ["debug_calls", "without_debugger"]

HVCALL_POST_DEBUG_DATA: Final = 0x69
HVCALL_RETRIEVE_DEBUG_DATA: Final = 0x6A
HVCALL_RESET_DEBUG_SESSION: Final = 0x6B

POST_INPUT: Final = struct.Struct("<II")
RETRIEVE_INPUT: Final = struct.Struct("<IIQ")
RESET_INPUT: Final = struct.Struct("<I")
OUTPUT: Final = struct.Struct("<II")
DATA_BYTES_MAX: Final = 4088
"""In one call: a page without the two words in front of it."""
TEST_ACTIVITY: Final = 1 << 1
"""Option of a retrieval: transfer nothing."""


def debug_calls(debugger: SyntheticDebugger, parameters: Parameters, *, by_options: bool) -> dict[int, Hypercall]:
    """Post, retrieve, reset.

    by_options: OPERATION_DENIED as long as the debugger's options say that the guest uses MSRs, as Linux does.
    """

    def check() -> None:
        if by_options and not debugger.uses_hypercalls:
            raise Refused(HvStatus.OPERATION_DENIED)

    def post(request: Request) -> HvStatus:
        check()
        output = parameters.check(request.output, OUTPUT.size)
        count, _ = POST_INPUT.unpack(parameters.read(request.input, POST_INPUT.size))
        if count > DATA_BYTES_MAX:
            raise Refused(HvStatus.INVALID_PARAMETER)
        data = parameters.read(request.input, POST_INPUT.size + count)[POST_INPUT.size :]
        pending = count - debugger.send(data) if count else 0
        parameters.write(output, OUTPUT.pack(pending, 0))
        return HvStatus.INSUFFICIENT_BUFFER if pending else HvStatus.SUCCESS

    def retrieve(request: Request) -> HvStatus:
        check()
        count, options, _ = RETRIEVE_INPUT.unpack(parameters.read(request.input, RETRIEVE_INPUT.size))
        if count > DATA_BYTES_MAX:
            raise Refused(HvStatus.INVALID_PARAMETER)
        output = parameters.check(request.output, OUTPUT.size + count)
        wants_data = bool(count) and not options & TEST_ACTIVITY
        data = debugger.receive(count) if wants_data else b""
        parameters.write(output, OUTPUT.pack(len(data), count - len(data)) + data)
        return HvStatus.NO_DATA if wants_data and not data else HvStatus.SUCCESS

    def reset(request: Request) -> HvStatus:
        """Nothing is kept here that could be purged."""
        check()
        options = request.input & U32_MASK
        if not request.fast:
            (options,) = RESET_INPUT.unpack(parameters.read(request.input, RESET_INPUT.size))
        return HvStatus.SUCCESS if options else HvStatus.INVALID_PARAMETER

    return {
        HVCALL_POST_DEBUG_DATA: Hypercall(post, Privilege.DEBUGGING),
        HVCALL_RETRIEVE_DEBUG_DATA: Hypercall(retrieve, Privilege.DEBUGGING),
        HVCALL_RESET_DEBUG_SESSION: Hypercall(reset, Privilege.DEBUGGING, takes_fast=True),
    }


def without_debugger() -> dict[int, Hypercall]:
    """VirtualBox's answer to them without a debugger: access is denied.  To Linux they are unknown then."""
    calls = (HVCALL_POST_DEBUG_DATA, HVCALL_RETRIEVE_DEBUG_DATA, HVCALL_RESET_DEBUG_SESSION)
    return dict.fromkeys(calls, Hypercall(lambda _: HvStatus.ACCESS_DENIED))
