"""Hypercalls by a port: what a guest's `out %al, $port` asks, where the CPU's own instructions do not come here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from pvclock.kvm import Vcpu
from pvclock.kvm.exits import Interrupted
from pvclock.providers.interface import HypercallRegisters, HypercallResult, Status
from pvclock.quantities import U64_MASK

__all__ = ["HypercallPort"]

CallHandler: TypeAlias = Callable[[int, HypercallRegisters], HypercallResult]

CR0_PE: Final = 1 << 0
EFER_LMA: Final = 1 << 10
RFLAGS_VM: Final = 1 << 17

OUT_BYTES: Final = 2
"""The length of `out %al, $port`, the form that hypercall pages have."""

UD_INJECTED: Final = bytes((1, 6, 0, 0)) + bytes(4)
"""The first members of struct kvm_vcpu_events, with #UD on its way to the guest."""

NOT_DONE: Final = (Status.NOT_ENABLED, Status.NOT_AVAILABLE, Status.INVALID_INSTRUCTION)
"""The guest gets its #UD, as from a CPU without hypercalls."""


class HypercallPort:
    """Answers hypercalls of `vcpus` by GuestClock.hypercall(): the guest finds the results in RAX and RDX.

    Thread-safety: serve() is called by each vCPU's thread, for that vCPU.
    """

    def __init__(self, vcpus: list[Vcpu]) -> None:
        self._vcpus = vcpus

    def serve(self, number: int, hypercall: CallHandler) -> None:
        """Answer vCPU `number`'s OUT, its last exit."""
        vcpu = self._vcpus[number]
        registers = vcpu.get_regs()
        result = hypercall(number, _as_registers(registers, vcpu.get_sregs()))
        results = {name: value for name, value in (("rax", result.rax), ("rdx", result.rdx)) if value is not None}
        if results:
            vcpu.set_regs({**registers, **results})
        if result.status in NOT_DONE or (result.status is Status.ACCESS_DENIED and result.rax is None):
            _raise_ud(vcpu)
        elif result.status is Status.CONTINUING:
            _go_back(vcpu)


def _as_registers(registers: dict[str, int], sregs: dict[str, Any]) -> HypercallRegisters:
    general = {name: registers[name] for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8")}
    return HypercallRegisters(
        **general,
        cpl=sregs["ss"]["dpl"],
        long_mode=bool(sregs["efer"] & EFER_LMA and sregs["cs"]["l"]),
        protected_mode=bool(sregs["cr0"] & CR0_PE) and not registers["rflags"] & RFLAGS_VM,
    )


def _raise_ud(vcpu: Vcpu) -> None:
    _go_back(vcpu)
    vcpu.set_vcpu_events(UD_INJECTED + vcpu.get_vcpu_events()[len(UD_INJECTED) :])


def _go_back(vcpu: Vcpu) -> None:
    """Let RIP stay on the OUT, which KVM finishes first: before or after the exit, as it got to the instruction."""
    vcpu.request_exit()
    while type(vcpu.run()) is not Interrupted:
        pass
    registers = vcpu.get_regs()
    vcpu.set_regs({**registers, "rip": registers["rip"] - OUT_BYTES & U64_MASK})
