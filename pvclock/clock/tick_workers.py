"""Threads that work at a round's items one after another, so that one that does not return holds up no other."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Final, Generic, TypeVar

from pvclock.threads import WakeUp, begin, renew_in_children

__all__ = ["STUCK_S", "Workers"]

STUCK_S: Final = 0.05
"""A tick takes some 0.1 ms; one that goes on for this long when the next round is due may never end."""

Item = TypeVar("Item", bound=Hashable)


class Worker:
    """A thread, and since when it has been at its item."""

    def __init__(self, target: Callable[[Worker], None]) -> None:
        self.wake_up = WakeUp()
        self.since_s = 0.0
        self.thread = threading.Thread(target=target, args=(self,), name="pvclock-tick", daemon=True)

    @property
    def is_slow(self) -> bool:
        """Has it been at its item for longer than that may take?"""
        return time.monotonic() - self.since_s > STUCK_S


class Workers(Generic[Item]):
    """Calls `work`, which raises nothing, with each item of a round.

    One thread does, unless it is stuck in a call when the next round comes: then it is left alone with that item, and
    another one is begun for the others.  It ends when that call does.  No item is worked at twice at once.

    Thread-safety: all methods may be called from any thread, also from `work`.  No lock is held while that runs.
    """

    def __init__(self, work: Callable[[Item], None]) -> None:
        self.rounds = 0
        """How many rounds have ended."""
        self._work = work
        self._lock = threading.Lock()
        self._pending: deque[Item] = deque()
        self._at: dict[Item, Worker] = {}
        self._worker: Worker | None = None  # goes on with the round; any other ends after its item
        self._begun: set[Worker] = set()  # all whose thread may not have ended
        renew_in_children(self)

    def begin_anew(self) -> None:
        """See HasLock."""
        self._lock = threading.Lock()
        self._pending.clear()
        self._at.clear()
        self._worker = None
        self._begun = set()

    @property
    def has_threads(self) -> bool:
        """Is there a thread that has not ended?"""
        return any(worker.thread.is_alive() for worker in tuple(self._begun))

    @property
    def stuck(self) -> tuple[Item, ...]:
        """What has been worked at for STUCK_S or longer."""
        with self._lock:
            return tuple(item for item, worker in self._at.items() if worker.is_slow)

    def begin(self) -> None:
        """Have a thread that waits for a round.  StateError where the system allows no more threads."""
        with self._lock:
            self._begin_worker()

    def hand_out(self, items: Iterable[Item]) -> None:
        """Begin a round of all items but the stuck ones; none if the last one is late, or there is no thread.

        StateError, and nothing done, where another thread is needed and cannot be had.
        """
        with self._lock:
            worker = self._worker
            if worker is None:
                return
            if worker in self._at.values():
                if not worker.is_slow:
                    return
                worker = self._begin_worker()
            self._pending = deque(items)
            worker.wake_up.call()

    def dismiss(self) -> set[Worker]:
        """Begin to work at nothing more; returns the threads that have not ended yet, for wait()."""
        with self._lock:
            self._worker = None
            self._begun = {worker for worker in self._begun if worker.thread.is_alive()}
            for worker in self._begun:
                worker.wake_up.call()
            return set(self._begun)

    def wait(self, left: set[Worker], until_s: float) -> tuple[Item, ...]:
        """Wait for these threads, but for the present one, until time.monotonic() is until_s.

        Returns what they are still at.
        """
        others = {worker for worker in left if worker.thread is not threading.current_thread()}
        for worker in others:
            worker.thread.join(max(until_s - time.monotonic(), 0))
        with self._lock:
            return tuple(item for item, worker in self._at.items() if worker in others)

    # Inside

    def _begin_worker(self) -> Worker:
        """A thread that takes the present one's place."""
        worker = Worker(self._go_on)
        self._begun = {other for other in self._begun if other.thread.is_alive()} | {worker}
        try:
            begin(worker.thread, "start")
            before, self._worker = self._worker, worker
        except BaseException:
            worker.wake_up.call()  # if it began nevertheless, it finds that it is to end
            raise
        if before is not None:
            before.wake_up.call()  # where a stop() was interrupted it may wait for a round
        return worker

    def _go_on(self, worker: Worker) -> None:
        """The thread."""
        going_on = True
        while going_on:
            worker.wake_up.wait()
            item = self._next(worker, None)
            while item is not None:
                self._work(item)
                item = self._next(worker, item)
            with self._lock:
                going_on = self._worker is worker

    def _next(self, worker: Worker, done: Item | None) -> Item | None:
        """What comes after `done`; None at the end of the round, or where another one goes on with it."""
        with self._lock:
            if done is not None:
                del self._at[done]
            if self._worker is not worker:
                return None
            while self._pending:
                item = self._pending.popleft()
                if item not in self._at:
                    worker.since_s = time.monotonic()
                    self._at[item] = worker
                    return item
            self.rounds += 1
            return None
