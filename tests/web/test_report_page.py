"""The report's page in a real browser: what is drawn, hover, zoom, dark, print, narrow, and texts that are hostile."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pvclock.meter.report.html import document
from pvclock.meter.report.model import Axis, Line, Mark, Plot, Report, Standing, Unit
from pvclock.meter.report.svg import LAYOUT, standalone
from tests.report_examples import AHEAD, TIME, deviations, example, hostile, of_one_plot, rates, watched
from tests.web.chromium import Chromium, Page, running_chromium

pytestmark = [pytest.mark.row("E10"), pytest.mark.web]

DRAWINGS = "[...document.querySelectorAll('.drawing')].map(it => it.outerHTML)"
RIGHT = LAYOUT.width - LAYOUT.right


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    """One browser for all tests of this file."""
    with running_chromium() as browser:
        yield browser


@pytest.fixture
def example_page(browser: Chromium, tmp_path: Path) -> Iterator[Page]:
    """The example with all kinds of parts, open."""
    with opened(browser, tmp_path, example()) as page:
        yield page


def opened(browser: Chromium, folder: Path, report: Report, width: int = 1000, height: int = 900) -> Any:  # noqa: ANN401
    """Return a report written to a file and open in a tab."""
    file = folder / "report.html"
    file.write_text(document(report), encoding="utf-8")
    return browser.opened(file, width, height)


def area(page: Page, number: int = 0) -> tuple[float, float, float, float]:
    """Return where the lines of a plot are in the window, scrolled to: left, top, width, height."""
    page.evaluate(f"document.querySelectorAll('figure.plot')[{number}].scrollIntoView()")
    page.settle()
    script = f"""(() => {{
        const svg = document.querySelectorAll('figure.plot .chart > svg')[{number}], box = svg.getBoundingClientRect();
        const size = box.width / svg.viewBox.baseVal.width;
        const all = svg.querySelector('.pointer'), lines = svg.querySelector('clipPath rect');
        const of = [[all, 'x'], [all, 'y'], [all, 'width'], [lines, 'height']];
        const [x, y, width, height] = of.map(([element, name]) => element.getAttribute(name) * size);
        return [box.left + x, box.top + y, width, height];
    }})()"""
    left, top, width, height = page.evaluate(script)
    return left, top, width, height


def box_of(page: Page, selector: str) -> tuple[float, float, float, float]:
    """Return where an element is in the window: left, top, width, height."""
    box = f"document.querySelector('{selector}').getBoundingClientRect()"
    x, y, width, height = page.evaluate(f"(({{x, y, width, height}}) => [x, y, width, height])({box})")
    return x, y, width, height


def x_labels(page: Page, number: int = 0) -> list[str]:
    """Return the labels of a plot's x axis."""
    figure = f"document.querySelectorAll('figure.plot')[{number}]"
    labels: list[str] = page.evaluate(f"[...{figure}.querySelectorAll('.tick.x')].map(it => it.textContent)")
    return labels


def hover(page: Page, part: float, height: float = 0.5, number: int = 0) -> list[str]:
    """Point at a part of a plot's width and height, and return the lines of the tooltip."""
    left, top, wide, high = area(page, number)
    page.mouse("mouseMoved", left + part * wide, top + height * high)
    lines: list[str] = page.evaluate(
        "[...document.querySelectorAll('.tooltip:not([hidden]) p')].map(it => it.innerText)"
    )
    return [" ".join(it.split()).replace("\u2212", "-") for it in lines]


def time_in(tooltip: list[str]) -> float:
    """Return the time that a tooltip tells, in s."""
    return float(tooltip[0].removeprefix("time: ").removesuffix(" s"))


def test_it_opens_without_a_complaint_and_asks_for_nothing(example_page: Page) -> None:
    """No error, no warning, no violation of its policy, no request but for the file itself."""
    assert example_page.complaints == []
    assert [it.rpartition("/")[2] for it in example_page.requests] == ["report.html"]


def test_what_is_drawn(example_page: Page) -> None:
    """Each line, band and mark has an outline with a place on the screen, in the area of its plot."""
    looks = ["line", "band", "mark", "dot", "interval"]
    count = "document.querySelectorAll('.chart .{0}, .bar .{0}').length"
    counts = {it: example_page.evaluate(count.format(it)) for it in looks}
    assert counts == {"line": 6, "band": 3, "mark": 4 + 2, "dot": 60 + 36, "interval": 4}
    left, top, width, height = area(example_page)
    box = box_of(example_page, ".chart .line")
    assert (box[0], box[2]) == pytest.approx((left, width), abs=2)
    assert top < box[1] < box[1] + box[3] < top + height


def test_it_is_complete_without_its_program(browser: Chromium, tmp_path: Path) -> None:
    """With scripts switched off the same lines, marks and labels are there, and no buttons."""
    with opened(browser, tmp_path, example()) as page:
        before = page.evaluate(DRAWINGS)
        page.ask("Emulation.setScriptExecutionDisabled", value=True)
        page.reload()
        markup = page.ask("Runtime.evaluate", expression="document.documentElement.outerHTML")["result"]["value"]
    assert before
    assert all(it in markup for it in before)
    assert 'class="tools"' not in markup


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_whole_range_drawn_again_is_the_same_drawing(example_page: Page, number: int) -> None:
    """After zooming, panning and going back each plot is, to the letter, what Python drew."""
    before = example_page.evaluate(DRAWINGS)
    area(example_page, number)
    example_page.evaluate(f"document.querySelectorAll('figure.plot .chart > svg')[{number}].focus()")
    for key in ("+", "+", "ArrowRight", "-"):
        example_page.press(key)
    assert example_page.evaluate(DRAWINGS)[number] != before[number]
    example_page.press("Escape")
    assert example_page.evaluate(DRAWINGS) == before


def strange_plots() -> list[Plot]:
    """Plots of numbers that are hard to draw."""
    nan, inf = math.nan, math.inf
    log_y = Axis("log", Unit.NS, is_log=True)
    numbers = [
        [0.0],
        [nan, nan],
        [5.0, 5.0, 5.0],
        [-1e9 - 3, -1e9 + 4, -1e9],
        [1e300, -1e300, 0],
        [1e-300, 2e-300, 0],
        [inf, 1, -inf, 2],
        [1 + 3e-9, 1 - 3e-9],
        [1e17, 5e17, 3e17],
        [0.1, 7, 123456, nan, 0, -3, 99],
    ]
    lines = [
        Line("it", [it * 7000.0 for it in range(len(y))], y, [it - 1 for it in y], [it + 1 for it in y])
        for y in numbers
    ]
    marks = (
        Mark(0.0, "a", "it"),
        Mark(100.0, "b", "it", Standing.BAD, until=9000.0),
        Mark(3.0, "a", "", Standing.GOOD),
    )
    steps = [it._replace(is_stepped=True) for it in lines]
    axes = [
        (TIME, AHEAD),
        (TIME, log_y),
        (Axis("log", Unit.S, is_log=True), Axis("rate", Unit.RATE)),
        (TIME, Axis("", Unit.PPB)),
    ]
    return [Plot("it", x, y, (line,), marks) for (x, y), line in product(axes, [*lines, *steps])]


def test_strange_numbers_are_drawn_by_both_alike(browser: Chromium, tmp_path: Path) -> None:
    """Axes, gaps, infinities and single points: what JavaScript draws of the whole range is what Python drew."""
    section = example().sections[0]._replace(parts=tuple(strange_plots()))
    with opened(browser, tmp_path, Report("it", "now", "1", (section,))) as page:
        before = page.evaluate(DRAWINGS)
        page.evaluate("document.querySelectorAll('figure.plot .tools button:first-child').forEach(it => it.click())")
        zoomed = page.evaluate(DRAWINGS)
        page.evaluate("document.querySelectorAll('figure.plot .tools button:last-child').forEach(it => it.click())")
        after = page.evaluate(DRAWINGS)
        assert page.complaints == []
    assert [number for number, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]] == []
    assert sum(one != other for one, other in zip(before, zoomed, strict=True)) > len(before) / 2
    assert not re.search("NaN|Infinity|undefined", "".join(zoomed))


def test_hover_tells_the_nearest_point_of_each_line(example_page: Page) -> None:
    """The tooltip has the time, each line's value there with its band, and `unknown` in a gap."""
    lines = watched().lines
    at = 300
    shown = hover(example_page, lines[0].x[at] / 600)
    value, low, high = lines[0].y[at], lines[0].low[at], lines[0].high[at]
    assert shown[0] == f"time: {lines[0].x[at]:.0f} s"
    assert shown[1] == f"vCPU 0 {value:.1f} ns ({low:.1f} ns to {high:.1f} ns)"
    assert hover(example_page, 315 / 600)[2] == "vCPU 1 unknown"
    assert example_page.evaluate("document.querySelectorAll('.over .dot').length") == 1


def test_hover_after_a_long_pause(browser: Chromium, tmp_path: Path) -> None:
    """A guest that was paused for ten hours: the part after it has its ns, and the 23 that they may be off by."""
    y = [0.0] * 10 + [-3.6e13 + it for it in range(40)]
    line = Line("it", list(range(50)), y, [it - 23 for it in y], [it + 23 for it in y])
    with opened(browser, tmp_path, of_one_plot(Plot("it", TIME, AHEAD, (line,)))) as page:
        left, top, width, height = area(page)
        page.drag((left + 0.4 * width, top + 0.3 * height), (left + 0.9 * width, top + 0.6 * height))
        said = "it -35\u202f999.9999999780 s (-36\u202f000.0000000010 s to -35\u202f999.9999999550 s)"
        assert hover(page, 0.5)[1] == said.replace("\u202f", " ")


def test_hover_tells_marks(example_page: Page) -> None:
    """Near a mark, and all along one that lasts, the tooltip says what happened."""
    assert "step: bad: vCPU 1 stepped by +38 ns, within 2 ns" in hover(example_page, 120 / 600)
    assert "pause: STOP, RESUME 30 s later" in hover(example_page, 225 / 600)
    assert not any("pause" in it or "step" in it for it in hover(example_page, 0.7))


def test_the_tooltip_stays_within_the_window(browser: Chromium, tmp_path: Path) -> None:
    """In each corner of a plot, on a wide and on a narrow page."""
    with opened(browser, tmp_path, of_one_plot(watched())) as page:
        for width, part, height in product((1000, 400), (0.01, 0.99), (0.01, 0.99)):
            page.resize(width, 600)
            assert hover(page, part, height)
            left, top, wide, high = box_of(page, ".tooltip")
            assert 0 <= left <= left + wide <= width
            assert 0 <= top <= top + high <= 600


def test_it_goes_when_the_pointer_goes(example_page: Page) -> None:
    """Outside the plot there is no tooltip and no crosshair."""
    assert hover(example_page, 0.5)
    example_page.mouse("mouseMoved", 5, 5)
    assert example_page.evaluate(
        "[document.querySelector('.tooltip').hidden, document.querySelectorAll('.crosshair').length]"
    ) == [True, 0]


def test_dragging_zooms_to_what_was_dragged_over(example_page: Page) -> None:
    """From 120 s to 180 s: these become the ends of the axis, and the y axis fits what is left."""
    left, top, width, height = area(example_page)
    example_page.drag((left + 0.2 * width, top + 0.3 * height), (left + 0.3 * width, top + 0.6 * height))
    labels = x_labels(example_page)
    assert (labels[0], labels[-1]) == ("120", "180")
    shown = hover(example_page, 0.5)
    assert shown[0].startswith("time: 150")
    box = example_page.evaluate("document.querySelector('.drawing .line').getBBox().width")
    assert box == pytest.approx(RIGHT - LAYOUT.left, abs=1)
    left, top, width, height = area(example_page)
    example_page.click(left + width / 2, top + height / 2, count=2)
    assert x_labels(example_page)[-1] == "10"


def test_the_wheel_zooms_with_ctrl_alone(example_page: Page) -> None:
    """The place under the pointer stays where it is; without Ctrl the page scrolls as ever."""
    left, top, width, height = area(example_page)
    place = left + width / 4, top + height / 2
    before = time_in(hover(example_page, 0.25))
    example_page.mouse("mouseWheel", *place, deltaX=0, deltaY=-100)
    assert x_labels(example_page)[-1] == "10"
    area(example_page)
    example_page.mouse("mouseWheel", *place, deltaX=0, deltaY=-100, modifiers=2)
    assert x_labels(example_page)[-1] != "10"
    assert time_in(hover(example_page, 0.25)) == pytest.approx(before, abs=1)


def test_keys_zoom_and_pan(example_page: Page) -> None:
    """+ and - zoom, the arrows move what is shown and stop at the ends, 0 shows all, and Shift moves the crosshair."""
    area(example_page)
    example_page.evaluate("document.querySelector('figure.plot .chart > svg').focus()")
    example_page.press("+")
    middle = x_labels(example_page)
    example_page.press("ArrowRight")
    assert x_labels(example_page) != middle
    for _ in range(20):
        example_page.press("ArrowRight")
    assert x_labels(example_page)[-1] == "10"
    example_page.press("0")
    assert x_labels(example_page)[0] == "0"
    example_page.press("ArrowRight", shift=True)
    assert example_page.evaluate("document.querySelector('.tooltip').innerText").startswith("time: 306 s")


def test_buttons_zoom(example_page: Page) -> None:
    """Each plot has its buttons, which the keyboard reaches; those that have nothing to do are disabled."""
    script = (
        "[...document.querySelectorAll('figure.plot .tools')].map(it => [...it.children].map(each => each.disabled))"
    )
    assert example_page.evaluate(script) == [[False, True, True]] * 3
    example_page.evaluate("document.querySelector('.tools button').click()")
    assert example_page.evaluate(script)[0] == [False, False, False]
    for _ in range(40):
        example_page.evaluate("document.querySelector('.tools button').click()")
    assert len(set(x_labels(example_page))) >= 2
    example_page.evaluate("document.querySelectorAll('.tools button')[2].click()")
    assert x_labels(example_page)[-1] == "10"
    assert example_page.complaints == []


def test_touch(browser: Chromium, tmp_path: Path) -> None:
    """A tap shows what is there, and a tap elsewhere hides it."""
    with opened(browser, tmp_path, of_one_plot(watched()), 400, 800) as page:
        page.touch()
        left, top, width, height = area(page)
        page.tap(left + width / 2, top + height / 2)
        assert page.evaluate("document.querySelector('.tooltip').innerText").startswith("time: 300 s")
        page.tap(left + width / 2, top + height + 120)
        assert page.evaluate("document.querySelector('.tooltip').hidden")


def test_a_narrow_page(example_page: Page) -> None:
    """At 400 pixels nothing is wider than the page, plots have labels of full size, and tables scroll by themselves."""
    example_page.resize(400, 800)
    assert example_page.evaluate("document.documentElement.scrollWidth") == 400
    size = "it => it.getBoundingClientRect().width / it.viewBox.baseVal.width"
    sizes = example_page.evaluate(f"[...document.querySelectorAll('figure.plot .chart > svg')].map({size})")
    assert sizes == pytest.approx([1, 1, 1], abs=0.01)
    assert example_page.evaluate("(it => it.scrollWidth > it.clientWidth)(document.querySelector('.scroll'))")
    example_page.resize(1000, 900)
    assert example_page.evaluate("document.querySelector('.chart > svg').viewBox.baseVal.width") == LAYOUT.width


Colour = tuple[int, int, int]


def pixels_of(png: bytes) -> list[list[Colour]]:
    """Return the pixels of an 8-bit RGB or RGBA picture, row by row."""
    place, data, width, depth = 8, b"", 0, 3
    while place < len(png):
        (length,), kind = struct.unpack(">I", png[place : place + 4]), png[place + 4 : place + 8]
        body = png[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            width, depth = struct.unpack(">I", body[:4])[0], 4 if body[9] == 6 else 3
        data += body if kind == b"IDAT" else b""
        place += 12 + length
    raw, stride = zlib.decompress(data), width * depth
    rows, before = [], bytearray(stride)
    for begin in range(0, len(raw), stride + 1):
        before = unfiltered(raw[begin], bytearray(raw[begin + 1 : begin + 1 + stride]), before, depth)
        rows.append([(before[it], before[it + 1], before[it + 2]) for it in range(0, stride, depth)])
    return rows


def unfiltered(kind: int, row: bytearray, above: bytearray, depth: int) -> bytearray:
    """Return a row of a PNG from what its filter left of it."""
    for it in range(len(row)):
        left = row[it - depth] if it >= depth else 0
        corner = above[it - depth] if it >= depth else 0
        up = above[it]
        nearest = min((left, up, corner), key=lambda each: abs(left + up - corner - each))
        row[it] = (row[it] + (0, left, up, (left + up) // 2, nearest)[kind]) & 0xFF
    return row


def colours_of(page: Page) -> set[Colour]:
    """Return the colours of the window's pixels."""
    return {it for row in pixels_of(page.screenshot(whole=False)) for it in row}


def hex_colour(text: str) -> Colour:
    """Return a colour from its six digits."""
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


@pytest.mark.parametrize(
    ("scheme", "media", "paper", "line"),
    [
        ("light", "screen", "#ffffff", "#0072b2"),
        ("dark", "screen", "#14171b", "#56b4e9"),
        ("light", "print", "#ffffff", "#0072b2"),
        ("dark", "print", "#ffffff", "#0072b2"),
    ],
)
def test_light_dark_and_print(
    browser: Chromium, tmp_path: Path, scheme: str, media: str, paper: str, line: str
) -> None:
    """The paper and the lines are as the scheme has them; paper is always white, and has no buttons."""
    with opened(browser, tmp_path, of_one_plot(watched(points=40)), 420, 300) as page:
        area(page)
        page.emulate(scheme, media)
        pixels = pixels_of(page.screenshot(whole=False))
        tools = page.evaluate("getComputedStyle(document.querySelector('.tools')).display")
    assert pixels[-1][2] == hex_colour(paper)
    assert hex_colour(line) in {it for row in pixels for it in row}
    assert (tools == "none") == (media == "print")


def test_paper_gets_the_whole_range(example_page: Page) -> None:
    """A plot that is zoomed is printed whole, on no more pages than it needs, and is zoomed as before afterwards."""
    area(example_page)
    example_page.evaluate("document.querySelector('.tools button').click()")
    zoomed = example_page.evaluate(DRAWINGS)
    example_page.evaluate("addEventListener('beforeprint', () => { window.printed = " + DRAWINGS + " })")
    paper = example_page.pdf()
    assert example_page.evaluate("window.printed[0]") != zoomed[0]
    assert example_page.evaluate(DRAWINGS) == zoomed
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", paper)) <= 5


def test_hostile_texts_do_nothing(browser: Chromium, tmp_path: Path) -> None:
    """No text of a report runs, loads or changes anything, in the page or in its tooltips; none makes it wider."""
    with opened(browser, tmp_path, hostile()) as page:
        assert page.evaluate("document.title").startswith("</script>")
        assert len(hover(page, 0.4)) >= 2
        page.evaluate("document.querySelectorAll('.tools button').forEach(it => it.click())")
        assert page.complaints == []
        assert page.dialogs == 0
        assert len(page.requests) == 1
        assert page.evaluate("document.images.length + document.querySelectorAll('script').length") == 4
        assert page.evaluate("document.documentElement.scrollWidth") == 1000


def test_what_a_text_would_run_is_refused(browser: Chromium, tmp_path: Path) -> None:
    """Were markup to come through all the same, the page's own policy would stop it, and be heard."""
    file = tmp_path / "report.html"
    taken = (
        "<script>document.title='taken'</script><img src=x.png onerror=\"document.title='taken'\"><style>h1{}</style>"
    )
    file.write_text(document(example()).replace("</main>", f"{taken}</main>"), encoding="utf-8")
    with browser.opened(file) as page:
        assert page.evaluate("document.title") == "Clocks of vm1"
        assert len(page.complaints) >= 3


def test_a_million_points(browser: Chromium, tmp_path: Path) -> None:
    """A line of 10^6 points with bands, and as many marks, is a page of less than a megabyte that hovers and zooms."""
    count = 1_000_000
    x = [it / 1000 for it in range(count)]
    y = [math.sin(it / 1e5) * 100 + it % 7 for it in range(count)]
    y[654_321] = 500.0
    line = Line("engine", x, y, [it - 20 for it in y], [it + 20 for it in y])
    marks = tuple(Mark(x[it], "step", f"step {it}", size=float(it == 777_000)) for it in range(0, count, 10))
    report = of_one_plot(Plot("A long one", TIME, AHEAD, (line,), marks))
    assert len(document(report)) < 1_000_000
    with opened(browser, tmp_path, report) as page:
        before = page.evaluate(DRAWINGS)
        assert hover(page, 0.654321)[1].startswith("engine 500 ns")
        assert any("step 777000" in it for it in hover(page, 0.777))
        page.evaluate("document.querySelector('.tools button').click()")
        page.evaluate("document.querySelectorAll('.tools button')[2].click()")
        assert page.evaluate(DRAWINGS) == before
        assert page.complaints == []


@pytest.mark.parametrize("plot", [watched(), rates(), deviations()], ids=lambda it: it.title)
def test_a_file_of_its_own(browser: Chromium, tmp_path: Path, plot: Plot) -> None:
    """A stand-alone SVG opens by itself, in light and dark, without a request."""
    file = tmp_path / "plot.svg"
    file.write_text(standalone(plot), encoding="utf-8")
    with browser.opened(file, 620, 130) as page:
        light = colours_of(page)
        page.emulate("dark")
        dark = colours_of(page)
        assert page.complaints == []
        assert len(page.requests) == 1
    assert {hex_colour("#ffffff"), hex_colour("#1b1f24")} <= light
    assert {hex_colour("#14171b"), hex_colour("#e6e9ed")} <= dark


def test_a_browser_leaves_no_process(tmp_path: Path) -> None:
    """Closed, a browser has ended with all that it started."""
    with running_chromium() as browser, opened(browser, tmp_path, of_one_plot(watched(points=3))) as page:
        assert page.complaints == []
        group = browser.group
    left = [it for it in Path("/proc").glob("[0-9]*/stat") if group_of(it) == group]
    assert left == []


def group_of(stat: Path) -> int:
    """Return the process group of a process that is not a zombie; -1, if it has just ended."""
    try:
        state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if state == "Z" else int(group)
