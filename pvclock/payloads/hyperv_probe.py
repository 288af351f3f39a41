# SPDX-License-Identifier: Apache-2.0
"""Read what the hvprobe guest (hvprobe.s) found, from its memory.

The layout is the payload's ABI: section 1 of its source is the other half of this file.  `probe.stop()` ends a run, and
phases, states and exit codes are those of `probe`.  Times are in units of 100 ns, the reference time's.
"""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import NamedTuple

from pvclock.payloads.probe import MAX_CPUS, GuestReader

__all__ = [
    "ABI_VERSION",
    "EXPIRIES_MAX",
    "HYPERCALL_PAGE",
    "NO_RESULT",
    "REFERENCE_PAGE",
    "SINT",
    "VECTOR",
    "Expiry",
    "HvBlock",
    "HvRecord",
    "TimerMode",
    "message_page_address",
    "read_block",
    "read_expiries",
    "read_record",
    "violations",
]

ABI_VERSION = 1
REFERENCE_PAGE = 0x210000
"""The reference TSC page that the boot processor enables."""
HYPERCALL_PAGE = 0x211000
NO_RESULT = 2**64 - 1
"""`call_result` where no hypercall has returned."""
VECTOR = 32
"""Of the timers' interrupts."""
SINT = 2
"""The synthetic interrupt source of the timers' messages."""
EXPIRIES_MAX = 1024

_MAGIC = int.from_bytes(b"HPVPROBE", "little")
_BASE = 0x200000
_RECORDS = 0x202000
_RECORD_STRIDE = 512
_MESSAGE_PAGES = 0x220000
_EXPIRIES = 0x240000
_EXPIRIES_STRIDE = 0x8000
_BLOCK = struct.Struct("<QIIIIQQI20xQ56x9Q")
_RECORD = struct.Struct("<28Qq10Q")
_EXPIRY = struct.Struct("<QQQII")


class TimerMode(IntFlag):
    """timer= of the command line; 0 is periodic, with messages."""

    ONE_SHOT = 1
    """Set again in each interrupt's wake, `period` ahead."""
    DIRECT = 2
    """Interrupts without messages."""


class HvBlock(NamedTuple):
    """The run as a whole; fields in the ABI's order."""

    magic: int
    abi: int
    cpus_arrived: int
    """vCPUs taking part; 0 until the boot processor has stopped waiting for others."""
    stop: int
    phase: int
    """A probe.Phase."""
    rounds_target: int
    """Rounds per vCPU, 0 = until stopped."""
    batch: int
    """Readings of the page in a round, beside page, counter, page."""
    finished: int
    """vCPUs that are done."""
    shared_last: int
    """Newest time any vCPU has seen."""
    order: int
    """Bit n: the TLFS's order for readings whose number is n modulo 2; else Linux's."""
    call: int
    """Not 0: a hypercall was asked for."""
    expiries_target: int
    """Timer interrupts per vCPU; 0: the clock is read."""
    period: int
    """Between two of them."""
    timer: int
    """A TimerMode."""
    guest_os_id: int
    """The MSR, read back; 0 if it is not offered."""
    hypercall: int
    """The MSR, read back; 0 if it is not offered or no call was asked for."""
    reference_tsc: int
    """The MSR, read back; 0 if it is not offered."""
    call_result: int
    """What the hypercall returned, or NO_RESULT."""


class HvRecord(NamedTuple):
    """One vCPU's findings; fields in the ABI's order.

    vCPUs are numbered as they arrive: number 0 is the boot processor, for the others go by ``apic_id``.  A violation
    by values counts as a step back, too: `page_above_counter` in `backward_own`, for instance.
    """

    state: int
    """A probe.State."""
    apic_id: int
    max_leaf: int
    """EAX of CPUID leaf 0x40000000; 0 = no Hyper-V interface."""
    privileges: int
    """EBX and EAX of leaf 0x40000003."""
    features: int
    """EDX of that leaf."""
    vp_index: int
    """The MSR, like the two that follow; 0 if it is not offered."""
    tsc_hz: int
    apic_hz: int
    rounds: int
    reads: int
    """Readings of the page, or of the counter in place of it; brought up to date every round."""
    triples: int
    """Rounds in which page, counter and page could be compared, the page being valid."""
    fallbacks: int
    """Readings for which the page was not valid, so that they took the counter."""
    retries: int
    """Readings begun again because the sequence changed."""
    backward_own: int
    """Readings below this vCPU's previous one."""
    backward_cross: int
    """Readings below a value some vCPU had before the reading began."""
    page_above_counter: int
    """Triples that begin above the counter."""
    counter_above_page: int
    """Triples that end below the counter."""
    torn: int
    """Readings whose page had another scale or offset than last time under the same sequence."""
    sequences: int
    """How often the sequence had changed since the last reading."""
    sequence_back: int
    """How often to an earlier one, modulo 2**32."""
    sequence_reserved: int
    """Readings that found 0xffffffff: used in Linux's order, not valid in the TLFS's."""
    largest_step: int
    """Between two successive readings."""
    first_units: int
    last_units: int
    """Brought up to date every round."""
    page_tsc: int
    """Ticks, of the last reading of the page; the four fields after it belong to that one once the vCPU is done."""
    page_units: int
    sequence: int
    scale: int
    offset: int
    """Signed."""
    first_sequence: int
    worst_back: int
    """The longest step back, own or cross."""
    back_from: int
    """The first step back started here."""
    back_to: int
    """And ended here."""
    expiries: int
    """Entries for read_expiries()."""
    fault_vector: int
    fault_error: int
    fault_rip: int
    fault_cr2: int
    uses_rdtscp: int
    """1 if the TSC is read by RDTSCP, 0 if by LFENCE and RDTSC."""


class Expiry(NamedTuple):
    """One interrupt of a vCPU's synthetic timer."""

    expiration: int
    """When it was due: from the message; in direct mode as the guest set it, 0 if periodic."""
    delivery: int
    """When the message was written, as it says; 0 in direct mode."""
    seen: int
    """The counter in the interrupt's handler."""
    message_type: int
    """0x80000010 for a timer's; 0 in direct mode."""
    message_flags: int
    """Bit 0: another message waited for the slot."""


def read_block(memory: GuestReader) -> HvBlock | None:
    """Return the run's state, or None while the guest has not set it up."""
    block = HvBlock._make(_BLOCK.unpack(memory.read(_BASE, _BLOCK.size)))
    if block.magic != _MAGIC:
        return None
    if block.abi != ABI_VERSION:
        raise ValueError(f"hvprobe ABI {block.abi}, expected {ABI_VERSION}")
    return block


def read_record(memory: GuestReader, vcpu: int) -> HvRecord:
    """Return the findings so far of the ``vcpu``-th vCPU to arrive."""
    _check_vcpu(vcpu)
    return HvRecord._make(_RECORD.unpack(memory.read(_RECORDS + _RECORD_STRIDE * vcpu, _RECORD.size)))


def read_expiries(memory: GuestReader, vcpu: int) -> list[Expiry]:
    """Return the interrupts so far of the ``vcpu``-th vCPU to arrive, the oldest first."""
    count = min(read_record(memory, vcpu).expiries, EXPIRIES_MAX)
    log = memory.read(_EXPIRIES + _EXPIRIES_STRIDE * vcpu, _EXPIRY.size * count)
    return [Expiry._make(fields) for fields in _EXPIRY.iter_unpack(log)]


def message_page_address(vcpu: int) -> int:
    """Return the guest-physical address of the SIM page that the ``vcpu``-th vCPU to arrive enables."""
    _check_vcpu(vcpu)
    return _MESSAGE_PAGES + 0x1000 * vcpu


def violations(record: HvRecord) -> dict[str, int]:
    """What a correct reference time never shows, by name and how often."""
    kinds = ("backward_own", "backward_cross", "page_above_counter", "counter_above_page")
    rules = ("torn", "sequence_back", "sequence_reserved")
    return {kind: getattr(record, kind) for kind in kinds + rules}


def _check_vcpu(vcpu: int) -> None:
    if not 0 <= vcpu < MAX_CPUS:
        raise ValueError(f"vCPU {vcpu} is not one of the probe's {MAX_CPUS}")
