"""A clock on a simulated host: what pages show against the exact timeline, and that it never steps."""

from __future__ import annotations

import pydoc
import random
import re
from fractions import Fraction
from functools import partial
from pydoc import plain

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pvclock import (
    ConfigError,
    GuestClock,
    GuestMemory,
    HostBackend,
    MsrFault,
    RangeError,
    Reference,
    SimulatedBackend,
    StateError,
    WrongType,
)
from pvclock.meter.stress import republish
from tests import golden, oracle
from tests.unit.clocks import MAX_AGE_NS, NS_PER_S, PAGES, SYSTEM_TIME, a_clock, bound_ns, page_of, shown


@pytest.mark.row("K-12", "E13")
def test_a_guest_without_a_page_has_no_time() -> None:
    """read() before a page is registered is a StateError that says what is missing; after it, it is ns."""
    backend = SimulatedBackend(tsc_hz=2_596_132_000, tsc=0, ref_ns=0)
    memory = GuestMemory(bytearray(1 << 20))
    clock = GuestClock(memory, vcpus=2, provider="KVM", backend=backend)
    with pytest.raises(StateError, match="vCPU 0 has no page") as caught:
        clock.read(0)
    assert caught.value.operation == "read"
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    backend.advance(ns=NS_PER_S)
    assert abs(clock.read(0) - NS_PER_S) <= 1
    assert clock.read(0) == shown(memory, 0, backend.tsc)
    with pytest.raises(StateError, match="vCPU 1"):
        clock.read(1)
    with pytest.raises(RangeError, match="vCPU 2"):
        clock.read(2)


@pytest.mark.row("E13")
def test_help_shows_read_as_a_method_though_each_clock_has_the_compiled_one() -> None:
    """help() has its signature and docstring; a clock's own is the pages' method, and both answer alike."""
    assert "read(self, vcpu: 'int') -> 'GuestNs'\n" in plain(pydoc.render_doc(GuestClock))
    assert str(GuestClock.read.__doc__).splitlines()[0] in plain(pydoc.render_doc(GuestClock.read))
    clock, backend, _ = a_clock(10**9)
    backend.advance(ns=NS_PER_S)
    assert vars(clock)["read"] == clock._keeper.pages.read
    assert GuestClock.read(clock, 0) == clock.read(0)
    for read in (clock.read, partial(GuestClock.read, clock)):
        with pytest.raises(RangeError, match="vCPU 9"):
            read(9)


@pytest.mark.row("K-13", "K-14")
@given(tsc_hz=st.integers(1_000_000, 10**10), tsc=st.integers(0, 2**64 - 1), ns=st.integers(0, 10**15))
def test_a_page_is_one_instant_and_never_now(tsc_hz: int, tsc: int, ns: int) -> None:
    """The timestamp lies before the present on the page's own line, and the system time is not negative."""
    backend, memory = SimulatedBackend(tsc_hz, tsc), GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, backend=backend)
    backend.advance(ns=ns)
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    page = page_of(clock)
    lead_ticks = (backend.tsc - page.tsc_timestamp) % 2**64
    assert page.system_time <= ns
    assert lead_ticks >= min(2**14, ns * tsc_hz // NS_PER_S // 2 - 2 ** max(-page.tsc_shift, 0))
    assert shown(memory, 0, backend.tsc) == clock.read(0)
    ran_ns = Fraction((backend.tsc - tsc) % 2**64 * NS_PER_S, tsc_hz)
    assert abs(shown(memory, 0, backend.tsc) - ran_ns) <= bound_ns(page, Fraction(NS_PER_S, tsc_hz), 0)


@pytest.mark.row("E11", "E9")
@given(
    tsc_hz=st.integers(1_000_000, 10**10),
    tsc=st.integers(0, 2**64 - 1),
    steps=st.lists(
        st.tuples(
            st.integers(0, MAX_AGE_NS),
            st.none() | st.tuples(st.integers(1, 1000), st.integers(1, 1000)),
        ),
        max_size=30,
    ),
)
@example(2_596_132_000, 0, [(1758, None)] * 300)  # 4565 ticks: 1.4 ns are lost in each, if they are
@example(1_000_001_000, 0, [(10_000, None)] * 300)  # every short lead has a fraction of 0.98 ns
@example(2_000_000_001, 0, [(NS_PER_S, None)] * 300)  # Linux's pair would be 0.5 ppb fast
def test_pages_follow_the_timeline_and_never_step(
    tsc_hz: int, tsc: int, steps: list[tuple[int, tuple[int, int] | None]]
) -> None:
    """At every refresh and change of rate the page goes on by 0 or +1 ns, within the bound of the exact timeline."""
    clock, backend, memory = a_clock(tsc_hz, tsc)
    line = oracle.ExactLine(backend.tsc, Fraction(0), Fraction(NS_PER_S, tsc_hz))
    rate = line.rate
    for advance_ns, dilation in steps:
        tsc_before = backend.tsc
        backend.advance(ns=min(advance_ns, int(MAX_AGE_NS * NS_PER_S / (rate * tsc_hz))))
        before = shown(memory, 0, backend.tsc)
        now = line.ns0 + (backend.tsc - tsc_before) % 2**64 * rate
        line = oracle.ExactLine(backend.tsc, now, rate)
        assert abs(before - now) <= bound_ns(page_of(clock), rate, (backend.tsc - tsc_before) % 2**64)
        if dilation is None:
            clock.refresh()
        else:
            clock.dilate(*dilation)
            rate = Fraction(*dilation) * NS_PER_S / tsc_hz
        after = shown(memory, 0, backend.tsc)
        assert after - before in (0, 1)
        assert abs(after - now) <= bound_ns(page_of(clock), rate, 0)
        assert clock.at(backend.tsc) == now


@pytest.mark.row("E11", "E9")
@pytest.mark.parametrize(
    ("tsc_hz", "ticks"),
    [(2_596_132_000, 4565), (1_000_001_000, 10_000), (2_100_000_000, 5_001), (3_000_000_000, 2_999), (10**9, 1)],
)
def test_a_hundred_thousand_anchors_lose_nothing(tsc_hz: int, ticks: int) -> None:
    """At spacings that lose most to rounding, 10^5 refreshes leave the page within 2 ns and the cut of the timeline."""
    clock, backend, memory = a_clock(tsc_hz)
    rate = Fraction(NS_PER_S, tsc_hz)
    backend.advance(ns=10 * NS_PER_S)
    for _ in range(100_000):
        backend.tsc += ticks
        clock.refresh()
    exact = backend.tsc * rate
    assert clock.at(backend.tsc) == exact
    assert abs(shown(memory, 0, backend.tsc) - exact) <= bound_ns(page_of(clock), rate, 0)


@pytest.mark.row("E11")
def test_what_is_missing_after_a_long_sleep_comes_back_without_a_step() -> None:
    """A page left for an hour is behind by mul's quantum; each refresh gives back 1 ns, never more."""
    clock, backend, memory = a_clock(3_000_000_000)
    backend.advance(ns=3600 * NS_PER_S)
    assert clock.now() == 3600 * NS_PER_S
    behind = 3600 * NS_PER_S - shown(memory, 0, backend.tsc)
    assert 800 < behind < 900  # 0.2328 ppb of an hour
    for left in range(behind - 1, -1, -1):
        clock.refresh()
        assert 3600 * NS_PER_S - shown(memory, 0, backend.tsc) == left


@pytest.mark.row("K-12", "K-15", "K-16")
@given(tsc_hz=st.integers(1_000_000, 10**10), ns=st.integers(0, 10**12))
def test_all_vcpus_read_one_clock(tsc_hz: int, ns: int) -> None:
    """Pages of all vCPUs, published together, show the same line, whichever vCPU registers or refreshes."""
    clock, backend, memory = a_clock(tsc_hz, vcpus=2)
    backend.advance(ns=ns)
    clock.refresh()
    first, second = page_of(clock, 0), page_of(clock, 1)
    assert first._replace(version=0) == second._replace(version=0)
    assert first.flags == 1  # STABLE
    assert shown(memory, 0, backend.tsc) == shown(memory, 1, backend.tsc) == clock.read(1)


@pytest.mark.row("E13")
@given(dilation=st.tuples(st.integers(1, 10**4), st.integers(1, 10**4)), ns=st.integers(0, 10**10))
def test_dilated_time_is_exact(dilation: tuple[int, int], ns: int) -> None:
    """Under dilation n/d guest time is exactly n/d of host time, whatever was before."""
    clock, backend, memory = a_clock(10**9)
    backend.advance(ns=12_345)
    clock.dilate(*dilation)
    backend.advance(ns=ns)
    exact = 12_345 + ns * Fraction(*dilation)
    assert clock.at(backend.tsc) == exact
    assert abs(shown(memory, 0, backend.tsc) - exact) <= bound_ns(page_of(clock), Fraction(*dilation), ns)


@pytest.mark.row("E9")
def test_republish_is_many_publishes() -> None:
    """republish() does what single publishes do, in C: versions, rate, no step, and the timeline goes on from it."""
    clock, backend, memory = a_clock(2_596_132_000)
    backend.advance(ns=20 * NS_PER_S)
    before_ns = shown(memory, 0, backend.tsc)
    report = republish(clock, 10, [Fraction(10), Fraction(1, 10)])
    assert report.publishes == 10
    assert (report.least_step_ns >= 0, report.most_step_ns <= 1) == (True, True)
    assert (report.most_behind_ns <= 1, report.most_ahead_ns <= 1) == (True, True)
    assert page_of(clock).version == 2 + 2 * (1 + 10)  # one to settle what changed, then ten
    assert 0 <= shown(memory, 0, backend.tsc) - before_ns <= 11
    assert abs(shown(memory, 0, backend.tsc) - 20 * NS_PER_S) <= 1
    assert clock.at(backend.tsc) == 20 * NS_PER_S
    backend.advance(ns=NS_PER_S)
    assert clock.at(backend.tsc) == 20 * NS_PER_S + NS_PER_S // 10
    assert abs(shown(memory, 0, backend.tsc) - 20 * NS_PER_S - NS_PER_S // 10) <= 2
    for publishes, dilations in ((0, [Fraction(1)]), (1, [])):
        with pytest.raises(ConfigError, match="republish_in_turn"):
            republish(clock, publishes, dilations)


@pytest.mark.row("E11", "E9")
@pytest.mark.parametrize("denominator", [10**6, 10**9, 2 * 10**9, 5 * 10**9, 10**10])
def test_time_that_almost_stands_still(denominator: int) -> None:
    """A rate so slow that a step has 2^31 ticks and more neither steps back nor underflows."""
    clock, backend, memory = a_clock(2_596_132_000)
    backend.advance(ns=60 * NS_PER_S)
    clock.refresh()
    before = clock.read(0)
    clock.dilate(1, denominator)
    for _ in range(5):
        assert 0 <= clock.read(0) - before <= NS_PER_S // denominator + 1
        before = clock.read(0)
        backend.advance(ns=NS_PER_S)
        clock.refresh()
        assert shown(memory, 0, backend.tsc) == clock.read(0)


@pytest.mark.row("E11", "E9")
@pytest.mark.parametrize(("tsc_hz", "spacing_ns"), [(3_995_890_000, 1_999_999_003), (2_596_132_000, 1_999_999_999)])
def test_a_clock_left_alone_once_catches_up(tsc_hz: int, spacing_ns: int) -> None:
    """After a gap of 10 s, refreshes just under MAX_AGE_S bring the page back within the bound, and keep it there."""
    clock, backend, memory = a_clock(tsc_hz)
    rate = Fraction(NS_PER_S, tsc_hz)
    backend.advance(ns=10 * NS_PER_S)
    for number in range(400):
        clock.refresh()
        if number > 40:
            assert abs(shown(memory, 0, backend.tsc) - backend.tsc * rate) <= bound_ns(page_of(clock), rate, 0)
        backend.advance(ns=spacing_ns)


@pytest.mark.row("E12", "E11")
def test_ever_other_rates_do_not_make_the_timeline_heavy() -> None:
    """After a thousand rates without a common term the timeline's terms are bounded, and it lost nothing to see."""
    clock, backend, _ = a_clock(10**9)
    source = random.Random(5)  # noqa: S311  # a sample, no secret
    exact = Fraction(0)
    for _ in range(1000):
        dilation = Fraction(source.getrandbits(20) + 1, source.getrandbits(20) + 1)
        clock.dilate(*dilation.as_integer_ratio())
        backend.advance(ns=1000)
        exact += 1000 * dilation
    at = clock.at(backend.tsc)
    assert at.denominator.bit_length() < 1200
    assert 0 <= exact - at < Fraction(1, 2**900)


@pytest.mark.row("E13")
def test_simulated_time_moves_exactly() -> None:
    """advance() moves TSC, reference and UTC by the same time, with no tick lost to rounding; each can be set alone."""
    backend = SimulatedBackend(2_596_132_000)
    for _ in range(1000):
        backend.advance(ns=1_000_001)
    assert (backend.tsc, backend.ref_ns) == (1_000_001_000 * 2_596_132_000 // NS_PER_S, 1_000_001_000)
    backend.tsc = backend.tsc + 5
    assert backend.sample(Reference.REALTIME)[:2] == (backend.tsc, 1_000_001_000)
    with pytest.raises(RangeError, match="goes forward"):
        backend.advance(ns=-1)
    for tsc_hz in (0, -5):
        with pytest.raises(RangeError):
            SimulatedBackend(tsc_hz)
        with pytest.raises(RangeError):
            HostBackend(tsc_hz)
    with pytest.raises(WrongType, match=r"ns is 1.5, a float"):
        backend.advance(ns=1.5)  # type: ignore[arg-type]
    backend.advance(ns=1)


@pytest.mark.row("K-27", "K-28")
def test_a_tick_tells_of_stolen_time() -> None:
    """What the backend says of vCPUs' threads comes into their guests' records at the next tick, once."""
    backend = SimulatedBackend(10**9)
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, vcpus=2, backend=backend)
    clock.write_msr(1, 0x4B564D03, 0x6000 | 1)
    backend.run_delays_ns = {0: 5, 1: 700}
    clock.tick()
    clock.tick()
    assert int.from_bytes(memory.read(0x6000, 8), "little") == 700
    backend.run_delays_ns[1] = 1000
    clock.tick()
    assert int.from_bytes(memory.read(0x6000, 8), "little") == 1000
    assert memory.read(0x6008, 4) == (6).to_bytes(4, "little")  # its registration was a first update


@pytest.mark.row("V-23", "V-27", "K-17")
@pytest.mark.parametrize(("profile", "versions", "flags"), [("linux", (2, 4, 6), 3), ("virtualbox", (2, 2, 2), 1)])
def test_pages_by_profile(profile: str, versions: tuple[int, int, int], flags: int) -> None:
    """Linux brings pages up to date and tells of pauses; VirtualBox writes them at registration, and never tells."""
    backend = SimulatedBackend(10**9)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend, profile=profile)
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    seen = [page_of(clock).version]
    for operation in (clock.refresh, clock.tick):
        backend.advance(ns=NS_PER_S)
        operation()
        seen.append(page_of(clock).version)
    assert tuple(seen) == versions
    clock.pause()
    clock.resume()
    assert page_of(clock).flags == flags


@pytest.mark.row("J-01")
@pytest.mark.parametrize("profile", ["linux", "document", "virtualbox"])
def test_tsc_adjust_that_is_not_offered(profile: str) -> None:
    """Without its CPUID bit IA32_TSC_ADJUST is ignored, as Linux does; by profile "document" it faults."""
    clock = GuestClock(
        GuestMemory(bytearray(1 << 16)), backend=SimulatedBackend(10**9), offer_tsc_adjust=False, profile=profile
    )
    if profile == "document":
        with pytest.raises(MsrFault):
            clock.write_msr(0, 0x3B, 5)
        with pytest.raises(MsrFault):
            clock.read_msr(0, 0x3B)
    else:
        clock.write_msr(0, 0x3B, 5)
        assert clock.read_msr(0, 0x3B) == 0
    assert clock.tsc(0).offset == 0


@pytest.mark.row("V-19", "V-22")
@pytest.mark.parametrize("profile", ["linux", "virtualbox"])
@pytest.mark.parametrize("scale", golden.KHZ_SCALES, ids=lambda scale: f"{scale.tsc_khz}kHz")
def test_pages_are_told(scale: golden.KhzScale, profile: str) -> None:
    """Where a page is placed is an event with the kHz that a guest makes of it, or that it failed; 20 times at most."""
    backend = SimulatedBackend(scale.tsc_khz * 1000)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend, profile=profile)
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    clock.write_msr(0, SYSTEM_TIME, 1 << 40 | 1)
    placed, failed = clock.events.read(since=1).events
    assert (str(placed.kind), str(failed.kind)) == ("page", "refused")
    assert re.findall(r"(\d+) kHz", placed.why) == [str(scale.guest_khz)]
    assert f"{1 << 40:#x}" in failed.why
    for _ in range(100):
        clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    assert clock.events.last == (1 + 20 if profile == "linux" else 1 + 1 + 20)  # VirtualBox counts failures apart


@pytest.mark.row("V-07", "V-08", "V-13")
@pytest.mark.parametrize("profile", ["linux", "virtualbox"])
def test_what_was_written_is_read_back(profile: str) -> None:
    """System time is each vCPU's own, wall clock the VM's; both read back raw, by old and new numbers."""
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), vcpus=2, backend=SimulatedBackend(10**9), profile=profile)
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    clock.write_msr(1, 0x12, PAGES[1])
    clock.write_msr(1, 0x4B564D00, 0x3000)
    for number in (0x12, SYSTEM_TIME):
        assert (clock.read_msr(0, number), clock.read_msr(1, number)) == (PAGES[0] | 1, PAGES[1])
    for number in (0x11, 0x4B564D00):
        assert clock.read_msr(0, number) == clock.read_msr(1, number) == 0x3000
    high = 0xFFFFFFFFFFFF0000
    clock.memory.add_slot(high, bytearray(4096))
    clock.write_msr(0, 0x12, high | 0xF)  # as it was written: no bit is masked
    clock.write_msr(0, 0x11, high + 4)
    assert (clock.read_msr(0, SYSTEM_TIME), clock.read_msr(1, 0x4B564D00)) == (high | 0xF, high + 4)


@pytest.mark.row("V-10", "V-24", "K-13")
@pytest.mark.parametrize(("profile", "ns"), [("linux", 3 * NS_PER_S), ("virtualbox", 1_439_649_528_664)])
def test_the_instant_of_a_registration(profile: str, ns: int) -> None:
    """A page shows TSC and ns of its registration exactly, beyond 2^32 Hz, too, on the TSC that the guest reads.

    VirtualBox's ns count from TSC 0, at a frequency cut to 32 bits: see V-11's test.
    """
    hz = 5_000_000_000
    backend, memory = SimulatedBackend(hz, tsc=7), GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, backend=backend, tsc_offset=10**12, profile=profile)
    backend.advance(ns=3 * NS_PER_S)
    clock.write_msr(0, SYSTEM_TIME, PAGES[0] | 1)
    assert backend.tsc_offsets == {0: 10**12}
    tsc = 7 + 3 * hz + 10**12
    assert shown(memory, 0, tsc) == ns
    assert clock.reading(0)[:2] == (tsc, ns)
