"""A KeyboardInterrupt at each line of each operation of a clock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from pvclock import HostTsc
from tests.unit.clock_twins import OPERATIONS, Seen, Twin, Undisturbed, paused, restored, runs_on, twin_before
from tests.unit.clocks import NS_PER_S, guest_ns, guest_tsc
from tests.unit.fault_points import product
from tests.unit.schedules import At, Place, places_in
from tests.waiting import HANG_S

VISITS = (pytest.param(1, id="first"), pytest.param(2, id="second", marks=pytest.mark.long))
"""A line is interrupted the first time that it is run, or the second time as well: between two vCPUs, say."""


def interrupted(operate: Callable[[], object], place: Place) -> bool:
    """Interrupt `operate` at a place of another one that was alike; False if it did not come there."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    at = At(place, interrupt)
    with suppress(KeyboardInterrupt), at.traced():
        operate()
    return at.has_come


def seen_by_another_thread(twin: Twin) -> Seen:
    """What is seen of it; that another thread can use the clock shows that no lock was left taken."""
    found: list[Seen] = []
    thread = threading.Thread(target=lambda: found.append(twin.seen()), daemon=True)
    thread.start()
    thread.join(HANG_S)
    assert found, "a lock was left taken"
    return found[0]


def a_paused_twin() -> Twin:
    """See paused()."""
    twin = Twin()
    paused(twin)
    return twin


def a_restored_twin() -> Twin:
    """See restored()."""
    twin = Twin()
    restored(twin)
    return twin


@pytest.mark.row("E9", "E1")
@pytest.mark.parametrize("visits", VISITS)
@pytest.mark.parametrize(
    "name",
    [name for name in OPERATIONS if name != "restore and resume"],  # each of these is there by itself
)
def test_an_interrupt_at_each_line(name: str, visits: int) -> None:
    """The operation is whole and recorded, or not begun and done by the next try; no lock is left taken."""
    undisturbed, twin = Undisturbed(name), twin_before(name)
    operate = undisturbed.operation.operate
    places = places_in(lambda: operate(twin), product(), visits)
    assert len(places) > 10
    assert twin.seen() == undisturbed.after
    for place in places:
        twin = twin_before(name)
        assert interrupted(lambda: operate(twin), place)  # noqa: B023  # called at once
        undisturbed.check(twin, seen_by_another_thread(twin))


@pytest.mark.row("P-22", "E9")
def test_an_interrupt_at_each_line_of_run_for() -> None:
    """It was not begun, or the clock has run and is paused again, and runs on when it is told to."""
    twin, kinds = a_paused_twin(), set()
    before = twin.seen()
    places = places_in(lambda: twin.clock.run_for(NS_PER_S, "advance"), product())
    assert twin.clock.is_paused
    for place in places:
        twin = a_paused_twin()
        assert interrupted(lambda: twin.clock.run_for(NS_PER_S, "advance"), place)  # noqa: B023  # called at once
        found = seen_by_another_thread(twin)
        if found != before:
            kinds.add(tuple(event.kind for event in found.events[len(before.events) :]))
        runs_on(twin)
    assert kinds == {("resume", "pause")}


@pytest.mark.row("P-10", "E9")
def test_an_interrupted_resume_moves_the_line_once() -> None:
    """Tried again as often as it takes, resume() leaves out the pause once: guests read on from where they stood."""
    twin, moved = a_paused_twin(), set()
    places = places_in(lambda: twin.clock.resume("freeze"), product())
    assert len(places) > 10
    for place in places:
        twin = a_paused_twin()
        stood_ns = twin.clock.read(0)
        assert abs(stood_ns - NS_PER_S) <= 1
        assert interrupted(lambda: twin.clock.resume("freeze"), place)  # noqa: B023  # called at once
        if twin.clock.is_paused:
            twin.clock.resume("freeze")
        moved |= {guest_ns(twin.backend, twin.memory, vcpu) - stood_ns for vcpu in range(2)}
        moved |= {twin.clock.read(0) - stood_ns, twin.clock.shown_at(twin.backend.tsc) - stood_ns}
    assert moved <= {0, 1}


@pytest.mark.row("E9")
def test_an_interrupted_resume_gives_every_vcpu_its_saved_tsc() -> None:
    """Tried again at once after a restore, resume() gives each vCPU its saved TSC, on the host and in pages."""
    twin = a_restored_twin()
    places = places_in(lambda: twin.clock.resume("freeze"), product())
    assert len(places) > 10
    for place in places:
        twin = a_restored_twin()
        assert twin.saved is not None
        saved = [vcpu.guest_tsc for vcpu in twin.saved.vcpus]
        assert interrupted(lambda: twin.clock.resume("freeze"), place)  # noqa: B023  # called at once
        if twin.clock.is_paused:
            assert [twin.clock.reading(vcpu).tsc for vcpu in range(2)] == saved
            twin.clock.resume("freeze")
        by_host = [guest_tsc(twin.backend, vcpu) for vcpu in range(2)]
        assert [abs(guest_ns(twin.backend, twin.memory, vcpu) - NS_PER_S) <= 2 for vcpu in range(2)] == [True, True]
        assert by_host == [twin.clock.guest_tsc(vcpu, twin.backend.tsc) for vcpu in range(2)] == saved
        assert [twin.clock.reading(vcpu).tsc for vcpu in range(2)] == saved
        later = HostTsc(twin.backend.tsc + 100)
        assert [twin.clock.guest_tsc(vcpu, later) for vcpu in range(2)] == [tsc + 100 for tsc in saved]
