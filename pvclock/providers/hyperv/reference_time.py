"""Reference time: the counter MSR, and the MSR of the reference TSC page.

Source: TLFS "Partition Reference Time Enlightenment"; Linux get_time_ref_counter(), kvm_hv_set_msr_pw().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from struct import Struct
from typing import Final

from pvclock.errors import GuestAddressError, MsrFault
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.hyperv.msr import Msr
from pvclock.providers.hyperv.page_msr import PAGE_ENABLED, page_of
from pvclock.providers.hyperv.saved_numbers import saved_number
from pvclock.providers.hyperv.scales import virtualbox_scale, virtualbox_ticks_per_unit
from pvclock.providers.interface import ClockServices, MsrValue, ReferenceTime
from pvclock.quantities import U32_MASK, U64_MASK, Gpa

__all__ = ["RawReferenceClock", "ReferenceClock"]

HV_X64_MSR_TIME_REF_COUNT: Final = 0x40000020
HV_X64_MSR_REFERENCE_TSC: Final = 0x40000021

UNITS_MAX: Final = U64_MASK // 100 + 2
"""When guest time ends, with what a page may be ahead of it."""

TSC_PAGE: Final = Struct("<IIQq")  # sequence, reserved, scale, offset
SEQUENCE_MAX: Final = 0xFFFFFFFE
"""VirtualBox begins anew at 1 from this sequence on, for the one after it is reserved."""


class ReferenceClock:
    """The VM's reference time is guest time, which `clock` counts and publishes.

    As on KVM, an address that is not in memory is accepted, and the page becomes valid once there is memory.
    """

    def __init__(self, clock: ClockServices) -> None:
        self._clock = clock
        self.reference_tsc_msr = 0
        self.msrs: Mapping[int, Msr] = {
            HV_X64_MSR_TIME_REF_COUNT: Msr(Privilege.TIME_REF_COUNT, clock.reference_units),
            HV_X64_MSR_REFERENCE_TSC: Msr(Privilege.REFERENCE_TSC, lambda _: self.reference_tsc_msr, self._write),
        }

    @property
    def is_page_enabled(self) -> bool:
        """Has the guest enabled its reference TSC page?"""
        return bool(self.reference_tsc_msr & PAGE_ENABLED)

    def go_back_to(self, value: int, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """Reset this part, and go on with the page that `value` of the MSR enables, if any.

        begin, undo: see ClockServices.place_reference_page().
        """
        before = self.reference_tsc_msr

        def forget() -> None:
            self.reset()
            begin()

        def remember() -> None:
            undo()
            self.reference_tsc_msr = before

        self._clock.place_reference_page(page_of(value), forget, remember)

    def reset(self) -> None:
        """See Part; within go_back_to()."""
        self.reference_tsc_msr = 0

    def save(self) -> Mapping[str, MsrValue]:
        """See Part."""
        units, sequence = self._clock.reference_time
        return {"reference_tsc": self.reference_tsc_msr, "reference_units": units, "reference_sequence": sequence}

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """See Part."""
        value = saved_number(saved, "reference_tsc")
        units = saved_number(saved, "reference_units", lambda found: found <= UNITS_MAX)
        sequence = saved_number(saved, "reference_sequence", lambda found: found <= U32_MASK)

        def adopt() -> None:
            self.reference_tsc_msr = value
            self._clock.adopt_reference_time(ReferenceTime(units, sequence), page_of(value))

        return adopt

    def _write(self, vcpu: int, value: int) -> None:
        write = partial(setattr, self, "reference_tsc_msr", value)
        undo = partial(setattr, self, "reference_tsc_msr", self.reference_tsc_msr)
        self._clock.place_reference_page(page_of(value), write, undo, vcpu)


class RawReferenceClock:
    """VirtualBox's: reference time is the TSC divided, so it goes back where a TSC does, and knows no clock policy.

    Two divisions that disagree, its errors included: the counter's divisor is a whole number of ticks, up to 0.43 % off
    (H-35, H-56); the page's scale has 32 zero bits, some ppb off (H-52), and its offset is 0 (H-53).
    """

    def __init__(self, clock: ClockServices) -> None:
        self._memory, self._guest_tsc = clock.memory, clock.guest_tsc
        hz = clock.host_tsc_hz  # as TM's: the rate at which TSCs run here
        self._ticks_per_unit, self._scale = virtualbox_ticks_per_unit(hz), virtualbox_scale(hz)
        self.reference_tsc_msr = self.sequence = 0
        self.msrs: Mapping[int, Msr] = {
            HV_X64_MSR_TIME_REF_COUNT: Msr(Privilege.TIME_REF_COUNT, self._count),
            HV_X64_MSR_REFERENCE_TSC: Msr(Privilege.REFERENCE_TSC, lambda _: self.reference_tsc_msr, self._write),
        }

    @property
    def is_page_enabled(self) -> bool:
        """Has the guest enabled its reference TSC page?"""
        return bool(self.reference_tsc_msr & PAGE_ENABLED)

    def go_back_to(self, value: int, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """Reset this part and do `begin`, which may load it; if that fails undo() reverts it.

        value: not used, for nobody updates a page.
        """
        before = self.reference_tsc_msr, self.sequence
        self.reset()
        try:
            begin()
        except BaseException:
            self.reference_tsc_msr, self.sequence = before
            undo()  # which may load this part, and write its page anew
            raise

    def reset(self) -> None:
        """See Part."""
        self.reference_tsc_msr = self.sequence = 0

    def save(self) -> Mapping[str, MsrValue]:
        """See Part."""
        return {"reference_tsc": self.reference_tsc_msr, "reference_sequence": self.sequence}

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """See Part; a page is written anew, for this host's TSC, with the next sequence."""
        value = saved_number(saved, "reference_tsc")
        sequence = saved_number(saved, "reference_sequence", lambda found: found <= U32_MASK)
        return partial(self._adopt, value, sequence)

    def _adopt(self, value: int, sequence: int) -> None:
        self.reference_tsc_msr, self.sequence = value, sequence
        gpa = page_of(value)
        if gpa is not None:
            with suppress(GuestAddressError):  # its memory may have gone
                self._put_page(gpa, sequence + 1 if sequence < SEQUENCE_MAX else 1)

    def _count(self, vcpu: int) -> int:
        return self._guest_tsc(vcpu) // self._ticks_per_unit

    def _write(self, vcpu: int, value: int) -> None:
        gpa, before = page_of(value), page_of(self.reference_tsc_msr)
        self.reference_tsc_msr = value & ~PAGE_ENABLED  # what stays if there is no memory
        if gpa is not None and gpa != before:
            try:
                self._put_page(gpa, 1)
            except GuestAddressError as error:
                raise MsrFault(HV_X64_MSR_REFERENCE_TSC, value, str(error)) from None
        self.reference_tsc_msr = value

    def _put_page(self, gpa: Gpa, sequence: int) -> None:
        self._memory.write(gpa, TSC_PAGE.pack(sequence, 0, self._scale, 0))
        self.sequence = sequence
