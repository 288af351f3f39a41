"""Threads that run a VM's vCPUs: start, kick, pause, resume, stop.

Each vCPU has a thread that runs it and hands every exit to the one handler.  A vCPU enters the guest through a gate:
whoever holds the gate knows that no vCPU is in the guest.  Nothing here knows what the exits mean.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from pvclock.errors import StateError
from pvclock.kvm._ioctls import Vcpu, install_kick_signal
from pvclock.kvm.exits import Exit, Interrupted

__all__ = ["ExitHandler", "Runner"]

ExitHandler: TypeAlias = Callable[[int, Exit], bool]
"""handler(vcpu, exit), on that vCPU's thread; False ends the VM's run.  It answers the exit on the Vcpu."""

KICK_AGAIN_S = 0.01


class Runner:
    """Runs `vcpus`, each on its own thread.

    kick_signal: a signal that the process does not use otherwise; its handler does nothing but end a system call.

    Thread-safety: all methods may be called from any thread; stop() and join() not from a vCPU's own.
    """

    def __init__(self, vcpus: list[Vcpu], handler: ExitHandler, *, kick_signal: int = signal.SIGRTMIN + 2) -> None:
        install_kick_signal(kick_signal)
        self._vcpus = vcpus
        self._handler = handler
        self._kick_signal = kick_signal
        self._threads: list[threading.Thread] = []
        self._idents: list[int | None] = [None] * len(vcpus)  # of threads that can be sent a signal; under the gate
        self._gate = threading.Condition()
        # A vCPU says that it goes in before it looks at holds and stopping; a holder sets those before it looks who is
        # in.  So one of the two always sees the other, and the way in takes no lock.
        self._in_guest = [False] * len(vcpus)
        self._holds = 0
        self._stopping = False
        self._paused = False
        self.failure: BaseException | None = None
        """What ended the run, if an error did: raised by the handler or by KVM."""

    # Life

    def start(self) -> None:
        """Let all vCPUs run.  StateError if they were started or stopped before."""
        with self._gate:
            if self._threads or self._stopping:
                raise StateError("start", "the vCPUs were started or stopped before", "make another machine")
            self._threads = [
                threading.Thread(target=self._run, args=(vcpu,), name=f"vCPU {vcpu}", daemon=True)
                for vcpu in range(len(self._vcpus))
            ]
            for thread in self._threads:
                thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the run has ended; False if it has not within `timeout_s`.  StateError if it never began."""
        with self._gate:
            if not self._threads and not self._stopping:
                raise StateError("join", "the vCPUs were never started", "start() them")
            return self._gate.wait_for(lambda: self._stopping, timeout_s)

    def stop(self) -> None:
        """End the run and all threads.  May be called at any time, and twice."""
        self._end()
        for vcpu, thread in enumerate(self._threads):
            while thread.is_alive():
                with self._gate:
                    self._kick(vcpu)
                thread.join(KICK_AGAIN_S)

    def thread_id(self, vcpu: int) -> int | None:
        """The kernel's id of vCPU's thread; None before start()."""
        return self._threads[vcpu].native_id if self._threads else None

    # Keeping vCPUs out of the guest

    def pause(self) -> None:
        """Return once no vCPU is in the guest, and let none in before resume()."""
        with self._gate:
            if not self._paused:
                self._paused = True
                self._holds += 1
            self._drive_out(None)

    def resume(self) -> None:
        """Let the vCPUs go on after pause()."""
        with self._gate:
            if self._paused:
                self._paused = False
                self._release()

    @contextmanager
    def quiesce(self, vcpu: int | None = None) -> Iterator[None]:
        """Keep all vCPUs out of the guest meanwhile; `vcpu` is the caller's own, which is out already."""
        with self._gate:
            self._holds += 1
        try:
            with self._gate:
                self._drive_out(vcpu)
            yield
        finally:
            with self._gate:
                self._release()

    # The rest of this part is called with the gate's lock held.

    def _drive_out(self, own: int | None) -> None:
        while self._holds and (inside := self._others_in_guest(own)):  # no hold: resume() came while pause() waits
            for vcpu in inside:
                self._kick(vcpu)
            self._gate.wait(KICK_AGAIN_S)

    def _release(self) -> None:
        self._holds -= 1
        self._gate.notify_all()

    def _others_in_guest(self, own: int | None) -> list[int]:
        return [vcpu for vcpu, in_guest in enumerate(self._in_guest) if in_guest and vcpu != own]

    def _kick(self, vcpu: int) -> None:
        self._vcpus[vcpu].request_exit()
        ident = self._idents[vcpu]
        if ident is not None:
            signal.pthread_kill(ident, self._kick_signal)

    # A vCPU's thread

    def _run(self, vcpu: int) -> None:
        run, handler, in_guest = self._vcpus[vcpu].run, self._handler, self._in_guest
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [self._kick_signal])  # whoever called start() may block it
            with self._gate:
                self._idents[vcpu] = threading.get_ident()
            while self._enter(vcpu):
                reason = run()
                in_guest[vcpu] = False
                if self._holds:
                    self._tell()
                if not isinstance(reason, Interrupted) and not handler(vcpu, reason):
                    break
        except BaseException as failure:  # noqa: BLE001  # whoever waits for the run gets it
            self.failure = self.failure or failure
        finally:
            in_guest[vcpu] = False
            with self._gate:
                self._idents[vcpu] = None
            self._end()

    def _enter(self, vcpu: int) -> bool:
        """Pass the gate; False when the run has ended."""
        while True:
            self._in_guest[vcpu] = True
            if not self._holds and not self._stopping:
                return True
            self._in_guest[vcpu] = False
            with self._gate:
                self._gate.notify_all()
                self._gate.wait_for(lambda: not self._holds or self._stopping)
            if self._stopping:
                return False

    def _tell(self) -> None:
        with self._gate:
            self._gate.notify_all()

    def _end(self) -> None:
        with self._gate:
            self._stopping = True
            for vcpu in self._others_in_guest(None):
                self._kick(vcpu)
            self._gate.notify_all()
