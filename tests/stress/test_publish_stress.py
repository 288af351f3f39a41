"""Publishing under fire: readers race a writer that changes the clock's rate at every publish.

The program is tests/native/publish_stress.c.  The product must pass it, and publishers with one defect each must not.
"""

from typing import Any, NamedTuple

import pytest

from tests.stress.racing import Report, Stress, built, needs_two_cpus, race, runs

pytestmark = pytest.mark.stress

# What no guest may see, and what would let it: readings on the wrong side of a break point.
FAULTS = ("backward_own", "backward_cross", "wild", "torn", "late_old", "early_new")

RACED_LEAST = {"reads": 1000, "publishes": 1000, "generations": 1}


class Defect(NamedTuple):
    """A broken publisher, the counter that gives it away, and the reader and pages that it takes."""

    publisher: str
    fault: str
    reader: str = "linux"
    pages: int = 8
    skew_ticks: int = 0


DEFECTS = (
    Defect("no_odd_phase", "torn"),
    Defect("no_odd_phase", "backward_own"),
    Defect("bare_rdtsc", "late_old"),
    Defect("bare_rdtsc", "backward_own"),
    Defect("no_margin", "late_old", reader="unfenced", pages=1),
    Defect("no_margin", "backward_own", reader="unfenced", pages=1),
    # An even version takes about 100 ticks to reach the other CPU here, so a TSC that is behind by less is hidden.
    Defect("timestamp_now", "wild", pages=1, skew_ticks=512),
    Defect("timestamp_now", "beyond_bound"),
    Defect("one_page_at_a_time", "backward_own"),
)


@pytest.fixture(scope="session")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Stress:
    """Return a function that runs the program, with its options as keywords, and returns its report."""
    return built("publish_stress", tmp_path_factory.mktemp("publish_stress"))


def faults(reports: list[Report]) -> Report:
    """Return the counters that are not 0."""
    return {name: report[name] for report in reports for name in FAULTS if report[name]}


@pytest.mark.row("K-08", "E9")
@pytest.mark.parametrize("pages", [1, 8, 64])
@pytest.mark.parametrize("reader", ["linux", "unfenced"])
def test_readings_are_whole_and_never_go_back(stress: Stress, reader: str, pages: int) -> None:
    """No reading is torn, goes back on any vCPU, or is on the wrong side of a break point."""
    assert not faults(race(stress, RACED_LEAST, reader=reader, pages=pages))


@pytest.mark.row("K-08", "E9")
@pytest.mark.parametrize("readers", [1, 4])
def test_pages_that_share_no_cache_line_or_page(stress: Stress, readers: int) -> None:
    """It is the same with every clock in a memory page of its own, and with more threads than CPUs."""
    assert not faults(race(stress, RACED_LEAST, pages=64, stride=4096, readers=readers))


@pytest.mark.row("E9")
def test_one_tick_of_skew_is_not_seen(stress: Stress) -> None:
    """A vCPU whose TSC is one tick behind reads no centuries and turns nobody's clock back."""
    assert not faults(race(stress, RACED_LEAST, skew_ticks=1))


@pytest.mark.row("E9")
@pytest.mark.parametrize("start_ns", [0, 5_000_000_000])
def test_skew_within_the_backdate_never_underflows(stress: Stress, start_ns: int) -> None:
    """Where TSCs are so far apart that order is lost, still no reading underflows, on a clock of any age."""
    assert not any(report["wild"] for report in race(stress, RACED_LEAST, skew_ticks=512, pages=1, start_ns=start_ns))


@pytest.mark.row("E11", "E9")
@pytest.mark.parametrize("start_ns", [0, 5_000_000_000])
def test_lines_meet_at_the_break_point(stress: Stress, start_ns: int) -> None:
    """At every break point the new line shows what the old one does, or 1 ns more."""
    reports = race(stress, RACED_LEAST, start_ns=start_ns, readers=1)
    assert not faults(reports)
    assert min(report["least_step_ns"] for report in reports) == 0
    assert max(report["most_step_ns"] for report in reports) == 1


@pytest.mark.row("E11")
@pytest.mark.parametrize("start_ns", [0, 5_000_000_000])
def test_pages_keep_to_the_exact_timeline(stress: Stress, start_ns: int) -> None:
    """However many anchors: a page is within 2 ns, the ticks that its shift cuts and mul's quantum of the timeline."""
    for report in race(stress, RACED_LEAST, start_ns=start_ns, readers=1):
        assert not report["beyond_bound"], report


@pytest.mark.row("K-08", "E9")
@needs_two_cpus
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: f"{defect.publisher}-{defect.fault}")
def test_a_broken_publisher_is_noticed(stress: Stress, defect: Defect) -> None:
    """The test has teeth: each rule of the protocol, left out alone, is noticed."""
    assert is_noticed(stress, **defect._asdict())


def is_noticed(stress: Stress, fault: str, **options: Any) -> bool:  # noqa: ANN401  # the program's
    """Does any of some short races count `fault`?"""
    return any(stress(**options, readers=1, seconds=0.5)[fault] for _ in runs())


class KindDefect(NamedTuple):
    """A second kind of page that is broken, the counter that gives it away, and the pages that it takes."""

    sequence_kind: str
    fault: str
    pages: int
    sequence_pages: int
    stride: int


# Marked late, pages that are written after many others are still trusted beyond the margin.
KIND_DEFECTS = (
    KindDefect("busy_after_a", "late_old", 256, 256, 4096),
    KindDefect("busy_after_a", "backward_own", 256, 256, 4096),
    KindDefect("released_before_b", "early_new", 8, 2, 64),
    KindDefect("released_before_b", "backward_own", 8, 2, 64),
)


@pytest.mark.row("K-08", "E9")
@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize(("pages", "sequence_pages", "stride"), [(8, 2, 64), (1, 8, 4096), (256, 256, 4096)])
def test_pages_of_two_kinds_change_at_one_break_point(
    stress: Stress, pages: int, sequence_pages: int, stride: int, readers: int
) -> None:
    """Beside pages under a sequence, no reading of one kind is older than an ended reading of the other."""
    assert not faults(
        race(stress, RACED_LEAST, pages=pages, sequence_pages=sequence_pages, stride=stride, readers=readers)
    )


@pytest.mark.row("K-08", "E9")
@needs_two_cpus
@pytest.mark.parametrize("defect", KIND_DEFECTS, ids=lambda defect: f"{defect.sequence_kind}-{defect.fault}")
def test_a_broken_kind_is_noticed(stress: Stress, defect: KindDefect) -> None:
    """A kind whose busy mark comes after A, or whose release comes before B, is noticed."""
    assert is_noticed(stress, **defect._asdict())
