"""Budgets: how they are written, and what breaks, keeps and leaves them open."""

from __future__ import annotations

from fractions import Fraction

import pytest

from pvclock import ConfigError
from pvclock.meter.quantity_text import parse_drift_ppb, parse_step_ns
from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.budgets import Budgets, Verdict, judge
from pvclock.meter.watch.changes import Disagreement, PageLost, Step, TscBasis
from pvclock.meter.watch.rate import PageRate
from pvclock.meter.watch.summary import Tally, WatchSummary
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.quantities import GuestNs, GuestTsc, HostTsc
from pvclock.readings import TimeInfo

LINE = TimeInfo(2, GuestTsc(0), GuestNs(0), 1 << 31, 1, 1)
OTHER = TimeInfo(4, GuestTsc(5), GuestNs(5), 1 << 31, 1, 1)
STOP = VmEvent(VmEventKind.STOP, 0)
PASSED, BROKEN, UNDECIDED = VerdictStatus.PASSED, VerdictStatus.BROKEN, VerdictStatus.UNDECIDED


def a_step(step_ns: int | None, basis: TscBasis = TscBasis.OFFSETS, lines: int = 1, bound_ns: int | None = 2) -> Step:
    """Return a step of vCPU 1."""
    bound_ns = None if step_ns is None else bound_ns
    return Step(HostTsc(9), HostTsc(8), 1, LINE, OTHER, lines, basis, step_ns, bound_ns, None, None, (STOP,))


def apart(by_ns: int, basis: TscBasis = TscBasis.OFFSETS, bound_ns: int = 2) -> Disagreement:
    """Return a disagreement of vCPUs 0 and 1."""
    return Disagreement(HostTsc(9), 0, 1, by_ns, bound_ns, 70, (), basis)


def summary_of(*changes: Step | Disagreement | PageLost, polls: int = 2) -> WatchSummary:
    """Return the summary of these."""
    tally = Tally()
    for _ in range(polls):
        tally.note_poll(0)
    tally.note(changes)
    return tally.summary


def step_verdict(max_step_ns: int, *changes: Step | Disagreement | PageLost, tsc_unchanged: bool = False) -> Verdict:
    """Return what becomes of a budget for steps."""
    return judge(Budgets(Fraction(max_step_ns), None, tsc_unchanged), summary_of(*changes), {})


@pytest.mark.row("E3")
@pytest.mark.parametrize(
    ("text", "ns"),
    [("1us", 1000), ("250ns", 250), ("1ms", 10**6), ("0.5s", 5 * 10**8), (" 1.5 us ", 1500), ("0ns", 0)],
)
def test_a_length_of_time(text: str, ns: int) -> None:
    """With its unit."""
    assert parse_step_ns(text) == ns


@pytest.mark.row("E3")
@pytest.mark.parametrize(("text", "ppb"), [("10ppb", 10), ("1ppm", 1000), ("0.01ppb", Fraction(1, 100))])
def test_a_rate(text: str, ppb: Fraction) -> None:
    """With its unit."""
    assert parse_drift_ppb(text) == ppb


@pytest.mark.row("E3")
@pytest.mark.parametrize("text", ["", "1", "us", "-1us", "1 min", "1e3ns", "1ppb", "9" * 5000 + "ns", "1usus"])
def test_what_is_no_length_of_time(text: str) -> None:
    """It says what can be."""
    with pytest.raises(ConfigError, match=r"is not a length of time, such as 250ns.* units are ns, us, ms, s"):
        parse_step_ns(text)


@pytest.mark.row("E3")
@pytest.mark.parametrize("text", ["10", "10us", "ppm", "-1ppb"])
def test_what_is_no_rate(text: str) -> None:
    """It says what can be."""
    with pytest.raises(ConfigError, match=r"is not a rate, such as 10ppb.* units are ppb, ppm"):
        parse_drift_ppb(text)


@pytest.mark.row("E3")
@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ([], PASSED),
        ([a_step(98), a_step(-98)], PASSED),
        ([a_step(99)], UNDECIDED),
        ([a_step(-102)], UNDECIDED),
        ([a_step(103)], BROKEN),
        ([a_step(-103), a_step(None, TscBasis.CHANGED)], BROKEN),
        ([a_step(None, TscBasis.CHANGED)], UNDECIDED),
        ([a_step(5, lines=2)], UNDECIDED),
        ([a_step(202, lines=2)], UNDECIDED),
        ([a_step(203, lines=2)], BROKEN),
        ([a_step(203, lines=2), a_step(90)], BROKEN),
        ([a_step(5, TscBasis.ASSUMED)], UNDECIDED),
        ([a_step(10**9, TscBasis.ASSUMED)], UNDECIDED),
        ([a_step(0, TscBasis.ASSUMED)._replace(after=LINE._replace(version=4))], PASSED),
        ([a_step(103, lines=0)], BROKEN),
        ([a_step(40, bound_ns=500), a_step(50)], UNDECIDED),
        ([a_step(-40, bound_ns=500), a_step(-50)], UNDECIDED),
        ([a_step(300, bound_ns=1), a_step(400, bound_ns=390)], BROKEN),
        ([apart(40, bound_ns=500), apart(50)], UNDECIDED),
        ([apart(300, bound_ns=1), apart(400, bound_ns=390)], BROKEN),
        ([PageLost(HostTsc(9), 1, "")], UNDECIDED),
        ([apart(98)], PASSED),
        ([apart(99)], UNDECIDED),
        ([apart(103)], BROKEN),
        ([apart(103, TscBasis.ASSUMED)], UNDECIDED),
    ],
)
def test_a_budget_of_100_ns(changes: list[Step | Disagreement | PageLost], status: VerdictStatus) -> None:
    """It is broken by what is surely beyond it, and passed by what is surely within."""
    judged = step_verdict(100, *changes)
    assert judged.status is status
    assert bool(judged.findings) is (status is not PASSED)


@pytest.mark.row("E3")
@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ([a_step(98, TscBasis.ASSUMED), apart(98, TscBasis.ASSUMED)], PASSED),
        ([a_step(103, TscBasis.ASSUMED)], BROKEN),
        ([apart(103, TscBasis.ASSUMED)], BROKEN),
        ([a_step(None, TscBasis.CHANGED)], UNDECIDED),
    ],
)
def test_a_user_may_know_that_the_tsc_is_unchanged(changes: list[Step | Disagreement], status: VerdictStatus) -> None:
    """Then an assumption is none; but what says that it was changed still does."""
    assert step_verdict(100, *changes, tsc_unchanged=True).status is status


@pytest.mark.row("E3")
def test_a_budget_below_the_floor_is_undecided() -> None:
    """Though nothing was found: less than that cannot be measured."""
    assert (step_verdict(1).status, step_verdict(2).status) == (UNDECIDED, PASSED)


@pytest.mark.row("E3")
def test_what_was_not_watched_is_undecided() -> None:
    """One poll, or a new search in between."""
    once = judge(Budgets(Fraction(100)), summary_of(polls=1), {})
    again = judge(Budgets(Fraction(100)), summary_of()._replace(restarts=1), {})
    assert (once.status, again.status) == (UNDECIDED, UNDECIDED)


@pytest.mark.row("E3")
def test_the_finding_says_what_broke_it_and_by_how_much() -> None:
    """The greatest of each kind, its bound and its cause; what is only open is left out."""
    judged = step_verdict(1000, a_step(5000), a_step(-1_035_000_123), a_step(None, TscBasis.CHANGED), apart(4000))
    assert judged.status is BROKEN
    assert judged.findings == [
        "vCPU 1's clock stepped by -1.035 000 123 s (within 2 ns), at stop: 1.035 s more than 1 us",
        "vCPU 0's page was 4.000 us (within 2 ns) ahead of vCPU 1's, for 70 ns at least: 3.000 us more than 1 us",
    ]


RESUME = VmEvent(VmEventKind.RESUME, 10**9)
PAUSE = a_step(-(10**9))._replace(seen_ns=-70, seen_bound_ns=20, events=(STOP, RESUME))


@pytest.mark.row("E3")
@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ([PAUSE], PASSED),
        ([PAUSE._replace(seen_ns=-90)], UNDECIDED),
        ([PAUSE._replace(seen_ns=-130)], BROKEN),
        ([PAUSE._replace(seen_ns=None, seen_bound_ns=None)], UNDECIDED),
        ([PAUSE, a_step(103)._replace(events=())], BROKEN),
        ([PAUSE, apart(103)], BROKEN),
        ([PAUSE._replace(basis=TscBasis.ASSUMED)], UNDECIDED),
    ],
)
def test_pauses_may_be_allowed(changes: list[Step | Disagreement], status: VerdictStatus) -> None:
    """By what the guest saw of each; all else counts as ever, and a pause by the TSC where they are not."""
    tally = Tally()
    for _ in range(2):
        tally.note_poll(0)
    tally.note(changes)
    assert judge(Budgets(Fraction(100), allow_pauses=True), tally.as_seen, {}).status is status
    assert judge(Budgets(Fraction(100), tsc_unchanged=True), tally.summary, {}).status is BROKEN


@pytest.mark.row("E3")
def test_a_pause_that_breaks_a_budget_names_the_option() -> None:
    """For a guest that was stopped and continued as it should be breaks each budget."""
    (told,) = step_verdict(100, PAUSE).findings
    assert told.endswith(
        "; a pause counts by the TSC, with --allow-pauses by what the guest saw, -70 ns (within 20 ns)"
    )


@pytest.mark.row("E3")
@pytest.mark.parametrize(
    ("rate", "status"),
    [
        (PageRate(9.0, 0.5), PASSED),
        (PageRate(-9.6, 0.5), UNDECIDED),
        (PageRate(10.4, 0.5), UNDECIDED),
        (PageRate(-10.6, 0.5), BROKEN),
        (PageRate(None, None, "its TSC is scaled"), UNDECIDED),
    ],
)
def test_a_budget_of_10_ppb(rate: PageRate, status: VerdictStatus) -> None:
    """By the better end of the bound, and by the worse; two vCPUs with one rate are told once."""
    judged = judge(Budgets(None, Fraction(10)), summary_of(), {0: rate, 1: rate})
    assert judged.status is status
    assert len(judged.findings) == (status is not PASSED)
    assert all(told.startswith("vCPU 0's") for told in judged.findings)


@pytest.mark.row("E3")
def test_broken_counts_before_undecided() -> None:
    """Of several budgets; and without a rate there is none to pass."""
    both = Budgets(Fraction(100), Fraction(10))
    assert judge(both, summary_of(a_step(None, TscBasis.CHANGED)), {0: PageRate(50.0, 1.0)}).status is BROKEN
    assert judge(both, summary_of(), {}).status is UNDECIDED
    assert judge(Budgets(), summary_of(a_step(10**9)), {}) == (PASSED, [])
