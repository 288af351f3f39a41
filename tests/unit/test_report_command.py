"""`pvclock report`: where its page goes, what it refuses, what it says in a terminal and in JSON."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest

from pvclock.commands import main
from tests.unit.report_lines import found, reading, watch_result, written

pytestmark = pytest.mark.row("E10")

REPORTS = Path(__file__).parents[1] / "reports"
WATCH = [found(), *(reading(at_s, -50.0 * at_s) for at_s in range(9)), watch_result("broken", "vCPU 0 stepped")]
DOCUMENTS = [str(REPORTS / f"{name}.json") for name in ("crosscheck", "lifecycle", "doctor", "guest")]


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A watch's file in the folder where the command is run."""
    monkeypatch.chdir(tmp_path)
    return written(tmp_path / "clock.jsonl", WATCH)


def test_the_page_is_beside_the_first_file(watch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With .html in place of its ending; what each file told is said, and where the page is."""
    assert main(["report", watch, DOCUMENTS[0]]) == 0
    page = (tmp_path / "clock.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "Cross-check of three clocks" in page
    said = capsys.readouterr().out
    assert "A budget is broken: vCPU 0 stepped" in said
    assert f"The page: {tmp_path / 'clock.html'}" in said


def test_broken_budgets_are_no_failure_of_the_report(watch: str) -> None:
    """Exit status 0 once the page is written, whatever the clocks did."""
    assert main(["report", watch]) == 0


def test_all_kinds_of_files_make_a_page(watch: str, tmp_path: Path) -> None:
    """One page of them all, without a network request."""
    assert main(["report", watch, *DOCUMENTS, str(REPORTS / "watch.jsonl"), "--output", "all.html"]) == 0
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert page.count("<h2") >= 6
    assert "https://" not in page.replace("https://github.com/pvclock", "")
    assert "src=" not in page


def test_json_tells_the_same(watch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page, and each section's verdict, how it stands, its sentences and parts."""
    assert main(["report", "--json", watch, "--svg", "x.svg"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["ok"]) == ("pvclock.report/1", True)
    result = document["result"]
    assert (result["page"], result["svg"]) == (str(tmp_path / "clock.html"), "x.svg")
    (section,) = result["sections"]
    assert set(section) == {"source", "title", "verdict", "standing", "sentences", "parts"}
    assert (section["source"], section["standing"]) == (watch, "bad")
    assert section["parts"] == ["Clock against raw", "Allan deviation", "Promised and seen"]


def test_the_page_may_go_to_standard_output(watch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Then nothing else does, and no file is made."""
    assert main(["report", watch, "-o", "-"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("<!DOCTYPE html>")
    assert said.rstrip().endswith("</html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clock.jsonl"]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page is report.html in this folder."""
    monkeypatch.chdir(tmp_path)
    content = "".join(json.dumps(line) + "\n" for line in WATCH).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert main(["report", "-"]) == 0
    assert "standard input" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_page_that_is_there_is_replaced_as_a_whole(watch: str, tmp_path: Path) -> None:
    """It keeps its access rights; a new one is for everybody to read, as pages are."""
    page = tmp_path / "clock.html"
    page.write_text("old" * 10**6, encoding="utf-8")
    page.chmod(0o600)
    assert main(["report", watch]) == 0
    assert "oldold" not in page.read_text(encoding="utf-8")
    assert main(["report", watch, "-o", "new.html"]) == 0
    assert stat.S_IMODE((tmp_path / "new.html").stat().st_mode) == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clock.html", "clock.jsonl", "new.html"]


def test_a_title_is_on_the_page(watch: str, tmp_path: Path) -> None:
    """Escaped, as all texts are."""
    assert main(["report", watch, "--title", "Before <the> upgrade"]) == 0
    assert "Before &lt;the&gt; upgrade" in (tmp_path / "clock.html").read_text(encoding="utf-8")


def test_the_first_plot_alone(watch: str, tmp_path: Path) -> None:
    """Is an SVG file by itself, which is XML."""
    assert main(["report", DOCUMENTS[2], watch, "-o", "x.html", "--svg", "x.svg"]) == 0
    root = ET.fromstring((tmp_path / "x.svg").read_text(encoding="utf-8"))  # noqa: S314  # our own
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "Clock against raw" in "".join(root.itertext())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["clock.jsonl", "-o", "same.html"], "same.html is one of the files to read"),
        (["clock.jsonl", "-o", "./clock.jsonl"], "./clock.jsonl is one of the files to read"),
        (["clock.jsonl", "-o", "link.html"], "link.html is one of the files to read"),
        (["clock.jsonl", "--svg", "clock.jsonl"], "clock.jsonl is one of the files to read"),
        (["clock.jsonl", "-o", "x", "--svg", "./x"], "x cannot be the page and the picture"),
        (["-", "-"], "standard input can be read once"),
        (["clock.jsonl", "--title", ""], "a title has 1 to 200 characters"),
        (["clock.jsonl", "--title", "x" * 201], "this one has 201"),
        (["clock.jsonl"] * 101, "a page has room for 100"),
        (["clock.jsonl", "-o", ""], "--output takes the name of a file"),
        (["clock.jsonl", "--svg", "-"], "--svg takes the name of a file"),
        ([DOCUMENTS[2], "-o", "x.html", "--svg", "x.svg"], "--svg takes the first plot, and these files have none"),
        (["nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
        (["."], "Is a directory"),
        (["clock.jsonl", "-o", "nowhere/x.html"], "nowhere"),
        (["clock.jsonl", "-o", "."], "directory"),
    ],
)
def test_what_is_refused(
    options: list[str], said: str, watch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in one line that says why, with exit status 2; what is there stays as it was, and nothing is written."""
    os.link(watch, tmp_path / "same.html")
    (tmp_path / "link.html").symlink_to("clock.jsonl")
    content = Path(watch).read_bytes()
    assert main(["report", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert Path(watch).read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clock.jsonl", "link.html", "same.html"]


def test_a_bad_file_writes_nothing(watch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page that was there stays; the error has file, line, and what was expected, in JSON each by itself."""
    page = tmp_path / "clock.html"
    page.write_text("old", encoding="utf-8")
    with Path(watch).open("a", encoding="utf-8") as file:
        file.write("7\n")
    assert main(["report", watch, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], error["path"], error["line"]) == ("ReportSourceError", watch, len(WATCH) + 1)
    assert error["found"] == "a JSON int"
    assert page.read_text(encoding="utf-8") == "old"


def test_standard_output_cannot_have_both(watch: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A page and JSON in one stream are neither."""
    assert main(["report", watch, "-o", "-", "--json"]) == 2
    assert "choose one" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_pipe_is_a_file_to_read(watch: str, tmp_path: Path) -> None:
    """As a shell's <(...) gives one; its page is report.html in this folder."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(Path(watch).read_bytes())
    try:
        assert main(["report", f"/dev/fd/{reader}"]) == 0
    finally:
        os.close(reader)
    assert (tmp_path / "report.html").exists()
