"""The same MSR accesses on a real vCPU, served once by the kernel and once by the engine: nothing may differ.

Compared are faults, read-backs, and of the page version, mul, shift and flags; times are not the same at two times.
"""

from __future__ import annotations

import random
import time
from functools import cache

import pytest

from pvclock import GuestNs, GuestTsc, KvmFeature
from tests.golden import TIME_VERSIONS
from tests.kvm.msr_script import Access, Outcome, run_script

pytestmark = pytest.mark.kvm

WALL_CLOCK, SYSTEM_TIME, WALL_CLOCK_NEW, SYSTEM_TIME_NEW = 0x11, 0x12, 0x4B564D00, 0x4B564D01
PAGE = 0x6000
RECORD = 0x6800
PUBLISHED_AGAIN_S = 0.1
"""KVM publishes a page once more so long after a registration; whether a script sees that depends on its pace."""
TRIES = 5
JUNK_TAIL = b"\xff" * 4 + b"\1"
JUNK = [0, 1, 2, 17, 0x7FFFFFFE, 0xFFFFFFFE, 0xFFFFFFFF]


def timeless(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes without the two fields that are times."""
    return [
        each._replace(page=each.page._replace(tsc_timestamp=GuestTsc(0), system_time=GuestNs(0))) for each in outcomes
    ]


def assert_no_difference(accesses: list[Access]) -> list[Outcome]:
    """Run the accesses both ways and compare them one by one; returns the engine's outcomes.

    Where the machine is so slow that KVM publishes again meanwhile, its versions may be ahead by that, and a page that
    was put there for one access may be overwritten before it is seen: then once more.
    """
    engine = timeless(run_script(accesses, "engine"))
    for last_try in (*[False] * (TRIES - 1), True):
        begin = time.monotonic()
        kernel = timeless(run_script(accesses, "kernel"))
        again = int((time.monotonic() - begin) / PUBLISHED_AGAIN_S)
        if last_try or not again:
            break
        if all(agree(*pair, again) for pair in zip(engine, kernel, strict=True)):
            break
    for number, (access, ours, theirs) in enumerate(zip(accesses, engine, kernel, strict=True)):
        assert agree(ours, theirs, again), f"access {number}: {access}: {ours}, {theirs}"
    return engine


def agree(ours: Outcome, theirs: Outcome, published_again: int) -> bool:
    """Are the two the same, but for a version that is ahead by so many publishes at most?"""
    ahead = (theirs.page.version - ours.page.version) % 2**32
    if ahead > 2 * published_again or ahead % 2:
        return False
    return theirs._replace(page=theirs.page._replace(version=ours.page.version)) == ours


@cache
def kernel_revives_dead_pages() -> bool:
    """Does this host's KVM use a disabled page again when another one cannot be had?  Linux 6.1 does."""
    return revived(run_script(PAGE_CROSSING_AFTER_DISABLE, "kernel"))


PAGE_CROSSING_AFTER_DISABLE = [
    Access(SYSTEM_TIME_NEW, PAGE | 1),
    Access(SYSTEM_TIME_NEW, PAGE),
    Access(SYSTEM_TIME_NEW, PAGE + 0xFE2 | 1, before=b"\xff\xff\xff\xff"),
]


def revived(outcomes: list[Outcome]) -> bool:
    """Was the old page written at the last access?"""
    return outcomes[-1].page.version != 2**32 - 1


@pytest.mark.row("K-08", "K-15", "K-16")
def test_versions_mul_shift_and_flags(stable_bit: int) -> None:
    """Whatever version a page holds, both go on from it alike, and write the same mul, shift and flags."""
    accesses = [
        Access(SYSTEM_TIME_NEW, PAGE | 1, before=step.old.to_bytes(4, "little") + bytes(25) + bytes([flags, 7, 7]))
        for step in TIME_VERSIONS
        for flags in (0, 0x02, 0xFF)
    ]
    outcomes = assert_no_difference(accesses)
    assert [each.page.version for each in outcomes[::3]] == [step.after for step in TIME_VERSIONS]
    assert [each.page.flags for each in outcomes[:3]] == [stable_bit, stable_bit | 2, stable_bit | 2]


@pytest.mark.row("K-10")
def test_addresses() -> None:
    """Unaligned, page-crossing, unmapped and wrapping addresses, disabled and enabled again: the same, no fault."""
    values = [
        PAGE | 1,
        PAGE + 2 | 1,
        PAGE + 4 | 1,
        PAGE + 0xFE0 | 1,
        PAGE + 0xFE2 | 1,
        PAGE,
        0,
        1,
        1 << 20 | 1,
        (1 << 20) - 16 | 1,
        2**64 - 1,
        (2**64 - 8) | 1,
        PAGE | 1,
    ]
    pages = (PAGE, PAGE + 2, PAGE + 4, PAGE + 0xFE0)
    accesses = [Access(SYSTEM_TIME_NEW, value, page) for value in values for page in pages]
    outcomes = assert_no_difference([each for access in accesses for each in (access, Access(access.msr))])
    assert not any(outcome.faulted for outcome in outcomes)


@pytest.mark.row("K-10")
def test_a_dead_page_stays_dead() -> None:
    """A page that was disabled is not written when a page-crossing address is enabled after it, whatever the kernel."""
    outcomes = run_script(PAGE_CROSSING_AFTER_DISABLE, "engine")
    assert not revived(outcomes)
    if not kernel_revives_dead_pages():
        assert_no_difference(PAGE_CROSSING_AFTER_DISABLE)


@pytest.mark.row("K-19", "K-16")
def test_old_numbers(stable_bit: int) -> None:
    """Old and new MSRs share their values, and the boot vCPU on the old one loses STABLE, on both."""
    accesses = [
        Access(index, value)
        for index in (SYSTEM_TIME_NEW, SYSTEM_TIME, SYSTEM_TIME_NEW)
        for value in (PAGE | 1, None, PAGE, None)
    ]
    outcomes = assert_no_difference([*accesses, Access(WALL_CLOCK, RECORD), Access(WALL_CLOCK_NEW)])
    assert [outcome.page.flags for outcome in outcomes[:12:4]] == [stable_bit, 0, stable_bit]
    assert outcomes[-1].value == RECORD


@pytest.mark.row("K-03", "K-08")
def test_wall_clock_versions_and_addresses() -> None:
    """The wall-clock record's version rule, at odd addresses and across pages, is the same."""
    gpas = (RECORD, RECORD + 1, RECORD + 2, 0x6FFA)
    accesses = [Access(WALL_CLOCK_NEW, gpa, gpa, before=old.to_bytes(4, "little")) for gpa in gpas for old in JUNK]
    engine, kernel = run_script(accesses, "engine"), run_script(accesses, "kernel")
    assert [each.page.version for each in engine] == [each.page.version for each in kernel]
    assert [each.page.version for each in engine] == [((old + 1) & ~1) + 2 & 0xFFFFFFFF for _ in gpas for old in JUNK]


@pytest.mark.row("K-01", "K-09", "G-09")
def test_msrs_that_are_not_there() -> None:
    """Every MSR of KVM's block that CPUID does not offer faults, read and written, on both."""
    indices = [*range(0x4B564D02, 0x4B564D0B), 0x4B564D20, 0x4B564DFF]
    accesses = [Access(index, value) for index in indices for value in (None, 0, 1, PAGE | 1, 2**63)]
    outcomes = assert_no_difference(accesses)
    assert sum(outcome.faulted for outcome in outcomes) > 40


@pytest.mark.row("G-09")
@pytest.mark.parametrize("provider", ["None", "Minimal"])
def test_without_an_interface_every_msr_of_it_is_gp(provider: str) -> None:
    """A guest that has no MSRs of a clock gets #GP for each access, and no clock of the kernel's writes into a page."""
    indices = [WALL_CLOCK, SYSTEM_TIME, WALL_CLOCK_NEW, SYSTEM_TIME_NEW, 0x4B564D02, 0x4B564D03, 0x4B564DFF]
    accesses = [Access(index, value) for index in indices for value in (PAGE | 1, None)]
    outcomes = run_script(accesses, "engine", provider=provider)
    assert [(outcome.faulted, outcome.value) for outcome in outcomes[1::2]] == [(True, 0)] * len(indices)
    assert all(outcome.faulted for outcome in outcomes)
    assert set(outcomes[-1].page) == {0}


STEAL_TIME = 0x4B564D03
WITH_STEAL_TIME = (
    KvmFeature.CLOCKSOURCE | KvmFeature.CLOCKSOURCE2 | KvmFeature.STEAL_TIME | KvmFeature.CLOCKSOURCE_STABLE
)


@pytest.mark.row("K-26", "K-09")
def test_steal_time_values() -> None:
    """Which values of the steal-time MSR fault, and what is read back after each, is the same."""
    bad = [PAGE | 1 | 1 << bit for bit in range(1, 6)]
    values = [PAGE | 1, *bad, 0, *bad, PAGE, PAGE + 0x40 | 1, 2**63 | 1, 1 << 24 | 1, 2**64 - 0x3F, 2**64 - 1, 1, 0]
    accesses = [access for value in values for access in (Access(STEAL_TIME, value), Access(STEAL_TIME))]
    engine, kernel = (run_script(accesses, clock, features=int(WITH_STEAL_TIME)) for clock in ("engine", "kernel"))
    assert [outcome[:2] for outcome in engine] == [outcome[:2] for outcome in kernel]
    assert sum(outcome.faulted for outcome in engine) == 2 * len(bad) + 1


@pytest.mark.row("K-26", "K-27", "K-29")
def test_steal_time_records() -> None:
    """From any version the record's becomes even; of the rest `preempted` is cleared and flags are left, as in Linux.

    The engine's alone: where KVM emulates real mode, it writes the record only when it leaves the emulator.
    """
    accesses = [
        Access(
            STEAL_TIME,
            PAGE + 64 * place | 1,
            PAGE + 64 * place,
            before=bytes(8) + old.to_bytes(4, "little") + JUNK_TAIL,
        )
        for place, old in enumerate(JUNK)
    ]
    for old, outcome in zip(JUNK, run_script(accesses, "engine", features=int(WITH_STEAL_TIME)), strict=True):
        # A record laid over a time page: version at 8, flags at 12, preempted at 16.
        version, flags = outcome.page.tsc_timestamp & 0xFFFFFFFF, outcome.page.tsc_timestamp >> 32
        assert (version, flags) == (((old + 1) & ~1) + 2 & 0xFFFFFFFF, 0xFFFFFFFF)
        assert outcome.page.system_time & 0xFF == 0


@pytest.mark.row("K-01", "K-10", "G-09", "E9")
@pytest.mark.parametrize("seed", range(4))
def test_random_accesses(seed: int) -> None:
    """A hundred random accesses, valid and not, leave the same trace."""
    source = random.Random(seed)  # noqa: S311  # a sample, no secret
    system_time = [PAGE | 1, PAGE, PAGE + 64 | 1, PAGE + 0x102 | 1, 1 << 24 | 1, 0]
    if not kernel_revives_dead_pages():
        system_time += [PAGE + 0xFE2 | 1, 2**64 - 1]
    accesses = []
    for _ in range(100):
        index = source.choice([SYSTEM_TIME, SYSTEM_TIME_NEW, SYSTEM_TIME_NEW, 0x4B564D02, 0x4B564D07])
        value = source.choice([None, *system_time])
        page = source.choice([PAGE, PAGE + 64, PAGE + 0x102])
        junk = source.choice(JUNK).to_bytes(4, "little") if source.random() < 0.3 else b""
        accesses.append(Access(index, value, page, junk))
    assert_no_difference(accesses)
