"""The rates that a guest's timers can follow, where it times them by TSC deadlines.

Such a guest learns its TSC's frequency once, at boot: a Linux from its clock's page (kvm_get_tsc_khz()), which shows a
dilated clock as a TSC of another frequency.  From then on it turns each timer's nanoseconds into TSC ticks by that
number, while its clock goes on at whatever rate the page has.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final

from pvclock._scale import ClockScale
from pvclock.errors import RangeError
from pvclock.kvm import Vcpu
from pvclock.quantities import U32_MASK, shown
from pvclock.readings import shown_khz
from pvclock.timekeeping.lapic import TSC_DEADLINE_MODE, timer_mode

__all__ = ["SHOWN_KHZ_MAX", "DilationLimits"]

TSC_DIVISOR: Final = 8
"""Linux programs deadlines in units of so many ticks; source: arch/x86/kernel/apic/apic.c."""

SHOWN_KHZ_MAX: Final = U32_MASK // (1000 // TSC_DIVISOR)
"""34,359,738 kHz: setup_APIC_timer() there gives clockevents_config_and_register() tsc_khz * (1000 / TSC_DIVISOR) in 32
bits.  A TSC that is little faster wraps to a timer of some kHz, and the guest does nothing but serve its interrupts."""


class DilationLimits:
    """What a machine's clock asks before it is dilated.  vcpus: its guest's; dilation: the clock's as it boots.

    Before a vCPU's timer is in TSC-deadline mode the guest has still to learn its TSC's frequency, which has a limit.
    After that its timers are right at the rate of its boot.  At a slower one they come early, and Linux sets them
    again; at a faster one they come late, and the guest cannot know it, so that is refused.
    """

    def __init__(self, vcpus: Sequence[Vcpu], dilation: Fraction) -> None:
        self._vcpus = vcpus
        self._at_boot = dilation

    def begin_anew(self, dilation: Fraction) -> None:
        """The guest boots again, with its clock at `dilation`."""
        self._at_boot = dilation

    def admit(self, dilation: Fraction, scale: ClockScale, *, force: bool) -> None:
        """Note the rate to come, which the page will show by `scale`; RangeError beyond the limits, unless `force`.

        For vCPUs that are out of the guest.
        """
        if any(uses_deadlines(vcpu.get_lapic()) for vcpu in self._vcpus):
            if dilation > self._at_boot and not force:
                raise RangeError(_too_fast(dilation, self._at_boot))
            return
        khz = shown_khz(scale.mul, scale.shift)
        if khz > SHOWN_KHZ_MAX and not force:
            raise RangeError(_too_slow(dilation, khz))
        self._at_boot = dilation


def uses_deadlines(lapic: bytes) -> bool:
    """Is a LAPIC's timer in TSC-deadline mode?  lapic: its registers, as KVM_GET_LAPIC gives them."""
    return timer_mode(lapic) == TSC_DEADLINE_MODE


def _too_slow(dilation: Fraction, khz: int) -> str:
    slowest = dilation * khz / SHOWN_KHZ_MAX
    return (
        f"dilation {shown(dilation)} of a guest that is yet to boot: its clock would show it a TSC of {khz} kHz, and "
        f"Linux keeps the frequency of its TSC-deadline timer in 32 bits, as tsc_khz * 125: up to {SHOWN_KHZ_MAX} kHz, "
        f"which here is 1/{float(1 / slowest):.2f}; dilate less, or force it (force=True, --force-rate)"
    )


def _too_fast(dilation: Fraction, at_boot: Fraction) -> str:
    return (
        f"dilation {shown(dilation)} of a guest that booted at {shown(at_boot)}: it sets its timers as TSC deadlines "
        f"by the frequency that its clock showed then, so by its clock each would take {float(dilation / at_boot):.4g} "
        f"times as long; boot it at the fastest rate that it will have, or force it"
    )
