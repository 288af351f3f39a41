"""Hyper-V's part of VirtualBox's saved unit "GIM", versions 1 to 4, little-endian.

u32 version; u64 guest OS id, u64 hypercall MSR, u64 reference TSC MSR; six u32 of CPUID; the hypercall page and the
reference TSC page, each u8 number, u8 flag, u32 size, u64 address, u32 length and description; u32 sequence of the TSC
page.  That is version 1.  Version 2 adds the debugger (u64 pending, send and receive buffer, u64 status, u32 reply,
u32 transaction, u32 IPv4 address), per vCPU u64 message page and u64 SINT2, and a closing byte 0xFF; version 3 all
sixteen SINTs; version 4 two u16 UDP ports after the address.

It does not hold SCONTROL, SIEFP, the APIC assist page, timers and crash MSRs, nor what time it is.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from pvclock.errors import StateFileError
from pvclock.providers.hyperv.page_msr import PAGE_BYTES
from pvclock.providers.interface import MsrValue

__all__ = ["NO_PAGE", "VERSIONS", "DebugPart", "Unit", "VcpuPart", "decode", "encode", "unit_of", "written_in"]

VERSIONS: Final = (1, 2, 3, 4)
HAS_DEBUGGER, HAS_ALL_SINTS, HAS_PORTS = 2, 3, 4
"""The versions from which on they are there."""

VERSION: Final = struct.Struct("<I")
GLOBAL: Final = struct.Struct("<3Q6I")
REGION: Final = struct.Struct("<BBIQI")
SEQUENCE: Final = struct.Struct("<I")
DEBUG: Final = struct.Struct("<4Q3I")
PORTS: Final = struct.Struct("<2H")
END: Final = b"\xff"

ENABLED: Final = 1
NO_PAGE: Final = (1 << 64) - 1
"""The address of a page that was never placed."""
DESCRIPTIONS: Final = (b"Hyper-V hypercall page", b"Hyper-V TSC page")
PAGE_NAMES: Final = ("hypercall_page", "reference_page")
DESCRIPTION_BYTES_MAX: Final = 31
REPLIES: Final = 7
DEBUG_MSRS: Final = ("pending", "send", "receive", "status")

SINTS: Final = 16
VMBUS_SINT: Final = 2
MASKED: Final = 1 << 16


class DebugPart(NamedTuple):
    """The debugger's MSRs, and the state of VirtualBox's UDP framing, ports in network order."""

    pending: int = 0
    send: int = 0
    receive: int = 0
    status: int = 0
    reply: int = 0
    transaction: int = 0
    guest_ipv4: int = 0
    destination_port: int = 0
    source_port: int = 0


class VcpuPart(NamedTuple):
    """One vCPU's message page MSR, and its sixteen SINT MSRs."""

    message_page: int = 0
    sints: tuple[int, ...] = (MASKED,) * SINTS


class Unit(NamedTuple):
    """The decoded part.  features: CPUID's base, partition, power, miscellaneous, hints and host words.

    hypercall_page, reference_page: where they were last, NO_PAGE if nowhere.  What an older version does not have is as
    after a reset.
    """

    guest_os_id: int
    hypercall: int
    reference_tsc: int
    features: tuple[int, ...]
    hypercall_page: int
    reference_page: int
    sequence: int
    debug: DebugPart
    vcpus: tuple[VcpuPart, ...]


def unit_of(saved: Mapping[str, MsrValue], features: tuple[int, ...], vcpus: int) -> Unit:
    """What a unit holds of a provider whose save() is `saved`; parts that it does not have are as after a reset."""
    hypercall, reference_tsc = _number(saved, "hypercall"), _number(saved, "reference_tsc")
    debug = DebugPart(*(_number(saved, f"debug_{name}") for name in DEBUG_MSRS))
    return Unit(
        _number(saved, "guest_os_id"),
        hypercall,
        reference_tsc,
        features,
        _page_of(hypercall),
        _page_of(reference_tsc),
        _number(saved, "reference_sequence"),
        debug,
        _vcpus_of(saved, vcpus),
    )


def written_in(unit: Unit) -> dict[str, MsrValue]:
    """What the guest of that unit had written, by the names of save(); not every provider has all of them."""
    return {
        "guest_os_id": unit.guest_os_id,
        "hypercall": unit.hypercall,
        "reference_tsc": unit.reference_tsc,
        "reference_sequence": unit.sequence,
        **{f"debug_{name}": getattr(unit.debug, name) for name in DEBUG_MSRS},
        "simp": tuple(vcpu.message_page for vcpu in unit.vcpus),
        "sint": tuple(sint for vcpu in unit.vcpus for sint in vcpu.sints),
    }


def encode(unit: Unit, version: int = VERSIONS[-1]) -> bytes:
    """The part as bytes, by that version, which leaves out what came later."""
    pages = (unit.hypercall_page, unit.reference_page)
    regions = b"".join(
        REGION.pack(number, 0, PAGE_BYTES, gpa, len(description)) + description
        for number, (gpa, description) in enumerate(zip(pages, DESCRIPTIONS, strict=True))
    )
    written = GLOBAL.pack(unit.guest_os_id, unit.hypercall, unit.reference_tsc, *unit.features)
    first = VERSION.pack(version) + written + regions + SEQUENCE.pack(unit.sequence)
    return (
        first if version < HAS_DEBUGGER else first + _encoded_debug(unit.debug, version) + _encoded_vcpus(unit, version)
    )


def decode(part: bytes, vcpus: int) -> Unit:
    """The part of a VM of `vcpus`; StateFileError for anything that VirtualBox does not write."""
    reader = _Reader(part)
    (version,) = reader.take(VERSION, "version")
    if version not in VERSIONS:
        wanted = f"{VERSIONS[0]} to {VERSIONS[-1]}"
        raise StateFileError("unit.hyperv.version", f"unsupported Hyper-V saved-state version {version}", wanted)
    guest_os_id, hypercall, reference_tsc, *features = reader.take(GLOBAL, "msrs")
    hypercall_page, reference_page = (_page(reader, number) for number in range(len(PAGE_NAMES)))
    (sequence,) = reader.take(SEQUENCE, "sequence")
    debug, vcpu_parts = _later_parts(reader, version, vcpus)
    reader.end()
    _check_place("hypercall_page", hypercall, hypercall_page)
    _check_place("reference_page", reference_tsc, reference_page)
    return Unit(
        guest_os_id,
        hypercall,
        reference_tsc,
        tuple(features),
        hypercall_page,
        reference_page,
        sequence,
        debug,
        vcpu_parts,
    )


def _number(saved: Mapping[str, MsrValue], name: str) -> int:
    """The number saved by that name; 0 for a part that this provider does not have."""
    value = saved.get(name)
    return value if isinstance(value, int) else 0


def _page_of(msr: int) -> int:
    return msr & -PAGE_BYTES if msr & ENABLED else NO_PAGE


def _vcpus_of(saved: Mapping[str, MsrValue], vcpus: int) -> tuple[VcpuPart, ...]:
    match saved:
        case {"simp": tuple(message_pages), "sint": tuple(sints)}:
            return tuple(VcpuPart(page, sints[SINTS * i : SINTS * (i + 1)]) for i, page in enumerate(message_pages))
    return (VcpuPart(),) * vcpus


class _Reader:
    """Reads a part from its beginning on."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, layout: struct.Struct, field: str) -> tuple[int, ...]:
        """The fields that come next."""
        return layout.unpack(self.take_bytes(layout.size, field))

    def take_bytes(self, count: int, field: str) -> bytes:
        """The bytes that come next."""
        data = self._data[self._at : self._at + count]
        if len(data) < count:
            raise StateFileError(
                f"unit.hyperv.{field}", f"the end after {len(self._data)} bytes", f"{count} bytes from {self._at} on"
            )
        self._at += count
        return data

    def end(self) -> None:
        """StateFileError if anything is left."""
        left = len(self._data) - self._at
        if left:
            raise StateFileError("unit.hyperv", f"{left} bytes after the end", f"{self._at} bytes")


def _page(reader: _Reader, number: int) -> int:
    """The address of the page that is region `number`."""
    name = PAGE_NAMES[number]
    found, flag, size, gpa, length = reader.take(REGION, name)
    if size != PAGE_BYTES:
        raise StateFileError(f"unit.hyperv.{name}.size", f"region size {size:#x}", f"{PAGE_BYTES:#x}")
    if found != number or flag > 1:
        raise StateFileError(f"unit.hyperv.{name}", f"region {found}, flag {flag}", f"region {number}, flag 0 or 1")
    if length > DESCRIPTION_BYTES_MAX:
        supported = f"{DESCRIPTION_BYTES_MAX} at most"
        raise StateFileError(f"unit.hyperv.{name}.description", f"a text of {length} bytes", supported)
    reader.take_bytes(length, f"{name}.description")
    return gpa


def _check_place(name: str, msr: int, gpa: int) -> None:
    said = msr & -PAGE_BYTES
    if msr & ENABLED and gpa != said:
        raise StateFileError(f"unit.hyperv.{name}.gpa", f"{gpa:#x}", f"{said:#x}, which the MSR says")


def _later_parts(reader: _Reader, version: int, vcpus: int) -> tuple[DebugPart, tuple[VcpuPart, ...]]:
    if version < HAS_DEBUGGER:
        return DebugPart(), (VcpuPart(),) * vcpus
    debug = DebugPart(*reader.take(DEBUG, "debug"), *(reader.take(PORTS, "ports") if version >= HAS_PORTS else ()))
    if debug.reply >= REPLIES:
        raise StateFileError("unit.hyperv.debug.reply", f"{debug.reply}", f"0 to {REPLIES - 1}")
    vcpu_parts = tuple(_vcpu(reader, version, f"vcpus[{vcpu}]") for vcpu in range(vcpus))
    end = reader.take_bytes(len(END), "end")
    if end != END:
        raise StateFileError("unit.hyperv.end", f"{end[0]:#x}", f"{END[0]:#x} after {vcpus} vCPUs")
    return debug, vcpu_parts


def _vcpu(reader: _Reader, version: int, field: str) -> VcpuPart:
    message_page, *sints = reader.take(_vcpu_layout(version), field)
    if version < HAS_ALL_SINTS:
        sints = [sints[0] if sint == VMBUS_SINT else MASKED for sint in range(SINTS)]
    return VcpuPart(message_page, tuple(sints))


def _vcpu_layout(version: int) -> struct.Struct:
    return struct.Struct(f"<{1 + (SINTS if version >= HAS_ALL_SINTS else 1)}Q")


def _encoded_debug(debug: DebugPart, version: int) -> bytes:
    *fields, destination, source = debug
    return DEBUG.pack(*fields) + (PORTS.pack(destination, source) if version >= HAS_PORTS else b"")


def _encoded_vcpus(unit: Unit, version: int) -> bytes:
    layout, sints = (
        _vcpu_layout(version),
        slice(None) if version >= HAS_ALL_SINTS else slice(VMBUS_SINT, VMBUS_SINT + 1),
    )
    return b"".join(layout.pack(vcpu.message_page, *vcpu.sints[sints]) for vcpu in unit.vcpus) + END
