"""Which of a guest's TSC writes are usual ones, for the compiled code that serves those, and their events."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from pvclock._tsc_writes import TscWrites
from pvclock.clock.host_trust import HostTrust
from pvclock.clock.timekeeper import Timekeeper
from pvclock.clock.vcpu_tscs import VcpuTscs, moved
from pvclock.quantities import HostTsc
from pvclock.timekeeping.events import Event, EventCause, EventKind
from pvclock.tsc.vcpu_tsc import VcpuTsc

__all__ = ["tsc_writes"]

TSC_HZ_MAX: Final = 1 << 33
"""The compiled code multiplies a second's ticks by ns in 64 bits."""


class UsualWrites:
    """Says which writes move the TSC of a vCPU and its page and nothing else; call it inside `with changing`.

    What it says holds until the next transaction, for a second at most: the host's clocks are extrapolated meanwhile.
    """

    def __init__(self, keeper: Timekeeper, tscs: VcpuTscs, host: HostTrust) -> None:
        self._keeper, self._tscs, self._host = keeper, tscs, host
        self._stamps = keeper.backend.stamps()

    def look(self) -> tuple[HostTsc, HostTsc, int] | None:
        """The least TSC of a host in order, and an instant on its TSC and raw clock; None if no write is a usual one.

        A host that does not trust its TSC may move it by itself, and let none be put back.
        """
        backend, least_tsc = self._keeper.backend, self._host.least_tsc_in_order
        is_usual = backend.tsc_stable and self._host.is_trusted and backend.tsc_hz <= TSC_HZ_MAX
        if not is_usual or self._keeper.is_paused or least_tsc is None:
            return None
        self._stamps = backend.stamps()
        return least_tsc, self._stamps.tsc, self._stamps.raw_ns

    def tsc(self, vcpu: int) -> tuple[VcpuTsc, Callable[[int], object]] | None:
        """vCPU's TSC, to be moved, and what sets its offset on the host; None if more follows than its page shows."""
        tsc = self._tscs.alone(vcpu) if self._keeper.keeps_line(vcpu) else None
        return None if tsc is None else (tsc, self._offset_setter(vcpu))

    def _offset_setter(self, vcpu: int) -> Callable[[int], object]:
        """The backend's own, if it has one that is quicker."""
        backend = self._keeper.backend
        setter = getattr(backend, "tsc_offset_setter", None)
        return partial(backend.set_tsc_offset, vcpu) if setter is None else setter(vcpu)

    def change(self, vcpu: int, before: int, after: int, tsc: HostTsc) -> tuple[None, tuple[Event, ...]]:
        """A Change: vCPU's offset became `after` at `tsc`."""
        why = moved(vcpu, before, after)
        event = self._keeper.event(EventKind.TSC, why, self._stamps, tsc=tsc, cause=EventCause.GUEST)
        return None, (event,)


def tsc_writes(keeper: Timekeeper, tscs: VcpuTscs, host: HostTrust, *, has_adjust: bool) -> TscWrites:
    """What serves usual writes of a guest of this clock.  has_adjust: does it have IA32_TSC_ADJUST?"""
    usual = UsualWrites(keeper, tscs, host)
    return TscWrites(keeper.changing, keeper.pages, usual, keeper.events, keeper.backend.tsc_hz, has_adjust)
