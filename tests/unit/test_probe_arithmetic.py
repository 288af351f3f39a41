"""What the probe says of a clock is true: on simulated CPUs, beside unbounded integers, and on this host's threads."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit import probe_oracle as oracle

pytestmark = pytest.mark.row("E18")

ROOT: Final = Path(__file__).parents[2]
PROBE: Final = ROOT / "pvclock" / "probe"
NATIVE: Final = ROOT / "tests" / "native"
HEADERS: Final = ("fenced_tsc", "measure", "offset_window", "pair_exchange", "step_search", "warp_cell")
WARNINGS: Final = ("-Wall", "-Wextra", "-Werror")
# As setup.py builds the image that runs on bare vCPUs.
BARE: Final = (
    *("-O2", "-ffreestanding", "-nostdlib", "-fno-pic", "-fno-pie", "-mno-red-zone", "-mgeneral-regs-only"),
    *("-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables"),
)
TRAPS: Final = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
HANG_S: Final = 300
ATTEMPTS: Final = 100

Result = dict[str, Any]
Measure = Callable[..., list[Result]]

needs_two_cpus = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="an exchange needs two CPUs: widen the affinity (taskset -c 0,1)"
)
i64s = st.integers(-(2**63), 2**63 - 1)


def compiled(folder: Path, name: str, *flags: str) -> Path:
    """Compile a harness of tests/native/, with further flags and files."""
    program = folder / name
    command = ["cc", "-std=c11", "-O2", *WARNINGS, f"-I{PROBE}", str(NATIVE / f"{name}.c"), *flags, "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def printed_by(program: Path, **options: str | int) -> list[Result]:
    """Run a harness, options as keywords; return the objects that it prints, one a line."""
    arguments = [each for name, value in options.items() for each in (f"--{name}", str(value))]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True, timeout=HANG_S)
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---- The headers, and the program that a bare image links. ----


@pytest.mark.parametrize("compiler", [("cc", "-std=c11", "-xc"), ("c++", "-std=c++17", "-xc++")])
def test_headers_compile(compiler: tuple[str, ...]) -> None:
    """Each header alone, as C11 and as C++17, without a warning."""
    for header in HEADERS:
        command = [*compiler, *WARNINGS, "-fsyntax-only", f"-I{PROBE}", "-"]
        subprocess.run(command, input=f'#include "{header}.h"\n', text=True, check=True)


def test_measurement_needs_no_library(tmp_path: Path) -> None:
    """Compiled for a bare image, it calls nothing that is not in it: no memcpy, no division of 128 bits."""
    measurement = tmp_path / "measure.o"
    subprocess.run(["cc", "-std=c11", *WARNINGS, *BARE, "-c", PROBE / "measure.c", "-o", measurement], check=True)
    done = subprocess.run(["nm", "--undefined-only", measurement], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ---- Simulated CPUs. ----


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the simulation, which traps where behaviour is undefined."""
    return compiled(tmp_path_factory.mktemp("probe"), "probe_simulation", *TRAPS)


def test_nothing_untrue_is_said_of_simulated_cpus(simulation: Path) -> None:
    """In 10^4 cases each: windows have the offset, warps are within it, clean lines no steps, steps their bounds."""
    (counts,) = printed_by(simulation, cases=10_000)
    untrue = ("excluded", "alarms", "warps_beyond", "false_steps", "missed_steps", "wrong_bounds", "never_told")
    assert {name: counts[name] for name in untrue} == dict.fromkeys(untrue, 0)
    said = ("with_offset", "found", "warps", "with_step", "floor_below_step")
    assert all(counts[name] > 1000 for name in said), counts


@pytest.mark.parametrize("broken", ["wrong-end", "early"])
def test_broken_twins_are_caught(simulation: Path, broken: str) -> None:
    """Bounds from the wrong readings, and a clock that is read too early, exclude offsets that are true."""
    (counts,) = printed_by(simulation, cases=200, broken=broken)
    assert counts["excluded"] > 100
    assert counts["alarms"] > 50
    assert counts["warps_beyond"] > 100 or broken == "wrong-end"  # the shared cell has no ends


# ---- Unbounded integers. ----


class Arithmetic:
    """The headers' functions, in a shared library."""

    def __init__(self, library: Path) -> None:
        self._functions = ctypes.CDLL(str(library))

    def window(self, rounds: list[tuple[int, int, int]]) -> tuple[int, int]:
        """Return low and high of an offset_window."""
        found = (ctypes.c_int64 * 2)()
        self._functions.window_of(self._array(rounds), ctypes.c_size_t(len(rounds)), found)
        return found[0], found[1]

    def warp(self, base: int, earlier: tuple[int, int], later: tuple[int, int]) -> tuple[int, int]:
        """Return by how much the later (CPU, reading) is less, and whose reading the cell has then."""
        found = (ctypes.c_int64 * 2)()
        readings = [(ctypes.c_uint(cpu), ctypes.c_int64(reading)) for cpu, reading in (earlier, later)]
        self._functions.warp_of(ctypes.c_int64(base), *readings[0], *readings[1], found)
        return found[0], found[1]

    def steps(
        self, hz: tuple[int, int], readings: list[tuple[int, int, int]], *, unslewed: bool, grain: int = 0
    ) -> list[int]:
        """Return what a step_search has in the end."""
        found = (ctypes.c_int64 * 11)()
        clock = *map(ctypes.c_uint64, hz), ctypes.c_bool(unslewed), ctypes.c_int64(grain)
        self._functions.steps_of(*clock, self._array(readings), ctypes.c_size_t(len(readings)), found)
        return list(found)

    def tsc_steps(self, reads: list[int]) -> list[int]:
        """Return what is told of the TSC itself: readings, floor, count, and the largest step back and when."""
        found = (ctypes.c_int64 * 7)()
        readings = (ctypes.c_uint64 * len(reads))(*reads)
        self._functions.tsc_steps_of(readings, ctypes.c_size_t(len(reads)), found)
        return list(found)

    @staticmethod
    def _array(triples: list[tuple[int, int, int]]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * (3 * len(triples)))(*(oracle.signed64(each) for triple in triples for each in triple))


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> Arithmetic:
    """Return the headers' functions."""
    return Arithmetic(compiled(tmp_path_factory.mktemp("probe"), "probe_arithmetic", "-shared", "-fPIC"))


@given(rounds=st.lists(st.tuples(i64s, i64s, i64s), max_size=5))
@example(rounds=[(-(2**63), 2**63 - 1, 0)])
def test_windows_are_exact(arithmetic: Arithmetic, rounds: list[tuple[int, int, int]]) -> None:
    """Also of a TSC that wraps."""
    assert arithmetic.window(rounds) == oracle.window(rounds)


@given(base=i64s, earlier=i64s, later=i64s, cpus=st.tuples(st.integers(0, 63), st.integers(0, 63)))
@example(base=0, earlier=2**63 - 1, later=-(2**63), cpus=(63, 0))
@example(base=5, earlier=7, later=7, cpus=(1, 2))
def test_warps_are_exact(arithmetic: Arithmetic, base: int, earlier: int, later: int, cpus: tuple[int, int]) -> None:
    """Between any two of 64 CPUs; the cell keeps the larger reading and names its reader."""
    warp = oracle.warp(base, earlier, later)
    assert arithmetic.warp(base, (cpus[0], earlier), (cpus[1], later)) == (warp, cpus[0] if warp else cpus[1])


@st.composite
def readings_of_a_line(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Return readings at 3 GHz of a clock in ns: steady until its rate is known, then stepped, slewed, or wide."""
    tsc, clock, readings = draw(st.integers(0, 2**64 - 1)), draw(st.integers(-(2**63), 2**63 - 1)), []
    slews = draw(st.sampled_from([(0,), (0, 0, 0, 900), (0, 40)]))
    steps = draw(st.sampled_from([(0,), (0, 0, 0, 0, 5_000, -5_000), (0, 0, 700, 20_000, 10**7, -(2**62))]))
    steady = draw(st.integers(14, 40))
    stepped = draw(st.integers(0, 80))  # while the rate is learned, or later
    for number in range(steady + draw(st.integers(0, 40))):
        is_steady = number < steady
        ticks = 31_000_000 if is_steady else draw(st.sampled_from([3_000, 60_000, 3_000_000, 31_000_000]))
        width = draw(st.sampled_from([90, 300] if is_steady else [90, 300, 600, 3_000_000]))
        tsc += ticks + width
        clock += (ticks + width) // 3
        clock += 40_000 if number == stepped else 0
        if not is_steady:
            clock += ticks // 3 * draw(st.sampled_from(slews)) // 10**6 + draw(st.sampled_from(steps))
        readings.append((tsc % 2**64, oracle.signed64(clock), (tsc + width) % 2**64))
    return readings


def assert_steps_are_exact(
    arithmetic: Arithmetic, hz: tuple[int, int], readings: list[tuple[int, int, int]], *, unslewed: bool, grain: int = 0
) -> None:
    """The header finds what the oracle does, to the unit."""
    search = oracle.StepSearch(*hz, unslewed=unslewed, grain=grain)
    for reading in readings:
        search.add(oracle.Reading(*reading))
    search.end()
    expected = [search.reads, search.floor, len(search.steps)]
    for step in (search.largest(1), search.largest(-1)):
        expected += [1, step.low, step.high, oracle.signed64(step.at_tsc)] if step else [0] * 4
    assert arithmetic.steps(hz, readings, unslewed=unslewed, grain=grain) == expected


@given(readings=readings_of_a_line(), unslewed=st.booleans(), grain=st.sampled_from([0, 280, 4_000_000]))
def test_steps_are_exact(
    arithmetic: Arithmetic, readings: list[tuple[int, int, int]], *, unslewed: bool, grain: int
) -> None:
    """On lines with steps, slews and wide readings."""
    assert_steps_are_exact(arithmetic, (3 * 10**9, 10**9), readings, unslewed=unslewed, grain=grain)


MS = 3_000_000
"""Ticks at 3 GHz."""


def steady_line(readings: int, ms: int = 11) -> list[tuple[int, int, int]]:
    """Return readings of a clock in ns without a step."""
    return [(at * ms * MS, at * ms * 10**6, at * ms * MS + 90) for at in range(readings)]


def moved(
    readings: list[tuple[int, int, int]], at: int, clock_ns: int = 0, ticks: int = 0
) -> list[tuple[int, int, int]]:
    """Return them with the clock, or the TSC, moved from the reading `at` on."""
    later = [(before + ticks, clock + clock_ns, after + ticks) for before, clock, after in readings[at:]]
    return readings[:at] + later


@pytest.mark.parametrize("at", [1, 8, 15, 16, 30])
def test_a_step_while_the_rate_is_learned_is_found(arithmetic: Arithmetic, at: int) -> None:
    """A second back, in the first 150 ms or later: found once, with its size in its bounds."""
    found = arithmetic.steps((3 * 10**9, 10**9), moved(steady_line(40), at, clock_ns=-(10**9)), unslewed=True)
    assert (found[2], found[7]) == (1, 1)
    assert found[8] <= -(10**9) <= found[9]


def test_what_is_not_decided_at_the_end_is_in_the_floor(arithmetic: Arithmetic) -> None:
    """5 us at the last reading may be a slew's beginning, or a step: none is told, and none so small is excluded."""
    found = arithmetic.steps((3 * 10**9, 10**9), moved(steady_line(40), 39, clock_ns=5_000), unslewed=True)
    assert found[2] == 0
    assert found[1] >= 5_000


def test_a_tsc_that_went_back_leaves_nothing_known_of_other_clocks(arithmetic: Arithmetic) -> None:
    """The clock may have done anything there: no step, and a floor that says so."""
    found = arithmetic.steps((3 * 10**9, 10**9), moved(steady_line(40), 30, ticks=-500 * MS), unslewed=True)
    assert (found[1], found[2]) == (2**63 - 1, 0)


def test_a_tsc_that_goes_back_is_told_by_the_largest(arithmetic: Arithmetic) -> None:
    """Each time counts; forward it may go as far as it likes, and 2^64 is followed by 0."""
    reads = [2**64 - 5, 5, 1000, 400, 10**15, 10**15 - 5000, 10**15]
    assert arithmetic.tsc_steps(reads) == [7, 0, 2, 1, -5000, -5000, 10**15 - 5000]


@pytest.mark.parametrize("tick_ms", [1, 4, 10])
def test_a_clock_of_ticks_steps_only_beyond_them(arithmetic: Arithmetic, tick_ms: int) -> None:
    """Linux on clocksource jiffies stands still between ticks: no step is seen in that, and one of a second is."""
    tick = tick_ms * 10**6
    readings = [(at * MS // 20, at * 50_000 // tick * tick, at * MS // 20 + 90) for at in range(20_000)]
    assert arithmetic.steps((3 * 10**9, 10**9), readings, unslewed=False, grain=tick)[2] == 0
    stepped = moved(readings, 15_000, clock_ns=-(10**9))
    assert arithmetic.steps((3 * 10**9, 10**9), stepped, unslewed=False, grain=tick)[2] == 1


@given(
    hz=st.tuples(st.integers(1, 10**10), st.integers(1, 10**10)),
    readings=st.lists(st.tuples(st.integers(0, 2**64 - 1), i64s, st.integers(0, 2**64 - 1)), max_size=40),
)
def test_no_reading_overflows(
    arithmetic: Arithmetic, hz: tuple[int, int], readings: list[tuple[int, int, int]]
) -> None:
    """Whatever a clock and a TSC may say."""
    assert_steps_are_exact(arithmetic, hz, readings, unslewed=False)


@pytest.mark.parametrize(("slew_ppm", "step_ns", "count"), [(60, 0, 0), (0, 3_000, 1)])
def test_a_slew_that_ends_soon_after_a_pause_is_no_step(
    arithmetic: Arithmetic, slew_ppm: int, step_ns: int, count: int
) -> None:
    """It was too small to be seen from reading to reading, and was there before the pause; a step as large is found."""
    ms, million, tsc, clock, readings = 3_000_000, 10**6, 0, 0, []
    slewed = range(20, 81)  # 60 readings, and the pause
    for number, ticks in enumerate([11 * ms] * 20 + [ms] * 60 + [50 * ms] + [ms] * 100):
        tsc += ticks
        clock += ticks // 3 + (ticks // 3 * slew_ppm // million if number in slewed else 0)
        clock += step_ns if number == 80 else 0
        readings.append((tsc, clock, tsc + 90))
    found = arithmetic.steps((3 * 10**9, 10**9), readings, unslewed=True)
    assert found[2] == count
    assert found[1] > 3_000 or found[2]


# ---- This host's threads. ----


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Return what runs measure.c on threads."""
    program = compiled(tmp_path_factory.mktemp("probe"), "probe_threads", str(PROBE / "measure.c"), "-pthread")
    return lambda **options: printed_by(program, **options)


def clocks_of(result: Result) -> Iterator[Result]:
    """Give the clocks of a result that are compared between CPUs."""
    return (result[name] for name in ("tsc", "monotonic"))


def windows(clock: Result) -> list[tuple[int, int]]:
    """Return the windows of all pairs and slices in which a round ended."""
    return [(low, high) for pair in clock["pairs"] for _, low, high, rounds in pair["slices"] if rounds]


def assert_no_alarm(result: Result) -> None:
    """No warp, no step, and no window that excludes 0."""
    for clock in (*clocks_of(result), result["monotonic_raw"]):
        assert clock["warps"] == []
        assert (clock["steps"]["count"], clock["steps"]["forward"], clock["steps"]["backward"]) == (0, None, None)
        assert all(low <= 0 <= high for low, high in windows(clock))


@pytest.mark.parametrize(("threads", "runs"), [(1, 12), (2, 12), (3, 3)])
def test_clean_runs_give_no_alarm(measure: Measure, threads: int, runs: int) -> None:
    """Some dozens, however busy the machine is; what was read is there, and in order."""
    for result in measure(milliseconds=40, runs=runs, threads=threads):
        assert_no_alarm(result)
        for clock in clocks_of(result):
            assert len(clock["pairs"]) == threads * (threads - 1) // 2
            assert clock["cell_reads"] > 0
            assert clock["steps"]["reads"] > 9 * 32
            assert len(clock["samples"]) == 9
            assert all(before < after for before, _, after in clock["samples"])
            assert all(a[2] < b[0] and a[1] < b[1] for a, b in pairwise(clock["samples"]))


@pytest.mark.long
def test_a_thousand_clean_runs_give_no_alarm(measure: Measure) -> None:
    """Nor does one in 10^3, nor in some that last so long that rates are known and steps are looked for."""
    for milliseconds, runs in ((20, 1000), (800, 20)):
        results = measure(milliseconds=milliseconds, runs=runs)
        assert len(results) == runs
        for result in results:
            assert_no_alarm(result)


@needs_two_cpus
@pytest.mark.parametrize("added_ns", [200, -200, 500, 3_000, -100_000])
def test_an_added_offset_is_found(measure: Measure, added_ns: int) -> None:
    """Windows have it and warps are within it, always; a window narrower than it proves it, and one is.

    How narrow they are is the machine's affair at the time: so they are tried until one is.
    """
    proofs = 0
    for _ in range(ATTEMPTS):
        (result,) = measure(milliseconds=40, add=f"1:{added_ns}")
        for clock in clocks_of(result):
            added = added_ns * clock["hz"] / 1e9
            assert all(low <= added + 1 and added - 1 <= high for low, high in windows(clock))
            assert all((low > 0 or high < 0) or high - low > abs(added) - 2 for low, high in windows(clock))
            for warp in clock["warps"]:
                assert (warp["from"], warp["to"]) == ((1, 0) if added > 0 else (0, 1))
                assert warp["largest"] <= abs(added) + 1
            proofs += len(clock["warps"]) + sum(low > 0 or high < 0 for low, high in windows(clock))
        if proofs:
            break
    assert proofs


def test_a_step_is_found(measure: Measure) -> None:
    """Of what the first thread reads, within its bounds, if it is beyond the floor; an hour is."""
    for step_ns in (-3_600_000_000_000, 3_600_000_000_000, 50_000, -2_000):
        (result,) = measure(milliseconds=640, threads=1, step=step_ns)
        for steps in (result["monotonic"]["steps"], result["monotonic_raw"]["steps"]):
            found, other = (steps["forward"], steps["backward"])[:: 1 if step_ns > 0 else -1]
            assert other is None
            assert found is not None or steps["floor"] >= abs(step_ns)
            assert found is None or found[0] <= step_ns <= found[1]
            assert abs(step_ns) < 10**12 or steps["count"] == 1
        assert result["monotonic_raw"]["pairs"] == []


def test_of_a_clock_that_is_not_slewed_less_is_a_step(measure: Measure) -> None:
    """The floor is lower where NTP's +-500 ppm need not be allowed for."""
    (result,) = measure(milliseconds=1000, threads=1)
    floors = [result[name]["steps"]["floor"] for name in ("monotonic_raw", "monotonic")]
    assert 0 < floors[0] < floors[1] < 10**9


@pytest.mark.parametrize("absent", [0, 1])
def test_a_cpu_that_never_comes_ends_nothing_but_its_rounds(measure: Measure, absent: int) -> None:
    """The leader, or the other one: the measurement ends, and no round of theirs is in it."""
    (result,) = measure(milliseconds=40, absent=absent)
    for clock in clocks_of(result):
        assert windows(clock) == []
        assert clock["cell_reads"] > 0
        assert (clock["steps"]["reads"] > 0) == (absent != 0)


@pytest.mark.parametrize(("threads", "pairs"), [(16, 120), (17, 16), (64, 63)])
def test_of_many_cpus_each_is_compared_with_the_first(measure: Measure, threads: int, pairs: int) -> None:
    """All pairs of 16 CPUs; of more, those with the first.  A plan of no time ends at once."""
    (result,) = measure(milliseconds=0, threads=threads)
    assert_no_alarm(result)
    for clock in clocks_of(result):
        found = {tuple(pair["cpus"]) for pair in clock["pairs"]}
        assert len(found) == len(clock["pairs"]) == pairs
        assert all(0 <= a < b < threads and (a == 0 or threads <= 16) for a, b in found)
