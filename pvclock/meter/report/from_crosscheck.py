"""The document of `pvclock crosscheck`: each row with its rule, and the clocks' rates and steps as intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from pvclock.meter.report.fields import Fields
from pvclock.meter.report.model import Axis, Interval, Intervals, Part, Section, Standing, Table, Unit
from pvclock.meter.watch.words import counted

__all__ = ["crosscheck_section"]

ALL_THREE: Final = ("engine", "kernel", "qemu")
NAMES: Final = {"engine": "engine", "kernel": "kernel", "qemu": "QEMU"}
RATES: Final = {"rate_ppb": "by its TSC", "nominal_ppb": "by raw, nominal", "steered_ppb": "by raw, steered"}
LEAST, MOST = "went_on_least_ns", "went_on_most_ns"
REASONS_SHOWN: Final = 20


def crosscheck_section(source: str, result: Fields) -> Section:
    """What a crosscheck's result tells, with or without the life cycle."""
    checks = list(result.all_fields("checks"))
    reference = list(result.all_fields("reference_time"))
    lifecycle = list(result.all_fields("lifecycle"))
    every = [*checks, *reference, *lifecycle]
    wrong = [row for row in every if not row.truth("ok")]
    parts: list[Part | None] = [
        _rates(checks),
        _table("The same guest on each", checks, ALL_THREE),
        _table("Hyper-V's reference time", reference, ("engine", "qemu")),
        _steps(lifecycle),
        _went_on(lifecycle),
        *_operations(lifecycle),
        _rules(every),
    ]
    title = "Cross-check of a guest's life" if lifecycle else "Cross-check of three clocks"
    verdict, standing = _verdict(every, wrong)
    told = tuple(part for part in parts if part is not None)
    return Section(title, source, verdict, standing, tuple(_sentences(result, wrong)), told)


def _verdict(every: Sequence[Fields], wrong: Sequence[Fields]) -> tuple[str, Standing]:
    if not every:
        return "There is no row in it.", Standing.OPEN
    if not wrong:
        return f"All is as it should be, in {counted(len(every), 'row')}.", Standing.GOOD
    verb = "disagrees" if len(wrong) == 1 else "disagree"
    return f"{len(wrong)} of {counted(len(every), 'row')} {verb}: {_name(wrong[0])}.", Standing.BAD


def _sentences(result: Fields, wrong: Sequence[Fields]) -> Iterator[str]:
    yield f"Each guest had {counted(result.whole('vcpus'), 'vCPU')}."
    yield from (f"{_name(row)}: {row.text('why')}" for row in wrong[:REASONS_SHOWN])
    if len(wrong) > REASONS_SHOWN:
        yield f"{len(wrong) - REASONS_SHOWN} more disagree."
    if (why := result.text_or_none("why_no_hyperv")) is not None:
        yield f"{why}."


def _name(row: Fields) -> str:
    operation = row.text_or_none("operation")
    return f"{operation}: {row.text('name')}" if operation else row.text("name")


def _table(title: str, rows: Sequence[Fields], clocks: Sequence[str]) -> Table | None:
    if not rows:
        return None
    headings = ("row", *(NAMES[clock] for clock in clocks))
    texts = tuple(_row(row, clocks) for row in rows)
    return Table(title, headings, texts, tuple(_standing(row) for row in rows))


def _row(row: Fields, clocks: Sequence[str]) -> tuple[str, ...]:
    cells = (row.fields(clock).text("text") for clock in clocks)
    return row.text("name"), *cells


def _rules(rows: Iterable[Fields]) -> Table | None:
    """The rule of each row, in a table of its own, for they are long; of a life cycle with its operations."""
    operations: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        place = operations.setdefault((row.text("name"), row.text("why")), [])
        place += [operation] if (operation := row.text_or_none("operation")) else []
    if not operations:
        return None
    if any(operations.values()):
        told = tuple((name, "; ".join(those), why) for (name, why), those in operations.items())
        return Table("Rules", ("row", "operations", "rule"), told)
    return Table("Rules", ("row", "rule"), tuple(operations))


def _standing(row: Fields) -> Standing:
    return Standing.GOOD if row.truth("ok") else Standing.BAD


def _operations(rows: Iterable[Fields]) -> Iterator[Table | None]:
    """A table an operation, in their order."""
    by_operation: dict[str, list[Fields]] = {}
    for row in rows:
        by_operation.setdefault(row.text("operation"), []).append(row)
    for operation, found in by_operation.items():
        yield _table(f"{operation[:1].upper()}{operation[1:]}", found, ALL_THREE)


# Numbers


def _rates(rows: Sequence[Fields]) -> Intervals | None:
    """The clocks' rates, from the cells that have one; a cell has no bound of its own: the row's rule does."""
    found = []
    for row in rows:
        for clock in ALL_THREE:
            values = row.fields(clock).fields("values")
            for key, how in RATES.items():
                if (ppb := values.number_or_none(key)) is not None:
                    bound_ppb = values.number_or_none("bound_ppb") or 0.0
                    name = f"{NAMES[clock]}, {how}"
                    found.append(Interval(name, ppb - bound_ppb, ppb + bound_ppb, ppb, _standing(row)))
    note = "How far two may differ is the rule of their row, below."
    return Intervals("Rates", Axis("Faster than nominal", Unit.PPB), tuple(found), note) if found else None


def _steps(rows: Sequence[Fields]) -> Intervals | None:
    """By how much each clock stepped, over its vCPUs."""
    found = []
    for row, name, values in _cells(rows, "steps_ns"):
        steps = values.numbers("steps_ns")
        if steps:
            found.append(Interval(name, min(steps), max(steps), standing=_standing(row)))
    axis, note = Axis("Step against the TSC", Unit.NS), "From the least vCPU's to the greatest's."
    return Intervals("Steps against the TSC", axis, tuple(found), note) if found else None


def _went_on(rows: Sequence[Fields]) -> Intervals | None:
    """How far guest time went on while no vCPU ran, between its bounds."""
    found = []
    for row, name, values in _cells(rows, LEAST):
        low, high = sorted((values.number(LEAST), values.number(MOST)))
        found.append(Interval(name, low, high, standing=_standing(row)))
    note = (
        "How far the guest's clock went on while no vCPU ran; 0 is within where the clock was stopped with its vCPUs."
    )
    axis = Axis("Guest time meanwhile", Unit.NS)
    return Intervals("Guest time while no vCPU ran", axis, tuple(found), note) if found else None


def _cells(rows: Iterable[Fields], key: str) -> Iterator[tuple[Fields, str, Fields]]:
    """(row, name, values) of each cell that has that number."""
    for row in rows:
        for clock in ALL_THREE:
            values = row.fields(clock).fields("values")
            if key in values:
                yield row, f"{row.text('operation')}: {NAMES[clock]}", values
