"""A clock's own saved state, as a format of `pvclock state`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final, NamedTuple

from pvclock.commands.state_formats import Given, Row
from pvclock.commands.state_units import in_mhz, in_seconds, in_signed_ticks, in_ticks, in_utc
from pvclock.errors import ConfigError
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState, Field
from pvclock.state.json_schema import plain

__all__ = ["IS_MADE_ANEW", "SavedClock", "in_units", "read", "recognises", "write"]

IS_MADE_ANEW: Final = True


class SavedClock(NamedTuple):
    """A state that was read."""

    state: ClockState

    @property
    def summary(self) -> str:
        """Version, provider, vCPUs, guest time and when it was saved."""
        state = self.state
        guest_time = in_units("timeline.guest_ns", state.timeline.guest_ns, state)
        saved = in_units("host.real_ns", state.host.real_ns, state)
        vcpus = f"{len(state.vcpus)} vCPU{'s' * (len(state.vcpus) > 1)}"
        return f"version {state.version}, {state.provider.name}, {vcpus}, guest time {guest_time}, saved {saved}"

    @property
    def notes(self) -> Sequence[str]:
        """None: what is restored is what is saved."""
        return ()

    def rows(self) -> Iterator[Row]:
        """Each part of FIELDS."""
        for path, field, value in clock_state.rows(self.state):
            units = in_units(field.path, value, self.state)
            yield Row(path, field.mark, plain(value), _shown(field, value), units, field.meaning)

    def as_json(self) -> Mapping[str, Any]:
        """As in its file."""
        return clock_state.to_mapping(self.state)

    def check(self) -> None:
        """StateFileError if this pvclock lacks the provider."""
        clock_state.check_provider(self.state)

    def clock_state(self, given: Given) -> tuple[ClockState, list[str]]:
        """Itself: nothing is missing, so nothing can be given."""
        if any(value is not None for value in given):
            raise ConfigError("a clock's own state holds all that it needs; leave out what else was given of it")
        return self.state, []


def recognises(head: bytes) -> bool:
    """Does JSON begin like that?"""
    return head.lstrip()[:1] == b"{"


def read(path: str) -> SavedClock:
    """The state in file `path`; StateFileError."""
    return SavedClock(clock_state.read(path))


def write(state: ClockState, path: str, _into: str | None) -> list[str]:
    """Write it whole."""
    clock_state.write(path, state)
    return []


def in_units(path: str, value: object, state: ClockState) -> str:
    """The value of the field at `path` of FIELDS in units for people; empty where none apply."""
    unit = UNITS.get(path)
    return unit(value, state.host.tsc_hz) if unit and value is not None else ""


def _shown(field: Field, value: object) -> str:
    return str(value) if isinstance(value, Fraction) else json.dumps(plain(value)) if field.kind else ""


def _settings(values: Mapping[str, object], _hz: int) -> str:
    return ", ".join(f"{name} {_setting(value)}" for name, value in values.items())


def _setting(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_setting, value))}]"
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) else json.dumps(value)


def _hex(value: int, _hz: int) -> str:
    return f"{value:#x}"


UNITS: Final[dict[str, Callable[[Any, int], str]]] = {
    "provider.config": _settings,
    "provider.msrs": _settings,
    "timeline.guest_ns": lambda ns, _: in_seconds(ns),
    "timeline.dilation": lambda rate, _: f"{float(rate):.9g} s a second",
    "slew.remaining_ns": lambda ns, _: in_seconds(ns),
    "host.tsc": in_ticks,
    "host.tsc_hz": lambda hz, _: in_mhz(hz),
    "host.raw_ns": lambda ns, _: in_seconds(ns),
    "host.real_ns": lambda ns, _: in_utc(ns),
    "wall_clock_gpa": _hex,
    "vcpus[].tsc_offset": in_signed_ticks,
    "vcpus[].tsc_adjust": in_signed_ticks,
    "vcpus[].tsc_aux": _hex,
    "vcpus[].guest_tsc": in_ticks,
    "vcpus[].time_page_gpa": _hex,
}
