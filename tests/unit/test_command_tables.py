"""Tables: nothing in them is ever cut, in a terminal of any width and in a pipe."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock.commands.screen import _drawn
from pvclock.commands.tables import WORD_MAX, Table
from pvclock.kvm.capabilities import OPTIONAL, REQUIRED
from tests.command_line import ROOT, Result, in_terminal, run_pvclock

pytestmark = pytest.mark.row("E13")

STATE = ROOT / "tests" / "states" / "v3-typical.json"

WORDS = st.text("abcXYZ_0189.", min_size=1, max_size=WORD_MAX)
CELLS = st.lists(WORDS, max_size=6).map(" ".join)
ROWS = st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=5))


@given(rows=ROWS, columns=st.integers(1, 200))
def test_no_word_is_cut(rows: list[list[str]], columns: int) -> None:
    """However narrow the terminal, each word of each cell stands whole in a line."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row)
    shown = _drawn(table, columns).replace("┃", " ").replace("│", " ").split()
    for row in [rows[0], *rows]:
        for word in " ".join(row).split():
            assert word in shown


@given(rows=ROWS)
def test_a_row_is_a_line_in_a_pipe(rows: list[list[str]]) -> None:
    """Where no terminal is, a row is one line, whose cells stand as they are."""
    table = Table(*(f"h{number}" for number in range(len(rows[0]))))
    for row in rows:
        table.add_row(*row)
    lines = _drawn(table, None).splitlines()[1:]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        assert all(cell in line for cell in row)


def test_a_table_fits_where_its_words_do() -> None:
    """Prose wraps, the widest column first, until the table is within the terminal; no more than that."""
    table = Table("a", "b")
    table.add_row("word " * 30, "KVM_CAP_IMMEDIATE_EXIT")
    lines = _drawn(table, 60).splitlines()
    assert {len(line) for line in lines} == {60}
    table = Table("a", "b")
    table.add_row("x" * 40, "y" * 40)
    assert {len(line) for line in _drawn(table, 60).splitlines()} == {2 * 43 + 1}


def test_a_number_of_hundreds_of_digits_is_folded() -> None:
    """What no terminal takes goes on in the next line, and none of it is lost."""
    number = "".join(str(digit % 10) for digit in range(600))
    table = Table("n")
    table.add_row(number)
    lines = _drawn(table, 80).splitlines()
    assert "".join(line.strip("│ ") for line in lines[3:-1]) == number


def test_a_newline_in_a_cell() -> None:
    """It ends a line in a terminal, and is a semicolon in a pipe."""
    table = Table("n")
    table.add_row("found\nadvice")
    assert "found  │\n│ advice │" in _drawn(table, 80)
    assert _drawn(table, None) == "n\nfound; advice\n"


@pytest.mark.kvm
@pytest.mark.parametrize("columns", [None, "20"])
def test_doctors_identifiers_are_found(columns: str | None) -> None:
    """`pvclock doctor | grep KVM_CAP_...` finds each capability."""
    lines = run_pvclock("doctor", COLUMNS=columns).stdout.splitlines()
    for capability in (*REQUIRED, *OPTIONAL):
        assert any(capability.name in line.split() for line in lines)


@cache
def without_columns() -> Result:
    """What a pipe gets where COLUMNS is not set."""
    return run_pvclock("scale", "2596132000", "2.4GHz")


@pytest.mark.parametrize("columns", ["80", "20", "abc", "0", "-3"])
def test_a_row_is_a_line_in_a_pipe_whatever_columns_says(columns: str) -> None:
    """COLUMNS, which a shell may export, is a terminal's: in a pipe all is as without it."""
    scale = run_pvclock("scale", "2596132000", "2.4GHz", COLUMNS=columns)
    assert len(scale.stdout.splitlines()) == 3
    assert scale == without_columns()


@pytest.mark.parametrize("arguments", [["doctor"], ["scale", "2.4GHz"]], ids=" ".join)
def test_in_a_terminal_of_80_columns(arguments: list[str]) -> None:
    """In a terminal, tables are drawn and within its width."""
    lines = in_terminal(*arguments).splitlines()
    assert any(line.startswith("┏━") for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(("columns", "width"), [("72", 72), ("abc", 80), ("0", 80), ("-3", 80)])
def test_columns_of_a_terminal(columns: str, width: int) -> None:
    """COLUMNS is a terminal's width, if it is one; else that is the terminal's own."""
    lines = in_terminal("state", "show", str(STATE), COLUMNS=columns).splitlines()
    assert max(len(line) for line in lines if line.startswith("│")) == width
