"""Where a search cannot tell which places are a VM's pages, the versions do: those that move, when they move."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from pvclock import ClockScale, Gpa, GuestNs, GuestTsc, TimeInfo
from pvclock.meter.findings import TIME_INFO
from pvclock.meter.watch.page_choice import PageChoice
from pvclock.meter.watch.page_search import SearchTerms, find_pages
from tests.guest_ram import MemoryRam, made_of

pytestmark = pytest.mark.row("E3")

TERMS = SearchTerms(2_445_406_000, newest_tsc=GuestTsc(10**12))
SCALE = ClockScale.from_hz(TERMS.tsc_hz)
SEABIOS, LINUX, COPY = Gpa(0xE8C20), Gpa(0x20_1000), Gpa(0x12_13F8)


def line(version: int = 2, tsc: int = 10**11, flags: int = 1) -> TimeInfo:
    """A legal page."""
    return TimeInfo(version, GuestTsc(tsc), GuestNs(tsc // 2), SCALE.mul, SCALE.shift, flags)


def ram_with(pages: dict[Gpa, TimeInfo]) -> MemoryRam:
    """RAM that holds these."""
    return made_of({gpa: TIME_INFO.pack(*info) for gpa, info in pages.items()}, 4 << 20)


def chosen_of(places: Iterable[Gpa], vcpus: int = 1) -> PageChoice:
    """A choice of what a search finds, after the first poll."""
    choice = PageChoice.of(find_pages(ram_with(dict.fromkeys(places, line())), vcpus, TERMS), TERMS)
    return choice.after([line()] * len(choice.places))


def after(choice: PageChoice, **moved: TimeInfo | None) -> PageChoice:
    """The choice after a poll in which some places have changed."""
    names = {"seabios": SEABIOS, "linux": LINUX, "linux1": LINUX + 64, "copy": COPY, "copy1": COPY + 64}
    changed = {names[name]: info for name, info in moved.items()}
    return choice.after([changed.get(gpa, line()) for gpa in choice.places])


def test_nothing_moves() -> None:
    """An undisturbed page never changes, so all stay possible, the likeliest first."""
    choice = chosen_of([SEABIOS, LINUX])
    for _ in range(3):
        choice = after(choice)
        assert (choice.pages, choice.places, choice.is_settled) == ((LINUX,), (LINUX, SEABIOS), False)


def test_the_likeliest_move() -> None:
    """They are the VM's, and there is nothing left to choose from, whatever the others do."""
    choice = after(chosen_of([SEABIOS, LINUX]), linux=line(4, 2 * 10**12))
    assert (choice.pages, choice.places, choice.is_settled) == ((LINUX,), (LINUX,), True)


def test_another_moves() -> None:
    """A guest whose page is not where Linux would have it: the watch changes over to that."""
    choice = after(chosen_of([SEABIOS, LINUX]), seabios=line(4, 2 * 10**12))
    assert (choice.pages, choice.is_settled) == ((SEABIOS,), True)
    assert after(choice, seabios=line(6, 3 * 10**12)).pages == (SEABIOS,)


@pytest.mark.parametrize("vcpu", ["linux", "linux1"])
def test_one_vcpus_page_lags(vcpu: str) -> None:
    """KVM brings a page up to date when its vCPU enters: one that has moved is enough for all."""
    choice = after(chosen_of([SEABIOS, LINUX, Gpa(LINUX + 64)], 2), **{vcpu: line(4, 2 * 10**12)})
    assert (choice.pages, choice.is_settled) == ((LINUX, LINUX + 64), True)


def test_a_copy_that_follows_its_page() -> None:
    """A guest's copy comes to the line of its page, when that was seen to move or before: it is no page for that."""
    late = chosen_of([COPY, LINUX])
    late = late._replace(versions={**late.versions, LINUX: 4})  # the page had moved, and the copy had not
    poll = {"linux": line(4, 2 * 10**11), "copy": line(4, 2 * 10**11)}
    assert after(late, **poll).pages == (LINUX,)
    assert after(chosen_of([COPY, LINUX]), **poll).pages == (LINUX,)


def test_a_page_that_changes_while_it_is_polled() -> None:
    """Nothing can be said against it, though its copy has been seen to move."""
    choice = after(chosen_of([COPY, LINUX]), linux=None, copy=line(4, 2 * 10**12))
    assert choice.pages == (LINUX,)
    choice = after(choice, linux=line(4, 2 * 10**12), copy=line(4, 2 * 10**12))
    assert (choice.pages, choice.is_settled) == ((LINUX,), True)


def test_several_others_move() -> None:
    """Those stay possible, in their order, until the first of them moves again."""
    choice = chosen_of([SEABIOS, Gpa(0x5000), Gpa(0x9000)])
    moved = [line(), line(4, 2 * 10**12), line(4, 2 * 10**12)]
    choice = choice.after(moved)
    assert (choice.pages, choice.places) == ((0x9000,), (0x9000, SEABIOS))
    assert choice.after([line(6, 3 * 10**12), line(4, 2 * 10**12)]).places == (0x9000,)


@pytest.mark.parametrize(
    "rubbish",
    [line(7), line(0), line(4, 0), line(4, 10**13, 4), line(4, 10**13)._replace(tsc_to_system_mul=SCALE.mul ^ 1 << 30)],
)
def test_memory_that_is_used_for_something_else(rubbish: TimeInfo) -> None:
    """What a place of the firmware's holds then is no move of a version, and the place is polled no more."""
    choice = after(chosen_of([SEABIOS, LINUX]), seabios=rubbish)
    assert (choice.pages, choice.places) == ((LINUX,), (LINUX,))
    assert after(chosen_of([SEABIOS, LINUX]), linux=rubbish).places == (LINUX, SEABIOS)


def test_pages_that_are_lost_give_way_to_those_that_move() -> None:
    """What lies where they were says nothing of when the line was."""
    lost = line(4, 2**63, 4)
    assert after(chosen_of([SEABIOS, LINUX]), linux=lost, seabios=line(4, 2 * 10**11)).pages == (SEABIOS,)
