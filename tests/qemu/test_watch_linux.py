"""A stock Linux guest that is watched from outside, held against what its own sampler saw: where KVM runs it.

A step is the watch's, from two lines of a page; the guest's, from two triples, is known but for the triples' widths.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import pytest

from pvclock import Gpa, Reference
from pvclock.errors import PagesNotFound
from pvclock.lab.kernel import Kernel
from pvclock.meter.watch.changes import Disagreement, Step, TscBasis
from pvclock.meter.watch.lines import is_same_line, ns_per_tick, value_at
from pvclock.meter.watch.loop import Finding, WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.poll import Poll
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.readings import TimeInfo
from qemu_glue.watch.target import open_vm
from tests.guest_programs import Triple
from tests.qemu.linux_guest import BOOT_LIMIT_S, Gap, LinuxGuest
from tests.qemu.watch_process import watching as watch_command

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.row("E3")]

SETUPS: Final = [("q35", 1), ("microvm", 1), ("microvm", 2), ("q35", 2)]
ids = [f"{machine}-{vcpus}" for machine, vcpus in SETUPS]
everywhere = pytest.mark.parametrize("guest", SETUPS, indirect=True, ids=ids)
on_q35 = pytest.mark.parametrize("guest", SETUPS[:1], indirect=True, ids=ids[:1])
two_vcpus = pytest.mark.parametrize("guest", SETUPS[2:], indirect=True, ids=ids[2:])

PAGE_BYTES: Final = 64
"""Of Linux's array, from one vCPU's page to the next."""
FIRMWARE_END: Final = 1 << 20
STOPPED_S: Final = 1.0
LAG_S: Final = 0.15
"""Less than an idle Linux sleeps between two timers, often: an expired one would have vCPU 0 enter at once."""
LAG_INTERVAL_S: Final = 0.003
"""A page lags for ms, often."""
FLOORS_NS: Final = 4
"""Readings are cut to whole ns: two of the guest's, and two of a line."""

T = TypeVar("T")


@pytest.fixture(scope="module")
def guest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kernel: Kernel
) -> Iterator[LinuxGuest]:
    """A guest that samples; of two vCPUs the first is left idle, which may then enter late."""
    request.getfixturevalue("debugfs")
    machine, vcpus = request.param
    folder = tmp_path_factory.mktemp("linux")
    sample_on = "1" if vcpus > 1 else "0"
    with LinuxGuest(folder, kernel, machine=machine, vcpus=vcpus, sample_on=sample_on) as guest:
        guest.fact("alive")
        yield guest


class Watching:
    """A watch that goes on look by look, and all that it found."""

    def __init__(self, loop: WatchLoop) -> None:
        self.found = loop.begin()
        self.loop = loop
        self.findings: list[Finding] = []
        self._looks = loop.looks()

    def look(self) -> Poll:
        """Look once."""
        look = next(self._looks)
        self.findings += look.findings
        return look.poll

    def until(self, done: Callable[[], bool]) -> None:
        """Look until it is done."""
        deadline = time.monotonic() + BOOT_LIMIT_S
        while not done():
            assert time.monotonic() < deadline, self.findings
            self.look()

    def of(self, kind: type[T], known: int = 0) -> list[T]:
        """What it found of that kind, beyond the first `known` findings."""
        return [finding for finding in self.findings[known:] if isinstance(finding, kind)]

    def steps(self, vcpu: int, known: int = 0) -> list[Step]:
        """The steps of that vCPU's page, beyond the first `known` findings."""
        return [step for step in self.of(Step, known) if step.vcpu == vcpu]


def rest(seconds: float) -> bool:
    """Wait, as a watch that nobody ends."""
    time.sleep(max(seconds, 0))
    return False


@contextmanager
def watching(guest: LinuxGuest, given: Sequence[Gpa] = (), interval_s: float | None = None) -> Iterator[Watching]:
    """Watch a guest by its QMP socket, and by what that leads to.  given: its pages, which are searched otherwise."""
    with open_vm(qmp=str(guest.qmp_path)) as vm:
        yield Watching(WatchLoop(vm, Reference.RAW, wait=rest, given=given, interval_s=interval_s))


def stop_and_continue(guest: LinuxGuest, watch: Watching, seconds: float) -> int:
    """QMP stop, and cont after so long, with looks meanwhile.

    Returns how much was found before cont; whatever new line of a page is found after that is of cont.  (KVM writes all
    pages anew every 300 s, too, and it may do so just before the stop.)
    """
    guest.execute("stop")
    end_s = time.monotonic() + seconds
    watch.look()
    while time.monotonic() < end_s:
        watch.look()
    known = len(watch.findings)
    guest.execute("cont")
    return known


def look_until_all_stepped(guest: LinuxGuest, watch: Watching, known: int) -> None:
    """Look until each vCPU has taken its line of cont, and the guest has sampled its clock by them all.

    A vCPU that is idle, or gets no CPU, takes its line late; as long as vCPU 0 has not, the guest goes by its old one.
    """
    watch.until(lambda: all(watch.steps(vcpu, known) for vcpu in range(guest.vcpus)))
    poll = watch.look()
    offset = poll.tsc_offsets[-1]  # it samples on the last vCPU
    assert offset is not None
    sampled_beyond(guest, poll.end + offset)


def pages_of(guest: LinuxGuest, after: int = 0) -> tuple[Gpa, ...]:
    """Where the guest says that its pages are."""
    first = int(guest.fact("pages", after))
    return tuple(Gpa(first + PAGE_BYTES * vcpu) for vcpu in range(guest.vcpus))


def guest_step_ns(gaps: Sequence[Gap], line: TimeInfo) -> tuple[int, int]:
    """The least and the most that the guest's clock stepped against its TSC in these gaps, at the rate of `line`."""
    rate = ns_per_tick(line)
    ahead_ns = sum(gap.newer.ns - gap.older.ns for gap in gaps)
    most = sum((gap.newer.after - gap.older.before) * rate for gap in gaps)
    least = sum((gap.newer.before - gap.older.after) * rate for gap in gaps)
    return int(ahead_ns - most) - FLOORS_NS * len(gaps), int(ahead_ns - least) + FLOORS_NS * len(gaps)


def sampled_beyond(guest: LinuxGuest, tsc: int) -> None:
    """Wait until the guest has sampled its clock at a later TSC."""
    guest.wait_for(lambda: any(it.before > tsc for it in guest.log.triples()) or None, f"triple beyond {tsc}")


@everywhere
def test_pages_are_found(guest: LinuxGuest) -> None:
    """The pages of a guest of which nothing is known are where it says; not that which SeaBIOS leaves on q35."""
    assert guest.fact("clocksource") == "kvm-clock"
    with watching(guest) as watch:
        assert watch.loop.vm.why_no_offsets is None
        assert watch.found.pages == pages_of(guest)
        left = [gpa for gpa in watch.loop.finder.places if gpa < FIRMWARE_END]
        assert bool(left) == (guest.machine == "q35")


@everywhere
def test_step_is_the_guests(guest: LinuxGuest) -> None:
    """The step at stop and cont, against the TSC, is what the guest saw, within the widths of its triples."""
    with watching(guest, pages_of(guest)) as watch:
        watch.look()
        said = len(guest.log)
        known = stop_and_continue(guest, watch, STOPPED_S)
        look_until_all_stepped(guest, watch, known)
        watch.look()
    steps = watch.steps(0)
    assert {step.basis for step in steps} == {TscBasis.OFFSETS}
    step_ns = sum(step.step_ns or 0 for step in steps)
    gaps = guest.log.gaps(said)
    least_ns, most_ns = guest_step_ns(gaps, steps[0].before)
    assert step_ns < -STOPPED_S * 0.9e9
    assert least_ns <= step_ns <= most_ns
    # A page of vCPU 0 that lagged had the clock go on as the TSC did, and then go back: the stop is no part of that.
    lagged_ns = sum(back.by_ns for back in guest.log.backs(said))
    went_on_ns = gaps[-1].newer.ns - gaps[0].older.ns + lagged_ns
    assert max((step.seen_ns or 0) - (step.seen_bound_ns or 0) for step in steps) <= went_on_ns


@everywhere
def test_reading_is_the_guests(guest: LinuxGuest) -> None:
    """The absolute reading is the guest's CLOCK_MONOTONIC, which had 0 when Linux began."""
    with watching(guest, pages_of(guest)) as watch:
        first, before_ns = reading(watch)
        said = len(guest.log)
        base, triple = guest.wait_for(lambda: two_of(guest.log.triples(said)), "two triples")
        page, after_ns = reading(watch)
    assert is_same_line(page, first)  # the guest clears a flag, and KVM writes the same anew, whenever they like
    least_ns, most_ns = base.ns - value_at(page, base.after), base.ns - value_at(page, base.before)
    # `base` may have been taken before the first look, and was told after it; `triple` was taken after that.
    assert before_ns + least_ns - FLOORS_NS <= triple.ns <= after_ns + most_ns + FLOORS_NS


def reading(watch: Watching) -> tuple[TimeInfo, int]:
    """vCPU 0's page and what it shows (ns), by the first look that does not find it being written."""
    shown: list[tuple[TimeInfo | None, int | None]] = []

    def is_known() -> bool:
        poll = watch.look()
        shown.append((poll.pages[0], watch.loop.watcher.readings(poll)[0]))
        return None not in shown[-1]

    watch.until(is_known)
    page, ns = shown[-1]
    assert page is not None
    assert ns is not None
    return page, ns


def two_of(triples: list[Triple]) -> tuple[Triple, Triple] | None:
    """The first two, once there are two."""
    return (triples[0], triples[1]) if len(triples) > 1 else None


class Lag(NamedTuple):
    """What a pause brought.  back_ns: how far the guest's clock went back at most.  step_ns: of vCPU 0's page.

    told: that the pages of the two vCPUs disagreed.
    """

    back_ns: int
    step_ns: int
    told: list[Disagreement]


def pause(guest: LinuxGuest, watch: Watching) -> Lag:
    """Stop and continue a guest with two vCPUs, and look until its pages are up to date, and it has read them."""
    said, begun = len(guest.log), len(watch.findings)
    known = stop_and_continue(guest, watch, LAG_S)
    look_until_all_stepped(guest, watch, known)
    watch.until(lambda: not watch.loop.watcher.open_disagreements)
    return Lag(
        max((back.by_ns for back in guest.log.backs(said)), default=0),
        sum(step.step_ns or 0 for step in watch.steps(0, begun)),
        watch.of(Disagreement, begun),
    )


def starve(guest: LinuxGuest, vcpu: int) -> None:
    """Have this vCPU's thread run only when nothing else wants a CPU, as on a host with too many VMs."""
    thread = guest.execute("query-cpus-fast")[vcpu]["thread-id"]
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


@two_vcpus
def test_lagging_page(guest: LinuxGuest) -> None:
    """The page of a vCPU 0 that enters late lags: the guest's clock goes back, and the watch tells by how much."""
    starve(guest, 0)
    with watching(guest, pages_of(guest), LAG_INTERVAL_S) as watch:
        watch.look()
        end_s = time.monotonic() + BOOT_LIMIT_S
        lags = [pause(guest, watch)]
        while not (lags[-1].back_ns and lags[-1].told):  # a lag may be over between two looks
            assert time.monotonic() < end_s, lags
            lags.append(pause(guest, watch))
    assert all(lag.back_ns <= FLOORS_NS - lag.step_ns for lag in lags)
    widest = max(lags[-1].told, key=lambda it: it.by_ns)
    assert (widest.ahead, widest.behind) == (0, 1)
    assert 0 < lags[-1].back_ns <= widest.by_ns + widest.bound_ns + FLOORS_NS


@on_q35
def test_command(guest: LinuxGuest) -> None:
    """The command finds pages and step, and Ctrl-C ends it with a summary."""
    said = len(guest.log)
    with watch_command("--qmp", str(guest.qmp_path), limit_s=int(BOOT_LIMIT_S)) as watch:
        guest.execute("stop")
        guest.execute("cont")
        # KVM writes the page anew every 300 s, too, which is no length of a step.
        *_, step = watch.lines_until_one(lambda line: line["kind"] == "step" and line["step_ns"] != 0)
        watch.interrupt()
        _, result, status = watch.end()
    assert status == 0
    assert tuple(watch.found["pages"]) == tuple(result["pages"]) == pages_of(guest)
    line = TimeInfo(**step["after"])
    sampled_beyond(guest, line.tsc_timestamp)
    least_ns, most_ns = guest_step_ns(guest.log.gaps(said), line)
    assert least_ns <= step["step_ns"] <= most_ns


@on_q35
def test_reset(guest: LinuxGuest) -> None:
    """A reset is told, the pages of the system that boots then are found, and no step leads to them."""
    with watching(guest) as watch:
        watch.look()
        said = len(guest.log)
        guest.execute("system_reset")
        watch.until(lambda: bool(guest.log.of("pages", said)))
        pages = pages_of(guest, said)
        watch.until(lambda: watch.loop.finder.pages == pages and not watch.loop.finder.is_searching)
    assert VmEventKind.RESET in [event.kind for event in watch.of(VmEvent)]
    assert watch.of(PagesFound)[-1].pages == pages
    assert all(step.basis is not TscBasis.ASSUMED for step in watch.of(Step))


def test_without_kvmclock(kernel: Kernel, tmp_path: Path) -> None:
    """A guest that has no kvmclock ends a watch before it begins, with the reason."""
    # q35 has an HPET; a microvm has no other clock that Linux boots by.
    with LinuxGuest(tmp_path, kernel, machine="q35", cpu_flags=("-kvmclock",)) as guest:
        assert guest.fact("clocksource") != "kvm-clock"
        with pytest.raises(PagesNotFound, match="no kvmclock"), watching(guest):
            pass
