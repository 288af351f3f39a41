"""What a watch finds: a page's line gave way to another, pages disagreed, flags changed, a page was lost, a stall.

Each is a plain value with its bounds; nothing here measures.  `at` and all other instants are the host's TSC.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias

from pvclock.meter.watch.vm import VmEvent
from pvclock.quantities import HostTsc
from pvclock.readings import TimeInfo

__all__ = ["TOLD_STALL_NS", "Change", "Disagreement", "FlagsChange", "PageLost", "Stall", "Step", "TscBasis"]


class TscBasis(StrEnum):
    """What is known of the guest's TSC between two lines of its page."""

    OFFSETS = "offsets"
    """Its offset was read with both lines."""
    ASSUMED = "assumed"
    """Offsets cannot be read, and nothing says that it was changed: the step is right if it was not."""
    CHANGED = "changed"
    """It was changed, or may have been, and by how much is unknown: a reset, an incoming migration, a guest's write."""


class Step(NamedTuple):
    """A page's line gave way to another; of no length, most of the time.

    at: the change was seen at, and it happened after `since`.  lines: how many lines followed each other meanwhile, by
    the version: their steps' sum is exact, the single ones are unknown.  1 if the version went back, or stayed.  0: the
    line is the same, and the guest's TSC was written: its clock reads as much more or less.
    step_ns: *against the TSC*: what the newer line gives more than the older one when it took its place; true to
    bound_ns.  Both None if `basis` is CHANGED.
    seen_ns: *seen by the guest*, if it was stopped and continued meanwhile and the VMM told when: its clock's progress
    from STOP to RESUME by this page once it was up to date, true to seen_bound_ns; else both None.  vCPUs may stand for
    longer than that: a little below 0 is the VMM's own work, of which the guest saw nothing.  A page that was late, and
    read meanwhile, had that reader's clock go on by the whole pause, and then back: see Disagreement.
    """

    at: HostTsc
    since: HostTsc
    vcpu: int
    before: TimeInfo
    after: TimeInfo
    lines: int
    basis: TscBasis
    step_ns: int | None
    bound_ns: int | None
    seen_ns: int | None
    seen_bound_ns: int | None
    events: tuple[VmEvent, ...]


class Disagreement(NamedTuple):
    """The pages of two vCPUs gave different times for one TSC, and agree again, or the watch has ended.

    ahead, behind: the vCPUs.  by_ns: by how much at most, true to bound_ns.  least_ns: for how long at least, from the
    first poll to the last that saw it; at: the last.  A reader that used vCPU `ahead`'s page meanwhile saw its clock go
    back by up to by_ns when that page was brought up to date.
    basis: OFFSETS: by each vCPU's TSC at one host instant; ASSUMED: as if they all read the same TSC.
    is_stale: it ended because one of them is not vCPU 0, and has missed so many of vCPU 0's lines that it does not run:
    it is offline, or idle for long.  KVM brings its page up to date before it runs again; so nobody reads it, and it is
    no longer held against the others meanwhile.
    """

    at: HostTsc
    ahead: int
    behind: int
    by_ns: int
    bound_ns: int
    least_ns: int
    events: tuple[VmEvent, ...]
    basis: TscBasis
    is_stale: bool = False


class FlagsChange(NamedTuple):
    """A page's flags: GUEST_STOPPED came or was cleared, STABLE came or went."""

    at: HostTsc
    vcpu: int
    before: int
    after: int


class PageLost(NamedTuple):
    """A page holds no legal line any more, for some polls in a row: search again.  `why` for people."""

    at: HostTsc
    vcpu: int
    why: str


class Stall(NamedTuple):
    """Nothing was polled for gap_ns, far more than the interval: what came and went meanwhile was not seen."""

    at: HostTsc
    gap_ns: int


TOLD_STALL_NS: Final = 250_000_000
"""A shorter stall is told to programs and counted in the summary, and is no line for people: a busy host has many."""

Change: TypeAlias = Step | Disagreement | FlagsChange | PageLost | Stall
