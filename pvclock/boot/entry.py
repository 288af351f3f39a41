"""How a vCPU enters an image: the processor mode and registers of its boot protocol."""

from __future__ import annotations

import struct
from typing import Any, Final, Literal, NamedTuple

from pvclock.kvm._vcpu import Vcpu

__all__ = ["BOOT_GDT", "EntryState", "LongMode", "enter"]

CR0_PROTECTED: Final = 0x11
"""PE and ET, caches on: reset leaves them off, and some hosts triple-fault a guest that turns paging on so."""
CR0_PAGING: Final = 1 << 31
CR4_PAE: Final = 1 << 5
EFER_LONG_MODE: Final = 0x500
"""LME and LMA."""
RFLAGS_ALWAYS_ONE: Final = 2

FLAT: Final = {"base": 0, "limit": 0xFFFFFFFF, "present": 1, "s": 1, "g": 1}
FLAT_CODE: Final = {**FLAT, "selector": 8, "type": 0xB, "db": 1}
FLAT_DATA: Final = {**FLAT, "selector": 16, "type": 3, "db": 1}

# Linux's 64-bit protocol: __BOOT_CS is selector 0x10 and __BOOT_DS 0x18, and the GDT has their descriptors.
LONG_CODE: Final = {**FLAT, "selector": 0x10, "type": 0xB, "db": 0, "l": 1}
LONG_DATA: Final = {**FLAT, "selector": 0x18, "type": 3, "db": 1}
BOOT_GDT: Final = struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)


class LongMode(NamedTuple):
    """64-bit mode with paging on; guest memory has these.

    page_tables: the PML4.  gdt: BOOT_GDT.
    """

    page_tables: int
    gdt: int


class EntryState(NamedTuple):
    """Where the boot vCPU begins: the mode, `rip`, and what its general registers hold.

    mode: "real": at 0:rip; "protected": 32 bits with flat segments and no paging; a LongMode.
    """

    mode: Literal["real", "protected"] | LongMode
    rip: int
    registers: dict[str, int]


def enter(vcpu: Vcpu, state: EntryState) -> None:
    """Put `vcpu`, as reset left it, into `state`; interrupts are off."""
    sregs: dict[str, Any] = vcpu.get_sregs()
    if state.mode == "real":
        sregs["cs"].update(base=0, selector=0)
    elif state.mode == "protected":
        sregs["cr0"] = CR0_PROTECTED
        _load_segments(sregs, FLAT_CODE, FLAT_DATA)
    else:
        sregs.update(cr0=CR0_PROTECTED | CR0_PAGING, cr3=state.mode.page_tables, cr4=CR4_PAE, efer=EFER_LONG_MODE)
        sregs["gdt"].update(base=state.mode.gdt, limit=len(BOOT_GDT) - 1)
        _load_segments(sregs, LONG_CODE, LONG_DATA)
    vcpu.set_sregs(sregs)
    vcpu.set_regs({**vcpu.get_regs(), **state.registers, "rip": state.rip, "rflags": RFLAGS_ALWAYS_ONE})


def _load_segments(sregs: dict[str, Any], code: dict[str, int], data: dict[str, int]) -> None:
    sregs["cs"].update(code)
    for name in ("ds", "es", "fs", "gs", "ss"):
        sregs[name].update(data)
