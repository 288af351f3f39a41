"""A report as one file: what it contains, that it runs nothing of a report's texts, and that it needs nothing else."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import example as hypothesis_example
from hypothesis import given, settings
from hypothesis import strategies as st

from pvclock.meter.report.escaping import clipped, escaped, json_in_script, json_numbers
from pvclock.meter.report.html import document
from pvclock.meter.report.model import Report, Section, Standing, Table
from tests.report_examples import HOSTILE, LONG_WORD, example, hostile, of_one_plot, watched

pytestmark = pytest.mark.row("E10")

RUNNING = {"script", "style", "img", "iframe", "object", "embed", "link", "base", "form", "audio", "video"}


class Elements(HTMLParser):
    """The start tags of a page with their attributes, and the texts of its elements."""

    def __init__(self, page: str) -> None:
        """Read a page."""
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Note a text by the element that began last."""
        if data.strip():
            self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of each element of a name."""
        return [attributes for name, attributes in self.tags if name == tag]


def page_data(page: str) -> list[Any]:
    """Return what the page's program is given of each plot."""
    return [json.loads(it) for it in re.findall(r'<script type="application/json" class="data">(.*?)</script>', page)]


def policy_of(page: str) -> str:
    """Return the page's Content-Security-Policy."""
    (policy,) = [it for it in Elements(page).all("meta") if it.get("http-equiv") == "Content-Security-Policy"]
    return policy["content"] or ""


def test_a_page_has_all_parts() -> None:
    """Each section has its title, verdict, sentences, plots, intervals and tables; each plot its legend and note."""
    page = document(example())
    found = Elements(page)
    texts = {text.strip() for _, text in found.texts}
    assert {"A guest's clock, watched from outside", "clock.jsonl", "vCPU 0", "Findings", "-30.002 s"} <= texts
    assert "Watched for 600 s, 60 000 looks; the longest stall took 64 ms." in texts
    assert len([it for it in found.all("svg") if it.get("role") == "img"]) == 3 + 4
    assert len(found.all("section")) == 3


def test_contents_only_of_several_sections() -> None:
    """Several sections are listed first, each with how it stands; a single one is not."""
    assert len(Elements(document(example())).all("nav")) == 1
    hrefs = [it["href"] for it in Elements(document(example())).all("a")]
    assert hrefs == ["#section-1", "#section-2", "#section-3"]
    assert Elements(document(of_one_plot(watched()))).all("nav") == []


def test_a_title_is_said_once() -> None:
    """A section that is all of a report, under the same title, has no heading of its own, and its name all the same."""
    section = Section("Watch of vm1", "file", "So it is.", Standing.PLAIN, (), ())
    alone, twice = (Elements(document(Report("Watch of vm1", "now", "1", (section,) * times))) for times in (1, 2))
    assert (len(alone.all("h2")), len(twice.all("h2"))) == (0, 2)
    ids = [it["id"] for found in (alone, twice) for it in found.all("h1") + found.all("h2")]
    assert ids == ["title", "title", "heading-1", "heading-2"]
    assert [it["aria-labelledby"] for it in alone.all("section")] == ["title"]
    assert len(Elements(document(of_one_plot(watched()))).all("h2")) == 1


@pytest.mark.parametrize(
    ("standing", "sign", "word"),
    [(Standing.GOOD, "\u2713", "good"), (Standing.BAD, "\u2717", "bad"), (Standing.OPEN, "?", "not decided")],
)
def test_verdicts_have_a_sign_and_a_word(standing: Standing, sign: str, word: str) -> None:
    """How something stands is told by a word and a sign beside the colour."""
    page = document(Report("it", "now", "1", (Section("it", "file", "So it is.", standing, (), ()),)))
    assert (
        f'<span class="badge {standing.value}"><span aria-hidden="true">{sign}</span> {word}</span> So it is.' in page
    )


def test_what_is_plain_has_no_badge() -> None:
    """Where there is nothing to judge, nothing is said of it."""
    page = document(Report("it", "now", "1", (Section("it", "file", "So it is.", Standing.PLAIN, (), ()),)))
    assert '<p class="verdict">So it is.</p>' in page


def test_numbers_of_a_table_are_below_each_other() -> None:
    """A column of numbers, with few words among them, is aligned at its right; one of words, or a long text, is not."""
    long = ("step", "0x4b564d01 by a write of the guest's own, 3")
    no_value = (("-", "-"),) * 3
    rows = (("step", "+38 ns"), ("step", "-1.5 s"), ("3 steps", "unknown"), *no_value, ("step", "7 ns"), long)
    page = document(
        Report("it", "now", "1", (Section("", "", "", Standing.PLAIN, (), (Table("", ("a", "b"), rows),)),))
    )
    assert (page.count('<td class="whole number">'), page.count('<td class="number">')) == (3, 4)
    assert "<td>0x4b564d01 by a write of" in page
    assert '<td class="number">unknown</td>' in page
    assert "<td>3 steps</td>" in page


def test_long_tables_are_cut_and_it_is_said() -> None:
    """A table shows its first 2000 rows, and how many more there are."""
    table = Table("it", ("a",), (("x",),) * 2003)
    page = document(Report("it", "now", "1", (Section("", "", "", Standing.PLAIN, (), (table,)),)))
    assert page.count("<td>x</td>") == 2000
    assert "3 more rows are not shown." in page


def test_the_policy_allows_this_pages_own_style_and_program_alone() -> None:
    """Nothing may be loaded, and only what has the hash of the page's own style and program is used."""
    page = document(example())
    sources = dict(it.strip().split(" ", 1) for it in policy_of(page).split(";"))
    (style,), (script,) = (
        re.findall(r"<style>(.*?)</style>", page, re.DOTALL),
        re.findall(r"<script>(.*?)</script>", page, re.DOTALL),
    )
    assert sources == {
        "default-src": "'none'",
        "style-src": f"'{hash_of(style)}'",
        "script-src": f"'{hash_of(script)}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def hash_of(text: str) -> str:
    """Return the hash by which a policy knows a text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_nothing_is_needed_from_elsewhere() -> None:
    """No element has an address but those within the page, and no style is in an attribute."""
    found = Elements(document(example()))
    assert {tag for tag, _ in found.tags} & RUNNING == {"script", "style"}
    assert [it for _, it in found.tags if {"src", "style", "onload", "onerror"} & set(it)] == []
    assert all((it.get("href") or "").startswith("#") for it in found.all("a"))


def test_hostile_texts_are_texts() -> None:
    """Markup in any text of a report is shown as it is: no element comes of it, and nothing turns the writing round."""
    plain, dangerous = Elements(document(example())), Elements(document(hostile()))
    assert {tag for tag, _ in dangerous.tags} <= {tag for tag, _ in plain.tags}
    assert len(dangerous.all("script")) == 2 + 2
    assert {it for _, each in dangerous.tags for it in each if it.startswith("on")} == set()
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", document(hostile()))
    assert len(document(hostile()).encode("utf-8")) < 1_000_000


@settings(max_examples=25)
@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("<>&'\"/")), max_size=40))
@hypothesis_example("<!--</script>&\u2028")
def test_any_text_can_be_shown(text: str) -> None:
    """Whatever its characters, a text stays within its element, and the page can be written as UTF-8."""
    text = f"it: {text}"
    table = Table(text, (text,), ((text,),))
    page = document(Report("it", "now", "1", (Section(text, text, text, Standing.BAD, (text,), (table,)),)))
    assert [tag for tag, _ in Elements(page).tags].count("p") == 4
    assert page.encode("utf-8")
    assert "<" not in escaped(text)
    assert not re.search("[<>&\u2028\u2029]", json_in_script(text))
    assert json.loads(json_in_script(text)) == text


def test_data_of_a_plot() -> None:
    """The page's program is given the points as they are, NaN as null, and what each mark says."""
    (data,) = page_data(document(of_one_plot(watched())))
    first, second = data["lines"]
    assert first["y"] == pytest.approx(list(watched().lines[0].y), rel=1e-12)
    assert [it is None for it in second["y"]] == [math.isnan(it) for it in watched().lines[1].y]
    assert data["marks"][1] == {
        "x": 210.0,
        "until": 240.0,
        "kind": "pause",
        "text": "STOP, RESUME 30 s later",
        "look": "plain",
    }
    assert data["x"] == {"label": "time", "unit": "s", "isLog": False}


@given(st.lists(st.floats()))
def test_numbers_in_json(numbers: list[float]) -> None:
    """Numbers come back as they were; NaN is null, as JSON has none."""
    back = [math.nan if it is None else float(it) for it in json.loads(json_numbers(numbers))]
    assert [repr(abs(it)) for it in back] == [repr(abs(it)) for it in numbers]
    assert [it < 0 for it in back] == [it < 0 for it in numbers]


def test_long_texts_are_cut_where_they_are_drawn() -> None:
    """A text that is too long ends in an ellipsis."""
    assert (clipped("abcdef", 6), clipped("abcdefg", 6), clipped("ab   fgh", 6)) == (
        "abcdef",
        "abcde\u2026",
        "ab\u2026",
    )
    (title,) = re.findall(r'<h1 id="title">(.*?)</h1>', document(Report(HOSTILE + LONG_WORD, "now", "1", ())))
    assert len(title) < 400
