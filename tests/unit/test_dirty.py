"""Who is told of what pvclock writes: in which thread, when, how often, and what becomes of its errors."""

import threading
from collections.abc import Callable

import pytest

from pvclock import ClockLine, ClockScale, GuestAddressError, GuestMemory, GuestNs, HostTsc, StateError
from pvclock import _records as records
from pvclock._core import TimePages
from pvclock._counter import SimulatedCounter
from pvclock._records import publish_wall_clock

SIZE = 0x10000
SCALE = ClockScale.from_hz(10**9)
LINE = ClockLine(HostTsc(0), GuestNs(0), 0, 1, 1)
Extent = tuple[int, int]


def a_memory() -> tuple[GuestMemory, list[Extent]]:
    """Memory, and the list that its on_dirty fills."""
    memory = GuestMemory(bytearray(SIZE))
    heard: list[Extent] = []
    memory.on_dirty = lambda gpa, length: heard.append((gpa, length))
    return memory, heard


def some_pages(memory: GuestMemory, vcpus: int = 2) -> TimePages:
    """Pages from 0x2000 on, 64 bytes apart, published."""
    pages = TimePages(memory, vcpus, SimulatedCounter())
    for vcpu in range(vcpus):
        pages.register(vcpu, 0x2000 + 64 * vcpu)
    pages.publish(LINE, SCALE)
    return pages


WRITES: dict[str, tuple[Callable[[GuestMemory], object], list[Extent]]] = {
    "write": (lambda memory: memory.write(0x10, b"abc"), [(0x10, 3)]),
    "wall clock": (lambda memory: publish_wall_clock(memory, 0x3000, 10**18), [(0x3000, 12)]),
    "steal time": (lambda memory: records.add_steal_time(memory, 0x4000, 1), [(0x4000, 64)]),
    "preempted": (lambda memory: records.set_preempted(memory, 0x4000), [(0x4000, 64)]),
    "recorded": (lambda memory: records.record_steal_time(memory, 0x4000, 1, bytearray(1), 0), [(0x4000, 64)]),
    "runs again": (lambda memory: records.clear_preempted(memory, 0x4000, bytearray(1), 0), [(0x4000, 64)]),
    "EOI offered": (lambda memory: records.offer_eoi(memory, 0x5000), [(0x5000, 1)]),
    "EOI taken": (lambda memory: records.take_eoi(memory, 0x5000, bytearray(1), 0), [(0x5000, 1)]),
    "word": (lambda memory: records.store_word(memory, 0x6000, 7), [(0x6000, 4)]),
    "pairing": (lambda memory: records.write_clock_pairing(memory, 0x7000, 10**18, 5), [(0x7000, 64)]),
    "pages": (some_pages, [(0x2000, 32), (0x2040, 32)]),
}


@pytest.mark.row("E9")
@pytest.mark.parametrize("name", WRITES)
def test_what_is_deferred_is_told_once_at_the_end(name: str) -> None:
    """Each way to write is told at once and writes nothing else; what is deferred is told later, each range once."""
    write, extents = WRITES[name]
    memory, heard = a_memory()
    for gpa, length in extents:
        memory.write(gpa, (b"\x0f" if name == "EOI taken" else b"\x0e") * length)
    before = memory.read(0, SIZE)
    heard.clear()
    write(memory)
    assert heard == extents
    written = {at for at, (old, new) in enumerate(zip(before, memory.read(0, SIZE), strict=True)) if old != new}
    assert written
    assert written <= {at for gpa, length in extents for at in range(gpa, gpa + length)}
    memory.defer_dirty()
    write(memory)
    write(memory)
    assert heard == extents
    memory.tell_dirty()
    assert heard == 2 * extents


@pytest.mark.row("E9")
def test_deferred_writes_keep_their_order_and_nest() -> None:
    """Ranges are told in the order in which they were first written, by the outermost tell_dirty()."""
    memory, heard = a_memory()
    memory.defer_dirty()
    memory.write(0x300, b"c")
    memory.defer_dirty()
    memory.write(0x100, b"a")
    memory.write(0x300, b"c")
    memory.tell_dirty()
    assert not heard
    memory.write(0x200, b"bb")
    memory.tell_dirty()
    assert heard == [(0x300, 1), (0x100, 1), (0x200, 2)]


@pytest.mark.row("E9")
def test_other_threads_are_told_of_at_once() -> None:
    """What another thread writes while this one defers is told in that thread, before its write() returns."""
    memory = GuestMemory(bytearray(SIZE))
    heard: list[tuple[int, int]] = []
    memory.on_dirty = lambda gpa, _length: heard.append((gpa, threading.get_ident()))
    memory.defer_dirty()
    memory.write(0x100, b"a")
    other = threading.Thread(target=memory.write, args=(0x200, b"b"))
    other.start()
    other.join()
    assert heard == [(0x200, other.ident)]
    memory.tell_dirty()
    assert heard[1:] == [(0x100, threading.get_ident())]


@pytest.mark.row("E9")
def test_telling_what_was_not_deferred_is_an_error() -> None:
    """tell_dirty() without defer_dirty() in this thread is a StateError, and changes nothing."""
    memory, heard = a_memory()
    with pytest.raises(StateError, match="defer_dirty"):
        memory.tell_dirty()
    memory.write(0x100, b"a")
    assert heard == [(0x100, 1)]


@pytest.mark.row("E9")
def test_the_first_error_comes_out_when_all_is_told() -> None:
    """on_dirty is told of every range whatever it raises; the first error has the others as notes."""
    memory = GuestMemory(bytearray(SIZE))
    heard: list[int] = []

    def complain(gpa: int, _length: int) -> None:
        heard.append(gpa)
        raise RuntimeError(f"cannot mark {gpa:#x}")

    memory.on_dirty = complain
    memory.defer_dirty()
    for gpa in (0x100, 0x200, 0x300):
        memory.write(gpa, b"a")
    with pytest.raises(RuntimeError, match="0x100") as caught:
        memory.tell_dirty()
    assert heard == [0x100, 0x200, 0x300]
    assert ["0x200" in note or "0x300" in note for note in caught.value.__notes__] == [True, True]
    memory.on_dirty = None
    memory.write(0x100, b"b")
    with pytest.raises(StateError):
        memory.tell_dirty()


@pytest.mark.row("E9")
def test_an_interrupt_comes_out_before_an_error() -> None:
    """A KeyboardInterrupt in on_dirty keeps nothing from being told, and no earlier error hides it."""
    memory = GuestMemory(bytearray(SIZE))
    heard: list[int] = []
    errors: dict[int, BaseException] = {0x100: RuntimeError("first"), 0x200: KeyboardInterrupt(), 0x300: OSError()}

    def complain(gpa: int, _length: int) -> None:
        heard.append(gpa)
        raise errors[gpa]

    memory.on_dirty = complain
    memory.defer_dirty()
    for gpa in errors:
        memory.write(gpa, b"a")
    with pytest.raises(KeyboardInterrupt) as caught:
        memory.tell_dirty()
    assert heard == list(errors)
    assert ["first" in note or "OSError" in note for note in caught.value.__notes__] == [True, True]


class Unprintable(Exception):
    """An error whose text cannot be had."""

    def __repr__(self) -> str:
        raise ValueError("no text")


@pytest.mark.row("E9")
def test_an_error_that_cannot_be_noted_hides_nothing() -> None:
    """Where a later error has no text, the first one comes out all the same."""
    memory = GuestMemory(bytearray(SIZE))
    errors: list[Exception] = [Unprintable(), RuntimeError("first")]

    def complain(_gpa: int, _length: int) -> None:
        raise errors.pop()

    memory.on_dirty = complain
    memory.defer_dirty()
    memory.write(0x100, b"a")
    memory.write(0x200, b"a")
    with pytest.raises(RuntimeError, match="first"):
        memory.tell_dirty()
    assert not errors


@pytest.mark.row("E9")
def test_on_dirty_may_be_switched_off_while_it_is_told() -> None:
    """Where on_dirty becomes None between two pages, whoever was told of the first is told of all, without an error."""
    memory = GuestMemory(bytearray(SIZE))
    pages = some_pages(memory)
    heard: list[int] = []

    def hear_once(gpa: int, _length: int) -> None:
        heard.append(gpa)
        memory.on_dirty = None

    memory.on_dirty = hear_once
    pages.mark_dirty()
    pages.mark_dirty()
    assert heard == [0x2000, 0x2040]


@pytest.mark.row("E9")
def test_without_on_dirty_nothing_is_kept() -> None:
    """What was written before on_dirty was set is not told; it was not asked for."""
    memory = GuestMemory(bytearray(SIZE))
    heard: list[int] = []
    memory.defer_dirty()
    memory.write(0x100, b"a")
    memory.on_dirty = lambda gpa, _length: heard.append(gpa)
    memory.write(0x200, b"a")
    memory.tell_dirty()
    assert heard == [0x200]


@pytest.mark.row("E9")
def test_on_dirty_may_write() -> None:
    """on_dirty is told of what it writes itself, when it has returned: it is never called within a call of it."""
    memory = GuestMemory(bytearray(SIZE))
    heard: list[int] = []
    inside = 0

    def hear(gpa: int, _length: int) -> None:
        nonlocal inside
        inside += 1
        assert inside == 1
        heard.append(gpa)
        if gpa < 0x800:
            memory.write(gpa * 2, b"a")
        inside -= 1

    memory.on_dirty = hear
    memory.write(0x100, b"a")
    assert heard == [0x100, 0x200, 0x400, 0x800]


@pytest.mark.row("E9")
def test_an_on_dirty_that_always_writes_is_stopped() -> None:
    """A callback that answers every telling by a write gets a StateError that says so, not an endless loop."""
    memory = GuestMemory(bytearray(SIZE))
    calls = 0

    def write_again(gpa: int, _length: int) -> None:
        nonlocal calls
        calls += 1
        memory.write(gpa, b"a")

    memory.on_dirty = write_again
    with pytest.raises(StateError, match="at each report of a write"):
        memory.write(0x100, b"a")
    assert 1 < calls < 1000
    memory.on_dirty = None
    memory.write(0x100, b"b")
    assert memory.read(0x100, 1) == b"b"


@pytest.mark.row("E9")
def test_a_failed_write_dirties_nothing() -> None:
    """A write outside of memory is told to nobody, and leaves nothing deferred."""
    memory, heard = a_memory()
    with pytest.raises(GuestAddressError):
        memory.write(SIZE - 1, b"ab")
    assert not heard
    with pytest.raises(StateError):
        memory.tell_dirty()
