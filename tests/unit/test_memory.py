"""Guest memory: slots with holes, bounds that a guest cannot wrap, who hears of writes."""

import ctypes
import mmap
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pvclock import (
    ClockLine,
    ClockScale,
    ConfigError,
    GuestAddressError,
    GuestClock,
    GuestMemory,
    GuestNs,
    HostTsc,
    RangeError,
    SimulatedBackend,
    WrongType,
)
from pvclock import _records as records
from pvclock._core import TimePages
from pvclock._counter import Counter, SimulatedCounter
from pvclock._scale import guest_tsc
from pvclock._stress import republish_in_turn

SIZE = 0x10000


@pytest.mark.row("E9")
@pytest.mark.parametrize("gpa", [2**64 - 8, 2**64 - 1, 2**64, -1, SIZE, SIZE - 7, 2**63])
def test_what_is_not_there_is_an_error(gpa: int) -> None:
    """An access that leaves guest memory, by wrapping round as well, raises GuestAddressError with its numbers."""
    memory = GuestMemory(bytearray(SIZE))
    for access in (lambda: memory.read(gpa, 8), lambda: memory.write(gpa, bytes(8))):
        with pytest.raises(GuestAddressError) as caught:
            access()
        assert (caught.value.gpa, caught.value.length) == (gpa, 8)


@pytest.mark.row("E15")
def test_where_memory_is_in_this_process() -> None:
    """Each byte of each slot, and nothing outside."""
    low, high = bytearray(b"low"), bytearray(b"high")
    memory = GuestMemory(low)
    memory.add_slot(1 << 40, high)
    for gpa, buffer in ((0, low), (1 << 40, high)):
        for offset in range(len(buffer)):
            assert ctypes.string_at(memory.host_address(gpa + offset), 1) == buffer[offset : offset + 1]
    for gpa in (3, (1 << 40) - 1, (1 << 40) + 4, -1, 1 << 64):
        with pytest.raises(GuestAddressError):
            memory.host_address(gpa)
    with pytest.raises(WrongType):
        memory.host_address(1.5)  # type: ignore[arg-type]


RAM = bytes(range(1, 252)) * 40
"""Of which no two parts near each other are alike."""
EDGES = st.sampled_from([0x1000, 0x3000, 2**64 - 0x1000, 2**64 - 1])
NEAR = st.builds(lambda edge, off: max(0, min(edge + off, 2**64 - 1)), EDGES, st.integers(-0x2000, 0x2000))


@pytest.mark.row("E9")
@given(gpa=NEAR | st.integers(0, 2**64 - 1), length=st.integers(0, 0x2001) | st.integers(0, 2**64 - 1))
@example(gpa=0x1000, length=0x2000)
@example(gpa=2**64 - 0x1000, length=0x1000)
@example(gpa=2**64 - 0x1000, length=0x1001)
def test_bounds_hold_for_every_address_and_length(gpa: int, length: int) -> None:
    """Whatever the address and length, an access is inside one slot, and of its bytes, or an error."""
    memory = GuestMemory()
    memory.add_slot(0x1000, bytearray(RAM[:0x2000]))
    memory.add_slot(2**64 - 0x1000, bytearray(RAM[:0x1000]))
    slots = [(0x1000, 0x3000), (2**64 - 0x1000, 2**64)]
    inside = [low for low, high in slots if low <= gpa < high and gpa + length <= high]
    assert memory.contains(gpa, length) is bool(inside)
    if inside:
        at = gpa - inside[0]
        assert memory.read(gpa, length) == RAM[at : at + length]
    else:
        with pytest.raises(GuestAddressError):
            memory.read(gpa, length)


@pytest.mark.row("E9")
def test_slots_have_holes_between_them() -> None:
    """Each slot is its own buffer; what is between and across them is not memory."""
    low, high = bytearray(0x1000), bytearray(0x1000)
    memory = GuestMemory(low)
    memory.add_slot(0x3000, high)
    memory.write(0x3000, b"abc")
    memory.write(0xFFD, b"xyz")
    assert (bytes(high[:3]), bytes(low[-3:])) == (b"abc", b"xyz")
    assert memory.slots == [(0, 0x1000), (0x3000, 0x1000)]
    with pytest.raises(GuestAddressError):
        memory.write(0xFFE, b"xyz")
    assert bytes(low[-3:]) == b"xyz"


@pytest.mark.row("E9")
@pytest.mark.parametrize("gpa", [0xFFF, 0, 0x1FFF])
def test_slots_do_not_overlap(gpa: int) -> None:
    """A slot on another one is refused, and nothing changes."""
    memory = GuestMemory()
    memory.add_slot(0x1000, bytearray(0x1000))
    with pytest.raises(ConfigError, match="overlaps"):
        memory.add_slot(gpa, bytearray(0x1001))
    assert memory.slots == [(0x1000, 0x1000)]


def closed_map() -> mmap.mmap:
    """A memory map that was closed."""
    ram = mmap.mmap(-1, SIZE)
    ram.close()
    return ram


class Pointer(ctypes.Structure):
    """A structure, and with something in it that a guest must not write."""

    _fields_ = (("number", ctypes.c_int), ("at", ctypes.c_void_p))


NO_MEMORY: dict[str, object] = {
    "read-only": b"read-only",
    "text": "text",
    "number": 7,
    "strided": memoryview(bytearray(8))[::2],
    "empty": bytearray(),
    "closed": closed_map(),
    "objects": (ctypes.py_object * 4)(),
    "pointers": (ctypes.c_char_p * 4)(),
    "structures": (Pointer * 4)(),
}


@pytest.mark.row("E9")
@pytest.mark.parametrize("name", NO_MEMORY)
def test_only_writable_contiguous_buffers_are_memory(name: str) -> None:
    """Anything else is refused with what is needed: a guest that writes to it must not make Python crash."""
    with pytest.raises((WrongType, ConfigError), match=r"contiguous buffer|a buffer of bytes|must not be empty"):
        GuestMemory(NO_MEMORY[name])


@pytest.mark.row("E9")
@pytest.mark.parametrize(
    "buffer", [array("d", [0.0] * 4), (ctypes.c_uint32 * 8)(), memoryview(bytearray(32)).cast("q")]
)
def test_buffers_of_plain_numbers_are_memory(buffer: object) -> None:
    """Numbers of any size are as good as bytes."""
    memory = GuestMemory(buffer)
    assert memory.slots == [(0, 32)]
    memory.write(24, bytes(range(8)))
    assert memory.read(24, 8) == bytes(range(8))


@pytest.mark.row("E9")
def test_a_slot_ends_by_2_to_the_64() -> None:
    """The last byte may be the last there is, and no further; an address beyond 64 bits is no address."""
    memory = GuestMemory()
    memory.add_slot(2**64 - 16, bytearray(16))
    assert memory.read(2**64 - 16, 16) == bytes(16)
    with pytest.raises(ConfigError, match=r"2\^64"):
        memory.add_slot(2**64 - 64, bytearray(65))
    with pytest.raises(RangeError):
        memory.add_slot(2**64, bytearray(16))


@pytest.mark.row("E9")
def test_writes_are_reported() -> None:
    """on_dirty hears of each range that pvclock wrote, pages included, and of no read."""
    memory = GuestMemory(bytearray(SIZE))
    heard: list[tuple[int, int]] = []
    memory.on_dirty = lambda gpa, length: heard.append((gpa, length))
    memory.write(0x10, b"abc")
    memory.read(0x10, 3)
    clock = GuestClock(memory, backend=SimulatedBackend(10**9))
    clock.write_msr(0, 0x4B564D01, 0x2000 | 1)
    clock.write_msr(0, 0x4B564D00, 0x3000)
    clock.read(0)
    assert heard == [(0x10, 3), (0x2000, 32), (0x3000, 12)]
    written = {at for at, byte in enumerate(memory.read(0, SIZE)) if byte}
    assert (
        {0x10, 0x11, 0x12, 0x2000, 0x3000} <= written <= {*range(0x13), *range(0x2000, 0x2020), *range(0x3000, 0x300C)}
    )


@pytest.mark.row("E9")
def test_close_lets_go_of_the_buffers() -> None:
    """After close() an mmap can be closed, nothing is memory any more, and a second close() does nothing."""
    ram = mmap.mmap(-1, SIZE)
    with GuestMemory(ram) as memory:
        with pytest.raises(BufferError):
            ram.close()
        memory.write(0, b"x")
    ram.close()
    memory.close()
    with pytest.raises(GuestAddressError):
        memory.read(0, 1)


@pytest.mark.row("E9")
def test_a_second_init_lets_go_of_the_first_memory() -> None:
    """Memory made anew is no longer written through pages of the old one."""
    old = bytearray(0x4000)
    memory = GuestMemory(old)
    clock = GuestClock(memory, backend=SimulatedBackend(10**9))
    clock.write_msr(0, 0x4B564D01, 0x2001)
    before = bytes(old)
    memory.__init__(bytearray(0x1000))
    clock.refresh()
    assert bytes(old) == before
    assert clock.page(0) is None
    assert GuestMemory.__new__(GuestMemory).slots == []


@pytest.mark.row("E9")
def test_addresses_and_numbers_are_whole() -> None:
    """A float is no address, no length and no frequency, however near a whole number it is."""
    memory: Any = GuestMemory(bytearray(SIZE))
    scale: Any = ClockScale
    for call, arguments in (
        (memory.write, (1.0, b"x")),
        (memory.read, (1.0, 1)),
        (memory.add_slot, (2.0**20, bytearray(1))),
        (scale.from_hz, (2.0,)),
        (scale, (1.5, 0)),
        (scale(1 << 31, 0).to_ns, (2.9,)),
    ):
        with pytest.raises(WrongType):
            call(*arguments)


@pytest.mark.row("E9")
@pytest.mark.parametrize("name", ["text", "number", "strided", "closed"])
def test_only_contiguous_bytes_can_be_written(name: str) -> None:
    """write() of anything else is an error of ours, and nothing is written or told."""
    memory = GuestMemory(bytearray(SIZE))
    heard: list[int] = []
    memory.on_dirty = lambda gpa, _length: heard.append(gpa)
    with pytest.raises((WrongType, ConfigError), match=r"bytes-like|data is"):
        memory.write(0, NO_MEMORY[name])
    assert memory.read(0, SIZE) == bytes(SIZE)
    assert not heard


@pytest.mark.row("E9")
def test_memory_may_be_copied_within_itself() -> None:
    """write() of a part of the memory over another that overlaps it copies what was there before."""
    ram = bytearray(range(16))
    memory = GuestMemory(ram)
    memory.write(4, memoryview(ram)[:12])
    assert bytes(ram) == bytes([0, 1, 2, 3, *range(12)])


@pytest.mark.row("E9")
@pytest.mark.parametrize("vcpu", [-1, 1, 2**31, 2**63, -(2**63) - 1, 10**5000], ids=lambda number: f"{number:#x}"[:20])
def test_a_vcpu_that_is_not_there_is_a_range_error(vcpu: int) -> None:
    """Every function that takes a vCPU refuses a number of any size that is none of this VM's."""
    pages = TimePages(GuestMemory(bytearray(SIZE)), 1, SimulatedCounter())
    line, scale = ClockLine(HostTsc(0), GuestNs(0), 0, 1, 1), ClockScale.from_hz(10**9)
    calls: tuple[Callable[[], object], ...] = (
        lambda: pages.read(vcpu),
        lambda: pages.reading(vcpu),
        lambda: pages.register(vcpu, 0),
        lambda: pages.registered(vcpu),
        lambda: pages.set_tsc_offset(vcpu, 0),
        lambda: pages.publish(line, scale, out_of_guest=[vcpu]),
    )
    for call in calls:
        with pytest.raises(RangeError, match="vCPU"):
            call()


@pytest.mark.row("E9")
@pytest.mark.parametrize("number", [-1, 2**64, 10**5000], ids=lambda number: f"{number:#x}"[:20])
def test_numbers_that_do_not_fit_are_range_errors(number: int) -> None:
    """A number that its C type cannot hold is refused by what it was meant to be, before anything is written."""
    memory = GuestMemory(bytearray(SIZE))
    pages = TimePages(memory, 1, SimulatedCounter())
    line, scale = ClockLine(HostTsc(0), GuestNs(0), 0, 1, 1), ClockScale.from_hz(10**9)
    pages.register(0, 0x2000)
    calls: tuple[Callable[[], object], ...] = (
        lambda: memory.add_slot(number, bytearray(8)),
        lambda: memory.read(0, number),
        lambda: pages.register(0, number),
        lambda: pages.set_tsc_offset(0, number),
        lambda: pages.publish(line._replace(tsc=HostTsc(number)), scale),
        lambda: pages.publish(line._replace(ns=GuestNs(number)), scale),
        lambda: pages.publish(line._replace(rem=number), scale),
        lambda: pages.publish(line, scale, flags=number),
        lambda: pages.move(number, 0),
        lambda: republish_in_turn(pages, line, [(1, 1, scale)], number),
        lambda: records.publish_wall_clock(memory, number, 0),
        lambda: records.add_steal_time(memory, 0x2000, number),
        lambda: records.set_preempted(memory, number),
        lambda: records.store_word(memory, 0x2000, number),
        lambda: records.write_clock_pairing(memory, 0x2000, 0, number),
        lambda: ClockScale(number, 0),
        lambda: guest_tsc(0, frac_bits=number),
    )
    for call in calls:
        with pytest.raises(RangeError):
            call()
    assert memory.read(0, SIZE) == bytes(SIZE)
    with pytest.raises(RangeError, match="8 of them"):
        pages.publish(line, scale, flags=256)


@pytest.mark.row("E9")
def test_what_would_crash_c_is_refused() -> None:
    """An out_of_guest that closes the memory, a rate over 0 and a counter of one's own never reach C."""
    ram = bytearray(SIZE)
    memory = GuestMemory(ram)
    pages = TimePages(memory, 1, SimulatedCounter())
    scale, line = ClockScale.from_hz(10**9), ClockLine(HostTsc(0), GuestNs(0), 0, 1, 1)
    pages.register(0, 0x2000)

    def closing() -> Iterator[int]:
        memory.close()
        yield 0

    pages.publish(line, scale, out_of_guest=closing())
    assert memory.slots == []
    assert not any(ram)
    for num, den in ((1, 0), (0, 1)):
        with pytest.raises(RangeError, match="rate"):
            republish_in_turn(pages, line, [(num, den, scale)], 1)
    with pytest.raises(TypeError, match="HostCounter"):
        type("Mine", (Counter,), {})()


@pytest.mark.row("E9")
def test_a_page_comes_and_goes_with_its_slot() -> None:
    """A page registered before its memory is there is published once it is, and left out when it is gone."""
    memory = GuestMemory()
    backend = SimulatedBackend(10**9)
    clock = GuestClock(memory, backend=backend)
    clock.write_msr(0, 0x4B564D01, 0x2000 | 1)
    ram = bytearray(0x1000)
    memory.add_slot(0x2000, ram)
    assert not any(ram)
    clock.refresh()
    page = clock.page(0)
    assert page is not None
    assert page.version == 2
    memory.remove_slot(0x2000)
    before = bytes(ram)
    clock.refresh()
    assert bytes(ram) == before
    with pytest.raises(GuestAddressError):
        memory.remove_slot(0x2000)


@pytest.mark.row("E9")
@pytest.mark.stress
def test_slots_may_change_while_pages_are_published() -> None:
    """Slots added and removed under a publishing thread neither crash nor write to memory that was taken away."""
    memory = GuestMemory()
    fixed, fleeting = bytearray(0x1000), bytearray(0x1000)
    memory.add_slot(0x1000, fixed)
    clock = GuestClock(memory, 2, backend=SimulatedBackend(10**9))
    clock.write_msr(0, 0x4B564D01, 0x1000 | 1)
    clock.write_msr(1, 0x4B564D01, 0x5000 | 1)
    done = threading.Event()

    def publish() -> None:
        while not done.is_set():
            clock.refresh()

    publisher = threading.Thread(target=publish)
    publisher.start()
    published = 0
    for at in range(2000):
        nobodys = bytes(fleeting)
        time.sleep(0)
        assert fleeting == nobodys
        fleeting[:] = bytes(0x1000)
        memory.add_slot(0x5000, fleeting)
        while published * 20 < at and not any(fleeting):
            assert publisher.is_alive()
            time.sleep(0)
        memory.remove_slot(0x5000)
        published += any(fleeting)
    done.set()
    publisher.join()
    assert published >= 99
    before = version(clock)
    clock.refresh()
    assert (before % 2, version(clock) - before) == (0, 2)


def version(clock: GuestClock) -> int:
    """The version of vCPU 0's page."""
    page = clock.page(0)
    assert page is not None
    return page.version
