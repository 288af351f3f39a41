"""How far a watched clock is ahead of a reference: held against simulated guests whose every instant is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import chain
from math import floor

import pytest

from pvclock import Gpa, Reference
from pvclock.commands.outcome import line_json
from pvclock.commands.screen import _drawn
from pvclock.commands.tables import Table
from pvclock.meter.watch.ahead import (
    ABSENT,
    BASIS_LOST,
    CHANGING,
    NO_LINE,
    NO_OFFSET,
    OFFSET_COMES,
    Ahead,
    AheadMeter,
)
from pvclock.meter.watch.changes import Change, Disagreement, Step, TscBasis
from pvclock.meter.watch.lines import Line, TscRates
from pvclock.meter.watch.loop import Look
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.poll import Poll
from pvclock.quantities import GuestNs, GuestTsc, HostTsc
from pvclock.readings import Sample, TimeInfo
from qemu_glue.watch.instants import Instants
from qemu_glue.watch.json_lines import JsonLines
from qemu_glue.watch.records import reading_record
from qemu_glue.watch.tables import vcpu_table
from qemu_glue.watch.views import JsonView, LiveView
from tests.oracle import NS_PER_S, ExactLine
from tests.unit import watched_cases
from tests.unit.test_watch_loop import ARRAY, ELSEWHERE, RESET, HandMadeVm, loop_of
from tests.unit.watched_cases import Life, watcher_of
from tests.unit.watched_guest import WatchedGuest
from tests.watch_document import documented_keys, keys_of

pytestmark = pytest.mark.row("E3")

HZ = 2 * NS_PER_S
PAGE = TimeInfo(2, GuestTsc(1000), GuestNs(5000), 1 << 31, 0, 0)
"""2 GHz: half a ns a tick."""
WITHOUT_TSC_WRITES: list[Callable[[Life], object]] = [
    watched_cases.nothing,
    watched_cases.reanchor,
    watched_cases.step,
    watched_cases.many_steps,
    watched_cases.drift,
    watched_cases.stop,
    watched_cases.go_offline,
]


class ReadingWatcher:
    """The real watcher, and a reading of each vCPU after each of its polls, which costs the guest no time."""

    def __init__(self, guest: WatchedGuest) -> None:
        self._guest, self._watcher = guest, watcher_of(guest)
        self._meter = AheadMeter(TscRates(guest.khz * 1000))
        self.reference = ExactLine(guest.now, Fraction(10**15), Fraction(10**6, guest.khz) * Fraction(999_983, 10**6))
        self.found: list[tuple[Poll, Sample, tuple[Ahead, ...]]] = []

    @property
    def open_disagreements(self) -> list[Disagreement]:
        """See Watches."""
        return self._watcher.open_disagreements

    def take(self, poll: Poll) -> list[Change]:
        """See Watches."""
        changes = self._watcher.take(poll)
        tsc = poll.end + 1234
        sample = Sample(HostTsc(tsc), floor(self.reference.at(tsc)) + tsc % 20 - 10, 11.0)
        self._meter.note(changes)
        self.found.append((poll, sample, self._meter.take(sample, poll, self._watcher.lines)))  # type: ignore[attr-defined]
        return changes

    def finish(self) -> list[Change]:
        """See Watches."""
        return self._watcher.finish()


def untrue(life: Life, watcher: ReadingWatcher) -> list[str]:
    """Each reading that goes on from its first by another amount than the guest's clock did."""
    wrong = []
    for vcpu in life.guest.vcpus:
        first: tuple[Fraction, Ahead] | None = None
        for poll, sample, readings in watcher.found:
            reading = readings[vcpu]
            if reading.ahead_ns is None:
                first = None if reading.why in {BASIS_LOST, OFFSET_COMES} else first
                continue
            truth = life.guest.state(vcpu, poll.middle).at(sample.tsc) - watcher.reference.at(sample.tsc)
            first = first or (truth, reading)
            wrong += [f"begins with {reading}"] * (reading == first[1] and reading.ahead_ns != 0)
            off_ns = abs(reading.ahead_ns - (truth - first[0]))
            if off_ns > Fraction(reading.bound_ns or 0) + Fraction(first[1].bound_ns or 0):
                wrong.append(f"off by {float(off_ns)}: {reading}")
    return wrong


def lived(seed: int) -> tuple[Life, ReadingWatcher]:
    """A guest's life, with TSC writes only where their offsets can be read."""
    watchers: list[ReadingWatcher] = []

    def make(guest: WatchedGuest) -> ReadingWatcher:
        watchers.append(ReadingWatcher(guest))
        return watchers[-1]

    life = Life(seed, make)
    return life.live(watched_cases.INJECTED if life.reads_offsets else WITHOUT_TSC_WRITES, 12), watchers[0]


def test_each_reading_is_true_within_its_bound() -> None:
    """Of 300 lives with steps, drift, pauses and TSC writes; most readings are known, many to the tightest bound."""
    known: list[Ahead] = []
    for seed in range(300):
        life, watcher = lived(seed)
        assert untrue(life, watcher) == [], seed
        known += [each for *_, readings in watcher.found for each in readings if each.ahead_ns is not None]
    bounds = [each.bound_ns for each in known]
    assert min(filter(None, bounds)) == 12.0
    assert sum(bound is not None and bound <= 13 for bound in bounds) > 3000
    assert sum(each.ahead_ns != 0 for each in known) > 1000


def test_a_pause_of_a_second() -> None:
    """Shows as a second less, once the guest goes on, and the reading before it is 0."""
    life = Life(1, ReadingWatcher)
    life.guest = WatchedGuest(2_000_000, [0], now=10**12, ns=10**12, is_stable=True)
    watcher = ReadingWatcher(life.guest)
    life.watcher, life.reads_offsets = watcher, True
    life.poll()
    life.guest.stop()
    life.guest.pass_time(NS_PER_S)
    life.guest.resume()
    life.guest.enter(0)
    life.poll()
    (*_, (first,)), (*_, (last,)) = watcher.found
    drifted_ns = -(watcher.reference.at(watcher.found[1][1].tsc) - watcher.reference.at(watcher.found[0][1].tsc))
    drifted_ns += Fraction(watcher.found[1][1].tsc - watcher.found[0][1].tsc, 2)
    assert (first.ahead_ns, first.why, last.why) == (0, None, None)
    assert last.ahead_ns == pytest.approx(-(10**9) + float(drifted_ns), abs=25)


def poll_of(page: TimeInfo | None = PAGE, offset: int | None = 0, absent: frozenset[int] = frozenset()) -> Poll:
    """A poll of one vCPU."""
    return Poll(HostTsc(0), HostTsc(1), HostTsc(2), (page,), (offset,), (), None, absent)


def reading(meter: AheadMeter, tsc: int, ns: int, line: Line | None, poll: Poll | None = None) -> Ahead:
    """One reading of the only vCPU."""
    (found,) = meter.take(Sample(HostTsc(tsc), ns, 3.0), poll or poll_of(), (line,))
    return found


def test_a_reading_is_exact() -> None:
    """At the sample's own TSC, in the guest's own arithmetic; the bound is the sample's and the line's floor."""
    meter = AheadMeter(TscRates(HZ))
    assert reading(meter, 1001, 7, Line(PAGE, 0)) == Ahead(0, 0, 4.0)
    assert reading(meter, 1002, 7, Line(PAGE, 0)) == Ahead(0, 1, 4.0)
    shifted = PAGE._replace(tsc_shift=-1, tsc_to_system_mul=(1 << 32) - 2)
    assert reading(meter, 1004, 10, Line(shifted, 1)).bound_ns == 5.0
    assert reading(meter, 1001 + 2 * HZ, 7, Line(PAGE, -2 * HZ)) == Ahead(0, 0, 4.0)


def test_what_an_unknown_offset_leaves_open() -> None:
    """Nothing, between lines of one rate; else as much as their rates differ over the host's uptime."""
    meter = AheadMeter(TscRates(HZ))
    up = 1 << 40
    line = Line(PAGE._replace(tsc_timestamp=GuestTsc(12345)), None)
    assert reading(meter, up, 0, line) == Ahead(0, 0, 4.0)
    stepped = Line(line.info._replace(system_time=GuestNs(5070)), None)
    assert reading(meter, up + 200, 100, stepped) == Ahead(0, 70, 4.0)
    bent = Line(line.info._replace(tsc_to_system_mul=(1 << 31) + 1), None)
    found = reading(meter, up + 200, 100, bent)
    assert found.bound_ns is not None
    assert found.bound_ns == 4 + -(-(up + (1 << 34) + (1 << 15)) // 2**32)


def test_an_offset_that_comes_and_goes() -> None:
    """One that is gone counts as it was; where it was assumed and comes, readings begin anew."""
    meter = AheadMeter(TscRates(HZ))
    reading(meter, 1000, 0, Line(PAGE, 500))
    assert reading(meter, 1200, 100, Line(PAGE, 700)).ahead_ns == 100
    assert reading(meter, 1200, 100, Line(PAGE, None)).ahead_ns == 100
    meter.restart()
    reading(meter, 1200, 100, Line(PAGE, None))
    assert reading(meter, 1400, 200, Line(PAGE, 700)) == Ahead(0, None, None, OFFSET_COMES)
    assert reading(meter, 1400, 200, Line(PAGE, 700)) == Ahead(0, 0, 4.0)
    assert reading(meter, 1400, 200, Line(PAGE, 900)).ahead_ns == 100


CHANGED = Step(HostTsc(0), HostTsc(0), 0, PAGE, PAGE, 1, TscBasis.CHANGED, None, None, None, None, ())


def test_a_tsc_that_was_changed_begins_anew() -> None:
    """One reading says so, and the next one is 0; before the first reading there is nothing to lose."""
    meter = AheadMeter(TscRates(HZ))
    meter.note([CHANGED])
    assert reading(meter, 1000, 0, Line(PAGE, None)) == Ahead(0, 0, 4.0)
    meter.note([CHANGED, CHANGED._replace(basis=TscBasis.ASSUMED, vcpu=1)])
    assert reading(meter, 1200, 1000, Line(PAGE, None)) == Ahead(0, None, None, BASIS_LOST)
    assert reading(meter, 1200, 2000, Line(PAGE, None)) == Ahead(0, 0, 4.0)
    meter.note([CHANGED._replace(basis=TscBasis.OFFSETS)])
    assert reading(meter, 1400, 2100, Line(PAGE, None)) == Ahead(0, 0, 4.0)


@pytest.mark.parametrize(
    ("line", "poll", "why"),
    [
        (None, poll_of(None, absent=frozenset({0})), ABSENT),
        (None, poll_of(None), CHANGING),
        (None, poll_of(offset=None), NO_OFFSET),
        (None, poll_of(), NO_LINE),
        (Line(PAGE._replace(tsc_shift=1), 0), poll_of(), "its line is for a TSC of 1000000 kHz"),
    ],
)
def test_why_a_reading_is_unknown(line: Line | None, poll: Poll, why: str) -> None:
    """Each reason is told, and the readings go on afterwards from where they began."""
    meter = AheadMeter(TscRates(HZ))
    reading(meter, 1000, 0, Line(PAGE, 0))
    found = reading(meter, 1200, 0, line, poll)
    assert (found.ahead_ns, found.bound_ns) == (None, None)
    assert (found.why or "").startswith(why)
    assert reading(meter, 1200, 0, Line(PAGE, 0)).ahead_ns == 100


def sampled(vm: HandMadeVm, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Look], Callable[[], Look]]:
    """A watch that samples the reference at each look: what it has seen, and a function that takes one more look."""
    monkeypatch.setattr("pvclock.meter.watch.loop.measured_tsc_hz", lambda: HZ)  # its pages are for that
    _, looks = loop_of(vm)
    monkeypatch.setattr("pvclock.meter.watch.loop.SAMPLE_S", 0)
    seen: list[Look] = []

    def look() -> Look:
        seen.append(next(looks))
        return seen[-1]

    return seen, look


def aheads(looks: Sequence[Look], vcpu: int = 0) -> list[int | None]:
    """What the readings of a vCPU were."""
    return [each.ahead_ns for each in chain.from_iterable(look.readings for look in looks) if each.vcpu == vcpu]


def test_a_step_shows_in_the_readings_of_a_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what it was; a watch that is not due to sample has none."""
    vm = HandMadeVm(vcpus=2)
    vm.put(ARRAY)
    vm.put(Gpa(ARRAY + 64))
    seen, look = sampled(vm, monkeypatch)
    look()
    vm.put(ARRAY, 4, 5_000_000)
    monkeypatch.setattr("pvclock.meter.watch.loop.SAMPLE_S", 3600)
    assert look().readings == ()
    monkeypatch.setattr("pvclock.meter.watch.loop.SAMPLE_S", 0)
    look()
    (first, last), others = aheads(seen), aheads(seen, 1)
    assert first == others[0] == 0
    assert last is not None
    assert others[1] is not None
    assert abs(last - others[1] - 5_000_000) < 100_000  # the lines begin one after the other, by whole ns


def test_pages_that_are_found_anew_begin_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reset nothing is known until they are; a vCPU whose page comes late leaves the others' readings alone."""
    vm = HandMadeVm(vcpus=2)
    vm.put(ARRAY)
    seen, look = sampled(vm, monkeypatch)
    look()
    vm.put(ARRAY, 4, 5 * NS_PER_S)
    look()
    vm.put(Gpa(ARRAY + 64))
    while aheads(seen[-1:], 1)[-1:] != [0]:
        look()
    assert (aheads(seen)[-1] or 0) > 4 * NS_PER_S
    vm.events = [RESET]
    assert [each.why for each in look().readings] == [ABSENT, ABSENT]
    vm.put(ELSEWHERE)
    vm.put(Gpa(ELSEWHERE + 64))
    while seen[-1].readings[0].why is not None:
        look()
    assert [each.ahead_ns for each in seen[-1].readings] == [0, 0]


def test_the_line_of_readings_is_as_documented(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`watch --json` prints one once the reference was sampled, with the documented keys; the table has a column."""
    vm = HandMadeVm()
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    monkeypatch.setattr("pvclock.meter.watch.loop.SAMPLE_S", 0)
    lines, look = JsonLines(Instants(loop.host_tsc_hz)), next(looks)
    view = JsonView(loop, lines, PagesFound((ARRAY,), "as given"), look.poll.begin)
    view.show(look)
    view.show(look._replace(readings=()))
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (record,) = [each for each in records if each["kind"] == "reading"]
    assert set(record) == {"schema", "kind", "at_s", "utc", "reference", "readings"}
    assert record["reference"] == "raw"
    assert record["readings"][0].keys() == {"vcpu", "ahead_ns", "bound_ns", "why"}
    assert set(keys_of(json.loads(line_json("watch", reading_record(Reference.RAW, look.readings))))) <= (
        documented_keys()["reading"] | {"schema", "kind"}
    )
    table = vcpu_table(loop, look, {}, ahead=[Ahead(0, -1_035_012_345, 4.0)])
    assert "-1.035 s" in _drawn(table, None)
    assert "ahead" not in _drawn(vcpu_table(loop, look, {}), None)


@pytest.mark.parametrize(("columns", "has_ahead"), [("99", False), ("100", True)])
def test_the_live_table_has_a_column_more_where_there_is_room(
    columns: str, monkeypatch: pytest.MonkeyPatch, *, has_ahead: bool
) -> None:
    """In a narrow terminal the others would be folded."""
    monkeypatch.setenv("COLUMNS", columns)
    vm = HandMadeVm()
    vm.put(ARRAY)
    loop, looks = loop_of(vm)
    drawn: list[tuple[object, ...]] = []
    LiveView(loop, Instants(loop.host_tsc_hz), lambda *parts: drawn.append(parts)).show(next(looks))
    table = drawn[0][0]
    assert isinstance(table, Table)
    assert ("ahead" in _drawn(table, None)) == has_ahead
