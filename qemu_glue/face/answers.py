"""The shapes of what QMP's commands return and events carry; query-qmp-schema tells them, mypy holds the code to them.

Source: QEMU's qapi/*.json; names with "x-" and X_ are ours.
"""

from __future__ import annotations

from typing import Final, NotRequired, TypedDict

from pvclock.machine import RunState

__all__ = [
    "EVENTS",
    "ChangeData",
    "ClockInfo",
    "CommandInfo",
    "CpuInfo",
    "KvmInfo",
    "MemdevInfo",
    "MigrationCapability",
    "PageInfo",
    "PropertyInfo",
    "Ratio",
    "ResetData",
    "StatusInfo",
    "SteeringInfo",
    "TypeInfo",
    "VcpuClockInfo",
    "VersionInfo",
]


class CommandInfo(TypedDict):
    """A command."""

    name: str


class VersionTriple(TypedDict):
    """A version by its numbers."""

    major: int
    minor: int
    micro: int


class VersionInfo(TypedDict):
    """What answers."""

    qemu: VersionTriple
    package: str


class StatusInfo(TypedDict):
    """The run state."""

    status: RunState
    singlestep: bool
    running: bool


class KvmInfo(TypedDict):
    """Is KVM there, and used?"""

    enabled: bool
    present: bool


CpuInfo = TypedDict("CpuInfo", {"cpu-index": int, "qom-path": str, "thread-id": int, "target": str})


class MigrationCapability(TypedDict):
    """One, and whether it is on."""

    capability: str
    state: bool


MemdevInfo = TypedDict(
    "MemdevInfo",
    {
        "id": str,
        "size": int,
        "merge": bool,
        "dump": bool,
        "prealloc": bool,
        "share": bool,
        "reserve": bool,
        "host-nodes": list[int],
        "policy": str,
    },
)


class TypeInfo(TypedDict):
    """A type of objects."""

    name: str
    abstract: NotRequired[bool]
    parent: NotRequired[str]


PropertyInfo = TypedDict(
    "PropertyInfo",
    {"name": str, "type": str, "description": NotRequired[str], "default-value": NotRequired[object]},
)


class Ratio(TypedDict):
    """An exact number."""

    numerator: int
    denominator: int


SteeringInfo = TypedDict("SteeringInfo", {"state": str, "error-ns": float | None, "bound-ns": float | None})

PageInfo = TypedDict(
    "PageInfo",
    {
        "version": int,
        "tsc-timestamp": int,
        "system-time": int,
        "tsc-to-system-mul": int,
        "tsc-shift": int,
        "flags": int,
    },
)

VcpuClockInfo = TypedDict("VcpuClockInfo", {"cpu-index": int, "tsc-offset": int, "page": PageInfo | None})

ClockInfo = TypedDict(
    "ClockInfo",
    {
        "guest-ns": int,
        "is-paused": bool,
        "policy": str,
        "reference": str,
        "rate": float,
        "dilation": Ratio,
        "skew-ns": float,
        "tsc-hz": int,
        "steering": SteeringInfo | None,
        "vcpus": list[VcpuClockInfo],
        "last-event": int,
    },
)


class ResetData(TypedDict):
    """Why the machine was reset, or has ended, and whether its guest did it."""

    guest: bool
    reason: str


class PanicData(TypedDict):
    """What was done."""

    action: str


ChangeData = TypedDict(
    "ChangeData",
    {
        "sequence": int,
        "kind": str,
        "cause": str,
        "why": str,
        "policy": str | None,
        "provider": str,
        "tsc-hz": int | None,
        "host-tsc": int | None,
        "raw-ns": int | None,
        "real-ns": int | None,
        "jump-ns": list[int],
        "guest-ns-before": list[int],
        "guest-ns-after": list[int],
        "rate-before": list[int],
        "rate-after": list[int],
    },
)

EVENTS: Final[dict[str, type | None]] = {
    "STOP": None,
    "RESUME": None,
    "POWERDOWN": None,
    "RESET": ResetData,
    "SHUTDOWN": ResetData,
    "GUEST_PANICKED": PanicData,
    "X_PVCLOCK_CHANGE": ChangeData,
}
"""Each event that a machine sends, and its data."""
