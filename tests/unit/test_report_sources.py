"""Which file is what, by its content, and what is said of files that are nothing of ours."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pvclock.errors import PvclockError, ReportSourceError
from pvclock.meter.report import json_lines
from pvclock.meter.report.model import Report, Standing
from pvclock.meter.report.sources import read
from tests.unit.probe_lines import CLEAN
from tests.unit.report_lines import (
    drift_begin,
    drift_reading,
    drift_result,
    event_lines,
    found,
    reading,
    step,
    watch_result,
    written,
)

pytestmark = pytest.mark.row("E10")

REPORTS = Path(__file__).parents[1] / "reports"
WATCH = [found(), reading(1, 0.0, 0.0), reading(2, 5.0, 5.0), watch_result()]


def told(*files: str | Path) -> Report:
    """Return the report of files."""
    return read(list(map(str, files)), lambda _bytes, _name: None)


def error_of(path: Path, content: bytes) -> ReportSourceError:
    """Return the error that a file of that content brings."""
    path.write_bytes(content)
    with pytest.raises(ReportSourceError) as caught:
        told(path)
    assert caught.value.path == str(path)
    return caught.value


# What is known


@pytest.mark.parametrize(
    ("lines", "title"),
    [
        (WATCH, "Watch of QEMU 7.2.22, process 17, 2 vCPUs"),
        ([drift_begin(), drift_reading(1, {"engine": 0.0}), drift_result()], "Drift of engine and kernel"),
        (event_lines()[0], "A clock's events (KVM)"),
        ([json.loads(CLEAN)], "A guest's clock, from inside"),
    ],
    ids=["watch", "drift", "events", "probe"],
)
def test_lines_are_known_by_their_content(lines: list[dict[str, Any]], title: str, tmp_path: Path) -> None:
    """Whatever the file is called, its first line tells what wrote it."""
    (section,) = told(written(tmp_path / "x.txt", lines)).sections
    assert section.title == title


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("crosscheck", "Cross-check of three clocks"),
        ("lifecycle", "Cross-check of a guest's life"),
        ("doctor", "Host"),
        ("guest", "A guest's clock, from inside"),
    ],
)
@pytest.mark.parametrize("on_one_line", [False, True])
def test_documents_are_known(name: str, title: str, on_one_line: bool, tmp_path: Path) -> None:
    """What a command really printed on a host is known, as it was and on one line."""
    document = json.loads((REPORTS / f"{name}.json").read_bytes())
    file = tmp_path / "x"
    file.write_text(json.dumps(document, indent=None if on_one_line else 2), encoding="utf-8")
    (section,) = told(file).sections
    assert section.title == title
    assert section.standing is Standing.GOOD


def test_a_console_with_a_probe_is_known(tmp_path: Path) -> None:
    """What a VMM's serial line held, firmware's words and carriage returns included."""
    (tmp_path / "console.log").write_text(f"SeaBIOS\r\n\x1b[2Jbooting\r\n{CLEAN}\r\n", encoding="utf-8")
    (section,) = told(tmp_path / "console.log").sections
    assert section.title == "A guest's clock, from inside"
    assert section.source == str(tmp_path / "console.log")


def test_sections_are_in_the_order_of_the_files(tmp_path: Path) -> None:
    """Several files make a section each; what the report is called then is general."""
    watch = written(tmp_path / "watch", WATCH)
    report = told(REPORTS / "doctor.json", watch, REPORTS / "crosscheck.json")
    assert [section.source for section in report.sections] == [
        str(REPORTS / "doctor.json"),
        watch,
        str(REPORTS / "crosscheck.json"),
    ]
    assert report.title == "Clocks of virtual machines"
    assert told(watch).title == "Watch of QEMU 7.2.22, process 17, 2 vCPUs"


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dash is standard input, and is called so."""
    content = "".join(json.dumps(line) + "\n" for line in WATCH).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    (section,) = told("-").sections
    assert section.source == "standard input"


def test_a_byte_order_mark_and_empty_lines_do_not_matter(tmp_path: Path) -> None:
    """Some editors put one in front, and others add lines."""
    lines = "\n\n".join(map(json.dumps, WATCH))
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf\r\n" + lines.encode() + b"\r\n\r\n")
    assert len(told(tmp_path / "x").sections) == 1


def test_progress_is_by_bytes(tmp_path: Path) -> None:
    """All bytes of all files are counted, with the name of the file that is read."""
    files = [written(tmp_path / name, WATCH) for name in ("one", "two")]
    size = Path(files[0]).stat().st_size
    seen: list[tuple[int, str]] = []
    read(files, lambda done, name: seen.append((done, name)))
    assert seen == [(size, files[0]), (2 * size, files[1])]


# What ends too early


def test_half_a_line_at_the_end_is_told(tmp_path: Path) -> None:
    """A writer that was killed leaves half a line: the file is read to there, and the section says so."""
    (tmp_path / "x").write_text("".join(json.dumps(line) + "\n" for line in WATCH[:3]) + '{"schema": "pvc', "utf-8")
    (section,) = told(tmp_path / "x").sections
    assert section.sentences[-1].startswith("The file ends within a line")
    whole = told(written(tmp_path / "y", WATCH[:3])).sections[0]
    assert section.parts == whole.parts
    assert not any("within a line" in sentence for sentence in whole.sentences)


def test_a_last_line_without_its_end_counts_if_it_is_whole(tmp_path: Path) -> None:
    """What an editor saved without a last line feed is all there."""
    (tmp_path / "x").write_text("\n".join(map(json.dumps, WATCH)), encoding="utf-8")
    assert told(tmp_path / "x").sections[0].verdict.startswith("No budget was given")


@pytest.mark.parametrize("cut", [20, 300, 5000])
def test_a_document_that_is_cut_is_an_error(cut: int, tmp_path: Path) -> None:
    """Half a document tells nothing."""
    error = error_of(tmp_path / "x", (REPORTS / "crosscheck.json").read_bytes()[:cut])
    assert "no whole JSON document" in error.found


# What is not of ours


@pytest.mark.parametrize(
    ("content", "found_words"),
    [
        (b"", "nothing"),
        (b" \n\n", "nothing"),
        (b"\0\0\0\0", "nothing"),
        (b"hello\n", "text that is no JSON"),
        (b"[1, 2]\n", "text that is no JSON"),
        (b"\x7fELF\0\0\0\n", "binary data"),
        (b"{\0\0\n", "binary data"),
        (gzip.compress(b"{}", mtime=0), "data that gzip compressed"),
        (b"{}", "an object without a schema of pvclock's"),
        (b'{"schema": 7}', "schema 7"),
        (b'{"schema": "other/1"}\n', "schema other/1"),
        (b'{"schema": "pvclock.scale/1", "result": {}}', "the JSON of pvclock scale, of which there is no report"),
        (b'{"schema": "pvclock.doctor/1", "result": {}}', "the JSON of pvclock doctor, of which there is no report"),
        (b'{"schema": "pvclock.watch/1", "kin\n', "no whole JSON document"),
        (b'{"schema": "pvclock.doctor/1", "result": {"a": \xff}}\n', "no whole JSON document"),
    ],
)
def test_what_is_nothing_of_ours_is_said(content: bytes, found_words: str, tmp_path: Path) -> None:
    """Each says what was found, and what could be."""
    error = error_of(tmp_path / "x", content)
    assert error.found.startswith(found_words)
    assert "JSON lines of pvclock watch" in error.expected


def test_what_is_compressed_is_told_to_be_unpacked(tmp_path: Path) -> None:
    """The remedy stands beside the fault."""
    assert error_of(tmp_path / "x", gzip.compress(b"{}", mtime=0)).expected.endswith("unpack it first")


@pytest.mark.parametrize("content", [[{**found(), "schema": "pvclock.watch/2"}], [{"schema": "pvclock.doctor/2"}]])
def test_a_newer_schema_is_refused_with_words(content: list[dict[str, Any]], tmp_path: Path) -> None:
    """A number that is not known is not guessed at."""
    error = error_of(tmp_path / "x", json.dumps(content[0]).encode())
    assert error.line == 1
    assert "a pvclock that wrote 2 can report it" in error.expected


def test_a_directory_and_what_is_not_there(tmp_path: Path) -> None:
    """Are errors of the system, with the file's name."""
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        told(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        told(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "found_words"),
    [
        ("{", "no JSON"),
        ("7", "a JSON int"),
        ('{"schema": "pvclock.watch/1", "kind": "reading", "at_s": NaN}', "no JSON (NaN is no number"),
        (
            '{"schema": "pvclock.watch/1", "kind": "reading", "at_s": 1' + "0" * 5000 + "}",
            "no JSON (a number of too many",
        ),
        ('{"schema": ' + "[" * 100_000, "lists or objects nested too deeply"),
        ('{"schema": "pvclock.drift/1"}', "schema 'pvclock.drift/1'"),
        ('{"schema": "pvclock.watch/1"}', "kind: nothing"),
        ('{"schema": "pvclock.watch/1", "kind": 1, "at_s": 1}', "kind: 1"),
        ('{"schema": "pvclock.watch/1", "kind": "reading", "at_s": 1e999, "readings": []}', "at_s: inf"),
        ('{"schema": "pvclock.watch/1", "kind": "reading", "at_s": 1, "readings": [{}]}', "readings[0].vcpu: nothing"),
        ('{"schema": "pvclock.watch/1", "kind": "reading", "at_s": 1, "readings": [7]}', "readings[0]: 7"),
        ('{"schema": "pvclock.watch/1", "kind": "reading", "at_s": 1, "readings": {}}', "readings: an object of 0"),
        ('{"schema": "pvclock.watch/1", "kind": "stall", "at_s": true, "gap_ns": 1}', "at_s: true"),
        ('{"schema": "pvclock.watch/1", "kind": "stall", "at_s": 1, "gap_ns": 1.5}', "gap_ns: 1.5"),
        ('{"schema": "pvclock.watch/1", "kind": "stall", "at_s": 1, "gap_ns": 1' + "0" * 60 + "}", "gap_ns: a number"),
    ],
)
def test_a_bad_line_is_named(line: str, found_words: str, tmp_path: Path) -> None:
    """The error names the file, the line and what is wrong in it; nothing of the file is shown."""
    lines = "".join(json.dumps(each) + "\n" for each in WATCH[:2])
    error = error_of(tmp_path / "x", f"{lines}\n{line}\n{lines}".encode())
    assert error.line == 4
    assert error.found.startswith(found_words)
    assert len(str(error)) < 700


def test_a_line_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not filled by one line, whether it ends or not."""
    monkeypatch.setattr(json_lines, "LINE_BYTES_MAX", 2000)
    start = json.dumps(found()).encode() + b"\n"
    for end in (b"\n", b""):
        error = error_of(tmp_path / "x", start + b'{"' + b"a" * 3000 + end)
        assert (error.line, error.found) == (2, "more than 0 MiB")


def test_a_document_that_is_too_long_is_refused(tmp_path: Path) -> None:
    """16 MiB are far more than any command prints."""
    error = error_of(tmp_path / "x", b"{\n" + b" " * (17 << 20))
    assert error.found == "more than 16 MiB that are no JSON lines"


def test_two_documents_in_a_file_are_refused(tmp_path: Path) -> None:
    """The second would be left out silently."""
    line = json.dumps(json.loads((REPORTS / "doctor.json").read_bytes())).encode()
    assert error_of(tmp_path / "x", line + b"\n" + line).found == "more lines after a whole document"


def test_an_error_document_is_a_section(tmp_path: Path) -> None:
    """A command that could not do its work left that: the report tells it."""
    for command in ("crosscheck", "watch", "drift"):
        error = {"kind": "KvmUnavailable", "message": "no /dev/kvm\x1b[2J"}
        document = {"schema": f"pvclock.{command}/1", "version": "0.1.0", "ok": False, "error": error}
        (section,) = told(written(tmp_path / "x", [document])).sections
        assert section.standing is Standing.OPEN
        assert "no /dev/kvm\\x1b[2J" in section.verdict


def test_lines_of_unknown_kinds_are_counted(tmp_path: Path) -> None:
    """A newer pvclock may write more; what is known of it is shown."""
    newer = {**reading(1), "kind": "temperature"}
    (section,) = told(written(tmp_path / "x", [*WATCH[:2], newer, newer, *WATCH[2:]])).sections
    assert "Passed over: 2 lines of kinds that this pvclock does not know." in section.sentences


def test_texts_of_a_guest_are_safe_to_print(tmp_path: Path) -> None:
    """What a file says may come from a guest: control characters are shown as escapes, long texts are cut."""
    began = found(vm="\x1b]0;evil\x07" + "x" * 5000)
    (section,) = told(written(tmp_path / "x", [began, step(1, 0, 500, "\x1b[31mstop"), watch_result()])).sections
    texts = [section.title, section.verdict, *section.sentences]
    assert all(text.isprintable() for text in texts)
    assert len(section.title) < 2100


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    """Any change of a byte, cut or doubling leaves a report or a pvclock error; nothing else."""
    import random

    source = random.Random(seed)  # noqa: S311  # no secret
    samples = [*(file.read_bytes() for file in sorted(REPORTS.glob("*.json")))]
    samples += ["".join(json.dumps(line) + "\n" for line in lines).encode() for lines in (WATCH, event_lines()[0])]
    content = bytearray(source.choice(samples))
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(content))
        match source.randrange(3):
            case 0:
                content[place] = source.randrange(256)
            case 1:
                del content[place : place + source.randint(1, 40)]
            case _:
                content[place:place] = content[place : place + source.randint(1, 40)]
    (tmp_path / "x").write_bytes(content)
    try:
        sections = len(told(tmp_path / "x").sections)
    except PvclockError:
        sections = 0
    assert sections in {0, 1}
