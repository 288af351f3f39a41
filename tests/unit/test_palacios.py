"""Palacios' virtual time: each trap of the seed beside what is decided here, and the exact model."""

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, HostTsc, RangeError, StateError
from pvclock.compat.palacios import PalaciosTime, TimeOptions, time_options

HOST_KHZ = 2_596_132
START = HostTsc(10**12)
UNSLAVED = TimeOptions(slaved=False)
KHZ = st.integers(1, HOST_KHZ)
TICKS = st.integers(0, 2**40)


def started(options: TimeOptions | None = None, *, khz: int | None = None, seed: bool = False) -> PalaciosTime:
    """One core, started at START."""
    time = PalaciosTime(HOST_KHZ, [khz], options=options, seed=seed)
    time.start(0, START)
    return time


def after(ticks: int) -> HostTsc:
    """The host TSC so many ticks after the start."""
    return HostTsc(START + ticks)


# The traps


@pytest.mark.row("P-08")
@given(first=TICKS, second=TICKS)
def test_t14_an_unslaved_advance_without_cycles(first: int, second: int) -> None:
    """The seed adds nothing, since it overwrites the stamp before it subtracts; as decided, what passed is added."""
    seed, decided = started(seed=True), started(UNSLAVED)
    seed.follow(slaved=False)
    for ticks in (first, first + second):
        assert seed.advance(0, after(ticks)) == 0
        assert decided.advance(0, after(ticks)) == ticks
    assert seed.advance(0, after(first + second), 17) == 17


@pytest.mark.row("P-02", "P-09", "P-10")
def test_t15_slaving_is_forced_on() -> None:
    """In the seed offset and skip refuse whatever was configured; as decided they work where time is unslaved."""
    seed, decided = started(UNSLAVED, seed=True), started(UNSLAVED)
    assert (seed.slaved, decided.slaved) == (True, False)
    for slaved in (seed, started()):
        with pytest.raises(StateError, match=r"offset_time.*slaved.*none"):
            slaved.offset_time(0, 5)
        with pytest.raises(StateError, match=r"skip_time.*slaved.*none"):
            slaved.skip_time(0, after(10))
        assert slaved.advance(0, after(10)) == 10
    decided.advance(0, after(40))
    decided.offset_time(0, 5)
    decided.skip_time(0, after(100))
    assert decided.advance(0, after(130)) == 40 + 5 + 30


@pytest.mark.row("P-03", "P-20", "P-21")
@given(khz=KHZ, ticks=TICKS)
def test_t16_the_frequency_ratio(khz: int, ticks: int) -> None:
    """The seed's cycles are the host's and the hypercall alone says `khz`; as decided they run at `khz`, exactly."""
    seed, decided = started(khz=khz, seed=True), started(khz=khz)
    assert seed.hypercall(0, 0xD000, START) == decided.hypercall(0, 0xD000, START) == khz
    assert seed.advance(0, after(ticks)) == ticks
    assert decided.advance(0, after(ticks)) == ticks * khz // HOST_KHZ
    assert [time.rates[0].ratio for time in (seed, decided)] == [1, Fraction(khz, HOST_KHZ)]


@pytest.mark.row("P-02", "P-08")
@given(factor=st.integers(2, 1000), ticks=TICKS)
def test_t17_dilation_of_the_slaved_path(factor: int, ticks: int) -> None:
    """The seed does not apply its dilation, not even one that a debugger sets; as decided it is applied, exactly."""
    options = time_options(dilation=factor)
    seed, decided = started(options, seed=True), started(options)
    assert [time.dilation for time in (seed, decided)] == [1, Fraction(1, factor)]
    seed.follow(slaved=True, dilation=Fraction(1, factor))
    assert seed.advance(0, after(ticks)) == ticks
    assert decided.advance(0, after(ticks)) == ticks // factor


@pytest.mark.row("P-01", "P-16")
@pytest.mark.parametrize("is_seed", [True, False])
@given(value=st.integers(0, 2**64 - 1), ticks=TICKS)
def test_t18_a_tsc_write_moves_the_offset_only(is_seed: bool, value: int, ticks: int) -> None:
    """In the seed and as decided: RDTSC goes on from what was written, and guest cycles know nothing of it."""
    time = started(seed=is_seed)
    assert time.advance(0, after(10)) == time.guest_tsc(0) == 10
    time.write_tsc(0, value)
    assert (time.guest_tsc(0), time.cycles(0)) == (value, 10)
    assert time.advance(0, after(10 + ticks)) == 10 + ticks
    rdtsc = time.rdtsc(0)
    assert rdtsc.rdx << 32 | rdtsc.rax == time.guest_tsc(0) == (value + ticks) % 2**64


# The model


@pytest.mark.row("P-04")
def test_frequencies_that_cannot_be() -> None:
    """A core without a frequency, or with 0 or more than the host has, gets the host's, and its entry says why."""
    asked = [None, 0, -5, HOST_KHZ + 1, HOST_KHZ, 1]
    rates = PalaciosTime(HOST_KHZ, asked).rates
    assert [(rate.khz, rate.ratio) for rate in rates] == [(HOST_KHZ, 1)] * 5 + [(1, Fraction(1, HOST_KHZ))]
    for core, khz in enumerate(asked[:4]):
        assert f"core {core}" in rates[core].why
        assert khz is None or f"{khz} kHz" in rates[core].why
        assert f"the host's {HOST_KHZ} kHz" in rates[core].why
    assert [rate.why for rate in rates[4:]] == ["", ""]
    with pytest.raises(RangeError, match="0 kHz"):
        PalaciosTime(0, [1])


@pytest.mark.row("P-03", "P-21")
def test_each_core_has_its_own_frequency() -> None:
    """Cores run side by side, each at its own exact rate; Palacios' later ratio is off by hundreds of ppm."""
    cores_khz = (2_000_895, 1_298_066, 999_999)
    exact, later = PalaciosTime(HOST_KHZ, cores_khz), PalaciosTime(HOST_KHZ, cores_khz, ratio="palacios")
    for core, khz in enumerate(cores_khz):
        exact.start(core, START)
        assert exact.advance(core, after(HOST_KHZ * 1000)) == khz * 1000
    off_ppm = [round((later.rates[core].ratio / exact.rates[core].ratio - 1) * 10**6) for core in range(3)]
    assert off_ppm == [-399, 0, -463]


@pytest.mark.row("P-03", "P-07")
def test_each_core_has_its_own_state() -> None:
    """Cycles, TSC offset and stamps are one core's: no start, run or TSC write of another moves them."""
    time = PalaciosTime(HOST_KHZ, [None, HOST_KHZ // 2], options=UNSLAVED)
    time.start(0, START)
    time.enter(0, after(10))
    time.exit(0, after(40))
    time.write_tsc(0, 1000)
    first = (30, 1000, (START, after(10), after(40)))
    assert (time.cycles(0), time.guest_tsc(0), time.stamps(0)) == first
    time.start(1, after(100))
    assert (time.cycles(1), time.guest_tsc(1), time.stamps(1)) == (0, 0, (after(100), 0, after(100)))
    time.enter(1, after(200))
    time.exit(1, after(260))
    time.write_tsc(1, 7)
    assert (time.cycles(1), time.guest_tsc(1), time.stamps(1)) == (30, 7, (after(100), after(200), after(260)))
    assert (time.cycles(0), time.guest_tsc(0), time.stamps(0)) == first


def complain_of(options: TimeOptions, *patterns: str) -> bool:
    """Is there a complaint for each of the patterns, in this order, and none else?"""
    words = [f"{severity}: {text}" for severity, text in options.complaints]
    return len(words) == len(patterns) and all(map(re.match, patterns, words))


@pytest.mark.row("P-05")
def test_time_options() -> None:
    """The legal options, in any case of letters, mean what they say and are not complained about."""
    assert time_options() == time_options("HOST", "Guest") == TimeOptions()
    assert time_options("none") == TimeOptions(slaved=False)
    assert time_options("host", "host") == TimeOptions(passthrough=True)
    assert time_options(dilation=10) == TimeOptions(dilation=Fraction(1, 10))


@pytest.mark.row("P-05")
@pytest.mark.parametrize("written", [str.lower, str.upper, str.title, str.swapcase])
@pytest.mark.parametrize("source", [None, "host", "none"])
@pytest.mark.parametrize("tsc", [None, "host", "guest"])
def test_letters_are_of_any_case(source: str | None, tsc: str | None, written: Callable[[str], str]) -> None:
    """Each option means and complains of the same in lower case and in any other, the bug of Palacios included."""
    in_case = (None if source is None else written(source), None if tsc is None else written(tsc))
    for palacios in (False, True):
        plain = time_options(source, tsc, palacios=palacios)
        other = time_options(in_case[0], in_case[1], palacios=palacios)
        assert other[:3] == plain[:3]
        assert len(other.complaints) == len(plain.complaints)


@pytest.mark.row("P-06")
def test_options_that_are_not_legal() -> None:
    """Each is ignored, and named in an error of its own."""
    unslaved = time_options("none", dilation=7)
    assert (unslaved.slaved, unslaved.dilation) == (False, Fraction(1))
    assert complain_of(unslaved, r"error: .*dilation 7 .*slaved", "error: .*7 did not result in actual dilation")
    for dilation in (1, 0, -3):
        ignored = time_options(dilation=dilation)
        assert (ignored.slaved, ignored.dilation) == (True, Fraction(1))
        assert complain_of(ignored, f"error: .*{dilation} did not result in actual dilation")
    passed = time_options("none", "host")
    assert (passed.slaved, passed.passthrough) == (False, False)
    assert complain_of(passed, "error: .*host's TSC .*not slaved")
    unknown = time_options("ntp", "fast")
    assert (unknown.slaved, unknown.passthrough) == (True, False)
    assert complain_of(unknown, "error: .*source 'ntp' is unknown", "error: .*mode 'fast' is unknown")


@pytest.mark.row("P-06")
def test_palacios_looks_at_the_wrong_variable() -> None:
    """Where it means the TSC mode it tests the source: a legal mode is unknown to it, and an unknown one passes."""
    assert complain_of(time_options("host", "guest", palacios=True), "error: .*mode 'guest' is unknown")
    assert complain_of(time_options("host", "guest"))
    assert complain_of(time_options("guest", "fast", palacios=True), "error: .*source 'guest' is unknown")


@pytest.mark.row("P-06")
def test_dilation_is_legal_only_when_slaved() -> None:
    """Later changes are refused, too, and leave everything as it was."""
    time = started(UNSLAVED)
    with pytest.raises(ConfigError, match=r"1/2.*not slaved"):
        time.follow(slaved=False, dilation=Fraction(1, 2))
    with pytest.raises(RangeError, match=r"dilation.* 0"):
        time.follow(slaved=True, dilation=Fraction(0))
    passed = started(time_options(tsc="host"))
    with pytest.raises(ConfigError, match="passed through"):
        passed.follow(slaved=False)
    assert (time.slaved, time.dilation, passed.slaved) == (False, Fraction(1), True)


@pytest.mark.row("P-19")
def test_passthrough_and_dilation() -> None:
    """Asked for together, passthrough is cancelled with a warning, by the option and by a core's frequency."""
    options = time_options("host", "host", 2)
    assert (options.passthrough, options.dilation) == (False, Fraction(1, 2))
    assert complain_of(options, "warning: .*passthrough cancelled.* 1/2")
    slow = started(time_options(tsc="host"), khz=HOST_KHZ // 2)
    controls = slow.controls(0, after(4))
    assert (controls.passthrough, controls.traps_rdtsc) == (False, True)
    assert re.search("passthrough cancelled.* 1/2", controls.warning)


@pytest.mark.row("P-18")
@given(ticks=TICKS, value=st.integers(0, 2**64 - 1))
def test_hardware_offset(ticks: int, value: int) -> None:
    """It is guest TSC - host TSC, and 0 in passthrough; RDTSC is trapped if ratio or dilation is not 1, by no seed."""
    time = started(UNSLAVED)
    time.write_tsc(0, value)
    time.advance(0, after(ticks), ticks // 2)
    offset = (value + ticks // 2 - after(ticks)) % 2**64
    assert time.controls(0, after(ticks))[:3] == (offset, False, False)
    assert started(time_options(tsc="host")).controls(0, after(ticks))[:3] == (0, False, True)
    for options, khz in ((time_options(dilation=3), None), (None, 1000)):
        assert started(options, khz=khz).controls(0, START).traps_rdtsc
        assert not started(options, khz=khz, seed=True).controls(0, START).traps_rdtsc


@pytest.mark.row("P-07")
@given(ticks=TICKS)
def test_start(ticks: int) -> None:
    """A core begins with 0 cycles at whatever host TSC, and the host's uptime never counts, nor in the seed."""
    time = PalaciosTime(HOST_KHZ, [None, None], options=UNSLAVED)
    with pytest.raises(StateError, match=r"core 1.*not started"):
        time.enter(1, START)
    time.start(0, START)
    assert time.cycles(0) == 0
    assert time.advance(0, after(ticks)) == ticks
    time.start(0, after(ticks))
    assert time.advance(0, after(ticks)) == 0
    assert started(seed=True).advance(0, START) == 0
    with pytest.raises(RangeError, match=r"core 2.*0 to 1"):
        time.start(2, START)


@pytest.mark.row("P-07", "P-11")
@pytest.mark.parametrize("is_seed", [False, True])
def test_stamps_of_a_core(is_seed: bool) -> None:
    """Initial and pause stamp are now at the start, the enter stamp 0, of that core alone, and again at a new start."""
    time = PalaciosTime(HOST_KHZ, [None, None], seed=is_seed)
    time.start(1, START)
    assert time.stamps(0) == (0, 0, 0)
    assert time.stamps(1) == (START, 0, START)
    time.enter(1, after(5))
    time.exit(1, after(9))
    assert time.stamps(1) == (START, after(5), after(9))
    time.start(1, after(20))
    assert time.stamps(1) == (after(20), 0, after(20))


@pytest.mark.row("P-01", "P-09")
def test_time_that_was_seen_is_not_taken_back() -> None:
    """A negative offset is legal before the core was in the guest, down to 0; the seed, once unslaved, goes back."""
    time = started(UNSLAVED)
    time.offset_time(0, 100)
    time.offset_time(0, -40)
    assert time.cycles(0) == 60
    with pytest.raises(RangeError, match=r"-61.*core 0.* 60 cycles"):
        time.offset_time(0, -61)
    time.enter(0, START)
    time.exit(0, after(5))
    with pytest.raises(RangeError, match=r"-1.*core 0.* 65 cycles"):
        time.offset_time(0, -1)
    seed = started(seed=True)
    seed.follow(slaved=False)
    seed.offset_time(0, -1)
    assert seed.cycles(0) == 2**64 - 1


@pytest.mark.row("P-13")
@pytest.mark.parametrize(("options", "is_seed"), [(TimeOptions(), False), (UNSLAVED, False), (None, True)])
@given(before=TICKS, paused=TICKS, later=TICKS)
def test_pause_and_restart(options: TimeOptions | None, is_seed: bool, before: int, paused: int, later: int) -> None:
    """What passes between them is not the guest's, slaved or not, nor the seed's; calls that cannot be then say so."""
    time = started(options, seed=is_seed)
    time.advance(0, after(before))
    time.pause(0, after(before))
    with pytest.raises(StateError, match=r"advance of core 0.*paused"):
        time.advance(0, after(before))
    time.restart(0, after(before + paused))
    with pytest.raises(StateError, match=r"restart of core 0.*paused"):
        time.restart(0, after(before + paused))
    assert time.advance(0, after(before + paused + later)) == before + later


@pytest.mark.row("P-13", "P-14")
def test_the_host_catches_up_by_yielding() -> None:
    """A guest that ran ahead of its frequency's share is told how long the host must yield; then it is 0."""
    time = started(UNSLAVED, khz=HOST_KHZ // 2)
    time.offset_time(0, 51)
    assert time.ticks_to_yield(0, START) == 102
    assert [time.ticks_to_yield(0, after(ticks)) for ticks in (101, 102, 10**6)] == [1, 0, 0]


@pytest.mark.row("P-13", "P-14")
@given(khz=KHZ, ahead=st.integers(1, 2**40), ticks=TICKS)
def test_the_host_yields_no_longer_than_it_must(khz: int, ahead: int, ticks: int) -> None:
    """After so many ticks the host's time, in guest cycles, is the guest's or later; one tick before it is not."""
    time = started(UNSLAVED, khz=khz)
    time.offset_time(0, ahead)
    until = ticks + time.ticks_to_yield(0, after(ticks))
    assert until * khz >= ahead * HOST_KHZ
    assert until == ticks or (until - 1) * khz < ahead * HOST_KHZ


@pytest.mark.row("P-20", "P-28")
def test_hypercalls() -> None:
    """0xd000 gives the core's kHz and 0xd001 the host's TSC; the seed knows the first only, and close() leaves none."""
    seed, decided = started(khz=7, seed=True), started(khz=7)
    assert [decided.hypercall(0, number, START) for number in (0xD000, 0xD001, 0xD002)] == [7, START, None]
    assert [seed.hypercall(0, number, START) for number in (0xD000, 0xD001)] == [7, None]
    decided.close()
    assert [decided.hypercall(0, number, START) for number in (0xD000, 0xD001)] == [None, None]


@pytest.mark.row("P-11", "P-13")
@pytest.mark.parametrize("slaved", [True, False])
def test_a_host_tsc_that_goes_back_is_refused(slaved: bool) -> None:
    """At whatever point it is handed in; the core's time and state are as before, and go on from the last good one."""
    time = started(TimeOptions(slaved=slaved))
    for wrong in (-1, 2**64):
        with pytest.raises(RangeError, match=f"is {wrong}"):
            time.start(0, HostTsc(wrong))
    assert time.advance(0, after(10)) == 10
    for call in (time.advance, time.enter, time.pause, time.exit) if slaved else (time.skip_time, time.pause):
        if call == time.exit:
            time.enter(0, after(10))
        with pytest.raises(RangeError, match=f"{after(10)}.*{after(9)}"):
            call(0, after(9))
        assert (time.cycles(0), time.stamps(0).pause) == (10, after(10))
    if slaved:
        time.exit(0, after(10))
    time.pause(0, after(20))
    with pytest.raises(RangeError, match=f"{after(20)}.*{after(19)}"):
        time.restart(0, after(19))
    time.restart(0, after(30))
    assert time.advance(0, after(40)) == (30 if slaved else 20)


class Ticks:
    """A whole number of somebody else's type, such as NumPy's."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.row("E13")
def test_numbers_become_plain_ints() -> None:
    """Host TSC and cycles of a type that is no int are taken over as ints."""
    time = PalaciosTime(HOST_KHZ, [None], options=UNSLAVED)
    steps = (time.start, time.enter, time.exit, time.advance, time.skip_time, time.pause, time.restart)
    for n, step in enumerate(steps):
        step(0, Ticks(100 + n))  # type: ignore[operator]
    time.offset_time(0, Ticks(5))  # type: ignore[arg-type]
    assert time.advance(0, HostTsc(110), Ticks(3)) == 1 + 1 + 5 + 3  # type: ignore[arg-type]
    assert time.stamps(0) == (101, 101, 110)
    assert time.hypercall(0, 0xD001, Ticks(110)) == 110  # type: ignore[arg-type]


@pytest.mark.row("P-11", "P-12")
def test_runs_out_of_order() -> None:
    """exit() without enter(), enter() twice, and more cycles than fit between them are refused, and change nothing."""
    time = started(UNSLAVED)
    with pytest.raises(StateError, match="exit of core 0: it is out"):
        time.exit(0, after(1))
    time.enter(0, after(1))
    with pytest.raises(StateError, match="enter of core 0: it is in"):
        time.enter(0, after(2))
    for cycles in (-1, 10):
        with pytest.raises(RangeError, match=f"core 0.* {cycles} .*0 to 9"):
            time.exit(0, after(10), cycles)
    with pytest.raises(RangeError, match=f"{after(1)}.*{START}"):
        time.exit(0, START)
    assert time.exit(0, after(10), 9) == 9


@pytest.mark.row("P-12")
@pytest.mark.parametrize("slaved", [True, False])
def test_time_is_advanced_at_each_of_its_points(slaved: bool) -> None:
    """Before an entry, in the loop of a halted core, at the exit and after another process ran, each shows at once.

    Slaved, all that passed is the guest's; unslaved, the VMM hands in what of it the guest executed or slept.
    """
    time = started(TimeOptions(slaved=slaved), khz=HOST_KHZ // 2)
    time.enter(0, after(100))
    seen = [time.cycles(0)]
    seen += [time.advance(0, after(now)) for now in (140, 180)]  # halted: not left yet
    seen.append(time.exit(0, after(200), None if slaved else 10))
    seen.append(time.advance(0, after(1000), None if slaved else 0))
    time.enter(0, after(1100))
    seen.append(time.cycles(0))
    assert seen == ([50, 70, 90, 100, 500, 550] if slaved else [0, 20, 40, 45, 45, 45])


@pytest.mark.row("P-01", "P-08", "P-11", "P-12")
@given(khz=KHZ, runs=st.lists(st.tuples(TICKS, TICKS, st.none() | st.fractions(0, 1)), max_size=20))
def test_unslaved_cycles_are_what_was_executed(khz: int, runs: list[tuple[int, int, Fraction | None]]) -> None:
    """After any VMM time and runs, told by the TSC or exactly, cycles are the executed ones x ratio."""
    time, now, executed = started(UNSLAVED, khz=khz), 0, 0
    for vmm, ticks, part in runs:
        now += vmm
        time.enter(0, after(now))
        now += ticks
        exact = None if part is None else int(ticks * part)
        executed += ticks if exact is None else exact
        assert time.exit(0, after(now), exact) == executed * khz // HOST_KHZ


@pytest.mark.row("P-01", "P-02", "P-08")
@given(
    khz=KHZ,
    steps=st.lists(st.tuples(TICKS, st.booleans(), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20),
)
def test_cycles_never_decrease(khz: int, steps: list[tuple[int, bool, int, int]]) -> None:
    """Slaving and dilation change at any time without a step, and cycles are exact: each piece at its own rate."""
    time, now, cycles, seen = started(khz=khz), 0, Fraction(0), [0]
    for ticks, slaved, numerator, denominator in steps:
        dilation = Fraction(numerator, denominator) if slaved else Fraction(1)
        time.follow(slaved=slaved, dilation=dilation)
        now += ticks
        cycles += ticks * dilation * Fraction(khz, HOST_KHZ)
        seen.append(time.advance(0, after(now)))
        assert seen[-1] == cycles.__floor__()
    assert all(earlier <= later for earlier, later in pairwise(seen))


@pytest.mark.row("P-08")
@given(khz=KHZ, factor=st.integers(2, 50), stops=st.lists(TICKS, min_size=1, max_size=20))
def test_slaved_cycles_are_the_closed_formula(khz: int, factor: int, stops: list[int]) -> None:
    """However often advanced, cycles are (now - start) x dilation x ratio, VMM time included, rounded down once."""
    time = started(time_options(dilation=factor), khz=khz)
    for stop in sorted(stops):
        time.enter(0, after(stop))
        assert time.exit(0, after(stop)) == stop * khz // (factor * HOST_KHZ)
