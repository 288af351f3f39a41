"""What the guest is told of its TSC: frequencies, re-enlightenment after a migration, and the TSC-invariant control.

Source: TLFS "Partition Reference Time Enlightenment", "Partition TSC Frequency"; Linux kvm_hv_set_msr_pw().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from pvclock.errors import MsrFault
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.hyperv.msr import Msr
from pvclock.providers.hyperv.saved_numbers import saved_number
from pvclock.providers.hyperv.synic import FIRST_VECTOR
from pvclock.providers.interface import ClockServices, InterruptServices, MsrValue
from pvclock.timekeeping.events import EventKind

__all__ = ["Frequencies", "InvariantTsc", "Reenlightenment"]

HV_X64_MSR_TSC_FREQUENCY: Final = 0x40000022
HV_X64_MSR_APIC_FREQUENCY: Final = 0x40000023
HV_X64_MSR_REENLIGHTENMENT_CONTROL: Final = 0x40000106
HV_X64_MSR_TSC_EMULATION_CONTROL: Final = 0x40000107
HV_X64_MSR_TSC_EMULATION_STATUS: Final = 0x40000108
HV_X64_MSR_TSC_INVARIANT_CONTROL: Final = 0x40000118

INTERRUPT_ENABLED: Final = 1 << 16
IN_PROGRESS: Final = 1
EXPOSE_INVARIANT_TSC: Final = 1


class Frequencies:
    """The frequencies of TSC and APIC timer, in Hz, as the guest is told.

    tsc_hz: the same wherever the VM is restored, but for a guest with Reenlightenment, which saves and changes it.
    """

    def __init__(self, tsc_hz: int, apic_bus_hz: int) -> None:
        self.tsc_hz = tsc_hz
        self.msrs: Mapping[int, Msr] = {
            HV_X64_MSR_TSC_FREQUENCY: Msr(Privilege.FREQUENCY, lambda _: self.tsc_hz),
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
    """Tells a guest that asked for it, after a restore, that its TSC has another frequency than it was told last.

    From that restore on it is told this host's frequency, and the status says "in progress" until it writes 0.  Linux
    reads that status at the interrupt, writes the 0, and reads the frequency anew.

    RDTSC is not emulated at the old frequency meanwhile, whatever TSC_EMULATION_CONTROL says: the reference TSC page is
    right at once, and only a guest that has computed with the frequency needs the interrupt.
    """

    def __init__(self, clock: ClockServices, vcpus: int, vmm: InterruptServices, frequencies: Frequencies) -> None:
        self._clock, self._vcpus, self._vmm, self._told = clock, vcpus, vmm, frequencies
        self.reset()
        self.msrs: Mapping[int, Msr] = {
            HV_X64_MSR_REENLIGHTENMENT_CONTROL: _served(lambda _: self.control, self._write_control),
            HV_X64_MSR_TSC_EMULATION_CONTROL: _served(lambda _: self.emulation, self._write_emulation),
            HV_X64_MSR_TSC_EMULATION_STATUS: _served(lambda _: self.status, self._write_status),
        }

    def reset(self) -> None:
        """See Part; the frequency stays the one that was told last."""
        self.control = self.emulation = self.status = 0
        self._is_due = False

    def save(self) -> Mapping[str, MsrValue]:
        """See Part."""
        return {
            "reenlightenment_control": self.control,
            "tsc_emulation_control": self.emulation,
            "tsc_emulation_status": self.status,
            "told_tsc_hz": self._told.tsc_hz,
        }

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """See Part; the interrupt gets due if this host's TSC is another one, or the last was not acted on."""
        control = saved_number(saved, "reenlightenment_control")
        emulation = saved_number(saved, "tsc_emulation_control")
        status = saved_number(saved, "tsc_emulation_status", lambda value: value <= IN_PROGRESS)
        told_hz = saved_number(saved, "told_tsc_hz", bool)

        def adopt() -> None:
            is_enabled, host_hz = bool(control & INTERRUPT_ENABLED), self._clock.host_tsc_hz
            is_news = is_enabled and told_hz != host_hz
            self.control, self.emulation = control, emulation
            self.status, self._told.tsc_hz = (IN_PROGRESS, host_hz) if is_news else (status, told_hz)
            self._is_due = is_enabled and self.status == IN_PROGRESS

        return adopt

    def next_due_ns(self) -> int | None:
        """See TimedPart."""
        return 0 if self._is_due else None

    def expire(self, now_ns: int) -> Callable[[], object] | None:
        """See TimedPart; a vector or vCPU that cannot be gets nothing."""
        is_due, self._is_due = self._is_due, False
        if not is_due:
            return None
        self._clock.tell(EventKind.TSC_RATE, f"the guest is told that its TSC now has {self._told.tsc_hz} Hz")
        vector, vcpu = self.control & 0xFF, self.control >> 32
        if vector < FIRST_VECTOR or vcpu >= self._vcpus:
            return None
        return partial(self._vmm.inject, vcpu, vector)

    def _write_control(self, vcpu: int, value: int) -> None:
        self.control = value

    def _write_emulation(self, vcpu: int, value: int) -> None:
        self.emulation = value

    def _write_status(self, vcpu: int, value: int) -> None:
        if value:
            raise MsrFault(HV_X64_MSR_TSC_EMULATION_STATUS, value, "only 0 can be written")
        self.status = 0


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
        control = saved_number(saved, "tsc_invariant_control", lambda value: value <= EXPOSE_INVARIANT_TSC)
        return partial(setattr, self, "control", control)

    def _write(self, vcpu: int, value: int) -> None:
        if value & ~EXPOSE_INVARIANT_TSC:
            raise MsrFault(HV_X64_MSR_TSC_INVARIANT_CONTROL, value, "bits 1 to 63 are reserved")
        if value < self.control:
            raise MsrFault(HV_X64_MSR_TSC_INVARIANT_CONTROL, value, "the guest cannot take it back")
        self.control = value


def _served(read: Callable[[int], int], write: Callable[[int, int], object]) -> Msr:
    return Msr(Privilege.REENLIGHTENMENT, read, write)
