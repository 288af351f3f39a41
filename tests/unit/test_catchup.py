"""Catch-up policies: what is none is refused where it is given, and what is accepted can run, be named and be saved."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pvclock import ConfigError, GuestClock, RangeError, WrongType
from pvclock.state.json_schema import TEXT
from pvclock.timekeeping import catchup
from pvclock.timekeeping.catchup import (
    MOST_PPM,
    NAME_MAX,
    VIRTUALBOX,
    Advance,
    CatchUpTable,
    Freeze,
    Policy,
    Slew,
    SlewPolicy,
)
from tests.unit.clocks import NS_PER_S, a_clock, page_of, shown

U64_MAX = 2**64 - 1
HZ = 2_000_000_000
DIGITS = "9" * 5000
"""More than Python makes an int of."""

NS = st.one_of(st.integers(0, U64_MAX), st.integers(0, 10**12), st.sampled_from([0, 1, U64_MAX]))
PERIODS = st.dictionaries(NS, st.integers(1, 1000), min_size=1, max_size=6).map(
    lambda lags: tuple(sorted(lags.items()))
)
TABLES = st.builds(
    lambda periods, bounds: CatchUpTable(periods, *sorted(bounds)), PERIODS, st.lists(NS, min_size=2, max_size=2)
)
POLICIES: st.SearchStrategy[Any] = st.one_of(
    st.just(Freeze()),
    st.builds(Advance, NS),
    st.builds(Slew, st.integers(1, MOST_PPM), NS),
    st.just(VIRTUALBOX),
    TABLES,
)

NO_LAG, LAG = (0, 5), (10**9, 50)

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no percent": (CatchUpTable(((0, 0),), 0, 10**12), RangeError, r"periods\[0\], its percent, is 0; it can be 1 to"),
    "no periods": (CatchUpTable((), 0, 10**12), ConfigError, "at least one period .lag in ns, percent."),
    "a huge percent": (CatchUpTable(((0, 10**12),), 0, 10**12), RangeError, "is 1000000000000; it can be 1 to 1000$"),
    "a negative percent": (CatchUpTable(((0, -5),), 0, 10**12), RangeError, "its percent, is -5"),
    "half a percent": (CatchUpTable(((0, 1.5),), 0, 10**12), WrongType, "its percent, is 1.5, a float"),  # type: ignore[arg-type]
    "a bool of a percent": (CatchUpTable(((0, True),), 0, 10**12), WrongType, "its percent, is True, a bool"),
    "a negative lag": (CatchUpTable((NO_LAG, (-1, 5)), 0, 1), RangeError, r"periods\[1\], its lag, is -1"),
    "a lag beyond 64 bits": (CatchUpTable(((2**64, 5),), 0, 1), RangeError, "its lag, is 18446744073709551616; it can"),
    "a lag of text": (CatchUpTable((("x", 5),), 0, 1), WrongType, "its lag, is 'x', a str"),  # type: ignore[arg-type]
    "equal lags": (
        CatchUpTable((NO_LAG, NO_LAG), 0, 1),
        ConfigError,
        "a lag of 0 ns follows one of 0 ns; lags must rise",
    ),
    "lags that fall": (CatchUpTable((LAG, NO_LAG), 0, 1), ConfigError, "a lag of 0 ns follows one of 1000000000 ns"),
    "no pair": (CatchUpTable(((0, 1, 2),), 0, 1), WrongType, r"periods\[0\] is a tuple; it can be a pair"),  # type: ignore[arg-type]
    "a number as periods": (CatchUpTable(5, 0, 1), WrongType, "periods is 5, an int; it can be a tuple"),  # type: ignore[arg-type]
    "text as periods": (CatchUpTable("ab", 0, 1), WrongType, "periods is 'ab', a str; it can be a tuple"),  # type: ignore[arg-type]
    "a negative stop": (CatchUpTable((NO_LAG,), -1, 1), RangeError, "stop_ns is -1"),
    "no stop": (CatchUpTable((NO_LAG,), None, 1), WrongType, "stop_ns is None; it can be a whole number, 0 to 2"),  # type: ignore[arg-type]
    "give up before the stop": (CatchUpTable((NO_LAG,), 2, 1), RangeError, "give_up_ns is 1; it can be 2 to"),
    "give up beyond 64 bits": (CatchUpTable((NO_LAG,), 2, 2**64), RangeError, "give_up_ns is 18446744073709551616"),
    "more than can be saved": (
        CatchUpTable(tuple((lag, 5) for lag in range(10**18, 10**18 + 20)), 0, 1),
        ConfigError,
        "20 periods make a name of 468 characters; a saved state holds up to 256",
    ),
    "slew at no rate": (Slew(0), RangeError, "Slew.max_ppm is 0; it can be 1 to 10000000"),
    "slew too fast": (Slew(MOST_PPM + 1), RangeError, "Slew.max_ppm is 10000001"),
    "slew by text": (Slew("x"), WrongType, "Slew.max_ppm is 'x', a str; it can be a whole number, 1 to"),  # type: ignore[arg-type]
    "slew by a bool": (Slew(True), WrongType, "Slew.max_ppm is True, a bool"),
    "slew by a type": (Slew(int), WrongType, "Slew.max_ppm is the class int"),  # type: ignore[arg-type]
    "slew without end": (Slew(1, 2**64), RangeError, "Slew.max_ns is 18446744073709551616"),
    "a number that cannot be printed": (
        Slew(10**5000),
        RangeError,
        "Slew.max_ppm is a number of 16610 bits; it can be",
    ),
    "advance back": (Advance(-1), RangeError, "Advance.max_ns is -1"),
    "advance without end": (Advance(2**64), RangeError, "Advance.max_ns is 18446744073709551616"),
    "advance by nothing": (Advance(None), WrongType, "Advance.max_ns is None"),  # type: ignore[arg-type]
    "a number": (5, WrongType, r"policy is 5, an int; it can be a Freeze, Advance, Slew or CatchUpTable, or a name"),
    "a class": (Slew, WrongType, "policy is the class Slew; .* or a name"),
    "a tuple": ((500, 0), WrongType, "policy is a tuple; .* or a name"),
    "bytes": (b"freeze", WrongType, "policy is b'freeze', a bytes; .* or a name"),
    "no name": ("", ConfigError, "choose from freeze, advance, slew, virtualbox, table"),
    "5,000 digits": (f"slew:max_ppm={DIGITS}", ConfigError, r"policy 'slew:max_ppm=9999999'... of 5013 characters"),
    "240 digits": (f"slew:max_ppm={DIGITS[:240]}", RangeError, "Slew.max_ppm is a number of 798 bits"),
    "digits of another script": ("slew:max_ppm=\u0665", ConfigError, "NAME=NUMBER"),
    "an option twice": ("slew:max_ppm=5,max_ppm=6", ConfigError, "NAME=NUMBER"),
    "an unknown option": ("slew:ppm=5", ConfigError, "slew takes max_ppm, max_ns"),
    "a table of nothing": ("table", ConfigError, "table takes LAG_NS, stop_ns, give_up_ns"),
    "a table without periods": ("table:stop_ns=1,give_up_ns=2", ConfigError, "one period"),
    "a table without its ends": ("table:1000=10", ConfigError, "give_up_ns; it lacks stop_ns and give_up_ns$"),
    "a table without one": ("table:1000=10,stop_ns=1", ConfigError, "it lacks give_up_ns$"),
    "a float": ("advance:max_ns=1e9", ConfigError, "NUMBER is a whole number"),
    "a table of other names": ("table:lag=5,stop_ns=1,give_up_ns=2", ConfigError, "table takes LAG_NS"),
    "a table with one lag twice": ("table:5=1,05=1,stop_ns=1,give_up_ns=2", ConfigError, "lags must rise"),
}


@pytest.mark.row("E2", "E13")
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_policy_is_refused_where_it_is_given(wrong: str) -> None:
    """As the clock's policy, for a resume and for as_policy(): an error of ours with what is wrong, and no change."""
    policy, error, message = WRONG[wrong]
    clock, backend, _ = a_clock(HZ)
    clock.pause()
    backend.advance(ns=NS_PER_S)
    before = clock.now(), clock.policy, page_of(clock), clock.events.last
    with pytest.raises(error, match=message):
        clock.policy = policy
    with pytest.raises(error, match=message):
        clock.resume(policy)
    with pytest.raises(error, match=message):
        catchup.as_policy(policy)
    assert (clock.now(), clock.policy, page_of(clock), clock.events.last) == before
    clock.resume("advance")
    assert clock.now() == before[0] + NS_PER_S


@pytest.mark.row("E13")
def test_a_clock_has_some_policy() -> None:
    """None is no policy, though for a resume it stands for the clock's own; nor is it a name."""
    clock, _, _ = a_clock(HZ)
    with pytest.raises(WrongType, match=r"policy is None; .* or a name"):
        clock.policy = None  # type: ignore[assignment]  # on purpose
    with pytest.raises(WrongType, match="policy is None; it can be text"):
        catchup.parse(None)  # type: ignore[arg-type]  # on purpose


@pytest.mark.row("E1", "E2")
@given(policy=POLICIES)
@example(policy=Slew(MOST_PPM, U64_MAX))
@example(policy=CatchUpTable(((0, 1), (U64_MAX, 1000)), 0, U64_MAX))
def test_every_policy_has_a_name_that_a_state_holds(policy: Policy) -> None:
    """What is accepted, accepted again is the same; by its name it comes back, and a saved state takes that name."""
    assert catchup.as_policy(policy) == policy
    name = str(policy)
    assert f"{policy}" == name
    again = catchup.as_policy(name)
    assert (again, type(again)) == (policy, type(policy))
    assert TEXT.read(name, "policy") == name
    assert len(name) <= NAME_MAX


@pytest.mark.row("E1")
def test_the_longest_name_is_what_a_state_takes() -> None:
    """Text of NAME_MAX characters is the longest that a saved state holds."""
    assert f"1 to {NAME_MAX} " in TEXT.supported


class Whole:
    """A whole number of somebody else's type, such as NumPy's."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.row("E2", "E13")
def test_policies_become_plain_ints() -> None:
    """Whole numbers of any type and lists are taken over as ints and tuples, which nobody can change afterwards."""
    periods = [[Whole(0), Whole(5)]]
    table: Any = CatchUpTable(periods, Whole(1), Whole(2))  # type: ignore[arg-type]
    accepted = catchup.as_policy(table)
    periods.clear()
    assert accepted == CatchUpTable(((0, 5),), 1, 2)
    assert hash(accepted)
    assert catchup.as_policy(Slew(Whole(7), Whole(8))) == Slew(7, 8)  # type: ignore[arg-type]


JUNK = st.recursive(
    st.one_of(NS, st.integers(), st.booleans(), st.none(), st.floats(), st.text(max_size=3), st.just(Slew)),
    lambda inner: st.tuples(inner, inner) | st.lists(inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.row("E13", "E9")
@given(policy=st.one_of(st.builds(CatchUpTable, JUNK, JUNK, JUNK), st.builds(Slew, JUNK, JUNK), JUNK))
def test_anything_is_a_policy_or_refused(policy: Any) -> None:  # noqa: ANN401  # anything
    """Whatever is in a policy, or in place of one: it is accepted for good or refused by an error of ours."""
    try:
        accepted = catchup.as_policy(policy)
    except (WrongType, ConfigError, RangeError):
        return
    assert catchup.as_policy(str(accepted)) == accepted


@pytest.mark.row("E13", "E9")
@given(
    text=st.one_of(
        st.text(max_size=300),
        st.from_regex(r"(freeze|advance|slew|virtualbox|table):?([a-z_0-9]+=[0-9]+,?)*", fullmatch=True),
    )
)
def test_any_text_is_a_name_or_refused(text: str) -> None:
    """Whatever text is given by name: it is a policy or an error of ours."""
    try:
        policy = catchup.parse(text)
    except (ConfigError, RangeError):
        return
    assert catchup.as_policy(str(policy)) == policy


# What is accepted can run


@pytest.mark.row("E2", "TM-15")
@given(policy=POLICIES, missed_ns=st.integers(-(2**63), 2**70), parts=st.integers(1, 1000))
def test_all_missed_time_is_settled(policy: Policy, missed_ns: int, parts: int) -> None:
    """Any missed time is gained, owed or lost, to the fraction; a host clock that went back has missed none."""
    missed = Fraction(missed_ns, parts)
    settled = catchup.settle(policy, missed)
    assert settled.step_ns + settled.slew_ns + settled.dropped_ns == max(missed, 0)
    assert min(settled.step_ns, settled.slew_ns, settled.dropped_ns) >= 0
    assert bool(settled.why) == (missed < 0 or (settled.dropped_ns > 0 and policy != Freeze()))
    assert settled.slew_ns == 0 or settled.slew == policy


@pytest.mark.row("E2", "TM-15")
@given(policy=st.one_of(st.builds(Slew, st.integers(1, MOST_PPM), NS), TABLES), lag_ns=st.integers(-(2**70), 2**70))
def test_a_slew_has_some_rate(policy: SlewPolicy, lag_ns: int) -> None:
    """At any lag, of either sign, a slew runs off its rate by 1 ppm to 1000 %."""
    assert 1 <= policy.ppm(Fraction(lag_ns)) <= MOST_PPM


@pytest.mark.row("E1", "E2", "TM-15")
@settings(max_examples=100)
@given(
    policy=POLICIES,
    missed_ns=st.one_of(st.integers(0, 2**61), st.integers(0, 10**11)),
    waits_ns=st.lists(st.integers(0, 10**10), max_size=5),
)
def test_accepted_policies_run_and_are_saved(policy: Policy, missed_ns: int, waits_ns: list[int]) -> None:
    """A clock with that policy resumes, refreshes, never steps back, and comes back from a save as it was."""
    clock, backend, memory = a_clock(HZ)
    clock.policy = policy
    clock.pause()
    backend.advance(ns=missed_ns)
    clock.resume()
    last = shown(memory, 0, backend.tsc)
    for wait_ns in waits_ns:
        backend.advance(ns=wait_ns)
        clock.refresh()
        assert shown(memory, 0, backend.tsc) >= last
        last = shown(memory, 0, backend.tsc)
    state = clock.save()
    again = GuestClock.restore(state, memory, backend=backend)
    assert again.policy == policy
    assert again.skew_ns == clock.skew_ns
    again.resume()
    assert shown(memory, 0, backend.tsc) >= last


# Values


MS = 10**6
VIRTUALBOX_PERIODS = [
    *((0, 5), (750_000, 5), (1_500_000, 10), (8 * MS, 25), (30 * MS, 50), (75 * MS, 75), (175 * MS, 100)),
    *((500 * MS, 200), (3000 * MS, 300), (30_000 * MS, 400), (55_000 * MS, 500)),
]
"""Least lag in ns and percent: VirtualBox's ten, and the first one's for smaller lags."""


@pytest.mark.row("TM-14")
@pytest.mark.parametrize(("place", "period"), list(enumerate(VIRTUALBOX_PERIODS)), ids=str)
def test_virtualboxs_table(place: int, period: tuple[int, int]) -> None:
    """From each of its ten lags on a clock runs faster by that period's percentage, and just below it by the last's."""
    policy = catchup.as_policy("virtualbox")
    assert isinstance(policy, CatchUpTable)
    from_ns, percent = period
    for sign in (1, -1):
        assert policy.ppm(sign * Fraction(from_ns)) == percent * 10_000
        if place:
            assert policy.ppm(sign * (from_ns - Fraction(1, 1000))) == VIRTUALBOX_PERIODS[place - 1][1] * 10_000
    assert policy.ppm(Fraction(10**18)) == 5_000_000


@pytest.mark.row("TM-14", "TM-15")
def test_a_table_of_these_values_is_virtualboxs() -> None:
    """A table of those ten periods that stops at 0.5 ms and gives up beyond 60 s has the name of VirtualBox's."""
    table = CatchUpTable(tuple(VIRTUALBOX_PERIODS[1:]), 500_000, 60_000_000_000)
    assert (str(table), catchup.as_policy("virtualbox")) == ("virtualbox", table)


@pytest.mark.row("E2", "E11")
def test_a_slew_is_done_below_2_ns() -> None:
    """A lag of 2 ns is worked off; less than that a page cannot show, and is left."""
    for sign in (1, -1):
        assert not Slew().is_done(Fraction(2 * sign))
        assert Slew().is_done(sign * (2 - Fraction(1, 10**9)))


@pytest.mark.row("TM-15")
def test_virtualbox_stops_at_half_a_millisecond_and_gives_up_beyond_a_minute() -> None:
    """A lag of 0.5 ms is tolerated, a little more is not; 60 s are slewed in whole, a little more is dropped whole."""
    policy, little = catchup.as_policy("virtualbox"), Fraction(1, 1000)
    assert isinstance(policy, CatchUpTable)
    for sign in (1, -1):
        assert policy.is_done(sign * Fraction(500_000))
        assert not policy.is_done(sign * (500_000 + little))
    minute_ns, nothing = Fraction(60_000_000_000), Fraction(0)
    assert catchup.settle(policy, minute_ns) == catchup.CatchUp(nothing, minute_ns, nothing, policy)
    why = "a lag of 60000000000 ns is dropped: it exceeds 60000000000 ns"
    longer_ns = minute_ns + little
    assert catchup.settle(policy, longer_ns) == catchup.CatchUp(nothing, nothing, longer_ns, None, why)
    assert catchup.settle(policy, 2 * minute_ns).dropped_ns == 2 * minute_ns


@pytest.mark.row("E1", "E2")
@pytest.mark.parametrize("name", ["advance", "slew"])
def test_by_default_a_year_is_made_up_for_and_no_more(name: str) -> None:
    """Of a gap of more than 366 days, or 31,622,400 s, that much is stepped or slewed, and the rest dropped."""
    year_ns = 31_622_400_000_000_000
    for missed_ns in (year_ns, year_ns + 5):
        settled = catchup.settle(name, Fraction(missed_ns))
        assert settled.step_ns + settled.slew_ns == year_ns
        assert settled.dropped_ns == missed_ns - year_ns
