"""Threads that run a VM's vCPUs: start, pause, resume, stop.

Each vCPU has a thread that runs it and hands every exit to the one handler.  A vCPU enters the guest through a gate,
which also counts the threads.  Nothing here knows what the exits mean.

KeyboardInterrupt may come between any two lines here.  So a change of more than one thing is one call of the gate, and
after an interrupted call every other call works.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeAlias

from pvclock.arguments import flag, function, instance, number, whole
from pvclock.errors import StateError, WrongType
from pvclock.kvm._gate import Gate, Hold, install_kick_signal
from pvclock.kvm._vcpu import Vcpu
from pvclock.kvm.arguments import vcpu_of, vcpus_of
from pvclock.kvm.exits import Exit, Interrupted

__all__ = ["ExitHandler", "Runner"]

ExitHandler: TypeAlias = Callable[[int, Exit], bool]
"""handler(vcpu, exit), on that vCPU's thread: it answers the exit with the Vcpu's complete_*().

True lets the vCPU go on, and False ends the VM's run; so does any other result, as an error.
"""


class Runner:
    """Runs `vcpus`, each on its own thread; a context manager that starts and stops them, and raises what failed.

    max_vcpus: how many there can be, with those that add_vcpu() brings; by default no more.
    kick_signal: a signal that the process does not use otherwise; its handler does nothing but end a system call.
    sees_every_exit: the handler gets those, too, that serve_writes() would keep from it.
    on_end: called with `failure` after each run, on the thread of the vCPU that ends last.
    WrongType for an argument of a wrong type; ConfigError for a VM without vCPUs; RangeError for fewer max_vcpus.

    Thread-safety: all methods may be called from any thread; join(), start() and add_vcpu() not from a vCPU's own.
    """

    def __init__(
        self,
        vcpus: list[Vcpu],
        handler: ExitHandler,
        *,
        max_vcpus: int | None = None,
        kick_signal: int = signal.SIGRTMIN + 2,
        on_end: Callable[[BaseException | None], object] | None = None,
        sees_every_exit: bool = False,
    ) -> None:
        first = vcpus_of(vcpus)
        most = len(first) if max_vcpus is None else whole("max_vcpus", max_vcpus, len(first))
        self._handler = function("handler", handler)
        self._on_end = None if on_end is None else function("on_end", on_end)
        install_kick_signal(kick_signal)
        self.gate = Gate(first, kick_signal, most)
        self._kick_signal = kick_signal
        self._sees_every_exit = flag("sees_every_exit", sees_every_exit)
        self._serve_write: Callable[[int, int, int], bool] | None = None
        self._threads: list[threading.Thread] = []
        self._start_failure: StateError | None = None
        self.failure: BaseException | None = None
        """What ended the last run, if an error did: the handler's, KVM's, or there was no thread for a vCPU.

        WrongType for a handler that returned neither True nor False.
        """

    # Life

    def start(self) -> None:
        """Let all vCPUs run, from where they stand.

        StateError while they run, after close(), on the thread of a vCPU that ends, and if one gets no thread.
        """
        if self.gate.has_ended() and not self._is_own_thread():
            self.stop()  # else a thread may be about to depart
        try:
            self.gate.begin(self._start_threads)
        except RuntimeError as error:
            raise _no_thread(error) from None
        self.gate.wait_until_started()
        if self._start_failure is not None:
            raise self._start_failure

    def add_vcpu(self, late: Vcpu) -> int:
        """Another vCPU, which runs at once if the others do, and else from the next start() on; returns its number.

        StateError if there are max_vcpus already, on the thread of a vCPU, and if it gets no thread; it was not added
        then, and the others run on.  After an interrupt, call it again with the same one.
        """
        if self._is_own_thread():
            raise StateError("add_vcpu", "this is the thread of a vCPU", "call it on another thread")
        vcpu_of("late", late)
        late.serve_writes(self._serve_write)
        self.gate.wait_until_started()  # of a call that was interrupted
        self._start_failure = None
        if late not in self.gate.vcpus:
            try:
                self.gate.add_vcpu(late, self._start_late_thread)
            except RuntimeError as error:
                raise _no_thread(error) from None
        self.gate.wait_until_started()
        if self._start_failure is not None:
            raise self._start_failure
        return self.gate.vcpus.index(late)

    def serve_writes(self, serve: Callable[[int, int, int], bool]) -> None:
        """Have `serve` asked of all vCPUs' WRMSRs before the handler, which gets those that it returns False for.

        See Vcpu.serve_writes().  It runs while the gate takes the vCPU for being in, so it must not wait for anything
        that keeps vCPUs out.
        """
        if not self._sees_every_exit:
            self._serve_write = function("serve", serve)
            for vcpu in self.gate.vcpus:
                vcpu.serve_writes(serve)

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the run has ended; False if it has not within `timeout_s`.  StateError if it never began."""
        if timeout_s is not None:
            number("timeout_s", timeout_s)
        if not self.gate.has_begun() and not self.gate.has_ended():
            raise StateError("join", "the vCPUs were never started", "start() them")
        return self.gate.wait_until_ended(timeout_s)

    def stop(self) -> None:
        """End the run and all threads; on a vCPU's own thread, without waiting for them.  start() may follow.

        May be called at any time, and again, also after an interrupt.
        """
        self.gate.end()
        self._wait_for_threads()

    def fail(self, failure: BaseException) -> None:
        """End the run by this error, as one of the exit handler's would; without waiting for the threads."""
        self.failure = self.failure or instance("failure", failure, BaseException)
        self.gate.end()

    def close(self) -> None:
        """stop(), for good: start() is a StateError from now on."""
        self.gate.close()
        self._wait_for_threads()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if kind is None and self.failure is not None:
            raise self.failure

    def thread_id(self, vcpu: int) -> int | None:
        """The kernel's id of vCPU's thread; None while it has none."""
        return self.gate.thread_id(whole("vcpu", vcpu))

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """The vCPUs' threads, of the last run."""
        return tuple(self._threads)

    # Keeping vCPUs out of the guest

    def pause(self) -> None:
        """Return once no vCPU is in the guest, and let none in before resume(); not paused if interrupted before."""
        self.gate.pause()

    def resume(self) -> None:
        """Let the vCPUs go on after pause()."""
        self.gate.resume()

    def quiesce(self, vcpu: int | None = None) -> Hold:
        """Keep all vCPUs out of the guest meanwhile; `vcpu`, the caller's own, is out already, as the gate knows."""
        return self.gate.hold()

    # Inside

    def _is_own_thread(self) -> bool:
        """Is this a vCPU's thread?  By its object, because the next thread may get the ident of one that ended."""
        return threading.current_thread() in self._threads

    def _wait_for_threads(self) -> None:
        if self._is_own_thread():
            return
        self.gate.wait_until_departed()
        for thread in self._threads:
            thread.join()  # its last lines; an interrupt of a longer join() would make is_alive() false for good

    # On other threads

    def _start_threads(self) -> None:
        """Start each vCPU's thread, on a thread without signal handlers, which could interrupt Thread.start()."""
        self._threads = []
        self.failure = self._start_failure = None
        with self.gate.hold():  # none goes in before all have their threads
            for vcpu in range(len(self.gate.vcpus)):
                if not self._start_thread(vcpu):
                    self.failure = self._start_failure
                    self._depart(vcpu)
        self.gate.threads_started()

    def _start_late_thread(self, vcpu: int) -> None:
        """Start the thread of a vCPU that came during a run, on a thread as _start_threads()."""
        with self.gate.hold():
            if not self._start_thread(vcpu) and self.gate.take_away():
                self._tell_of_end()
        self.gate.threads_started()

    def _start_thread(self, vcpu: int) -> bool:
        thread = threading.Thread(target=self._run, args=(vcpu,), name=f"vCPU {vcpu}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._start_failure = _no_thread(error)
            return False
        self._threads.append(thread)
        return True

    def _run(self, vcpu: int) -> None:
        run, handler = self.gate.vcpus[vcpu].run, self._handler
        enter, leave = self.gate.enter, self.gate.leave
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [self._kick_signal])  # the caller of start() may block it
            self.gate.arrive(vcpu)
            while enter(vcpu):
                reason = run()
                leave(vcpu)
                if type(reason) is Interrupted:
                    continue
                goes_on = handler(vcpu, reason)
                if goes_on is not True:
                    _check_ends(goes_on)
                    break
        except BaseException as failure:  # noqa: BLE001  # stop() and wait() raise it
            self.failure = self.failure or failure
        finally:
            self._depart(vcpu)

    def _depart(self, vcpu: int) -> None:
        if self.gate.depart(vcpu):
            self._tell_of_end()

    def _tell_of_end(self) -> None:
        if self._on_end is None:
            return
        try:
            self._on_end(self.failure)
        except BaseException as failure:  # noqa: BLE001  # as the exit handler's
            self.failure = self.failure or failure


def _check_ends(result: object) -> None:
    """WrongType unless an exit handler returned False, so that a forgotten `return True` is not silent."""
    if result is not False:
        raise WrongType("the exit handler's result", result, "True to go on, False to end the run")


def _no_thread(error: RuntimeError) -> StateError:
    return StateError("start", f"a vCPU has no thread: {error}", "end other threads, or raise the limit (ulimit -u)")
