"""The script of msr_script.py on a real vCPU whose Hyper-V interface its host's kernel serves, and on the engine's.

Both guests have the same privileges and features in CPUID, and the kernel is told to hold its guest to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple, TypeAlias

from pvclock import GuestMemory, Machine
from pvclock.kvm import Runner
from pvclock.kvm.exits import Exit, IoOut, UnknownExit
from pvclock.machine.cpuid import KernelClock, guest_cpuid
from pvclock.providers.hyperv.features import Feature, Privilege
from pvclock.providers.interface import CpuidLeaf
from tests.kvm.guests import CODE, HLT, RAM_BYTES, Bare, bare_vm
from tests.kvm.msr_script import LOG, RECORD, Access, Await, Trace, code_of, install_handlers, traces_of
from tests.waiting import HANG_S

NEEDED: Final = (
    "KVM_CAP_HYPERV_TIME",
    "KVM_CAP_HYPERV_SYNIC",
    "KVM_CAP_HYPERV_ENFORCE_CPUID",
    "KVM_CAP_SYS_HYPERV_CPUID",
)
"""Capabilities of a kernel that is compared."""

COUNTER: Final = 0x40000020
CRASH_CTL: Final = 0x40000105
CRASH_NOTIFY: Final = 1 << 63

PRIVILEGES: Final = (
    (Privilege.TIME_REF_COUNT | Privilege.REFERENCE_TSC | Privilege.FREQUENCY | Privilege.REENLIGHTENMENT)
    | (Privilege.SYNIC | Privilege.SYNTHETIC_TIMERS)
    | (Privilege.HYPERCALL | Privilege.VP_INDEX | Privilege.RESET)
)
FEATURES: Final = Feature.FREQUENCY | Feature.CRASH | Feature.DIRECT_TIMERS
"""What both offer, of what Linux 6.1 and the engine on /dev/kvm can serve."""

KVM_EXIT_HYPERV: Final = 27
"""KVM tells user space of a SynIC's MSRs, and has served them by itself."""


class KernelHyperV(NamedTuple):
    """The CPUID of a guest whose Hyper-V interface is the kernel's; see CpuidSource."""

    cpuid_leaves: Mapping[int, CpuidLeaf]

    def patch_cpuid(self, leaf: int, subleaf: int, registers: CpuidLeaf) -> CpuidLeaf:
        """See CpuidSource."""
        return KernelClock(0).patch_cpuid(leaf, subleaf, registers)


LEAVES: Final = {
    0x40000000: CpuidLeaf(0x40000005, *(int.from_bytes(word, "little") for word in (b"Micr", b"osof", b"t Hv"))),
    0x40000001: CpuidLeaf(int.from_bytes(b"Hv#1", "little")),
    0x40000002: CpuidLeaf(),
    0x40000003: CpuidLeaf(int(PRIVILEGES), 0, 0, int(FEATURES)),
    0x40000004: CpuidLeaf(0, 0xFFFFFFFF),
    0x40000005: CpuidLeaf(),
}


Script: TypeAlias = Sequence[Access | Await] | Callable[[int], Sequence[Access | Await]]
"""Steps, or what makes them of the reference time at which the guest is about to start."""


def on_kernel(script: Script) -> list[Trace]:
    """What became of each step with the kernel's Hyper-V."""
    with kernel_vm() as bare, GuestMemory(bare.ram) as memory:
        count = _put(memory, script, bare.vcpus[0].get_msr(COUNTER))
        with Runner(bare.vcpus, _handle) as runner:
            assert runner.join(HANG_S), "the guest does not end"
        return traces_of(memory.read(LOG, RECORD.size * count))


def on_engine(script: Script, *, tick_interval_s: float | None = None) -> list[Trace]:
    """What became of each step with the engine's."""
    options = {"provider": "HyperV", "privileges": int(PRIVILEGES), "features": int(FEATURES)}
    with Machine(HLT, memory_bytes=RAM_BYTES, tick_interval_s=tick_interval_s, **options) as machine:  # type: ignore[arg-type]
        count = _put(machine.memory, script, machine.clock_service.read_msr(0, COUNTER))
        machine.start()
        machine.wait(HANG_S)
        return traces_of(machine.memory.read(LOG, RECORD.size * count))


@contextmanager
def kernel_vm() -> Iterator[Bare]:
    """A VM whose Hyper-V interface the kernel serves, as QEMU asks it to."""
    with bare_vm(HLT, irqchip=True) as bare:
        (vcpu,) = bare.vcpus
        vcpu.set_cpuid(guest_cpuid(bare.kvm, 0, KernelHyperV(LEAVES)))
        vcpu.enable_cap("KVM_CAP_HYPERV_ENFORCE_CPUID", 1)
        vcpu.enable_cap("KVM_CAP_HYPERV_SYNIC", 0)
        vcpu.set_msr(CRASH_CTL, CRASH_NOTIFY)
        yield bare


def _put(memory: GuestMemory, script: Script, now: int) -> int:
    """Put the guest's program into its memory; returns how many steps it has."""
    steps = script(now) if callable(script) else script
    memory.write(CODE, code_of(steps))
    install_handlers(memory.write)
    return len(steps)


def _handle(_vcpu: int, reason: Exit) -> bool:
    assert isinstance(reason, IoOut) or reason == UnknownExit(KVM_EXIT_HYPERV), reason
    return not isinstance(reason, IoOut)
