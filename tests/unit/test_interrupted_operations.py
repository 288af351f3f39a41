"""A KeyboardInterrupt at each line of each operation of a clock."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from pvclock import HostTsc
from tests.unit.clock_twins import OPERATIONS, Twin, Undisturbed, paused, restored, runs_on, twin_before
from tests.unit.clocks import NS_PER_S, guest_ns, guest_tsc
from tests.unit.fault_points import product
from tests.unit.schedules import LIMIT_S, Lines

VISITS = (pytest.param(1, id="first"), pytest.param(2, id="second", marks=pytest.mark.long))
"""A line is interrupted the first time that it is run, or the second time as well: between two vCPUs, say."""


def interrupted(operate: Callable[[], object], at: int, visits: float = math.inf) -> bool:
    """Interrupt `operate` before the line `at` that it runs, of each line's first visits; False if it ends before."""
    has_come = False

    def interrupt() -> None:
        nonlocal has_come
        has_come = True
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt), Lines(*product(), at=at, action=interrupt, visits=visits).traced():
        operate()
    return has_come


def check_not_locked(twin: Twin) -> None:
    """Another thread can use the clock."""
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.append(twin.seen()), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert seen, "a lock was left taken"


@pytest.mark.row("E9", "E1")
@pytest.mark.parametrize("visits", VISITS)
@pytest.mark.parametrize(
    "name",
    [name for name in OPERATIONS if name != "restore and resume"],  # each of these is there by itself
)
def test_an_interrupt_at_each_line(name: str, visits: int) -> None:
    """The operation is whole and recorded, or not begun and done by the next try; no lock is left taken."""
    undisturbed, at = Undisturbed(name), 0
    while True:
        twin = twin_before(name)
        operate = undisturbed.operation.operate
        if not interrupted(lambda: operate(twin), at, visits):  # noqa: B023  # called at once
            break
        check_not_locked(twin)
        undisturbed.check(twin)
        at += 1
    assert at > 10
    assert twin.seen() == undisturbed.after


@pytest.mark.row("P-22", "E9")
def test_an_interrupt_at_each_line_of_run_for() -> None:
    """It was not begun, or the clock has run and is paused again, and runs on when it is told to."""
    at, kinds = 0, set()
    while True:
        twin = Twin()
        paused(twin)
        before = twin.seen()
        if not interrupted(lambda: twin.clock.run_for(NS_PER_S, "advance"), at):  # noqa: B023  # called at once
            break
        check_not_locked(twin)
        found = twin.seen()
        if found != before:
            kinds.add(tuple(event.kind for event in found.events[len(before.events) :]))
        runs_on(twin)
        at += 1
    assert kinds == {("resume", "pause")}
    assert twin.clock.is_paused


@pytest.mark.row("P-10", "E9")
def test_an_interrupted_resume_moves_the_line_once() -> None:
    """Tried again as often as it takes, resume() leaves out the pause once: guests read on from where they stood."""
    at, moved = 0, set()
    while True:
        twin = Twin()
        paused(twin)
        stood_ns = twin.clock.read(0)
        assert abs(stood_ns - NS_PER_S) <= 1
        was_interrupted = interrupted(lambda: twin.clock.resume("freeze"), at)  # noqa: B023  # called at once
        if twin.clock.is_paused:
            twin.clock.resume("freeze")
        moved |= {guest_ns(twin.backend, twin.memory, vcpu) - stood_ns for vcpu in range(2)}
        moved |= {twin.clock.read(0) - stood_ns, twin.clock.shown_at(twin.backend.tsc) - stood_ns}
        if not was_interrupted:
            break
        at += 1
    assert at > 10
    assert moved <= {0, 1}


@pytest.mark.row("E9")
def test_an_interrupted_resume_gives_every_vcpu_its_saved_tsc() -> None:
    """Tried again at once after a restore, resume() gives each vCPU its saved TSC, on the host and in pages."""
    at = 0
    while True:
        twin = Twin()
        restored(twin)
        assert twin.saved is not None
        saved = [vcpu.guest_tsc for vcpu in twin.saved.vcpus]
        was_interrupted = interrupted(lambda: twin.clock.resume("freeze"), at)  # noqa: B023  # called at once
        if twin.clock.is_paused:
            assert [twin.clock.reading(vcpu).tsc for vcpu in range(2)] == saved
            twin.clock.resume("freeze")
        by_host = [guest_tsc(twin.backend, vcpu) for vcpu in range(2)]
        assert [abs(guest_ns(twin.backend, twin.memory, vcpu) - NS_PER_S) <= 2 for vcpu in range(2)] == [True, True]
        assert by_host == [twin.clock.guest_tsc(vcpu, twin.backend.tsc) for vcpu in range(2)] == saved
        assert [twin.clock.reading(vcpu).tsc for vcpu in range(2)] == saved
        later = HostTsc(twin.backend.tsc + 100)
        assert [twin.clock.guest_tsc(vcpu, later) for vcpu in range(2)] == [tsc + 100 for tsc in saved]
        if not was_interrupted:
            break
        at += 1
    assert at > 10
