"""What an operation did to the clocks of several servers, side by side: what is as it should be, and why they differ.

Pure: it takes observations and judges them.  Sources of the rules: of KVM's clock arch/x86/kvm/x86.c, of QEMU's
hw/i386/kvm/clock.c and target/i386/cpu.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from pvclock.meter.comparison import Check
from pvclock.meter.figure import Figure
from pvclock.meter.lifecycle import measures
from pvclock.meter.lifecycle.observe import Observed
from pvclock.meter.lifecycle.operations import Kind
from pvclock.meter.lifecycle.reasons import REASONS
from pvclock.readings import TimeInfo

__all__ = ["compare_operation"]

Values: TypeAlias = Mapping[str, object]


class Row(NamedTuple):
    """One thing that is judged of each server: its values, the text that `show` makes of them, and whether it is right.

    name: also where its reason stands.
    """

    name: str
    values: Callable[[Observed], Values]
    show: Callable[..., str]
    is_right: Callable[[Observed], bool]


def compare_operation(kind: Kind, observed: Sequence[Observed], absent: Mapping[str, str]) -> list[Check]:
    """The rows of an operation of this kind.  absent: the servers that cannot do it, by name, and why."""
    return [_check(row, kind, observed, absent) for row in ROWS]


def _check(row: Row, kind: Kind, observed: Sequence[Observed], absent: Mapping[str, str]) -> Check:
    figures = {name: Figure("-") for name in absent}
    for seen in observed:
        values = row.values(seen)
        figures[seen.server.name] = Figure(row.show(**values), values)
    reasons = (REASONS[kind][row.name], *(f"{name}: {why}" for name, why in absent.items()))
    return Check(row.name, figures, all(map(row.is_right, observed)), ".  ".join(reasons))


def _steps_are_right(seen: Observed) -> bool:
    """As long as the clock was to stand still, on every vCPU that tells; and all vCPUs' lines are one again."""
    if measures.apart_ns(seen) > measures.tolerance_ns(seen):
        return False
    still = measures.stood_still(seen)
    right = measures.Span(-still.most, -still.least).wider(measures.tolerance_ns(seen))
    return all(step_ns is None or right.has(step_ns) for step_ns in measures.steps_ns(seen))


def _went_on_right(seen: Observed) -> bool:
    """Did the guest's clock leave out what it was to?"""
    bound_ns = seen.left_out_bound_ns + measures.tolerance_ns(seen)
    return measures.stood_still(seen).wider(bound_ns).has(seen.left_out_ns)


def _gaps_are_right(seen: Observed) -> bool:
    """Does a clock that goes on show the stop, a guest that booted anew no time before its last, and none a leap?"""
    least_ns = 0 if seen.server.stops_when_paused else seen.stopped.longest_ns
    gaps = zip(measures.gaps_ns(seen), measures.largest_gaps_ns(seen), strict=True)
    return all(least_ns <= gap_ns <= most_ns for gap_ns, most_ns in gaps)


def _steps_back_are_allowed(seen: Observed) -> bool:
    """None, but where QEMU set the clock and several vCPUs read it: no further than it stepped."""
    back = measures.steps_back(seen)
    if not measures.is_set_at_cont(seen) or seen.booted_anew or len(seen.after.pages) == 1:
        return back == (0, 0, 0)
    return back.worst_ns <= seen.stopped.most_ns + measures.tolerance_ns(seen)


def _stopped_is_right(seen: Observed) -> bool:
    """Did every vCPU see that it was stopped, where the server tells it, and none where not?"""
    told = seen.kind is not Kind.RESET and seen.server.stops_when_paused
    return all((record.stopped > 0) is told for record in seen.after.records)


def _versions_are_right(seen: Observed) -> bool:
    """Even; and further than before where the clock was set under a guest that kept its page."""
    pages = [*seen.before.pages, *seen.after.pages]
    if any(page.version % 2 for page in pages):
        return False
    least = 2 if seen.kind is Kind.STOP and seen.server.stops_when_paused else 0
    return seen.kind is not Kind.STOP or all(least <= advance < 2**31 for advance in _advances(seen))


def _offsets_are_right(seen: Observed) -> bool:
    """One change for all vCPUs; none by stop and cont.  Only another VMM's may not be readable, and then none is."""
    offsets = {*seen.before.tsc_offsets, *seen.after.tsc_offsets}
    if None in offsets:
        return offsets == {None} and measures.is_set_at_cont(seen)
    changes = set(measures.offset_changes(seen))
    return len(changes) == 1 and (seen.kind is not Kind.STOP or changes == {0})


def _wall_clock_is_right(seen: Observed) -> bool:
    return measures.wall_clock_span(seen).has(seen.after.wall_clock_error_ns)


def _advances(seen: Observed) -> list[int]:
    pairs = zip(seen.before.pages, seen.after.pages, strict=True)
    return [(after.version - before.version) % 2**32 for before, after in pairs]


def _judged_if_stable(is_right: Callable[[Observed], bool]) -> Callable[[Observed], bool]:
    return lambda seen: not measures.is_stable(seen) or is_right(seen)


ROWS: Final = (
    Row(
        "step against the TSC",
        lambda it: {"steps_ns": measures.steps_ns(it), "apart_ns": measures.apart_ns(it)},
        lambda steps_ns, **_: _each("unknown" if step_ns is None else _ms(step_ns) for step_ns in steps_ns),
        _judged_if_stable(_steps_are_right),
    ),
    Row(
        "guest time meanwhile",
        lambda it: {
            "went_on_least_ns": measures.went_on(it).least,
            "went_on_most_ns": measures.went_on(it).most,
            "left_out_ns": it.left_out_ns,
            "left_out_bound_ns": it.left_out_bound_ns,
            "stopped_least_ns": it.stopped.least_ns,
            "stopped_most_ns": it.stopped.most_ns,
        },
        lambda went_on_least_ns, went_on_most_ns, **_: f"{_ms(went_on_least_ns)} to {_ms(went_on_most_ns)}",
        _judged_if_stable(_went_on_right),
    ),
    Row(
        "largest gap between readings",
        lambda it: {"gaps_ns": measures.gaps_ns(it)},
        lambda gaps_ns: ", ".join(map(_ms, gaps_ns)),
        _gaps_are_right,
    ),
    Row(
        "readings that went back",
        lambda it: measures.steps_back(it)._asdict(),
        lambda own, cross, worst_ns: f"{own:,} own, {cross:,} cross, up to {worst_ns / 1e6:.3f} ms" if cross else "0",
        _steps_back_are_allowed,
    ),
    Row(
        "readings wild or torn",
        lambda it: {"wrong_reads": sum(record.wild + record.torn for record in it.after.records)},
        "{wrong_reads}".format,
        lambda it: not any(record.wild + record.torn for record in it.after.records),
    ),
    Row(
        "GUEST_STOPPED seen",
        lambda it: {"stopped": [record.stopped for record in it.after.records]},
        lambda stopped: ", ".join(map(str, stopped)),
        _stopped_is_right,
    ),
    Row(
        "versions",
        lambda it: {"before": _versions(it.before.pages), "after": _versions(it.after.pages)},
        lambda before, after: ", ".join(map("{} to {}".format, before, after)),
        _versions_are_right,
    ),
    Row(
        "TSC offset moved by",
        lambda it: {"tsc_offset_changes": measures.offset_changes(it)},
        lambda tsc_offset_changes: _each(
            "not readable" if ticks is None else f"{ticks:+,} ticks" if ticks else "0" for ticks in tsc_offset_changes
        ),
        _offsets_are_right,
    ),
    Row(
        "wall clock afterwards",
        lambda it: {"wall_clock_error_ns": it.after.wall_clock_error_ns},
        lambda wall_clock_error_ns: f"{_ms(wall_clock_error_ns)}",
        _wall_clock_is_right,
    ),
)


def _versions(pages: Iterable[TimeInfo]) -> list[int]:
    return [page.version for page in pages]


def _ms(ns: int) -> str:
    return f"{ns / 1e6:+.3f} ms"


def _each(texts: Iterable[str]) -> str:
    """The text of all vCPUs, or a list if they differ."""
    shown = list(texts)
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)
