"""Threads that run a VM's vCPUs: start, pause, resume, stop.

Each vCPU has a thread that runs it and hands every exit to the one handler.  A vCPU enters the guest through a gate,
which also counts the threads.  Nothing here knows what the exits mean.

KeyboardInterrupt may come between any two lines here.  So what changes more than one thing is one call of the gate's,
and what is left after an interrupted call is a state in which every other call works.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeAlias

from pvclock.arguments import function, number, whole
from pvclock.errors import StateError, WrongType
from pvclock.kvm._gate import Gate, Hold
from pvclock.kvm._ioctls import Vcpu, install_kick_signal
from pvclock.kvm.arguments import vcpus_of
from pvclock.kvm.exits import Exit, Interrupted

__all__ = ["ExitHandler", "Runner"]

ExitHandler: TypeAlias = Callable[[int, Exit], bool]
"""handler(vcpu, exit), on that vCPU's thread: it answers the exit on the Vcpu.

True lets the vCPU go on, and False ends the VM's run; so does any other result, as an error.
"""


class Runner:
    """Runs `vcpus`, each on its own thread; a context manager that starts and stops them, and raises what failed.

    kick_signal: a signal that the process does not use otherwise; its handler does nothing but end a system call.
    WrongType for an argument that is none; ConfigError for a VM without vCPUs.

    Thread-safety: all methods may be called from any thread; join() not from a vCPU's own.
    """

    def __init__(self, vcpus: list[Vcpu], handler: ExitHandler, *, kick_signal: int = signal.SIGRTMIN + 2) -> None:
        self._vcpus = vcpus_of(vcpus)
        self._handler = function("handler", handler)
        install_kick_signal(kick_signal)
        self.gate = Gate(self._vcpus, kick_signal)
        self._kick_signal = kick_signal
        self._threads: list[threading.Thread] = []
        self._start_failure: StateError | None = None
        self.failure: BaseException | None = None
        """What ended the run, if an error did: raised by the handler or by KVM, or no thread to be had.

        WrongType for a handler that returned neither True nor False.
        """

    # Life

    def start(self) -> None:
        """Let all vCPUs run.  StateError if they were started or stopped before, or if there is no thread for one."""
        try:
            self.gate.begin(self._start_threads)
        except RuntimeError as error:
            raise _no_thread(error) from None
        self.gate.wait_until_started()
        if self._start_failure is not None:
            raise self._start_failure

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the run has ended; False if it has not within `timeout_s`.  StateError if it never began."""
        if timeout_s is not None:
            number("timeout_s", timeout_s)
        if not self.gate.has_begun() and not self.gate.has_ended():
            raise StateError("join", "the vCPUs were never started", "start() them")
        return self.gate.wait_until_ended(timeout_s)

    def stop(self) -> None:
        """End the run and all threads; by a vCPU's own thread, without waiting for them.

        May be called at any time, and again, also after an interrupt.
        """
        self.gate.end()
        if threading.current_thread() in self._threads:  # idents do not tell: the next thread has that of an ended one
            return
        self.gate.wait_until_departed()
        for thread in self._threads:
            thread.join()  # its last lines; an interrupt of a longer join() would make is_alive() false for good

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

    # On other threads

    def _start_threads(self) -> None:
        """Start each vCPU's thread: on one where no signal handler of Python's runs, for Thread.start() bears none."""
        with self.gate.hold():  # none goes in before all have their threads
            for vcpu in range(len(self._vcpus)):
                thread = threading.Thread(target=self._run, args=(vcpu,), name=f"vCPU {vcpu}", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    self.failure = self._start_failure = _no_thread(error)
                    self.gate.depart(vcpu)
                else:
                    self._threads.append(thread)
        self.gate.threads_started()

    def _run(self, vcpu: int) -> None:
        gate, run, handler = self.gate, self._vcpus[vcpu].run, self._handler
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [self._kick_signal])  # whoever called start() may block it
            gate.arrive(vcpu)
            while gate.enter(vcpu):
                reason = run()
                gate.leave(vcpu)
                if not isinstance(reason, Interrupted) and not _goes_on(handler(vcpu, reason)):
                    break
        except BaseException as failure:  # noqa: BLE001  # whoever waits for the run gets it
            self.failure = self.failure or failure
        finally:
            gate.depart(vcpu)


def _goes_on(result: object) -> bool:
    """What an exit handler returned; WrongType for what is no bool, so that a forgotten `return True` is not silent."""
    if result is True or result is False:
        return result
    raise WrongType("the exit handler's result", result, "True to go on, False to end the run")


def _no_thread(error: RuntimeError) -> StateError:
    return StateError("start", f"a vCPU has no thread: {error}", "end other threads, or raise the limit (ulimit -u)")
