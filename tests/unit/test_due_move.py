"""Pages that KVM was to write anew and has not written are dead."""

from __future__ import annotations

import pytest

from pvclock import GuestNs, GuestTsc, TimeInfo
from pvclock.meter.watch.due_move import LIMIT_S, DueMove
from pvclock.meter.watch.vm import VmEvent, VmEventKind

pytestmark = pytest.mark.row("E3")

STOP, RESUME = VmEvent(VmEventKind.STOP, 0), VmEvent(VmEventKind.RESUME, 0)
POLL_S = LIMIT_S / 100


def page(version: int) -> TimeInfo:
    """A page of that version."""
    return TimeInfo(version, GuestTsc(version), GuestNs(5), 1 << 31, 0, 1)


class Polls:
    """Polls of two pages, the first of them at 100 s."""

    def __init__(self) -> None:
        self.due, self.now_s = DueMove(), 100.0
        self.take()

    def take(
        self, *events: VmEvent, versions: tuple[int, int] = (2, 2), offset: int | None = 7, count: int = 1
    ) -> bool:
        """So many polls, of which the first has the events; was one told as dead?"""
        told = []
        for number in range(count):
            self.now_s += POLL_S
            told.append(self.due.take([*map(page, versions)], offset, events if number == 0 else (), self.now_s))
        return any(told)


@pytest.mark.parametrize("events", [[RESUME], [STOP, RESUME], [RESUME, STOP, RESUME]])
def test_pages_that_stay_as_they_are_when_the_vm_goes_on(events: list[VmEvent]) -> None:
    """They are dead once a vCPU has had the time to run; that is told once."""
    polls = Polls()
    assert (polls.take(*events, count=99), polls.due.is_open) == (False, True)
    assert (polls.take(count=3), polls.due.is_open) == (True, False)
    assert not polls.take(count=300)


def test_stops_in_a_row_give_no_more_time() -> None:
    """The first of them is the one that counts."""
    polls = Polls()
    assert polls.take(STOP, RESUME) + sum(polls.take(STOP, RESUME) for _ in range(102)) == 1


@pytest.mark.parametrize("versions", [(4, 2), (2, 4)])
def test_one_page_that_moves_shows_that_they_live(versions: tuple[int, int]) -> None:
    """KVM writes a vCPU's page when that vCPU runs, and the other may be idle."""
    polls = Polls()
    assert not polls.take(STOP, RESUME, count=50)
    assert not polls.take(versions=versions)
    assert not polls.due.is_open
    assert not polls.take(versions=versions, count=300)


def test_events_that_come_late() -> None:
    """The pages may have moved before the VMM's word of it was taken."""
    polls = Polls()
    polls.take(versions=(4, 4), count=20)
    assert not polls.take(STOP, RESUME, versions=(4, 4), count=300)


def test_a_vm_that_stands_writes_nothing() -> None:
    """It has all the time once it goes on."""
    polls = Polls()
    polls.take(STOP, RESUME, count=50)
    assert not polls.take(STOP, count=300)
    assert not polls.take(RESUME, count=99)
    assert polls.take(count=3)


def test_a_tsc_that_is_written() -> None:
    """By an offset that is another; one that cannot be read for a moment is none."""
    polls = Polls()
    assert not polls.take(offset=None, count=3)
    assert not polls.take(count=300)
    assert not polls.take(offset=8, count=99)
    assert polls.take(offset=8, count=3)
