"""One change of a clock at a time: what is told when, what comes out, and that no interrupt leaks the lock."""

import _thread
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import pytest

from pvclock import GuestMemory, StateError
from pvclock._transaction import Transaction, Turns
from tests.waiting import HANG_S

INTERRUPTS = 1000


class Clock:
    """Memory, a transaction over it, and what happened, in order."""

    def __init__(self) -> None:
        self.memory = GuestMemory(bytearray(0x1000))
        self.heard: list[object] = []
        self.memory.on_dirty = lambda gpa, _length: self.heard.append((hex(gpa), self.is_locked()))
        self.transaction = Transaction(self.memory, lambda: self.heard.append(("after", self.is_locked())))

    def is_locked(self) -> bool:
        """Is the lock held, as another thread sees it?"""
        found: list[bool] = []

        def look() -> None:
            found.append(not self.transaction.lock.acquire(blocking=False))
            if not found[0]:
                self.transaction.lock.release()

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return found[0]


def write_and_raise(clock: Clock, transaction: Transaction, error: BaseException) -> None:
    """Write in a transaction, and raise `error` there."""
    with transaction:
        clock.memory.write(0x100, b"a")
        raise error


def failing(error: BaseException) -> Callable[..., object]:
    """A callback that raises `error`, and no other time."""

    def fail(*_arguments: object) -> None:
        raise error

    return fail


@pytest.mark.row("E9")
def test_dirty_is_told_under_the_lock_and_after_without_it() -> None:
    """At the end of the body on_dirty is told of each range once under the lock, then after() is called without it."""
    clock = Clock()
    with clock.transaction:
        clock.memory.write(0x100, b"a")
        clock.memory.write(0x200, b"a")
        clock.memory.write(0x100, b"b")
        assert clock.is_locked()
        assert not clock.heard
    assert clock.heard == [("0x100", True), ("0x200", True), ("after", False)]


@pytest.mark.row("E9")
def test_only_the_outermost_end_tells() -> None:
    """Nested transactions are one: told once, at the outermost end."""
    clock = Clock()
    with clock.transaction as outer:
        with clock.transaction as inner:
            clock.memory.write(0x100, b"a")
        assert inner is outer
        assert not clock.heard
        assert clock.is_locked()
    assert clock.heard == [("0x100", True), ("after", False)]


@pytest.mark.row("E9")
def test_one_thread_at_a_time() -> None:
    """A second thread's body begins when the first thread's on_dirty was told and the lock given back."""
    clock = Clock()
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with clock.transaction:
            clock.heard.append("second")

    thread = threading.Thread(target=second)
    with clock.transaction:
        thread.start()
        assert begun.wait(HANG_S)
        clock.memory.write(0x100, b"a")
        clock.heard.append("first")
    thread.join()
    assert [item for item in clock.heard if "after" not in item] == ["first", ("0x100", True), "second"]  # type: ignore[operator]  # each is a str or a tuple


@pytest.mark.row("E9")
@pytest.mark.parametrize("error", [RuntimeError("body"), KeyboardInterrupt()])
def test_a_body_that_raises_is_told_all_the_same(error: BaseException) -> None:
    """What the body wrote before it raised is told, after() is called, and the body's exception comes out."""
    clock = Clock()
    with pytest.raises(type(error)) as caught:
        write_and_raise(clock, clock.transaction, error)
    assert caught.value is error
    assert clock.heard == [("0x100", True), ("after", False)]


@pytest.mark.row("E9")
@pytest.mark.parametrize("told", [RuntimeError("told"), KeyboardInterrupt()])
def test_an_error_of_on_dirty_comes_out(told: BaseException) -> None:
    """Where only on_dirty raised, that comes out, when the lock was given back and after() was called."""
    clock = Clock()
    clock.memory.on_dirty = failing(told)
    with pytest.raises(type(told)) as caught, clock.transaction:
        clock.memory.write(0x100, b"a")
    assert caught.value is told
    assert clock.heard == [("after", False)]


@pytest.mark.row("E9")
def test_the_bodys_exception_wins() -> None:
    """Where body, on_dirty and after() all raise, the body's exception comes out with the others as notes."""
    clock = Clock()
    clock.memory.on_dirty = failing(RuntimeError("told"))
    transaction = Transaction(clock.memory, failing(RuntimeError("after")))
    with pytest.raises(LookupError) as caught:
        write_and_raise(clock, transaction, LookupError("body"))
    of_told, of_after = caught.value.__notes__
    assert "told" in of_told
    assert "after" in of_after


@pytest.mark.row("E9")
def test_an_error_of_on_dirty_comes_before_one_of_after() -> None:
    """Where on_dirty and after() raise, on_dirty's error comes out with the other as a note."""
    clock = Clock()
    clock.memory.on_dirty = failing(RuntimeError("told"))
    with pytest.raises(RuntimeError, match="told") as caught, Transaction(clock.memory, failing(RuntimeError("after"))):
        clock.memory.write(0x100, b"a")
    assert ["after" in note for note in caught.value.__notes__] == [True]


@pytest.mark.row("E9")
def test_an_error_of_after_comes_out() -> None:
    """Where only after() raised, that comes out, and the transaction has ended."""
    clock = Clock()
    transaction = Transaction(clock.memory, failing(RuntimeError("after")))
    with pytest.raises(RuntimeError, match="after"), transaction:
        clock.memory.write(0x100, b"a")
    assert clock.heard == [("0x100", True)]
    assert transaction.lock.acquire(blocking=False)
    transaction.lock.release()


@pytest.mark.row("E9")
def test_an_interrupt_in_a_callback_is_not_hidden_by_an_error() -> None:
    """A KeyboardInterrupt that on_dirty gets comes out before the body's error, which is a note in it."""
    clock = Clock()
    clock.memory.on_dirty = failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        write_and_raise(clock, clock.transaction, LookupError("body"))
    assert ["body" in note for note in caught.value.__notes__] == [True]
    assert clock.heard == [("after", False)]


@pytest.mark.row("E9")
def test_on_dirty_may_use_the_clock() -> None:
    """What a callback writes in a transaction of its own is told, too, in the same end, and after() is called once."""
    clock = Clock()
    hear = clock.memory.on_dirty
    assert hear is not None

    def hear_and_write(gpa: int, length: int) -> None:
        hear(gpa, length)
        if gpa == 0x100:
            with clock.transaction:
                clock.memory.write(0x200, b"a")

    clock.memory.on_dirty = hear_and_write
    with clock.transaction:
        clock.memory.write(0x100, b"a")
    assert clock.heard == [("0x100", True), ("0x200", True), ("after", False)]


@pytest.mark.row("E9")
def test_after_may_use_the_clock() -> None:
    """after() may begin a transaction, at whose end it is called again."""
    clock = Clock()
    rounds = iter([1])

    def after() -> None:
        clock.heard.append("after")
        for _ in rounds:
            with transaction:
                clock.memory.write(0x100, b"a")

    transaction = Transaction(clock.memory, after)
    with transaction:
        pass
    assert clock.heard == ["after", ("0x100", True), "after"]


@pytest.mark.row("E9")
def test_an_end_without_a_beginning_is_an_error() -> None:
    """__exit__ in a thread that is in no transaction is a StateError, and takes nothing from who is in one."""
    clock = Clock()
    with pytest.raises(StateError):
        clock.transaction.__exit__(None, None, None)
    errors: list[StateError] = []

    def end() -> None:
        try:
            clock.transaction.__exit__(None, None, None)
        except StateError as error:
            errors.append(error)

    with clock.transaction:
        thread = threading.Thread(target=end)
        thread.start()
        thread.join()
        assert clock.is_locked()
    assert len(errors) == 1
    assert not clock.is_locked()


@contextmanager
def interrupts(count: int) -> Iterator[Callable[[], bool]]:
    """Interrupt the main thread `count` times, each time when it has called the function since; false when all came."""
    asked, left, interval = SimpleQueue[None](), count, sys.getswitchinterval()  # an Event would leak its lock

    def interrupt() -> None:
        nonlocal left
        while left > 0:
            asked.get()
            if left > 0:
                left -= 1
                _thread.interrupt_main()

    def again() -> bool:
        is_left = left > 0
        asked.put(None)
        return is_left

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        yield again
    finally:
        left = 0
        asked.put(None)
        thread.join()
        sys.setswitchinterval(interval)
        signal.signal(signal.SIGINT, before)


def interrupted(body: Callable[[], None], check: Callable[[], None]) -> int:
    """Call `body` over and over, interrupted at any instruction, and `check` after each; how often it was."""
    came = 0
    with interrupts(INTERRUPTS) as again:
        while True:
            try:
                if not again():
                    return came
                while True:
                    body()
            except KeyboardInterrupt:
                came += 1
            check()


@pytest.mark.row("E9")
def test_no_interrupt_leaks_the_lock() -> None:
    """Interrupted at any instruction, again and again, a transaction is over when the interrupt comes out."""
    memory = GuestMemory(bytearray(0x1000))
    written: set[int] = set()
    memory.on_dirty = lambda gpa, _length: written.add(gpa)
    transaction = Transaction(memory, lambda: None)

    def body() -> None:
        with transaction:
            memory.write(0x100, b"a")

    def check() -> None:
        with pytest.raises(RuntimeError, match="un-acquired"):
            transaction.lock.release()
        with pytest.raises(StateError):
            memory.tell_dirty()

    assert interrupted(body, check) == INTERRUPTS
    assert written


class Interrupting:
    """What interrupts whoever prints it, as Ctrl-C does while the Python code of a repr runs."""

    def __repr__(self) -> str:
        raise KeyboardInterrupt


@pytest.mark.row("E9")
@pytest.mark.parametrize("body", [LookupError("body"), LookupError(Interrupting())])
def test_an_interrupt_while_errors_become_notes_leaks_nothing(body: LookupError) -> None:
    """It comes out when the lock was given back and after() was called; the next write is told as ever."""
    clock = Clock()
    hear = clock.memory.on_dirty
    clock.memory.on_dirty = failing(OSError(Interrupting()))
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(clock, clock.transaction, body)
    assert clock.heard == [("after", False)]
    clock.memory.on_dirty = hear
    clock.memory.write(0x200, b"a")
    assert clock.heard[1:] == [("0x200", False)]


@pytest.mark.row("E9")
def test_an_interrupt_while_two_errors_of_on_dirty_become_one_leaks_nothing() -> None:
    """Memory that is written without a transaction: it comes out when all were told, and the next write is told."""
    memory, heard = GuestMemory(bytearray(0x1000)), list[int]()

    def fail(gpa: int, _length: int) -> None:
        heard.append(gpa)
        raise OSError(Interrupting())

    memory.on_dirty = fail
    memory.defer_dirty()
    for gpa in (1, 2, 3):
        memory.write(gpa, b"a")
    with pytest.raises(KeyboardInterrupt):
        memory.tell_dirty()
    memory.on_dirty = lambda gpa, _length: heard.append(gpa)
    memory.write(4, b"a")
    assert heard == [1, 2, 3, 4]


@pytest.mark.row("E9")
def test_a_thread_inherits_nothing_from_one_that_has_ended() -> None:
    """A thread may have the ident of one that ended, but not what that kept back and never told."""
    clock, idents = Clock(), set[int]()

    def keep_back() -> None:
        idents.add(threading.get_ident())
        clock.memory.defer_dirty()
        clock.memory.write(0x100, b"a")

    def write() -> None:
        was_anothers.append(threading.get_ident() in idents)
        clock.memory.write(0x200, b"a")
        with clock.transaction:
            clock.memory.write(0x300, b"a")

    was_anothers = list[bool]()
    for target in [keep_back] * 20 + [write] * 20:
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert any(was_anothers)  # else it shows nothing
    assert clock.heard == [("0x200", False), ("0x300", True), ("after", False)] * 20


@pytest.mark.row("E9")
def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    """Forked while another thread's on_dirty keeps it at its end: in the child the next one begins, and ends."""
    clock = Clock()
    inside, go_on = threading.Event(), threading.Event()

    def on_dirty(_gpa: int, _length: int) -> None:
        inside.set()
        go_on.wait()

    clock.memory.on_dirty = on_dirty

    def change() -> None:
        with clock.transaction:
            clock.memory.write(0x100, b"a")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert inside.wait(HANG_S)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads
            child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(HANG_S)  # a wait for ever ends the child, not the test
                clock.memory.on_dirty = lambda gpa, _length: clock.heard.append(gpa)
                change()
                with clock.transaction.lock:
                    status = 0 if clock.heard == [0x100, ("after", False)] else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        go_on.set()
        thread.join()


@pytest.mark.row("E9")
def test_a_child_that_is_forked_within_a_transaction_ends_it() -> None:
    """The thread that forks goes on in the child, with the lock that it holds and what it has kept back."""
    clock = Clock()
    child = 0
    with clock.transaction:
        clock.memory.write(0x100, b"a")
        child = os.fork()
        if child == 0:
            signal.alarm(HANG_S)
    if child == 0:
        os._exit(0 if clock.heard == [("0x100", True), ("after", False)] else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert clock.heard == [("0x100", True), ("after", False)]


@pytest.mark.row("E9")
def test_who_comes_in_anothers_turn_goes_without() -> None:
    """A turn is the first one's until its `with` ends, however it ends; nobody waits, in whatever thread."""
    turns, taken = Turns(), list[bool]()

    def take() -> None:
        with turns.take() as is_mine:
            taken.append(is_mine)

    def take_and_raise() -> None:
        with turns.take() as is_mine:
            taken.append(is_mine)
            take()
            thread = threading.Thread(target=take)
            thread.start()
            thread.join()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_and_raise()
    take()
    assert taken == [True, False, False, True]


@pytest.mark.row("E9")
def test_a_turn_ends_with_the_process_that_took_it() -> None:
    """In a child of fork() it is nobody's, whoever had it in the parent."""
    turns = Turns()
    with turns.take():
        child = os.fork()
        if child == 0:
            with turns.take() as is_mine:
                os._exit(0 if is_mine else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
