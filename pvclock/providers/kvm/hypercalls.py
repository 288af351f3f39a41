"""KVM's hypercalls: VMCALL or VMMCALL with a number in RAX, arguments in registers, and the result in RAX.

Source: kvm_emulate_hypercall(), kvm_pv_clock_pairing(), kvm_pv_send_ipi(); hypercalls.rst.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from pvclock._records import write_clock_pairing
from pvclock.providers.interface import ClockServices, HypercallRegisters, HypercallResult, Status, VmmServices
from pvclock.providers.kvm.features import KvmFeature
from pvclock.providers.kvm.profiles import Profile
from pvclock.quantities import U32_MASK

__all__ = ["Call", "Hypercalls", "read_call"]

KVM_HC_VAPIC_POLL_IRQ: Final = 1
KVM_HC_KICK_CPU: Final = 5
KVM_HC_CLOCK_PAIRING: Final = 9
KVM_HC_SEND_IPI: Final = 10
KVM_HC_SCHED_YIELD: Final = 11

KVM_ENOSYS: Final = 1000
KVM_EFAULT: Final = 14
KVM_EINVAL: Final = 22
KVM_EOPNOTSUPP: Final = 95
KVM_EPERM: Final = 1

KVM_CLOCK_PAIRING_WALLCLOCK: Final = 0
ICR_DESTINATION: Final = 0x800 | 0xC0000
"""Destination mode and shorthand, which must be 0: the bitmaps are the destination."""


class Call(NamedTuple):
    """A decoded hypercall; its arguments and result have `bits` bits."""

    vcpu: int
    bits: int
    number: int
    a0: int
    a1: int
    a2: int
    a3: int


def read_call(vcpu: int, registers: HypercallRegisters, profile: Profile) -> Call:
    """Decode the registers; outside 64-bit code only their lower halves count."""
    bits = 64 if registers.long_mode else 32
    number, *arguments = (getattr(registers, name) & (1 << bits) - 1 for name in ("rax", *profile.arguments))
    return Call(vcpu, bits, number, *arguments)


class Hypercalls:
    """The hypercalls that are served.  features: those that open a call; vcpus: how many the VM has."""

    def __init__(self, clock: ClockServices, vcpus: int, profile: Profile, features: KvmFeature) -> None:
        self._clock, self._vcpus, self._profile = clock, vcpus, profile
        every: dict[int, tuple[KvmFeature, Callable[[Call], int | None]]] = {
            KVM_HC_VAPIC_POLL_IRQ: (KvmFeature(0), lambda _: 0),
            KVM_HC_CLOCK_PAIRING: (KvmFeature(0), self._pair_clocks),
        }
        if clock.vmm is not None:
            every |= {
                KVM_HC_KICK_CPU: (KvmFeature.PV_UNHALT, partial(self._kick, clock.vmm)),
                KVM_HC_SEND_IPI: (KvmFeature.PV_SEND_IPI, partial(_send_ipi, clock.vmm)),
                KVM_HC_SCHED_YIELD: (KvmFeature.PV_SCHED_YIELD, partial(_yield, clock.vmm)),
            }
        self._served = {
            number: function
            for number, (feature, function) in every.items()
            if number in profile.hypercalls and feature in features
        }

    def call(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """Execute the call, or return the error in RAX; OPERATION_FAILED leaves the answer to the VMM."""
        call = read_call(vcpu, registers, self._profile)
        if registers.cpl != 0:
            return HypercallResult(Status.ACCESS_DENIED, _as_register(-KVM_EPERM, call))
        serve = self._served.get(call.number)
        if serve is None:
            return HypercallResult(Status.NOT_SUPPORTED, _as_register(-KVM_ENOSYS, call))
        result = serve(call)
        if result is None:
            return HypercallResult(Status.OPERATION_FAILED)
        return HypercallResult(Status.SUCCESS, _as_register(result, call))

    def _kick(self, vmm: VmmServices, call: Call) -> int | None:
        if self._profile.kick_needs_vcpu and call.a1 >= self._vcpus:
            return None
        vmm.kick(call.a1 & U32_MASK)
        return 0

    def _pair_clocks(self, call: Call) -> int:
        pairing = self._clock.pairing(call.vcpu) if call.a1 == KVM_CLOCK_PAIRING_WALLCLOCK else None
        if pairing is None:
            return -KVM_EOPNOTSUPP
        written = write_clock_pairing(self._clock.memory, call.a0, pairing.real_ns, pairing.guest_tsc)
        return 0 if written else -KVM_EFAULT


def _send_ipi(vmm: VmmServices, call: Call) -> int:
    if call.a3 & ICR_DESTINATION:
        return -KVM_EINVAL
    lowest = call.a2 & U32_MASK
    apic_ids = _ids_in(call.a0, lowest) + _ids_in(call.a1, (lowest + call.bits) & U32_MASK)
    return vmm.send_ipi(apic_ids, call.a3 & U32_MASK)


def _yield(vmm: VmmServices, call: Call) -> int:
    vmm.yield_to(call.a0 & U32_MASK)
    return 0


def _ids_in(bitmap: int, lowest: int) -> list[int]:
    """The APIC ids of the bits that are set, `lowest` being bit 0's; ids beyond 32 bits are left out."""
    ids = (lowest + bit for bit in range(bitmap.bit_length()) if bitmap >> bit & 1)
    return [apic_id for apic_id in ids if apic_id <= U32_MASK]


def _as_register(result: int, call: Call) -> int:
    return result & (1 << call.bits) - 1
