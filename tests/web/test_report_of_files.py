"""Reports of files that real commands wrote, and of a million events, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pvclock.meter.report.html import document
from pvclock.meter.report.model import Intervals, Line, Mark, Part, Plot, Report, Section, Standing, Table
from pvclock.meter.report.sources import read
from pvclock.meter.report.svg import ready_to_draw
from pvclock.meter.report.thinning import KINDS_MAX
from pvclock.meter.report.watch_log import VM_EVENTS
from pvclock.timekeeping.events import EventKind
from tests.report_examples import AHEAD, TIME
from tests.web.chromium import Chromium, Page, running_chromium

pytestmark = [pytest.mark.row("E10"), pytest.mark.web]

FILES: Final = sorted((Path(__file__).parents[1] / "reports").iterdir())
KINDS: Final = (
    *("disagreement", "unknown step", "pages found", "page lost", "step", "pause", "stall", "flags", "event"),
    *("host", "end", "settling"),
    *sorted(VM_EVENTS),
    *(it.replace("_", " ") for it in EventKind if it not in VM_EVENTS | {"pause", "stall"}),
)
"""Of the marks that reports make."""
EVENTS: Final = 1_000_000
CRASHED_AT: Final = 777_000
OUTSIDE: Final = """[...document.querySelectorAll('main svg text')].filter(text => {
    const svg = text.farthestViewportElement, box = text.getBoundingClientRect(), all = svg.getBoundingClientRect();
    return box.left < all.left - 0.5 || box.right > all.right + 0.5
        || box.top < all.top - 0.5 || box.bottom > all.bottom + 0.5;
}).map(it => it.textContent)"""
TOO_WIDE: Final = (
    "[...document.querySelectorAll('.scroll')].map(it => it.scrollWidth - it.clientWidth).filter(it => it > 0)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    """One browser for all tests of this file."""
    with running_chromium() as browser:
        yield browser


def written(report: Report, folder: Path) -> Path:
    """Return a file with a report's page."""
    file = folder / "report.html"
    file.write_text(document(report), encoding="utf-8")
    return file


def counted(page: Page, selector: str) -> int:
    """Return how many elements a page has."""
    count: int = page.evaluate(f"document.querySelectorAll('{selector}').length")
    return count


def check_layout(page: Page) -> None:
    """See that on a desk and on a phone no text is cut, and nothing but a phone's table is wider than its box."""
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(TOO_WIDE) == []
    page.resize(400, 800)
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    charts = "[...document.querySelectorAll('.chart')].map(it => it.scrollWidth - it.clientWidth)"
    assert set(page.evaluate(charts)) <= {0}


def check_peace(page: Page) -> None:
    """See that a page complained of nothing and asked for nothing."""
    assert page.complaints == []
    assert [it.rpartition("/")[2] for it in page.requests] == ["report.html"]


def check_parts(page: Page, parts: list[Part]) -> None:
    """See that all lines, marks, bars and rows of a report are in its page."""
    plots = [ready_to_draw(it) for it in parts if isinstance(it, Plot)]
    assert counted(page, ".plot .chart .line") == sum(len(it.lines) for it in plots)
    assert counted(page, ".plot .chart .mark") == sum(len(it.marks) for it in plots)
    assert counted(page, ".interval, .unknown") == sum(len(it.rows) for it in parts if isinstance(it, Intervals))
    assert counted(page, "tbody tr") == sum(len(it.rows) for it in parts if isinstance(it, Table))
    drawn = page.evaluate("[...document.querySelectorAll('.plot .chart .line')].map(it => it.getAttribute('d').length)")
    assert all(drawn)


@pytest.mark.parametrize("file", FILES, ids=lambda it: it.name)
def test_a_real_session(browser: Chromium, tmp_path: Path, file: Path) -> None:
    """A watch, a drift, cross-checks, a host's doctor and a guest's: whole, quiet, and within the page."""
    report = read([str(file)], lambda *_: None)
    parts = [part for section in report.sections for part in section.parts]
    assert parts
    with browser.opened(written(report, tmp_path), 1280, 900) as page:
        check_parts(page, parts)
        check_layout(page)
        check_peace(page)


def test_the_marks_of_a_real_watch(browser: Chromium, tmp_path: Path) -> None:
    """What the file has happen is in the rows of marks, and its readings make a line."""
    (file,) = (it for it in FILES if it.name == "watch.jsonl")
    records = list(map(json.loads, file.read_text().splitlines()))
    happened = {it.get("kind") for it in records} & {"step", "stall"} | {"pause"}
    with browser.opened(written(read([str(file)], lambda *_: None), tmp_path), 1280, 900) as page:
        kinds = page.evaluate(
            "[...document.querySelector('.plot').querySelectorAll('.kind')].map(it => it.textContent)"
        )
        assert happened <= set(kinds)
        assert counted(page, ".plot .chart .dot") >= len([it for it in records if it.get("kind") == "reading"]) / 2


def test_every_kind_of_mark_is_told_in_full(browser: Chromium, tmp_path: Path) -> None:
    """The row of each kind that a watch, a drift or a log can have is named on a desk and on a phone."""
    line = Line("it", [0, 1], [0, 1])
    plots = tuple(
        Plot("it", TIME, AHEAD, (line,), tuple(Mark(0.5, it, "it") for it in kinds))
        for kinds in (KINDS[begin : begin + KINDS_MAX] for begin in range(0, len(KINDS), KINDS_MAX))
    )
    section = Section("it", "it", "it", Standing.PLAIN, (), plots)
    with browser.opened(written(Report("it", "now", "1", (section,)), tmp_path), 1280, 900) as page:
        told = page.evaluate("[...document.querySelectorAll('.kind')].map(it => it.textContent)")
        assert tuple(told) == KINDS
        check_layout(page)
        check_peace(page)


def event_lines(count: int) -> Iterator[str]:
    """Give the events of a clock whose rate is corrected each ms, put ahead by 1 us each s; its guest crashes once."""
    event: dict[str, Any] = {"cause": "vmm", "why": "it was asked for", "policy": None, "provider": "KVM"}
    event |= {"tsc_hz": 1_000_000_000, "raw_ns": None, "real_ns": None, "rate_before": [1, 1]}
    rest = json.dumps(event)[1:]
    for number in range(1, count + 1):
        before = number * 1_000_000 + (number - 1) // 1000 * 1000
        after = number * 1_000_000 + number // 1000 * 1000
        kind = "crash" if number == CRASHED_AT + 1 else "rate" if before == after else "offset"
        rate = f'"rate_after":[{1_000_000_000 + number % 7},1000000000]'
        guest = f'"guest_ns_before":[{before},1],"guest_ns_after":[{after},1],"jump_ns":[{after - before},1]'
        yield f'{{"sequence":{number},"kind":"{kind}","host_tsc":{number}000000,{guest},{rate},{rest}\n'


def test_a_million_events(browser: Chromium, tmp_path: Path) -> None:
    """The log of 17 minutes of a busy clock: a page of less than a megabyte with its lines, steps and the one crash."""
    log = tmp_path / "events.jsonl"
    with log.open("w", encoding="utf-8") as file:
        file.writelines(event_lines(EVENTS))
    report = read([str(log)], lambda *_: None)
    page_file = written(report, tmp_path)
    assert page_file.stat().st_size < 1_000_000
    with browser.opened(page_file, 1280, 900) as page:
        assert page.evaluate("document.querySelector('.badge').textContent") == "\u2717 bad"
        check_parts(page, list(report.sections[0].parts))
        marks = page.evaluate("document.querySelector('.plot desc').textContent")
        assert marks.endswith("Marks: offset 1,000, crash 1.")
        assert counted(page, ".plot .chart .mark.bad") == len([it for it in report.sections[0].parts if _has_marks(it)])
        check_layout(page)
        check_peace(page)


def _has_marks(part: Part) -> bool:
    return isinstance(part, Plot) and bool(part.marks)
