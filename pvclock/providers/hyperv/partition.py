"""What guest and hypervisor say of themselves: the guest's OS id, the hypercall page, VP indices, and the VM's reset.

Source: TLFS "Guest Identity", "Establishing the Hypercall Interface", "Virtual Processor Index", "Partition Reset";
Linux kvm_hv_set_msr_pw(), kvm_hv_hypercall_enabled().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final

from pvclock.errors import ConfigError, GuestAddressError, MsrFault
from pvclock.providers.guest_log import GuestLog
from pvclock.providers.hypercall_instructions import native_opcode
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.hyperv.msr import Msr
from pvclock.providers.hyperv.page_msr import PAGE_ADDRESS, PAGE_ENABLED
from pvclock.providers.hyperv.profiles import Profile
from pvclock.providers.hyperv.saved_numbers import saved_number
from pvclock.providers.interface import ClockServices, MsrValue, ResetServices, VcpuHost
from pvclock.timekeeping.events import EventKind

__all__ = ["HYPERCALL_PORT", "Partition"]

HV_X64_MSR_GUEST_OS_ID: Final = 0x40000000
HV_X64_MSR_HYPERCALL: Final = 0x40000001
HV_X64_MSR_VP_INDEX: Final = 0x40000002
HV_X64_MSR_RESET: Final = 0x40000003

RESET: Final = 1

HYPERCALL_PORT: Final = 0xE4
"""On /dev/kvm, where VMCALL does not exit: no device of a PC is there, and OUT reaches it without a register."""

OUT_IMM8_AL: Final = 0xE6
RET: Final = b"\xc3"


class Partition:
    """One VM's OS id and hypercall MSR, and how its vCPUs are numbered.

    cpu_vendor: of the guest's CPUs, as CPUID leaf 0 has it; ConfigError for one that has no hypercall instruction.
    """

    def __init__(self, clock: ClockServices, profile: Profile, cpu_vendor: str) -> None:
        self._clock, self._profile = clock, profile
        self._log = GuestLog(clock)
        self.opcode = native_opcode(cpu_vendor)
        """The CPU's hypercall instruction."""
        is_on_kvm = clock.vcpu_host is VcpuHost.KVM
        self._code = (bytes((OUT_IMM8_AL, HYPERCALL_PORT)) if is_on_kvm else self.opcode) + RET
        self.guest_os_id = self.hypercall_msr = 0
        self.msrs: dict[int, Msr] = {
            HV_X64_MSR_GUEST_OS_ID: Msr(Privilege.HYPERCALL, lambda _: self.guest_os_id, self._write_guest_os_id),
            HV_X64_MSR_HYPERCALL: Msr(Privilege.HYPERCALL, lambda _: self.hypercall_msr, self._write_hypercall),
            HV_X64_MSR_VP_INDEX: Msr(Privilege.VP_INDEX, lambda vcpu: vcpu),
        }
        vmm: object = clock.vmm
        if isinstance(vmm, ResetServices):
            self.msrs[HV_X64_MSR_RESET] = Msr(Privilege.RESET, lambda _: 0, partial(self._write_reset, vmm))

    @property
    def are_hypercalls_enabled(self) -> bool:
        """Has the guest said which system it is; by profile, has it also enabled its hypercall page?"""
        return bool(self.guest_os_id and (self.hypercall_msr & PAGE_ENABLED or not self._profile.hypercalls_need_page))

    def reset(self) -> None:
        """See Part."""
        self.guest_os_id = self.hypercall_msr = 0

    def save(self) -> Mapping[str, MsrValue]:
        """See Part."""
        return {"guest_os_id": self.guest_os_id, "hypercall": self.hypercall_msr}

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """See Part; an enabled page is written again, for what runs the guest here may have another instruction."""
        guest_os_id, hypercall = saved_number(saved, "guest_os_id"), saved_number(saved, "hypercall")
        if hypercall & PAGE_ENABLED and not guest_os_id:
            raise ConfigError("provider 'HyperV', 'hypercall': enabled, while 'guest_os_id' is 0, which disables it")

        def adopt() -> None:
            self.guest_os_id, self.hypercall_msr = guest_os_id, hypercall
            if hypercall & PAGE_ENABLED:
                with suppress(GuestAddressError):  # its memory may have gone
                    self._clock.memory.write(hypercall & PAGE_ADDRESS, self._code)

        return adopt

    def _write_guest_os_id(self, vcpu: int, value: int) -> None:
        self.guest_os_id = value
        if not value:
            self.hypercall_msr &= ~PAGE_ENABLED
        elif self._profile.tells_of_guest_os:
            self._log(EventKind.GUEST_OS, described_os_id(value))

    def _write_hypercall(self, vcpu: int, value: int) -> None:
        """Without an OS id nothing can be enabled; by profile, not even written."""
        if self.guest_os_id and value & PAGE_ENABLED:
            self._put_page(value)
        if self.guest_os_id:
            self.hypercall_msr = value
        elif self._profile.keeps_refused_address:
            self.hypercall_msr = value & ~PAGE_ENABLED

    def _put_page(self, value: int) -> None:
        try:
            self._clock.memory.write(value & PAGE_ADDRESS, self._code)
        except GuestAddressError as error:
            if self._profile.keeps_refused_address:
                self.hypercall_msr = value & ~PAGE_ENABLED
            raise MsrFault(HV_X64_MSR_HYPERCALL, value, str(error)) from None

    def _write_reset(self, vmm: ResetServices, vcpu: int, value: int) -> None:
        if value & RESET if self._profile.resets_by_bit else value == RESET:
            vmm.request_reset()


def described_os_id(value: int) -> str:
    """The fields of an OS id, in words."""
    source = "open source" if value >> 63 else "proprietary"
    vendor, system, service, build = value >> 48 & 0x7FFF, value >> 40 & 0xFF, value >> 16 & 0xFF, value & 0xFFFF
    version = f"version {value >> 32 & 0xFF}.{value >> 24 & 0xFF}, service pack {service}, build {build}"
    return f"guest OS id {value:#x}: {source}, vendor {vendor:#x}, system {system:#x}, {version}"
