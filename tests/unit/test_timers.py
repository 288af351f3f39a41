"""Timers in guest time, against a slow model that writes out every period and looks at every timer."""

import contextlib
import gc
import weakref
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pvclock import GuestNs, RangeError, StateError, WrongType
from pvclock.timekeeping.timers import STALE_MAX, Firing, Merge, Missed, Once, Replay, Timer, Timers, VcpuTimeouts
from tests.unit.slow_timers import SlowTimers, Step, World

U64_MAX = 2**64 - 1


PERIODS_NS = st.integers(1, 60)
POLICIES = st.one_of(st.just(Merge()), st.just(Once()), st.builds(Replay, st.integers(1, 40)))


def adds(steps: st.SearchStrategy[list[Step]]) -> st.SearchStrategy[Step]:
    """Additions of timers, due already or not, whose callbacks take `steps`."""
    return st.tuples(st.just("add"), st.integers(-20, 100), st.none() | PERIODS_NS, POLICIES, steps)


REMOVALS = st.tuples(st.just("remove"), st.integers(0, 30))
INNER_STEPS = st.lists(REMOVALS | adds(st.lists(REMOVALS | adds(st.just([])), max_size=2)), max_size=3)
# Steps shorter than periods, and jumps over many of them.
ADVANCES = st.tuples(st.just("advance"), st.integers(0, 30) | st.integers(0, 2000))
STEPS = st.lists(adds(INNER_STEPS) | REMOVALS | ADVANCES, max_size=30)


@pytest.mark.row("P-15", "P-28")
@given(steps=STEPS)
def test_any_sequence_fires_as_the_model(steps: list[Step]) -> None:
    """Whatever is added, removed and jumped over, also by callbacks, each call is told what the model says."""
    timers = Timers()
    world, model = World(timers), World(SlowTimers())
    for step in steps:
        world.do(step)
        model.do(step)
        assert world.log == model.log
        assert not timers._firing
        assert len(timers._queue) <= 2 * len(timers) + STALE_MAX


@pytest.mark.row("E2", "TM-03")
@given(period_ns=PERIODS_NS, missed=POLICIES, jumps_ns=st.lists(st.integers(0, 5000), max_size=30))
@example(period_ns=10, missed=Replay(9), jumps_ns=[10_000])
def test_no_period_is_lost_or_invented(period_ns: int, missed: Missed, jumps_ns: list[int]) -> None:
    """Delivered, owed and dropped periods are those that have ended; only Once drops, and each is told of once."""
    assume(not isinstance(missed, Replay) or missed.spacing_ns < period_ns)
    timers, firings, now = Timers(), list[Firing](), 0
    timers.add(GuestNs(period_ns), firings.append, period_ns=period_ns, missed=missed)
    for jump_ns in jumps_ns:
        now += jump_ns
        timers.advance(GuestNs(now))
        settled = sum(firing.periods + firing.dropped for firing in firings)
        if firings and now_of(firings[-1]) == now:
            assert settled + firings[-1].owed == now // period_ns
        assert settled == now // period_ns or isinstance(missed, Replay)
    assert [firing.deadline_ns for firing in firings[1:]] == [
        before.deadline_ns + (before.periods + before.dropped) * period_ns for before in firings[:-1]
    ]
    assert all(firing.dropped == 0 or isinstance(missed, Once) for firing in firings)
    assert all(firing.owed == 0 or isinstance(missed, Replay) for firing in firings)
    assert all(firing.periods == 1 or isinstance(missed, Merge) for firing in firings)


def now_of(firing: Firing) -> int:
    """Guest time of a call."""
    return firing.deadline_ns + firing.late_ns


@pytest.mark.row("E2", "TM-03")
@given(period_ns=st.integers(2, 1000), jump_ns=st.integers(0, 5000), data=st.data())
def test_replay_catches_up_within_its_rate(period_ns: int, jump_ns: int, data: st.DataObject) -> None:
    """After a jump calls keep their spacing, each has one period, and at next_due_ns the last that is owed comes."""
    spacing_ns = data.draw(st.integers(1, period_ns - 1))
    timers, firings = Timers(), list[Firing]()
    timers.add(GuestNs(period_ns), firings.append, period_ns=period_ns, missed=Replay(spacing_ns))
    timers.advance(GuestNs(period_ns + jump_ns))
    # Each call wins period - spacing on the jump; the last one may be late by less than a period.
    calls_most = jump_ns // (period_ns - spacing_ns) + 2
    while firings[-1].late_ns and len(firings) <= calls_most:
        due_ns = timers.next_due_ns
        assert due_ns is not None
        assert timers.advance(due_ns) == 1
    assert len(firings) <= calls_most
    assert all(now_of(after) - now_of(before) >= spacing_ns for before, after in pairwise(firings))
    assert [firing.deadline_ns for firing in firings] == [(n + 1) * period_ns for n in range(len(firings))]


@pytest.mark.row("E2")
@given(policies=st.lists(POLICIES, min_size=1, max_size=5), jump_ns=st.integers(0, 2**63))
@example(policies=[Merge(), Once(), Replay(1)], jump_ns=2**63)
def test_no_jump_causes_a_flood(policies: list[Missed], jump_ns: int) -> None:
    """One advance makes at most one call a timer: after 292 years of periods of 41 ns as after none."""
    timers, firings = Timers(), list[Firing]()
    for missed in policies:
        timers.add(GuestNs(0), firings.append, period_ns=41, missed=missed)
    assert timers.advance(GuestNs(jump_ns)) == len(firings) == len(policies)
    assert {firing.periods + firing.owed + firing.dropped for firing in firings} == {jump_ns // 41 + 1}
    assert timers.next_due_ns is not None
    assert timers.next_due_ns > jump_ns


@pytest.mark.row("P-15")
def test_what_a_callback_adds_waits_for_the_next_advance() -> None:
    """A callback that adds itself again, due at once, is called once an advance and not for ever."""
    timers, calls = Timers(), list[int]()

    def again(firing: Firing) -> None:
        calls.append(firing.late_ns)
        timers.add(timers.now, again)
        assert timers.next_due_ns == timers.now

    timers.add(GuestNs(5), again)
    assert [timers.advance(GuestNs(now)) for now in (4, 7, 7, 9)] == [0, 1, 1, 1]
    assert calls == [2, 0, 2]
    assert len(timers) == 1


@pytest.mark.row("P-15")
@given(first_ns=st.integers(0, 100), second_ns=st.integers(0, 100), step_ns=st.integers(1, 300))
def test_errors_lose_no_timer(first_ns: int, second_ns: int, step_ns: int) -> None:
    """Callbacks that raise stop no other; the first error comes out with the others in its notes, and periods go on."""
    timers, firings = Timers(), list[Firing]()

    def wrong(firing: Firing) -> None:
        firings.append(firing)
        raise LookupError(firing.deadline_ns)

    timers.add(GuestNs(first_ns), wrong, period_ns=step_ns)
    timers.add(GuestNs(second_ns), wrong)
    timers.add(GuestNs(100), firings.append)
    with pytest.raises(LookupError) as caught:
        timers.advance(GuestNs(100))
    assert caught.value.args == (min(first_ns, second_ns),)
    assert [repr(LookupError(max(first_ns, second_ns))) in note for note in caught.value.__notes__] == [True]
    assert [firing.deadline_ns for firing in firings] == [*sorted((first_ns, second_ns)), 100]
    assert len(timers) == 1
    assert timers.next_due_ns == first_ns + ((100 - first_ns) // step_ns + 1) * step_ns


@pytest.mark.row("P-15")
def test_an_interrupt_comes_out_at_once() -> None:
    """After KeyboardInterrupt the timers not yet called are still there, and earlier errors are in its notes."""
    timers, calls = Timers(), list[str]()

    def interrupted(_: Firing) -> None:
        raise KeyboardInterrupt

    def wrong(_: Firing) -> None:
        raise LookupError("earlier")

    timers.add(GuestNs(1), wrong)
    timers.add(GuestNs(2), interrupted)
    timers.add(GuestNs(3), lambda _: calls.append("later"))
    with pytest.raises(KeyboardInterrupt) as caught:
        timers.advance(GuestNs(10))
    assert "earlier" in caught.value.__notes__[0]
    assert (calls, len(timers), timers.next_due_ns) == ([], 1, 3)
    assert timers.advance(GuestNs(10)) == 1
    assert calls == ["later"]


@pytest.mark.row("P-15")
def test_advance_is_not_for_callbacks() -> None:
    """advance() by a callback is refused with the time of the advance that runs, which goes on."""
    timers, calls = Timers(), list[str]()
    timers.add(GuestNs(1), lambda _: timers.advance(GuestNs(99)))
    timers.add(GuestNs(2), lambda _: calls.append("second"))
    with pytest.raises(StateError, match="advance to 7 ns") as caught:
        timers.advance(GuestNs(7))
    assert (caught.value.operation, calls, timers.now) == ("advance", ["second"], 7)


@pytest.mark.row("P-15")
@given(cycles=st.lists(st.integers(0, U64_MAX), min_size=1), hz=st.integers(1, 10**10), first=st.integers(0, U64_MAX))
def test_updates_are_told_all_cycles(cycles: list[int], hz: int, first: int) -> None:
    """Update callbacks get the cycles since the advance before and the frequency; with cycles that go back, neither."""
    timers, told, last = Timers(cycles=first, cycles_hz=hz), list[tuple[int, int]](), first
    timers.add_update(lambda elapsed, frequency_hz: told.append((elapsed, frequency_hz)))
    for now, count in enumerate(cycles, start=1):
        before = (timers.now, len(told))
        if count >= last:
            timers.advance(GuestNs(now), count)
            assert told[-1] == (count - last, hz)
            last = count
        else:
            with pytest.raises(RangeError, match=f"they were {last} and are {count}"):
                timers.advance(GuestNs(now), count)
            assert (timers.now, len(told)) == before
    assert sum(elapsed for elapsed, _ in told) == last - first


@pytest.mark.row("P-15")
def test_updates_come_first_and_may_change_updates(capsys: pytest.CaptureFixture[str]) -> None:
    """Updates come before timers and in their order; one removed meanwhile is not called, one added is, next time."""
    timers, calls = Timers(cycles_hz=10**9), list[str]()

    def first(_elapsed: int, _hz: int) -> None:
        calls.append("first")
        assert timers.remove_update(first)
        assert timers.remove_update(print)
        timers.add_update(third)
        timers.add(timers.now, lambda _: calls.append("added timer"))

    def third(_elapsed: int, _hz: int) -> None:
        calls.append("third")
        raise LookupError

    timers.add_update(first)
    timers.add_update(print)
    timers.add_update(lambda elapsed, _: calls.append(f"last {elapsed}"))
    timers.add(GuestNs(1), lambda _: calls.append("timer"))
    assert timers.advance(GuestNs(1), 1) == 1
    with pytest.raises(LookupError):
        timers.advance(GuestNs(1), 1)
    assert calls == ["first", "last 1", "timer", "last 0", "third", "added timer"]
    assert capsys.readouterr().out == ""  # nor was `print` called
    assert not timers.remove_update(first)


@pytest.mark.row("P-15")
def test_updates_need_cycles_and_their_frequency() -> None:
    """An update without a frequency, or an advance without the cycles that updates need, is refused unchanged."""
    with pytest.raises(StateError, match="cycles_hz"):
        Timers().add_update(print)
    timers = Timers(cycles_hz=1)
    timers.add_update(print)
    with pytest.raises(StateError, match="1 update callbacks and no cycles"):
        timers.advance(GuestNs(1))
    assert timers.now == 0


@pytest.mark.row("P-15")
@given(start=st.integers(0, U64_MAX), then=st.integers(-1, U64_MAX + 1))
def test_guest_time_never_goes_backwards(start: int, then: int) -> None:
    """Guest time may stand still; when it goes back or leaves 64 bits, the error has both and nothing changes."""
    timers, firings = Timers(GuestNs(start)), list[Firing]()
    timers.add(GuestNs(0), firings.append)
    if start <= then <= U64_MAX:
        assert timers.advance(GuestNs(then)) == 1
        assert timers.advance(GuestNs(then)) == 0
        assert now_of(firings[0]) == timers.now == then
        return
    numbers = f"was {start} ns and is {then} ns" if 0 <= then < start else f"now is {then}"
    with pytest.raises(RangeError, match=numbers):
        timers.advance(GuestNs(then))
    assert (timers.now, len(timers), firings) == (start, 1, [])


@pytest.mark.row("P-15")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"deadline_ns": -1}, "deadline_ns is -1"),
        ({"deadline_ns": 2**64}, "deadline_ns is 18446744073709551616"),
        ({"period_ns": 0}, "period_ns is 0"),
        ({"missed": Replay(5)}, "one-shot"),
        ({"period_ns": 5, "missed": Replay(5)}, "5 ns, is 5; it can be 1 to 4"),
        ({"period_ns": 5, "missed": Replay(0)}, "5 ns, is 0; it can be 1 to 4"),
    ],
)
def test_what_no_timer_can_be_is_refused(options: dict[str, object], complaint: str) -> None:
    """Deadlines and periods beyond their range, and replays that would never catch up, leave no timer behind."""
    timers = Timers()
    with pytest.raises(RangeError, match=complaint):
        timers.add(**{"deadline_ns": 1, "callback": print, **options})  # type: ignore[arg-type]
    with pytest.raises(WrongType, match=r"deadline_ns is 1000000000.0, a float"):
        timers.add(1e9, print)  # type: ignore[arg-type]
    assert (len(timers), timers.next_due_ns) == (0, None)


@pytest.mark.row("P-15", "P-28")
@given(deadlines_ns=st.lists(st.integers(0, 10**4), max_size=50), stride_ns=st.integers(1, 10**4))
def test_heaps_stay_clean_under_rearming(deadlines_ns: list[int], stride_ns: int) -> None:
    """A guest that sets its timer anew 1000 times leaves few entries behind; the other timers stay as they were."""
    timers, firings = Timers(), list[Firing]()
    for deadline_ns in deadlines_ns:
        timers.add(GuestNs(deadline_ns), firings.append)
    for n in range(1000):
        assert timers.remove(timers.add(GuestNs(n * stride_ns % 10**4), print))
        assert len(timers._queue) <= 2 * len(timers) + STALE_MAX
    assert timers.next_due_ns == min(deadlines_ns, default=None)
    assert timers.advance(GuestNs(10**4)) == len(deadlines_ns)
    assert [firing.deadline_ns for firing in firings] == sorted(deadlines_ns)


@pytest.mark.row("E2", "TM-03")
def test_how_one_call_splits_what_ended() -> None:
    """Of 5 ended periods a call covers all, or one and drops 4, or one and leaves 4 owed for its spacing."""
    assert Merge().share(5) == (5, 0, 0)
    assert Once().share(5) == (1, 4, 0)
    assert Replay(7).share(5) == (1, 0, 7)


@pytest.mark.row("P-28")
def test_a_heap_is_cleaned_once_removed_timers_predominate() -> None:
    """Of 100 timers 58 are removed without a search of the heap; the next makes 17 more than live, and cleans it."""
    timers = Timers()
    added = [timers.add(GuestNs(n), print) for n in range(100)]
    left = [len(timers._queue) for timer in added if timers.remove(timer)]
    assert left[:59] == [100] * 58 + [41]


@pytest.mark.row("P-15")
def test_a_timer_of_another_is_not_removed() -> None:
    """remove() takes its own timers only, though they are numbered alike."""
    one, other = Timers(), Timers()
    timer = one.add(GuestNs(1), print)
    other.add(GuestNs(1), print)
    assert not other.remove(timer)
    assert (one.remove(timer), one.remove(timer), len(one), len(other)) == (True, False, 0, 1)


class Device:
    """Something that lives as long as a callback of it is kept."""

    def expired(self, _: Firing) -> None:
        """Be told of a timer, and fail."""
        raise LookupError

    def updated(self, elapsed: int, hz: int) -> None:
        """Be told of cycles."""


def release(timers: Timers, kept: list[Timer], device: Device, how: str) -> None:
    """End all timers and updates of `device`; what they raised is gone when this returns."""
    if how == "clear":
        return timers.clear()
    if how == "expire":
        with contextlib.suppress(LookupError):
            timers.advance(GuestNs(10), 10)
    for timer in kept:
        assert timers.remove(timer) == (how == "remove" or timer.period_ns is not None)
    assert timers.remove_update(device.updated)
    return None


@pytest.mark.row("P-28")
@pytest.mark.parametrize("how", ["clear", "remove", "expire"])
def test_nothing_keeps_a_callback(how: str) -> None:
    """Without the garbage collector's help a device is freed with its timers, though these themselves are kept."""
    device, timers = Device(), Timers(cycles_hz=1)
    timers.add_update(device.updated)
    kept = [timers.add(GuestNs(n), device.expired, period_ns=period) for n in range(5) for period in (None, 3)]
    there = weakref.ref(device)
    gc.disable()
    try:
        release(timers, kept, device, how)
        del device
        assert there() is None
    finally:
        gc.enable()
    assert (len(timers), timers.next_due_ns, any(timer.active for timer in kept)) == (0, None, False)


@pytest.mark.row("P-28")
def test_clear_in_a_callback() -> None:
    """When a callback clears all, none that was due besides is called, and new timers can be added."""
    timers, calls = Timers(), list[str]()

    def clear(_: Firing) -> None:
        timers.clear()
        timers.add(GuestNs(0), lambda _: calls.append("new"))

    timers.add(GuestNs(1), clear, period_ns=1)
    timers.add(GuestNs(1), lambda _: calls.append("old"), period_ns=1)
    assert (timers.advance(GuestNs(5)), calls, len(timers)) == (1, [], 1)
    assert (timers.advance(GuestNs(5)), calls, len(timers)) == (1, ["new"], 0)


@pytest.mark.row("P-23")
@given(steps=st.lists(st.tuples(st.sampled_from("aard"), st.integers(0, 2), st.integers(0, 50)), max_size=40))
def test_one_timeout_is_active_for_each_vcpu(steps: list[tuple[str, int, int]]) -> None:
    """A second timeout is refused while one is active, and only then; each expires once, in order of deadlines."""
    timers, calls, expected = Timers(), list[int](), list[int]()
    timeouts, active = VcpuTimeouts(timers), dict[int, int]()
    for what, vcpu, ns in steps:
        then = timers.now + ns
        if what == "r":
            assert timeouts.remove(vcpu) == (active.pop(vcpu, None) is not None)
        elif what == "d":
            timers.advance(GuestNs(then))
            expected += sorted(deadline for deadline in active.values() if deadline <= then)
            active = {vcpu: deadline for vcpu, deadline in active.items() if deadline > then}
        elif vcpu in active:
            with pytest.raises(StateError, match=f"vCPU {vcpu} at {then} ns: one is active until {active[vcpu]} ns"):
                timeouts.add(vcpu, GuestNs(then), print)
        else:
            active[vcpu] = then
            timeouts.add(vcpu, GuestNs(then), lambda firing: calls.append(firing.deadline_ns))
        assert (calls, len(timers)) == (expected, len(active))


@pytest.mark.row("P-23")
def test_a_timeouts_callback_may_set_the_next() -> None:
    """On expiry a timeout is no longer active, so that its callback can go on with another."""
    timers, calls = Timers(), list[int]()
    timeouts = VcpuTimeouts(timers)

    def expired(firing: Firing) -> None:
        calls.append(firing.deadline_ns)
        timeouts.add(0, GuestNs(firing.deadline_ns + 10), expired)

    timeouts.add(0, GuestNs(10), expired)
    for now in range(0, 41, 5):
        timers.advance(GuestNs(now))
    assert calls == [10, 20, 30, 40]


@pytest.mark.row("E17")
def test_time_that_is_taken_back() -> None:
    """A timer that fired does not fire again; others, also new ones, fire at their deadlines, not before."""
    timers, fired = Timers(), list[int]()

    def note(firing: Firing) -> None:
        fired.append(firing.deadline_ns)

    for deadline_ns in (10, 90):
        timers.add(GuestNs(deadline_ns), note)
    timers.advance(GuestNs(50))
    timers.rewind(GuestNs(5))
    assert timers.now == 5
    timers.add(GuestNs(20), note)
    timers.advance(GuestNs(19))
    assert fired == [10]
    timers.advance(GuestNs(90))
    assert fired == [10, 20, 90]
    with pytest.raises(RangeError):
        timers.rewind(GuestNs(91))
    timers.add(GuestNs(0), lambda _: timers.rewind(GuestNs(0)))
    with pytest.raises(StateError):
        timers.advance(GuestNs(90))
