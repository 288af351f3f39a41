"""Do vCPUs' TSCs agree, and what repairs them: properties against unbounded integers."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, GuestClock, GuestMemory, HostTsc, RangeError, SimulatedBackend, StateError, VcpuTsc
from pvclock.tsc.agreement import OffsetWrite, agreement, repair_plan

U64 = st.integers(0, 2**64 - 1)
TSC_ADJUST = 0x3B


@st.composite
def orderable(draw: st.DrawFn) -> tuple[list[VcpuTsc], list[int]]:
    """Two to six vCPUs less than 2^63 ticks apart, and how far each is ahead of a point, maybe one just below 2^64."""
    point = draw(st.one_of(U64, st.integers(2**64 - 1000, 2**64 - 1)))
    aheads = draw(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 2**63 - 1)), min_size=2, max_size=6))
    adjusts = draw(st.lists(U64, min_size=len(aheads), max_size=len(aheads)))
    return [VcpuTsc(point + ahead, adjust) for ahead, adjust in zip(aheads, adjusts, strict=True)], aheads


def repaired(tscs: list[VcpuTsc], plan: list[OffsetWrite]) -> list[VcpuTsc]:
    """The TSCs after the plan."""
    by_vcpu = {write.vcpu: write for write in plan}
    return [by_vcpu[vcpu].applied(tsc) if vcpu in by_vcpu else tsc for vcpu, tsc in enumerate(tscs)]


# Agreement


@pytest.mark.row("J-09", "E5")
@given(case=orderable())
def test_the_report(case: tuple[list[VcpuTsc], list[int]]) -> None:
    """Spread and each vCPU's distances are those of unbounded integers, wherever the offsets wrap."""
    tscs, aheads = case
    report = agreement(tscs)
    assert report.spread_ticks == max(aheads) - min(aheads)
    assert [each.vcpu for each in report.vcpus] == list(range(len(tscs)))
    assert [each.offset_ahead_ticks for each in report.vcpus] == [ahead - aheads[0] for ahead in aheads]
    for each, tsc in zip(report.vcpus, tscs, strict=True):
        assert -(2**63) <= each.adjust_ahead_ticks < 2**63
        assert (each.adjust_ahead_ticks + tscs[0].adjust) % 2**64 == tsc.adjust
    assert report.offsets_agree == report.stable_allowed == (len(set(aheads)) == 1)
    assert report.adjusts_agree == (len({tsc.adjust for tsc in tscs}) == 1)
    assert report.rates_agree


@pytest.mark.row("J-09")
@given(offset=U64, adjust=U64, moved=st.integers(1, 2**63 - 1))
def test_who_set_them_apart(offset: int, adjust: int, moved: int) -> None:
    """A guest's write moves ADJUST as far as the TSC, a host's does not: the report tells them apart."""
    by_guest, by_host = (VcpuTsc(offset, adjust) for _ in range(2))
    by_guest.guest_write_tsc(moved + 5 + offset, HostTsc(5))
    by_host.host_write_tsc(moved + 5 + offset, HostTsc(5))
    report = agreement([VcpuTsc(offset, adjust), by_guest, by_host])
    assert [each.offset_ahead_ticks for each in report.vcpus] == [0, moved, moved]
    assert [each.is_the_guests_doing for each in report.vcpus] == [False, True, False]
    assert not report.adjusts_agree


@pytest.mark.row("E5", "J-09")
def test_rates_that_differ() -> None:
    """Equal offsets at different rates are no agreement, and no offset repairs them; one rate in three spellings is."""
    mixed = [VcpuTsc(5), VcpuTsc(5, rate=Fraction(3, 2))]
    assert agreement(mixed).offsets_agree
    assert not agreement(mixed).stable_allowed
    with pytest.raises(StateError, match="different rates; give them one frequency first"):
        repair_plan(mixed)
    same = [VcpuTsc(5, ratio=3 << 47), VcpuTsc(5, ratio=3 << 31, frac_bits=32), VcpuTsc(5, rate=Fraction(3, 2))]
    assert agreement(same).stable_allowed


# Repair


@pytest.mark.row("E5", "J-09")
@given(case=orderable(), carry=st.booleans(), host_tsc=U64)
def test_a_plan_repairs(case: tuple[list[VcpuTsc], list[int]], carry: bool, host_tsc: int) -> None:
    """After it all TSCs read what the one furthest ahead did; none moved back; a second plan is empty."""
    tscs, aheads = case
    before = [tsc.copy() for tsc in tscs]
    plan = repair_plan(tscs, adjust="carry" if carry else "keep")
    after = repaired(tscs, plan)
    assert {write.vcpu: write.moves_tsc_by for write in plan} == {
        vcpu: max(aheads) - ahead for vcpu, ahead in enumerate(aheads) if ahead < max(aheads)
    }
    furthest = before[aheads.index(max(aheads))].read(HostTsc(host_tsc))
    assert {tsc.read(HostTsc(host_tsc)) for tsc in after} == {furthest}
    assert agreement(after).stable_allowed
    assert repair_plan(after, adjust="carry" if carry else "keep") == []
    for old, new in zip(before, after, strict=True):
        if carry:
            assert (new.read(HostTsc(host_tsc)) - new.adjust - old.read(HostTsc(host_tsc)) + old.adjust) % 2**64 == 0
        else:
            assert new.adjust == old.adjust


@pytest.mark.row("E5", "J-09")
@given(offset=U64, adjust=U64, moves=st.lists(st.integers(0, 2**61), min_size=2, max_size=5))
def test_what_the_guest_set_apart_is_carried_together(offset: int, adjust: int, moves: list[int]) -> None:
    """vCPUs whose ADJUST explains their TSC agree in both after a plan that carries ADJUST along."""
    tscs = [VcpuTsc(offset, adjust) for _ in moves]
    for tsc, move in zip(tscs, moves, strict=True):
        tsc.guest_write_adjust((adjust + move) % 2**64)
    report = agreement(repaired(tscs, repair_plan(tscs, adjust="carry")))
    assert report.stable_allowed
    assert report.adjusts_agree


@pytest.mark.row("E5")
@given(case=orderable(), beyond=st.integers(-3, 3))
def test_a_target_of_ones_own(case: tuple[list[VcpuTsc], list[int]], beyond: int) -> None:
    """All go to the offset that is asked for, if none has to go back; every_vcpu lists those that stand there, too."""
    tscs, aheads = case
    target = (tscs[0].offset - aheads[0] + max(aheads) + beyond) % 2**64
    if beyond < 0:
        with pytest.raises(RangeError, match="a TSC may not go back"):
            repair_plan(tscs, target=target)
        return
    if max(aheads) - min(aheads) + beyond < 2**63:
        plan = repair_plan(tscs, target=target, every_vcpu=True)
        assert [write.vcpu for write in plan] == list(range(len(tscs)))
        assert {tsc.offset for tsc in repaired(tscs, plan)} == {target}
        assert repaired(tscs, repair_plan(tscs, target=target))[0].offset == target


@pytest.mark.row("E5")
@given(offsets=st.lists(U64, min_size=1, max_size=6))
def test_any_offsets(offsets: list[int]) -> None:
    """Whatever a guest has written, the plan repairs it without a step back, or says that none is ahead."""
    tscs = [VcpuTsc(offset) for offset in offsets]
    try:
        plan = repair_plan(tscs)
    except RangeError:
        assert all(any((other - one) % 2**64 >= 2**63 for one in offsets) for other in offsets)
    else:
        assert all(0 < write.moves_tsc_by < 2**63 for write in plan)
        assert agreement(repaired(tscs, plan)).stable_allowed


@pytest.mark.row("E5")
def test_around_the_circle() -> None:
    """Two opposite each other, or three a third apart: each is behind as much as ahead, so no plan, but the numbers."""
    with pytest.raises(RangeError, match="spread over 0x8000000000000000 ticks"):
        repair_plan([VcpuTsc(5), VcpuTsc(5 + 2**63)])
    tscs = [VcpuTsc(third * 2**64 // 3) for third in range(3)]
    assert agreement(tscs).spread_ticks == 2 * 2**64 // 3
    with pytest.raises(RangeError, match=r"spread over 0xa{16} ticks; from 2\^63 on no vCPU is ahead"):
        repair_plan(tscs)


@pytest.mark.row("E5")
def test_a_plan_that_is_out_of_date() -> None:
    """A write for a vCPU whose TSC was written since is refused, and leaves it as it is."""
    tscs = [VcpuTsc(0), VcpuTsc(100)]
    (write,) = repair_plan(tscs)
    tscs[0].guest_write_adjust(7)
    with pytest.raises(StateError, match="offset is 0x7, not 0x0; it was written meanwhile: make another plan"):
        write.applied(tscs[0])
    assert tscs[0].offset == 7


@pytest.mark.row("E5")
def test_what_cannot_be() -> None:
    """No vCPU at all, and an unknown treatment of ADJUST, are errors."""
    with pytest.raises(RangeError, match="0 vCPUs"):
        agreement([])
    with pytest.raises(ConfigError, match="adjust 'drop' is unknown"):
        repair_plan([VcpuTsc()], adjust="drop")  # type: ignore[arg-type]


@pytest.mark.row("E5", "J-09", "K-16", "P-26")
def test_repair_of_a_clock() -> None:
    """A clock that a bad restore left without STABLE has it again after the plan; its guest's time did not step."""
    backend = SimulatedBackend(2_596_132_000, tsc=10**12)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 2, backend=backend)
    for vcpu in range(2):
        clock.write_msr(vcpu, 0x4B564D01, 0x2000 + 0x1000 * vcpu | 1)
    clock.host_write_msr(1, 0x10, 10**12 + 2600)
    before = [clock.read(vcpu) for vcpu in range(2)]
    assert [page.flags for vcpu in range(2) if (page := clock.page(vcpu))] == [0, 0]
    plan = repair_plan([clock.tsc(vcpu) for vcpu in range(2)], adjust="carry")
    assert plan == [OffsetWrite(0, 0, 2600, adjust_after=2600, moves_tsc_by=2600)]
    clock.write_msr(0, TSC_ADJUST, plan[0].adjust_after)
    assert [page.flags for vcpu in range(2) if (page := clock.page(vcpu))] == [1, 1]
    assert all(clock.read(vcpu) - before[vcpu] in (0, 1, 2) for vcpu in range(2))
    assert repair_plan([clock.tsc(vcpu) for vcpu in range(2)]) == []
