"""docs/conformance.md, as a person reads it, from what conformance.json holds."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.conformance.verdicts import DEVIATES, VERDICTS, WHOLE

Found = dict[str, Any]
WIDTH = 118
DOCUMENT = re.compile(r"docs/([\w-]+\.md(?:#[\w-]+)?)")
SPECIAL = re.compile(r"[\\*~\[\]<>]|\b_|_\b|&(?=#?\w+;)")
"""What Markdown takes for something; an underscore within a word it does not."""
LOST = (
    "In these a process died, or they could not be collected; rows that they name may read as proven by others alone."
)

BEGINS_A_BLOCK = re.compile(r"^( *(?:\d+(?=[.)]))?)([-+=#.)]+(?: |$))")
"""A list, a heading or a rule: what stands first in a line decides."""

HEAD = """\
# Conformance

Written by `make conformance`; do not edit. What is owed stands in [rows.tsv](rows.tsv); what was decided of each row,
by whom and why, in [verdicts.tsv](verdicts.tsv); the whole mapping of rows to tests in
[conformance.json](conformance.json).

A verdict is a person's: *whole*; *part*, where some of the claim is not built or not proven; *deviates*, where the
product does otherwise on purpose; *not applicable*; *open*. A run can refute a verdict, and never improves one: a test
that failed, whose fixture failed, or that was skipped proves nothing. Mutants are deliberate mistakes against a row's
claim, each of which a test of the row notices (`make mutants`). *Library* is the engine on a simulated host or in this
process, *real vCPU* a guest on /dev/kvm. VMCALL, #UD and RDTSC exits never reach user space on KVM: rows about them can
be proven in the library alone.
"""


def markdown(found: Found, folder: Path) -> str:
    """Return the page; `folder` may have mutants.json, the last whole run of the mutants."""
    rows = found["rows"]
    parts = [HEAD, run_of(found["run"]), mutants_of(folder / "mutants.json"), lost(found["lost"]), against(rows)]
    parts.append(totals(rows))
    parts += [section(source, list(those)) for source, those in groupby(rows, key=lambda row: str(row["source"]))]
    parts.append(deviations(rows))
    return "\n".join(part for part in parts if part)


def run_of(run: dict[str, str]) -> str:
    """Say of what and where the run was."""
    host = escaped(run["host"])
    what = f"Run on {run['date']} of commit {run['commit']}: {host}, Linux {run['kernel']}, Python {run['python']}."
    return wrapped(what) + "\n"


def mutants_of(file: Path) -> str:
    """Say how the mutants fared when all were run last."""
    if not file.exists():
        return ""
    last = json.loads(file.read_text(encoding="utf-8"))
    run = f"at commit {last['commit']}, in {last['minutes']} min of tests"
    return wrapped(f"Mutants: {last['died']} of {last['mutants']} died when all were run last, {run}.") + "\n"


def lost(tests: list[str]) -> str:
    """List the tests whose process died, and the files that could not be collected."""
    lines = [wrapped(f"- {escaped(test)}", "  ") for test in tests]
    return f"## Lost\n\n{LOST}\n\n" + "\n".join(lines) + "\n" if lines else ""


def against(rows: list[Found]) -> str:
    """List the verdicts that the run speaks against, and those that it could not hold against all of its tests."""
    parts = []
    for heading, field in (("Refuted", "refuted"), ("Not run here", "not_run")):
        lines = [
            wrapped(f"- **{row['row']}** ({row['verdict']}): {escaped(row[field])}", "  ") for row in rows if row[field]
        ]
        if lines:
            parts.append(f"## {heading}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts) or "No verdict was refuted, and no defining test was left out.\n"


def totals(rows: list[Found]) -> str:
    """Return a table of verdicts by seed and need."""
    lines = ["| seed | need | rows | " + " | ".join(VERDICTS) + " |", "|---|---|" + "--:|" * (1 + len(VERDICTS))]
    for source, those in groupby(rows, key=lambda row: str(row["source"])):
        of_seed = list(those)
        for need in dict.fromkeys(row["need"] for row in of_seed):
            count = Counter(row["verdict"] for row in of_seed if row["need"] == need)
            numbers = " | ".join(str(count[verdict] or "") for verdict in VERDICTS)
            lines.append(f"| [{source}](#{anchor(source)}) | {need} | {count.total()} | {numbers} |")
    count = Counter(row["verdict"] for row in rows)
    lines.append(f"| all | | {count.total()} | " + " | ".join(str(count[verdict]) for verdict in VERDICTS) + " |")
    return "## Totals\n\n" + "\n".join(lines) + "\n"


def section(source: str, rows: list[Found]) -> str:
    """Return one seed's rows."""
    lines = [f"## {source}", ""]
    for row in rows:
        lines += entry(row)
    return "\n".join(lines) + "\n"


def entry(row: Found) -> Iterator[str]:
    """Give the lines of one row: claim, check, verdict, tests."""
    yield wrapped(f"- **{row['row']}** ({row['need']}): {escaped(row['claim'])}", "  ")
    if row["check"]:
        yield wrapped(f"  - check: {escaped(row['check'])}", "    ")
    told = f"  - **{row['verdict']}**" + (f": {linked(row['why'])}" if row["why"] else "")
    if row["verdict"] != WHOLE:
        told += f" ({row['by']})"
    if row["refuted"] or row["not_run"]:
        told += " **Refuted.**" if row["refuted"] else " **Not all run here.**"
    yield wrapped(told, "    ")
    for test in row["defining"]:
        file, _, name = test["name"].partition("::")
        yield f"  - [{name}](../tests/{file}#L{test['line']}), {test['where']}, {test['outcome']}"
    if more := told_more(row):
        yield f"  - {more}"
    yield ""


def told_more(row: Found) -> str:
    """Say what there is beside the defining tests."""
    count = Counter(test["outcome"] for test in row["others"])
    more = [f"{counted(number, 'more test')} {outcome}" for outcome, number in sorted(count.items())]
    if row["mutants"]:
        more.append(counted(row["mutants"], "mutant"))
    return ", ".join(more)


def counted(number: int, what: str) -> str:
    """Say how many there are."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def deviations(rows: list[Found]) -> str:
    """Return the table of rows where the product does otherwise than a seed, and why."""
    lines = [
        f"| {row['row']} | {row['source']} | {cell(escaped(row['claim']))} | {cell(linked(row['why']))} |"
        for row in rows
        if row["verdict"] == DEVIATES
    ]
    head = "| row | seed | what the seed does | why pvclock does otherwise |\n|---|---|---|---|\n"
    return "## Deviations from the seeds\n\n" + head + "\n".join(lines) + "\n"


def wrapped(text: str, indent: str = "") -> str:
    """Return a paragraph or list item within WIDTH; its further lines are indented, and begin nothing of their own."""
    first, *more = textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join([first, *(re.sub(BEGINS_A_BLOCK, r"\1\\\2", line) for line in more)])


def escaped(text: str) -> str:
    """Return what Markdown shows as this text; what stands between backticks is code, as it is."""
    prose_and_code = text.split("`") if text.count("`") % 2 == 0 else [text.replace("`", "'")]
    prose_and_code[::2] = [SPECIAL.sub(r"\\\g<0>", prose) for prose in prose_and_code[::2]]
    return "`".join(prose_and_code)


def linked(text: str) -> str:
    """Return the same with links to the documents that it names."""
    return DOCUMENT.sub(r"[\g<0>](\1)", escaped(text))


def cell(text: str) -> str:
    """Return Markdown as a table's cell takes it."""
    return text.replace("|", "\\|")


def anchor(heading: str) -> str:
    """Return the anchor that Markdown gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
