"""The saved state of one VM's clock: what it holds, what it leaves out and why, and its file.

All numbers are exact: whole ones, and fractions as [numerator, denominator].  Reading is all or nothing: a field that
is missing, mistyped, out of range, unknown or repeated raises StateFileError, which names it.  Every version ever
written stays readable.  A state keeps the version that it was read with; fields that this version lacks get the value
of a clock that never used the feature, or None if that is unknown.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from enum import StrEnum
from fractions import Fraction
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

from pvclock import arguments
from pvclock.errors import ConfigError, RangeError, StateFileError, WrongType
from pvclock.providers.interface import MsrValue
from pvclock.providers.registry import PROVIDERS
from pvclock.quantities import U64_MASK
from pvclock.state.json_schema import (
    BOOLEAN,
    BYTES_MAX,
    TEXT,
    Kind,
    fraction,
    list_of,
    one_of,
    optional,
    parse,
    plain,
    record,
    render,
    table,
    whole,
)
from pvclock.timekeeping import catchup
from pvclock.timekeeping.catchup import Freeze, Policy

__all__ = [
    "FIELDS",
    "VCPUS_MAX",
    "VERSION",
    "ClockState",
    "Field",
    "HostState",
    "Mark",
    "OfferState",
    "ProviderState",
    "ReferenceState",
    "SavedPolicy",
    "SlewState",
    "TimelineState",
    "VcpuState",
    "WallClockState",
    "check_provider",
    "checked",
    "from_json",
    "from_mapping",
    "read",
    "rows",
    "to_json",
    "to_mapping",
    "write",
]

VERSION: Final = 3
VCPUS_MAX: Final = 4096

ConfigValue: TypeAlias = int | bool | str


class SavedPolicy(NamedTuple):
    """A catch-up policy and its saved name; the policy is None if this pvclock does not know the name."""

    name: str
    policy: Policy | None

    @classmethod
    def of(cls, policy: Policy | str) -> SavedPolicy:
        """Check a policy, or parse its name, and keep it with its name; errors as catchup.as_policy()."""
        checked_policy = catchup.as_policy(policy)
        return cls(str(checked_policy), checked_policy)

    @classmethod
    def named(cls, name: str) -> SavedPolicy:
        """The policy of that name, None if unknown."""
        arguments.text("name", name)
        try:
            return cls(name, catchup.parse(name))
        except (ConfigError, RangeError):
            return cls(name, None)

    def __str__(self) -> str:
        return self.name

    def known(self, field: str) -> Policy:
        """The policy; StateFileError with `field` if this pvclock does not know it."""
        arguments.text("field", field)
        if self.policy is not None:
            return self.policy
        try:
            return catchup.parse(self.name)
        except (ConfigError, RangeError) as error:
            raise StateFileError(field, repr(self.name), str(error)) from None


class ProviderState(NamedTuple):
    """The guest's clock interface: its configuration, and the MSRs that the guest wrote."""

    name: str
    version: int
    config: Mapping[str, ConfigValue]
    msrs: Mapping[str, MsrValue]


class TimelineState(NamedTuple):
    """Exact guest time at the stamp, and how it continues."""

    guest_ns: Fraction
    dilation: Fraction
    paused: bool
    paused_dilation: Fraction | None


class SlewState(NamedTuple):
    """Guest ns still to slew in at the stamp, negative for a clock that is ahead, and the policy."""

    remaining_ns: Fraction
    policy: SavedPolicy


class HostState(NamedTuple):
    """The host at the stamp: one instant on each of its clocks."""

    tsc: int
    tsc_hz: int
    raw_ns: int | None
    real_ns: int
    boot_id: str | None
    asleep_ns: int | None


class ReferenceState(NamedTuple):
    """The reference that guest time followed, and its bounds."""

    name: str
    max_ppm: Fraction
    panic_ns: int | None


class WallClockState(NamedTuple):
    """The base of the guest's time of day."""

    offset_ns: int
    fixed_ns: int | None


class OfferState(NamedTuple):
    """TSC features that CPUID offers besides the provider's leaves."""

    tsc_adjust: bool
    invariant_tsc: bool


class VcpuState(NamedTuple):
    """One vCPU's TSC at the stamp, and its time page's address."""

    tsc_offset: int
    tsc_adjust: int
    tsc_aux: int
    guest_tsc: int
    time_page_gpa: int | None


class ClockState(NamedTuple):
    """A clock at one instant, the stamp.  `FIELDS` says what each field means."""

    version: int
    provider: ProviderState
    policy: SavedPolicy
    sleep_policy: SavedPolicy
    timeline: TimelineState
    slew: SlewState | None
    reference: ReferenceState | None
    host: HostState
    guest_tsc_hz: int | None
    wall_clock_gpa: int | None
    wall_clock: WallClockState
    offers: OfferState
    vcpus: tuple[VcpuState, ...]


class Mark(StrEnum):
    """How saving treats a part of a clock."""

    SAVED = "saved"
    DERIVED = "derived"
    NOT_SAVED = "not saved"


class Field(NamedTuple):
    """A part of a clock: dotted path, how saving treats it, its meaning, and the values allowed if it is saved.

    since: the first version that holds it.
    """

    path: str
    mark: Mark
    meaning: str
    kind: Kind | None = None
    since: int = 1


def _read_policy(value: object, path: str) -> SavedPolicy:
    return SavedPolicy.named(TEXT.read(value, path))


_POLICY = Kind(TEXT.supported, _read_policy)


def _saved(path: str, kind: Kind, meaning: str, since: int = 1) -> Field:
    return Field(path, Mark.SAVED, meaning, kind, since)


_U32 = whole(0, 2**32 - 1, "a whole number from 0 to 2^32-1")
_U64 = whole(0, U64_MASK, "a whole number from 0 to 2^64-1")
_S64 = whole(-(2**63), 2**63 - 1, "a whole number from -2^63 to 2^63-1")
_HZ = whole(1, U64_MASK, "a whole number from 1 to 2^64-1")
_VERSION = whole(1, 2**32 - 1, "a whole number from 1 to 2^32-1")
_GUEST_NS = fraction(lambda ns: 0 <= ns < 2**64, "from 0 to below 2^64")
_SKEW_NS = fraction(lambda ns: abs(ns) < 2**64, "between -2^64 and 2^64")
_PPM = fraction(lambda ppm: 0 < ppm <= 100_000, "above 0 and up to 100000")
_DILATION = fraction(lambda rate: 0 < rate < 2**64, "above 0 and below 2^64")
_SETTING = one_of(f"true, false, text or {_U64.supported}", {bool: BOOLEAN, int: _U64, str: TEXT})
_U64S = list_of(_U64, 0, BYTES_MAX, "a list of whole numbers from 0 to 2^64-1")
_MSR = optional(
    one_of(f"{_SETTING.supported}, or a list of such", {bool: BOOLEAN, int: _U64, str: TEXT, list: _U64S, tuple: _U64S})
)

FIELDS: Final[tuple[Field, ...]] = (
    _saved("version", whole(1, VERSION, f"1 to {VERSION}"), "The version of this format."),
    _saved("provider.name", TEXT, "The clock interface that the guest has; a VM keeps it for life."),
    _saved("provider.version", _VERSION, "The version of the provider's config and msrs."),
    _saved("provider.config", table(_SETTING), "The options that the provider was made with."),
    _saved("provider.msrs", table(_MSR), "The values that the guest last wrote; a list has one a vCPU."),
    _saved("policy", _POLICY, "Catch-up policy for the time until the state is restored."),
    _saved("sleep_policy", _POLICY, "Catch-up policy for host sleep while the VM runs.", since=2),
    _saved("timeline.guest_ns", _GUEST_NS, "Guest time at the stamp, exact."),
    _saved("timeline.dilation", _DILATION, "Guest seconds in a host second, without any slew."),
    _saved("timeline.paused", BOOLEAN, "Did guest time stand still at the stamp?"),
    _saved("timeline.paused_dilation", optional(_DILATION), "Dilation of the missed time; null: the same.", since=3),
    _saved("slew.remaining_ns", _SKEW_NS, "Guest time still to be slewed in; negative for a clock that is ahead."),
    _saved("slew.policy", _POLICY, "The policy that slews it in."),
    _saved("reference.name", TEXT, "The clock that guest time follows; the adjustment is not saved.", since=2),
    _saved("reference.max_ppm", _PPM, "Bound of the frequency adjustment.", since=2),
    _saved("reference.panic_ns", optional(_U64), "A larger error is not worked off; null: no limit.", since=2),
    _saved("host.tsc", _U64, "The saving host's TSC; gives the elapsed time within one boot."),
    _saved("host.tsc_hz", _HZ, "Its frequency."),
    _saved("host.raw_ns", optional(_S64), "Its raw monotonic clock, if it has one; valid within one boot."),
    _saved("host.real_ns", _S64, "UTC since 1970; gives the elapsed time on any host and boot."),
    _saved("host.boot_id", optional(TEXT), "The saving host's boot id."),
    _saved("host.asleep_ns", optional(_S64), "Its time asleep since boot; null if unknown.", since=2),
    _saved("guest_tsc_hz", optional(_HZ), "The TSC frequency that the guest sees; null for host.tsc_hz.", since=2),
    _saved("wall_clock_gpa", optional(_U64), "Address of the guest's wall-clock page."),
    _saved("wall_clock.offset_ns", _S64, "Added to UTC for the guest's time of day.", since=2),
    _saved("wall_clock.fixed_ns", optional(_S64), "The time of day at guest time 0; null for the host's UTC.", since=2),
    _saved("offers.tsc_adjust", BOOLEAN, "Does CPUID offer IA32_TSC_ADJUST?"),
    _saved("offers.invariant_tsc", BOOLEAN, "Does CPUID show an invariant TSC?"),
    _saved("vcpus[].tsc_offset", _U64, "Ticks added to the host's TSC, ADJUST included; valid within one boot."),
    _saved("vcpus[].tsc_adjust", _U64, "IA32_TSC_ADJUST as the guest reads it."),
    _saved("vcpus[].tsc_aux", _U32, "IA32_TSC_AUX, which RDTSCP returns."),
    _saved("vcpus[].guest_tsc", _U64, "RDTSC's result at the stamp; gives the offset on any other host."),
    _saved("vcpus[].time_page_gpa", optional(_U64), "Address of the time page; the MSR's last value may differ."),
    Field("vcpus[].base_offset", Mark.DERIVED, "tsc_offset - tsc_adjust."),
    Field("vcpus[].time_page", Mark.DERIVED, "Published anew from the timeline, with the version in guest memory."),
    Field("shown.mul", Mark.DERIVED, "From the dilation and the restoring host's TSC frequency."),
    Field("shown.shift", Mark.DERIVED, "Like shown.mul."),
    Field("shown.stable", Mark.DERIVED, "TSC_STABLE: if all offsets agree and the restoring host trusts its TSC."),
    Field("slew.slew", Mark.DERIVED, "Planned anew from what remains."),
    Field("cpuid", Mark.DERIVED, "From the provider's name and config."),
    Field("guest_memory", Mark.NOT_SAVED, "The VMM saves it, with pages, wall clock and GUEST_STOPPED."),
    Field("tsc_ratio", Mark.NOT_SAVED, "Always 1: the guest's TSC is as fast as its host's."),
    Field("host.tsc_stable", Mark.NOT_SAVED, "Asked of the restoring host."),
    Field("host.kernel_features", Mark.NOT_SAVED, "Asked of the restoring host; the provider refuses what it lacks."),
    Field("host.descriptors", Mark.NOT_SAVED, "Descriptors, threads and the backend are the restoring process's."),
    Field("correction", Mark.NOT_SAVED, "The frequency adjustment found: another host's TSC needs another."),
    Field("events", Mark.NOT_SAVED, "The event log belongs to the saving process; a restore begins another."),
    Field("refused_offset", Mark.NOT_SAVED, "Concerns the saving host only."),
)
"""Every part of a clock; the saved ones are the fields of `ClockState`, in order."""

_SAVED = {field.path: field for field in FIELDS if field.kind}
_KINDS = {path: field.kind for path, field in _SAVED.items() if field.kind}
_PARTS: Final[dict[str, tuple[type, bool]]] = {
    "provider": (ProviderState, False),
    "timeline": (TimelineState, False),
    "slew": (SlewState, True),
    "host": (HostState, False),
    "offers": (OfferState, False),
    "reference": (ReferenceState, True),
    "wall_clock": (WallClockState, False),
}
"""The objects within a state, and whether each may be null."""


def _kinds(names: tuple[str, ...], prefix: str, version: int) -> dict[str, Kind]:
    """The kinds of those `names` that a state of that version holds."""
    found = {name: _SAVED[prefix + name] for name in names if prefix + name in _SAVED}
    return {name: field.kind for name, field in found.items() if field.kind and field.since <= version}


_LACKING: Final[dict[str, Any]] = {
    "sleep_policy": SavedPolicy.of(Freeze()),
    "reference": None,
    "guest_tsc_hz": None,
    "wall_clock": WallClockState(0, None),
    "host.asleep_ns": None,
    "timeline.paused_dilation": None,
}
"""Values of members that are newer than the state's version."""


def _lacking(prefix: str, version: int) -> dict[str, Any]:
    """Members under `prefix` that a state of that version lacks, with their values."""
    found = {path.removeprefix(prefix): value for path, value in _LACKING.items() if path.startswith(prefix)}
    return {name: value for name, value in found.items() if "." not in name and _since(prefix + name) > version}


def _since(path: str) -> int:
    """The first version that holds the member or a field under it."""
    return min(field.since for name, field in _SAVED.items() if name == path or name.startswith(f"{path}."))


def _schema(version: int) -> Kind:
    kinds = _kinds(ClockState._fields, "", version)
    for name, (part, may_be_null) in _PARTS.items():
        if members := _kinds(part._fields, f"{name}.", version):  # type: ignore[attr-defined]  # NamedTuples all
            kind = record(partial(part, **_lacking(f"{name}.", version)), members)
            kinds[name] = optional(kind) if may_be_null else kind
    vcpu = record(VcpuState, _kinds(VcpuState._fields, "vcpus[].", version))
    kinds["vcpus"] = list_of(vcpu, 1, VCPUS_MAX, f"a list of 1 to {VCPUS_MAX} vCPUs")
    return record(
        partial(ClockState, **_lacking("", version)),
        {name: kinds[name] for name in ClockState._fields if name in kinds},
    )


_SCHEMAS: Final = {version: _schema(version) for version in range(1, VERSION + 1)}


def _read(mapping: object) -> ClockState:
    """Read a mapping by the schema of the version that it names."""
    version = VERSION
    if isinstance(mapping, Mapping) and "version" in mapping:
        version = _KINDS["version"].read(mapping["version"], "version")  # first, since it selects the schema
    state: ClockState = _SCHEMAS[version].read(mapping, "")
    return state


def _plain(state: ClockState) -> object:
    """The state as JSON objects and lists, with the fields of its version."""
    mapping: Any = plain(_with_names(state))
    for name in _lacking("", state.version):
        del mapping[name]
    for part in _PARTS:
        for name in _lacking(f"{part}.", state.version):
            del mapping[part][name]
    return mapping


def _with_names(state: ClockState) -> ClockState:
    """Replace policies by their names; leave anything else, which the schema then refuses."""
    slew = state.slew
    if isinstance(slew, SlewState):
        slew = slew._replace(policy=_name_of(slew.policy))
    return state._replace(policy=_name_of(state.policy), sleep_policy=_name_of(state.sleep_policy), slew=slew)


def _name_of(policy: object) -> Any:  # noqa: ANN401  # passes other types through
    return policy.name if isinstance(policy, SavedPolicy) else policy


# To and from JSON


def to_mapping(state: ClockState) -> dict[str, Any]:
    """The state as JSON objects and lists; StateFileError if from_mapping() would refuse it."""
    mapping: Any = _plain(checked(state))
    return dict(mapping)


def checked(state: ClockState) -> ClockState:
    """The state, if from_mapping() would read it; else StateFileError."""
    return _read(_plain(arguments.instance("state", state, ClockState)))


def from_mapping(mapping: object) -> ClockState:
    """The inverse of to_mapping(); StateFileError if `mapping` is not a valid state."""
    return _read(mapping)


def to_json(state: ClockState) -> str:
    """The state as a readable JSON document, identical for equal states; StateFileError if the state is invalid."""
    document = render(to_mapping(state)) + "\n"
    if len(document) > BYTES_MAX:
        raise StateFileError("file", f"{len(document)} bytes", f"up to {BYTES_MAX} bytes")
    return document


def from_json(document: str | bytes) -> ClockState:
    """The state in a JSON document (bytes: UTF-8); StateFileError if it is not valid."""
    if not isinstance(document, str | bytes):
        raise WrongType("document", document, "a JSON document, as text or bytes")
    return from_mapping(parse(document))


def check_provider(state: ClockState) -> None:
    """StateFileError if this pvclock lacks the state's provider, or its version."""
    arguments.instance("state", state, ClockState)
    name, version = state.provider.name, state.provider.version
    if name not in PROVIDERS:
        raise StateFileError("provider.name", repr(name), ", ".join(map(repr, PROVIDERS)))
    if version > PROVIDERS[name].version:
        raise StateFileError("provider.version", str(version), f"1 to {PROVIDERS[name].version}")


def rows(state: ClockState) -> Iterator[tuple[str, Field, object]]:
    """(path, field, value) of each saved field, the vCPUs' last; then of the others, with value None."""
    return _rows(arguments.instance("state", state, ClockState))


def _rows(state: ClockState) -> Iterator[tuple[str, Field, object]]:
    saved = [field for field in FIELDS if field.kind]
    of_vcpus = [field for field in saved if field.path.startswith("vcpus[].")]
    yield from ((field.path, field, _value(state, field.path)) for field in saved if field not in of_vcpus)
    for place, vcpu in enumerate(state.vcpus):
        for field in of_vcpus:
            name = field.path.removeprefix("vcpus[].")
            yield f"vcpus[{place}].{name}", field, _value(vcpu, name)
    yield from ((field.path, field, None) for field in FIELDS if not field.kind)


def _value(state: object, path: str) -> object:
    for name in path.split("."):
        state = getattr(state, name, None)  # a part that is None has no fields
    return _name_of(state)


# Files


def write(path: str | os.PathLike[str], state: ClockState) -> None:
    """Write the state to file `path` atomically and sync it to disk.

    An existing file keeps its mode, owner, group and ACL as far as this process may set them, and never grants more
    (see atomic_file.replace()); a new one has mode 0600.  StateFileError if the state is invalid or the file cannot be
    written; the old content then stays.
    """
    path = arguments.path("path", path)
    content = to_json(state).encode("ascii")
    from pvclock.state import atomic_file  # loads pathlib, which a clock that is not saved to a file has no need of

    try:
        atomic_file.replace(path, [content])
    except (OSError, ValueError) as error:
        raise _file_error(path, error, "a regular file in a folder that can be written") from error


def read(path: str | os.PathLike[str]) -> ClockState:
    """The state in regular file `path`; StateFileError, with the path, if it cannot be read or is invalid."""
    path = arguments.path("path", path)
    from pvclock.state import atomic_file

    try:
        document = atomic_file.read(path, BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        raise _file_error(path, error, "a regular file that can be read") from error
    try:
        return from_json(document)
    except StateFileError as error:
        raise StateFileError(error.field, error.found, error.supported, path) from None


def _file_error(path: str, error: OSError | ValueError, supported: str) -> StateFileError:
    found = getattr(error, "strerror", None) or str(error)
    where = getattr(error, "filename", None)
    beside = f": {where}" if where and where != path else ""
    return StateFileError("file", f"{found}{beside}", supported, path)
