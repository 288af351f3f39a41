"""A clock whose surroundings misbehave: host TSC, memory, callbacks, threads, and its own guest."""

from __future__ import annotations

import random
import threading
from contextlib import AbstractContextManager

import pytest

from pvclock import GuestClock, GuestMemory, GuestNs, HostBackend, RangeError, SimulatedBackend, StateError
from tests.unit.clocks import NS_PER_S, PAGES, SYSTEM_TIME, a_clock, guest_ns, page_of, shown


@pytest.mark.row("E11", "E9")
def test_a_tsc_that_steps_back_takes_nothing_back() -> None:
    """After the host's TSC stepped back the clock goes on from where it was published; nothing underflows."""
    clock, backend, memory = a_clock(10**9, tsc=10**12)
    backend.advance(ns=NS_PER_S)
    clock.refresh()
    backend.tsc = 5
    clock.refresh()
    assert clock.now() == clock.read(0) == guest_ns(backend, memory) == NS_PER_S
    backend.advance(ns=NS_PER_S)
    assert clock.read(0) == guest_ns(backend, memory) == 2 * NS_PER_S


@pytest.mark.row("E13")
@pytest.mark.parametrize(("numerator", "denominator"), [(0, 1), (1, 0), (-1, 2), (2**64, 1), (1, 2**63)])
def test_rates_that_no_page_can_show_are_refused(numerator: int, denominator: int) -> None:
    """A dilation of 0, a negative one or one with too long terms is an error, and the clock goes on as it was."""
    clock, backend, memory = a_clock(2_596_132_000)
    before = memory.read(0, 1 << 16)
    with pytest.raises(RangeError):
        clock.dilate(numerator, denominator)
    assert memory.read(0, 1 << 16) == before
    backend.advance(ns=NS_PER_S)
    assert abs(guest_ns(backend, memory) - NS_PER_S) <= 1


@pytest.mark.row("E9")
def test_an_error_of_on_dirty_leaves_the_clock_whole() -> None:
    """What the VMM's own callback raises comes out, when all pages are written and told and the clock has changed."""
    clock, backend, memory = a_clock(10**9, vcpus=2)
    heard: list[int] = []

    def complain(gpa: int, _length: int) -> None:
        heard.append(gpa)
        raise RuntimeError(f"cannot mark {gpa:#x}")

    memory.on_dirty = complain
    with pytest.raises(RuntimeError, match="0x2000"):
        clock.dilate(10)
    assert heard == list(PAGES)
    memory.on_dirty = None
    backend.advance(ns=NS_PER_S)
    assert [abs(guest_ns(backend, memory, vcpu) - 10 * NS_PER_S) <= 1 for vcpu in range(2)] == [True, True]
    assert clock.now() == 10 * NS_PER_S


@pytest.mark.row("E9")
def test_a_dilation_that_cannot_be_published_changes_nothing() -> None:
    """When the vCPUs cannot be brought out of the guest, the rate stays what it was."""

    class Stuck(SimulatedBackend):
        def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
            raise RuntimeError("a vCPU does not come out")

    backend, memory = Stuck(10**9, tsc_stable=False), GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, backend=backend)
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    backend.tsc_stable = True
    with pytest.raises(RuntimeError, match="come out"):
        clock.dilate(10)
    backend.advance(ns=NS_PER_S)
    assert (clock.now(), guest_ns(backend, memory)) == (NS_PER_S, NS_PER_S)


@pytest.mark.row("K-16", "K-17")
def test_a_page_that_comes_later_is_written_whole() -> None:
    """A page whose memory appears after it was registered cannot be read before, and gets flags and pads as well."""
    memory, backend = GuestMemory(), SimulatedBackend(10**9)
    clock = GuestClock(memory, backend=backend)
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    assert clock.page(0) is None
    backend.advance(ns=NS_PER_S)
    memory.add_slot(0x2000, bytearray(b"\xff" * 0x1000))
    with pytest.raises(StateError, match="no page"):
        clock.read(0)
    clock.refresh()
    assert page_of(clock).flags == 3  # STABLE, and the GUEST_STOPPED that was there
    assert memory.read(0x2004, 4) == bytes(4)
    assert memory.read(0x201E, 2) == bytes(2)
    assert guest_ns(backend, memory) == NS_PER_S


@pytest.mark.stress
@pytest.mark.row("E9")
def test_reading_while_a_guest_moves_its_tsc_and_its_page() -> None:
    """read() in one thread sees no wild value while another serves TSC writes and re-registrations."""

    class Honouring(HostBackend):
        def set_tsc_offset(self, vcpu: int, offset: int) -> None:
            """Take any: the readers here are threads, which apply it themselves."""

    backend = Honouring(10**9)
    begin = backend.counter.read()
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend)
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    ended = threading.Event()

    served = 0

    def serve() -> None:
        nonlocal served
        source = random.Random(3)  # noqa: S311  # a sample, no secret
        while not ended.is_set():
            clock.write_msr(0, 0x10, source.getrandbits(64))
            clock.write_msr(0, SYSTEM_TIME, PAGES[source.randrange(2)] | 1)
            served += 1

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    last, reads, steps_back, wild = clock.read(0), 0, 0, 0
    while reads < 20_000 or served < 2_000:
        now = clock.read(0)
        steps_back += now < last
        wild += now > backend.counter.read() - begin + 2  # a ns a tick: what a page may be ahead of the timeline
        last = now
        reads += 1
        assert server.is_alive()
    ended.set()
    server.join()
    assert (steps_back, wild) == (0, 0)


@pytest.mark.row("E12", "E9")
def test_guest_time_wraps_and_the_clock_goes_on() -> None:
    """Past 2^64 ns, which a dilation reaches in no time, guests, refreshes and MSR writes go on modulo 2^64."""
    clock, backend, memory = a_clock(10**9)
    clock.dilate(10**8)
    for _ in range(2):
        backend.advance(ns=100 * NS_PER_S)
        clock.refresh()
    clock.dilate(1)
    wrapped_ns = 20 * 10**18 % 2**64
    assert abs(guest_ns(backend, memory) - wrapped_ns) <= 1
    clock.write_msr(0, SYSTEM_TIME, PAGES[1] | 1)
    for passed_ns in (0, NS_PER_S):
        backend.advance(ns=passed_ns)
        clock.refresh()
        assert clock.now() == wrapped_ns + passed_ns
        assert abs(shown(memory, 1, backend.tsc) - clock.now()) <= 1


@pytest.mark.row("K-08", "E9")
def test_a_page_that_is_always_odd_is_an_error_in_bounded_time() -> None:
    """A guest that spoils its own page's version makes read() fail, not hang; the next publish mends it."""
    clock, _, memory = a_clock(10**9)
    memory.write(PAGES[0], (77).to_bytes(4, "little"))
    with pytest.raises(StateError, match="always odd"):
        clock.read(0)
    clock.refresh()
    assert clock.read(0) == GuestNs(0)
    assert page_of(clock).version == 80


@pytest.mark.row("K-08", "E9")
def test_an_update_that_takes_long_is_waited_for() -> None:
    """A publisher that loses its CPU between the odd version and the even one does not make read() fail."""
    clock, _, memory = a_clock(10**9)

    def is_waited_for() -> bool:
        memory.write(PAGES[0], (77).to_bytes(4, "little"))
        publisher = threading.Timer(0.05, clock.refresh)
        publisher.start()
        try:
            return clock.read(0) == GuestNs(0)
        except StateError:
            return False
        finally:
            publisher.join()

    assert any(is_waited_for() for _ in range(10))  # on a busy machine the timer may be later than read() waits
