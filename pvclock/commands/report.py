"""Make one HTML page of what watch, drift, crosscheck, doctor and probes found, or of a clock's events.

Each FILE is known by its content: JSON lines of `watch --json` or `drift --json`, the document of another command's
--json, what a probe printed, or the events of a clock, one a line.  The page is one file, which needs no network.

Exit status 0 once it is written, whatever the clocks did.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.text import Text

from pvclock.commands import whole_file
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen, write
from pvclock.commands.tables import Table
from pvclock.errors import ConfigError
from pvclock.meter.watch.words import counted

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from pvclock.meter.report.model import Plot, Report, Section

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock report clock.jsonl                 clock.html, of a watch --json
  pvclock report before.jsonl after.jsonl    several files, a section each
  pvclock crosscheck --json | pvclock report -
  pvclock report clock.jsonl --svg clock.svg"""

STREAM: Final = "-"
"""As a FILE standard input, as --output standard output."""
FILES_MAX: Final = 100
TITLE_MAX: Final = 200
PAGE_MODE: Final = 0o644
COLOURS: Final = {"good": "green", "bad": "red", "open": "yellow", "plain": ""}
SENTENCES_SHOWN: Final = 5
BYTES_PER_MIB: Final = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("files", nargs="+", metavar="FILE", help='what was found; "-" is standard input')
    output = 'where the page goes, "-" to standard output (default: beside the first FILE, its name with .html)'
    parser.add_argument("--output", "-o", metavar="HTML", help=output)
    parser.add_argument("--title", metavar="TEXT", help="the page's title")
    parser.add_argument("--svg", metavar="SVG", help="write the first plot to this file, too, as a picture by itself")


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Read all files, write the page, and say what each file told."""
    files, page, picture = arguments.files, _page_of(arguments), arguments.svg
    _refuse(arguments, page)
    report = _read(files, arguments.title, screen)
    if picture is not None:
        _write_picture(report, picture)
    _write_page(report, page)
    if page != STREAM:
        _show(report, page, picture, screen)
    sections = [_told(section) for section in report.sections]
    return Outcome(True, {"page": None if page == STREAM else page, "svg": picture, "sections": sections})


# The command line


def _page_of(arguments: argparse.Namespace) -> str:
    """Where the page goes: beside the first file, or in this folder if that is a stream or a pipe."""
    if arguments.output is not None:
        return str(arguments.output)
    first = Path(arguments.files[0])
    return str(first.with_suffix(".html")) if first.is_file() else "report.html"


def _refuse(arguments: argparse.Namespace, page: str) -> None:
    """ConfigError for what cannot be done, before anything is read."""
    if page == STREAM and arguments.json:
        raise ConfigError("--output - and --json both want standard output; choose one")
    if len(arguments.files) > FILES_MAX:
        raise ConfigError(f"{len(arguments.files)} files; a page has room for {FILES_MAX}")
    if arguments.files.count(STREAM) > 1:
        raise ConfigError("standard input can be read once; give - once")
    if arguments.title is not None and not 0 < len(arguments.title) <= TITLE_MAX:
        raise ConfigError(f"a title has 1 to {TITLE_MAX} characters; this one has {len(arguments.title)}")
    if page == "" or arguments.svg in {"", STREAM}:
        raise ConfigError(f"{'--output' if page == '' else '--svg'} takes the name of a file")
    outputs = [name for name in (page, arguments.svg) if name not in {None, STREAM}]
    for name in outputs:
        if any(_is_same(name, file) for file in arguments.files):
            raise ConfigError(f"{name} is one of the files to read; choose another name")
    if len(outputs) > 1 and _is_same(*outputs):
        raise ConfigError(f"{page} cannot be the page and the picture; choose another name for one")


def _is_same(one: str, other: str) -> bool:
    """Are both names of one file, or would be?"""
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)


# What is read, and what is written


def _read(files: list[str], title: str | None, screen: Screen) -> Report:
    from pvclock.meter.report import sources

    total = sum(Path(name).stat().st_size for name in files if name != STREAM and Path(name).is_file())
    with screen.progress(max(total, 1), "reading") as advance:
        report = sources.read(files, lambda done, name: advance(done, f"{name}: {done // BYTES_PER_MIB} MiB"))
    return report if title is None else report._replace(title=title)


def _write_page(report: Report, page: str) -> None:
    from pvclock.meter.report import html

    document = html.document(report)
    if page == STREAM:
        write(document)
    else:
        whole_file.write(page, document.encode("utf-8"), PAGE_MODE)


def _write_picture(report: Report, name: str) -> None:
    from pvclock.meter.report import svg

    plot = _first_plot(report)
    whole_file.write(name, svg.standalone(plot).encode("utf-8"), PAGE_MODE)


def _first_plot(report: Report) -> Plot:
    from pvclock.meter.report.model import Plot

    plots = (part for section in report.sections for part in section.parts if isinstance(part, Plot))
    if (plot := next(plots, None)) is None:
        raise ConfigError("--svg takes the first plot, and these files have none: they are shown as tables and bars")
    return plot


# What is shown


def _show(report: Report, page: str, picture: str | None, screen: Screen) -> None:
    table = Table("file", "what it told")
    for section in report.sections:
        table.add_row(f"{section.source}\n{section.title}", Text("\n").join(_in_short(section)))
        table.end_section()
    screen.show(table, f"The page: {page}", *[f"The first plot: {picture}"] * (picture is not None))


def _in_short(section: Section) -> Iterator[Text]:
    """The verdict, and the first sentences: the page has all."""
    yield Text(section.verdict, COLOURS[section.standing])
    yield from map(Text, section.sentences[:SENTENCES_SHOWN])
    more = len(section.sentences) - SENTENCES_SHOWN
    if more > 0:
        yield Text(f"and {counted(more, 'sentence')} more on the page", "dim")


def _told(section: Section) -> dict[str, object]:
    return {
        "source": section.source,
        "title": section.title,
        "verdict": section.verdict,
        "standing": section.standing,
        "sentences": section.sentences,
        "parts": [part.title for part in section.parts],
    }
