"""Which bits of CPUID does a guest see on this host's KVM although they were cleared?

On VMX and SVM hosts CPUID exits to KVM, which answers as it was told.  Some hosts run guests without that exit and
serve leaves of their own: there a feature cannot be hidden, and a guest may use what its VMM does not serve.  So this
asks a guest: a throw-away VM, with every feature cleared, executes CPUID and stores the result.
"""

from __future__ import annotations

from contextlib import closing
from typing import Final, NamedTuple

from pvclock.guest_layout import PROBE_RESULT
from pvclock.kvm._system import Kvm
from pvclock.kvm.probe_vm import ProbeVm

__all__ = ["CpuidProbe", "probe_cpuid"]

RESULT_BYTES: Final = 16
REGISTERS: Final = ("eax", "ebx", "ecx", "edx")
HLT: Final = b"\xf4"

# The features of each leaf, subleaf 0, by register; not those that the CPU's state sets (OSXSAVE, OSPKE, APIC).
FEATURES: Final = {
    (1, "ecx"): 0xFFFFFFFF & ~(1 << 27),
    (1, "edx"): 0xFFFFFFFF & ~(1 << 9),
    (7, "ebx"): 0xFFFFFFFF,
    (7, "ecx"): 0xFFFFFFFF & ~(1 << 4),
    (7, "edx"): 0xFFFFFFFF,
    (0x80000007, "edx"): 0xFFFFFFFF,
}
LEAVES: Final = sorted({leaf for leaf, _ in FEATURES})

TSC_ADJUST: Final = 1 << 1
"""CPUID.7.0:EBX: IA32_TSC_ADJUST is there."""


class CpuidProbe(NamedTuple):
    """The features that a guest sees although its CPUID lacks them.

    ignored: the bits that stay set, by leaf (subleaf 0) and register; entries only where there are any.
    """

    ignored: dict[tuple[int, str], int]

    @property
    def is_honoured(self) -> bool:
        """Does a guest see the CPUID that is set?"""
        return not self.ignored

    @property
    def hides_tsc_adjust(self) -> bool:
        """Is IA32_TSC_ADJUST hidden from a guest whose CPUID lacks it?"""
        return not self.ignored.get((7, "ebx"), 0) & TSC_ADJUST

    def __str__(self) -> str:
        if self.is_honoured:
            return "a guest sees the CPUID that is set"
        bits = (f"{leaf:#x}:{register.upper()} {ignored:#x}" for (leaf, register), ignored in self.ignored.items())
        return f"CPUID not honoured by this host: not to be hidden are {', '.join(bits)}"


def probe_cpuid(kvm: Kvm) -> CpuidProbe:
    """Run such a guest; takes a few ms."""
    code = b"".join(_cpuid(leaf, RESULT_BYTES * i) for i, leaf in enumerate(LEAVES)) + HLT
    with closing(ProbeVm(kvm)) as vm:
        vm.vcpu.set_cpuid([_without_features(entry) for entry in kvm.get_supported_cpuid()])
        vm.run(code)
        seen = {key: _result(vm, *key) & features for key, features in FEATURES.items()}
    return CpuidProbe({key: bits for key, bits in seen.items() if bits})


def _without_features(entry: dict[str, int]) -> dict[str, int]:
    if entry["index"]:
        return entry
    hidden = {register: 0 for leaf, register in FEATURES if leaf == entry["function"]}
    return {**entry, **hidden}


def _cpuid(leaf: int, offset: int) -> bytes:
    """Real-mode code: CPUID of `leaf`, subleaf 0, with its four registers stored at PROBE_RESULT + offset."""
    code = b"\x66\xb8" + leaf.to_bytes(4, "little") + bytes.fromhex("6631c9 0fa2")  # mov $leaf, %eax; xor %ecx, %ecx
    for n, store in enumerate(("66a3", "66891e", "66890e", "668916")):  # mov %eax, ...; %ebx; %ecx; %edx
        code += bytes.fromhex(store) + (PROBE_RESULT + offset + 4 * n).to_bytes(2, "little")
    return code


def _result(vm: ProbeVm, leaf: int, register: str) -> int:
    return vm.result(RESULT_BYTES * LEAVES.index(leaf) + 4 * REGISTERS.index(register), 4)
