"""Hypercalls by a port: what a guest's `out %al, $port` asks, where the CPU's own instructions do not come here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeAlias

from pvclock.kvm import Vcpu
from pvclock.kvm._gate import Gate
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

    gate: the one by which those vCPUs enter the guest.

    Thread-safety: serve() is called by each vCPU's thread, for that vCPU.
    """

    def __init__(self, vcpus: list[Vcpu], gate: Gate) -> None:
        self._vcpus, self._gate = vcpus, gate

    def serve(self, number: int, hypercall: CallHandler) -> None:
        """Answer vCPU `number`'s OUT, its last exit."""
        vcpu = self._vcpus[number]
        registers = vcpu.get_regs()
        result = hypercall(number, _as_registers(registers, vcpu.get_sregs()))
        results = {name: value for name, value in (("rax", result.rax), ("rdx", result.rdx)) if value is not None}
        if results:
            vcpu.set_regs({**registers, **results})
        is_refused = result.status in NOT_DONE or (result.status is Status.ACCESS_DENIED and result.rax is None)
        if is_refused or result.status is Status.CONTINUING:
            self._do_inside(number, partial(_raise_ud if is_refused else _go_back, vcpu))

    def _do_inside(self, number: int, step: Callable[[], object]) -> None:
        """Do what enters KVM_RUN while vCPU `number` counts as in: so not while it is paused, and whole before it is.

        If the run has ended the vCPU does not go in, but this has to be done before the next run.  Nobody else can have
        its registers before this thread has departed.
        """
        self._gate.enter(number)
        try:
            step()
        finally:
            self._gate.leave(number)


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
