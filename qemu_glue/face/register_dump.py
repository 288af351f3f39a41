"""`info registers`: a vCPU's registers as QEMU's monitor for people prints them, without those of FPU and SSE.

Source: QEMU's target/i386/cpu-dump.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from pvclock.kvm import Vcpu
from pvclock.timekeeping.travel import MP_STATE_HALTED

__all__ = ["registers"]

GENERAL: Final = (
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "rbp", "rsp"),
    ("r8", "r9", "r10", "r11"),
    ("r12", "r13", "r14", "r15"),
)
SEGMENTS: Final = ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr")
FLAGS: Final = ((10, "D"), (11, "O"), (7, "S"), (6, "Z"), (4, "A"), (2, "P"), (0, "C"))
SHADOW_AT, SMM_AT = 11, 24
"""In struct kvm_vcpu_events."""
EFER_LMA, PROTECTED = 1 << 10, 1
SYSTEM_TYPES: Final = {
    False: {1: "TSS16-avl", 2: "LDT", 3: "TSS16-busy", 9: "TSS32-avl", 11: "TSS32-busy"},
    True: {2: "LDT", 9: "TSS64-avl", 11: "TSS64-busy"},
}


def registers(vcpu: Vcpu) -> Iterator[str]:
    """The lines of a vCPU that is out of the guest."""
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    is_long = bool(sregs["efer"] & EFER_LMA)
    is_64_bit = is_long and bool(sregs["cs"]["l"])
    yield f"\r\nCPU#{vcpu.vcpu_id}"
    yield from _general(regs, is_64_bit)
    yield _state(vcpu, regs, sregs, is_64_bit)
    for name in SEGMENTS:
        yield _segment(name, sregs, is_64_bit, is_long)
    width = 16 if is_64_bit else 8
    for name in ("gdt", "idt"):
        yield f"{name.upper()}=     {sregs[name]['base']:0{width}x} {sregs[name]['limit']:08x}"
    yield f"CR0={sregs['cr0']:08x}" + "".join(
        f" {name.upper()}={sregs[name]:0{_width(name, width)}x}" for name in CONTROL
    )
    yield from _debug(vcpu)
    yield f"EFER={sregs['efer']:016x}"


CONTROL: Final = ("cr2", "cr3", "cr4")


def _width(name: str, width: int) -> int:
    return 8 if name == "cr4" else width


def _general(regs: Mapping[str, int], is_64_bit: bool) -> Iterator[str]:
    for names in GENERAL if is_64_bit else GENERAL[:2]:
        if is_64_bit:
            yield " ".join(f"{name.upper():3}={regs[name]:016x}" for name in names)
        else:
            yield " ".join(f"E{name[1:].upper()}={regs[name] & 0xFFFFFFFF:08x}" for name in names)


def _state(vcpu: Vcpu, regs: Mapping[str, int], sregs: Mapping[str, Any], is_64_bit: bool) -> str:
    events = vcpu.get_vcpu_events()
    flags = "".join(letter if regs["rflags"] >> bit & 1 else "-" for bit, letter in FLAGS)
    where = f"RIP={regs['rip']:016x} RFL" if is_64_bit else f"EIP={regs['rip'] & 0xFFFFFFFF:08x} EFL"
    privilege = sregs["ss"]["dpl"]
    rest = f"CPL={privilege} II={events[SHADOW_AT] & 1} A20=1 SMM={events[SMM_AT] & 1}"
    return f"{where}={regs['rflags']:08x} [{flags}] {rest} HLT={int(vcpu.get_mp_state() == MP_STATE_HALTED)}"


def _segment(name: str, sregs: Mapping[str, Any], is_64_bit: bool, is_long: bool) -> str:
    segment = sregs[name]
    flags = _descriptor(segment)
    base = f"{segment['base']:0{16 if is_64_bit else 8}x}"
    line = f"{name.upper():3}={segment['selector']:04x} {base} {segment['limit']:08x} {flags:08x}"
    if not sregs["cr0"] & PROTECTED or not segment["present"]:
        return line
    return f"{line} DPL={segment['dpl']} {_kind(segment, is_long)}"


def _descriptor(segment: Mapping[str, int]) -> int:
    """The upper half of its descriptor, without base and limit."""
    bits = {"type": 8, "s": 12, "dpl": 13, "present": 15, "avl": 20, "l": 21, "db": 22, "g": 23}
    return sum(segment[name] << at for name, at in bits.items())


def _kind(segment: Mapping[str, int], is_long: bool) -> str:
    kind = segment["type"]
    if not segment["s"]:
        return SYSTEM_TYPES[is_long].get(kind, "Reserved")
    accessed = "A" if kind & 1 else "-"
    if kind & 8:
        size = "CS64" if segment["l"] else "CS32" if segment["db"] else "CS16"
        return f"{size} [{'C' if kind & 4 else '-'}{'R' if kind & 2 else '-'}{accessed}]"
    size = "DS  " if segment["db"] or is_long else "DS16"
    return f"{size} [{'E' if kind & 4 else '-'}{'W' if kind & 2 else '-'}{accessed}]"


def _debug(vcpu: Vcpu) -> Iterator[str]:
    """struct kvm_debugregs begins with DR0 to DR3, DR6 and DR7."""
    words = vcpu.get_debugregs()
    values = [int.from_bytes(words[at : at + 8], "little") for at in range(0, 48, 8)]
    yield "".join(f"DR{number}={values[number]:016x} " for number in range(4))
    yield f"DR6={values[4]:016x} DR7={values[5]:016x}"
