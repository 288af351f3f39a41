"""A slow model of pvclock.timekeeping.timers, and a script that drives the model and the real thing alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from pvclock import GuestNs
from pvclock.timekeeping.timers import Firing, Merge, Missed, Once, Replay, Timers

Step: TypeAlias = tuple[object, ...]
"""A method of World without its "do_", and its arguments."""


class SlowTimer:
    """All deadlines up to now that are still to be delivered, each by itself."""

    def __init__(
        self, deadline_ns: int, callback: Callable[..., object], period_ns: int | None, missed: Missed
    ) -> None:
        self.pending = [deadline_ns]
        self.callback = callback
        self.period_ns = period_ns
        self.missed = missed
        self.not_before_ns = 0

    def due_ns(self) -> int:
        """When the next call may come."""
        return max(self.pending[0], self.not_before_ns)

    def fire(self, now: int) -> Firing:
        """Write out the periods up to `now`, and deliver what the policy says."""
        while self.period_ns and self.pending[-1] <= now:
            self.pending.append(self.pending[-1] + self.period_ns)
        ended = [deadline for deadline in self.pending if deadline <= now]
        told, dropped = ended[:1], 0
        if isinstance(self.missed, Merge):
            told = ended
        elif isinstance(self.missed, Once):
            dropped = len(ended[1:])
        else:
            self.not_before_ns = now + self.missed.spacing_ns
        settled = len(told) + dropped
        self.pending = self.pending[settled:]
        late_ns = now - told[0]
        return Firing(self, GuestNs(told[0]), late_ns, len(told), len(ended) - settled, dropped)  # type: ignore[arg-type]


class SlowTimers:
    """A list of timers in the order of adding; each advance looks at all of them."""

    def __init__(self) -> None:
        self.timers: list[SlowTimer] = []

    def __len__(self) -> int:
        return len(self.timers)

    @property
    def next_due_ns(self) -> int | None:
        """The least due time of all."""
        return min((timer.due_ns() for timer in self.timers), default=None)

    def add(
        self, deadline_ns: int, callback: Callable[..., object], *, period_ns: int | None, missed: Missed
    ) -> SlowTimer:
        """As Timers.add()."""
        self.timers.append(SlowTimer(deadline_ns, callback, period_ns, missed))
        return self.timers[-1]

    def remove(self, timer: SlowTimer) -> bool:
        """As Timers.remove()."""
        was_there = timer in self.timers
        self.timers = [other for other in self.timers if other is not timer]
        return was_there

    def advance(self, now: int) -> int:
        """As Timers.advance(), without errors."""
        fired = 0
        for timer in sorted((timer for timer in self.timers if timer.due_ns() <= now), key=SlowTimer.due_ns):
            if timer in self.timers:
                firing = timer.fire(now)
                if timer.period_ns is None:
                    self.remove(timer)
                timer.callback(firing)
                fired += 1
        return fired


class World:
    """Timers of either kind under a script: what is done from outside, and what each callback does."""

    def __init__(self, timers: Timers | SlowTimers) -> None:
        self.timers = timers
        self.handles: list[object] = []
        self.log: list[object] = []
        self.now = 0

    def do(self, step: Step) -> None:
        """Carry out one step, and note what can be seen of it."""
        what, *arguments = step
        getattr(self, f"do_{what}")(*arguments)

    def do_add(self, ahead_ns: int, period_ns: int | None, missed: Missed, steps: list[Step]) -> None:
        """Add a timer whose callback notes what it is told and then takes `steps`, once."""
        name, left = f"timer {len(self.handles)}", list(steps)

        def called(firing: Firing) -> None:
            assert firing.timer is self.handles[int(name.removeprefix("timer "))]
            self.log.append((name, *firing[1:], len(self.timers), self.timers.next_due_ns))
            taken, left[:] = left[:], []
            for step in taken:
                self.do(step)

        missed = (
            missed if period_ns and not (isinstance(missed, Replay) and missed.spacing_ns >= period_ns) else Merge()
        )
        deadline_ns = GuestNs(max(self.now + ahead_ns, 0))
        self.handles.append(None)
        self.handles[-1] = self.timers.add(deadline_ns, called, period_ns=period_ns, missed=missed)

    def do_remove(self, which: int) -> None:
        """Remove some timer added so far, in force or not."""
        if self.handles:
            self.log.append(self.timers.remove(self.handles[which % len(self.handles)]))  # type: ignore[arg-type]

    def do_advance(self, ns: int) -> None:
        """Let guest time pass."""
        self.now += ns
        self.log.append((self.timers.advance(GuestNs(self.now)), len(self.timers), self.timers.next_due_ns))
