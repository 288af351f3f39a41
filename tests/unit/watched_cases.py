"""Random lives of a simulated guest, watched; and what of the watch's findings is not true of the guest.

`injected()` steps, drifts and has its TSC written in all ways; `clean()` does only what moves no clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import NamedTuple, Protocol

from pvclock.meter.watch.changes import Change, Disagreement, Step, TscBasis
from pvclock.meter.watch.poll import Poll
from pvclock.meter.watch.vm import VmEventKind
from pvclock.meter.watch.watcher import Watcher
from tests.oracle import NS_PER_S
from tests.unit.watched_guest import NS_PER_HOUR, State, WatchedGuest, apart, log_uniform

INTERVAL_NS = 10**7
STOPPED_MAX = 5
"""Polls at most while the guest is stopped."""

CHANGES_TSC = {VmEventKind.RESET, VmEventKind.MIGRATION}
LATE_MAX = 6
"""Polls at most until a vCPU enters."""


class Watches(Protocol):
    """What is asked of a watcher, a careless one, too."""

    def take(self, poll: Poll) -> list[Change]:
        """Take a poll."""

    def finish(self) -> list[Change]:
        """End."""

    @property
    def open_disagreements(self) -> list[Disagreement]:
        """Those that have not ended."""


MakesWatcher = Callable[[WatchedGuest], Watches]


def watcher_of(guest: WatchedGuest) -> Watches:
    """Return the real one."""
    return Watcher(len(guest.vcpus), host_tsc_hz=guest.khz * 1000, interval_ns=INTERVAL_NS)


class Found(NamedTuple):
    """At a poll: what was found, and which disagreements were open then."""

    poll: Poll
    changes: list[Change]
    open: list[Disagreement]


class Life:
    """One guest's life under watch."""

    def __init__(self, seed: int, make: MakesWatcher = watcher_of) -> None:
        self.rng = rng = random.Random(seed)  # noqa: S311  # no secret
        self.reads_offsets, self.tells = rng.random() < 0.6, rng.random() < 0.7
        khz, uptime_s = rng.randint(800_000, 5_000_000), rng.randint(1, 10**7)
        now = khz * 1000 * uptime_s
        offset = rng.choice([0, -rng.randrange(now), rng.randrange(10**12)])
        self.guest = WatchedGuest(
            khz,
            [offset] * rng.choice([1, 2, 2, 4]),
            now=now,
            ns=100 * NS_PER_HOUR + rng.randrange(NS_PER_HOUR),
            is_stable=rng.random() < 0.8,
            utc_ppm=rng.randint(-400, 400),
        )
        self.late: dict[int, int] = {}  # vCPUs that have not entered, and for how many polls they will not
        self.is_stopped = False
        self.watcher = make(self.guest)
        self.found: list[Found] = []
        self.poll()

    def live(self, acts: list[Callable[[Life], object]], polls: int) -> Life:
        """Do something at random between polls, and at times within one."""
        for _ in range(polls):
            torn = self.rng.random() < 0.1
            if not torn:
                self.act(acts)
            self.guest.pass_time(self.rng.randint(INTERVAL_NS // 2, INTERVAL_NS * 2))
            self.poll((lambda: self.act(acts)) if torn else int)
        self.settle()
        self.found.append(Found(self.found[-1].poll, self.watcher.finish(), []))
        return self

    def act(self, acts: list[Callable[[Life], object]]) -> None:
        """Do one of these, unless the guest is stopped, and let vCPUs enter whose time has come."""
        if not self.is_stopped:
            self.rng.choice(acts)(self)

    def poll(self, between: Callable[[], object] = int) -> None:
        """Take a poll, and hand it to the watcher."""
        poll = self.guest.look(reads_offsets=self.reads_offsets, tells=self.tells, between=between)
        self.found.append(Found(poll, self.watcher.take(poll), self.watcher.open_disagreements))
        if not self.is_stopped:
            for vcpu in [vcpu for vcpu, polls in self.late.items() if polls <= 0]:
                self.enter(vcpu)
            self.late = {vcpu: polls - 1 for vcpu, polls in self.late.items()}

    def settle(self) -> None:
        """Let all vCPUs enter, and take the polls that see it."""
        for vcpu in list(self.late):
            self.enter(vcpu)
        for _ in range(3):
            self.guest.pass_time(INTERVAL_NS)
            self.poll()

    def enter(self, vcpu: int) -> None:
        """A vCPU enters, and time passes."""
        self.late.pop(vcpu, None)
        self.guest.enter(vcpu)
        self.guest.pass_time(self.rng.randint(1, 2000))

    def enter_all(self, *, some_late: bool = True) -> None:
        """All vCPUs enter, in any order, some of them late."""
        for vcpu in self.rng.sample(self.guest.vcpus, len(self.guest.vcpus)):
            if some_late and self.rng.random() < 0.3:
                self.late[vcpu] = self.rng.randrange(LATE_MAX)
            else:
                self.enter(vcpu)

    @property
    def changes(self) -> list[Change]:
        """All that was found."""
        return [change for found in self.found for change in found.changes]

    @property
    def steps(self) -> list[Step]:
        """The steps that were found."""
        return [change for change in self.changes if isinstance(change, Step)]

    @property
    def disagreements(self) -> list[Disagreement]:
        """The disagreements that have ended."""
        return [change for change in self.changes if isinstance(change, Disagreement)]


# What a guest's life is made of


def nothing(life: Life) -> None:
    """Time passes."""


def stepped_ns(life: Life) -> int:
    """Return a step of 1 ns to 1 h, either way."""
    return round(log_uniform(life.rng, 1, NS_PER_HOUR)) * life.rng.choice([1, -1])


def step(life: Life) -> None:
    """The clock steps."""
    life.guest.anchor(stepped_ns(life))
    life.enter_all()


def reanchor(life: Life) -> None:
    """Another line goes on where the last one was."""
    life.guest.anchor()
    life.enter_all()


def reanchor_at_once(life: Life) -> None:
    """The same, and no vCPU is late."""
    life.guest.anchor()
    life.enter_all(some_late=False)


def many_steps(life: Life) -> None:
    """Many lines follow each other between two polls."""
    for _ in range(life.rng.randint(2, 20)):
        life.guest.pass_time(life.rng.randint(10, 10**5))
        life.guest.anchor(stepped_ns(life) // 20)
        life.enter_all(some_late=False)


def drift(life: Life) -> None:
    """The clock runs at another rate from here on, by 1 to 200 ppm."""
    khz = life.guest.khz
    life.guest.anchor(khz=khz + life.rng.choice([1, -1]) * life.rng.randint(1, khz // 5000))
    life.enter_all()


def adjust_tsc(life: Life) -> None:
    """A guest writes IA32_TSC_ADJUST of some vCPUs, and KVM brings their pages anew: the clock goes on."""
    offset = moved_offset(life)
    for vcpu in life.rng.sample(life.guest.vcpus, life.rng.randint(1, len(life.guest.vcpus))):
        life.guest.write_tsc(vcpu, offset)
        life.enter(vcpu)


def write_tsc(life: Life) -> None:
    """A guest writes IA32_TSC: its clock steps, and no page changes."""
    life.guest.write_tsc(life.rng.choice(life.guest.vcpus), moved_offset(life))


def reset(life: Life) -> None:
    """The VMM writes all TSCs anew, and says so."""
    life.guest.tell(life.rng.choice([VmEventKind.RESET, VmEventKind.MIGRATION]))
    reset_unsaid(life)


def reset_unsaid(life: Life) -> None:
    """The VMM writes all TSCs anew."""
    offset = moved_offset(life)
    for vcpu in life.guest.vcpus:
        life.guest.write_tsc(vcpu, offset)
    life.guest.anchor(stepped_ns(life))
    life.enter_all(some_late=False)


def stop(life: Life, step_ns: int = 0) -> None:
    """The VMM stops the guest for some polls, and its clock stands meanwhile, as QEMU's does."""
    life.guest.stop()
    life.is_stopped = True
    for _ in range(life.rng.randrange(STOPPED_MAX)):
        life.guest.pass_time(life.rng.randint(10**5, INTERVAL_NS))
        life.poll()
    life.guest.pass_time(life.rng.randint(10**5, INTERVAL_NS))
    life.guest.resume(step_ns)
    life.is_stopped = False
    life.enter_all()


def stop_and_go_on(life: Life) -> None:
    """The VMM stops the guest, writes its TSCs and continues it; the clock goes on as if it had not stood."""
    offset = moved_offset(life)
    life.guest.stop()
    life.is_stopped = True
    for _ in range(life.rng.randrange(STOPPED_MAX)):
        life.guest.pass_time(INTERVAL_NS)
        life.poll()
    for vcpu in life.guest.vcpus:
        life.guest.write_tsc(vcpu, offset)
    for _ in range(life.rng.randrange(STOPPED_MAX)):
        life.guest.pass_time(INTERVAL_NS)
        life.poll()
    life.guest.tell(VmEventKind.RESUME)
    life.is_stopped = False
    life.guest.anchor()
    life.enter_all(some_late=False)


def watcher_sleeps(life: Life) -> None:
    """Nobody polls for a second."""
    life.guest.pass_time(NS_PER_S)


def moved_offset(life: Life) -> int:
    """Return another TSC offset."""
    return life.guest.offset(0) + round(log_uniform(life.rng, 10, 10**13)) * life.rng.choice([1, -1])


INJECTED: list[Callable[[Life], object]] = [
    nothing,
    nothing,
    watcher_sleeps,
    reanchor,
    step,
    step,
    many_steps,
    drift,
    adjust_tsc,
    write_tsc,
    reset,
    reset_unsaid,
    stop,
]
CLEAN: list[Callable[[Life], object]] = [*[nothing] * 8, reanchor, reanchor_at_once, watcher_sleeps]
CLEAN_WITH_OFFSETS = [*CLEAN, adjust_tsc]
CLEAN_WITH_EVENTS = [*CLEAN_WITH_OFFSETS, stop_and_go_on]


def injected(seed: int, make: MakesWatcher = watcher_of, polls: int = 10) -> Life:
    """Return a life with all that can happen to a clock."""
    return Life(seed, make).live(INJECTED, polls)


def clean(seed: int, make: MakesWatcher = watcher_of, polls: int = 10) -> Life:
    """Return a life in which nothing happened to the clock."""
    life = Life(seed, make)
    acts = CLEAN if not life.reads_offsets else CLEAN_WITH_EVENTS if life.tells else CLEAN_WITH_OFFSETS
    return life.live(acts, polls)


# The truth


def untrue(life: Life) -> Iterator[str]:
    """Give each finding that is not true of the guest, or is missing."""
    for each in life.steps:
        yield from (f"{why}: {each}" for why in untrue_of_step(life, each))
    yield from missing_steps(life)
    for found in life.disagreements:
        yield from (f"{why}: {found}" for why in untrue_of_disagreement(life, found))
    yield from missing_disagreements(life)


def untrue_of_step(life: Life, found: Step) -> Iterator[str]:
    """Say what is not true of a step."""
    states = life.guest.between(found.vcpu, found.since, found.at)
    old, new = states[0], states[-1]
    if new.published - old.published != found.lines:
        yield f"{new.published - old.published} lines"
    if (old.page, new.page) != (found.before, found.after):
        yield "other pages"
    is_moved = len({state.offset for state in [*with_page_of(life, found.vcpu, old), *states]}) > 1
    if found.basis not in allowed(life, found):
        yield "another basis"
    if (found.step_ns is None) != (found.basis is TscBasis.CHANGED):
        yield "unknown, or not"
    if found.step_ns is not None and (found.basis is TscBasis.OFFSETS or not is_moved):
        true_ns = {new.at(states[-1].since) - was.at(states[-1].since) for was in with_page_of(life, found.vcpu, old)}
        if all(abs(found.step_ns - each) > (found.bound_ns or 0) for each in true_ns):
            yield f"truly {[float(each) for each in true_ns]}"
        if not is_moved:
            yield from untrue_of_pause(life, found, old, new)


def with_page_of(life: Life, vcpu: int, old: State) -> list[State]:
    """Return the states of a vCPU with that page: a TSC write that is on its way may count with the next line."""
    return [state for state in life.guest.history[vcpu] if state.published == old.published]


def allowed(life: Life, found: Step) -> set[TscBasis]:
    """Return what may be said of the TSC between two lines."""
    told = [
        each.at for each in life.guest.told if life.tells and each.event.kind in CHANGES_TSC and each.at <= found.at
    ]
    if life.reads_offsets:
        return {TscBasis.OFFSETS, TscBasis.CHANGED} if found.lines == 0 and told else {TscBasis.OFFSETS}
    if any(found.since < at for at in told):
        return {TscBasis.CHANGED}
    offsets = {state.offset for state in life.guest.history[found.vcpu] if state.since <= found.at}
    return {TscBasis.ASSUMED, TscBasis.CHANGED} if told or len(offsets) > 1 else {TscBasis.ASSUMED}


def untrue_of_pause(life: Life, found: Step, old: State, new: State) -> Iterator[str]:
    """Say what is not true of what the guest saw of a pause."""
    if found.seen_ns is None or found.seen_bound_ns is None:
        return
    stopping = [each for each in life.guest.told if each.event.kind in {VmEventKind.STOP, VmEventKind.RESUME}]
    pairs = [pair for pair in pairwise(stopping) if pair[1].event.kind is VmEventKind.RESUME]
    ended = [pair for pair in pairs if pair[1].event in found.events][-1:]
    true_ns = [new.at(resume.at) - old.at(stop.at) for stop, resume in ended]
    if found.lines == 1 and any(abs(found.seen_ns - each) > found.seen_bound_ns for each in true_ns):
        yield f"truly {float(true_ns[0])} ns seen"


def missing_steps(life: Life) -> Iterator[str]:
    """Say which lines were not told, and which sums are wrong."""
    for vcpu in life.guest.vcpus:
        steps = [each for each in life.steps if each.vcpu == vcpu]
        states = life.guest.history[vcpu]
        lines = states[-1].published - states[0].published
        if sum(each.lines for each in steps) != lines:
            yield f"vCPU {vcpu}: {sum(each.lines for each in steps)} lines, not {lines}: {steps}"
        rates = {state.page[3:5] for state in states}
        is_known = all(each.step_ns is not None for each in steps)
        if life.reads_offsets and is_known and len(rates) == 1:
            at = states[-1].since
            true_ns = states[-1].at(at) - states[0].at(at)
            told_ns, bound_ns = (sum(getattr(each, name) for each in steps) for name in ("step_ns", "bound_ns"))
            if abs(told_ns - true_ns) > bound_ns + len(steps):
                yield f"vCPU {vcpu}: {told_ns} in sum, truly {float(true_ns)}"


def share_tsc(life: Life, one: int, other: int) -> bool:
    """Did both vCPUs have one TSC all the time, or is theirs known?"""
    offsets = {state.offset for vcpu in (one, other) for state in life.guest.history[vcpu]}
    return life.reads_offsets or len(offsets) == 1


def untrue_of_disagreement(life: Life, found: Disagreement) -> Iterator[str]:
    """Say what is not true of a disagreement."""
    if (found.basis is TscBasis.OFFSETS) != life.reads_offsets:
        yield "another basis"
    if not share_tsc(life, found.ahead, found.behind):
        return
    begin = life.found[0].poll.middle
    pieces = list(apart(life.guest, found.ahead, found.behind, begin, life.found[-1].poll.middle))
    if all(max(one, other) + found.bound_ns < found.by_ns for _, _, one, other in pieces):
        yield "never so much"
    longest_ns = longest_ahead(pieces) * 10**6 // life.guest.khz
    if found.least_ns > longest_ns + 1:
        yield f"truly {longest_ns} ns at most"


def longest_ahead(pieces: list[tuple[int, int, Fraction, Fraction]]) -> int:
    """Return for how many ticks at most a vCPU was ahead at a stretch."""
    longest, since = Fraction(0), Fraction(pieces[0][0])
    for begin, end, first, last in pieces:
        crossing = begin + (end - begin) * first / (first - last) if first != last else Fraction(end)
        since = since if first > 0 else crossing if last > 0 else Fraction(end)
        longest = max(longest, (end if last > 0 else crossing) - since)
        since = since if last > 0 else Fraction(end)
    return ceil(longest)


def missing_disagreements(life: Life) -> Iterator[str]:
    """Say at which polls pages disagreed, or agreed, and the watch says otherwise."""
    for before, earlier, found in zip(life.found, life.found[1:], life.found[2:-1], strict=False):
        poll, offsets = found.poll, {each.poll.tsc_offsets for each in (before, earlier, found)}
        if None in poll.pages or not life.reads_offsets or None in poll.tsc_offsets or len(offsets) > 1:
            continue
        if any(state_moves(life, vcpu, poll) for vcpu in life.guest.vcpus) or was_stopped(life, poll):
            continue
        leads = [vcpu_lead(life, vcpu, poll) for vcpu in life.guest.vcpus]
        told_ns = max((each.by_ns for each in found.open), default=0)
        widest_ns = max(max(leads), -min(leads), key=abs)
        if widest_ns > told_ns + 4:
            yield f"at {poll.middle}: {told_ns} told, truly {float(widest_ns)}"
        if widest_ns <= 1 and found.open:
            yield f"at {poll.middle}: pages agree, and it says {found.open}"


def vcpu_lead(life: Life, vcpu: int, poll: Poll) -> Fraction:
    """Return how far a vCPU's clock is truly ahead of vCPU 0's."""
    at = poll.middle
    return life.guest.state(vcpu, at).at(at) - life.guest.state(0, at).at(at)


def was_stopped(life: Life, poll: Poll) -> bool:
    """Was the guest stopped, so that a written TSC does not count yet?"""
    kinds = [each.event.kind for each in life.guest.told if each.at <= poll.middle]
    return [kind for kind in kinds if kind not in CHANGES_TSC][-1:] == [VmEventKind.STOP]


def state_moves(life: Life, vcpu: int, poll: Poll) -> bool:
    """Was its TSC written under the present line?  That counts when it is seen twice."""
    now = life.guest.state(vcpu, poll.middle)
    return len({state.offset for state in with_page_of(life, vcpu, now)}) > 1
