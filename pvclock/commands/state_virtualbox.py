"""VirtualBox's saved unit "GIM", as a format of `pvclock state`: what the guest wrote, and KVM's page lines.

A unit does not say what time it was when it was saved.  One of provider KVM has each page's line, from which a TSC
gives the time: so that TSC, and its frequency, have to be given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final, NamedTuple

from pvclock.commands import whole_file
from pvclock.commands.state_formats import Given, Row, as_number
from pvclock.commands.state_units import in_seconds
from pvclock.errors import ConfigError, StateFileError
from pvclock.providers.hyperv import virtualbox_unit as hyperv_unit
from pvclock.providers.interface import MsrValue
from pvclock.providers.kvm import virtualbox_unit as kvm_unit
from pvclock.providers.registry import PROVIDER_NUMBERS
from pvclock.providers.virtualbox import saved_unit
from pvclock.quantities import NS_PER_S, U64_MASK, signed64
from pvclock.state import atomic_file
from pvclock.state.clock_state import (
    VERSION,
    ClockState,
    HostState,
    Mark,
    OfferState,
    ProviderState,
    SavedPolicy,
    TimelineState,
    VcpuState,
    WallClockState,
)
from pvclock.timekeeping.catchup import Freeze

__all__ = ["IS_MADE_ANEW", "SavedUnit", "read", "recognises", "write"]

IS_MADE_ANEW: Final = True

VCPUS_MAX: Final = 4096
BYTES_MAX: Final = 1 << 20
KVM, HYPERV = PROVIDER_NUMBERS["KVM"], PROVIDER_NUMBERS["HyperV"]
NAMES: Final = {number: name for name, number in PROVIDER_NUMBERS.items()}
HYPERV_VCPU_BYTES: Final = {2: 2 * 8, 3: 17 * 8, 4: 17 * 8}
"""By version: the message page, and one SINT or all sixteen; version 1 has no vCPUs."""

KVM_MEANINGS: Final = {
    "system_time_msr": "The guest's last write: its time page's address, and in bit 0 whether it is enabled.",
    "tsc": "tsc_timestamp of the page.",
    "ns": "system_time of the page: guest time at tsc.",
    "gpa": "The page's address, again.",
    "version": "The page's version.",
    "flags": "The page's flags.",
}
WALL_CLOCK_MEANING: Final = "The guest's last write: the wall-clock page's address."
FEATURES_MEANING: Final = "CPUID 0x40000001 EAX, as the saving VM's guest saw it."
HYPERV_MEANINGS: Final = {
    "guest_os_id": "HV_X64_MSR_GUEST_OS_ID: what the guest says that it is.",
    "hypercall": "HV_X64_MSR_HYPERCALL: the hypercall page's address, and in bit 0 whether it is enabled.",
    "reference_tsc": "HV_X64_MSR_REFERENCE_TSC: the reference TSC page's address, and in bit 0 whether it is enabled.",
    "hypercall_page": "Where the hypercall page was last; all ones for nowhere.",
    "reference_page": "Where the reference TSC page was last; all ones for nowhere.",
    "sequence": "The reference TSC page's sequence.",
}
HYPERV_FEATURES: Final = ("base", "partition", "power", "miscellaneous", "hints", "host")
NO_TIME: Final = "Guest time when the unit was saved: a TSC and a page's line give it."
NO_RATE: Final = "The TSC's frequency, and so the page's mul and shift."


class SavedUnit(NamedTuple):
    """A unit that was read, of provider number `provider`; unit: KVM's or Hyper-V's, None if it has no part."""

    provider: int
    version: int
    unit: kvm_unit.UnitPart | hyperv_unit.Unit | None

    @property
    def summary(self) -> str:
        """Provider and vCPUs."""
        vcpus = "" if self.unit is None else f", {len(self.unit.vcpus)} vCPUs"
        return f"VirtualBox's unit of provider {NAMES[self.provider]}, version {self.version}{vcpus}"

    @property
    def notes(self) -> Sequence[str]:
        """That a unit is not a clock."""
        return ("the unit does not say what time it was: VirtualBox saves that apart",)

    def rows(self) -> Iterator[Row]:
        """What the guest wrote, then what is not there."""
        yield as_number(
            "provider", self.provider, "VirtualBox's number of the guest's interface.", NAMES[self.provider]
        )
        yield as_number("version", self.version, "Of the interface.")
        match self.unit:
            case kvm_unit.UnitPart():
                yield from _kvm_rows(self.unit)
            case hyperv_unit.Unit():
                yield from _hyperv_rows(self.unit)
        for field, meaning in (("guest_ns", NO_TIME), ("tsc_hz", NO_RATE)):
            yield Row(field, Mark.NOT_SAVED, None, "", "", meaning)

    def as_json(self) -> Mapping[str, Any]:
        """Its fields."""
        return {row.field: row.value for row in self.rows() if row.mark is Mark.SAVED}

    def check(self) -> None:
        """All that read() has taken can be loaded by a VM that is set up like the saving one."""

    def clock_state(self, given: Given) -> tuple[ClockState, list[str]]:
        """A clock with KVM's interface at that TSC; ConfigError if something must be given, or is not KVM's."""
        if not isinstance(self.unit, kvm_unit.UnitPart):
            raise ConfigError(
                f"a unit of provider {NAMES[self.provider]} has no line of time: it gives no clock's state"
            )
        if given.tsc_hz is None or given.guest_tsc is None or given.saved_ns is None:
            raise ConfigError("the unit does not say what time it was: give --tsc-hz, --guest-tsc and --saved-at")
        if given.features not in (None, self.unit.features):
            raise ConfigError(f"the unit's guest saw features {self.unit.features:#x}; leave out --features")
        return _kvm_state(self.unit, given.tsc_hz, given.guest_tsc, given.saved_ns), [
            "assumed: one TSC for all vCPUs, no IA32_TSC_ADJUST, UTC as the base of the guest's time of day"
        ]


def recognises(head: bytes) -> bool:
    """Does a unit begin like that: with the number of a provider that has one?"""
    return int.from_bytes(head[:4], "little") in (KVM, HYPERV) and len(head) >= saved_unit.HEADER.size


def read(path: str) -> SavedUnit:
    """The unit in file `path`; StateFileError."""
    try:
        content = atomic_file.read(path, BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise StateFileError("file", found, "a regular file that can be read", path) from None
    try:
        return _decoded(content)
    except StateFileError as error:
        raise StateFileError(error.field, error.found, error.supported, path) from None


def write(state: ClockState, path: str, _into: str | None) -> list[str]:
    """Write the unit of a clock with KVM's interface; what it leaves out.  ConfigError for another interface."""
    if state.provider.name != "KVM":
        raise ConfigError(f"the clock's interface is {state.provider.name}; a unit is written of KVM's only")
    part = _part_of(state)
    header = saved_unit.encode_header(KVM, 0)
    whole_file.write(path, header + kvm_unit.encode(part))
    return ["left out: what time it is but by the pages' lines; rates, slews, policies, TSC offsets, other MSRs"]


# KVM's part


def _kvm_rows(unit: kvm_unit.UnitPart) -> Iterator[Row]:
    for number, vcpu in enumerate(unit.vcpus):
        for name, value in vcpu._asdict().items():
            units = in_seconds(value) if name == "ns" else ""
            yield as_number(f"vcpus[{number}].{name}", value, KVM_MEANINGS[name], units)
    yield as_number("wall_clock_msr", unit.wall_clock_msr, WALL_CLOCK_MEANING)
    yield as_number("features", unit.features, FEATURES_MEANING)


def _kvm_state(unit: kvm_unit.UnitPart, tsc_hz: int, guest_tsc: int, saved_ns: int) -> ClockState:
    lines = [vcpu for vcpu in unit.vcpus if vcpu.page is not None]
    if not lines:
        raise ConfigError("no vCPU of the unit has a time page, so nothing tells its guest's time")
    line = lines[0]
    passed = signed64((guest_tsc - line.tsc) & U64_MASK)
    if passed < 0:
        raise ConfigError(
            f"--guest-tsc {guest_tsc:#x} is before the page's {line.tsc:#x}; it was later when it was saved"
        )
    system_time = tuple(vcpu.system_time_msr for vcpu in unit.vcpus)
    msrs: dict[str, MsrValue] = {
        "system_time": system_time,
        "wall_clock": unit.wall_clock_msr,
        "boot_vcpu_runs_old_kvmclock": False,
    }
    freeze = SavedPolicy.of(Freeze())
    return ClockState(
        version=VERSION,
        provider=ProviderState("KVM", 1, {"enforce_cpuid": True, "features": unit.features}, msrs),
        policy=freeze,
        sleep_policy=freeze,
        timeline=TimelineState(line.ns + Fraction(passed * NS_PER_S, tsc_hz), Fraction(1), True, None),
        slew=None,
        reference=None,
        host=HostState(guest_tsc, tsc_hz, None, saved_ns, None, None),
        guest_tsc_hz=tsc_hz,
        wall_clock_gpa=unit.wall_clock_msr or None,
        wall_clock=WallClockState(0, None),
        offers=OfferState(tsc_adjust=True, invariant_tsc=False),
        vcpus=tuple(VcpuState(0, 0, 0, guest_tsc, vcpu.page) for vcpu in unit.vcpus),
    )


def _part_of(state: ClockState) -> kvm_unit.UnitPart:
    """The unit's part: pages with the line that goes through the state's own instant."""
    match state.provider.msrs, state.provider.config:
        case {"system_time": tuple(system_time), "wall_clock": int(wall_clock)}, {"features": int(features)}:
            pairs = zip(system_time, state.vcpus, strict=True)
            vcpus = tuple(_vcpu_part(int(msr), vcpu.guest_tsc, state) for msr, vcpu in pairs)
            return kvm_unit.UnitPart(vcpus, wall_clock, features)
    raise ConfigError("the clock's state has no system_time and wall_clock of KVM's interface")


def _vcpu_part(msr: int, guest_tsc: int, state: ClockState) -> kvm_unit.VcpuPart:
    part = kvm_unit.VcpuPart(msr)
    if part.page is None:
        return part
    return kvm_unit.VcpuPart(msr, guest_tsc, int(state.timeline.guest_ns), part.page)


# Hyper-V's part


def _hyperv_rows(unit: hyperv_unit.Unit) -> Iterator[Row]:
    for name, value in unit._asdict().items():
        if isinstance(value, int):
            yield as_number(name, value, HYPERV_MEANINGS[name])
    for name, feature in zip(HYPERV_FEATURES, unit.features, strict=True):
        yield as_number(f"features.{name}", feature, f"CPUID's {name} word, as the guest saw it.")
    for number, vcpu in enumerate(unit.vcpus):
        yield as_number(f"vcpus[{number}].message_page", vcpu.message_page, "HV_X64_MSR_SIMP, the guest's last write.")


# The unit


def _decoded(content: bytes) -> SavedUnit:
    if len(content) > BYTES_MAX:
        raise StateFileError("file", f"more than {BYTES_MAX} bytes", f"up to {BYTES_MAX} bytes")
    provider, version, part = saved_unit.decode_header(content)
    if provider == KVM:
        per_vcpu, fixed = kvm_unit.VCPU.size, kvm_unit.VERSION.size + kvm_unit.GLOBAL.size
        return SavedUnit(provider, version, kvm_unit.decode(part, _count(part, fixed, per_vcpu)))
    if provider == HYPERV:
        return SavedUnit(provider, version, _hyperv_part(part))
    raise StateFileError("provider", f"{provider}", f"{HYPERV} (HyperV), {KVM} (KVM)")


def _count(part: bytes, fixed: int, per_vcpu: int) -> int:
    """How many vCPUs a part of that length has."""
    return min(max(1, (len(part) - fixed) // per_vcpu), VCPUS_MAX)


def _hyperv_part(part: bytes) -> hyperv_unit.Unit:
    """The part, whose length tells its vCPUs."""
    version = int.from_bytes(part[: hyperv_unit.VERSION.size], "little")
    if version not in HYPERV_VCPU_BYTES:
        return hyperv_unit.decode(part, 1)  # which says what is wrong with it, or it has no vCPUs
    fixed = len(hyperv_unit.encode(hyperv_unit.unit_of({}, (0,) * 6, 0), version))
    return hyperv_unit.decode(part, _count(part, fixed, HYPERV_VCPU_BYTES[version]))
