"""APIC registers as MSRs, for guests whose APIC the VMM emulates, and the virtual processor assist page.

Source: TLFS "Virtual Interrupt Controller", "Virtual Processor Assist Page"; Linux kvm_hv_vapic_msr_write(),
kvm_hv_set_msr().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from pvclock.errors import GuestAddressError, MsrFault
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.hyperv.msr import Msr
from pvclock.providers.hyperv.page_msr import PAGE_ADDRESS, PAGE_BYTES, PAGE_ENABLED
from pvclock.providers.hyperv.saved_numbers import saved_numbers
from pvclock.providers.interface import ApicServices, ClockServices, MsrValue

__all__ = ["ApicMsrs"]

MSR_EOI: Final = 0x40000070
MSR_ICR: Final = 0x40000071
MSR_TPR: Final = 0x40000072
MSR_VP_ASSIST_PAGE: Final = 0x40000073

LOW: Final = 0xFFFFFFFF
PRIORITY: Final = 0xFF
APIC_ASSIST_BYTES: Final = 4


class ApicMsrs:
    """EOI, ICR and TPR of every vCPU's APIC, which `vmm` has, and where its assist page is.

    The rest is VirtualBox's.  assist_page_is_zeroed: enabling zeroes the page, and not just its word for the APIC, so
    that the rest survives a migration.  assist_page_faults: reads of its MSR, and writes that do not enable it, are
    #GP; the value is stored all the same.
    """

    def __init__(
        self,
        clock: ClockServices,
        vcpus: int,
        vmm: ApicServices,
        *,
        assist_page_is_zeroed: bool = False,
        assist_page_faults: bool = False,
    ) -> None:
        self._memory, self._vcpus, self._vmm = clock.memory, vcpus, vmm
        self._zeroed_bytes = PAGE_BYTES if assist_page_is_zeroed else APIC_ASSIST_BYTES
        self._assist_page_faults = assist_page_faults
        self.reset()
        self.msrs: Mapping[int, Msr] = {
            MSR_EOI: Msr(Privilege.APIC, None, self._write_eoi),
            MSR_ICR: Msr(Privilege.APIC, vmm.read_icr, vmm.write_icr),
            MSR_TPR: Msr(Privilege.APIC, vmm.read_tpr, self._write_tpr),
            MSR_VP_ASSIST_PAGE: Msr(
                Privilege.APIC, None if assist_page_faults else self._read_assist_page, self._write_assist_page
            ),
        }

    def _write_eoi(self, vcpu: int, value: int) -> None:
        _check_width(MSR_EOI, value)
        self._vmm.end_interrupt(vcpu)

    def _write_tpr(self, vcpu: int, value: int) -> None:
        _check_width(MSR_TPR, value)
        self._vmm.write_tpr(vcpu, value & PRIORITY)

    def _read_assist_page(self, vcpu: int) -> int:
        return self._assist_page[vcpu]

    def _write_assist_page(self, vcpu: int, value: int) -> None:
        if self._assist_page_faults:
            self._assist_page[vcpu] = value
            if not value & PAGE_ENABLED:
                raise MsrFault(MSR_VP_ASSIST_PAGE, value, "VirtualBox has no success for this")
        if value & PAGE_ENABLED:
            self._zero(value)
        self._assist_page[vcpu] = value

    def _zero(self, value: int) -> None:
        gpa = value & PAGE_ADDRESS
        try:
            self._memory.write(gpa, bytes(self._zeroed_bytes))
        except GuestAddressError:
            raise MsrFault(MSR_VP_ASSIST_PAGE, value, "there is no page of memory") from None

    # Life

    def reset(self) -> None:
        """No assist page; the APIC is the VMM's to reset."""
        self._assist_page = [0] * self._vcpus

    def save(self) -> Mapping[str, MsrValue]:
        """Where the assist pages are; the APIC is the VMM's to save."""
        return {"vp_assist_page": tuple(self._assist_page)}

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """See Part."""
        return partial(self._adopt, saved_numbers(saved, "vp_assist_page", self._vcpus))

    def _adopt(self, assist_page: list[int]) -> None:
        self._assist_page = assist_page


def _check_width(index: int, value: int) -> None:
    if value > LOW:
        raise MsrFault(index, value, "the register has 32 bits")
