"""How a vCPU enters an image: the processor mode and registers of its boot protocol."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from pvclock.kvm._vcpu import Vcpu

__all__ = ["EntryState", "enter"]

CR0_PROTECTED: Final = 0x11
"""PE and ET, caches on: reset leaves them off, and some hosts triple-fault a guest that turns paging on so."""
RFLAGS_ALWAYS_ONE: Final = 2

FLAT_CODE: Final = {"base": 0, "limit": 0xFFFFFFFF, "selector": 8, "type": 0xB, "present": 1, "s": 1, "db": 1, "g": 1}
FLAT_DATA: Final = {**FLAT_CODE, "selector": 16, "type": 3}


class EntryState(NamedTuple):
    """Where the boot vCPU begins: real mode at 0:rip, or 32-bit protected mode with flat segments and no paging."""

    protected_mode: bool
    rip: int
    registers: dict[str, int]


def enter(vcpu: Vcpu, state: EntryState) -> None:
    """Put `vcpu`, as reset left it, into `state`; interrupts are off."""
    sregs: dict[str, Any] = vcpu.get_sregs()
    if state.protected_mode:
        sregs["cr0"] = CR0_PROTECTED
        sregs["cs"].update(FLAT_CODE)
        for name in ("ds", "es", "fs", "gs", "ss"):
            sregs[name].update(FLAT_DATA)
    else:
        sregs["cs"].update(base=0, selector=0)
    vcpu.set_sregs(sregs)
    vcpu.set_regs({**vcpu.get_regs(), **state.registers, "rip": state.rip, "rflags": RFLAGS_ALWAYS_ONE})
