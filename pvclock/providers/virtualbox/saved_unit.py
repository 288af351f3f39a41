"""VirtualBox's saved unit "GIM", version 1: which provider a VM has and what its guest wrote, in little-endian bytes.

u32 provider id, u32 provider version, then the provider's part.  None and Minimal have none.  KVM's: u32 version; per
vCPU u64 system-time MSR, u64 TSC, u64 ns, u64 page address, u32 page version, u8 page flags; u64 wall-clock MSR; u32
features.  The unit holds what a guest wrote, not what time it is: that is ClockState's, and TSC, ns, version and flags
are what the page showed, for who must derive the time from them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from pvclock._core import read_time_info
from pvclock._memory import GuestMemory
from pvclock.errors import GuestAddressError, StateFileError
from pvclock.quantities import Gpa

__all__ = [
    "UNIT_VERSION",
    "KvmPart",
    "VcpuPart",
    "decode_header",
    "decode_kvm",
    "encode_header",
    "encode_kvm",
    "vcpu_part",
]

UNIT_VERSION: Final = 1
KVM_PART_VERSION: Final = 1

HEADER: Final = struct.Struct("<II")
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
        """Where the page is; None if updates are off, or if the address crosses a page, which nobody serves."""
        gpa = self.system_time_msr & ~ENABLED
        is_whole = gpa % PAGE_BYTES + TIME_INFO_BYTES <= PAGE_BYTES
        return Gpa(gpa) if self.system_time_msr & ENABLED and is_whole else None


class KvmPart(NamedTuple):
    """The KVM provider's part of a unit."""

    vcpus: tuple[VcpuPart, ...]
    wall_clock_msr: int
    features: int


def vcpu_part(memory: GuestMemory, system_time_msr: int) -> VcpuPart:
    """What is saved of a vCPU whose MSR has that value, with its page as it lies in `memory`."""
    part = VcpuPart(system_time_msr)
    if part.page is None:
        return part
    try:
        page = read_time_info(memory, part.page)
    except GuestAddressError:
        return part._replace(gpa=part.page)
    return VcpuPart(system_time_msr, page.tsc_timestamp, page.system_time, part.page, page.version, page.flags)


def encode_header(provider: int, version: int) -> bytes:
    """Provider id and provider version."""
    return HEADER.pack(provider, version)


def decode_header(unit: bytes) -> tuple[int, int, bytes]:
    """Provider id, provider version and the provider's part; StateFileError if `unit` is too short."""
    if len(unit) < HEADER.size:
        raise StateFileError("unit", f"{len(unit)} bytes", f"at least {HEADER.size}: provider id and version")
    return *HEADER.unpack_from(unit), unit[HEADER.size :]


def encode_kvm(part: KvmPart) -> bytes:
    """The KVM provider's part as bytes."""
    vcpus = b"".join(VCPU.pack(*vcpu) for vcpu in part.vcpus)
    return VERSION.pack(KVM_PART_VERSION) + vcpus + GLOBAL.pack(part.wall_clock_msr, part.features)


def decode_kvm(data: bytes, vcpus: int) -> KvmPart:
    """The KVM provider's part of a VM of `vcpus`; StateFileError if it is none."""
    expected = VERSION.size + vcpus * VCPU.size + GLOBAL.size
    version = VERSION.unpack_from(data)[0] if len(data) >= VERSION.size else None
    if version is not None and version != KVM_PART_VERSION:
        raise StateFileError(
            "unit.kvm.version", f"unsupported KVM saved-state version {version}", f"{KVM_PART_VERSION}"
        )
    if len(data) != expected:
        raise StateFileError("unit.kvm", f"{len(data)} bytes", f"{expected} bytes, for {vcpus} vCPUs")
    end = VERSION.size + vcpus * VCPU.size
    parts = tuple(VcpuPart(*fields) for fields in VCPU.iter_unpack(data[VERSION.size : end]))
    _check_addresses(parts)
    return KvmPart(parts, *GLOBAL.unpack_from(data, end))


def _check_addresses(parts: Sequence[VcpuPart]) -> None:
    for vcpu, part in enumerate(parts):
        said = part.system_time_msr & ~ENABLED
        if part.gpa not in (0, said):
            raise StateFileError(f"unit.kvm.vcpus[{vcpu}].gpa", f"{part.gpa:#x}", f"0 or {said:#x}, which the MSR says")
