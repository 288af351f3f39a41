"""The event log: numbers, bound, readers and JSON lines; what a guest may cause."""

from __future__ import annotations

import json
import re
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pvclock._guest_budget import GUEST_BURST, GUEST_EVENTS_PER_S
from pvclock.clock.event_log import EventLog
from pvclock.errors import ConfigError, RangeError
from pvclock.quantities import NS_PER_S, HostTsc
from pvclock.timekeeping.events import Event, EventCause, EventKind

DILATIONS = st.fractions(0, 2**64, max_denominator=2**64)
EVENTS = st.builds(
    Event,
    kind=st.sampled_from(EventKind),
    why=st.text(),
    host_tsc=st.none() | st.integers(0, 2**64 - 1).map(HostTsc),
    raw_ns=st.none() | st.integers(0, 2**63),
    real_ns=st.none() | st.integers(-(2**63), 2**63),
    guest_ns_before=st.fractions(),
    guest_ns_after=st.fractions(0, 2**64),
    rate_before=DILATIONS,
    rate_after=DILATIONS,
    cause=st.sampled_from(EventCause),
    sequence=st.integers(0, 2**64),
    tsc_hz=st.none() | st.integers(1, 2**64 - 1),
    provider=st.sampled_from(["", "None", "Minimal", "HyperV", "KVM"]),
    policy=st.none() | st.sampled_from(["freeze", "slew:max_ppm=500", "advance:max_ns=5"]),
)
PLAIN_EVENTS = st.tuples(st.sampled_from(EventKind), st.integers(0, 9)).map(lambda it: Event(it[0], "", sequence=it[1]))
AN_EVENT = Event(
    *(EventKind.DILATE, "asked for", HostTsc(7), 8, 9, Fraction(10, 3), Fraction(10, 3)),
    sequence=4,
    tsc_hz=2_596_132_000,
    provider="KVM",
)


def filled(events: int, capacity: int = 100) -> EventLog:
    """A log to which `events` have been appended, each with its number as its reason."""
    log = EventLog(capacity)
    for number in range(1, events + 1):
        log.append(Event(EventKind.TSC, str(number)))
    return log


def numbers(events: tuple[Event, ...]) -> list[int]:
    """The events' sequence numbers, each of which must be the reason that filled() gave."""
    assert all(event.why == str(event.sequence) for event in events)
    return [event.sequence for event in events]


# Numbers and the bound


@pytest.mark.row("E15", "E9")
@given(events=st.lists(PLAIN_EVENTS), capacity=st.integers(1, 12))
def test_numbers_are_gapless_and_the_log_is_bounded(events: list[Event], capacity: int) -> None:
    """Each event gets the next number whatever it came with, and only the newest `capacity` are kept, as they were."""
    log = EventLog(capacity)
    recorded = [log.append(event) for event in events]
    assert recorded == [event._replace(sequence=number) for number, event in enumerate(events, start=1)]
    assert len(log) == min(len(events), capacity)
    assert log.last == len(events)
    assert list(log.read().events) == recorded[-capacity:]


@pytest.mark.row("E15")
@given(steps=st.lists(st.integers(0, 3), max_size=60), capacity=st.integers(1, 6))
@example(steps=[0, 0, 0, 1, 0, 2, 3], capacity=1)
def test_readers_see_everything_once_or_are_told_how_much_they_lost(steps: list[int], capacity: int) -> None:
    """However appends and three readers' reads interleave, what a reader gets and what it lost is all there was."""
    log = EventLog(capacity)
    read_to = [0, 0, 0]
    for step in steps:
        if step == 3:
            log.append(Event(EventKind.TSC, str(log.last + 1)))
            continue
        batch = log.read(read_to[step])
        assert numbers(batch.events) == list(range(read_to[step] + 1 + batch.lost, log.last + 1))
        assert batch.lost == max(log.last - read_to[step] - capacity, 0)
        assert batch.last == log.last
        read_to[step] = batch.last


@pytest.mark.row("E15")
@given(appended=st.integers(0, 30), capacity=st.integers(1, 12), since=st.integers(0, 40))
def test_reading_since_any_number(appended: int, capacity: int, since: int) -> None:
    """read(since) gives what is above it and still kept, counts what is above it and gone, and is content with more."""
    batch = filled(appended, capacity).read(since)
    above = range(since + 1, appended + 1)
    assert numbers(batch.events) == list(above)[-capacity:]
    assert batch.lost == max(len(above) - capacity, 0)
    assert batch.last == max(since, appended)


@pytest.mark.row("E15", "E13")
def test_numbers_out_of_range_are_refused() -> None:
    """A log without room and a negative number to read from are errors that say the number."""
    for capacity in (0, -1):
        with pytest.raises(RangeError, match=f"capacity is {capacity}"):
            EventLog(capacity)
    with pytest.raises(RangeError, match="since=-1"):
        filled(3).read(-1)


# JSON


@pytest.mark.row("E15", "E9")
@given(event=EVENTS)
def test_json_brings_an_event_back_exactly(event: Event) -> None:
    """An event is one line of ASCII, and comes back from it equal, to the last digit of its fractions."""
    line = event.to_json()
    assert line.isascii()
    assert "\n" not in line
    assert Event.from_json(line) == event


@pytest.mark.row("E15")
def test_the_json_form() -> None:
    """Whole numbers are numbers, fractions are pairs, what is not known is null, and the jump stands with them."""
    event = AN_EVENT._replace(raw_ns=None, guest_ns_after=Fraction(40, 3), rate_after=Fraction(1, 2))
    assert json.loads(event.to_json()) == {
        "sequence": 4,
        "kind": "dilate",
        "cause": "vmm",
        "why": "asked for",
        "policy": None,
        "provider": "KVM",
        "tsc_hz": 2_596_132_000,
        "host_tsc": 7,
        "raw_ns": None,
        "real_ns": 9,
        "jump_ns": [10, 1],
        "guest_ns_before": [10, 3],
        "guest_ns_after": [40, 3],
        "rate_before": [1, 1],
        "rate_after": [1, 2],
    }


@pytest.mark.row("E15")
def test_json_lines_are_the_log() -> None:
    """One ended line an event, from any number on; read back they are what read() gives."""
    log = filled(5, capacity=4)
    for since in range(7):
        lines = log.json_lines(since).splitlines(keepends=True)
        assert tuple(map(Event.from_json, lines)) == log.read(since).events
        assert all(line.endswith("}\n") for line in lines)


@pytest.mark.row("E15", "E13")
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kind": "picnic"}, "kind is 'picnic'"),
        ({"kind": ["pause"]}, "kind is"),
        ({"cause": "weather"}, "cause is 'weather'; it can be guest, vmm"),
        ({"cause": None}, "cause is None"),
        ({"why": None}, "why is None"),
        ({"policy": 5}, "policy is 5"),
        ({"provider": None}, "provider is None"),
        ({"tsc_hz": 0}, "tsc_hz is 0; a frequency is 1 to"),
        ({"tsc_hz": 2.6e9}, "tsc_hz is 2600000000.0; a whole number"),
        ({"sequence": True}, "sequence is True"),
        ({"sequence": None}, "sequence is None"),
        ({"host_tsc": -1}, "64 bits"),
        ({"host_tsc": 2**64}, "64 bits"),
        ({"raw_ns": 1.0}, "raw_ns is 1.0"),
        ({"real_ns": "1"}, "real_ns is '1'"),
        ({"guest_ns_before": 5}, "numerator, denominator"),
        ({"guest_ns_after": [1, 2, 3]}, "numerator, denominator"),
        ({"rate_before": [1, 0]}, "1/0"),
        ({"rate_after": [1, -1]}, "1/-1"),
        ({"rate_after": [1, float("nan")]}, "nan"),
        ({"jump_ns": [1, 1]}, "contradicts"),
        ({"colour": "blue"}, "expected"),
    ],
)
def test_lines_that_are_no_event(changes: dict[str, object], complaint: str) -> None:
    """A line with anything missing, added, mistyped or contradictory is a ConfigError that says what."""
    with pytest.raises(ConfigError, match=complaint):
        Event.from_json(json.dumps(json.loads(AN_EVENT.to_json()) | changes))


@pytest.mark.row("E15", "E13")
@given(line=st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5).map(json.dumps))
@example(line="[" * 100_000)
@example(line="9" * 5000)
@example(line="")
def test_any_other_text_is_no_event(line: str) -> None:
    """Whatever is not an event's line is a ConfigError, and nothing else is raised."""
    with pytest.raises(ConfigError):
        Event.from_json(line)


# What a guest may cause


def a_guests(raw_ns: int | None = 0) -> Event:
    """An event of a guest that moves its TSC."""
    return Event(EventKind.TSC, "its", raw_ns=raw_ns, cause=EventCause.GUEST)


@pytest.mark.row("E15", "E9")
def test_a_guests_flood_pushes_out_nothing_of_the_vmms() -> None:
    """100,000 events of a guest beside 100 of the VMM: all of the VMM's are there, the rest is counted to the last."""
    log = EventLog(100)
    vmms = []
    for number in range(100_000):
        raw_ns = number * 10**5  # 10 s in all
        if number % 1000 == 0:
            vmms.append(log.append(Event(EventKind.DILATE, str(number), raw_ns=raw_ns)))
        log.append(a_guests(raw_ns))
    batch = log.read()
    assert [event for event in batch.events if event.cause is EventCause.VMM] == vmms
    guests = GUEST_BURST + 9 * GUEST_EVENTS_PER_S
    assert log.suppressed == 100_000 - guests
    told = 9  # once a second
    assert log.last == 100 + guests + told
    assert len(batch.events) == len(log) == 200
    assert batch.lost == log.last - 200
    assert [event.sequence for event in batch.events] == sorted({event.sequence for event in batch.events})


@pytest.mark.row("E15")
def test_what_was_suppressed_is_told_once_there_is_room() -> None:
    """One event says how many were left out, stamped as what comes next, whoever caused that; and says it once."""
    log = EventLog()
    for _ in range(GUEST_BURST + 5):
        last = log.append(a_guests())
    assert (last.sequence, log.last, log.suppressed) == (0, GUEST_BURST, 5)
    log.append(Event(EventKind.SKIP, "no room yet", raw_ns=NS_PER_S - 1))
    later = Event(EventKind.SKIP, "room", HostTsc(1), NS_PER_S, 3, Fraction(4), Fraction(5), Fraction(6), Fraction(7))
    log.append(later)
    log.append(a_guests(NS_PER_S))
    tail = log.read(GUEST_BURST).events
    assert [event.kind.value for event in tail] == ["skip", "suppressed", "skip", "tsc"]
    assert [event.sequence - GUEST_BURST for event in tail] == [1, 2, 3, 4]
    told = tail[1]
    assert re.findall(r"\d+", told.why) == ["5"]
    assert (told.host_tsc, told.raw_ns, told.real_ns, told.cause) == (1, NS_PER_S, 3, EventCause.GUEST)
    assert {told.guest_ns_before, told.guest_ns_after} == {Fraction(4)}
    assert {told.rate_before, told.rate_after} == {Fraction(6)}


@pytest.mark.row("E15")
def test_a_raw_clock_that_went_back_counts_from_there() -> None:
    """A budget that is used up is not filled by a step back, nor emptied: 8 more come a second after it."""
    log = EventLog()
    for _ in range(GUEST_BURST):
        assert log.record(a_guests(10 * NS_PER_S)).sequence
    for raw_ns in (0, NS_PER_S - 1, 10 * NS_PER_S // 11):
        assert not log.record(a_guests(raw_ns)).sequence
    assert [bool(log.record(a_guests(NS_PER_S)).sequence) for _ in range(9)] == [True] * 8 + [False]


@pytest.mark.row("E15", "E9")
@given(stamps=st.lists(st.none() | st.integers(-(2**70), 2**70) | st.integers(0, 10**10), min_size=60, max_size=300))
def test_no_stamps_give_a_guest_more_than_its_budget(stamps: list[int | None]) -> None:
    """A raw clock that stands, goes back or is not known fills nothing; one that goes on fills up to the burst."""
    log = EventLog()
    budget, filled_ns, taken = GUEST_BURST, None, 0
    for raw_ns in stamps:
        if raw_ns is not None:
            filled_ns = raw_ns if filled_ns is None or raw_ns < filled_ns else filled_ns
            while budget < GUEST_BURST and filled_ns + NS_PER_S <= raw_ns:
                budget, filled_ns = min(budget + GUEST_EVENTS_PER_S, GUEST_BURST), filled_ns + NS_PER_S
            filled_ns += (raw_ns - filled_ns) // NS_PER_S * NS_PER_S
        taken += budget > 0
        assert bool(log.record(a_guests(raw_ns)).sequence) == (budget > 0)
        budget = max(budget - 1, 0)
    assert log.suppressed == len(stamps) - taken


@pytest.mark.row("E15", "E9")
@given(
    causes=st.lists(st.sampled_from(EventCause), max_size=GUEST_BURST),
    capacity=st.integers(1, 8),
    since=st.integers(0, 70),
)
def test_both_causes_are_read_in_order(causes: list[EventCause], capacity: int, since: int) -> None:
    """The newest of each cause, merged by their numbers, and what is gone of both is counted."""
    log = EventLog(capacity)
    events = [log.append(Event(EventKind.TSC, "", cause=cause)) for cause in causes]
    kept = [event for cause in EventCause for event in [each for each in events if each.cause is cause][-capacity:]]
    wanted = sorted((event for event in kept if event.sequence > since), key=lambda event: event.sequence)
    batch = log.read(since)
    assert list(batch.events) == wanted
    assert batch.lost == max(len(causes) - since, 0) - len(wanted)
    assert batch.last == max(since, len(causes))
