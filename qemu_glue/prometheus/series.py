"""What a watch tells Prometheus, as it stands: written by the watch's own thread, and read by scrapes at any time.

A scrape takes no lock: a value that has several parts is a tuple, which is replaced whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple

from pvclock.host.linux import host_clocksource
from pvclock.host.watch import TroubleKind
from pvclock.meter.watch.changes import Disagreement, Step
from pvclock.meter.watch.loop import HostTrouble, Look, VmEnded, WatchLoop
from pvclock.meter.watch.rate import PageRate
from pvclock.meter.watch.summary import surely_ns
from pvclock.meter.watch.vm import VmEventKind

__all__ = ["HostSeries", "Series", "StepCause", "VcpuSeries", "VmSeries"]

RATES_S: Final = 1.0
"""How often a rate is reckoned."""
SILENT_S: Final = 10.0
SILENT_LOOKS: Final = 4
"""A watch that has not looked for so long, or so many of its intervals, is down: its VMM may not answer."""
PAUSES: Final = frozenset({VmEventKind.STOP, VmEventKind.RESUME})


class StepCause(StrEnum):
    """Why a clock stepped, as far as the VMM tells."""

    PAUSE = "pause"
    """The VMM stopped and continued its guest meanwhile."""
    OTHER = "other"
    """It did not."""
    UNKNOWN = "unknown"
    """The VMM does not tell, as beside --pid."""


class VcpuSeries(NamedTuple):
    """One vCPU's.  steps: that are surely longer than nothing, by their cause.  unknown_steps: of unknown length.

    last_step_ns, disagree_ns: of the last one, 0 before the first.  rate: None while it is unknown.
    """

    steps: Mapping[StepCause, int] = MappingProxyType(dict.fromkeys(StepCause, 0))
    unknown_steps: int = 0
    last_step_ns: int = 0
    disagreements: int = 0
    disagree_ns: int = 0
    rate: PageRate | None = None

    def with_step(self, step: Step, cause: StepCause) -> VcpuSeries:
        """And one step more, if it is one."""
        if step.step_ns is None:
            return self._replace(unknown_steps=self.unknown_steps + 1)
        if not surely_ns(step):
            return self
        steps = MappingProxyType({**self.steps, cause: self.steps[cause] + 1})
        return self._replace(steps=steps, last_step_ns=step.step_ns)

    def with_disagreement(self, by_ns: int, *, is_new: bool) -> VcpuSeries:
        """And a disagreement: another one, or as it has become."""
        return self._replace(disagreements=self.disagreements + is_new, disagree_ns=by_ns)


class VmSeries:
    """One VM's, from when its socket is there until it has ended; `vm`: its name.  now_s: a clock, for tests."""

    def __init__(self, vm: str, now_s: Callable[[], float] = time.monotonic) -> None:
        self.vm = vm
        self.vcpus: tuple[VcpuSeries, ...] = ()
        self.polls = 0
        self.interval_s: float | None = None
        self.is_paused: bool | None = None
        self._now_s = now_s
        self._tells_events = False
        self._open: frozenset[int] = frozenset()
        self._polls_before, self._rates_s = 0, -RATES_S
        self._seen_s: float | None = None

    @property
    def is_up(self) -> bool:
        """Is the VM's clock looked at, and are its pages known?"""
        seen_s = self._seen_s
        limit_s = max(SILENT_S, SILENT_LOOKS * (self.interval_s or 0))
        return seen_s is not None and self._now_s() - seen_s <= limit_s

    def take(self, look: Look, loop: WatchLoop) -> None:
        """Take what a look brought."""
        if len(self.vcpus) != loop.vm.vcpus:
            self.vcpus = (VcpuSeries(),) * loop.vm.vcpus
        self._tells_events = loop.vm.why_no_events is None
        self.interval_s, self.is_paused = loop.interval_s, loop.is_paused
        self.polls = self._polls_before + loop.watcher.summary.polls
        for finding in look.findings:
            if isinstance(finding, Step):
                self._change(finding.vcpu, self.vcpus[finding.vcpu].with_step(finding, self._cause(finding)))
        self._take_disagreements(look, loop.watcher.open_disagreements)
        if self._now_s() >= self._rates_s + RATES_S:
            self._rates_s = self._now_s()
            rates = loop.rates()
            self.vcpus = tuple(each._replace(rate=rates.get(vcpu)) for vcpu, each in enumerate(self.vcpus))
        has_ended = any(isinstance(finding, VmEnded) for finding in look.findings)
        self._seen_s = None if has_ended or loop.finder.is_searching else self._now_s()

    def end(self) -> None:
        """Its clock is looked at no more; what was counted stays, and goes on if it is watched again."""
        self._seen_s, self.interval_s, self.is_paused = None, None, None
        self._polls_before, self._open = self.polls, frozenset()

    # Inside

    def _cause(self, step: Step) -> StepCause:
        if any(event.kind in PAUSES for event in step.events):
            return StepCause.PAUSE
        return StepCause.OTHER if self._tells_events else StepCause.UNKNOWN

    def _take_disagreements(self, look: Look, open_now: Iterable[Disagreement]) -> None:
        """Count each when it begins, since it may go on for days; one that turns out to be stale stays counted.

        A vCPU disagrees anew only after all pages agreed: whom of two alike a watch names may change meanwhile.
        """
        going_on = [each for each in open_now if not each.is_stale]
        ended = [each for each in look.findings if isinstance(each, Disagreement) and not each.is_stale]
        apart_ns = {vcpu: each.by_ns for each in (*ended, *going_on) for vcpu in (each.ahead, each.behind)}
        for vcpu, by_ns in apart_ns.items():
            self._change(vcpu, self.vcpus[vcpu].with_disagreement(by_ns, is_new=vcpu not in self._open))
        self._open = self._open | apart_ns.keys() if going_on else frozenset()

    def _change(self, vcpu: int, now: VcpuSeries) -> None:
        self.vcpus = (*self.vcpus[:vcpu], now, *self.vcpus[vcpu + 1 :])


class HostSeries:
    """The host's own.  clocksource: reads which one it has."""

    def __init__(self, clocksource: Callable[[], str] = host_clocksource) -> None:
        self._clocksource = clocksource
        self.troubles: Mapping[TroubleKind, int] = dict.fromkeys(
            (kind for kind in TroubleKind if kind is not TroubleKind.STALL), 0
        )

    @property
    def is_on_tsc(self) -> bool:
        """Is the host's clocksource tsc, at this moment?"""
        return self._clocksource() == "tsc"

    def take(self, troubles: Iterable[HostTrouble]) -> None:
        """Count these."""
        for trouble in troubles:
            self.troubles = {**self.troubles, trouble.kind: self.troubles[trouble.kind] + 1}


class Series:
    """All VMs', and the host's.  One thread lets VMs in and forgets them.  now_s: a clock, for tests."""

    def __init__(self, host: HostSeries | None = None, now_s: Callable[[], float] = time.monotonic) -> None:
        self.host = HostSeries() if host is None else host
        self._now_s = now_s
        self._vms: dict[str, VmSeries] = {}

    @property
    def vms(self) -> tuple[VmSeries, ...]:
        """The VMs', by their names."""
        vms = self._vms
        return tuple(vms[name] for name in sorted(vms))

    def of(self, vm: str) -> VmSeries:
        """A VM's: the one that there is, or one that begins."""
        if vm not in self._vms:
            self._vms = {**self._vms, vm: VmSeries(vm, self._now_s)}
        return self._vms[vm]

    def forget(self, vm: str) -> None:
        """The VM is gone."""
        self._vms = {name: each for name, each in self._vms.items() if name != vm}
