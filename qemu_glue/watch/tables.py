"""The tables of a watch: a row a vCPU, as its page is now; and what it all came to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pvclock import GuestNs
from pvclock.commands.tables import Table
from pvclock.meter.watch.ahead import Ahead
from pvclock.meter.watch.changes import Disagreement, Step
from pvclock.meter.watch.loop import Look, WatchLoop
from pvclock.meter.watch.rate import PageRate
from pvclock.meter.watch.sentences import disagreement_in_words, step_in_words
from pvclock.meter.watch.summary import WatchSummary
from pvclock.meter.watch.words import about_ns, bounded_ns, counted, duration, flags_in_words, rate_in_words, reading

__all__ = ["rates_in_words", "summary_table", "vcpu_table"]


def vcpu_table(
    loop: WatchLoop,
    look: Look,
    last_steps: dict[int, Step],
    rows: int | None = None,
    ahead: Sequence[Ahead] | None = None,
) -> Table:
    """A row a vCPU, the first `rows` of them: its page, what it shows, how fast, and its last step.

    ahead: how far each is ahead of the reference, in a column more; None: without it.
    """
    more = [] if ahead is None else ["ahead"]
    table = Table("vCPU", "page", "version", "flags", "reading", f"rate against {loop.reference}", *more, "last step")
    readings = loop.watcher.readings(look.poll)
    rates, aheads = loop.rates(), {each.vcpu: each for each in ahead or ()}
    for vcpu, (gpa, ns) in list(enumerate(zip(loop.finder.pages, readings, strict=True)))[:rows]:
        info, rate = loop.infos.get(vcpu), rates.get(vcpu)
        table.add_row(
            *(f"{vcpu}", "-" if gpa is None else f"{gpa:#x}"),
            *(("-", "-") if info is None else (f"{info.version}", flags_in_words(info.flags))),
            "-" if ns is None else reading(GuestNs(ns)),
            _rate(rate),
            *[_ahead(aheads.get(vcpu))] * len(more),
            _last_step(last_steps.get(vcpu)),
        )
    return table


def summary_table(loop: WatchLoop) -> Table:
    """What a watch came to."""
    table = Table("The watch", "")
    for name, text in (*_counts(loop.watcher.summary), *_greatest(loop.watcher.summary)):
        table.add_row(name, text)
    table.add_row(f"rate against {loop.reference}", rates_in_words(loop.rates()))
    return table


def rates_in_words(rates: dict[int, PageRate]) -> str:
    """That of all vCPUs, or of each where they differ; or why it is unknown."""
    distinct = dict.fromkeys(map(_rate_or_why, rates.values()))
    if len(distinct) == 1:
        return next(iter(distinct))
    return "\n".join(f"vCPU {vcpu}: {_rate_or_why(rate)}" for vcpu, rate in sorted(rates.items())) or "-"


def _counts(summary: WatchSummary) -> Iterator[tuple[str, str]]:
    yield "watched for", f"{duration(summary.duration_ns)}, {counted(summary.polls, 'look')}"
    if summary.stalls:
        yield "stalls", f"{summary.stalls}, {duration(summary.longest_stall_ns)} the longest"
    unknown = f", {summary.unknown} of them unknown" * bool(summary.unknown)
    steps = f"{summary.lines:,}, in {counted(summary.steps, 'step')}{unknown}"
    yield "new lines", steps if summary.steps else "none: no step"
    if summary.restarts or summary.pages_lost:
        yield "pages", f"lost {counted(summary.pages_lost, 'time')}, others found {counted(summary.restarts, 'time')}"


def _greatest(summary: WatchSummary) -> Iterator[tuple[str, str]]:
    for name, step in (("greatest step forward", summary.forward), ("greatest step back", summary.backward)):
        if step is not None:
            yield name, f"vCPU {step.vcpu} {step_in_words(step)}"
    if summary.least_seen is not None and summary.most_seen is not None:
        yield "from STOP to RESUME", " to ".join(dict.fromkeys(map(_seen, (summary.least_seen, summary.most_seen))))
    for found in (summary.sure_disagreement, summary.assumed_disagreement):
        if found is not None:
            yield f"disagreements: {summary.disagreements}", _disagreement(found)


def _disagreement(found: Disagreement) -> str:
    return f"the greatest: {disagreement_in_words(found)}"


def _seen(step: Step) -> str:
    return bounded_ns(step.seen_ns or 0, step.seen_bound_ns or 0)


def _ahead(ahead: Ahead | None) -> str:
    return "-" if ahead is None or ahead.ahead_ns is None else about_ns(ahead.ahead_ns)


def _rate(rate: PageRate | None) -> str:
    return (
        "-" if rate is None or rate.ppb is None or rate.bound_ppb is None else rate_in_words(rate.ppb, rate.bound_ppb)
    )


def _rate_or_why(rate: PageRate) -> str:
    return rate.why or _rate(rate)


def _last_step(step: Step | None) -> str:
    if step is None:
        return "-"
    if step.step_ns is None:
        return "unknown"
    seen = "" if step.seen_ns is None else f",\n{about_ns(step.seen_ns)} seen"
    return f"{about_ns(step.step_ns)}{seen}"
