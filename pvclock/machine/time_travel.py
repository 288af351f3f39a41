"""A machine's time travel: finds its guest idle, skips to what comes next, and lets it go on there.

timekeeping/travel.py decides, guest_time.py moves time, traveller.py does one with the other; here is the thread that
has it done, what the VMM says to it, and what it came to.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final, NamedTuple

from pvclock.kvm import Runner, Vcpu
from pvclock.machine.bus import Bus
from pvclock.machine.guest_time import GuestTime, check_timers
from pvclock.machine.idle_watch import IdleWatch
from pvclock.machine.run_state import RunState, RunStates
from pvclock.machine.travel_options import Travel, as_travel
from pvclock.machine.traveller import Arrival, Look, Traveller
from pvclock.threads import WakeUp, begin, renew_in_children, wake_precisely
from pvclock.timekeeping.travel import Decision, IdleForever, Skip, Stay, StayReason

__all__ = ["Arrival", "Look", "TimeTravel", "Travel", "TravelLog"]

RECENT: Final = 256

REST_S: Final = 100e-6
"""Before it looks again at a guest that was not as idle as it seemed."""

RATE_REST_S: Final = 0.01
"""Before it looks again at one that is ahead of the highest rate."""

PARKED_S: Final = 1.0
STOP_S: Final = 5.0


class TravelLog(NamedTuple):
    """What it came to so far.

    skipped_ns, largest_ns: of guest time, in all and by one skip.  host_ns: for which the vCPUs were kept out.
    stays: looks without a skip.  is_idle_forever: was nothing to come at the last look?
    """

    skips: int
    skipped_ns: int
    largest_ns: int
    host_ns: int
    stays: Mapping[StayReason, int]
    is_idle_forever: bool


class TravelCount:
    """Collects a TravelLog, and the last skips."""

    def __init__(self) -> None:
        self._skips = self._skipped_ns = self._largest_ns = self._host_ns = 0
        self._stays: Counter[StayReason] = Counter()
        self._is_idle_forever = False
        self.recent: deque[Arrival] = deque(maxlen=RECENT)

    def add_look(self, look: Look) -> None:
        """Count a decision."""
        self._host_ns += look.host_ns
        self._is_idle_forever = isinstance(look.decision, IdleForever)
        if isinstance(look.decision, Stay):
            self._stays[look.decision.reason] += 1

    def add_arrival(self, arrival: Arrival) -> None:
        """Count a skip."""
        self._skips += 1
        self._skipped_ns += arrival.skipped_ns
        self._largest_ns = max(self._largest_ns, arrival.skipped_ns)
        self.recent.append(arrival)

    def log(self) -> TravelLog:
        """All of it up to now."""
        stays = MappingProxyType(dict(self._stays))
        return TravelLog(self._skips, self._skipped_ns, self._largest_ns, self._host_ns, stays, self._is_idle_forever)


class TimeTravel:
    """Skips the time that a machine's guest would idle away, while it is enabled and the machine runs.

    find_time: called with the vCPUs out of the guest, it gives what moves its time, or raises why nothing can.

    The VMM's part: `next_event`, the guest time in ns of what it has to come, or None; it is called with all vCPUs out
    of the guest, and neither waits nor raises.  `on_arrival`, called after each skip before a vCPU goes in again: what
    is due then is done there, so that the guest finds it at its time; an event that is nearer than a skip takes comes
    by itself, as without travel.  `on_look`, called with each decision, the vCPUs running again; after one that says
    that the guest is idle for ever none comes until a vCPU has moved or notify() is called.  All three on a thread of
    its own.

    Thread-safety: all methods may be called from any thread.
    """

    def __init__(
        self, runner: Runner, vcpus: list[Vcpu], bus: Bus, run_states: RunStates, find_time: Callable[[], GuestTime]
    ) -> None:
        self.next_event: Callable[[], int | None] = _no_event
        self.on_arrival: Callable[[Arrival], object] = _ignore
        self.on_look: Callable[[Look], object] = _ignore
        self.failure: BaseException | None = None
        """What ended it, if an error did."""

        self._runner, self._vcpus, self._bus, self._run_states = runner, vcpus, bus, run_states
        self._find_time = find_time
        self._options = Travel()
        self._count = TravelCount()
        self._holds: dict[object, None] = {}  # each use is one step of it, and needs no lock
        self.begin_anew()
        renew_in_children(self)
        run_states.add_handler(lambda _before, _now: self.notify())

    def begin_anew(self) -> None:
        """See HasLock: in a child of fork() there is no thread."""
        self._lock = threading.Lock()  # of what follows
        self._rounds: Rounds | None = None
        self._ending: list[Rounds] = []

    # On and off

    @property
    def is_enabled(self) -> bool:
        """Is guest time skipped?  Until disable(), the end that was set, or a `failure`."""
        rounds = self._rounds
        return rounds is not None and not rounds.is_over

    @property
    def options(self) -> Travel:
        """Those of the last enable()."""
        return self._options

    @property
    def why_not(self) -> str | None:
        """Why this machine's guest cannot travel in time; None if it can."""
        try:
            self._check()
        except Exception as error:  # noqa: BLE001  # whatever it is, enable() would raise it
            return str(error)
        return None

    def enable(self, options: Travel | None = None) -> None:
        """Skip idle time from now on; when it is enabled already, by other options.

        TscOffsetNotHonoured where the guest's TSC cannot be moved and its timers may need it, MissingCapability where
        the kernel serves the clock without a master clock, StateError for timers beside guest time, and if there is no
        thread for it; WrongType or RangeError for options.
        """
        chosen = as_travel(Travel() if options is None else options)
        guest_time = self._check()
        with self._lock:
            self._end()
            self._options, self.failure = chosen, None
            rounds = self._new_rounds(guest_time, chosen)
            begin(rounds.thread, "time_travel")
            self._rounds = rounds

    def disable(self) -> None:
        """Skip no more.  One that has begun may still be done."""
        with self._lock:
            self._end()

    def close(self) -> None:
        """disable(), and wait until nothing of it is under way; on its own thread without waiting."""
        self.disable()
        with self._lock:
            ending, self._ending = self._ending, []
        for rounds in ending:
            if rounds.thread is not threading.current_thread():
                rounds.thread.join(STOP_S)

    def check(self) -> None:
        """As a machine starts: StateError if it is enabled, and a timer is there by now that is not in guest time."""
        if self.is_enabled:
            check_timers(self._bus)

    # What the VMM tells

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Begin no skip meanwhile: for host I/O, which takes real time that its guest is to see pass.

        On a vCPU's thread, in the exit by which the guest asks for it, no skip is under way; on any other one may be.
        """
        mark = object()
        self._holds[mark] = None
        try:
            yield
        finally:
            del self._holds[mark]
            self.notify()

    @property
    def holds(self) -> int:
        """How many there are."""
        return len(self._holds)

    def notify(self) -> None:
        """Look again: `next_event` has changed, or there is input."""
        rounds = self._rounds
        if rounds is not None:
            rounds.wake_up.call()

    # What was found

    @property
    def log(self) -> TravelLog:
        """What it came to, since the machine was made."""
        return self._count.log()

    @property
    def recent(self) -> tuple[Arrival, ...]:
        """The last 256 skips."""
        return tuple(self._count.recent)

    # Inside

    def _check(self) -> GuestTime:
        check_timers(self._bus)
        with self._runner.quiesce():
            return self._find_time()

    def _new_rounds(self, guest_time: GuestTime, options: Travel) -> Rounds:
        traveller = Traveller(
            self._runner,
            self._vcpus,
            guest_time,
            options,
            has_hold=lambda: bool(self._holds),
            next_event=lambda: self.next_event(),  # noqa: PLW0108  # the VMM may set another
            arrived=self._arrived,
        )
        return Rounds(traveller, self._vcpus, self._is_running, self._looked, self._failed)

    def _end(self) -> None:
        rounds, self._rounds = self._rounds, None
        if rounds is not None:
            rounds.end()
            self._ending = [*(each for each in self._ending if each.thread.is_alive()), rounds]

    def _is_running(self) -> bool:
        return self._run_states.current is RunState.RUNNING

    def _arrived(self, arrival: Arrival) -> None:
        self._count.add_arrival(arrival)
        self.on_arrival(arrival)

    def _looked(self, look: Look) -> None:
        self._count.add_look(look)
        self.on_look(look)

    def _failed(self, failure: BaseException) -> None:
        self.failure = failure


class Rounds:
    """The thread from one enable() to its end: it waits until the guest seems idle, and has it looked at.

    is_running: does the machine run?  looked, failed: are told of each look, and of what ended this.
    """

    def __init__(
        self,
        traveller: Traveller,
        vcpus: list[Vcpu],
        is_running: Callable[[], bool],
        looked: Callable[[Look], object],
        failed: Callable[[BaseException], object],
    ) -> None:
        self.is_over = False
        self.thread = threading.Thread(target=self._run, name="pvclock-travel", daemon=True)
        self.wake_up = WakeUp()
        self._traveller, self._idle = traveller, IdleWatch(vcpus, self.wake_up)
        self._is_running, self._looked, self._failed = is_running, looked, failed

    def end(self) -> None:
        """Look no more; without waiting for a look that is under way."""
        self.is_over = True
        self.wake_up.call()

    def _run(self) -> None:
        wake_precisely()
        try:
            while not self.is_over:
                self._round()
        except BaseException as failure:  # noqa: BLE001  # a callback's, too
            self._failed(failure)
        finally:
            self.is_over = True
            self._idle.close()

    def _round(self) -> None:
        if not self._is_running():
            self.wake_up.wait(PARKED_S)
            self._traveller.begin_anew()
        elif self._idle.wait(PARKED_S) and not self.is_over:
            look = self._traveller.look(self._idle.note)
            if look is None:
                self.wake_up.wait(REST_S)
                return
            self._looked(look)
            if self._traveller.is_at_end:
                self.is_over = True
            self._rest(look.decision)

    def _rest(self, decision: Decision) -> None:
        """Wait for as long as nothing can have changed."""
        if self.is_over:
            return
        if isinstance(decision, IdleForever):
            self._idle.wait_for_change(None)
        elif isinstance(decision, Skip):
            if not decision.arrives:
                self.wake_up.wait(RATE_REST_S)
        elif decision.reason in (StayReason.HOLD, StayReason.FIXED):
            self._idle.wait_for_change(None)
        elif decision.reason is StayReason.RATE:
            self.wake_up.wait(RATE_REST_S)
        elif decision.wake is None or decision.wake.vcpu is None:
            self.wake_up.wait(REST_S)
        # else it is a vCPU's timer that is near, and the next round waits until that has moved


def _no_event() -> int | None:
    return None


def _ignore(_: object) -> None:
    pass
