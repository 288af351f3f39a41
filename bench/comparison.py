"""One benchmark beside its twin: both measured in turn in one run, and their figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple, ParamSpec, Protocol

__all__ = ["Benchmark", "Comparison", "Figure", "table"]

P = ParamSpec("P")

NS_PER_S = 1e9
ROUNDS = 25


class Benchmark(Protocol):
    """The part of pytest-benchmark's fixture that is used here; its own class is not annotated."""

    enabled: bool
    extra_info: dict[str, object]
    group: str | None

    def pedantic(
        self,
        target: Callable[..., object],
        *,
        setup: Callable[[], object] | None = None,
        teardown: Callable[..., object] | None = None,
        rounds: int = 1,
        warmup_rounds: int = 0,
    ) -> object:
        """Measure `target`, called with the (args, kwargs) that `setup` returns."""


class Figure(NamedTuple):
    """The product's time, in ns an operation, and the twin's in the same run."""

    title: str
    ns: float
    twin: str
    twin_ns: float
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times the twin's time; 0 for a twin that took none."""
        return self.ns / self.twin_ns if self.twin_ns else 0.0


class Comparison:
    """Measures one benchmark and keeps its figures, for the closing table and for --benchmark-json."""

    def __init__(self, benchmark: Benchmark, group: str, figures: list[Figure]) -> None:
        benchmark.group = group
        self.benchmark = benchmark
        self._figures = figures
        self._own: list[Figure] = []

    def measure(
        self,
        title: str,
        product: Callable[..., object],
        twin: tuple[str, Callable[[], object]],
        *,
        operations: int,
        rounds: int = ROUNDS,
        prepare: Callable[[], tuple[object, ...]] = tuple,
        finish: Callable[..., object] | None = None,
        parts: tuple[str, int] | None = None,
    ) -> None:
        """Run the twin and the product in turn, `rounds` times, and record their medians.

        operations: in one call of either.  prepare, finish: not timed; prepare returns the product's arguments, which
        finish gets too.  parts: what an operation consists of, and how many of them.
        """
        product_seconds: list[float] = []
        twin_seconds: list[float] = []
        run_twin = timed(twin[1], twin_seconds)

        def setup() -> tuple[tuple[object, ...], dict[str, object]]:
            run_twin()
            return prepare(), {}

        self.benchmark.pedantic(
            timed(product, product_seconds), setup=setup, teardown=finish, rounds=rounds, warmup_rounds=1
        )
        if self.benchmark.enabled:
            ns, twin_ns = (median(each[1:]) * NS_PER_S / operations for each in (product_seconds, twin_seconds))
            note = f"{readable(ns / parts[1])} a {parts[0]}" if parts else ""
            self.benchmark.extra_info["operations"] = operations
            self.record(Figure(title, ns, twin[0], twin_ns, note))

    def record(self, *figures: Figure) -> None:
        """Keep the figures; the first one's ratio is the benchmark's."""
        if not self.benchmark.enabled:
            return  # it ran once, to see that it works
        self._figures += figures
        self._own += figures
        self.benchmark.extra_info["ratio"] = self._own[0].ratio
        self.benchmark.extra_info["figures"] = [{**each._asdict(), "ratio": each.ratio} for each in self._own]


def timed(function: Callable[P, object], seconds: list[float]) -> Callable[P, None]:
    """Return `function` with a stopwatch: each call's time goes to the end of `seconds`."""

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        begin = time.perf_counter()
        function(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)

    return call


def readable(ns: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, factor in (("ns", 1.0), ("us", 1e3), ("ms", 1e6)):
        if ns < 1000 * factor:
            return f"{ns / factor:.3g} {unit}"
    return f"{ns / 1e9:.3g} s"


def table(figures: list[Figure]) -> list[str]:
    """Return the closing table, a line for each figure."""
    rows = [("", "reached", "twin", "its time", "ratio", ""), *map(cells, figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def cells(figure: Figure) -> tuple[str, ...]:
    """Return a line of the closing table."""
    ratio = f"{figure.ratio:.2f}" if figure.ratio < 100 else f"{figure.ratio:.0f}"
    return figure.title, readable(figure.ns), figure.twin, readable(figure.twin_ns), ratio, figure.note
