"""What the JSON lines of a watch told, kept while they are read: in memory that does not grow but with its readings."""

from __future__ import annotations

from array import array
from typing import Final

from pvclock.errors import ReportSourceError
from pvclock.meter.report.clock_series import ClockSeries
from pvclock.meter.report.fields import Fields
from pvclock.meter.report.mark_collection import MarkCollection
from pvclock.meter.report.model import Line, Mark, Standing
from pvclock.meter.report.watch_steps import Step, StepTable, disagreement_in_words, step_of
from pvclock.meter.watch.vm import VmEventKind
from pvclock.meter.watch.words import duration, flags_in_words

__all__ = ["STALL_NS", "RateSeries", "WatchLog"]

VCPUS_MAX: Final = 4096
ALIKE_S: Final = 0.25
"""vCPUs that have the same step are found within so long: some looks."""
STALL_NS: Final = 100_000_000
"""Shorter ones are counted, but not marked: a busy host has many."""
REASONS_MAX: Final = 16
VM_EVENTS: Final = frozenset(map(str, VmEventKind))


class RateSeries:
    """One vCPU's rate, as the watch told it now and then."""

    def __init__(self) -> None:
        self.at_s, self.ppb, self.low, self.high = (array("d") for _ in range(4))

    def take(self, at_s: float, ppb: float, bound_ppb: float) -> None:
        """Take a rate; nan if it is unknown."""
        self.at_s.append(max(at_s, self.at_s[-1]) if self.at_s else at_s)
        self.ppb.append(ppb)
        self.low.append(ppb - bound_ppb)
        self.high.append(ppb + bound_ppb)

    def line(self, name: str) -> Line:
        """The rate over time, with its bound as the band."""
        return Line(name, self.at_s, self.ppb, self.low, self.high)


class WatchLog:
    """A watch of one VM.

    vm: its name, None if the lines have not told it.  begin: its first line; end: the `result` of its last one; None
    until they are there.
    """

    def __init__(self, vm: str | None) -> None:
        self.vm = vm
        self.begin: Fields | None = None
        self.end: Fields | None = None
        self.error: str | None = None
        self.readings: dict[int, ClockSeries] = {}
        self.rates: dict[int, RateSeries] = {}
        self.steps = StepTable()
        self.marks = MarkCollection()
        self.disagreements, self.stalls, self.longest_stall_ns, self.unknown_kinds = 0, 0, 0, 0
        self.worst_disagreement: tuple[int, str] | None = None
        self.troubles: list[str] = []
        self.ended: str | None = None
        self.last_s = 0.0
        self._open_step: Step | None = None
        self._stopped_s: float | None = None
        self._takers = {
            "found": self._found,
            "reading": self._reading,
            "step": self._step,
            "rate": self._rate,
            "disagreement": self._disagreement,
            "flags": self._flags,
            "event": self._event,
            "page_lost": self._page_lost,
            "stall": self._stall,
            "host": self._host,
            "ended": self._ended,
            "left": self._ended,
            "summary": self._summary,
        }

    def take(self, record: Fields) -> None:
        """Take a line; ReportSourceError if a field is not as it must be."""
        if "error" in record:
            self.error = record.fields("error").text("message")
            return
        self.last_s = max(self.last_s, record.number_or_none("at_s") or 0.0)  # a summary has none
        taker = self._takers.get(record.text("kind"))
        if taker is None:
            self.unknown_kinds += 1
        else:
            taker(record)

    def close(self) -> None:
        """Take what waits for more."""
        self._flush_step()
        if self._stopped_s is not None:
            self.marks.add(Mark(self._stopped_s, "pause", "stopped to the end", until=self.last_s))
            self._stopped_s = None

    # Lines

    def _found(self, record: Fields) -> None:
        if self.begin is None:
            self.begin = record
            return
        for each in self.readings.values():
            each.begin_anew()
        self._mark(record, "pages found", f"the pages were found again: {record.text('why')}")

    def _reading(self, record: Fields) -> None:
        at_s = record.number("at_s")
        for each in record.all_fields("readings"):
            vcpu = each.whole("vcpu")
            series = self.readings.get(vcpu)
            if series is None:
                self._refuse_vcpu(record, vcpu)
                series = self.readings[vcpu] = ClockSeries(f"vCPU {vcpu}")
            series.take(at_s, each.number_or_nan("ahead_ns"), each.number_or_nan("bound_ns"))

    def _step(self, record: Fields) -> None:
        step = step_of(record)
        self._refuse_vcpu(record, step.vcpus[0])
        if step.is_sure and (series := self.readings.get(step.vcpus[0])) is not None:
            series.step(step.step_ns, step.at_s)
        before = self._open_step
        is_soon = before is not None and abs(step.at_s - before.at_s) <= ALIKE_S
        if before is not None and is_soon and before.is_alike(step) and step.vcpus[0] > before.vcpus[-1]:
            self._open_step = before._replace(vcpus=before.vcpus + step.vcpus)
            return
        self._flush_step()
        self._open_step = step

    def _flush_step(self) -> None:
        step, self._open_step = self._open_step, None
        if step is None:
            return
        self.steps.add(step)
        if step.is_sure:
            kind = "unknown step" if step.step_ns is None else "step"
            self.marks.add(Mark(step.at_s, kind, step.in_words(), step.standing, size=float(step.size_ns)))

    def _rate(self, record: Fields) -> None:
        for each in record.all_fields("rates"):
            vcpu = each.whole("vcpu")
            self._refuse_vcpu(record, vcpu)
            series = self.rates.setdefault(vcpu, RateSeries())
            series.take(record.number("at_s"), each.number_or_nan("rate_ppb"), each.number_or_nan("bound_ppb"))

    def _disagreement(self, record: Fields) -> None:
        said, by_ns = disagreement_in_words(record), record.whole("by_ns")
        is_stale = record.truth("is_stale")
        at_s, least_s = record.number("at_s"), record.number("least_ns") / 1e9
        standing = Standing.PLAIN if is_stale else Standing.BAD
        self.marks.add(Mark(at_s, "disagreement", said, standing, until=at_s + least_s, size=float(by_ns)))
        self.disagreements += not is_stale
        if not is_stale and (self.worst_disagreement is None or by_ns > self.worst_disagreement[0]):
            self.worst_disagreement = by_ns, said

    def _flags(self, record: Fields) -> None:
        before, after = (flags_in_words(record.whole(name) & 0xFF) for name in ("before", "after"))
        self._mark(record, "flags", f"vCPU {record.whole('vcpu')}: flags {before} -> {after}")

    def _event(self, record: Fields) -> None:
        what, at_s = record.text("what"), record.number("at_s")
        for each in self.readings.values():
            each.cut(at_s)
        if what == "stop":
            self._stopped_s = at_s if self._stopped_s is None else self._stopped_s
        elif what == "resume" and self._stopped_s is not None:
            begin_s, self._stopped_s = self._stopped_s, None
            lasted = f"the VMM said STOP, and RESUME {duration(round((at_s - begin_s) * 1e9))} later"
            self.marks.add(Mark(begin_s, "pause", lasted, until=at_s, size=at_s - begin_s))
        else:
            self._mark(record, what if what in VM_EVENTS else "event", f"the VMM said {what.upper()}")

    def _page_lost(self, record: Fields) -> None:
        why = f"vCPU {record.whole('vcpu')}: the page is gone: {record.text('why')}"
        self._mark(record, "page lost", why, Standing.OPEN)

    def _stall(self, record: Fields) -> None:
        gap_ns, at_s = record.whole("gap_ns"), record.number("at_s")
        self.stalls += 1
        self.longest_stall_ns = max(self.longest_stall_ns, gap_ns)
        if gap_ns >= STALL_NS:
            said = f"not watched for {duration(gap_ns)}: what came and went meanwhile was not seen"
            gap_s = gap_ns / 1e9
            self.marks.add(Mark(max(at_s - gap_s, 0), "stall", said, Standing.OPEN, until=at_s, size=gap_s))

    def _host(self, record: Fields) -> None:
        for each in self.readings.values():
            each.cut(record.number("at_s"))
        why = record.text("why")
        self._mark(record, "host", f"the host: {why}", Standing.BAD if record.truth("unstable") else Standing.OPEN)
        if len(self.troubles) < REASONS_MAX:
            self.troubles.append(why)

    def _ended(self, record: Fields) -> None:
        self.ended = record.text("why")
        self._mark(record, "end", self.ended)

    def _summary(self, _record: Fields) -> None:
        """Before an error: the same as was told by the lines."""

    def _mark(self, record: Fields, kind: str, said: str, standing: Standing = Standing.PLAIN) -> None:
        self.marks.add(Mark(record.number("at_s"), kind, said, standing))

    def _refuse_vcpu(self, record: Fields, vcpu: int) -> None:
        if not 0 <= vcpu < VCPUS_MAX:
            raise _no_vcpu(record, vcpu)


def _no_vcpu(record: Fields, vcpu: int) -> ReportSourceError:
    return record.place.error(f"vCPU {vcpu}", f"a vCPU from 0 to {VCPUS_MAX - 1}")
