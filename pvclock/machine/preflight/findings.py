"""What the pre-flight says: findings with stable ids, by severity."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple

__all__ = ["NOTHING", "Finding", "Severity"]

NOTHING: Final[Mapping[str, object]] = {}


class Severity(StrEnum):
    """How bad it is."""

    ERROR = "error"
    """The guest will read a wrong time, or not boot."""
    WARNING = "warning"
    """The guest's time is not what the one who set the VM up may expect."""
    NOTE = "note"
    """What to expect; nothing is wrong."""


class Finding(NamedTuple):
    """One finding.

    code: stable, for programs.  what: the fact.  guest_sees: what follows for the guest.  advice: what to do, "" for a
    note.  vcpu: whose it is; None for the VM's.  values: its numbers, by names with their units.
    """

    code: str
    severity: Severity
    what: str
    guest_sees: str
    advice: str = ""
    vcpu: int | None = None
    values: Mapping[str, object] = NOTHING
