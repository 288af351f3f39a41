"""Events of a VM's time: each change of its timeline, and each trouble of its host, numbered.

An event says what happened, why, who caused it, when on the host's clocks, and how guest time changed; it can be
written as a line of JSON.  This module reads no clock: the caller hands stamps in.
"""

from __future__ import annotations

import json
from enum import StrEnum
from fractions import Fraction
from typing import Final, NamedTuple, TypeVar

from pvclock.arguments import text
from pvclock.errors import ConfigError
from pvclock.quantities import U64_MASK, HostTsc, quoted

__all__ = ["Event", "EventCause", "EventKind"]


class EventKind(StrEnum):
    """The kind of an event; the value is its word in JSON."""

    START = "start"
    """The guest's clock interface was chosen; or a reason why its clock may be bad."""
    PAGE = "page"
    """The guest registered a page for its clock."""
    PAUSE = "pause"
    RESUME = "resume"
    SKIP = "skip"
    OFFSET = "offset"
    DILATE = "dilate"
    SLEW = "slew"
    SLEW_END = "slew_end"
    RATE = "rate"
    """The discipline corrected the rate."""
    RESTORE = "restore"
    RESET = "reset"
    """The VM was reset: what its guest wrote is gone, guest time goes on."""
    TSC = "tsc"
    """A write by guest or host moved a vCPU's TSC offset."""
    REFUSED = "refused"
    """A request of the guest or the VMM was refused; nothing changed."""
    GUEST_OS = "guest_os"
    """The guest said which system it is."""
    CRASH = "crash"
    """The guest reported its own crash."""
    CLOCKSOURCE = "clocksource"
    """The host kernel left clocksource tsc, or came back to it."""
    TSC_UNSTABLE = "tsc_unstable"
    """The host kernel marked its TSC unstable."""
    TSC_STEP = "tsc_step"
    """The host's TSC went back."""
    TSC_RATE = "tsc_rate"
    """The host's TSC jumped, or left its rate."""
    SUSPEND = "suspend"
    """The host slept."""
    STALL = "stall"
    """The VMM did not run for a while."""
    SUPPRESSED = "suppressed"
    """The log dropped events that the guest caused: they exceeded its budget."""


class EventCause(StrEnum):
    """Who caused an event; the value is its word in JSON."""

    GUEST = "guest"
    """A guest instruction; the guest controls how often."""
    VMM = "vmm"
    """The VMM, or its host."""


class Event(NamedTuple):
    """One thing that happened to a VM's time.

    host_tsc (ticks), raw_ns (CLOCK_MONOTONIC_RAW) and real_ns (UTC since 1970): when; None if unknown.
    guest_ns_before, guest_ns_after: guest time at that instant by the segment that ends and by the one that begins, in
    ns, exact.  rate_before, rate_after: guest seconds in a second of tsc_hz host ticks, with slew and frequency
    adjustment, exact; 0 while paused.  An event that leaves the timeline alone has equal values before and after.
    sequence: its number in the log, from 1; 0 outside a log.  tsc_hz: the host TSC's nominal frequency; None if
    unknown.  provider: the guest's clock interface, empty if none.  policy: the catch-up policy applied to missed time,
    as given to resume(); None for other events.

    event_timeline reconstructs guest time at any host TSC from events alone.
    """

    kind: EventKind
    why: str
    host_tsc: HostTsc | None = None
    raw_ns: int | None = None
    real_ns: int | None = None
    guest_ns_before: Fraction = Fraction(0)
    guest_ns_after: Fraction = Fraction(0)
    rate_before: Fraction = Fraction(1)
    rate_after: Fraction = Fraction(1)
    cause: EventCause = EventCause.VMM
    sequence: int = 0
    tsc_hz: int | None = None
    provider: str = ""
    policy: str | None = None

    @property
    def jump_ns(self) -> Fraction:
        """The step of guest time, in ns; 0 where the segments meet."""
        return self.guest_ns_after - self.guest_ns_before

    def to_json(self) -> str:
        """One line of ASCII JSON, no newline: fractions as [numerator, denominator], unknown as null."""
        record: dict[str, object] = {
            "sequence": self.sequence,
            "kind": self.kind.value,
            "cause": self.cause.value,
            "why": self.why,
            "policy": self.policy,
            "provider": self.provider,
            "tsc_hz": self.tsc_hz,
        }
        for name in STAMPS:
            record[name] = getattr(self, name)
        for name in ("jump_ns", *FRACTIONS):
            record[name] = getattr(self, name).as_integer_ratio()
        return json.dumps(record)

    @classmethod
    def from_json(cls, line: str) -> Event:
        """Parse a line that to_json() wrote; ConfigError for anything else."""
        try:
            record = json.loads(text("line", line))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"event: not JSON: {error}") from None
        if not isinstance(record, dict) or set(record) != FIELDS | {"jump_ns"}:
            raise ConfigError(f"event: a JSON object with {', '.join(sorted(FIELDS))} and jump_ns was expected")
        host_tsc, raw_ns, real_ns = (_stamp(name, record[name]) for name in STAMPS)
        before, after, rate_before, rate_after = (_fraction(name, record[name]) for name in FRACTIONS)
        event = cls(
            _word(EventKind, "kind", record["kind"]),
            _text("why", record["why"]),
            None if host_tsc is None else HostTsc(host_tsc),
            raw_ns,
            real_ns,
            before,
            after,
            rate_before,
            rate_after,
            cause=_word(EventCause, "cause", record["cause"]),
            sequence=_whole("sequence", record["sequence"]),
            tsc_hz=_frequency(record["tsc_hz"]),
            provider=_text("provider", record["provider"]),
            policy=None if record["policy"] is None else _text("policy", record["policy"]),
        )
        if _fraction("jump_ns", record["jump_ns"]) != event.jump_ns:
            raise ConfigError(f"event {event.sequence}: jump_ns contradicts guest_ns_before and guest_ns_after")
        return event


FIELDS: Final = frozenset(Event._fields)
STAMPS: Final = Event._fields[2:5]
FRACTIONS: Final = Event._fields[5:9]


Word = TypeVar("Word", EventKind, EventCause)


def _word(words: type[Word], name: str, value: object) -> Word:
    if value not in list(words):
        raise ConfigError(f"event: {name} is {quoted(value)}; it can be {', '.join(words)}")
    return words(str(value))


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"event: {name} is {quoted(value)}; a string was expected")
    return value


def _whole(name: str, value: object) -> int:
    # bool is a subclass of int, so JSON's true would pass.
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"event: {name} is {quoted(value)}; a whole number was expected")
    return value


def _frequency(value: object) -> int | None:
    if value is not None and not 1 <= _whole("tsc_hz", value) <= U64_MASK:
        raise ConfigError(f"event: tsc_hz is {quoted(value)}; a frequency is 1 to 2^64 - 1")
    return None if value is None else _whole("tsc_hz", value)


def _stamp(name: str, value: object) -> int | None:
    if value is None:
        return None
    stamp = _whole(name, value)
    if name == "host_tsc" and not 0 <= stamp <= U64_MASK:
        raise ConfigError(f"event: host_tsc is {stamp}; the TSC has 64 bits")
    return stamp


def _fraction(name: str, value: object) -> Fraction:
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError(f"event: {name} is {quoted(value)}; [numerator, denominator] was expected")
    numerator, denominator = (_whole(name, each) for each in value)
    if denominator < 1:
        raise ConfigError(f"event: {name} is {numerator}/{denominator}; a denominator is 1 or more")
    return Fraction(numerator, denominator)
