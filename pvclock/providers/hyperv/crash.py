"""The guest's report of its own crash: five parameters, and the word that there was one.

Source: TLFS "Guest Crash Enlightenment"; Linux kvm_hv_msr_set_crash_data(), kvm_hv_msr_get_crash_ctl().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from pvclock.providers.guest_log import GuestLog
from pvclock.providers.hyperv.features import Feature
from pvclock.providers.hyperv.msr import Msr
from pvclock.providers.hyperv.saved_numbers import saved_numbers
from pvclock.providers.interface import ClockServices, MsrValue
from pvclock.timekeeping.events import EventKind

__all__ = ["Crash"]

HV_X64_MSR_CRASH_P0: Final = 0x40000100
HV_X64_MSR_CRASH_CTL: Final = 0x40000105

PARAMETERS: Final = 5
NOTIFY: Final = 1 << 63


class Crash:
    """The VM's crash parameters, which any guest may write at any time; a report is an event, the first 20 of them."""

    def __init__(self, clock: ClockServices) -> None:
        self._log = GuestLog(clock)
        self.parameters = [0] * PARAMETERS
        self.msrs: Mapping[int, Msr] = {
            **{HV_X64_MSR_CRASH_P0 + number: self._parameter(number) for number in range(PARAMETERS)},
            HV_X64_MSR_CRASH_CTL: Msr(Feature.CRASH, lambda _: NOTIFY, self._write_control),
        }

    def reset(self) -> None:
        """See Part."""
        self.parameters = [0] * PARAMETERS

    def save(self) -> Mapping[str, MsrValue]:
        """See Part."""
        return {"crash_parameters": tuple(self.parameters)}

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """See Part."""
        return partial(setattr, self, "parameters", saved_numbers(saved, "crash_parameters", PARAMETERS))

    def _parameter(self, number: int) -> Msr:
        return Msr(Feature.CRASH, lambda _: self.parameters[number], partial(self._write_parameter, number))

    def _write_parameter(self, number: int, vcpu: int, value: int) -> None:
        self.parameters[number] = value

    def _write_control(self, vcpu: int, value: int) -> None:
        if value & NOTIFY:
            parameters = ", ".join(f"{each:#x}" for each in self.parameters)
            self._log(EventKind.CRASH, f"vCPU {vcpu}: the guest reports its crash, P0 to P4: {parameters}")
