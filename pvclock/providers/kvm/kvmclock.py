"""The clock itself: the system-time and wall-clock MSRs.

Source: kvm_write_system_time(), kvm_write_wall_clock(); Documentation/virt/kvm/x86/msr.rst.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from pvclock.errors import MsrFault
from pvclock.providers.interface import ClockServices
from pvclock.providers.kvm.features import (
    MSR_KVM_SYSTEM_TIME,
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK,
    MSR_KVM_WALL_CLOCK_NEW,
)
from pvclock.providers.kvm.profiles import Profile
from pvclock.providers.kvm.registers import Msr, Register
from pvclock.quantities import NS_PER_S, Gpa

__all__ = ["KvmClock"]

ENABLED: Final = 1
PAGE_BYTES: Final = 4096
TIME_INFO_BYTES: Final = 32
WALL_CLOCK: Final = Struct("<III")  # version, sec, nsec
VERSION: Final = Struct("<I")
ALIGNMENT: Final = 4


class KvmClock:
    """Where the guest wants its clock, and how that is handed to `clock`."""

    def __init__(self, clock: ClockServices, vcpus: int, profile: Profile) -> None:
        self._clock, self._vcpus, self._profile = clock, vcpus, profile
        self._system_time = Register("system_time", vcpus)
        self._wall_clock = Register("wall_clock", None)
        self._boot_vcpu_runs_old_kvmclock = Register("boot_vcpu_runs_old_kvmclock", None, flag=True)
        self._version = Register("time_page_version", vcpus, legal=lambda version: version < 1 << 32)
        system_time = Msr(self._system_time, self._write_system_time)
        wall_clock = Msr(self._wall_clock, self._write_wall_clock)
        self.msrs = {
            MSR_KVM_SYSTEM_TIME: system_time,
            MSR_KVM_SYSTEM_TIME_NEW: system_time,
            MSR_KVM_WALL_CLOCK: wall_clock,
            MSR_KVM_WALL_CLOCK_NEW: wall_clock,
        }
        registers = (self._system_time, self._wall_clock, self._boot_vcpu_runs_old_kvmclock)
        self.registers = (*registers, self._version) if profile.keeps_own_version else registers

    @property
    def boot_vcpu_runs_old_kvmclock(self) -> bool:
        """Did vCPU 0 write the old system-time MSR last?  Readers of that time expect frequent timestamps."""
        return bool(self._boot_vcpu_runs_old_kvmclock[0])

    def take_pages_back(self) -> None:
        """Leave every page as it is from now on."""
        for vcpu in range(self._vcpus):
            self._clock.place_time_page(vcpu, None)

    # System time

    def _write_system_time(self, vcpu: int, index: int, value: int) -> None:
        gpa = value & ~ENABLED if value & ENABLED else None
        if gpa is not None and self._profile.time_page_must_be_good:
            self._check(index, value, gpa, TIME_INFO_BYTES)
        if vcpu == 0:
            self._boot_vcpu_runs_old_kvmclock[0] = index == MSR_KVM_SYSTEM_TIME
        self._system_time[vcpu] = value
        if gpa is None:
            self._disable(vcpu)
        elif not self._profile.bad_page_keeps_old:
            self._place_where_there_is_memory(vcpu, Gpa(gpa))
        elif gpa % PAGE_BYTES + TIME_INFO_BYTES <= PAGE_BYTES:
            self._clock.place_time_page(vcpu, Gpa(gpa))
        else:
            # Linux refuses a page-crossing address before it looks at the old one, which stays in use.
            self._clock.refresh(vcpu)

    def _place_where_there_is_memory(self, vcpu: int, gpa: Gpa) -> None:
        """Unlike Linux, do not wait for memory to come: enabling fails, though the MSR reads back (trap T6)."""
        if not self._clock.memory.contains(gpa, TIME_INFO_BYTES):
            self._clock.place_time_page(vcpu, None)
            return
        if self._profile.keeps_own_version:
            # A publish adds 2 to what is there.
            self._clock.memory.write(gpa, VERSION.pack(self._version[vcpu]))
            self._version[vcpu] = (self._version[vcpu] + 2) % (1 << 32)
        self._clock.place_time_page(vcpu, gpa)

    def _disable(self, vcpu: int) -> None:
        if self._profile.stops_all_pages:
            self.take_pages_back()
        else:
            self._clock.place_time_page(vcpu, None)

    # Wall clock

    def _write_wall_clock(self, vcpu: int, index: int, value: int) -> None:
        # No enable bit and no mask: the value is the address.
        if self._profile.wall_clock_must_be_good:
            self._check(index, value, value, WALL_CLOCK.size)
        self._wall_clock[vcpu] = value
        if self._profile.wall_clock_is_now:
            self._write_time_of_day(vcpu, Gpa(value))
        elif value:
            self._clock.write_wall_clock(Gpa(value))

    def _write_time_of_day(self, vcpu: int, gpa: Gpa) -> None:
        """Write UTC at this moment: a guest that adds its own time is ahead by its uptime (trap T3)."""
        now = self._clock.pairing(vcpu)
        if now is None:
            self._clock.write_wall_clock(gpa)  # UTC at an instant of the TSC is only known where the TSC can be trusted
            return
        memory = self._clock.memory
        (version,) = VERSION.unpack(memory.read(gpa, VERSION.size))
        sec, nsec = divmod(now.real_ns, NS_PER_S)
        memory.write(gpa, WALL_CLOCK.pack(((version | 1) + 1) % (1 << 32), sec % (1 << 32), nsec))

    def _check(self, index: int, value: int, gpa: int, length: int) -> None:
        if gpa % ALIGNMENT:
            raise MsrFault(index, value, f"the address must be {ALIGNMENT}-byte aligned")
        if not self._clock.memory.contains(gpa, length):
            raise MsrFault(index, value, f"there are no {length} bytes of memory")
