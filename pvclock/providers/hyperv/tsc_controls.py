"""What the guest is told of its TSC: frequencies, re-enlightenment after a migration, and the TSC-invariant control.

Source: TLFS "Partition Reference Time Enlightenment", "Partition TSC Frequency"; Linux kvm_hv_set_msr_pw().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from pvclock.errors import MsrFault
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.hyperv.msr import Msr, checked_number
from pvclock.providers.interface import ClockServices, InterruptServices, MsrValue

__all__ = ["Frequencies", "InvariantTsc", "Reenlightenment"]

HV_X64_MSR_TSC_FREQUENCY: Final = 0x40000022
HV_X64_MSR_APIC_FREQUENCY: Final = 0x40000023
HV_X64_MSR_REENLIGHTENMENT_CONTROL: Final = 0x40000106
HV_X64_MSR_TSC_EMULATION_CONTROL: Final = 0x40000107
HV_X64_MSR_TSC_EMULATION_STATUS: Final = 0x40000108
HV_X64_MSR_TSC_INVARIANT_CONTROL: Final = 0x40000118

INTERRUPT_ENABLED: Final = 1 << 16
FIRST_VECTOR: Final = 16
EXPOSE_INVARIANT_TSC: Final = 1


class Frequencies:
    """The frequencies of TSC and APIC timer, in Hz."""

    def __init__(self, tsc_hz: int, apic_bus_hz: int) -> None:
        self.msrs: Mapping[int, Msr] = {
            HV_X64_MSR_TSC_FREQUENCY: Msr(Privilege.FREQUENCY, lambda _: tsc_hz),
            HV_X64_MSR_APIC_FREQUENCY: Msr(Privilege.FREQUENCY, lambda _: apic_bus_hz),
        }

    def reset(self) -> None:
        """There is no state."""

    def save(self) -> Mapping[str, MsrValue]:
        """There is no state."""
        return {}

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """There is no state."""
        return lambda: None


class Reenlightenment:
    """An interrupt for the guest once its TSC has another frequency than it was told; after a restore, that is.

    RDTSC is not emulated at the old frequency meanwhile, whatever TSC_EMULATION_CONTROL says: the reference TSC page is
    right at once, and only a guest that has computed with the frequency needs the interrupt.
    """

    def __init__(self, clock: ClockServices, vcpus: int, vmm: InterruptServices) -> None:
        self._clock, self._vcpus, self._vmm = clock, vcpus, vmm
        self._is_due = False
        self.reset()
        self.msrs: Mapping[int, Msr] = {
            HV_X64_MSR_REENLIGHTENMENT_CONTROL: _served(lambda _: self.control, self._write_control),
            HV_X64_MSR_TSC_EMULATION_CONTROL: _served(lambda _: self.emulation, self._write_emulation),
            HV_X64_MSR_TSC_EMULATION_STATUS: _served(lambda _: 0, self._write_status),
        }

    def reset(self) -> None:
        """See Part."""
        self.control = self.emulation = 0
        self._is_due = False

    def save(self) -> Mapping[str, MsrValue]:
        """See Part."""
        return {"reenlightenment_control": self.control, "tsc_emulation_control": self.emulation}

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """See Part; the interrupt gets due if this host's TSC is another one."""
        control = checked_number(saved, "reenlightenment_control")
        emulation = checked_number(saved, "tsc_emulation_control")

        def adopt() -> None:
            self.control, self.emulation = control, emulation
            self._is_due = bool(control & INTERRUPT_ENABLED) and self._clock.host_tsc_hz != self._clock.tsc_hz

        return adopt

    def next_due_ns(self) -> int | None:
        """See TimedPart."""
        return 0 if self._is_due else None

    def expire(self, now_ns: int) -> Callable[[], object] | None:
        """See TimedPart; a vector or vCPU that cannot be gets nothing."""
        is_due, self._is_due = self._is_due, False
        vector, vcpu = self.control & 0xFF, self.control >> 32
        if not is_due or vector < FIRST_VECTOR or vcpu >= self._vcpus:
            return None
        return partial(self._vmm.inject, vcpu, vector)

    def _write_control(self, vcpu: int, value: int) -> None:
        self.control = value

    def _write_emulation(self, vcpu: int, value: int) -> None:
        self.emulation = value

    def _write_status(self, vcpu: int, value: int) -> None:
        if value:
            raise MsrFault(HV_X64_MSR_TSC_EMULATION_STATUS, value, "only 0 can be written")


class InvariantTsc:
    """The guest's consent to an invariant TSC: until it writes 1, CPUID does not show that it has one."""

    def __init__(self) -> None:
        self.control = 0
        self.msrs: Mapping[int, Msr] = {
            HV_X64_MSR_TSC_INVARIANT_CONTROL: Msr(Privilege.TSC_INVARIANT, lambda _: self.control, self._write)
        }

    def reset(self) -> None:
        """See Part."""
        self.control = 0

    def save(self) -> Mapping[str, MsrValue]:
        """See Part."""
        return {"tsc_invariant_control": self.control}

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """See Part."""
        control = checked_number(saved, "tsc_invariant_control", lambda value: value <= EXPOSE_INVARIANT_TSC)
        return partial(setattr, self, "control", control)

    def _write(self, vcpu: int, value: int) -> None:
        if value & ~EXPOSE_INVARIANT_TSC:
            raise MsrFault(HV_X64_MSR_TSC_INVARIANT_CONTROL, value, "bits 1 to 63 are reserved")
        if value < self.control:
            raise MsrFault(HV_X64_MSR_TSC_INVARIANT_CONTROL, value, "the guest cannot take it back")
        self.control = value


def _served(read: Callable[[int], int], write: Callable[[int, int], object]) -> Msr:
    return Msr(Privilege.REENLIGHTENMENT, read, write)
