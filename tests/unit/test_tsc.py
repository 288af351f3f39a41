"""IA32_TSC and IA32_TSC_ADJUST: the algebra, modulo 2^64, against the oracle and through the clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import CpuidLeaf, GuestClock, GuestMemory, HostTsc, SimulatedBackend, TscOffsetNotHonoured, VcpuTsc
from tests.oracle import TimeInfo, VcpuTscOracle

U64 = st.integers(0, 2**64 - 1)
WRITES = st.one_of(
    st.tuples(st.sampled_from(["guest_write_tsc", "host_write_tsc"]), st.tuples(U64, U64)),
    st.tuples(st.sampled_from(["guest_write_adjust", "host_write_adjust"]), st.tuples(U64)),
)
TSC, TSC_ADJUST = 0x10, 0x3B


@pytest.mark.row("J-02", "J-03", "J-04", "J-05", "J-06", "J-07")
@given(writes=st.lists(WRITES, max_size=20), now=U64)
def test_any_sequence_of_writes(writes: list[tuple[str, tuple[int, ...]]], now: int) -> None:
    """After any writes by guest and host, offset, ADJUST and every reading are the oracle's."""
    tsc, model = VcpuTsc(), VcpuTscOracle()
    for name, arguments in writes:
        getattr(tsc, name)(*arguments)
        getattr(model, name)(*arguments)
    assert (tsc.offset, tsc.adjust) == (model.offset, model.adjust)
    assert tsc.read(HostTsc(now)) == model.read(now)


@pytest.mark.row("J-03")
@given(x=U64, old=U64, now=U64)
def test_writing_adjust_moves_the_tsc_at_once(x: int, old: int, now: int) -> None:
    """ADJUST := X moves the TSC by X - old, at the same instant."""
    tsc = VcpuTsc(adjust=old)
    before = tsc.read(HostTsc(now))
    tsc.guest_write_adjust(x)
    assert tsc.read(HostTsc(now)) == (before + x - old) % 2**64


@pytest.mark.row("J-04", "J-10")
@given(value=U64, adjust=U64, offset=U64, now=U64)
def test_guest_writes_keep_tsc_minus_adjust(value: int, adjust: int, offset: int, now: int) -> None:
    """A guest's write to either MSR leaves TSC - ADJUST and the offset beneath it as they were."""
    tsc = VcpuTsc(offset, adjust)
    base, difference = tsc.base_offset, (tsc.read(HostTsc(now)) - tsc.adjust) % 2**64
    tsc.guest_write_tsc(value, HostTsc(now))
    assert tsc.read(HostTsc(now)) == value
    tsc.guest_write_adjust(value)
    assert (tsc.read(HostTsc(now)) - tsc.adjust) % 2**64 == difference
    assert tsc.base_offset == base


@pytest.mark.row("J-06", "J-07")
@given(saved_offset=U64, saved_adjust=U64, then=U64, now=U64)
def test_restore_in_either_order(saved_offset: int, saved_adjust: int, then: int, now: int) -> None:
    """TSC and ADJUST come back the same whichever is restored first, and neither disturbs the other."""
    saved = VcpuTsc(saved_offset, saved_adjust)
    value = saved.read(HostTsc(then))
    one, other = VcpuTsc(5, 7), VcpuTsc(11, 13)
    one.host_write_tsc(value, HostTsc(now))
    one.host_write_adjust(saved.adjust)
    other.host_write_adjust(saved.adjust)
    other.host_write_tsc(value, HostTsc(now))
    for each in (one, other):
        assert (each.read(HostTsc(now)), each.adjust) == (value, saved_adjust)


@pytest.mark.row("J-05", "J-10")
@given(base=U64, adjust=U64)
def test_the_offset_contains_adjust(base: int, adjust: int) -> None:
    """What the hardware adds is the base offset plus the guest's adjust; both can be asked for."""
    tsc = VcpuTsc(base)
    tsc.guest_write_adjust(adjust)
    assert tsc.offset == (base + adjust) % 2**64
    assert (tsc.base_offset, tsc.adjust) == (base, adjust)


@pytest.mark.row("J-02")
def test_reset_clears_tsc_adjust_and_aux() -> None:
    """After RESET the TSC counts from 0, and ADJUST and TSC_AUX are 0."""
    tsc = VcpuTsc(123, 456, aux=7)
    tsc.reset(HostTsc(1000))
    assert (tsc.read(HostTsc(1000)), tsc.read(HostTsc(1005)), tsc.adjust, tsc.aux) == (0, 5, 0, 0)


def a_clock(**options: object) -> tuple[GuestClock, SimulatedBackend]:
    """A clock of two vCPUs, with pages at 0x2000 and 0x3000, and its backend."""
    backend = SimulatedBackend(2_596_132_000, tsc=10**12)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 2, backend=backend, **options)  # type: ignore[arg-type]
    for vcpu in range(2):
        clock.write_msr(vcpu, 0x4B564D01, 0x2000 + 0x1000 * vcpu | 1)
    return clock, backend


@pytest.mark.row("P-17", "J-03", "J-04")
def test_the_clock_serves_both_msrs() -> None:
    """Guest writes of 0x10 and 0x3b move that vCPU's TSC, its offset on the host and the other MSR."""
    clock, backend = a_clock()
    clock.write_msr(0, TSC, 5_000)
    assert clock.read_msr(0, TSC) == 5_000
    assert clock.read_msr(0, TSC_ADJUST) == (5_000 - 10**12) % 2**64
    clock.write_msr(0, TSC_ADJUST, 10**11)
    assert clock.read_msr(0, TSC) == 10**12 + 10**11
    assert backend.tsc_offsets == {0: 10**11, 1: 0}
    assert clock.read_msr(1, TSC) == 10**12


@pytest.mark.row("J-03")
@pytest.mark.parametrize("values", [(10**11, 1), (2**64 - 10**11, 7), (1, 2**64 - 1)])
def test_adjust_moves_rdtsc_rdmsr_and_the_page_at_one_instant(values: tuple[int, ...]) -> None:
    """Right after each write RDTSC and RDMSR have moved by X - old, and the page in memory gives the same time."""
    clock, backend = a_clock()
    before = clock.now()
    for value in values:
        clock.write_msr(1, TSC_ADJUST, value)
        tsc = (10**12 + value) % 2**64
        assert (backend.tsc + backend.tsc_offsets[1]) % 2**64 == clock.read_msr(1, TSC) == tsc
        assert TimeInfo.parse(clock.memory.read(0x3000, 32)).read(tsc) - before in (0, 1, 2)
    assert clock.read_msr(0, TSC) == 10**12


@pytest.mark.row("P-01", "E11", "K-14")
@given(value=U64)
def test_a_guests_tsc_write_does_not_move_its_clock(value: int) -> None:
    """The page moves with the TSC: what the guest reads as time goes on without a step, on both vCPUs."""
    clock, backend = a_clock()
    backend.advance(ns=10**10)
    before = clock.read(0)
    clock.write_msr(0, TSC, value)
    assert (backend.tsc + backend.tsc_offsets[0]) % 2**64 == value
    assert clock.read(0) - before in (0, 1)
    assert abs(TimeInfo.parse(clock.memory.read(0x3000, 32)).read(backend.tsc) - 10**10) <= 2
    reading = clock.reading(0)
    assert reading.tsc == value
    read_by_guest = TimeInfo.parse(clock.memory.read(0x2000, 32)).read(value)
    assert read_by_guest - before in (0, 1)
    assert reading.ns == read_by_guest


@pytest.mark.row("K-16", "J-09")
def test_tscs_that_differ_are_not_stable() -> None:
    """STABLE goes from all pages when one vCPU's offset differs, and comes back when they agree again."""
    clock, _ = a_clock()
    flags = []
    for value in (1000, 0):
        clock.write_msr(1, TSC_ADJUST, value)
        flags.append([page.flags for vcpu in range(2) if (page := clock.page(vcpu))])
    assert flags == [[0, 0], [1, 1]]


@pytest.mark.row("J-01")
def test_adjust_that_cpuid_does_not_offer_is_ignored() -> None:
    """Without the CPUID bit a write of 0x3b does nothing and does not fault, as in Linux; the leaf shows the bit."""
    for offered in (True, False):
        clock, _ = a_clock(offer_tsc_adjust=offered)
        clock.write_msr(0, TSC_ADJUST, 77)
        assert clock.read_msr(0, TSC_ADJUST) == (77 if offered else 0)
        assert clock.patch_cpuid(7, 0, CpuidLeaf()).ebx == 2 * offered


@pytest.mark.row("J-03", "K-13")
def test_an_offset_that_the_host_ignores_never_reaches_a_page() -> None:
    """Where the host takes offsets and ignores them, ADJUST is stored as KVM does, the TSC and the page stay."""
    backend = SimulatedBackend(2_596_132_000, tsc=10**12, honours_tsc_offset=False)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend)
    clock.write_msr(0, 0x4B564D01, 0x2001)
    before = clock.page(0)
    clock.write_msr(0, TSC, 0)
    clock.write_msr(0, TSC_ADJUST, 99)
    assert clock.page(0) == before
    assert (clock.read_msr(0, TSC), clock.read_msr(0, TSC_ADJUST)) == (10**12, 99)
    assert isinstance(clock.refused_offset, TscOffsetNotHonoured)
