"""Budgets of a test for a clock on a simulated host: what breaks them, what does not, and what stays undecided."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, GuestClock, GuestMemory, SimulatedBackend, StateError, WrongType
from pvclock.meter.verdict_status import VerdictStatus
from pvclock.quantities import NS_PER_S
from pvclock.testing.clock_budget import ClockBudget

pytestmark = pytest.mark.row("E3")

TSC_HZ = 2_500_000_000
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01
PAGES = (0x1000, 0x2000)


class Guest:
    """A guest with two vCPUs, whose pages are registered."""

    def __init__(self, reference: str = "off") -> None:
        self.host = SimulatedBackend(TSC_HZ, tsc=10**12, ref_ns=4 * 10**11, realtime_ns=1_800_000_000 * NS_PER_S)
        self.memory = GuestMemory(bytearray(1 << 16))
        self.clock = GuestClock(self.memory, 2, backend=self.host, reference=reference)
        for vcpu, page in enumerate(PAGES):
            self.clock.write_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW, page | 1)

    def budget(self, **how: Any) -> ClockBudget:  # noqa: ANN401  # ClockBudget's
        """A budget for its clock."""
        return ClockBudget(self.clock, **how)

    def pause(self, policy: str) -> None:
        """A second's pause, between two seconds."""
        self.host.advance(ns=NS_PER_S)
        self.clock.pause()
        self.host.advance(ns=NS_PER_S)
        self.clock.resume(policy)
        self.host.advance(ns=NS_PER_S)


def told_by(budget: ClockBudget, change: Callable[[], object]) -> str:
    """What it fails with; empty if it is kept."""
    try:
        with budget:
            change()
    except AssertionError as failure:
        return str(failure)
    return ""


def test_a_clock_that_is_left_alone_keeps_it() -> None:
    """Refreshes, and changes of rate where only steps are counted, are no steps; not even of 3 ns."""
    guest = Guest()

    def live() -> None:
        for factor in (1, 2, 3, 1):
            guest.clock.dilate(factor, 3)
            for _ in range(50):
                guest.host.advance(ns=10**8 + 7)
                guest.clock.refresh()

    assert told_by(guest.budget(step="30ns"), live) == ""


@pytest.mark.parametrize("step_ns", [1002, 10**9])
def test_a_step_breaks_it(step_ns: int) -> None:
    """One beyond the budget, however much time passes on either side; one that is within it does not."""
    guest = Guest()

    def skip() -> None:
        guest.host.advance(ns=NS_PER_S)
        guest.clock.skip(step_ns)
        guest.host.advance(ns=NS_PER_S)

    told = told_by(guest.budget(step="999ns"), skip)
    assert told.startswith("the guest's clock broke its budget:\n  vCPU 0's clock stepped by +")
    assert told_by(guest.budget(step=f"{step_ns + 3}ns"), skip) == ""


def test_steps_that_cancel_each_other_break_it() -> None:
    """Each line is looked at, so what came and went between two looks of a thread would not get away."""
    guest = Guest()

    def there_and_back() -> None:
        for sign in (1, -1):
            page = bytearray(guest.memory.read(PAGES[0], 32))
            page[16:24] = (int.from_bytes(page[16:24], "little") + sign * 5000).to_bytes(8, "little")
            page[0:4] = (int.from_bytes(page[0:4], "little") + 2).to_bytes(4, "little")
            guest.memory.write(PAGES[0], bytes(page))  # as a broken clock would

    assert "stepped by +5.00" in told_by(guest.budget(step="1us"), there_and_back)


@pytest.mark.parametrize(
    ("policy", "allow_pauses", "fault"),
    [
        ("freeze", True, ""),
        ("freeze", False, "stepped by -999.999"),
        ("advance", False, ""),
        ("advance", True, "stepped by +1.000"),
    ],
)
def test_a_pause_counts_by_the_tsc_or_by_what_the_guest_saw(policy: str, allow_pauses: bool, fault: str) -> None:
    """A frozen clock has lost the pause against its TSC; one that advanced was seen to step by its guest."""
    guest = Guest()
    told = told_by(guest.budget(step="5us", allow_pauses=allow_pauses), lambda: guest.pause(policy))
    assert fault in told
    assert bool(told) == bool(fault)


@pytest.mark.parametrize(("numerator", "denominator"), [(1, 2), (999_999, 1_000_000)])
def test_a_rate_breaks_it_although_it_was_changed_back(numerator: int, denominator: int) -> None:
    """The fastest and the slowest of all lines count, not the last."""
    guest = Guest()

    def drift() -> None:
        guest.clock.dilate(numerator, denominator)
        guest.host.advance(ns=NS_PER_S)
        guest.clock.dilate(1)
        guest.host.advance(ns=NS_PER_S)

    assert "vCPU 0's rate is -" in told_by(guest.budget(drift="900ppb"), drift)
    assert told_by(guest.budget(drift="600000ppm"), drift) == ""


@given(
    ppb=st.integers(-400_000, 400_000).filter(lambda each: abs(abs(each) - 1000) > 10),
    seconds=st.integers(1, 100),
)
def test_a_rate_is_judged_as_it_is(ppb: int, seconds: int) -> None:
    """Any rate, known to a few ppb after a second, is within 1 ppm or beyond it as its definition says."""
    guest = Guest()

    def drift() -> None:
        guest.clock.dilate(NS_PER_S + ppb, NS_PER_S)
        guest.host.advance(ns=seconds * NS_PER_S)
        guest.clock.refresh()

    guest.clock.dilate(NS_PER_S + ppb, NS_PER_S)
    assert bool(told_by(guest.budget(drift="1ppm"), drift)) == (abs(ppb) > 1000)


def test_a_rate_that_is_not_known_leaves_it_undecided() -> None:
    """No time passed: that fails, too, for nothing was shown."""
    guest = Guest()
    told = told_by(guest.budget(drift="1ppb"), lambda: None)
    assert told.startswith("it is undecided whether the guest's clock kept to its budget:\n")


def test_pages_that_moved_leave_it_undecided() -> None:
    """What was looked at was no page of the guest's any more."""
    guest = Guest()
    budget = guest.budget(step="1us")
    told = told_by(budget, lambda: guest.clock.write_msr(1, MSR_KVM_SYSTEM_TIME_NEW, 0x3001))
    assert "registered other pages" in told
    assert budget.verdict is not None
    assert budget.verdict.status is VerdictStatus.UNDECIDED


def test_the_body_s_error_comes_first() -> None:
    """It is what is raised; the verdict is there all the same."""
    guest = Guest()
    budget = guest.budget(step="1us")

    def fail() -> None:
        guest.clock.skip(NS_PER_S)
        raise KeyError

    with pytest.raises(KeyError):
        told_by(budget, fail)
    assert budget.verdict is not None
    assert budget.verdict.status is VerdictStatus.BROKEN


def test_the_memory_s_own_on_dirty_is_called_and_comes_back() -> None:
    """What logs dirty pages goes on to do so."""
    guest = Guest()
    dirty: list[int] = []

    def note(gpa: int, _length: int) -> None:
        dirty.append(gpa)

    guest.memory.on_dirty = note
    with guest.budget(step="1us"):
        guest.clock.refresh()
    assert set(dirty) == set(PAGES)
    assert guest.memory.on_dirty is note


def test_a_clock_that_follows_is_held_against_its_reference() -> None:
    """A TSC that is 50 ppm off its nominal frequency is no drift of a clock that follows CLOCK_MONOTONIC_RAW."""
    guests = {reference: Guest(reference=reference) for reference in ("off", "raw")}

    def live(guest: Guest) -> None:
        for _ in range(5):
            guest.host.advance(ns=NS_PER_S)
            guest.host.ref_ns += 50_000  # type: ignore[assignment]  # of a RefNs and an int
            guest.clock.tick()

    for guest in guests.values():
        for _ in range(20):
            live(guest)
    assert told_by(guests["raw"].budget(drift="100ppb"), lambda: live(guests["raw"])) == ""
    assert "rate is -49.99" in told_by(guests["off"].budget(drift="100ppb"), lambda: live(guests["off"]))


def test_a_guest_without_pages() -> None:
    """Its budget cannot begin."""
    guest = Guest()
    guest.clock.write_msr(1, MSR_KVM_SYSTEM_TIME_NEW, 0)
    with pytest.raises(StateError, match="has not registered its clock's pages"):
        guest.budget(step="1us").__enter__()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({}, 'give step="1us", drift="100 ppb" or both'),
        ({"step": "1 minute"}, "units are ns, us, ms, s"),
        ({"drift": "1us"}, "units are ppb, ppm"),
        ({"step": "1us", "reference": "tai"}, "choose raw, monotonic, realtime"),
    ],
)
def test_budgets_that_are_none(how: dict[str, Any], why: str) -> None:
    """ConfigError, which says what can be given."""
    with pytest.raises(ConfigError, match=re.escape(why)):
        Guest().budget(**how)


@pytest.mark.parametrize("how", [{"step": Fraction(1)}, {"step": "1us", "allow_pauses": 1}])
def test_budgets_of_wrong_types(how: dict[str, Any]) -> None:
    """WrongType; and for a guest that is none."""
    with pytest.raises(WrongType):
        Guest().budget(**how)
    with pytest.raises(WrongType, match="a Machine, a GuestClock or a WatchedVm"):
        ClockBudget(object(), step="1us")  # type: ignore[arg-type]
