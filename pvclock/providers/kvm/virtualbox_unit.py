"""KVM's part of VirtualBox's saved unit "GIM": what the guest wrote and what its pages showed, little-endian.

u32 version; per vCPU u64 system-time MSR, u64 TSC, u64 ns, u64 page address, u32 page version, u8 page flags; u64
wall-clock MSR; u32 features.  It does not say what time it is: that is ClockState's.  TSC, ns, version and flags are
copied from the page, for VMMs that derive the time from them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from pvclock._core import read_time_info
from pvclock._memory import GuestMemory
from pvclock.errors import GuestAddressError, StateFileError
from pvclock.providers.interface import MsrValue
from pvclock.quantities import Gpa

__all__ = ["UnitPart", "VcpuPart", "decode", "encode", "part_of", "written_in"]

PART_VERSION: Final = 1

VERSION: Final = struct.Struct("<I")
VCPU: Final = struct.Struct("<QQQQIB")
GLOBAL: Final = struct.Struct("<QI")

ENABLED: Final = 1
PAGE_BYTES: Final = 4096
TIME_INFO_BYTES: Final = 32


class VcpuPart(NamedTuple):
    """One vCPU's system-time MSR, and what its page showed; all 0 beside the MSR if it has no page."""

    system_time_msr: int
    tsc: int = 0
    ns: int = 0
    gpa: int = 0
    version: int = 0
    flags: int = 0

    @property
    def page(self) -> Gpa | None:
        """The page's address; None if it is disabled, or crosses a page boundary, where it is never served."""
        gpa = self.system_time_msr & ~ENABLED
        is_whole = gpa % PAGE_BYTES + TIME_INFO_BYTES <= PAGE_BYTES
        return Gpa(gpa) if self.system_time_msr & ENABLED and is_whole else None


class UnitPart(NamedTuple):
    """The decoded part.  features: as the saving VM's CPUID offered them."""

    vcpus: tuple[VcpuPart, ...]
    wall_clock_msr: int
    features: int


def part_of(memory: GuestMemory, saved: Mapping[str, MsrValue], features: int) -> UnitPart:
    """What a unit holds of a provider whose save() is `saved`, with the pages as they lie in `memory`."""
    match saved:
        case {"system_time": tuple(system_time), "wall_clock": int(wall_clock)}:
            parts = tuple(_vcpu_part(memory, each) for each in system_time)
            return UnitPart(_with_own(parts, saved), wall_clock, features)
    raise AssertionError("provider 'KVM' saved neither system time nor wall clock")


def written_in(part: UnitPart) -> dict[str, MsrValue]:
    """What the guest of that unit had written, by the names of save()."""
    return {
        "system_time": tuple(vcpu.system_time_msr for vcpu in part.vcpus),
        "wall_clock": part.wall_clock_msr,
        "time_page_version": tuple(vcpu.version for vcpu in part.vcpus),
        "time_page_flags": tuple(vcpu.flags for vcpu in part.vcpus),
        "time_page_tsc": tuple(vcpu.tsc for vcpu in part.vcpus),
        "time_page_ns": tuple(vcpu.ns for vcpu in part.vcpus),
    }


def encode(part: UnitPart) -> bytes:
    """The part as bytes."""
    vcpus = b"".join(VCPU.pack(*vcpu) for vcpu in part.vcpus)
    return VERSION.pack(PART_VERSION) + vcpus + GLOBAL.pack(part.wall_clock_msr, part.features)


def decode(data: bytes, vcpus: int) -> UnitPart:
    """The part of a VM of `vcpus`; StateFileError for another version, length, or an address that the MSR denies."""
    expected = VERSION.size + vcpus * VCPU.size + GLOBAL.size
    version = VERSION.unpack_from(data)[0] if len(data) >= VERSION.size else None
    if version is not None and version != PART_VERSION:
        raise StateFileError("unit.kvm.version", f"unsupported KVM saved-state version {version}", f"{PART_VERSION}")
    if len(data) != expected:
        raise StateFileError("unit.kvm", f"{len(data)} bytes", f"{expected} bytes, for {vcpus} vCPUs")
    end = VERSION.size + vcpus * VCPU.size
    parts = tuple(VcpuPart(*fields) for fields in VCPU.iter_unpack(data[VERSION.size : end]))
    _check_addresses(parts)
    return UnitPart(parts, *GLOBAL.unpack_from(data, end))


def _vcpu_part(memory: GuestMemory, system_time_msr: int) -> VcpuPart:
    part = VcpuPart(system_time_msr)
    if part.page is None:
        return part
    try:
        page = read_time_info(memory, part.page)
    except GuestAddressError:
        return part._replace(gpa=part.page)
    return VcpuPart(system_time_msr, page.tsc_timestamp, page.system_time, part.page, page.version, page.flags)


def _with_own(parts: tuple[VcpuPart, ...], saved: Mapping[str, MsrValue]) -> tuple[VcpuPart, ...]:
    """The parts with the version, flags and line that the host keeps by itself, in profiles that do so."""
    match saved:
        case {
            "time_page_version": tuple(versions),
            "time_page_flags": tuple(flags),
            "time_page_tsc": tuple(tscs),
            "time_page_ns": tuple(ns),
        }:
            own = zip(parts, versions, flags, strict=True)
            counted = [part._replace(version=version, flags=each) for part, version, each in own]
            lines = zip(counted, tscs, ns, strict=True)
            return tuple(part if part.page is None else part._replace(tsc=tsc, ns=at) for part, tsc, at in lines)
    return parts


def _check_addresses(parts: Sequence[VcpuPart]) -> None:
    for vcpu, part in enumerate(parts):
        said = part.system_time_msr & ~ENABLED
        if part.gpa not in (0, said):
            raise StateFileError(f"unit.kvm.vcpus[{vcpu}].gpa", f"{part.gpa:#x}", f"0 or {said:#x}, which the MSR says")
