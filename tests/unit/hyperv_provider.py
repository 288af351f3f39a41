"""Hyper-V providers to test, on a clock that stands still, and the numbers that tests know of the interface."""

from __future__ import annotations

from typing import Final

import pytest

from pvclock import GuestMemory, MsrFault
from pvclock.providers.hyperv import HyperVProvider
from pvclock.providers.interface import VcpuHost, VmmServices
from tests.unit.stub_clock import GUARD, SIZE, NotedVmm, StubClock
from tests.unit.test_hyperv_apic import NotedApic

__all__ = ["EVERY_PROFILE", "LEAF", "OS_ID", "KickingVmm", "a_provider", "full_vmm", "is_refused", "written_pages"]

PAGE_BYTES: Final = 4096
LEAF: Final = 0x40000000
OS_ID: Final = 0x8100_0005_0A00_0000  # open source, Linux 5.10


class KickingVmm:
    """A VMM that has what KVM's hypercalls need, and neither interrupts nor resets."""

    def kick(self, apic_id: int) -> None:
        """Nobody is woken."""

    def yield_to(self, apic_id: int) -> None:
        """Nobody runs."""

    def send_ipi(self, apic_ids: list[int], icr: int) -> int:
        """Nobody gets it."""
        return 0


def full_vmm() -> NotedVmm:
    """A VMM that also emulates APICs: nothing that the interface has is missing."""
    vmm, apic = NotedVmm(), NotedApic()
    for name in ("end_interrupt", "read_icr", "write_icr", "read_tpr", "write_tpr"):
        setattr(vmm, name, getattr(apic, name))
    return vmm


def a_provider(
    *,
    vcpus: int = 2,
    clock: StubClock | None = None,
    vmm: VmmServices | None = None,
    vcpu_host: VcpuHost = VcpuHost.EMULATOR,
    **options: object,
) -> tuple[HyperVProvider, StubClock]:
    """A provider and its clock; by default with a VMM that notes interrupts and resets."""
    clock = clock or StubClock(vcpus, vmm=NotedVmm() if vmm is None else vmm, vcpu_host=vcpu_host)
    return HyperVProvider(clock, vcpus, **options), clock  # type: ignore[arg-type]  # a test's own choice


def is_refused(provider: HyperVProvider, index: int, value: int | None = None, vcpu: int = 0) -> bool:
    """True if that read, or write of `value`, is #GP."""
    try:
        if value is None:
            provider.read_msr(vcpu, index)
        else:
            provider.write_msr(vcpu, index, value)
    except MsrFault as fault:
        return (fault.index, fault.value) == (index, value)
    return False


def written_pages(memory: GuestMemory) -> list[int]:
    """The pages in which guard bytes are gone."""
    untouched = bytes([GUARD]) * PAGE_BYTES
    return [gpa for gpa in range(0, SIZE, PAGE_BYTES) if memory.read(gpa, PAGE_BYTES) != untouched]


EVERY_PROFILE: Final = pytest.mark.parametrize("profile", ["linux", "document", "virtualbox"])
