"""Guest time by a clock's events alone, as their JSON lines have them: what the clock itself says of any instant."""

from __future__ import annotations

import json
import random
from fractions import Fraction

import pytest

from pvclock import ConfigError, GuestClock, GuestMemory, RangeError, SimulatedBackend, WrongType
from pvclock.quantities import HostTsc
from pvclock.state import clock_state
from pvclock.timekeeping.event_timeline import EventTimeline, timeline_of
from pvclock.timekeeping.events import Event, EventKind
from tests.model.exact_clock import random_life, stepped
from tests.model.twins import Twins
from tests.unit.clock_twins import OPERATIONS, Twin, twin_before
from tests.unit.clocks import NS_PER_S, a_clock

HZ = 2_596_132_000
LIVES = 60


def rebuilt(clock: GuestClock) -> EventTimeline:
    """The timeline in the JSON lines of a clock's log."""
    return timeline_of(clock.events.json_lines())


def instants(clock: GuestClock, now: HostTsc, source: random.Random, count: int) -> list[HostTsc]:
    """Some host TSCs from the first event to now: at events, and between them."""
    stamps = [event.host_tsc for event in clock.events.read().events if event.host_tsc is not None]
    least, most = min(stamps), max(now, *stamps)
    return [HostTsc(source.choice((source.choice(stamps), source.randint(least, most)))) for _ in range(count)]


def compare(clock: GuestClock, now: HostTsc, source: random.Random) -> int:
    """Hold the rebuilt timeline against the clock wherever that knows; returns how many instants those were."""
    timeline, known = rebuilt(clock), 0
    for tsc in instants(clock, now, source, 8):
        try:
            wanted = clock.at(tsc)
        except RangeError:
            continue
        assert timeline.at(tsc) == wanted
        known += 1
    return known


# Any life


@pytest.mark.row("E15", "E9")
def test_random_lives_can_be_rebuilt_from_their_lines() -> None:
    """After some of the moves of random lives, faults of the host included: to the last digit, as clock.at() has it."""
    known = 0
    for seed in range(LIVES):
        source, twins = random.Random(seed), None  # noqa: S311  # no secret
        for twins in stepped(random_life(seed)):
            if source.random() < 0.2:
                known += compare(twins.clock, HostTsc(twins.host.tsc), source)
        assert isinstance(twins, Twins)
        known += compare(twins.clock, HostTsc(twins.host.tsc), source)
    assert known > 10 * LIVES


@pytest.mark.row("E15", "E9")
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "republish"])
def test_each_operation_can_be_rebuilt(name: str) -> None:
    """What a clock was before each operation and goes on as after it; republish() alone leaves no event."""
    twin: Twin = twin_before(name)
    OPERATIONS[name].operate(twin)
    twin.go_on()
    assert compare(twin.clock, HostTsc(twin.backend.tsc), random.Random(name))  # noqa: S311  # no secret


@pytest.mark.row("E15")
def test_the_time_since_the_last_event() -> None:
    """A line goes on as its event says, whatever the TSC does after; at a step it is the time after it."""
    clock, backend, _ = a_clock(HZ)
    backend.advance(ns=NS_PER_S)
    clock.dilate(1, 10)
    backend.advance(ns=NS_PER_S)
    clock.skip(7)
    timeline, skipped = rebuilt(clock), backend.tsc
    assert timeline.at(skipped) == clock.at(skipped) == NS_PER_S * 11 // 10 + 7
    assert timeline.at(HostTsc(skipped - HZ)) == NS_PER_S
    assert timeline.at(HostTsc(skipped + 10 * HZ)) == NS_PER_S * 21 // 10 + 7


@pytest.mark.row("E15", "E1")
def test_an_offset_that_the_host_refuses_at_resume() -> None:
    """The event that tells of it is of the time that stood: the line that goes on is the resume's."""
    clock, backend, memory = a_clock(HZ)
    backend.advance(ns=NS_PER_S)
    clock.pause()
    there = SimulatedBackend(HZ, tsc=10**12, honours_tsc_offset=False)
    restored = GuestClock.restore(clock.save(), memory, backend=there)
    restored.resume("freeze")
    there.advance(ns=NS_PER_S)
    assert [event.kind for event in restored.events.read().events][-2:] == [EventKind.REFUSED, EventKind.RESUME]
    assert rebuilt(restored).at(there.tsc) == restored.at(there.tsc) == 2 * NS_PER_S


# What is not known


@pytest.mark.row("E15")
def test_lost_events_are_not_guessed_at() -> None:
    """Between two events of which others are missing guest time is an error that says which; before and after it is."""
    clock, backend, _ = a_clock(HZ)
    for _ in range(4):
        backend.advance(ns=NS_PER_S)
        clock.skip(5)
    events = clock.events.read().events
    begun = len(events) - 4
    timeline = EventTimeline([*events[: begun + 1], *events[begun + 3 :]])
    assert timeline.at(HostTsc(HZ - 1)) == clock.at(HostTsc(HZ - 1)) == Fraction((HZ - 1) * NS_PER_S, HZ)
    assert timeline.at(HostTsc(4 * HZ)) == clock.at(HostTsc(4 * HZ)) == 4 * NS_PER_S + 20
    with pytest.raises(RangeError, match=f"events {begun + 2} to {begun + 3}"):
        timeline.at(HostTsc(2 * HZ))


@pytest.mark.row("E15", "E9")
def test_what_was_before_is_of_another_numbering() -> None:
    """A TSC that went back, running or paused, and a restore: instants from before it are errors, as in clock.at()."""
    clock, backend, memory = a_clock(HZ, tsc=10**12)
    backend.advance(ns=NS_PER_S)
    before = backend.tsc
    clock.pause()
    backend.tsc = HostTsc(5)
    backend.ref_ns += NS_PER_S  # type: ignore[assignment]  # a RefNs and an int
    clock.resume("advance")
    for timeline in (clock, rebuilt(clock)):
        with pytest.raises(RangeError):
            timeline.at(HostTsc(4))
    assert rebuilt(clock).at(HostTsc(5)) == clock.at(HostTsc(5)) == 2 * NS_PER_S
    clock.pause()
    there = SimulatedBackend(HZ, tsc=before)
    restored = GuestClock.restore(clock_state.from_json(clock_state.to_json(clock.save())), memory, backend=there)
    there.advance(ns=1)
    assert rebuilt(restored).at(there.tsc) == restored.at(there.tsc) == 2 * NS_PER_S
    with pytest.raises(RangeError, match="before the first event"):
        rebuilt(restored).at(HostTsc(before - 1))


@pytest.mark.row("E15", "E13")
def test_what_is_no_log() -> None:
    """Events out of order or of two logs, without a place, or no events at all: errors that say so."""
    clock, _, _ = a_clock(HZ)
    clock.skip(1)
    first, *others = clock.events.read().events
    with pytest.raises(ConfigError, match="event 1 after 3; sequence numbers must rise"):
        EventTimeline([*others, first])
    with pytest.raises(ConfigError, match="event 1 has no tsc_hz"):
        EventTimeline([first._replace(tsc_hz=None)])
    with pytest.raises(ConfigError, match="event 0 has no host_tsc"):
        EventTimeline([Event(EventKind.SKIP, "by hand")])
    with pytest.raises(ConfigError, match="not JSON"):
        timeline_of("{")
    with pytest.raises(WrongType, match=r"lines is 5, an int"):
        timeline_of([first.to_json(), 5])  # type: ignore[list-item]  # on purpose
    with pytest.raises(RangeError, match="before the first event"):
        EventTimeline([]).at(HostTsc(0))


# The lines


@pytest.mark.row("E15")
@pytest.mark.parametrize(
    "words", ["freeze", "advance:max_ns=5", "slew:max_ppm=500", "slew:max_ppm=700,max_ns=9", "virtualbox"]
)
def test_a_resume_says_by_which_policy(words: str) -> None:
    """The line of a resume has the words that it was given; those of the clock's own policy where none were."""
    clock, backend, _ = a_clock(HZ)
    for given in (words, None):
        clock.policy = "advance:max_ns=7"
        clock.pause()
        backend.advance(ns=NS_PER_S)
        clock.resume(given)
        lines = [json.loads(line) for line in clock.events.json_lines().splitlines()]
        told = [line["policy"] for line in lines if line["kind"] == "resume"][-1]
        assert told == (given or "advance:max_ns=7")
        assert all(line["policy"] is None for line in lines if line["kind"] != "resume")


@pytest.mark.row("E15")
@pytest.mark.parametrize("provider", ["KVM", "Minimal", "None"])
def test_each_line_says_whose_it_is(provider: str) -> None:
    """The TSC's frequency and the guest's clock interface are in every line, the first one, too."""
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), provider=provider, backend=SimulatedBackend(HZ))
    clock.dilate(1, 3)
    lines = [json.loads(line) for line in clock.events.json_lines().splitlines()]
    assert {(line["tsc_hz"], line["provider"]) for line in lines} == {(HZ, provider)}
    assert Fraction(*lines[-1]["rate_after"]) == Fraction(1, 3)
