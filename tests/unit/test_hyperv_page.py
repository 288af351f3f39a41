"""Hyper-V's page kind beside the oracle: its arithmetic, its line over many changes, its order in the one publish.

The program is tests/native/hyperv_page.c; every figure that it prints is worked out again in unbounded integers.
"""

import random
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from struct import pack
from typing import NamedTuple

import pytest

from tests import oracle

ROOT = Path(__file__).parents[2]
COMPILE = ("cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'pvclock' / 'include'}")
CASES = 100_000
CHANGES = 50_000
HZ = 2_596_132_000
NS_PER_UNIT = 100

Row = tuple[int, ...]
Program = Callable[..., Iterator[Row]]


@pytest.fixture(scope="module")
def hyperv_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program tests/native/hyperv_page.c."""
    program = tmp_path_factory.mktemp("hyperv_page") / "hyperv_page"
    subprocess.run([*COMPILE, str(ROOT / "tests" / "native" / "hyperv_page.c"), "-o", str(program)], check=True)
    return program


def output(program: Path, *arguments: object, cases: Iterable[Row] = ()) -> list[str]:
    """Return the lines that the program prints, given a line for each case."""
    given = "\n".join(" ".join(map(str, case)) for case in cases)
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, input=given, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def numbers(lines: Iterable[str]) -> list[Row]:
    """Return the numbers of each line."""
    return [tuple(map(int, line.split())) for line in lines]


def mixed(source: random.Random, bits: int = 64) -> int:
    """Return a number of any length up to `bits`, with the extremes among them."""
    return source.choice((source.getrandbits(source.randint(1, bits)), 2**bits - 1, 0, 1, source.getrandbits(bits)))


@pytest.mark.row("H-51")
def test_the_scale_is_the_nearest(hyperv_page: Path) -> None:
    """Units a tick in 2**-64, of any rate, also those too fast for a page."""
    source = random.Random(1)  # noqa: S311  # cases, not secrets
    cases = [(mixed(source), max(1, mixed(source))) for _ in range(CASES)]
    found = numbers(output(hyperv_page, "scale", cases=cases))
    assert [units << 64 | scale for units, scale in found] == [oracle.hyperv_scale(num, den) for num, den in cases]


@pytest.mark.row("H-51", "H-50")
def test_a_guest_reads_the_formula(hyperv_page: Path) -> None:
    """hyperv_read() finds scale and offset where the layout has them, and computes what the formula says."""
    source = random.Random(2)  # noqa: S311  # cases, not secrets
    cases = [(mixed(source), mixed(source), mixed(source)) for _ in range(CASES)]
    found = output(hyperv_page, "read", cases=cases)
    for (scale, offset, tsc), units in zip(cases, found, strict=True):
        page = oracle.ReferenceTscPage.parse(pack("<IIQQ", 7, 0, scale, offset))
        assert page.read(tsc) == int(units)


@pytest.mark.row("H-54")
def test_a_sequence_is_never_one_that_is_invalid(hyperv_page: Path) -> None:
    """0 and 0xffffffff are skipped, from whatever count a VM was restored with."""
    source = random.Random(3)  # noqa: S311  # cases, not secrets
    cases = [(each,) for each in (0, 1, 2**32 - 3, 2**32 - 2, 2**32 - 1)]
    cases += [(mixed(source, 32),) for _ in range(CASES)]
    found = numbers(output(hyperv_page, "sequence", cases=cases))
    assert [following for (following,) in found] == [oracle.hyperv_sequence_after(sequence) for (sequence,) in cases]


class Change(NamedTuple):
    """One change of the rate: the exact timeline and the old line at its break point, and the new rate."""

    tsc: int
    tsc_offset: int
    ns: int
    rem: int
    den: int
    units: int
    fraction: int
    scale: int
    new_num: int
    new_den: int

    def page_line(self) -> tuple[int, int] | None:
        """The oracle's scale and offset; the timeline is cut to 2**-64 units."""
        now = (self.ns * 2**64 + self.rem * 2**64 // self.den) // NS_PER_UNIT
        scale = oracle.hyperv_scale(self.new_num, self.new_den)
        return oracle.hyperv_page_line(now, self.units, scale, self.guest_tsc)

    @property
    def guest_tsc(self) -> int:
        """The guest's TSC at the break point."""
        return (self.tsc + self.tsc_offset) % 2**64


def random_change(source: random.Random) -> Change:
    """A change where the old line is up to 3 units off the timeline; the guest's TSC may be young, or near its end."""
    den = source.getrandbits(source.randint(8, 64)) | 1
    ns = source.getrandbits(source.randint(20, 62))
    off = source.randint(-(2**65), 3 * 2**64) if source.random() < 0.3 else source.randint(0, 2**64)
    old = max(0, (ns << 64) // NS_PER_UNIT + off)
    tsc = source.getrandbits(source.randint(40, 62))
    new_num, new_den = source.getrandbits(32) | 1, source.getrandbits(source.randint(28, 40)) | 1
    scale = oracle.hyperv_scale(1, source.randint(1, 100))
    guest_tsc = source.getrandbits(source.randint(20, 63))
    return Change(
        tsc, (guest_tsc - tsc) % 2**64, ns, source.randrange(den), den, old >> 64, old % 2**64, scale, new_num, new_den
    )


@pytest.mark.row("H-50", "H-51", "H-54", "E11")
def test_a_new_line_is_the_oracles(hyperv_page: Path) -> None:
    """Scale, offset and sequence of a page whose rate changes, to the bit; the counter goes on by 0 or 1 unit, too."""
    source = random.Random(4)  # noqa: S311  # cases, not secrets
    changes = [random_change(source) for _ in range(CASES)]
    found = numbers(output(hyperv_page, "publish", cases=changes))
    shown = 0
    for change, (sequence, scale, offset, counter) in zip(changes, found, strict=True):
        line = change.page_line()
        assert counter - change.units in (0, 1)
        assert (sequence != 0) == (line is not None)
        if line is not None:
            assert (scale, offset % 2**64) == (line[0], line[1] % 2**64)
            assert oracle.ReferenceTscPage(sequence, 0, scale, offset).read(change.guest_tsc) == counter
            shown += 1
    assert CASES // 2 < shown < CASES


# ---- Many changes. ----


class Published(NamedTuple):
    """What one publish has left in both pages, and the rate that holds from there on."""

    break_tsc: int
    num: int
    den: int
    sequence: int
    scale: int
    offset: int
    tsc_timestamp: int
    system_time: int
    mul: int
    shift: int
    counter_units: int

    @property
    def hyperv(self) -> oracle.ReferenceTscPage:
        """The page of Hyper-V's kind."""
        return oracle.ReferenceTscPage(self.sequence, 0, self.scale, self.offset)

    @property
    def pvclock(self) -> oracle.TimeInfo:
        """The page of pvclock's kind."""
        return oracle.TimeInfo(2, 0, self.tsc_timestamp, self.system_time, self.mul, self.shift, 1, 0)

    def is_refresh_of(self, old: "Published") -> bool:
        """Does it have the rate that the old one had?"""
        return self.num * old.den == old.num * self.den


class Checked(NamedTuple):
    """What many publishes come to."""

    least_off: float  # units, page against timeline, both lines at each break point
    most_off: float
    steps: set[int]
    sequences: list[int]
    invalid: int


# The timeline is counted in 1/(HZ * 2520) ns: whole numbers at each of the rates a/b, a and b up to 10.
PARTS = HZ * 2520


def check_changes(rows: list[Published], start_ns: int, tsc_offset: int) -> Checked:
    """Hold each publish against the exact timeline, and both pages against what they showed before."""
    now, old = start_ns * PARTS, rows[0]
    checked = Checked(0.0, 0.0, set(), [old.sequence], 0)
    least, most, invalid = 0.0, 0.0, 0
    for row in rows[1:]:
        now += (row.break_tsc - old.break_tsc) * old.num * 2520 // (old.den // HZ)
        guest_tsc = row.break_tsc + tsc_offset
        check_pvclock(old, row, guest_tsc, now)
        if row.is_refresh_of(old) and old.sequence:
            assert row[3:6] == old[3:6]
        if row.sequence:
            assert row.hyperv.read(guest_tsc) == row.counter_units
            if row.sequence != checked.sequences[-1]:
                checked.sequences.append(row.sequence)
        if row.sequence and old.sequence:
            shown = [each.hyperv.read(guest_tsc) for each in (old, row)]
            checked.steps.add(shown[1] - shown[0])
            off = [each - now / PARTS / NS_PER_UNIT for each in shown]
            least, most = min(least, *off), max(most, *off)
        invalid += row.sequence == 0
        old = row
    return checked._replace(least_off=least, most_off=most, invalid=invalid)


def check_pvclock(old: Published, row: Published, guest_tsc: int, now: int) -> None:
    """Check that pvclock's own bound holds beside the other kind: 0 or +1 ns, 2 ns, the cut of its shift, 0.47 ppb."""
    before, after = old.pvclock.read(guest_tsc), row.pvclock.read(guest_tsc)
    assert after - before in (0, 1)
    cut_ticks = 2 ** max(0, -row.shift)
    assert abs(after * PARTS - now) * row.den <= (2 * row.den + cut_ticks * row.num) * PARTS


@pytest.mark.row("H-50", "H-51", "H-54", "E4", "E11")
@pytest.mark.parametrize(
    ("counter", "tsc_offset"), [("real", 0), ("real", "young"), ("simulated", -9 * 10**11), ("simulated", 2**60)]
)
def test_a_page_keeps_to_the_timeline(hyperv_page: Path, counter: str, tsc_offset: int | str) -> None:
    """After 50,000 changes, each with a refresh: within 2 units, by 0 or +1 unit, and no sequence twice."""
    lines = output(hyperv_page, "changes", counter, tsc_offset, CHANGES)
    rows = [Published(*row) for row in numbers(lines[1:])]
    start_ns, true_offset = map(int, lines[0].split())
    checked = check_changes(rows, start_ns, true_offset)
    assert len(rows) == 1 + 2 * CHANGES
    assert -2 <= checked.least_off < checked.most_off <= 2
    assert checked.steps == {0, 1}
    assert len(checked.sequences) == len(set(checked.sequences)) > CHANGES * 9 // 10
    assert all(row.hyperv.is_valid == (row.sequence != 0) for row in rows)
    assert checked.invalid <= (0 if tsc_offset == 2**60 else len(rows) // 10)


# ---- In the one publish. ----


@pytest.mark.row("K-08", "E4")
def test_both_kinds_are_busy_from_before_a_until_after_b(hyperv_page: Path) -> None:
    """At each look at the counter from A to B both pages refuse readers, and the counter has no answer."""
    *looks, after = numbers(output(hyperv_page, "order"))
    break_tsc = after[0]
    assert looks[0][1:] == (0, 0, 0)  # before the marks: is the page due?
    assert looks[1][0] <= break_tsc - 1000
    assert all(look[1:] == (1, 1, 1) for look in looks[1:])
    assert looks[-1][0] >= break_tsc
    assert len(looks) >= 12
    assert after[1:] == (0, 0, 0)


@pytest.mark.row("H-50", "H-54", "E4")
def test_where_the_page_may_be_read(hyperv_page: Path) -> None:
    """Distrusted, its sequence is 0 and the counter goes on; trusted again, placed or restored, it has a new one."""
    told = {name: tuple(map(int, rest)) for name, *rest in map(str.split, output(hyperv_page, "validity"))}
    sequences = {name: sequence for name, (sequence, *_) in told.items()}
    assert sequences == {
        "before": 0,
        "placed": 1,
        "refreshed": 1,
        "placed_again": 2,
        "distrusted": 0,
        "still_distrusted": 0,
        "trusted": 3,
        "forked": 4,
        "offset": 5,
        "moving": 5,
        "moved": 6,
        "frozen": 7,
        "too_fast": 0,
        "restored": 1,
        "no_page": 1,
        "whole_but_distrusted": 0,
        "whole": 1,
        "whole_offset": 2,
        "late": 2,
    }
    of_another_vm = [told.pop(name) for name in ("whole_but_distrusted", "whole", "whole_offset", "late")]
    assert [counter for *_, counter in of_another_vm] == [80_000_000] * 4
    assert [page for _, _, page, _ in of_another_vm[1:]] == [80_000_000, 80_000_000, 80_000_000 - 10]
    counters = [counter for name, (_, _, _, counter) in told.items() if name not in ("before", "moving")]
    assert counters == sorted(counters)
    assert told["moving"][-1] == told["before"][-1] == 0
    assert told["frozen"][-1] == told["moved"][-1] == told["offset"][-1] + 10_000
    for sequence, status, page, counter in (each for name, each in told.items() if name not in ("moving", "no_page")):
        assert status == (0 if sequence else -1)
        assert not sequence or page == counter


@pytest.mark.row("H-51", "H-54", "E4")
def test_what_a_scale_carries_ends(hyperv_page: Path) -> None:
    """A line at a rate that is not quite its own has gone half a unit when a publish ends it, without a step."""
    rows = numbers(output(hyperv_page, "carried"))
    off = [each / 2**32 for _, _, each, _ in rows]
    assert [carries for carries, *_ in rows] == sorted((carries for carries, *_ in rows), reverse=True)
    assert rows[0][0] == 1
    assert rows[-1][0] == 0
    assert rows[-1][1] == rows[0][1] + 1
    assert -1 <= min(off) < max(off) <= 1.5
    assert {step for *_, step in rows} <= {0, 1}


@pytest.mark.row("H-50", "H-54")
def test_a_guest_tsc_that_begins_anew(hyperv_page: Path) -> None:
    """Where a guest's TSC passes 2**64 the counter goes on, and the next publish puts the page right."""
    told = {name: tuple(map(int, rest)) for name, *rest in map(str.split, output(hyperv_page, "wrap"))}
    near, beyond, again, later = (told[name] for name in ("near_the_end", "beyond", "again", "later"))
    assert abs(beyond[3] - near[3] - 20_000_000) <= 1
    assert again[0] == later[0] == near[0] + 1
    assert again[2] == again[3]
    assert again[3] - beyond[3] in (0, 1)
    assert later[2] == later[3]
    assert abs(later[3] - again[3] - 10_000_000) <= 1
