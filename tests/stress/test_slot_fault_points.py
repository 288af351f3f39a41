"""Slots that change in the middle of an operation, where a caller's code is run.

That is at a buffer's release, when an argument is computed with, and in a garbage collection.
"""

import gc
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pvclock import GuestAddressError, GuestClock, GuestMemory, SimulatedBackend, StateError
from pvclock import _records as records
from pvclock._core import TimePages, read_time_info
from pvclock._records import publish_wall_clock
from pvclock._stress import republish_in_turn
from tests import oracle
from tests.stress.slot_schedules import LINE, SCALE, SIZE, pages_at

pytestmark = pytest.mark.stress


class Watched(mmap.mmap):
    """Memory that calls `released` as soon as nobody holds it, with its bytes still there."""

    released: Callable[[bytes], object]

    def __del__(self) -> None:
        before = self[:]
        self.released(before)
        assert self[:] == before  # what is raised here, pytest raises: an unraisable error is a failure


PROBES: dict[str, Callable[[GuestMemory, TimePages], object]] = {
    "read": lambda _, pages: pages.read(0),
    "reading": lambda _, pages: pages.reading(0),
    "publish": lambda _, pages: pages.publish(LINE, SCALE),
    "step": lambda _, pages: pages.publish(LINE, SCALE, step=True, out_of_guest=(0,), flags=1),
    "republish in turn": lambda _, pages: republish_in_turn(pages, LINE, [(1, 1, SCALE)], 3),
    "memory.read": lambda memory, _: memory.read(0, 8),
    "memory.write": lambda memory, _: memory.write(0, b"written"),
    "time info": lambda memory, _: read_time_info(memory, 0),
    "wall clock": lambda memory, _: publish_wall_clock(memory, 0, 10**18),
    "steal time": lambda memory, _: records.add_steal_time(memory, 0, 7),
    "EOI": lambda memory, _: records.offer_eoi(memory, 0),
    "word": lambda memory, _: records.store_word(memory, 0, 7),
    "pairing": lambda memory, _: records.write_clock_pairing(memory, 0, 10**18, 7),
}
NOT_THERE: dict[str, object] = {
    "read": StateError,
    "reading": StateError,
    "publish": int,
    "step": int,
    "republish in turn": StateError,
    "memory.read": GuestAddressError,
    "memory.write": GuestAddressError,
    "time info": GuestAddressError,
    "wall clock": False,
    "steal time": None,
    "EOI": False,
    "word": False,
    "pairing": False,
}


def outcome(probe: Callable[[], object]) -> object:
    """What a probe gives, or the class of the error that it raises or of the TSC that it returns."""
    try:
        found = probe()
    except (StateError, GuestAddressError) as error:
        return type(error)
    return int if type(found) is int else found


@pytest.mark.row("E9")
@pytest.mark.parametrize("in_thread", [False, True], ids=["same thread", "another thread"])
@pytest.mark.parametrize("name", PROBES)
def test_a_buffer_that_is_released_is_out_of_reach(name: str, in_thread: bool) -> None:
    """While a slot's buffer is released it is not memory to anyone: nothing reads it, nothing writes it."""
    memory = GuestMemory()
    buffer = Watched(-1, SIZE)
    memory.add_slot(0, buffer)
    pages = pages_at(memory, 0)
    found: list[object] = []

    def probe(_before: bytes) -> None:
        found.append(memory.slots)
        found.append(outcome(lambda: PROBES[name](memory, pages)))

    def released(before: bytes) -> None:
        thread = threading.Thread(target=probe, args=(before,))
        thread.start()
        thread.join()

    buffer.released = released if in_thread else probe
    del buffer
    memory.remove_slot(0)
    assert found == [[], NOT_THERE[name]]


@pytest.mark.row("E9")
def test_a_release_may_change_the_slots() -> None:
    """A buffer that maps another one in its place when it is released finds the state whole; the clock goes on."""
    memory, host = GuestMemory(), SimulatedBackend(10**9)
    clock = GuestClock(memory, backend=host)
    clock.write_msr(0, 0x4B564D01, 1)
    buffer, other = Watched(-1, SIZE), bytearray(SIZE)
    buffer.released = lambda _before: memory.add_slot(0, other)
    memory.add_slot(0, buffer)
    clock.refresh()
    del buffer
    memory.remove_slot(0)
    assert memory.slots == [(0, SIZE)]
    host.advance(ns=1_234_567)
    clock.refresh()
    assert oracle.TimeInfo.parse(bytes(other[:32])).read(host.tsc) == 1_234_567


class Meddling:
    """A whole number that calls `meddle` when it is asked for its value."""

    def __init__(self, value: int, meddle: Callable[[], object]) -> None:
        self._value, self._meddle = value, meddle

    def __index__(self) -> int:
        self._meddle()
        return self._value


MEDDLED: dict[str, Callable[[GuestMemory, TimePages, Any], object]] = {
    "memory.write": lambda memory, _, number: memory.write(number(0), b"written"),
    "wall clock, where": lambda memory, _, number: publish_wall_clock(memory, number(0), 10**18),
    "wall clock": lambda memory, _, number: publish_wall_clock(memory, 0, number(10**18)),
    "pairing, where": lambda memory, _, number: records.write_clock_pairing(memory, number(0), 10**18, 7),
    "pairing": lambda memory, _, number: records.write_clock_pairing(memory, 0, number(10**18), 7),
    "pairing, TSC": lambda memory, _, number: records.write_clock_pairing(memory, 0, 10**18, number(7)),
    "steal time": lambda memory, _, number: records.add_steal_time(memory, 0, number(7)),
    "EOI": lambda memory, _, number: records.offer_eoi(memory, number(0)),
    "word": lambda memory, _, number: records.store_word(memory, 0, number(7)),
    "line": lambda _, pages, number: pages.publish(LINE._replace(ns=number(5)), SCALE),
    "flags": lambda _, pages, number: pages.publish(LINE, SCALE, out_of_guest=(0,), flags=number(1)),
    "out of guest": lambda _, pages, number: pages.publish(LINE, SCALE, out_of_guest=[number(0)]),
}


@pytest.mark.row("E9")
@pytest.mark.parametrize("name", MEDDLED)
def test_arguments_that_change_the_slots(name: str) -> None:
    """An argument that unmaps the memory when it is converted does so before its address is looked up."""
    buffer = bytearray(SIZE)
    memory = GuestMemory(buffer)
    pages = pages_at(memory, 0)
    copies: list[bytes] = []

    def meddle() -> None:
        if memory.slots:
            memory.close()
            copies.append(bytes(buffer))

    outcome(lambda: MEDDLED[name](memory, pages, lambda value: Meddling(value, meddle)))
    assert [bytes(buffer)] == copies


@contextmanager
def at_every_collection(callback: Callable[[], object]) -> Iterator[None]:
    """Collect garbage at nearly every object that is made, and call `callback` each time."""
    thresholds = gc.get_threshold()

    def called(phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            callback()

    gc.callbacks.append(called)
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(called)


@pytest.mark.row("E9")
@pytest.mark.parametrize("name", PROBES)
def test_a_collection_may_change_the_slots(name: str) -> None:
    """Where each garbage collection in an operation maps another buffer, none that was taken away is written to."""
    mapped = bytearray(SIZE)
    memory = GuestMemory(mapped)
    pages = pages_at(memory, 0)
    taken: list[tuple[bytearray, bytes]] = []

    def change() -> None:
        nonlocal mapped
        memory.remove_slot(0)
        taken.append((mapped, bytes(mapped)))
        mapped = bytearray(SIZE)
        memory.add_slot(0, mapped)

    with at_every_collection(change):
        for _ in range(20):
            outcome(lambda: PROBES[name](memory, pages))
    assert taken
    assert all(bytes(buffer) == copy for buffer, copy in taken)


@pytest.mark.row("E9")
def test_memory_in_a_cycle_is_collected() -> None:
    """A memory whose on_dirty holds its clock is garbage with it, buffer and all."""

    class Buffer(bytearray):
        pass

    def cycle() -> weakref.ref[Buffer]:
        buffer = Buffer(SIZE)
        memory = GuestMemory(buffer)
        clock = GuestClock(memory, backend=SimulatedBackend(10**9))
        clock.write_msr(0, 0x4B564D01, 1)
        memory.on_dirty = lambda _gpa, _length: clock.now()
        return weakref.ref(buffer)

    gone = cycle()
    gc.collect()
    assert gone() is None
