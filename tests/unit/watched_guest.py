"""A guest that is watched, simulated exactly: its clock's lines, its vCPUs' TSCs and pages, and what its VMM tells.

It does what KVM does: all pages take the VM's line (a master clock's pair) or, without a master clock, each its own
instant of it, when their vCPU enters; a guest's write of IA32_TSC_ADJUST brings its page anew, and one of IA32_TSC
leaves it.
All that was is kept as the truth: who had which line and which TSC offset, from which host instant on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import ceil, floor
from typing import NamedTuple

from pvclock.meter.watch.poll import Poll
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.quantities import HostTsc
from pvclock.readings import TimeInfo
from tests.oracle import NS_PER_S, TSC_STABLE, U32, U64, ExactLine, Scale, scale_rate, time_scale

rate = cache(scale_rate)

NS_PER_HOUR = 3600 * NS_PER_S


class VmLine(NamedTuple):
    """The VM's clock from a host instant on: whole ns there."""

    host_tsc: int
    ns: int
    scale: Scale

    def at(self, host_tsc: int) -> Fraction:
        """Return the exact ns at a host instant."""
        return ExactLine(self.host_tsc, Fraction(self.ns), rate(*self.scale)).at(host_tsc)


class State(NamedTuple):
    """One vCPU from a host instant on.  published: how many lines its page has had."""

    since: int
    offset: int
    page: TimeInfo
    published: int

    def at(self, host_tsc: int) -> Fraction:
        """Return what its clock shows at a host instant, exactly, without the floor."""
        ticks = (host_tsc + self.offset - self.page.tsc_timestamp + U64 // 2) % U64 - U64 // 2
        return self.page.system_time + ticks * rate(self.page.tsc_to_system_mul, self.page.tsc_shift)


class Told(NamedTuple):
    """An event as it comes to the watcher, and when it truly was."""

    at: int
    event: VmEvent


class WatchedGuest:
    """`vcpus` vCPUs, whose TSC offsets are `offsets`, on a host whose TSC has `khz`.

    is_stable: a master clock's pages.  utc_ppm: how much too fast the VMM's stamps are.
    """

    def __init__(self, khz: int, offsets: list[int], *, now: int, ns: int, is_stable: bool, utc_ppm: int = 0) -> None:
        self.khz, self.now, self.is_stable, self.utc_ppm = khz, now, is_stable, utc_ppm
        self.line = VmLine(now, ns, time_scale(NS_PER_S, khz * 1000))
        self.told: list[Told] = []
        self.history: list[list[State]] = [[] for _ in offsets]
        self._stopped_at: int | None = None
        self._untold: list[Told] = []
        for vcpu, offset in enumerate(offsets):
            self._set(vcpu, offset, self._page(offset, 2), 1)

    @property
    def vcpus(self) -> range:
        """Their numbers."""
        return range(len(self.history))

    def offset(self, vcpu: int) -> int:
        """Return the TSC offset of a vCPU as it is."""
        return self.history[vcpu][-1].offset

    def pass_time(self, ns: int) -> None:
        """Let the host go on."""
        self.now += max(ns * self.khz // 10**6, 1)

    def anchor(self, step_ns: int = 0, khz: int | None = None) -> None:
        """Give the VM a new line that begins now, `step_ns` (and 0 to 1) beyond the old one; no page has it yet."""
        scale = self.line.scale if khz is None else time_scale(NS_PER_S, khz * 1000)
        self.line = VmLine(self.now, ceil(self.line.at(self.now)) + step_ns, scale)

    def enter(self, vcpu: int) -> None:
        """A vCPU takes the VM's line."""
        state = self.history[vcpu][-1]
        self._set(vcpu, state.offset, self._page(state.offset, (state.page.version + 2) % U32), state.published + 1)

    def write_tsc(self, vcpu: int, offset: int) -> None:
        """A vCPU's TSC is written, and its page stays."""
        state = self.history[vcpu][-1]
        self._set(vcpu, offset, state.page, state.published)

    def stop(self) -> None:
        """The VMM stops the guest."""
        self._stopped_at = self.now
        self.tell(VmEventKind.STOP)

    def resume(self, step_ns: int = 0) -> None:
        """The VMM continues the guest: its clock goes on from where it was stopped, and `step_ns` further."""
        assert self._stopped_at is not None
        self.line = VmLine(self.now, ceil(self.line.at(self._stopped_at)) + step_ns, self.line.scale)
        self._stopped_at = None
        self.tell(VmEventKind.RESUME)

    def tell(self, kind: VmEventKind) -> None:
        """The VMM tells something."""
        utc_ns = floor(Fraction(self.now * 10**6, self.khz) * (1 + Fraction(self.utc_ppm, 10**6)))
        told = Told(self.now, VmEvent(kind, utc_ns // 1000 * 1000))
        self.told.append(told)
        self._untold.append(told)

    def look(self, *, reads_offsets: bool = True, tells: bool = True, between: Callable[[], object] = int) -> Poll:
        """Take a poll; `between` happens between its two looks."""
        begin, first = self.now, [states[-1] for states in self.history]
        self.pass_time(3000)
        middle = self.now
        between()
        self.pass_time(3000)
        second = [states[-1] for states in self.history]
        pairs = list(zip(first, second, strict=True))
        events, self._untold = self._untold, []
        return Poll(
            HostTsc(begin),
            HostTsc(middle),
            HostTsc(self.now),
            tuple(one.page if one.page == other.page else None for one, other in pairs),
            tuple(one.offset if reads_offsets and one.offset == other.offset else None for one, other in pairs),
            tuple(each.event for each in events if tells),
        )

    def state(self, vcpu: int, at: int) -> State:
        """Return what a vCPU had at a host instant."""
        return next(state for state in reversed(self.history[vcpu]) if state.since <= at)

    def between(self, vcpu: int, since: int, until: int) -> list[State]:
        """Return all that a vCPU had from a host instant to another."""
        first = self.state(vcpu, since)
        return [first, *(state for state in self.history[vcpu] if since < state.since <= until)]

    def _page(self, offset: int, version: int) -> TimeInfo:
        line = self.line
        if not self.is_stable:
            line = VmLine(self.now, ceil(line.at(self.now)), line.scale)
        tsc = (line.host_tsc + offset) % U64
        return TimeInfo(version, tsc, line.ns, *line.scale, TSC_STABLE if self.is_stable else 0)  # type: ignore[arg-type]  # units

    def _set(self, vcpu: int, offset: int, page: TimeInfo, published: int) -> None:
        self.history[vcpu].append(State(self.now, offset, page, published))


def apart(
    guest: WatchedGuest, one: int, other: int, since: int, until: int
) -> Iterator[tuple[int, int, Fraction, Fraction]]:
    """Give the pieces of a span: (from, to, by how much `one` is ahead of `other` at either end), by their own TSCs."""
    changes = {state.since for vcpu in (one, other) for state in guest.between(vcpu, since, until)[1:]}
    ends = sorted({since, until, *changes})
    for begin, end in pairwise(ends):
        states = guest.state(one, begin), guest.state(other, begin)
        yield begin, end, states[0].at(begin) - states[1].at(begin), states[0].at(end) - states[1].at(end)


def log_uniform(rng: random.Random, least: float, most: float) -> float:
    """Return a number of any magnitude between two."""
    return float(least * (most / least) ** rng.random())
