"""Where a guest crashed: its registers, and the code at its RIP, as far as that is in memory."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from pvclock._memory import GuestMemory
from pvclock.errors import GuestAddressError, KvmError
from pvclock.kvm import Vcpu

__all__ = ["CrashSite", "find_site"]

CODE_BYTES: Final = 16
"""To either side: an instruction has 15 at most."""
PAGE_BYTES: Final = 4096
EFER_LMA: Final = 1 << 10
LINEAR_END: Final = 1 << 64
LINEAR_END_32: Final = 1 << 32
CONTROL_REGISTERS: Final = ("cr0", "cr2", "cr3", "cr4", "efer")


class CrashSite(NamedTuple):
    """registers: the general ones, rip, rflags, the control registers and efer, and cs and cs_base.

    linear: RIP's linear address.  code, before: what is in memory from there on, and in front of it, up to 16 bytes.

    After a triple fault a CPU of AMD's has the registers that a reset gives it.
    """

    registers: dict[str, int]
    linear: int
    before: bytes
    code: bytes

    def __str__(self) -> str:
        if not self.code:
            return f"there is no code in memory at {self.linear:#x}"
        around = (self.before.hex(" "), f"<{self.code[:1].hex()}>", self.code[1:].hex(" "))
        return f"code at {self.linear:#x}: {' '.join(filter(None, around))}"


def find_site(vcpu: Vcpu, memory: GuestMemory) -> CrashSite | None:
    """Where `vcpu`, which is out of the guest, stands; None where KVM does not tell its registers."""
    try:
        registers, sregs = vcpu.get_regs(), vcpu.get_sregs()
    except KvmError:
        return None
    registers |= {name: sregs[name] for name in CONTROL_REGISTERS}
    registers |= {"cs": sregs["cs"]["selector"], "cs_base": sregs["cs"]["base"]}
    linear = _linear_rip(registers["rip"], sregs)
    code = _read(vcpu, memory, linear, CODE_BYTES)
    return CrashSite(registers, linear, _read_up_to(vcpu, memory, linear) if code else b"", code)


def _linear_rip(rip: int, sregs: dict[str, Any]) -> int:
    if sregs["efer"] & EFER_LMA and sregs["cs"]["l"]:  # 64-bit mode has no segment bases for code
        return rip
    return int(sregs["cs"]["base"] + rip) % LINEAR_END_32


def _read_up_to(vcpu: Vcpu, memory: GuestMemory, linear: int) -> bytes:
    """What is in front of `linear`: of its own page only, where the one before is not in memory."""
    start = max(linear - CODE_BYTES, 0)
    before = _read(vcpu, memory, start, linear - start)
    if len(before) == linear - start:
        return before
    return _read(vcpu, memory, linear - linear % PAGE_BYTES, linear % PAGE_BYTES)


def _read(vcpu: Vcpu, memory: GuestMemory, linear: int, length: int) -> bytes:
    """What the vCPU's page tables have at `linear`, up to the first page that is not in memory."""
    found = b""
    end = min(linear + length, LINEAR_END)
    while linear < end:
        part = min(end, (linear // PAGE_BYTES + 1) * PAGE_BYTES) - linear
        try:
            gpa = vcpu.translate(linear)
            if gpa is None:
                break
            found += memory.read(gpa, part)
        except (KvmError, GuestAddressError):
            break
        linear += part
    return found
