# SPDX-License-Identifier: Apache-2.0
"""Read what the clockprobe guest (clockprobe.s) found, from its memory.

The layout is the payload's ABI: section 1 of its source is the other half of this file. Nothing here starts a guest
or knows where its memory is; any object with ``read`` (and ``write``, to stop a run) by guest-physical address will do.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple, Protocol

__all__ = [
    "ABI_VERSION",
    "EXIT_FAILED",
    "EXIT_FINE",
    "LAST_VALUE",
    "LOAD_BASE",
    "MAX_CPUS",
    "PORT_CONSOLE",
    "PORT_EXIT",
    "WALL_CLOCK",
    "GuestReader",
    "GuestWriter",
    "Phase",
    "ProbeBlock",
    "ProbeRecord",
    "State",
    "clear_largest_gaps",
    "forget",
    "read_block",
    "read_record",
    "stop",
    "time_page_address",
]

ABI_VERSION = 1
MAX_CPUS = 16

LOAD_BASE = 0x100000
PROBE_BASE = 0x200000
TIME_PAGES = 0x201000
RECORDS = 0x202000
LAST_VALUE = PROBE_BASE + 128
"""`last_value` of the block: 8 bytes; what is written there is the least that is returned while not STABLE."""
WALL_CLOCK = PROBE_BASE + 192
"""The wall clock record the boot processor registers."""

PORT_CONSOLE = 0xE9
"""The guest's text, byte by byte."""
PORT_EXIT = 0xF4
"""One byte written here ends the run: EXIT_FINE or EXIT_FAILED. QEMU's isa-debug-exit turns v into 2 * v + 1."""
EXIT_FINE = 0
EXIT_FAILED = 1

_MAGIC = int.from_bytes(b"PVCPROBE", "little")
_STOP = PROBE_BASE + 16
_TIME_PAGE_STRIDE = 64
_RECORD_STRIDE = 256
_LARGEST_GAP = 112
_BLOCK = struct.Struct("<QIIIIQQI20xQ56xQ")
_RECORD = struct.Struct("<27Q")


class GuestReader(Protocol):
    """Guest memory that can be read by guest-physical address."""

    def read(self, gpa: int, length: int) -> bytes:
        """``length`` bytes from ``gpa``."""


class GuestWriter(Protocol):
    """Guest memory that can be written by guest-physical address."""

    def write(self, gpa: int, data: bytes) -> object:
        """Write ``data`` at ``gpa``."""


class Phase(IntEnum):
    """How far the run is."""

    BOOTING = 0
    REGISTERING = 1
    READING = 2
    DONE = 3


class State(IntEnum):
    """How far one vCPU is, or why it gave up."""

    ABSENT = 0
    REGISTERED = 1
    READING = 2
    DONE = 3
    NO_CLOCK = 4
    FAULT = 5


class ProbeBlock(NamedTuple):
    """The run as a whole; fields in the ABI's order."""

    magic: int
    abi: int
    cpus_arrived: int
    """vCPUs taking part; 0 until the boot processor has stopped waiting for others."""
    stop: int
    phase: int
    """A Phase."""
    reads_target: int
    """Reads per vCPU, 0 = until stopped."""
    wild_ns: int
    finished: int
    """vCPUs that are done."""
    shared_last: int
    """Newest time any vCPU has seen, ns."""
    last_value: int
    """Linux's global floor for clocks that are not STABLE, ns."""


class ProbeRecord(NamedTuple):
    """One vCPU's findings; fields in the ABI's order.

    vCPUs are numbered as they arrive: number 0 is the boot processor, for the others go by ``apic_id``.
    """

    state: int
    """A State."""
    apic_id: int
    signature_leaf: int
    """CPUID leaf of KVM's signature, 0 = not found."""
    features: int
    """EAX of the leaf after that."""
    msr: int
    """Number of the system time MSR in use."""
    msr_value: int
    """That MSR, read back after registering."""
    reads: int
    """Brought up to date every 16384 reads and at the end."""
    retries: int
    """Reads begun again because the version was odd or changed."""
    backward_own: int
    """Reads below this vCPU's previous one."""
    backward_cross: int
    """Reads below a value some vCPU had before the read began."""
    wild: int
    """Reads more than wild_ns after the previous one, or 2**60 ns away from it either way."""
    torn: int
    """Reads whose page had another payload than last time under the same version."""
    clamped: int
    """Reads that got the global floor instead, the clock not being STABLE."""
    stopped: int
    """Times GUEST_STOPPED was seen, and cleared."""
    largest_gap_ns: int
    """Between two successive reads."""
    first_tsc: int
    """Ticks."""
    first_ns: int
    last_tsc: int
    """Ticks; belongs to ``last_ns`` once the vCPU is done."""
    last_ns: int
    worst_back_ns: int
    """The longest step back, own or cross."""
    back_from_ns: int
    """The first step back started here."""
    back_to_ns: int
    """And ended here."""
    fault_vector: int
    fault_error: int
    fault_rip: int
    fault_cr2: int
    uses_rdtscp: int
    """1 if the TSC is read by RDTSCP, 0 if by LFENCE and RDTSC."""


def read_block(memory: GuestReader) -> ProbeBlock | None:
    """Return the run's state, or None while the guest has not set it up."""
    block = ProbeBlock._make(_BLOCK.unpack(memory.read(PROBE_BASE, _BLOCK.size)))
    if block.magic != _MAGIC:
        return None
    if block.abi != ABI_VERSION:
        raise ValueError(f"clockprobe ABI {block.abi}, expected {ABI_VERSION}")
    return block


def read_record(memory: GuestReader, vcpu: int) -> ProbeRecord:
    """Return the findings so far of the ``vcpu``-th vCPU to arrive."""
    _check_vcpu(vcpu)
    return ProbeRecord._make(_RECORD.unpack(memory.read(RECORDS + _RECORD_STRIDE * vcpu, _RECORD.size)))


def time_page_address(vcpu: int) -> int:
    """Return the guest-physical address of the 32-byte page the ``vcpu``-th vCPU to arrive registers."""
    _check_vcpu(vcpu)
    return TIME_PAGES + _TIME_PAGE_STRIDE * vcpu


def stop(memory: GuestWriter) -> None:
    """Tell all vCPUs to finish; the last one to do so writes the exit port."""
    memory.write(_STOP, struct.pack("<I", 1))


def clear_largest_gaps(memory: GuestWriter, vcpus: int) -> None:
    """Let each vCPU's ``largest_gap_ns`` begin anew; for vCPUs that are out of the guest."""
    for vcpu in range(vcpus):
        memory.write(RECORDS + _RECORD_STRIDE * vcpu + _LARGEST_GAP, bytes(8))


def forget(memory: GuestWriter) -> None:
    """Make read_block() return None until a guest that boots anew has set the run up; it may be running."""
    memory.write(PROBE_BASE, bytes(8))


def _check_vcpu(vcpu: int) -> None:
    if not 0 <= vcpu < MAX_CPUS:
        raise ValueError(f"vCPU {vcpu} is not one of the probe's {MAX_CPUS}")
