"""Slots that change while a publish is under way: each meeting is arranged, none is left to chance."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pvclock import ConfigError, GuestMemory
from pvclock._core import read_time_info
from tests.stress.slot_schedules import LINE, PAGE, SCALE, SIZE, Announced, PublishUnderWay, give_way, pages_at
from tests.waiting import HANG_S

pytestmark = pytest.mark.stress


def all_at_once(memory: GuestMemory, calls: list[tuple[Callable[..., object], int, tuple[object, ...]]]) -> None:
    """Begin calls of slot operations in threads while a publish is under way, and let them go on together."""
    announced = [Announced(gpa) for _, gpa, _ in calls]
    with PublishUnderWay(memory):
        threads = [
            threading.Thread(target=call, args=(gpa, *arguments))
            for (call, _, arguments), gpa in zip(calls, announced, strict=True)
        ]
        for thread, gpa in zip(threads, announced, strict=True):
            thread.start()
            assert gpa.begun.wait(HANG_S)
        give_way(1000)  # so that all have come to where they wait; what is asserted holds wherever they are
    for thread in threads:
        thread.join()
    memory.remove_slot(PAGE)


@pytest.mark.row("E9")
def test_threads_that_wait_to_change_slots_lose_none() -> None:
    """Slots that several threads add or remove while a publish is under way are all there, or all gone, after it."""
    memory = GuestMemory()
    gpas = [gpa * SIZE for gpa in range(8)]
    all_at_once(memory, [(memory.add_slot, gpa, (bytearray(SIZE),)) for gpa in gpas])
    assert memory.slots == [(gpa, SIZE) for gpa in gpas]
    changes: list[tuple[Callable[..., object], int, tuple[object, ...]]] = []
    for old, new in zip(gpas[::2], (0x100000, 0x200000, 0x300000, 0x400000), strict=True):
        changes += [(memory.remove_slot, old, ()), (memory.add_slot, new, (bytearray(SIZE),))]
    all_at_once(memory, changes)
    added = [0x100000, 0x200000, 0x300000, 0x400000]
    assert [gpa for gpa, _ in memory.slots] == gpas[1::2] + added


@pytest.mark.row("E9")
def test_of_slots_that_overlap_one_is_added() -> None:
    """Two threads that wait to map the same address: one does, the other gets its error, nothing is mapped twice."""
    memory = GuestMemory()
    errors: list[Exception] = []

    def add(gpa: int, buffer: bytearray) -> None:
        try:
            memory.add_slot(gpa, buffer)
        except Exception as error:  # noqa: BLE001  # told apart below
            errors.append(error)

    all_at_once(memory, [(add, 0, (bytearray(SIZE),)), (add, SIZE // 2, (bytearray(SIZE),))])
    assert memory.slots in ([(0, SIZE)], [(SIZE // 2, SIZE)])
    assert [type(error) for error in errors] == [ConfigError]


@pytest.mark.row("E9")
def test_an_interrupt_while_slots_wait_leaves_them() -> None:
    """A signal handler that raises while add_slot() and remove_slot() wait for a publish leaves all as it was."""
    memory = GuestMemory(bytearray(SIZE))
    main = threading.get_ident()

    class Interrupted(Exception):
        pass

    def raise_interrupted(_signal: int, _frame: object) -> None:
        raise Interrupted

    def send(begun: threading.Event) -> None:
        begun.wait()
        give_way(1000)
        signal.pthread_kill(main, signal.SIGUSR1)

    handler = signal.signal(signal.SIGUSR1, raise_interrupted)
    try:
        with PublishUnderWay(memory) as publish:
            before, generation = memory.slots, memory.generation
            changes: list[Callable[[Any], object]] = [
                lambda gpa: memory.add_slot(gpa, bytearray(SIZE)),
                memory.remove_slot,
            ]
            for change, gpa in zip(changes, (0x200000, 0), strict=True):
                announced = Announced(gpa)
                sender = threading.Thread(target=send, args=(announced.begun,))
                sender.start()
                with pytest.raises(Interrupted):
                    change(announced)
                sender.join()
                assert (memory.slots, memory.generation) == (before, generation)
            publish.end()
            memory.add_slot(0x200000, bytearray(SIZE))
            assert publish.pages.publish(LINE, SCALE) >= 0
    finally:
        signal.signal(signal.SIGUSR1, handler)


@pytest.mark.row("E9")
def test_a_signal_handler_may_publish_while_slots_wait() -> None:
    """A handler that runs while add_slot() waits may use a clock in the same memory; the wait goes on after it."""
    memory = GuestMemory(bytearray(SIZE))
    pages = pages_at(memory, 0)
    main = threading.get_ident()
    handled: list[int] = []
    announced = Announced(0x200000)

    def send() -> None:
        announced.begun.wait()
        give_way(1000)
        signal.pthread_kill(main, signal.SIGUSR1)
        while not handled:
            give_way()
        publish.end()

    old = signal.signal(signal.SIGUSR1, lambda *_: handled.append(pages.publish(LINE, SCALE)))
    try:
        publish = PublishUnderWay(memory)
        sender = threading.Thread(target=send)
        sender.start()
        memory.add_slot(announced, bytearray(SIZE))  # type: ignore[arg-type]  # anything with __index__ is one
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert len(handled) == 1
    assert read_time_info(memory, 0).version == 4
    assert [gpa for gpa, _ in memory.slots] == [0, PAGE, 0x200000]


@pytest.mark.row("E9")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_fork_may_close() -> None:
    """In a child that was forked during a publish and a wait for it, slots change and pages are published at once."""
    memory = GuestMemory(bytearray(SIZE))
    pages = pages_at(memory, 0)
    announced = Announced(0x200000)
    with PublishUnderWay(memory):
        waiting = threading.Thread(target=memory.add_slot, args=(announced, bytearray(SIZE)))
        waiting.start()
        assert announced.begun.wait(HANG_S)
        give_way(1000)
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a child that spins dies of this
            pages.publish(LINE, SCALE)
            memory.add_slot(0x300000, bytearray(SIZE))
            memory.close()
            os._exit(0 if memory.slots == [] else 1)
        _, status = os.waitpid(child, 0)
    waiting.join()
    assert status == 0
    assert [gpa for gpa, _ in memory.slots] == [0, PAGE, 0x200000]


@pytest.mark.row("E9")
def test_who_publishes_without_pause_lets_slots_change() -> None:
    """One who holds a lock that the publishing thread also takes gets its changes of slots in."""
    memory = GuestMemory(bytearray(SIZE))
    pages = pages_at(memory, 0)
    lock = threading.Lock()
    begun, done = threading.Event(), threading.Event()
    rounds = 0

    def publish() -> None:
        nonlocal rounds
        while not done.is_set():
            pages.publish(LINE, SCALE)
            with lock:
                pages.publish(LINE, SCALE)
            rounds += 1
            begun.set()

    thread = threading.Thread(target=publish)
    thread.start()
    assert begun.wait(HANG_S)
    for _ in range(200):
        with lock:
            memory.add_slot(0x200000, bytearray(SIZE))
            memory.remove_slot(0x200000)
    done.set()
    thread.join()
    assert memory.slots == [(0, SIZE)]
    assert read_time_info(memory, 0).version == 2 + 4 * rounds
