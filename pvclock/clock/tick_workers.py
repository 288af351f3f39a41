"""Worker threads for the items of a round: an item whose call does not return does not delay the others."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Final, Generic, TypeVar

from pvclock.threads import WakeUp, begin, renew_in_children

__all__ = ["STUCK_S", "Workers"]

STUCK_S: Final = 0.05
"""A call still running after this many seconds when the next round is due is stuck.  A tick takes some 0.1 ms."""

Item = TypeVar("Item", bound=Hashable)


class Worker:
    """A thread, and the time.monotonic() at which it began its item."""

    def __init__(self, target: Callable[[Worker], None]) -> None:
        self.wake_up = WakeUp()
        self.since_s = 0.0
        self.thread = threading.Thread(target=target, args=(self,), name="pvclock-tick", daemon=True)

    @property
    def is_slow(self) -> bool:
        """True if it has worked on its item for more than STUCK_S."""
        return time.monotonic() - self.since_s > STUCK_S


class Workers(Generic[Item]):
    """Calls `work`, which must not raise, with each item of a round.

    One thread serves a round.  If it is stuck in a call when the next round begins, a new thread serves that round, and
    the stuck one ends when its call returns.  No item is worked on by two threads at once.

    Thread-safety: all methods may be called from any thread, also from `work`, which runs without the lock.
    """

    def __init__(self, work: Callable[[Item], None]) -> None:
        self.rounds = 0
        """Rounds completed."""
        self._work = work
        self._lock = threading.Lock()
        self._pending: deque[Item] = deque()
        self._at: dict[Item, Worker] = {}
        self._worker: Worker | None = None  # serves the round; any other ends after its item
        self._begun: set[Worker] = set()  # whose threads may still run
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
        """True while any thread runs."""
        return any(worker.thread.is_alive() for worker in tuple(self._begun))

    @property
    def stuck(self) -> tuple[Item, ...]:
        """The items whose call has run for more than STUCK_S."""
        with self._lock:
            return tuple(item for item, worker in self._at.items() if worker.is_slow)

    def begin(self) -> None:
        """Start a thread that waits for a round.  StateError if the system allows no more threads."""
        with self._lock:
            self._begin_worker()

    def hand_out(self, items: Iterable[Item]) -> None:
        """Begin a round of all items that are not stuck; skip it if the last round still runs or after dismiss().

        StateError, with nothing done, if it needs another thread and the system allows none.
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
        """Start no further item; returns the threads that still run, for wait()."""
        with self._lock:
            self._worker = None
            self._begun = {worker for worker in self._begun if worker.thread.is_alive()}
            for worker in self._begun:
                worker.wake_up.call()
            return set(self._begun)

    def wait(self, left: set[Worker], until_s: float) -> tuple[Item, ...]:
        """Wait for these threads, except the calling one, until time.monotonic() reaches until_s.

        Returns the items that they still work on.
        """
        others = {worker for worker in left if worker.thread is not threading.current_thread()}
        for worker in others:
            worker.thread.join(max(until_s - time.monotonic(), 0))
        with self._lock:
            return tuple(item for item, worker in self._at.items() if worker in others)

    # Inside

    def _begin_worker(self) -> Worker:
        """Start a thread that replaces the present worker."""
        worker = Worker(self._run)
        self._begun = {other for other in self._begun if other.thread.is_alive()} | {worker}
        try:
            begin(worker.thread, "start")
            before, self._worker = self._worker, worker
        except BaseException:
            worker.wake_up.call()  # if it started nevertheless, it ends itself
            raise
        if before is not None:
            before.wake_up.call()  # after an interrupted stop() it may wait for a round
        return worker

    def _run(self, worker: Worker) -> None:
        """The thread's main loop."""
        running = True
        while running:
            worker.wake_up.wait()
            item = self._next(worker, None)
            while item is not None:
                self._work(item)
                item = self._next(worker, item)
            with self._lock:
                running = self._worker is worker

    def _next(self, worker: Worker, done: Item | None) -> Item | None:
        """The item after `done`; None at the end of the round, or if another worker serves it now."""
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
