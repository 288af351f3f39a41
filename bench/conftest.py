"""What the benchmarks share: twins, the host's TSC, and the closing table."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.c_twins import Twins, compile_empty_call, compile_twins
from bench.comparison import Benchmark, Comparison, Figure, table
from pvclock import PvclockError
from pvclock.host.this_host import measure_tsc_hz
from pvclock.kvm import Kvm, open_kvm

FIGURES = pytest.StashKey[list[Figure]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin with no figures."""
    config.stash[FIGURES] = []


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark, whose rounds hold many operations
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the closing table: the product's times, and the twins' of the same run."""
    if figures := config.stash[FIGURES]:
        terminalreporter.section("beside their twins: medians of one operation")
        for line in table(figures):
            terminalreporter.write_line(line)


@pytest.fixture
def comparison(benchmark: Benchmark, request: pytest.FixtureRequest) -> Comparison:
    """Return the benchmark with a place for its twin."""
    group = request.path.stem.removeprefix("test_")
    return Comparison(benchmark, group, request.config.stash[FIGURES])


@pytest.fixture(scope="session")
def tsc_hz() -> int:
    """Return the frequency of the host's TSC."""
    return measure_tsc_hz()


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder to compile into; without a compiler there is nothing to compare with."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the twins: apt-get install gcc libc6-dev")
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="session")
def twins(native: Path) -> Twins:
    """Return the twins in C."""
    return compile_twins(native)


@pytest.fixture(scope="session")
def nothing(native: Path) -> Callable[..., None]:
    """Return an extension's function that does nothing."""
    return compile_empty_call(native)


@pytest.fixture(scope="session")
def kvm() -> Iterator[Kvm]:
    """Return /dev/kvm, or skip and say what is missing and how to get it."""
    try:
        opened = open_kvm()
    except PvclockError as obstacle:
        pytest.skip(str(obstacle))
    with opened:
        yield opened
