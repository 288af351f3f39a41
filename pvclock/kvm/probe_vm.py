"""A throw-away VM that runs a few bytes of code, to see what this host's KVM does rather than what it says."""

from __future__ import annotations

import mmap
from typing import Final

from pvclock.kvm._ioctls import Kvm
from pvclock.kvm.exits import Interrupted

__all__ = ["RESULT_GPA", "ProbeVm"]

CODE_GPA: Final = 0x1000
RESULT_GPA: Final = 0x2000
RAM_PAGES: Final = 4
IDENTITY_MAP_GPA: Final = 0xFFFBC000  # with three pages for the TSS behind it: VMX needs them for real mode
TSS_GPA: Final = 0xFFFBD000


class ProbeVm:
    """One vCPU in real mode, `vcpu`, and 16 KiB of RAM, without interrupt controllers: HLT is an exit."""

    def __init__(self, kvm: Kvm) -> None:
        self._ram = mmap.mmap(-1, RAM_PAGES * mmap.PAGESIZE)
        self._vm = kvm.create_vm()
        self._vm.set_tss_addr(TSS_GPA)
        self._vm.set_identity_map_addr(IDENTITY_MAP_GPA)
        self._vm.set_user_memory_region(0, 0, self._ram)
        self.vcpu = self._vm.create_vcpu(0)
        sregs = self.vcpu.get_sregs()
        sregs["cs"].update(base=0, selector=0)
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs({**self.vcpu.get_regs(), "rip": CODE_GPA, "rflags": 2})

    def run(self, code: bytes) -> None:
        """Run real-mode `code` to its HLT, or whatever else it exits by."""
        self._ram[CODE_GPA : CODE_GPA + len(code)] = code
        while isinstance(self.vcpu.run(), Interrupted):
            pass

    def result(self, offset: int, length: int) -> int:
        """The little-endian number of `length` bytes that the guest left at RESULT_GPA + offset."""
        return int.from_bytes(self._ram[RESULT_GPA + offset : RESULT_GPA + offset + length], "little")

    def close(self) -> None:
        """Close vCPU and VM; the memory goes with this object.  May be called twice."""
        self.vcpu.close()
        self._vm.close()
