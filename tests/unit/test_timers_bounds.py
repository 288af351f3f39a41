"""Timers at the edges: where guest time ends, which numbers they take, and in which order updates run."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pvclock import GuestNs, RangeError, WrongType
from pvclock.timekeeping.timers import Firing, Merge, Missed, Once, Replay, Timers, UpdateCallback, VcpuTimeouts

U64_MAX = 2**64 - 1
POLICIES = st.one_of(st.just(Merge()), st.just(Once()), st.builds(Replay, st.integers(1, 40)))


@pytest.mark.row("P-15", "E2", "E13")
@given(
    missed=POLICIES,
    period_ns=st.one_of(st.integers(1, 60), st.just(U64_MAX)),
    before_end_ns=st.integers(0, 200),
    jumps_ns=st.lists(st.integers(0, 100), max_size=20),
)
@example(missed=Merge(), period_ns=U64_MAX, before_end_ns=0, jumps_ns=[])
@example(missed=Replay(5), period_ns=6, before_end_ns=20, jumps_ns=[17])
def test_timers_end_with_guest_time(missed: Missed, period_ns: int, before_end_ns: int, jumps_ns: list[int]) -> None:
    """No call is due beyond 2^64 - 1 ns: the last one before that settles all periods, and then the timer is gone."""
    assume(not isinstance(missed, Replay) or missed.spacing_ns < period_ns)
    first_ns = U64_MAX - before_end_ns
    timers, firings = Timers(), list[Firing]()
    timer = timers.add(GuestNs(first_ns), firings.append, period_ns=period_ns, missed=missed)
    nows = [min(first_ns + sum(jumps_ns[:n]), U64_MAX) for n in range(len(jumps_ns) + 1)]
    for now in [*nows, U64_MAX, U64_MAX]:
        was_active = timer.active
        fired = timers.advance(GuestNs(now))
        assert fired <= was_active
        assert timer.deadline_ns <= timer.due_ns <= U64_MAX
        assert timers.next_due_ns == (timer.due_ns if timer.active else None)
        ended = (now - first_ns) // period_ns + 1
        settled = sum(firing.periods + firing.dropped for firing in firings)
        if was_active and not timer.active:  # the last call
            after_this = now + missed.spacing_ns if isinstance(missed, Replay) else now
            assert max(first_ns + ended * period_ns, after_this) > U64_MAX
            assert (settled, firings[-1].owed) == (ended, 0)
    assert not timer.active
    assert (len(timers), timers.remove(timer)) == (0, False)


class Whole:
    """A whole number of somebody else's type, such as NumPy's."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.row("P-15", "E13")
def test_numbers_become_plain_ints() -> None:
    """Times of a type that is no int are taken over as ints, a replay's spacing too."""
    timers, firings = Timers(Whole(1)), list[Firing]()  # type: ignore[arg-type]
    replay = Replay(Whole(3))  # type: ignore[arg-type]
    timer = timers.add(Whole(2), firings.append, period_ns=Whole(4), missed=replay)  # type: ignore[arg-type]
    assert timers.advance(Whole(9)) == 1  # type: ignore[arg-type]
    assert (firings[0][1:], timer.due_ns, timer.missed) == ((2, 7, 1, 1, 0), 12, Replay(3))


@pytest.mark.row("P-15", "E13")
def test_what_is_no_policy_or_cannot_be_printed() -> None:
    """A class in place of a policy, and numbers too long for Python to print, are errors of ours and leave no timer."""
    timers, huge = Timers(), GuestNs(10**5000)
    with pytest.raises(WrongType, match="missed is the class Merge; it can be a Merge, Once or Replay"):
        timers.add(GuestNs(1), print, period_ns=5, missed=Merge)  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="deadline_ns is a number of 16610 bits; it can be"):
        timers.add(huge, print)
    with pytest.raises(RangeError, match="period_ns is a number of 16610 bits"):
        timers.add(GuestNs(1), print, period_ns=-huge)
    with pytest.raises(RangeError, match="now is a number of 16610 bits"):
        timers.advance(huge)
    timeouts = VcpuTimeouts(timers)
    with pytest.raises(RangeError, match="deadline_ns is a number of 16610 bits"):
        timeouts.add(0, huge, print)
    assert (len(timers), timers.now, timers.next_due_ns) == (0, 0, None)
    timeouts.add(0, GuestNs(1), print)
    with pytest.raises(RangeError, match="deadline_ns is a number of 16610 bits"):
        timeouts.add(0, huge, print)


@pytest.mark.row("P-15", "P-29")
@pytest.mark.parametrize("newest_first", [False, True])
def test_updates_run_oldest_or_newest_first(newest_first: bool) -> None:
    """Updates run as they were added, or newest first as in Palacios, whatever was removed or added since."""
    timers, calls = Timers(cycles_hz=1, newest_update_first=newest_first), list[str]()

    def update(name: str) -> UpdateCallback:
        return lambda _elapsed, _hz: calls.append(name)

    added = {name: update(name) for name in "abc"}
    for each in added.values():
        timers.add_update(each)
    timers.add(GuestNs(1), lambda _: calls.append("timer"))
    timers.advance(GuestNs(1), 1)
    assert timers.remove_update(added["b"])
    timers.add_update(update("d"))
    timers.advance(GuestNs(1), 1)
    assert calls == [*("cba" if newest_first else "abc"), "timer", *("dca" if newest_first else "acd")]


@pytest.mark.row("P-29")
def test_an_update_that_fails_is_told_no_cycle_twice() -> None:
    """Time has moved on before the first update runs: each is told what passed since the last advance."""
    timers, told = Timers(cycles_hz=10**9, newest_update_first=True), list[tuple[str, int, int]]()

    def older(elapsed_cycles: int, _hz: int) -> None:
        told.append(("older", elapsed_cycles, timers.now))

    def newer(elapsed_cycles: int, _hz: int) -> None:
        told.append(("newer", elapsed_cycles, timers.now))
        raise ZeroDivisionError

    for update in (older, newer):
        timers.add_update(update)
    for now, cycles in ((3, 5), (10, 12)):
        with pytest.raises(ZeroDivisionError):
            timers.advance(GuestNs(now), cycles)
    assert told == [("newer", 5, 3), ("older", 5, 3), ("newer", 7, 10), ("older", 7, 10)]
