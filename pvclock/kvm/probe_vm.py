"""A throw-away VM that runs a few bytes of code, to test what this host's KVM does rather than what it reports."""

from __future__ import annotations

import mmap
from typing import Final

from pvclock.guest_layout import IDENTITY_MAP, PROBE_CODE, PROBE_RESULT, TSS
from pvclock.kvm._system import Kvm
from pvclock.kvm.exits import Interrupted

__all__ = ["ProbeVm"]

RAM_PAGES: Final = 4


class ProbeVm:
    """One vCPU in real mode, `vcpu`, and 16 KiB of RAM, without interrupt controllers: HLT is an exit."""

    def __init__(self, kvm: Kvm) -> None:
        self._ram = mmap.mmap(-1, RAM_PAGES * mmap.PAGESIZE)
        self._vm = kvm.create_vm()
        self._vm.set_tss_addr(TSS)
        self._vm.set_identity_map_addr(IDENTITY_MAP)
        self._vm.set_user_memory_region(0, 0, self._ram)
        self.vcpu = self._vm.create_vcpu(0)
        sregs = self.vcpu.get_sregs()
        sregs["cs"].update(base=0, selector=0)
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs({**self.vcpu.get_regs(), "rip": PROBE_CODE, "rflags": 2})

    def run(self, code: bytes) -> None:
        """Run real-mode `code` to its HLT, or whatever else it exits by."""
        self._ram[PROBE_CODE : PROBE_CODE + len(code)] = code
        while isinstance(self.vcpu.run(), Interrupted):
            pass

    def result(self, offset: int, length: int) -> int:
        """The little-endian number of `length` bytes that the guest left at PROBE_RESULT + offset."""
        return int.from_bytes(self._ram[PROBE_RESULT + offset : PROBE_RESULT + offset + length], "little")

    def close(self) -> None:
        """Close vCPU and VM; the memory goes with this object.  May be called twice."""
        self.vcpu.close()
        self._vm.close()
