"""The watch of a guest whose clock is known exactly: what it finds is true, or called unknown; and no false alarm."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

import pytest

from pvclock.meter.findings import time_info
from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch import page_watch
from pvclock.meter.watch.budgets import Budgets, Verdict, judge
from pvclock.meter.watch.changes import Change, Disagreement, Step, TscBasis
from pvclock.meter.watch.poll import Poll
from pvclock.meter.watch.watcher import Watcher
from pvclock.quantities import HostTsc
from tests.unit.clocks import NS_PER_S, PAGES, a_clock
from tests.unit.watched_cases import INTERVAL_NS, Life, clean, injected, untrue, watcher_of
from tests.unit.watched_guest import NS_PER_HOUR, WatchedGuest, is_any_page, log_uniform

JUST_ABOVE_THE_BOUND_NS = 5
"""A re-anchoring of 1 ns, the floor of a reading, and a step's bound of 2 ns."""

MANY = 10_000
SOME, FEW = 150, 40


def untrue_findings(lives: range) -> list[tuple[int, str]]:
    """Return what is not true of the findings in these lives, with the life's seed."""
    return [(seed, why) for seed in lives for why in untrue(injected(seed))]


def verdict(life: Life) -> Verdict:
    """Return what a budget just above the bound makes of a life."""
    assert isinstance(life.watcher, Watcher)
    return judge(Budgets(Fraction(JUST_ABOVE_THE_BOUND_NS)), life.watcher.summary, {})


def false_alarms(lives: range) -> list[tuple[int, Verdict]]:
    """Return clean lives of which something untrue is told, or whose budget is broken or needlessly left undecided."""
    found = []
    for seed in lives:
        life = clean(seed)
        judged = verdict(life)
        summary = life.watcher.summary if isinstance(life.watcher, Watcher) else None
        is_all_known = summary is not None and life.reads_offsets and not summary.split
        wanted = {VerdictStatus.PASSED} if is_all_known else {VerdictStatus.PASSED, VerdictStatus.UNDECIDED}
        if judged.status not in wanted or list(untrue(life)):
            found.append((seed, judged))
    return found


@pytest.mark.row("E3")
def test_each_finding_is_true_or_called_unknown() -> None:
    """Steps of 1 ns to 1 h, drifts, pauses, resets and TSC writes, with and without offsets and events."""
    assert untrue_findings(range(SOME)) == []


@pytest.mark.long
@pytest.mark.row("E3")
def test_each_finding_is_true_or_called_unknown_in_many_lives() -> None:
    """The same 10,000 times."""
    assert untrue_findings(range(SOME, SOME + MANY)) == []


@pytest.mark.row("E3")
def test_no_false_alarm() -> None:
    """A clock that goes on breaks no budget just above the bound, whatever is done to its TSC and to the watch."""
    assert false_alarms(range(SOME)) == []


@pytest.mark.long
@pytest.mark.row("E3")
def test_no_false_alarm_in_many_lives() -> None:
    """The same 10,000 times."""
    assert false_alarms(range(SOME, SOME + MANY)) == []


# Careless ones


class Careless:
    """A watcher that sees and tells what it should not."""

    def __init__(
        self,
        guest: WatchedGuest,
        sees: Callable[[WatchedGuest, Poll], Poll] = lambda _, poll: poll,
        tells: Callable[[Change], Change] = lambda change: change,
    ) -> None:
        self._guest, self._watcher, self._sees, self._tells = guest, watcher_of(guest), sees, tells

    def take(self, poll: Poll) -> list[Change]:
        """Take what it sees of a poll."""
        return [self._tells(change) for change in self._watcher.take(self._sees(self._guest, poll))]

    def finish(self) -> list[Change]:
        """End."""
        return [self._tells(change) for change in self._watcher.finish()]

    @property
    def open_disagreements(self) -> list[Disagreement]:
        """As the real one's."""
        return self._watcher.open_disagreements


def without_offsets(guest: WatchedGuest, poll: Poll) -> Poll:
    """Take the guest's TSC for the host's."""
    return poll._replace(tsc_offsets=tuple(0 for _ in guest.vcpus))


def without_events(_: WatchedGuest, poll: Poll) -> Poll:
    """Hear nothing."""
    return poll._replace(events=())


def of_two_instants(guest: WatchedGuest, poll: Poll) -> Poll:
    """Take vCPU 0's page as it was before the others'."""
    instants = [poll.begin, *([poll.end] * (len(guest.vcpus) - 1))]
    states = [guest.state(vcpu, at) for vcpu, at in zip(guest.vcpus, instants, strict=True)]
    return poll._replace(pages=tuple(state.page for state in states))


def one_line(change: Change) -> Change:
    """Take each change of a page for one new line."""
    return change._replace(lines=1) if isinstance(change, Step) else change


def always_known(change: Change) -> Change:
    """Never say that the TSC may have been changed."""
    return change._replace(basis=TscBasis.OFFSETS) if isinstance(change, Step) else change


@pytest.mark.row("E3")
@pytest.mark.parametrize(
    "make",
    [
        lambda guest: Careless(guest, without_offsets),
        lambda guest: Careless(guest, without_events),
        lambda guest: Careless(guest, of_two_instants),
        lambda guest: Careless(guest, tells=one_line),
        lambda guest: Careless(guest, tells=always_known),
    ],
    ids=["no offsets", "no events", "two instants", "one line", "always known"],
)
def test_a_careless_watcher_is_told(make: Callable[[WatchedGuest], Careless]) -> None:
    """The truth is not what it finds."""
    assert any(list(untrue(injected(seed, make))) for seed in range(SOME))


@pytest.mark.row("E3")
def test_a_hasty_watcher_gives_a_false_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TSC that a VMM writes while the guest stands is no step: one poll does not tell that from a guest's write."""
    monkeypatch.setattr(page_watch, "MOVED_POLLS", 0)
    monkeypatch.setattr(page_watch.PageWatch, "_moving", lambda *_: None)
    assert any(verdict(clean(seed)).status is VerdictStatus.BROKEN for seed in range(FEW * 3))


# The engine's own clock, seen from outside


class EngineLife:
    """A real GuestClock with two vCPUs on a simulated host, under watch."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311  # no secret
        self.hz = self.rng.randint(8 * 10**8, 5 * 10**9)
        self.clock, self.backend, self.memory = a_clock(self.hz, self.rng.randrange(2**62), vcpus=2)
        self.watcher = Watcher(
            2, host_tsc_hz=self.hz, guest_tsc_hz=self.hz, interval_ns=INTERVAL_NS, is_legal=is_any_page
        )
        self.advance()
        self.poll()

    def advance(self) -> int:
        """Let up to a second pass; return how much."""
        ns = self.rng.randrange(10**5, NS_PER_S)
        self.backend.advance(ns=ns)
        return ns

    def poll(self) -> list[Step]:
        """Take a poll; the steps."""
        at = HostTsc(self.backend.tsc)
        offsets = tuple(self.backend.tsc_offsets.get(vcpu, 0) for vcpu in (0, 1))
        pages = tuple(time_info(self.memory.read(gpa, 32)) for gpa in PAGES)
        changes = self.watcher.take(Poll(at, at, at, pages, offsets, ()))
        assert not [change for change in changes if isinstance(change, Disagreement)]
        return [change for change in changes if isinstance(change, Step)]


# Operations: each returns the step that its clock takes against the TSC


def refresh(life: EngineLife) -> int:
    """Re-anchor."""
    life.clock.refresh()
    return 0


def skip(life: EngineLife) -> int:
    """Skip guest time."""
    ns = round(log_uniform(life.rng, 1, NS_PER_HOUR))
    life.clock.skip(ns)
    return ns


def freeze(life: EngineLife) -> int:
    """Pause the clock, which stands meanwhile."""
    life.clock.pause()
    ns = life.advance()
    life.clock.resume("freeze")
    return -ns


def catch_up(life: EngineLife) -> int:
    """Pause the clock, which goes on meanwhile."""
    life.clock.pause()
    life.advance()
    life.clock.resume("advance")
    return 0


def write_tscs(life: EngineLife) -> int:
    """Write both vCPUs' TSCs as a guest does."""
    moved = life.rng.randrange(-(10**12), 10**12)
    for vcpu in (0, 1):
        life.clock.write_msr(vcpu, 0x10, (life.backend.tsc + life.backend.tsc_offsets.get(vcpu, 0) + moved) % 2**64)
    return 0


ENGINES_OPERATIONS = [refresh, skip, freeze, catch_up, write_tscs]


@pytest.mark.row("E3")
def test_the_engines_own_steps_are_found_exactly() -> None:
    """Skips, pauses, re-anchorings and TSC writes of a GuestClock, within the bound and the 1 ns of an anchor."""
    told, wanted = [], []
    for seed in range(FEW):
        life = EngineLife(seed)
        for operation in life.rng.choices(ENGINES_OPERATIONS, k=8):
            life.advance()
            life.poll()
            step_ns = operation(life)
            life.advance()
            steps = [*life.poll(), *life.poll()]  # a TSC that was written counts at the second poll
            told += [
                (step.vcpu, step.basis, abs((step.step_ns or 0) - step_ns) <= 1 + (step.bound_ns or 0))
                for step in steps
            ]
            wanted += [(vcpu, TscBasis.OFFSETS, True) for vcpu in (0, 1)]
    assert told == wanted


@pytest.mark.row("E3")
def test_a_change_of_rate_is_no_step() -> None:
    """A dilated clock goes on where it was, within a bound that grows with the time in which that happened."""
    for seed in range(FEW):
        life = EngineLife(seed)
        ten_ms = 10**7
        life.backend.advance(ns=ten_ms // 2)
        life.clock.dilate(life.rng.randint(1, 20), 10)
        life.backend.advance(ns=ten_ms // 2)
        found = [(abs(step.step_ns or 0), step.bound_ns or 0) for step in life.poll()]
        assert len(found) == 2
        assert all(step_ns <= bound_ns + 1 <= ten_ms + 4 for step_ns, bound_ns in found)
