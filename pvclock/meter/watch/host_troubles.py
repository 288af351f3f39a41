"""What is wrong with the host's clocks while guests' are watched: all is measured by its TSC."""

from __future__ import annotations

from typing import NamedTuple

from pvclock.host.watch import HostWatch, TroubleKind
from pvclock.quantities import NS_PER_S

__all__ = ["HostTrouble", "HostTroubles"]


class HostTrouble(NamedTuple):
    """Something was wrong with the host's clocks.  unstable: its TSC cannot be trusted.  why: for people."""

    kind: TroubleKind
    unstable: bool
    why: str


class HostTroubles:
    """Looks at the host, every interval_s; what is wrong from the beginning on is in `at_begin`."""

    def __init__(self, tsc_hz: int, interval_s: float) -> None:
        self._host = HostWatch(tsc_hz, interval_ns=int(interval_s * NS_PER_S))
        why = f"the host's clocksource is {self._host.last.clocksource}, not tsc"
        self.at_begin = [] if self._host.tsc_trusted else [HostTrouble(TroubleKind.CLOCKSOURCE, True, why)]

    def check(self) -> list[HostTrouble]:
        """Those since the last check.  A late check is none: looks tell of stalls, and a busy host is no trouble."""
        found = [each for each in self._host.check() if each.kind is not TroubleKind.STALL]
        return [HostTrouble(each.kind, each.unstable, each.why) for each in found]
