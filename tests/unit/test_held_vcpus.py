"""Where the backend's vCPUs run on, time is neither stopped nor reset under them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pvclock import GuestClock, GuestMemory, SimulatedBackend, StateError, StateFileError
from pvclock.timekeeping.events import Event
from tests.unit.clocks import NS_PER_S, SYSTEM_TIME


class OwnVcpus(SimulatedBackend):
    """A host that has vCPUs of its own; `held` says whether they stay out of the guest."""

    def __init__(self) -> None:
        super().__init__(2_500_000_000, tsc=10**13)
        self.held: bool | None = False
        self.quiesced = 0
        self.asked_while_quiesced: list[bool] = []

    @contextmanager
    def quiesce(self, vcpu: int | None) -> Iterator[None]:
        """See Backend."""
        self.quiesced += 1
        try:
            yield
        finally:
            self.quiesced -= 1

    def vcpus_are_out(self) -> bool | None:
        """See Backend."""
        self.asked_while_quiesced.append(self.quiesced > 0)
        return self.held


def a_vm() -> tuple[GuestClock, OwnVcpus]:
    """A VM that has run for 1 s."""
    backend = OwnVcpus()
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 1, backend=backend)
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    clock.write_msr(0, 0xC0000103, 7)
    backend.advance(ns=NS_PER_S)
    clock.tick()
    return clock, backend


@pytest.mark.row("E9", "E1")
@pytest.mark.parametrize("name", ["pause", "reset"])
def test_time_is_not_stopped_under_vcpus_that_run(name: str) -> None:
    """pause() and reset() are StateErrors that say what to hold; pages, MSRs, events and time are as they were."""
    clock, backend = a_vm()
    image, last, line = clock.memory.read(0, 1 << 16), clock.events.last, clock.line
    with pytest.raises(
        StateError,
        match=rf"{name}: the vCPUs run; hold them first: .*Runner\.pause\(\), or what your backend's vcpus_are_out",
    ):
        getattr(clock, name)()
    assert clock.memory.read(0, 1 << 16) == image
    assert (clock.events.last, clock.line, clock.is_paused, backend.quiesced) == (last, line, False, 0)
    assert clock.read_msr(0, 0xC0000103) == 7
    backend.advance(ns=NS_PER_S)
    assert clock.now() == 2 * NS_PER_S


@pytest.mark.row("E9", "E1")
@pytest.mark.parametrize("held", [True, None])
@pytest.mark.parametrize("name", ["pause", "reset"])
def test_vcpus_that_are_held_or_the_vmms_own_are_no_hindrance(name: str, held: bool | None) -> None:
    """None is a VMM that answers for its vCPUs itself."""
    clock, backend = a_vm()
    backend.held = held
    getattr(clock, name)()
    assert clock.is_paused == (name == "pause")
    assert (clock.read_msr(0, 0xC0000103) == 0) == (name == "reset")


@pytest.mark.row("E9", "E1")
@pytest.mark.parametrize("name", ["pause", "reset"])
def test_it_is_asked_where_a_racing_resume_has_to_wait(name: str) -> None:
    """Within the gate, so that who lets the vCPUs in meanwhile comes before the question or after the pause."""
    clock, backend = a_vm()
    backend.held = True
    getattr(clock, name)()
    assert backend.asked_while_quiesced[0]


@pytest.mark.row("E9", "E1")
def test_a_paused_clock_is_not_reset_under_vcpus_that_run() -> None:
    """Their pages would go while they read."""
    clock, backend = a_vm()
    backend.held = True
    clock.pause()
    backend.held = False
    with pytest.raises(StateError, match="reset: the vCPUs run"):
        clock.reset()
    assert clock.page(0) is not None


@pytest.mark.row("E9", "E5")
def test_a_guests_tsc_write_needs_no_other_vcpu_to_be_held() -> None:
    """WRMSR 0x10 comes while other vCPUs run."""
    clock, _ = a_vm()
    clock.write_msr(0, 0x10, 5)
    assert clock.read_msr(0, 0x10) == 5


def a_paused_vm() -> tuple[GuestClock, OwnVcpus]:
    """The same, paused: its clock keeps the vCPUs out, whoever else lets them in."""
    clock, backend = a_vm()
    backend.held = True
    clock.pause()
    assert backend.quiesced == 1
    return clock, backend


@pytest.mark.row("E9", "E1")
def test_an_interrupted_pause_keeps_the_vcpus_out_if_time_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt that comes while the pause is recorded comes out of a clock that is paused, and holds its vCPUs."""
    clock, backend = a_vm()
    backend.held = True
    record, interrupts = clock.events.record, iter([KeyboardInterrupt])

    def interrupted(event: Event) -> Event:
        for interrupt in interrupts:
            raise interrupt
        return record(event)

    monkeypatch.setattr(clock.events, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        clock.pause()
    assert clock.is_paused
    assert backend.quiesced == 1
    clock.resume()
    assert backend.quiesced == 0


@pytest.mark.row("E9")
def test_a_rolled_back_guest_runs_on() -> None:
    """A clock restored over a paused one of the same VM holds the vCPUs in its place, and lets them go at resume()."""
    old, backend = a_paused_vm()
    new = GuestClock.restore(old.save(), old.memory, backend=backend)
    assert backend.quiesced == 1
    new.resume()
    assert backend.quiesced == 0
    with pytest.raises(StateError, match="another clock has taken over"):
        old.resume()


@pytest.mark.row("E9")
def test_a_restore_that_fails_leaves_the_vcpus_out() -> None:
    """The clock that was there is paused as before, and lets its vCPUs go when it is resumed."""
    old, backend = a_paused_vm()
    state = old.save()
    unknown = state._replace(provider=state.provider._replace(config={"profile": "none of ours"}))
    with pytest.raises(StateFileError):
        GuestClock.restore(unknown, old.memory, backend=backend)
    assert old.is_paused
    assert backend.quiesced == 1
    old.resume()
    assert backend.quiesced == 0


@pytest.mark.row("E9")
def test_a_new_clock_in_the_place_of_a_paused_one_lets_the_vcpus_go() -> None:
    """Its time goes on at once, so nothing keeps them out."""
    old, backend = a_paused_vm()
    GuestClock(old.memory, 1, backend=backend)
    assert backend.quiesced == 0
