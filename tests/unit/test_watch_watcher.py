"""A watcher's findings one by one: lines and their differences, the TSC behind them, and how each thing is told."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import pytest

from pvclock.meter.watch.changes import Change, Disagreement, FlagsChange, PageLost, Stall, Step, TscBasis
from pvclock.meter.watch.lines import Line, difference, floor_ns, step_between, step_within, value_at
from pvclock.meter.watch.page_watch import LOST_POLLS
from pvclock.meter.watch.poll import Poll, Utc
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.meter.watch.watcher import Watcher
from pvclock.quantities import GuestNs, GuestTsc, HostTsc
from pvclock.readings import TimeInfo
from tests import oracle
from tests.unit.watched_guest import is_any_page

HZ = 10**9
MS = 10**6
LONG = 10**12
"""Ticks that no page is backdated by."""

OFFSET = -5000


def line(tsc: int, ns: int, version: int = 2, *, flags: int = 1, scale: tuple[int, int] = (1 << 31, 1)) -> TimeInfo:
    """Return a page; a tick is a ns by default."""
    return TimeInfo(version, GuestTsc(tsc), GuestNs(ns), *scale, flags)


class Watched:
    """A watcher, and the host's time at its polls."""

    def __init__(
        self, vcpus: int = 1, now: int = 2 * LONG, *, is_paused: bool = False, tells_events: bool = True
    ) -> None:
        self.watcher = Watcher(
            vcpus,
            host_tsc_hz=HZ,
            interval_ns=10 * MS,
            is_legal=is_any_page,
            is_paused=is_paused,
            tells_events=tells_events,
        )
        self.now = now
        self.utc_ahead = 0

    def poll(
        self,
        *pages: TimeInfo | None,
        offsets: Sequence[int | None] = (),
        events: Sequence[tuple[VmEventKind, int]] = (),
        after: int = 10 * MS,
    ) -> list[Change]:
        """Take a poll `after` ticks; offsets are unknown unless given."""
        self.now += after
        instants = HostTsc(self.now - 1), HostTsc(self.now), HostTsc(self.now + 1)
        told = tuple(VmEvent(kind, utc_ns) for kind, utc_ns in events)
        utc = Utc(instants[-1], self.now + 1 + self.utc_ahead, 0)
        return self.watcher.take(Poll(*instants, pages, tuple(offsets) or (None,) * len(pages), told, utc))

    def steps(
        self, *pages: TimeInfo | None, offsets: Sequence[int | None] = (), after: int = 10 * MS
    ) -> list[tuple[int | None, int, TscBasis]]:
        """Take a poll; each step's length, lines and basis."""
        changes = self.poll(*pages, offsets=offsets, after=after)
        return [(each.step_ns, each.lines, each.basis) for each in changes if isinstance(each, Step)]


# Lines


@pytest.mark.row("E3")
def test_a_line_is_read_as_a_guest_reads_it() -> None:
    """And before its timestamp by the same floor; nowhere more than floor_ns() below the exact line."""
    rng = random.Random(1)  # noqa: S311  # no secret
    for _ in range(2000):
        page = line(rng.randrange(2**64), rng.randrange(2**62), scale=(rng.randrange(2**31, 2**32), rng.randint(-8, 8)))
        ticks = rng.randrange(-(2**48), 2**48)
        tsc = (page.tsc_timestamp + ticks) % 2**64
        exact = oracle.ExactLine(0, Fraction(page.system_time), oracle.scale_rate(*page[3:5])).at(ticks)
        assert exact - floor_ns(page) < value_at(page, tsc) <= exact
        guests = oracle.TimeInfo(0, 0, *page[1:], 0)
        assert ticks < 0 or value_at(page, tsc) == guests.read(tsc)


@pytest.mark.row("E3")
def test_a_step_is_at_the_newer_timestamp() -> None:
    """By each line's own offset; without offsets as if there was one."""
    before, after = line(1000, 0), line(8000, 9000, 4)
    assert step_between(before, None, after, None) == (2000, 1)
    assert step_between(before, 0, after, 500) == (2500, 1)
    assert step_between(before, 0, after, None) == (2000, 1)


@pytest.mark.row("E3")
def test_a_step_of_two_rates_is_bounded_by_when_it_can_have_been() -> None:
    """From the poll that saw the old line last, or the timestamp if that is later, to the poll that saw the new one."""
    before, after = Line(line(0, 0), 0), Line(line(1000, 1000, 4, scale=(3 << 30, 1)), 0)
    assert step_within(before, after, HostTsc(2000), HostTsc(2100), is_scaled=False) == (500, 1 + 50)
    assert step_within(before, after, HostTsc(0), HostTsc(1100), is_scaled=False) == (0, 1 + 50)
    unknown = step_within(before._replace(offset=None), after, HostTsc(2000), HostTsc(2100), is_scaled=False)
    scaled = step_within(before, after, HostTsc(2000), HostTsc(2100), is_scaled=True)
    assert unknown == scaled
    assert unknown[0] == 0
    assert unknown[1] > 2**33


@pytest.mark.row("E3")
def test_pages_of_one_pair_agree() -> None:
    """A master clock's system_time in two pages is one instant, as two TSCs count it."""
    one, other = Line(line(1000, 7), None), Line(line(5000, 7), None)
    assert difference(one, other, HostTsc(0))[0] == 0
    assert difference(one, other._replace(info=line(5000, 7, flags=0)), HostTsc(0))[0] == 4000
    assert difference(one._replace(offset=0), other._replace(offset=4000), HostTsc(9))[0] == 0
    assert difference(one._replace(offset=0), other._replace(offset=0), HostTsc(9))[0] == 4000


# Steps and the TSC


@pytest.mark.row("E3")
def test_lines_are_counted_by_the_version() -> None:
    """Modulo 2^32, and their sum is exact."""
    watched = Watched()
    watched.poll(line(LONG, 0, 2**32 - 4), offsets=[OFFSET])
    assert watched.steps(line(LONG + 50, 57, 6), offsets=[OFFSET]) == [(7, 5, TscBasis.OFFSETS)]
    summary = watched.watcher.summary
    assert (summary.lines, summary.steps, summary.split, summary.sum_ns) == (5, 1, 1, 7)


@pytest.mark.row("E3")
@pytest.mark.parametrize("version", [2, 40])
def test_a_version_that_went_back_or_stayed_is_a_restart(version: int) -> None:
    """Not 2^31 lines: the step is unknown, and exact if both offsets are known."""
    for offsets, found in (([], (None, 1, TscBasis.CHANGED)), ([OFFSET], (7, 1, TscBasis.OFFSETS))):
        watched = Watched()
        watched.poll(line(LONG, 0, 40), offsets=offsets)
        assert watched.steps(line(LONG + 50, 57, version), offsets=offsets) == [found]


@pytest.mark.row("E3")
@pytest.mark.parametrize(
    ("before", "after", "basis"),
    [
        (line(LONG, 0), line(2 * LONG, LONG, 4), TscBasis.ASSUMED),
        (line(LONG, 0), line(LONG - 10**9, 1, 4), TscBasis.ASSUMED),
        (line(2 * LONG, 0), line(LONG, 1, 4), TscBasis.CHANGED),
        (line(LONG, 0), line(9 * LONG, 1, 4), TscBasis.CHANGED),
        (line(LONG, 9), line(LONG + 70, 9, 4), TscBasis.CHANGED),
        (line(LONG, 9), line(LONG, 9, 4), TscBasis.ASSUMED),
    ],
    ids=["on", "dated back", "back", "further than the host has come", "one pair", "the same"],
)
def test_what_timestamps_say_of_the_tsc(before: TimeInfo, after: TimeInfo, basis: TscBasis) -> None:
    """Without offsets: one that went back, or on by more than the host has, or the same pair at another TSC."""
    watched = Watched()
    watched.poll(before)
    assert [found[2] for found in watched.steps(after)] == [basis]


@pytest.mark.row("E3")
def test_without_a_master_clock_timestamps_are_new() -> None:
    """So a TSC that went on by more than polls allow was changed, and a master clock's may be an old pair's."""
    for flags, basis in ((0, TscBasis.CHANGED), (1, TscBasis.ASSUMED)):
        watched = Watched()
        watched.poll(line(LONG, 0, 2, flags=flags))
        watched.poll(line(LONG + 10 * MS, 1, 4, flags=flags))
        ahead = line(LONG + 20 * MS + LONG // 10, 2, 6, flags=flags)
        assert [found[2] for found in watched.steps(ahead)] == [basis]


@pytest.mark.row("E3")
@pytest.mark.parametrize("kind", [VmEventKind.RESET, VmEventKind.MIGRATION])
def test_an_event_makes_the_next_step_unknown(kind: VmEventKind) -> None:
    """Also one that was told with the poll that saw the last line; and only the next."""
    watched = Watched()
    watched.poll(line(LONG, 0), events=[(kind, 0)])
    watched.poll(line(LONG, 0))
    steps = [watched.steps(line(LONG + at, at, 2 + 2 * at))[0][2] for at in (1, 2)]
    assert steps == [TscBasis.CHANGED, TscBasis.ASSUMED]
    assert watched.watcher.summary.unknown == 1


@pytest.mark.row("E3")
def test_an_event_told_with_a_step_may_be_of_after_it() -> None:
    """So it counts for the next one, too; and no further."""
    watched = Watched()
    watched.poll(line(LONG, 0))
    (first,) = watched.poll(line(LONG + 1, 1, 4), events=[(VmEventKind.RESET, 0)])
    steps = [watched.steps(line(LONG + at, at, 2 + 2 * at))[0][2] for at in (2, 3)]
    assert isinstance(first, Step)
    assert [first.basis, *steps] == [TscBasis.CHANGED, TscBasis.CHANGED, TscBasis.ASSUMED]


@pytest.mark.row("E3")
def test_an_offset_that_is_missing_for_a_moment() -> None:
    """Those polls are left out; if it stays away the watch goes on without."""
    watched = Watched()
    watched.poll(line(LONG, 0), offsets=[OFFSET])
    assert watched.steps(line(LONG + 50, 57, 4), offsets=[None]) == []
    assert watched.steps(line(LONG + 50, 57, 4), offsets=[OFFSET]) == [(7, 1, TscBasis.OFFSETS)]
    found = [watched.steps(line(LONG + 90, 97, 6), offsets=[None]) for _ in range(LOST_POLLS)]
    assert found == [[]] * (LOST_POLLS - 1) + [[(0, 1, TscBasis.ASSUMED)]]


@pytest.mark.row("E3")
def test_a_tsc_that_is_written_is_a_step_without_a_line() -> None:
    """Once two polls saw it; one that is taken back at once is none."""
    watched = Watched()
    page = line(LONG, 0)
    found = [watched.steps(page, offsets=[OFFSET + ticks]) for ticks in (0, 9, 0, 9, 9, 9)]
    assert found == [[], [], [], [], [(9, 0, TscBasis.OFFSETS)], []]


@pytest.mark.row("E3")
def test_a_tsc_that_is_written_at_a_reset_is_unknown() -> None:
    """And told once; the next line is held against what was before, for the page's guest may have been gone."""
    watched = Watched()
    page = line(LONG, 0)
    watched.poll(page, offsets=[OFFSET])
    watched.poll(page, offsets=[OFFSET], events=[(VmEventKind.RESET, 0)])
    found = [watched.steps(page, offsets=[OFFSET + LONG]) for _ in range(4)]
    assert found == [[], [(None, 0, TscBasis.CHANGED)], [], []]
    assert watched.steps(line(2 * LONG + 50, 57, 4), offsets=[OFFSET + LONG]) == [(7, 1, TscBasis.OFFSETS)]


@pytest.mark.row("E3")
def test_a_tsc_that_is_written_is_unknown_where_a_reset_would_not_be_told() -> None:
    """A reboot leaves the old line in a memory that no guest reads any more, and its TSC begins anew."""
    watched = Watched(tells_events=False)
    found = [watched.steps(line(LONG, 0), offsets=[offset]) for offset in (0, 0, -LONG, -LONG, -LONG, -LONG)]
    assert found == [[], [], [], [(None, 0, TscBasis.CHANGED)], [], []]
    assert watched.steps(line(50, 57, 4), offsets=[-LONG]) == [(7, 1, TscBasis.OFFSETS)]


@pytest.mark.row("E3")
def test_a_tsc_that_is_another_at_each_poll_is_unknown() -> None:
    """Which line was read with which TSC is open then; after ten polls that is told, again and again."""
    watched = Watched()
    found = []
    for poll in range(101):
        page = line(watched.now + 1000 * poll, watched.now + MS * poll, 2 + 2 * poll)
        found += watched.steps(page, offsets=[1000 * poll])
    assert found == [(None, 10, TscBasis.CHANGED)] * 10
    assert watched.watcher.summary.lines == 100


@pytest.mark.row("E3")
def test_a_tsc_that_is_written_while_the_guest_is_paused_from_the_beginning() -> None:
    """An old line is read with it by nobody: KVM replaces that before the guest runs."""
    watched = Watched(is_paused=True)
    page = line(LONG, 0)
    assert [watched.steps(page, offsets=[offset]) for offset in (0, 0, *[-LONG] * 5)] == [[]] * 7
    (step,) = watched.poll(line(LONG, LONG, 4), offsets=[-LONG], events=[(VmEventKind.RESUME, 0)])
    assert isinstance(step, Step)
    assert (step.step_ns, step.basis, step.seen_ns) == (0, TscBasis.OFFSETS, None)
    assert watched.steps(line(LONG, LONG, 4), offsets=[-LONG + 9]) == []
    assert watched.steps(line(LONG, LONG, 4), offsets=[-LONG + 9]) == [(9, 0, TscBasis.OFFSETS)]


# Pauses


@pytest.mark.row("E3")
def test_a_pause_as_the_guest_saw_it() -> None:
    """Its clock's progress, by the VMM's own stamps; and what was told is the cause."""
    watched = Watched()
    watched.poll(line(LONG, 0), offsets=[OFFSET])
    stop = watched.now + 5 * MS
    watched.poll(line(LONG, 0), offsets=[OFFSET], events=[(VmEventKind.STOP, stop)])
    events = [(VmEventKind.RESUME, stop + 10**9)]
    step = watched.poll(line(LONG + 10**9, 3000, 4), offsets=[OFFSET], events=events, after=10**9)[-1]
    assert isinstance(step, Step)
    assert (step.step_ns, step.seen_ns) == (3000 - 10**9, 3000)
    assert step.seen_bound_ns == 1 + 1000 + 2 * 2 + 1
    assert [event.kind for event in step.events] == [VmEventKind.STOP, VmEventKind.RESUME]
    assert watched.watcher.summary.most_seen == step


def waits_for_its_resume() -> tuple[Watched, TimeInfo, int]:
    """A guest that was stopped for 10 ms and has a new line, before its RESUME was told; and when the STOP was."""
    watched = Watched()
    watched.poll(line(LONG, 0), offsets=[OFFSET])
    stop = watched.now + 1000
    watched.poll(line(LONG, 0), offsets=[OFFSET], events=[(VmEventKind.STOP, stop)])
    after = line(LONG + 10 * MS, 0, 4)
    assert watched.poll(after, offsets=[OFFSET]) == []
    return watched, after, stop


@pytest.mark.row("E3")
@pytest.mark.parametrize("polls", [0, 1, 90])
def test_a_step_waits_for_a_resume_that_is_late(polls: int) -> None:
    """A second at most, and has it among its events."""
    watched, after, stop = waits_for_its_resume()
    for _ in range(polls):
        assert watched.poll(after, offsets=[OFFSET]) == []
    (step,) = watched.poll(after, offsets=[OFFSET], events=[(VmEventKind.RESUME, stop + 10 * MS)])
    assert isinstance(step, Step)
    assert step.seen_ns == 0
    assert [event.kind for event in step.events] == ["stop", "resume"]


@pytest.mark.row("E3")
def test_a_resume_that_is_never_told() -> None:
    """After a second the step is told as it is, and so it is before the next one, and at the end."""
    watched, after, _ = waits_for_its_resume()
    *_, step = watched.poll(after, offsets=[OFFSET], after=1000 * MS)
    assert isinstance(step, Step)
    assert step.seen_ns is None
    watched, after, _ = waits_for_its_resume()
    (first,) = watched.poll(line(LONG + 20 * MS, 0, 6), offsets=[OFFSET])
    (second,) = watched.watcher.finish()
    assert isinstance(first, Step)
    assert isinstance(second, Step)
    assert (first.after, second.before) == (after, after)


@pytest.mark.row("E3")
def test_a_pause_that_is_over_belongs_to_no_later_step() -> None:
    """Nor do two pauses to one line."""
    watched = Watched()
    watched.poll(line(LONG, 0), offsets=[OFFSET])
    pause = [(VmEventKind.STOP, watched.now + 1000), (VmEventKind.RESUME, watched.now + 2000)]
    for events in (pause, []):
        watched.poll(line(LONG, 0), offsets=[OFFSET], events=events)
    (late,) = watched.poll(line(LONG + 50, 50, 4), offsets=[OFFSET])
    (twice,) = watched.poll(line(LONG + 60, 60, 6), offsets=[OFFSET], events=pause * 2)
    assert isinstance(late, Step)
    assert isinstance(twice, Step)
    assert (late.seen_ns, twice.seen_ns) == (None, None)


@pytest.mark.row("E3")
@pytest.mark.parametrize("by_ns", [80 * MS, 3600 * 10**9, -3600 * 10**9], ids=["slewed", "set", "set back"])
def test_utc_does_what_it_likes_in_a_pause(by_ns: int) -> None:
    """Its stamps are taken for what they were by the host's TSC."""
    watched = Watched()
    watched.poll(line(LONG, 0), offsets=[OFFSET])
    stop = watched.now + 5 * MS
    watched.poll(line(LONG, 0), offsets=[OFFSET], events=[(VmEventKind.STOP, stop)])
    watched.utc_ahead = by_ns
    for _ in range(4):
        watched.poll(line(LONG, 0), offsets=[OFFSET], after=10**9)
    resume = watched.now + 5 * MS
    events = [(VmEventKind.RESUME, resume + by_ns)]
    (step,) = watched.poll(line(LONG + 10**9, stop - resume + 10**9, 4), offsets=[OFFSET], events=events)
    assert isinstance(step, Step)
    assert (step.seen_ns, step.seen_bound_ns) == (0, 1006)


@pytest.mark.row("E3")
@pytest.mark.parametrize("by_ns", [3600 * 10**9, -3600 * 10**9])
def test_utc_is_set_beside_a_stamp(by_ns: int) -> None:
    """Then it is open when that was: within that hour, or unknown."""
    watched = Watched()
    watched.poll(line(LONG, 0), offsets=[OFFSET])
    stop = watched.now + 5 * MS
    watched.utc_ahead = by_ns
    watched.poll(line(LONG, 0), offsets=[OFFSET], events=[(VmEventKind.STOP, stop)])
    resume = watched.now + 5 * MS
    events = [(VmEventKind.RESUME, resume + by_ns)]
    (step,) = watched.poll(line(LONG + MS, stop - resume + MS, 4), offsets=[OFFSET], events=events)
    assert isinstance(step, Step)
    assert step.seen_ns is None or abs(step.seen_ns) <= (step.seen_bound_ns or 0)


@pytest.mark.row("E3")
@pytest.mark.parametrize(
    ("step_ns", "basis"),
    [
        (-200 * MS, TscBasis.ASSUMED),
        (-105 * MS, TscBasis.ASSUMED),
        (0, TscBasis.CHANGED),
        (-500 * MS, TscBasis.CHANGED),
        (LONG, TscBasis.CHANGED),
    ],
)
@pytest.mark.parametrize("polls", [0, 5], ids=["at once", "late"])
def test_a_step_that_no_stopped_clock_makes_is_that_of_another_tsc(step_ns: int, basis: TscBasis, polls: int) -> None:
    """QEMU tells of STOP and RESUME at a loadvm, and no more; also where a vCPU enters late."""
    watched = Watched()
    for _ in range(2):
        watched.poll(line(LONG, 0))
    stop = watched.now + 5 * MS
    pause = [(VmEventKind.STOP, stop), (VmEventKind.RESUME, stop + 200 * MS)]
    found = watched.poll(line(LONG, 0), events=pause, after=210 * MS)
    for _ in range(polls):
        found += watched.poll(line(LONG, 0))
    after = line(LONG + 10**9, 10**9 + step_ns, 4)
    found += watched.poll(after)
    found += watched.poll(after)
    (step,) = (each for each in found if isinstance(each, Step))
    assert (step.basis, step.step_ns) == (basis, step_ns if basis is TscBasis.ASSUMED else None)


# Pages of a VM


@pytest.mark.row("E3")
def test_a_late_page_of_vcpu_0_is_one_finding() -> None:
    """Of 64 vCPUs' pages 63 disagree with it, from and to the same poll: told once, with the longest time."""
    watched = Watched(64)
    old, new = line(LONG, 0), line(LONG + 50, 50 - 10**8, 4)
    known = [OFFSET] * 64
    watched.poll(*[old] * 64, offsets=known)
    watched.poll(old, *[new] * 63, events=[(VmEventKind.RESUME, 0)], offsets=known)
    watched.poll(old, *[new] * 63, offsets=known)
    assert len(watched.watcher.open_disagreements) == 1
    found = [each for each in watched.poll(*[new] * 64, offsets=known) if isinstance(each, Disagreement)]
    (told,) = found
    assert (told.ahead, told.behind, told.by_ns, told.least_ns) == (0, 1, 10**8, 10 * MS)
    assert [event.kind for event in told.events] == [VmEventKind.RESUME]
    assert told.at == watched.now - 10 * MS
    assert watched.watcher.open_disagreements == []


@pytest.mark.row("E3")
@pytest.mark.parametrize("offline", [0, 1])
def test_a_vcpu_that_does_not_run_has_a_stale_page(offline: int) -> None:
    """It has missed some of vCPU 0's lines, and nobody reads it; told once.  vCPU 0's own page is read by all."""
    watched = Watched(2)
    old = line(LONG, 0)
    for poll in range(100):
        new = line(watched.now, watched.now - LONG + 30 * poll, 2 + 2 * poll)
        watched.poll(*([new, old] if offline else [old, new]), offsets=[0, 0])
    watched.watcher.finish()
    summary = watched.watcher.summary
    widest = summary.possible_disagreement
    assert (summary.disagreements, summary.stale) == (1, offline)
    assert (widest.by_ns if widest else None) == (None if offline else 2970)


@pytest.mark.row("E3")
def test_a_vcpu_that_runs_again_is_held_against_the_others() -> None:
    """From its next line on."""
    watched = Watched(2)
    pages = [line(LONG + poll, 31 * poll, 2 + 2 * poll) for poll in range(5)]
    for page in pages:
        watched.poll(page, pages[0], offsets=[0, 0])
    assert watched.watcher.open_disagreements == []
    watched.poll(pages[4], pages[3], offsets=[0, 0])
    (found,) = watched.watcher.open_disagreements
    assert (found.ahead, found.behind, found.by_ns, found.is_stale) == (0, 1, 30, False)


@pytest.mark.row("E3")
def test_those_on_both_sides_of_vcpu_0() -> None:
    """The two that are furthest apart are told beside what each side is off."""
    watched = Watched(4)
    pages = [line(LONG, 0), line(LONG, 50), line(LONG, -70 % 2**64), line(LONG, 10)]
    watched.poll(*pages, offsets=[OFFSET] * 4)
    found = [
        (each.ahead, each.behind, each.by_ns) for each in watched.watcher.finish() if isinstance(each, Disagreement)
    ]
    assert found == [(1, 0, 50), (0, 2, 70), (1, 2, 120)]


@pytest.mark.row("E3")
def test_how_long_pages_disagreed_is_not_added_over_what_was_not_seen() -> None:
    """Where both pages changed between two polls they may have agreed; then the time begins anew."""
    watched = Watched(2)
    known = [OFFSET] * 2
    for version in (2, 4):
        for _ in range(3):
            watched.poll(line(LONG, 500, version), line(LONG, 0, version), offsets=known)
    (found,) = watched.watcher.finish()
    assert isinstance(found, Disagreement)
    assert (found.by_ns, found.least_ns) == (500, 20 * MS)


@pytest.mark.row("E3")
def test_pages_that_differ_by_their_floors_agree() -> None:
    """2 ns are no disagreement, and 3 are; of unknown offsets it is assumed that there is one TSC."""
    for apart_ns, bases in ((2, []), (3, [TscBasis.ASSUMED])):
        watched = Watched(2)
        watched.poll(line(LONG, 100), line(LONG, 100 + apart_ns))
        told = [each.basis for each in watched.watcher.finish() if isinstance(each, Disagreement)]
        assert told == bases


# The rest


@pytest.mark.row("E3")
def test_a_page_that_is_lost_is_told_once() -> None:
    """After some polls without a legal page, whatever lies there; and again after it was back."""
    watched = Watched()
    watched.poll(line(LONG, 0))
    gone = [None, line(0, 0, scale=(0, 0))] * LOST_POLLS
    for _ in range(2):
        found = [each for page in gone for each in watched.poll(page)]
        assert [type(each) for each in found] == [PageLost]
        watched.poll(line(LONG, 0))
    assert watched.watcher.summary.pages_lost == 2


@pytest.mark.row("E3")
def test_a_stall_is_told() -> None:
    """Polls more than four intervals apart."""
    watched = Watched()
    watched.poll(line(LONG, 0))
    assert watched.poll(line(LONG, 0), after=40 * MS) == []
    assert watched.poll(line(LONG, 0), after=41 * MS) == [Stall(HostTsc(watched.now), 41 * MS)]
    summary = watched.watcher.summary
    assert (summary.stalls, summary.longest_stall_ns, summary.polls, summary.duration_ns) == (1, 41 * MS, 3, 81 * MS)


@pytest.mark.row("E3")
def test_flags_are_told() -> None:
    """Also where the line stays, as when a guest clears GUEST_STOPPED."""
    watched = Watched()
    watched.poll(line(LONG, 0))
    watched.poll(line(LONG, 0, 4, flags=3))
    assert watched.poll(line(LONG, 0, 4, flags=1)) == [FlagsChange(HostTsc(watched.now), 0, 3, 1)]
    assert watched.watcher.summary.flags_changes == 2


@pytest.mark.row("E3")
def test_a_restart_leads_to_no_step() -> None:
    """Pages of a new search are others; what was left to tell is told, and the summary goes on."""
    watched = Watched(2)
    watched.poll(line(LONG, 0), line(LONG, 90), offsets=[OFFSET] * 2)
    assert [type(each) for each in watched.watcher.restart(1)] == [Disagreement]
    assert watched.poll(line(7, 7, 60), offsets=[0], after=LONG) == []
    summary = watched.watcher.summary
    assert (summary.restarts, summary.disagreements, summary.steps, summary.stalls, summary.polls) == (1, 1, 0, 0, 2)


@pytest.mark.row("E3")
def test_absolute_readings() -> None:
    """At the host's instant, where page and offset are known and the TSC is not scaled."""
    watcher = Watcher(4, host_tsc_hz=HZ, is_legal=is_any_page, interval_ns=MS)
    fast = line(0, 0, scale=(1 << 31, 2))
    pages = line(0, 1000), line(0, 1000), None, fast
    poll = Poll(HostTsc(8), HostTsc(9), HostTsc(10), pages, (5, None, 5, 5), ())
    assert watcher.readings(poll) == (1014, None, None, None)
    known = Watcher(4, host_tsc_hz=HZ, is_legal=is_any_page, interval_ns=MS, guest_tsc_hz=HZ)
    assert known.readings(poll) == (1014, None, None, 28)
