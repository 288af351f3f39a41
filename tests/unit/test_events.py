"""The event log: numbers, bound, readers, subscribers and JSON lines."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pvclock.errors import ConfigError, RangeError
from pvclock.event_delivery import FAILURES_KEPT
from pvclock.event_log import EventLog
from pvclock.events import Event, EventKind
from pvclock.quantities import HostTsc

NS_PER_MINUTE = 60 * 10**9
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
    dilation_before=DILATIONS,
    dilation_after=DILATIONS,
    sequence=st.integers(0, 2**64),
)
PLAIN_EVENTS = st.tuples(st.sampled_from(EventKind), st.integers(0, 9)).map(lambda it: Event(it[0], "", sequence=it[1]))
AN_EVENT = Event(EventKind.DILATE, "asked for", HostTsc(7), 8, 9, Fraction(10, 3), Fraction(10, 3), sequence=4)


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
    event = AN_EVENT._replace(raw_ns=None, guest_ns_after=Fraction(40, 3), dilation_after=Fraction(1, 2))
    assert json.loads(event.to_json()) == {
        "sequence": 4,
        "kind": "dilate",
        "why": "asked for",
        "host_tsc": 7,
        "raw_ns": None,
        "real_ns": 9,
        "jump_ns": [10, 1],
        "guest_ns_before": [10, 3],
        "guest_ns_after": [40, 3],
        "dilation_before": [1, 1],
        "dilation_after": [1, 2],
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
        ({"why": None}, "why is None"),
        ({"sequence": True}, "sequence is True"),
        ({"sequence": None}, "sequence is None"),
        ({"host_tsc": -1}, "64 bits"),
        ({"host_tsc": 2**64}, "64 bits"),
        ({"raw_ns": 1.0}, "raw_ns is 1.0"),
        ({"real_ns": "1"}, "real_ns is '1'"),
        ({"guest_ns_before": 5}, "numerator, denominator"),
        ({"guest_ns_after": [1, 2, 3]}, "numerator, denominator"),
        ({"dilation_before": [1, 0]}, "1/0"),
        ({"dilation_after": [1, -1]}, "1/-1"),
        ({"dilation_after": [1, float("nan")]}, "nan"),
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


# Subscribers


@pytest.mark.row("E15", "TM-16")
def test_a_subscriber_hears_of_jumps(tmp_path: Path) -> None:
    """A file is touched when guest time steps by more than half an hour, either way, and is not for less."""
    touched = tmp_path / "jumped"
    log = EventLog()
    log.subscribe(lambda event: touched.touch() if abs(event.jump_ns) > 30 * NS_PER_MINUTE else None)
    for minutes, jumped in ((0, False), (30, False), (31, True), (-31, True)):
        log.append(Event(EventKind.OFFSET, "asked for", guest_ns_after=Fraction(minutes * NS_PER_MINUTE)))
        assert touched.exists() == jumped
        touched.unlink(missing_ok=True)


@pytest.mark.row("E15")
def test_a_subscription_begins_and_ends() -> None:
    """A subscriber is told what comes between subscribing and unsubscribing, which may be repeated."""
    log, heard = filled(2), list[Event]()
    unsubscribe = log.subscribe(heard.append)
    log.append(Event(EventKind.PAUSE, "3"))
    unsubscribe()
    unsubscribe()
    log.append(Event(EventKind.RESUME, "4"))
    assert numbers(tuple(heard)) == [3]


@pytest.mark.row("E15", "E9")
def test_a_subscriber_that_raises_harms_nobody() -> None:
    """Its error is kept and goes no further, the others are told, and it is told what follows; old errors make room."""
    log = EventLog()
    heard: dict[str, list[int]] = {"before": [], "raising": [], "after": []}

    def listener(name: str) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            heard[name].append(event.sequence)
            if name == "raising":
                raise ValueError(f"no {event.sequence}")

        return hear

    raising = listener("raising")
    for callback in (listener("before"), raising, listener("after")):
        log.subscribe(callback)
    for number in range(1, FAILURES_KEPT + 5):
        assert log.append(Event(EventKind.TSC, str(number))).sequence == number
    everything = list(range(1, FAILURES_KEPT + 5))
    assert heard == {"before": everything, "raising": everything, "after": everything}
    assert [failure.sequence for failure in log.failures] == everything[-FAILURES_KEPT:]
    assert str(log.failures[-1].error) == f"no {everything[-1]}"
    assert log.failures[-1].callback is raising


@pytest.mark.row("E15", "E9")
def test_an_interrupt_comes_out_and_the_rest_is_told_later() -> None:
    """KeyboardInterrupt in a subscriber reaches the caller; the event is kept, and whoever missed it gets it next."""
    log, heard = EventLog(), list[Event]()

    def interrupt(event: Event) -> None:
        if event.sequence == 1:
            raise KeyboardInterrupt

    log.subscribe(interrupt)
    log.subscribe(heard.append)
    with pytest.raises(KeyboardInterrupt):
        log.append(Event(EventKind.TSC, "1"))
    assert (len(log), heard, log.failures) == (1, [], ())
    log.append(Event(EventKind.TSC, "2"))
    assert numbers(tuple(heard)) == [1, 2]


@pytest.mark.row("E15", "E9")
def test_recorded_events_wait_for_delivery() -> None:
    """record() tells nobody, as a caller with vCPUs held needs it; deliver() tells all, in order, and once."""
    log, heard = EventLog(), list[Event]()
    log.subscribe(heard.append)
    for number in range(1, 4):
        log.record(Event(EventKind.TSC, str(number)))
    assert heard == []
    log.deliver()
    log.deliver()
    assert numbers(tuple(heard)) == [1, 2, 3]


@pytest.mark.row("E15", "E9")
def test_a_subscriber_may_append_read_and_unsubscribe() -> None:
    """Calls from within a subscriber neither deadlock nor disorder: all hear both events, in the order of numbers."""
    log, heard = EventLog(), list[tuple[str, int]]()

    def answer(event: Event) -> None:
        heard.append(("answering", event.sequence))
        assert log.read().last == event.sequence
        if event.sequence == 1:
            log.append(Event(EventKind.REFUSED, "2"))
        else:
            unsubscribe()

    unsubscribe = log.subscribe(answer)
    log.subscribe(lambda event: heard.append(("other", event.sequence)))
    log.append(Event(EventKind.TSC, "1"))
    log.append(Event(EventKind.TSC, "3"))
    assert heard == [("answering", 1), ("other", 1), ("answering", 2), ("other", 2), ("other", 3)]


@pytest.mark.row("E15")
def test_a_subscriber_that_the_bound_overtakes_sees_the_gap() -> None:
    """What was lost before it could be told shows as missing numbers, and the rest comes in order."""
    log, heard = EventLog(3), list[Event]()
    log.subscribe(heard.append)
    for number in range(1, 9):
        log.record(Event(EventKind.TSC, str(number)))
    log.deliver()
    assert numbers(tuple(heard)) == [6, 7, 8]


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Let threads take turns as often as the interpreter can."""
    usual_seconds = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_seconds)


@pytest.mark.stress
@pytest.mark.row("E15", "E9")
@pytest.mark.usefixtures("hasty_threads")
def test_threads_append_and_each_event_is_told_once() -> None:
    """With four threads appending at once, numbers stay gapless and a subscriber hears every one, in order."""
    log, heard = EventLog(10_000), list[int]()

    def hear(event: Event) -> None:
        time.sleep(event.sequence % 3 * 1e-4)  # so that a second deliverer, if there were one, would overtake the first
        heard.append(event.sequence)

    log.subscribe(hear)
    begin = threading.Barrier(4)
    given_numbers: list[list[int]] = [[] for _ in range(4)]

    def append(mine: list[int]) -> None:
        begin.wait()
        for _ in range(300):
            mine.append(log.append(Event(EventKind.TSC, "")).sequence)
            time.sleep(1e-3)  # else one thread delivers all the time, and the change of hands goes untested

    threads = [threading.Thread(target=append, args=(mine,)) for mine in given_numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = list(range(1, 1201))
    assert sorted(chain.from_iterable(given_numbers)) == everything
    assert [event.sequence for event in log.read().events] == everything
    assert heard == everything
