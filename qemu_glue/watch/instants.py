"""Instants of the host's TSC as people and logs have them: UTC, and the time since the watch began."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Final

from pvclock import HostTsc, read_tsc

__all__ = ["Instants", "utc_text"]

NS_PER_S: Final = 1_000_000_000
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Instants:
    """The watch begins when this is made."""

    def __init__(self, tsc_hz: int) -> None:
        self._tsc_hz = tsc_hz
        self._begin_s = time.monotonic()

    def utc_ns(self, at: HostTsc) -> int:
        """UTC at an instant of a moment ago."""
        return time.time_ns() - (read_tsc() - at) * NS_PER_S // self._tsc_hz

    def since_begin_s(self, utc_ns: int) -> float:
        """The time since the watch began, at an instant of a moment ago; UTC that is set before that does not count."""
        ago_s = (time.time_ns() - utc_ns) / NS_PER_S  # first: a stall before the other clock is read adds to it
        return time.monotonic() - self._begin_s - ago_s


def utc_text(utc_ns: int) -> str:
    """UTC to the us: 2026-11-27T14:03:04.512345Z."""
    return f"{(EPOCH + timedelta(microseconds=utc_ns // 1000)).isoformat(timespec='microseconds')[:-6]}Z"
