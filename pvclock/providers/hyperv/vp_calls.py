"""Hypercalls on virtual processors: interrupts from one to others, and registers.

Source: TLFS HvCallSendSyntheticClusterIpi and HvCallGetVpRegisters; Linux kvm_hv_send_ipi() and hvgdk.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Final

from pvclock.errors import MsrFault
from pvclock.providers.hyperv.features import Privilege, Recommendation
from pvclock.providers.hyperv.hypercall_abi import (
    HvStatus,
    Hypercall,
    Parameters,
    Refused,
    Request,
)
from pvclock.providers.interface import InterruptServices
from pvclock.quantities import U32_MASK

__all__ = ["ipi_calls", "register_calls"]

HVCALL_SEND_IPI: Final = 0x0B
HVCALL_SEND_IPI_EX: Final = 0x15
HVCALL_GET_VP_REGISTERS: Final = 0x50

HV_GENERIC_SET_ALL: Final = 1
HV_IPI_LOW_VECTOR: Final = 0x10
HV_IPI_HIGH_VECTOR: Final = 0xFF
SEND_IPI: Final = struct.Struct("<IIQ")
SEND_IPI_EX: Final = struct.Struct("<IIQQ")
BANK_BITS: Final = 64

HV_PARTITION_ID_SELF: Final = (1 << 64) - 1
HV_VP_INDEX_SELF: Final = U32_MASK - 1
GET_VP_REGISTERS: Final = struct.Struct("<QIB3x")
NAME_BYTES: Final = 4
VALUE_BYTES: Final = 16
MSR_OF_REGISTER: Final[Mapping[int, int]] = {
    0x00090002: 0x40000000,  # HV_REGISTER_GUEST_OS_ID
    0x00090003: 0x40000002,  # HV_REGISTER_VP_INDEX
    0x00090004: 0x40000020,  # HV_REGISTER_TIME_REF_COUNT
    0x00090017: 0x40000021,  # HV_REGISTER_REFERENCE_TSC
    **{0x000B0000 + each: 0x400000B0 + each for each in range(8)},  # HV_REGISTER_STIMER0_CONFIG to STIMER3_COUNT
}
"""The registers that can be read, and the MSRs that they also are."""


def ipi_calls(vmm: InterruptServices, vcpus: int, parameters: Parameters) -> dict[int, Hypercall]:
    """Interrupts to a set of vCPUs, by one mask or by up to 64 of them; numbers that no vCPU has are ignored."""

    def send(request: Request, targets_of: Callable[[Parameters, int, Request], tuple[int, Iterable[int]]]) -> HvStatus:
        vector, targets = targets_of(parameters, vcpus, request)
        for target in targets:
            if target < vcpus:
                vmm.inject(target, vector)
        return HvStatus.SUCCESS

    return {
        HVCALL_SEND_IPI: Hypercall(
            partial(send, targets_of=_ipi), recommendations=Recommendation.CLUSTER_IPI, takes_fast=True
        ),
        HVCALL_SEND_IPI_EX: Hypercall(
            partial(send, targets_of=_ipi_ex),
            recommendations=Recommendation.CLUSTER_IPI | Recommendation.EX_PROCESSOR_MASKS,
            takes_header=True,
        ),
    }


def _ipi(parameters: Parameters, _vcpus: int, request: Request) -> tuple[int, Iterable[int]]:
    """Vector and targets; 0 to 63 are within reach of the mask."""
    if request.fast:
        vector, reserved, mask = request.input & U32_MASK, request.input >> 32, request.output
    else:
        vector, reserved, mask = SEND_IPI.unpack(parameters.read(request.input, SEND_IPI.size))
    if reserved:
        raise Refused(HvStatus.INVALID_HYPERCALL_INPUT)
    return _vector(vector), _ones(mask)


def _ipi_ex(parameters: Parameters, vcpus: int, request: Request) -> tuple[int, Iterable[int]]:
    """Vector and targets: all, or a mask for each bank of 64 that is valid.  Without one the vector does not matter."""
    data = parameters.read(request.input, SEND_IPI_EX.size + 8 * request.header_words)
    vector, _, form, valid = SEND_IPI_EX.unpack_from(data)
    if request.header_words != valid.bit_count():
        raise Refused(HvStatus.INVALID_HYPERCALL_INPUT)
    if form == HV_GENERIC_SET_ALL:
        return _vector(vector), range(vcpus)
    masks = struct.unpack_from(f"<{request.header_words}Q", data, SEND_IPI_EX.size)
    banks = zip(_ones(valid), masks, strict=True)
    targets = [BANK_BITS * bank + bit for bank, mask in banks for bit in _ones(mask)]
    return (_vector(vector) if valid else vector), targets


def _vector(vector: int) -> int:
    if not HV_IPI_LOW_VECTOR <= vector <= HV_IPI_HIGH_VECTOR:
        raise Refused(HvStatus.INVALID_HYPERCALL_INPUT)
    return vector


def register_calls(read_msr: Callable[[int, int], int], vcpus: int, parameters: Parameters) -> dict[int, Hypercall]:
    """A list of registers of a vCPU, each a repetition: those that are also MSRs and have to do with time.

    read_msr: (vcpu, index) as that vCPU's guest would, or MsrFault.
    """
    serve = partial(_get_vp_registers, read_msr, vcpus, parameters)
    return {HVCALL_GET_VP_REGISTERS: Hypercall(serve, Privilege.ACCESS_VP_REGISTERS, takes_reps=True)}


def _get_vp_registers(
    read_msr: Callable[[int, int], int], vcpus: int, parameters: Parameters, request: Request
) -> HvStatus:
    data = parameters.read(request.input, GET_VP_REGISTERS.size + NAME_BYTES * request.rep_count)
    output = parameters.check(request.output, VALUE_BYTES * request.rep_count)
    partition, index, trust_level = GET_VP_REGISTERS.unpack_from(data)
    vcpu = _vcpu_of(partition, index, trust_level, vcpus, request.vcpu)
    for rep in range(request.rep_start, request.rep_count):
        (name,) = struct.unpack_from("<I", data, GET_VP_REGISTERS.size + NAME_BYTES * rep)
        value = _register(read_msr, vcpu, name, completed=rep)
        parameters.write(output + VALUE_BYTES * rep, value.to_bytes(VALUE_BYTES, "little"))
    return HvStatus.SUCCESS


def _vcpu_of(partition: int, index: int, trust_level: int, vcpus: int, caller: int) -> int:
    """The vCPU that is meant; the only partition is the caller's, and the only trust level is 0."""
    if partition != HV_PARTITION_ID_SELF:
        raise Refused(HvStatus.INVALID_PARTITION_ID)
    if trust_level:
        raise Refused(HvStatus.INVALID_PARAMETER)
    vcpu = caller if index == HV_VP_INDEX_SELF else index
    if vcpu >= vcpus:
        raise Refused(HvStatus.INVALID_VP_INDEX)
    return vcpu


def _register(read_msr: Callable[[int, int], int], vcpu: int, name: int, completed: int) -> int:
    msr = MSR_OF_REGISTER.get(name)
    if msr is None:
        raise Refused(HvStatus.INVALID_PARAMETER, completed)
    try:
        return read_msr(vcpu, msr)
    except MsrFault as fault:
        raise Refused(HvStatus.ACCESS_DENIED, completed) from fault


def _ones(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    return (bit for bit in range(mask.bit_length()) if mask >> bit & 1)
