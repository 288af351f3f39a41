"""Bad input to what a VMM does to time: an error that says what is wrong, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pvclock import (
    ConfigError,
    GuestClock,
    GuestMemory,
    HostTsc,
    RangeError,
    SimulatedBackend,
    StateError,
    StateFileError,
    WrongType,
)
from pvclock.clock.guest_clock import GUEST_STOPPED
from pvclock.timekeeping.catchup import Advance, Policy, Slew
from tests.unit.clocks import NS_PER_S, SYSTEM_TIME, a_clock, bound_ns, guest_ns, page_of

HZ = 2_596_132_000

WRONG: dict[str, Callable[[GuestClock], object]] = {
    "skip back": lambda clock: clock.skip(-1),
    "skip beyond the end": lambda clock: clock.skip(2**64),
    "skip nearly to the end, and on": lambda clock: clock.skip(2**64 - 10**9),
    "offset beyond the end": lambda clock: clock.offset(2**64),
    "offset back": lambda clock: clock.offset(-1),
    "slew beyond the end": lambda clock: clock.slew(2**64),
    "slew at no rate": lambda clock: clock.slew(1, 0),
    "dilate to a standstill": lambda clock: clock.dilate(0),
    "dilate backwards": lambda clock: clock.dilate(1, -1),
    "dilate beyond any page": lambda clock: clock.dilate(2**80),
    "dilate below any page": lambda clock: clock.dilate(1, 2**80),
    "run for nothing": lambda clock: clock.run_for(0),
    "run what runs": lambda clock: clock.run_for(1),
    "resume what runs": lambda clock: clock.resume(),
    "follow what is none": lambda clock: clock.follow("tai"),
    "follow at no rate": lambda clock: clock.follow("raw", max_ppm=0),
}


@pytest.mark.row("E1", "E12")
@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_values_change_nothing(name: str) -> None:
    """Each is refused with what was wrong; timeline, page, events and policy are as they were, and time goes on."""
    clock, backend, memory = a_clock(HZ)
    backend.advance(ns=3 * NS_PER_S)
    clock.refresh()
    image = memory.read(0, 1 << 16)
    before = clock.line, clock.rate, page_of(clock), clock.events.last, clock.policy, clock.skew_ns, clock.reference
    with pytest.raises((RangeError, StateError, ValueError)):
        WRONG[name](clock)
    assert (
        clock.line,
        clock.rate,
        page_of(clock),
        clock.events.last,
        clock.policy,
        clock.skew_ns,
        clock.reference,
    ) == before
    assert memory.read(0, 1 << 16) == image
    backend.advance(ns=NS_PER_S)
    clock.refresh()
    assert clock.at(backend.tsc) == 4 * NS_PER_S
    assert abs(guest_ns(backend, memory) - 4 * NS_PER_S) <= 1


@pytest.mark.row("E1", "E13")
@pytest.mark.parametrize("operation", ["skip", "offset"])
def test_parts_of_a_ns_are_refused(operation: str) -> None:
    """A step is of whole ns: a float is of a wrong type, with nothing changed."""
    clock, _, _ = a_clock(HZ)
    with pytest.raises(WrongType, match=r"ns is 1.5, a float; it can be a whole number"):
        getattr(clock, operation)(1.5)
    assert clock.events.last == 2  # its start, and its page's


@pytest.mark.row("E2", "E12")
@given(
    dilation=st.tuples(st.integers(1, 2**70), st.integers(1, 2**70)),
    hz=st.sampled_from([1000, 999_999_937, HZ, 2**40]),
    target_ns=st.integers(-(10**12), 10**12),
    max_ppm=st.sampled_from([1, 500, 999_999, 10**7]),
)
@example((1, 1), 999_999_937, 27_974_046_184, 10**7)  # 11 times as fast: a page is soon 2 s old
def test_whatever_dilation_is_taken_can_be_slewed(
    dilation: tuple[int, int], hz: int, target_ns: int, max_ppm: int
) -> None:
    """A dilation is refused, or each slew and correction on it works, with terms of any length, and guests read on."""
    clock, backend, memory = a_clock(hz)
    try:
        clock.dilate(*dilation)
    except RangeError:
        assert clock.dilation == 1
        return
    clock.follow("raw", max_ppm=100_000)
    clock.slew(target_ns, max_ppm)
    last_ns = guest_ns(backend, memory)
    for _ in range(4):
        clock.tick()
        backend.advance(ns=max(min(int(NS_PER_S / clock.rate), NS_PER_S), 1))  # what a page may age, in guest time
        backend.ref_ns += 10**8  # type: ignore[assignment]  # a RefNs and an int
        now_ns = guest_ns(backend, memory)
        assert now_ns >= last_ns
        assert abs(now_ns - clock.at(backend.tsc)) <= bound_ns(page_of(clock), clock.rate * NS_PER_S / hz, backend.tsc)
        last_ns = now_ns
    assert clock.rate > 0
    assert clock.dilation == Fraction(*dilation)


@pytest.mark.row("E12", "E13")
def test_a_rate_that_no_page_shows_is_told_by_what_was_given() -> None:
    """The dilation and the TSC's frequency are named, and between what a page can show them."""
    clock, _, _ = a_clock(HZ)
    with pytest.raises(
        RangeError,
        match=r"^dilation 1e\+10 on a TSC of 2596132000 Hz is 3.85e\+09 ns a tick; a page can show .* to 1.93e\+08",
    ):
        clock.dilate(10**10, 1)
    clock.dilate(500_000_000, 1)
    with pytest.raises(RangeError, match=r"^dilation 1 on a TSC of 1 Hz is 1e\+09 ns a tick; a page can show"):
        GuestClock(GuestMemory(bytearray(1 << 14)), backend=SimulatedBackend(1))


@pytest.mark.row("E13")
@pytest.mark.parametrize("tsc", [-1, 2**64, -(2**64), 2**70])
def test_what_no_tsc_can_be(tsc: int) -> None:
    """at() does not take it for another instant."""
    clock, _, _ = a_clock(HZ)
    with pytest.raises(RangeError, match=r"^host_tsc is .*; it can be 0 to 2\^64 - 1$"):
        clock.at(HostTsc(tsc))


LONG = "x" * 10_000
LONG_VALUES: dict[str, Callable[[GuestClock], object]] = {
    "provider": lambda clock: GuestClock(clock.memory, backend=clock.backend, provider=LONG),
    "profile": lambda clock: GuestClock(clock.memory, backend=clock.backend, profile=LONG),
    "reference": lambda clock: clock.follow(LONG),
    "vcpu_host": lambda clock: GuestClock(clock.memory, backend=clock.backend, vcpu_host=LONG),
    "version": lambda clock: GuestClock(clock.memory, backend=clock.backend, provider="KVM", version=10**5000),
    "policy": lambda clock: setattr(clock, "policy", LONG),
    "sleep": lambda _: SimulatedBackend(HZ).sleep(ns=1, tsc=LONG),  # type: ignore[arg-type]
}


@pytest.mark.row("E13")
@pytest.mark.parametrize("name", LONG_VALUES)
def test_a_long_value_is_cut(name: str) -> None:
    """A message says what was wrong, and not all of it."""
    clock, _, _ = a_clock(HZ)
    with pytest.raises(ConfigError) as caught:
        LONG_VALUES[name](clock)
    assert len(str(caught.value)) < 400


@pytest.mark.row("E1")
def test_a_state_with_a_dilation_that_no_page_shows() -> None:
    """Restoring it is a StateFileError that names the field."""
    clock, backend, memory = a_clock(HZ)
    clock.pause()
    state = clock.save()
    broken = state._replace(timeline=state.timeline._replace(dilation=Fraction(1, 2**90)))
    with pytest.raises(StateFileError, match=r"timeline\.dilation"):
        GuestClock.restore(broken, memory, backend=backend)


@pytest.mark.row("E2", "E13")
@pytest.mark.parametrize("policy", [Slew(500.0), Slew(500, 1.5), Advance(1.5)])  # type: ignore[arg-type]  # on purpose
def test_policies_take_whole_numbers(policy: Policy) -> None:
    """A float in a policy is an error at once, not at every refresh from then on."""
    clock, backend, _ = a_clock(HZ)
    with pytest.raises(WrongType, match="a float; it can be a whole number"):
        clock.policy = policy
    with pytest.raises(WrongType, match=r"max_ppm is 500.0, a float; it can be a whole number"):
        clock.slew(1000, 500.0)  # type: ignore[arg-type]  # on purpose
    backend.advance(ns=NS_PER_S)
    clock.refresh()
    assert not clock.skew_ns


class StuckBackend(SimulatedBackend):
    """A host whose vCPUs sometimes cannot be kept out of the guest."""

    stuck = False

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """See Backend."""
        if self.stuck:
            raise StateError("quiesce", "a vCPU does not leave the guest", "end it")
        return super().quiesce(vcpu)


def stuck_clock() -> tuple[GuestClock, StuckBackend]:
    """A clock with a page on such a host."""
    backend = StuckBackend(HZ)
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), backend=backend)
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    backend.advance(ns=NS_PER_S)
    clock.refresh()
    return clock, backend


@pytest.mark.row("E1", "E9")
def test_a_resume_that_fails_can_be_tried_again() -> None:
    """vCPUs that do not leave the guest: the clock stays paused, with no event, and the next resume works."""
    clock, backend = stuck_clock()
    clock.pause()
    backend.advance(ns=NS_PER_S)
    before = clock.line, clock.events.last
    backend.stuck = True
    with pytest.raises(StateError, match="does not leave"):
        clock.resume("advance")
    assert (clock.is_paused, clock.line, clock.events.last) == (True, *before)
    backend.stuck = False
    clock.resume("advance")
    assert abs(clock.read(0) - 2 * NS_PER_S) <= 2
    assert clock.reading(0).flags & GUEST_STOPPED


@pytest.mark.row("E2", "E9")
def test_a_slew_that_fails_is_none() -> None:
    """The same at slew(), where flags are to be changed, too: nothing is owed afterwards."""
    clock, backend = stuck_clock()
    backend.tsc_stable = False
    backend.stuck = True
    with pytest.raises(StateError, match="does not leave"):
        clock.slew(1000)
    assert not clock.skew_ns
    assert clock.rate == 1
    assert clock.events.last == 2  # its start, and its page's


@pytest.mark.row("P-22", "E9")
def test_a_run_that_fails_ends_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    """run_for() on vCPUs that do not run: the error comes out, and the clock is paused again."""
    clock, backend = stuck_clock()
    clock.pause()
    monkeypatch.setattr(StuckBackend, "run_until", fails)
    with pytest.raises(StateError, match="does not run"):
        clock.run_for(NS_PER_S)
    assert clock.is_paused
    monkeypatch.undo()
    assert 0 <= clock.run_for(NS_PER_S).ran_ns - NS_PER_S < 1
    assert abs(guest_ns(backend, clock.memory) - 2 * NS_PER_S) <= 2


@pytest.mark.row("P-22", "E9")
def test_a_run_whose_on_dirty_raises_ends_paused() -> None:
    """What on_dirty raises as the run begins comes out, the clock is paused again, and nothing is refused later."""
    clock, backend, memory = a_clock(HZ)
    clock.pause()
    memory.on_dirty = raises
    with pytest.raises(ZeroDivisionError):
        clock.run_for(NS_PER_S)
    memory.on_dirty = None
    assert clock.is_paused
    assert 0 <= clock.run_for(NS_PER_S).ran_ns - NS_PER_S < 1
    assert abs(guest_ns(backend, memory) - NS_PER_S) <= 2
    clock.resume()
    clock.pause()
    assert clock.is_paused


def raises(_gpa: int, _length: int) -> None:
    """An on_dirty with a mistake."""
    raise ZeroDivisionError


def fails(_self: StuckBackend, _tsc: HostTsc) -> None:
    """Not run."""
    raise StateError("run", "a vCPU does not run", "end it")
