"""The synthetic interrupt controller (SynIC) of each vCPU: 16 interrupt sources (SINTs), each with a message slot.

The slots are in the SIM page, which is the guest's memory: what it writes there is its own affair.  Event flags (the
SIEF page) have no sender here.

As KVM does, messages are posted whatever SCONTROL says, and auto-EOI is stored but left to the APIC: a VMM's interface
for interrupts has none, so leaf 0x40000004 recommends not to use it.

Source: TLFS "Virtual Interrupt Controller"; Linux synic_set_msr(), synic_set_sint(), synic_deliver_msg().
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from struct import pack
from typing import Final

from pvclock._records import MESSAGE_BYTES, load_word, post_message
from pvclock.errors import GuestAddressError, MsrFault
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.hyperv.msr import Msr
from pvclock.providers.hyperv.page_msr import PAGE_ADDRESS, PAGE_BYTES, PAGE_ENABLED
from pvclock.providers.hyperv.saved_numbers import saved_numbers
from pvclock.providers.interface import ClockServices, MsrValue

__all__ = ["FIRST_VECTOR", "SINTS", "Synic", "message"]

MSR_SCONTROL: Final = 0x40000080
MSR_SVERSION: Final = 0x40000081
MSR_SIEFP: Final = 0x40000082
MSR_SIMP: Final = 0x40000083
MSR_EOM: Final = 0x40000084
MSR_SINT0: Final = 0x40000090

SINTS: Final = 16
"""SINTs of a vCPU."""
FIRST_VECTOR: Final = 16
"""The first vector that an APIC takes."""
VERSION: Final = 1

SINT_VECTOR: Final = 0xFF
SINT_MASKED: Final = 1 << 16
SINT_POLLING: Final = 1 << 18

MESSAGE_PENDING: Final = 1
NO_MESSAGE: Final = 0
"""The type of a slot that is free."""


def message(kind: int, payload: bytes, *, pending: bool = False) -> bytes:
    """A message of type `kind`, without a sender; pending: another one waits for the same slot."""
    return pack("<IBBHQ", kind, len(payload), MESSAGE_PENDING if pending else 0, 0, 0) + payload


def _nothing() -> None:
    """What a SynIC without a sender does when a slot may be free."""


def _is_legal_sint(value: int) -> bool:
    return bool(value & SINT_MASKED) or value & SINT_VECTOR >= FIRST_VECTOR


class Synic:
    """Every vCPU's SynIC.

    The rest is VirtualBox's.  siefp_faults: reads of SIEFP, and writes that do not enable its page, are #GP; the value
    is stored all the same.  takes_any_simp: a SIM page that is not in memory is stored; otherwise it is #GP.
    ignores_eom: EOM does nothing.
    """

    def __init__(
        self,
        clock: ClockServices,
        vcpus: int,
        *,
        siefp_faults: bool = False,
        takes_any_simp: bool = False,
        ignores_eom: bool = False,
    ) -> None:
        self._memory, self._vcpus = clock.memory, vcpus
        self._siefp_faults, self._takes_any_simp, self._ignores_eom = siefp_faults, takes_any_simp, ignores_eom
        self.on_free: Callable[[], object] = _nothing
        """Called when a message that found no free slot may find one; set by the one who posts."""
        self.is_resend_due = False
        """Was a state loaded, and resend() not called since?"""
        self.reset()
        siefp = self._msr(MSR_SIEFP, self._write_siefp)
        self.msrs: Mapping[int, Msr] = {
            MSR_SCONTROL: self._msr(MSR_SCONTROL, self._store),
            MSR_SVERSION: Msr(Privilege.SYNIC, lambda _: VERSION),
            MSR_SIEFP: siefp._replace(read=None) if siefp_faults else siefp,
            MSR_SIMP: self._msr(MSR_SIMP, self._write_simp),
            MSR_EOM: Msr(Privilege.SYNIC, lambda _: 0, self._write_eom),
            **{MSR_SINT0 + sint: self._msr(MSR_SINT0 + sint, self._write_sint) for sint in range(SINTS)},
        }

    def _msr(self, index: int, write: Callable[[int, int, int], object]) -> Msr:
        return Msr(Privilege.SYNIC, partial(self._load, index), partial(write, index))

    # What a sender does

    def post(self, vcpu: int, sint: int, message: bytes, *, waits: bool) -> bool:
        """Post a message if the slot is free; False if it is not, or if there is no SIM page in memory.

        waits: the sender tries again at on_free(); the guest is told to write EOM when it has freed the slot.
        The guest has to be interrupted at vector() then.
        """
        simp = self._values[MSR_SIMP][vcpu]
        return bool(simp & PAGE_ENABLED) and post_message(self._memory, _slot(simp, sint), message, waits)

    def is_free(self, vcpu: int, sint: int) -> bool:
        """Is the slot for a message there and free?  If it is taken the guest is told to write EOM, as by post()."""
        return self.post(vcpu, sint, message(NO_MESSAGE, b""), waits=True)  # which leaves a slot free

    def vector(self, vcpu: int, sint: int) -> int | None:
        """Where that SINT interrupts vCPU; None if it is masked or polled."""
        value = self._values[MSR_SINT0 + sint][vcpu]
        return None if value & (SINT_MASKED | SINT_POLLING) else value & SINT_VECTOR

    def resend(self) -> Iterator[tuple[int, int]]:
        """Give (vCPU, vector) for each message in a slot, once after a load.

        Its interrupt may have been on its way when the state was saved; a second one finds no message and does nothing.
        """
        is_due, self.is_resend_due = self.is_resend_due, False
        for vcpu in range(self._vcpus) if is_due else ():
            simp = self._values[MSR_SIMP][vcpu]
            for sint in range(SINTS) if simp & PAGE_ENABLED else ():
                vector = self.vector(vcpu, sint)
                if vector is not None and load_word(self._memory, _slot(simp, sint)):
                    yield vcpu, vector

    # The guest's side

    def _load(self, index: int, vcpu: int) -> int:
        return self._values[index][vcpu]

    def _store(self, index: int, vcpu: int, value: int) -> None:
        self._values[index][vcpu] = value

    def _write_sint(self, index: int, vcpu: int, value: int) -> None:
        if not _is_legal_sint(value):
            raise MsrFault(index, value, f"vectors begin at {FIRST_VECTOR}")
        self._store(index, vcpu, value)

    def _write_siefp(self, index: int, vcpu: int, value: int) -> None:
        if self._siefp_faults:
            self._store(index, vcpu, value)
            if not value & PAGE_ENABLED:
                raise MsrFault(index, value, "VirtualBox has no success for this")
        self._write_page(index, vcpu, value)

    def _write_simp(self, index: int, vcpu: int, value: int) -> None:
        if self._takes_any_simp and not self._memory.contains(value & PAGE_ADDRESS, PAGE_BYTES):
            self._store(index, vcpu, value)
        else:
            self._write_page(index, vcpu, value)
        self.on_free()

    def _write_page(self, index: int, vcpu: int, value: int) -> None:
        """Enabling zeroes the page."""
        if value & PAGE_ENABLED:
            try:
                self._memory.write(value & PAGE_ADDRESS, bytes(PAGE_BYTES))
            except GuestAddressError:
                raise MsrFault(index, value, "there is no page of memory") from None
        self._store(index, vcpu, value)

    def _write_eom(self, vcpu: int, value: int) -> None:
        if not self._ignores_eom:
            self.on_free()

    # Life

    def reset(self) -> None:
        """All MSRs are 0, and all SINTs masked."""
        initial = {MSR_SCONTROL: 0, MSR_SIEFP: 0, MSR_SIMP: 0}
        initial |= {MSR_SINT0 + sint: SINT_MASKED for sint in range(SINTS)}
        self._values = {index: [value] * self._vcpus for index, value in initial.items()}
        self.is_resend_due = False

    def save(self) -> Mapping[str, MsrValue]:
        """The MSRs by vCPU; "sint" has each vCPU's SINTs after the other's."""
        sints = (self._values[MSR_SINT0 + sint][vcpu] for vcpu in range(self._vcpus) for sint in range(SINTS))
        return {
            "scontrol": tuple(self._values[MSR_SCONTROL]),
            "siefp": tuple(self._values[MSR_SIEFP]),
            "simp": tuple(self._values[MSR_SIMP]),
            "sint": tuple(sints),
        }

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """See Part."""
        names = {"scontrol": MSR_SCONTROL, "siefp": MSR_SIEFP, "simp": MSR_SIMP}
        values = {index: saved_numbers(saved, name, self._vcpus) for name, index in names.items()}
        sints = saved_numbers(saved, "sint", self._vcpus * SINTS, _is_legal_sint)
        values |= {MSR_SINT0 + sint: sints[sint::SINTS] for sint in range(SINTS)}

        def adopt() -> None:
            self._values = values
            self.is_resend_due = True

        return adopt


def _slot(simp: int, sint: int) -> int:
    """Guest-physical address of a SINT's message slot."""
    return (simp & PAGE_ADDRESS) + MESSAGE_BYTES * sint
