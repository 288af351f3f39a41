"""A machine's run state: which state may follow which, and handlers of the changes.  The names are those of QEMU."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias

from pvclock.arguments import function, whole
from pvclock.errors import StateError

__all__ = ["ChangeHandler", "RunState", "RunStates"]


class RunState(StrEnum):
    """As QMP's query-status names them."""

    PRELAUNCH = "prelaunch"
    """Made or reset, and not started."""
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    """The run has ended: by the exit port, a power-off, a reset or stop()."""
    GUEST_PANICKED = "guest-panicked"
    """The run has ended: the guest's kernel panicked, and said so."""
    INTERNAL_ERROR = "internal-error"
    """The run has ended: the guest cannot go on, or an exit's handler or KVM failed."""


TRANSITIONS: Final = {
    RunState.PRELAUNCH: set(RunState) - {RunState.PRELAUNCH},
    RunState.RUNNING: set(RunState) - {RunState.RUNNING},
    RunState.PAUSED: set(RunState) - {RunState.PAUSED},
    RunState.SHUTDOWN: {RunState.PRELAUNCH, RunState.RUNNING, RunState.PAUSED, RunState.INTERNAL_ERROR},
    RunState.GUEST_PANICKED: {RunState.PRELAUNCH, RunState.INTERNAL_ERROR},
    RunState.INTERNAL_ERROR: {RunState.PRELAUNCH},
}
"""From each state to what may follow.  QEMU's, and: from prelaunch to paused, for a machine that is started while
paused; from shutdown to running, because stop() leaves vCPUs that can go on; from shutdown and guest-panicked to
internal-error, where a handler of that change failed; from running to prelaunch, where a reset did not get to its end.
Only a reset leaves guest-panicked and internal-error for good."""

ADVICE: Final = {
    RunState.PRELAUNCH: "start() it",
    RunState.RUNNING: "pause() or stop() it",
    RunState.PAUSED: "resume() or stop() it",
    RunState.SHUTDOWN: "start() or reset() it",
    RunState.GUEST_PANICKED: "reset() it",
    RunState.INTERNAL_ERROR: "reset() it",
}

ChangeHandler: TypeAlias = Callable[[RunState, RunState], object]
"""handler(before, now)."""


class Registered(NamedTuple):
    """A change handler, and when its turn is."""

    priority: int
    handler: ChangeHandler


class Change(NamedTuple):
    """A change whose handlers have not all heard; `kept_out` is left when they have."""

    before: RunState
    now: RunState
    kept_out: AbstractContextManager[object]


class RunStates:
    """A machine's run state and the handlers of its changes.

    Handlers run without a lock, one change after the other and each whole: all handlers have heard of one before the
    first hears of the next, also where a handler makes the next.  They run on the thread that made the change, or on
    one that is telling handlers of an earlier one: vCPUs' threads among them.

    Thread-safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._current = RunState.PRELAUNCH
        self._handlers: list[Registered] = []  # by priority; replaced, never changed
        self._lock = threading.Lock()  # of what follows; never taken around a handler
        self._untold: deque[Change] = deque()  # the oldest one stays until it is told
        self._turn: object = None  # whose it is to tell the handlers

    @property
    def current(self) -> RunState:
        """The state, with the last change whose handlers are being told."""
        return self._current

    def add_handler(self, handler: ChangeHandler, *, priority: int = 0) -> None:
        """Call `handler` with the state before and the state now, after each change.

        Lower priorities first where the machine goes on running, and last where it leaves running, as in QEMU; those of
        one priority in the order in which they were added, or its reverse.  No vCPU enters the guest before the
        handlers of a change to running have returned, so they cannot wait for the guest.  What a handler raises comes
        out of the call that made the change, after all have been told; on a vCPU's thread it is the run's failure.
        """
        function("handler", handler)
        whole("priority", priority)
        with self._lock:
            self._handlers = sorted([*self._handlers, Registered(priority, handler)], key=lambda each: each.priority)

    def remove_handler(self, handler: ChangeHandler) -> None:
        """Call it no more.  StateError if it was not added."""
        with self._lock:
            left = [each for each in self._handlers if each.handler != handler]
            if len(left) == len(self._handlers):
                raise StateError("remove_handler", "this handler was not added", "add_handler() it first")
            self._handlers = left

    def check(self, operation: str, wanted: RunState) -> None:
        """StateError, which says what can be done, if `wanted` cannot follow the current state."""
        if wanted is not self._current and wanted not in TRANSITIONS[self._current]:
            raise StateError(operation, f"the machine is in state {self._current}", ADVICE[self._current])

    def update(
        self, find: Callable[[], RunState], keep_out: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        """Take the state that `find` returns, and tell the handlers if it is another one.

        find: called under the lock, so that of two threads the later one's finding stays.  keep_out: what keeps the
        vCPUs out of the guest, entered until the handlers of a change to running have heard.  StateError if that state
        cannot follow the current one.
        """
        with self._lock:
            now = find()
            before = self._current
            if now is not before:
                self.check("run state", now)
                self._queue(Change(before, now, keep_out() if now is RunState.RUNNING else nullcontext()))
        self._tell()

    def _queue(self, change: Change) -> None:
        try:
            change.kept_out.__enter__()
            self._current = change.now  # an interrupt comes after this and the next line, or before both
            self._untold.append(change)
        except BaseException:
            change.kept_out.__exit__(None, None, None)
            raise

    def _tell(self) -> None:
        failures: list[BaseException] = []
        turn = object()
        try:
            while self._takes_turn(turn):
                self._tell_oldest(failures)
                self._turn = None
        finally:
            if self._turn is turn:
                self._turn = None
        if failures:
            raise next((each for each in failures if not isinstance(each, Exception)), failures[0])

    def _takes_turn(self, turn: object) -> bool:
        """Is there a change that this call is to tell the handlers of, and no other?"""
        with self._lock:
            if self._turn is not None or not self._untold:
                return False
            self._turn = turn
            return True

    def _tell_oldest(self, failures: list[BaseException]) -> None:
        """Tell all handlers of the oldest change, and then let the vCPUs in; what they raise goes to `failures`."""
        change = self._untold[0]
        try:
            for each in self._handlers if change.now is RunState.RUNNING else self._handlers[::-1]:
                try:
                    each.handler(change.before, change.now)
                except BaseException as failure:  # noqa: BLE001  # the others are told all the same
                    failures.append(failure)
        finally:
            change.kept_out.__exit__(None, None, None)
            self._untold.popleft()
