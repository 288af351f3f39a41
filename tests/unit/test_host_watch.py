"""Trouble of the host, every fault played on a host of numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock.errors import RangeError
from pvclock.host.linux import HostReading
from pvclock.host.watch import HostWatch, StallCause, TroubleKind
from pvclock.quantities import U64_MASK, HostTsc
from pvclock.timekeeping.events import EventKind

TSC_HZ = 2_596_132_000
MS = 10**6
INTERVAL_NS = 100 * MS
NS_PER_S = 10**9


class PlayedHost:
    """A host whose every number moves as a test says; `reading` may be replaced at will."""

    def __init__(self, tsc: int = 10**12) -> None:
        self.reading = HostReading(
            host_tsc=HostTsc(tsc),
            raw_ns=5 * NS_PER_S,
            width_ticks=100,
            monotonic_ns=6 * NS_PER_S,
            real_ns=1_700_000_000 * NS_PER_S,
            asleep_least_ns=-50,
            asleep_most_ns=50,
            process_cpu_ns=0,
            run_delay_ns=0,
            frozen_ns=0,
            clocksource="tsc",
            clocksources=frozenset({"tsc", "hpet", "acpi_pm"}),
        )

    def read(self) -> HostReading:
        """See HostSource."""
        return self.reading

    def set(self, **numbers: object) -> None:
        """Replace fields of the reading."""
        self.reading = self.reading._replace(**numbers)  # type: ignore[arg-type]  # the names are the test's own

    def run(self, ns: int, *, cpu_ns: int = 0, run_delay_ns: int = 0, frozen_ns: int = 0, ppm: int = 0) -> None:
        """Let `ns` pass, with the TSC off its rate by `ppm`, and with that much of the other counters."""
        now = self.reading
        ticks = ns * TSC_HZ * (10**6 + ppm) // (10**6 * NS_PER_S)
        self.set(
            host_tsc=HostTsc((now.host_tsc + ticks) & U64_MASK),
            raw_ns=now.raw_ns + ns,
            monotonic_ns=now.monotonic_ns + ns,
            real_ns=now.real_ns + ns,
            process_cpu_ns=now.process_cpu_ns + cpu_ns,
            run_delay_ns=None if now.run_delay_ns is None else now.run_delay_ns + run_delay_ns,
            frozen_ns=None if now.frozen_ns is None else now.frozen_ns + frozen_ns,
        )

    def suspend(self, ns: int, *, tsc_runs: bool = True) -> None:
        """Sleep for `ns`: CLOCK_MONOTONIC and RAW stand still, the TSC counts on or begins anew."""
        now = self.reading
        self.set(
            host_tsc=HostTsc((now.host_tsc + ns * TSC_HZ // NS_PER_S) & U64_MASK if tsc_runs else 0),
            real_ns=now.real_ns + ns,
            asleep_least_ns=now.asleep_least_ns + ns,
            asleep_most_ns=now.asleep_most_ns + ns,
        )

    def change_clocksource(self, name: str) -> None:
        """Choose another clocksource, as an administrator can."""
        self.set(clocksource=name)

    def mark_tsc_unstable(self) -> None:
        """What the kernel does when its watchdog has found the TSC out."""
        self.set(clocksource="hpet", clocksources=self.reading.clocksources - {"tsc"})

    def step_tsc(self, ticks: int) -> None:
        """Move the TSC by `ticks` at once."""
        self.set(host_tsc=HostTsc((self.reading.host_tsc + ticks) & U64_MASK))


def a_watch(**options: int) -> tuple[HostWatch, PlayedHost]:
    """A watch that means to look every 100 ms, and the host that it looks at."""
    host = PlayedHost()
    return HostWatch(TSC_HZ, interval_ns=INTERVAL_NS, source=host, **options), host


def kinds(watch: HostWatch) -> list[TroubleKind]:
    """What kinds of trouble the next look finds."""
    return [trouble.kind for trouble in watch.check()]


# A host in order


@pytest.mark.row("E9")
@given(
    gaps=st.lists(
        st.tuples(st.integers(0, 4 * INTERVAL_NS), st.integers(-900, 900), st.integers(0, 10**9), st.integers(0, MS))
    ),
    tsc=st.integers(0, U64_MASK),
)
def test_a_host_in_order_is_no_trouble(gaps: list[tuple[int, int, int, int]], tsc: int) -> None:
    """Gaps and rates within their limits, readings of any width and a TSC that wraps are never reported."""
    host = PlayedHost(tsc)
    watch = HostWatch(TSC_HZ, interval_ns=INTERVAL_NS, source=host)
    for ns, ppm, cpu_ns, width_ns in gaps:
        host.run(ns, cpu_ns=cpu_ns, ppm=ppm)
        host.set(width_ticks=width_ns * 3, asleep_least_ns=-width_ns, asleep_most_ns=width_ns)
        assert watch.check() == []
        assert watch.last is host.reading
        assert watch.tsc_trusted


@pytest.mark.row("E9", "E15")
def test_troubles_are_events() -> None:
    """Every kind of trouble has its kind of event, by the same word."""
    assert set(map(str, TroubleKind)) <= set(map(str, EventKind))


@pytest.mark.row("E13")
@pytest.mark.parametrize(
    "options",
    [
        {"tsc_hz": 0, "interval_ns": 1},
        {"tsc_hz": 2**64, "interval_ns": 1},
        {"tsc_hz": 1, "interval_ns": 0},
        {"tsc_hz": 1, "interval_ns": 5, "stall_ns": 5},
        {"tsc_hz": 1, "interval_ns": 1, "rate_bound_ppm": -1},
        {"tsc_hz": 1, "interval_ns": 1, "rate_bound_ppm": 10**6 + 1},
    ],
)
def test_limits_out_of_range_are_refused(options: dict[str, int]) -> None:
    """A rate, an interval, a limit or a bound that means nothing is an error."""
    with pytest.raises(RangeError, match=r"must be|it can be"):
        HostWatch(source=PlayedHost(), **options)


# The clocksource


@pytest.mark.row("E9")
def test_the_clocksource_leaves_tsc_and_comes_back() -> None:
    """Leaving tsc is told once and drops STABLE; a change among others is told; coming back gives STABLE back."""
    watch, host = a_watch()
    told = []
    for name in ("hpet", "hpet", "acpi_pm", "tsc", "tsc", "unknown"):
        host.run(INTERVAL_NS)
        host.change_clocksource(name)
        told.append([(trouble.kind, trouble.unstable) for trouble in watch.check()])
        assert watch.tsc_trusted == (name == "tsc")
    away, back = (TroubleKind.CLOCKSOURCE, True), (TroubleKind.CLOCKSOURCE, False)
    assert told == [[away], [], [away], [back], [], [away]]


@pytest.mark.row("E9")
def test_a_tsc_marked_unstable_is_never_trusted_again() -> None:
    """When the kernel stops offering tsc, both changes are told, and STABLE is off whatever the clocksource says."""
    watch, host = a_watch()
    host.run(INTERVAL_NS)
    host.mark_tsc_unstable()
    troubles = watch.check()
    assert [(each.kind, each.unstable) for each in troubles] == [
        (TroubleKind.CLOCKSOURCE, True),
        (TroubleKind.TSC_UNSTABLE, True),
    ]
    assert "acpi_pm, hpet only" in troubles[1].why
    host.change_clocksource("tsc")
    assert kinds(watch) == [TroubleKind.CLOCKSOURCE]
    assert not watch.tsc_trusted


@pytest.mark.row("E9")
def test_a_list_of_clocksources_that_cannot_be_read_says_nothing() -> None:
    """An unreadable list is not taken for a kernel that lost its tsc."""
    watch, host = a_watch()
    host.set(clocksources=frozenset())
    assert watch.check() == []
    assert watch.tsc_trusted


@pytest.mark.row("E9")
def test_a_host_that_begins_without_tsc_is_not_stable() -> None:
    """What was so before the first look is no trouble, and is known."""
    host = PlayedHost()
    host.mark_tsc_unstable()
    watch = HostWatch(TSC_HZ, interval_ns=INTERVAL_NS, source=host)
    assert watch.check() == []
    assert not watch.tsc_trusted


# Suspend


@pytest.mark.row("E9")
@pytest.mark.parametrize("tsc_runs", [True, False])
def test_a_suspend(tsc_runs: bool) -> None:
    """A suspend is told with its length, and is no stall; a TSC that began anew in it is told, too, and not trusted."""
    watch, host = a_watch()
    host.run(INTERVAL_NS // 2)
    host.suspend(3600 * NS_PER_S, tsc_runs=tsc_runs)
    host.run(INTERVAL_NS // 2)
    *tsc, suspend = watch.check()
    assert (suspend.kind, suspend.unstable) == (TroubleKind.SUSPEND, False)
    assert abs(suspend.amount_ns - 3600 * NS_PER_S) <= 100
    assert [each.kind for each in tsc] == ([] if tsc_runs else [TroubleKind.TSC_STEP])
    assert watch.tsc_trusted == tsc_runs
    host.run(INTERVAL_NS)
    assert watch.check() == []


@pytest.mark.row("E9")
def test_the_length_of_a_suspend_is_no_measure_for_the_tsc() -> None:
    """A TSC that counted for 2 s longer than the kernel's coarse clock says the host slept is no trouble."""
    watch, host = a_watch()
    host.suspend(10 * NS_PER_S)
    host.step_tsc(2 * TSC_HZ)
    assert kinds(watch) == [TroubleKind.SUSPEND]
    assert watch.tsc_trusted


@pytest.mark.row("E9")
def test_a_tsc_that_began_anew_in_a_suspend_and_is_ahead_by_now() -> None:
    """A TSC reset in a suspend shows even when it has passed its old value: the time awake alone was more."""
    host = PlayedHost(tsc=1000)
    watch = HostWatch(TSC_HZ, interval_ns=INTERVAL_NS, source=host)
    host.run(INTERVAL_NS)
    host.suspend(10 * NS_PER_S, tsc_runs=False)
    host.run(10 * MS)
    assert kinds(watch) == [TroubleKind.TSC_RATE, TroubleKind.SUSPEND]


@pytest.mark.row("E9")
def test_a_suspend_that_could_not_be_read_at_once_is_told_later() -> None:
    """A reading too wide to prove a suspend hides it until the next one, and is not taken for a TSC that jumped."""
    watch, host = a_watch()
    host.suspend(2 * NS_PER_S)
    host.run(INTERVAL_NS)
    proper = host.reading
    host.set(asleep_least_ns=proper.asleep_least_ns - 3 * NS_PER_S)
    assert watch.check() == []
    host.set(asleep_least_ns=proper.asleep_least_ns)
    host.run(INTERVAL_NS)
    (suspend,) = watch.check()
    assert (suspend.kind, abs(suspend.amount_ns - 2 * NS_PER_S) <= 100) == (TroubleKind.SUSPEND, True)


# The TSC


@pytest.mark.row("E9")
@given(back=st.integers(1, 2**62), gap_ns=st.integers(0, INTERVAL_NS), tsc=st.integers(0, U64_MASK))
def test_a_tsc_that_goes_back(back: int, gap_ns: int, tsc: int) -> None:
    """A single tick back is told, each time, with how far behind its rate the TSC is; STABLE stays off."""
    host = PlayedHost(tsc)
    watch = HostWatch(TSC_HZ, interval_ns=INTERVAL_NS, source=host)
    for _ in range(2):
        due_ticks = gap_ns * TSC_HZ // NS_PER_S
        host.run(gap_ns)
        host.step_tsc(-due_ticks - back)
        (step,) = watch.check()
        assert (step.kind, step.unstable) == (TroubleKind.TSC_STEP, True)
        assert abs(step.amount_ns + gap_ns + back * NS_PER_S // TSC_HZ) <= 2
        host.run(INTERVAL_NS)
        assert watch.check() == []
        assert not watch.tsc_trusted


@pytest.mark.row("E9")
@pytest.mark.parametrize("ppm", [1100, -1100, 500_000, -999_999])
def test_a_tsc_off_its_rate_is_told_once(ppm: int) -> None:
    """Beyond the bound it is told when it begins, not while it lasts, and again when it begins again."""
    watch, host = a_watch()
    told = []
    for rate_ppm in (0, ppm, ppm, 0, ppm):
        host.run(INTERVAL_NS, ppm=rate_ppm)
        told.append([(each.kind, each.unstable, each.amount_ns) for each in watch.check()])
    off = [(TroubleKind.TSC_RATE, True, INTERVAL_NS * ppm // 10**6)]
    assert [len(each) for each in told] == [0, 1, 0, 0, 1]
    assert abs(told[1][0][2] - off[0][2]) <= 2
    assert told[1][0][:2] == off[0][:2]
    assert not watch.tsc_trusted


@pytest.mark.row("E9")
def test_a_tsc_that_jumps_ahead_without_a_suspend() -> None:
    """A jump is told by its length, unless the readings are so wide that they could explain it."""
    watch, host = a_watch()
    host.run(INTERVAL_NS)
    host.step_tsc(TSC_HZ)
    (jump,) = watch.check()
    assert jump.kind is TroubleKind.TSC_RATE
    assert abs(jump.amount_ns - NS_PER_S) <= 1
    host.run(INTERVAL_NS)
    assert watch.check() == []
    host.step_tsc(TSC_HZ)
    host.set(width_ticks=2 * TSC_HZ)
    assert watch.check() == []


@pytest.mark.row("E9")
def test_the_rate_bound_is_the_callers() -> None:
    """With a narrow bound a small error is told, but never one that the clocks' own grain can explain."""
    off = [TroubleKind.TSC_RATE]
    for rate_bound_ppm, ppm, expected in ((0, 35, off), (20, 35, off), (40, 35, []), (0, 9, []), (0, -9, [])):
        watch, host = a_watch(rate_bound_ppm=rate_bound_ppm)
        host.run(INTERVAL_NS, ppm=ppm)
        assert kinds(watch) == expected


# Stalls

BUSY, IDLE = 8 * INTERVAL_NS, INTERVAL_NS // 1000


@pytest.mark.row("E9", "E15")
@pytest.mark.parametrize(
    ("usual_cpu_ns", "gap", "cause"),
    [
        (IDLE, {"cpu_ns": IDLE}, StallCause.HALTED),
        (BUSY, {"cpu_ns": BUSY}, StallCause.HALTED),
        (BUSY, {"cpu_ns": 10 * BUSY}, StallCause.RAN),
        (IDLE, {"cpu_ns": 10 * INTERVAL_NS}, StallCause.RAN),
        (IDLE, {"cpu_ns": INTERVAL_NS, "run_delay_ns": 8 * INTERVAL_NS}, StallCause.STARVED),
        (BUSY, {"cpu_ns": BUSY, "frozen_ns": 9 * INTERVAL_NS}, StallCause.FROZEN),
        (BUSY, {"cpu_ns": BUSY, "frozen_ns": 4 * INTERVAL_NS, "run_delay_ns": 4 * INTERVAL_NS}, StallCause.HALTED),
    ],
)
def test_stalls_and_their_causes(usual_cpu_ns: int, gap: dict[str, int], cause: StallCause) -> None:
    """A gap beyond the limit is told with its length, and its cause is what most of it was; STABLE stays."""
    watch, host = a_watch()
    host.run(INTERVAL_NS, cpu_ns=usual_cpu_ns)
    assert watch.check() == []
    host.run(10 * INTERVAL_NS, **gap)
    before = watch.last
    (stall,) = watch.check()
    assert (stall.kind, stall.amount_ns, stall.cause) == (TroubleKind.STALL, 10 * INTERVAL_NS, cause)
    assert (stall.unstable, stall.before, stall.after) == (False, before, host.reading)
    assert f"no check for {10 * INTERVAL_NS} ns" in stall.why
    assert watch.tsc_trusted


@pytest.mark.row("E9")
def test_a_kernel_that_keeps_no_records_cannot_tell_causes_apart() -> None:
    """Without run delay and frozen time, a starved and a frozen process read as halted."""
    watch, host = a_watch()
    host.set(run_delay_ns=None, frozen_ns=None)
    assert watch.check() == []
    host.run(10 * INTERVAL_NS)
    assert [trouble.cause for trouble in watch.check()] == [StallCause.HALTED]


@pytest.mark.row("E9")
def test_the_limit_is_the_callers() -> None:
    """A gap of the limit is none, one ns more is a stall; where no look was due, no gap is."""
    watch, host = a_watch(stall_ns=INTERVAL_NS + 5)
    host.run(INTERVAL_NS + 5)
    assert watch.check() == []
    host.run(INTERVAL_NS + 6)
    assert kinds(watch) == [TroubleKind.STALL]
    host.run(100 * INTERVAL_NS)
    assert watch.check(on_schedule=False) == []
    host.run(INTERVAL_NS)
    assert watch.check() == []


FAULTS: dict[TroubleKind, Callable[[PlayedHost], None]] = {
    TroubleKind.SUSPEND: lambda host: host.suspend(NS_PER_S),
    TroubleKind.STALL: lambda host: host.run(5 * INTERVAL_NS),
    TroubleKind.TSC_STEP: lambda host: host.step_tsc(-TSC_HZ),
    TroubleKind.CLOCKSOURCE: lambda host: host.change_clocksource(
        "hpet" if host.reading.clocksource == "tsc" else "tsc"
    ),
}


@pytest.mark.row("E9")
@given(history=st.lists(st.none() | st.sampled_from(sorted(FAULTS))))
def test_any_history_of_faults_is_told_as_it_was(history: list[TroubleKind | None]) -> None:
    """Every look tells the fault that came before it and no other, in any order and number."""
    watch, host = a_watch()
    for fault in history:
        host.run(INTERVAL_NS // 10)
        if fault is not None:
            FAULTS[fault](host)
        assert kinds(watch) == ([] if fault is None else [fault])
    assert watch.tsc_trusted == (TroubleKind.TSC_STEP not in history and host.reading.clocksource == "tsc")
