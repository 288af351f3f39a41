"""The same accesses to Hyper-V's MSRs on a real vCPU, served once by the kernel and once by the engine.

Compared are faults and what is read, and of the reference TSC page what the TLFS says of it; the times are not the same
at two times.  Where the two differ, KNOWN says how and why.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

import pytest

from pvclock.host.linux import host_clocksource
from tests import oracle
from tests.kvm.guests import HLT, bare_vm
from tests.kvm.hyperv_script import COUNTER, CRASH_CTL, Script, on_engine, on_kernel, skip_without_kernel_hyperv
from tests.kvm.msr_script import INTERRUPT_VECTOR, INTERRUPTS, Access, Await, Trace
from tests.oracle import ReferenceTscPage
from tests.waiting import wait_until

pytestmark = pytest.mark.kvm

IA32_TSC, APIC_BASE, X2APIC_SVR = 0x10, 0x1B, 0x80F

GUEST_OS_ID, HYPERCALL, VP_INDEX, RESET = range(0x40000000, 0x40000004)
REFERENCE_TSC, TSC_FREQUENCY, APIC_FREQUENCY = range(0x40000021, 0x40000024)
SCONTROL, SVERSION, SIEFP, SIMP, EOM = range(0x40000080, 0x40000085)
SINT0, STIMER0_CONFIG, STIMER0_COUNT = 0x40000090, 0x400000B0, 0x400000B1
CRASH_P0 = 0x40000100
REENLIGHTENMENT, EMULATION, EMULATION_STATUS = range(0x40000106, 0x40000109)
TSC_INVARIANT = 0x40000118
NOT_OFFERED: Final = (0x40000010, 0x40000070, 0x40000071, 0x40000072, 0x40000073, TSC_INVARIANT)
NOT_THERE: Final = (
    *(0x40000004, 0x40000011, 0x40000024, 0x40000074, 0x40000085, 0x400000A0, 0x400000B8, 0x400000C1, 0x400000D1),
    *(0x400000E0, 0x400000F0, 0x400000F1, 0x400000F5, 0x400000FF, 0x40000109, 0x40000119),
)

PAGE, OTHER = 0x6000, 0x5000
OUTSIDE = 0x200000
NEVER = 10**15
"""Some years, in units of 100 ns."""
TIMES: Final = (COUNTER, IA32_TSC)
"""What is read there is a time."""


@pytest.fixture(scope="module")
def kernel_hyperv() -> None:
    """Skip where the kernel does not serve Hyper-V's interface."""
    skip_without_kernel_hyperv()


@pytest.fixture(scope="module")
def tsc_hz() -> int:
    """The frequency of guests' TSCs here."""
    with bare_vm(HLT) as bare:
        return bare.vcpus[0].get_tsc_khz() * 1000


WITH_KERNEL = pytest.mark.usefixtures("kernel_hyperv")
WITH_PAGE = pytest.mark.usefixtures("tsc_is_trusted")
Run: TypeAlias = Callable[[Script], list[Trace]]


@pytest.fixture(params=["kernel", "engine"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a script with the one's interface, and then with the other's."""
    if request.param == "engine":
        return on_engine
    request.getfixturevalue("kernel_hyperv")
    return on_kernel


# The reference TSC page


class PageStep(NamedTuple):
    """A write of the reference TSC MSR, and the page that is valid then."""

    value: int
    valid: int | None


PAGE_STEPS: Final = (
    PageStep(PAGE | 1, PAGE),
    PageStep(PAGE | 1, PAGE),
    PageStep(PAGE, None),
    PageStep(PAGE | 1, PAGE),
    PageStep(OTHER | 1, OTHER),
    PageStep(OUTSIDE | 1, None),
    PageStep(OTHER | 0xFFF, OTHER),
    PageStep(0, None),
    PageStep(2**64 - 1, None),
    PageStep(1 << 52 | 1, None),
    PageStep(PAGE | 1, PAGE),
)


def page_accesses() -> Iterator[Access]:
    """Each step: the write, what is read back, and the counter around the TSC, with the page looked at."""
    for value, valid in PAGE_STEPS:
        page = PAGE if valid is None else valid
        yield Access(REFERENCE_TSC, value, page)
        yield Access(REFERENCE_TSC, None, page)
        yield from (Access(COUNTER, None, page), Access(IA32_TSC, None, page), Access(COUNTER, None, page))


def assert_page_rules(traces: Sequence[Trace], scales: range) -> None:
    """Hold what became of page_accesses() against the rules; scales: what the page's may be."""
    assert not any(trace.faulted for trace in traces)
    sequences: dict[int, int] = {}
    last = 0
    for place, (value, valid) in enumerate(PAGE_STEPS):
        write, read, before, tsc, after = traces[5 * place : 5 * place + 5]
        assert read.value == value
        assert last <= before.value <= after.value, "time goes forward whatever becomes of the page"
        last = after.value
        if valid is None:
            continue
        page = ReferenceTscPage.parse(write.data[:24])
        assert page.is_valid
        assert page.reserved == 0
        assert page.scale in scales
        assert page.sequence != sequences.get(valid), "an old reader has to notice"
        sequences[valid] = page.sequence
        assert ReferenceTscPage.parse(tsc.data[:24]) == page, "nothing has happened to it meanwhile"
        assert before.value <= page.read(tsc.value) <= after.value, "page and counter are one clock"


@WITH_KERNEL
@WITH_PAGE
@pytest.mark.row("H-36", "H-50", "H-51", "H-53", "H-54")
def test_page_rules_of_the_kernel(tsc_hz: int) -> None:
    """KVM's page: enabled, enabled again, disabled, elsewhere and nowhere; its scale comes from kvmclock's 32 bits."""
    scale = oracle.kvm_hyperv_scale(*oracle.time_scale(10**9, tsc_hz))
    assert_page_rules(on_kernel(list(page_accesses())), range(scale, scale + 1))


@WITH_PAGE
@pytest.mark.row("H-36", "H-50", "H-51", "H-53", "H-54")
def test_page_rules_of_the_engine(tsc_hz: int) -> None:
    """The engine's page keeps the same rules in the same places; its scale has 64 bits, but for 2^-31 at a break."""
    scale = oracle.hyperv_scale(10**9, tsc_hz)
    assert_page_rules(on_engine(list(page_accesses())), range(scale - (scale >> 31), scale + (scale >> 31) + 1))


@pytest.mark.row("H-36", "H-54")
def test_no_page_without_trusted_tscs(run: Run) -> None:
    """Where TSCs may not agree, the page that was asked for says that guests are to read the counter, which goes on."""
    if host_clocksource() == "tsc":
        pytest.skip("this host's kernel trusts its TSC; `make test-lab` runs it on one that does not, too")
    before, write, read, after = run(
        [Access(COUNTER), Access(REFERENCE_TSC, PAGE | 1), Access(REFERENCE_TSC), Access(COUNTER)]
    )
    assert not write.faulted
    assert read.value == PAGE | 1
    assert [ReferenceTscPage.parse(trace.data[:24]).sequence for trace in (write, read, after)] == [0, 0, 0]
    assert before.value < after.value


# Random accesses


def random_accesses(seed: int, count: int) -> list[Access]:
    """Reads, and writes of values that the two take alike."""
    source = random.Random(seed)  # noqa: S311  # a sample, no secret
    some = [0, 1, 2, PAGE, 2**32, 2**63, source.getrandbits(64)]
    configs = [0, 2, 4, 8, 0xE, 0x20000, 0x20001, 0x2000B, 0xF0003, 0x1401, 0x1403, 0x1FF0]
    values: dict[int, list[int]] = {
        GUEST_OS_ID: [0, 1, 1 << 63 | 0x8100, source.getrandbits(64)],
        HYPERCALL: [0, OTHER, OTHER | 1, OTHER | 1, OTHER | 3, OUTSIDE | 1, 2**64 - 1],
        VP_INDEX: some,
        RESET: [0, 2, 2**32],
        COUNTER: some,
        REFERENCE_TSC: [*some, *[step.value for step in PAGE_STEPS]],
        TSC_FREQUENCY: some,
        APIC_FREQUENCY: some,
        SCONTROL: [0, 1],
        SVERSION: some,
        SIEFP: [0, OTHER | 1, OTHER, OUTSIDE | 1],
        SIMP: [0, OTHER | 1, OTHER, OUTSIDE | 1],
        EOM: some,
        **{SINT0 + n: [0, 0xF, 0x10, 0xFF, 0x10000, 0x1000F, 0x20040, 0x40040, 0x30000] for n in range(16)},
        **{STIMER0_CONFIG + 2 * n: configs for n in range(4)},
        **{STIMER0_COUNT + 2 * n: [0, NEVER, NEVER + 1] for n in range(4)},
        **{CRASH_P0 + n: some for n in range(5)},
        CRASH_CTL: [0, 1, 2**62],
        REENLIGHTENMENT: [0, 1 << 16 | 0x40, 0xFF],
        EMULATION: [0, 1],
        EMULATION_STATUS: [0, 1, 2**63],
        **dict.fromkeys((*NOT_OFFERED, *NOT_THERE), some),
    }
    indices = [*values, *[REFERENCE_TSC] * 8, *[HYPERCALL, GUEST_OS_ID] * 3]
    chosen = (source.choice(indices) for _ in range(count - 1))
    return [Access(SCONTROL, 0), *(Access(index, source.choice([None, *values[index]])) for index in chosen)]


def comparable(access: Access, trace: Trace) -> tuple[bool, int | None]:
    """What must be the same of two traces of an access."""
    is_time = access.value is None and access.msr in TIMES
    return trace.faulted, None if is_time else trace.value


@WITH_KERNEL
@pytest.mark.row("H-30", "H-31", "H-33", "H-36", "H-37", "H-40", "H-41", "H-42", "H-47", "E9")
@pytest.mark.parametrize("seed", range(2))
def test_random_accesses(seed: int) -> None:
    """Three hundred accesses, valid and not, fault alike and read alike on both."""
    accesses = random_accesses(seed, 320)
    kernel, engine = on_kernel(accesses), on_engine(accesses)
    for number, (access, theirs, ours) in enumerate(zip(accesses, kernel, engine, strict=True)):
        assert comparable(access, ours) == comparable(access, theirs), f"access {number}: {access}"
    assert 60 < sum(trace.faulted for trace in kernel) < 260


@WITH_KERNEL
@pytest.mark.row("H-37", "H-20", "H-21")
def test_frequencies(tsc_hz: int) -> None:
    """The frequencies that the guest is told are the same, and the TSC's is the one that it has."""
    accesses = [Access(TSC_FREQUENCY), Access(APIC_FREQUENCY)]
    kernel, engine = on_kernel(accesses), on_engine(accesses)
    assert [trace.value for trace in engine] == [trace.value for trace in kernel] == [tsc_hz, 10**9]


# Timers

SINT, SLOT = 2, PAGE + 2 * 256
CLEAR = bytes(4)
BY_MESSAGE, PERIODIC, DIRECT = SINT << 16 | 1, SINT << 16 | 3, 1 << 12 | INTERRUPT_VECTOR << 4 | 1
ENABLED = 1
PERIOD, PERIODS = 100_000, 5
AHEAD = 1_000_000
LATE_LIMIT = 30_000_000
"""3 s: the lab's timers are 4 ms late.  Its CPU, or this host's, may be somebody else's meanwhile: then once more."""

SET_UP: Final = (
    *(Access(APIC_BASE, 0xFEE00D00), Access(X2APIC_SVR, 0x1FF)),
    *(Access(SCONTROL, 1), Access(SIMP, PAGE | 1), Access(SINT0 + SINT, INTERRUPT_VECTOR)),
)
ONE_SHOT: Final = (Access(COUNTER), Access(STIMER0_CONFIG, BY_MESSAGE), Await(SLOT, SLOT + 8))
AFTER_MESSAGE: Final = (Access(COUNTER), Access(STIMER0_CONFIG), Await(INTERRUPTS))
NEXT: Final = (Access(EOM, 0, SLOT, CLEAR), Access(EOM, 0, INTERRUPTS, CLEAR))


class Message(NamedTuple):
    """What a timer's message says."""

    timer: int
    expiration: int
    delivery: int


def message(trace: Trace) -> Message:
    """The message that a step of ONE_SHOT waited for."""
    assert trace.value == 0x80000010, "HvMessageTimerExpired"
    return Message._make(
        int.from_bytes(trace.data[at : at + size], "little") for at, size in ((8, 4), (16, 8), (24, 8))
    )


def lateness_when_asked(count: int, traces: Sequence[Trace]) -> int:
    """Hold ONE_SHOT and AFTER_MESSAGE of a timer with that count against the rules; how late it was."""
    armed, _, told, seen, config, _ = traces
    timer, expiration, delivery = message(told)
    assert (timer, expiration) == (0, count)
    assert count <= delivery <= seen.value
    assert config.value == BY_MESSAGE & ~ENABLED, "it has ended"
    return delivery - max(count, armed.value)


@pytest.mark.row("H-40", "H-41", "H-42")
def test_one_shot_timers(run: Run) -> None:
    """A timer tells of its expiry at the time it was set to, at once if that is past, and interrupts; then it ends."""

    def are_in_time() -> bool:
        counts: list[int] = []

        def script(now: int) -> list[Access | Await]:
            counts.extend((now + AHEAD, 1))
            each = ((Access(STIMER0_COUNT, count), *ONE_SHOT, *AFTER_MESSAGE, *NEXT) for count in counts)
            return [*SET_UP, *(step for steps in each for step in steps)]

        traces = run(script)
        assert not any(trace.faulted for trace in traces)
        both = zip(counts, (len(SET_UP) + 1, len(SET_UP) + 10), strict=True)
        return max([lateness_when_asked(count, traces[at : at + 6]) for count, at in both]) < LATE_LIMIT

    wait_until(are_in_time)


@pytest.mark.row("H-40", "H-41", "H-42")
def test_periodic_timer(run: Run) -> None:
    """A periodic timer expires on the grid of its period from when it was set: some are skipped, none is early."""
    one = (Await(SLOT, SLOT + 8), Access(COUNTER), Access(EOM, 0, SLOT, CLEAR))
    begin = (Access(STIMER0_COUNT, PERIOD), Access(COUNTER), Access(STIMER0_CONFIG, PERIODIC), Access(COUNTER))
    end = (Access(STIMER0_CONFIG), Access(STIMER0_CONFIG, 0), Await(INTERRUPTS))

    def is_in_time() -> bool:
        traces = run([*SET_UP, *begin, *one * PERIODS, *end])[len(SET_UP) :]
        _, before, _, after, *rest = traces
        messages = [(message(told), seen.value) for told, seen in zip(rest[0:-3:3], rest[1:-3:3], strict=True)]
        (first, _), *_ = messages
        assert before.value + PERIOD <= first.expiration <= after.value + PERIOD
        gaps = [late.expiration - early.expiration for (early, _), (late, _) in itertools.pairwise(messages)]
        assert all(gap >= PERIOD and gap % PERIOD == 0 for gap in gaps)
        assert all(each.expiration <= each.delivery <= seen for each, seen in messages)
        assert rest[-3].value == PERIODIC, "it goes on"
        return all(each.delivery - each.expiration < LATE_LIMIT for each, _ in messages)

    wait_until(is_in_time)


@pytest.mark.row("H-42")
def test_direct_timer(run: Run) -> None:
    """In direct mode the vCPU is interrupted at the time that was asked for, without a message, and the timer ends."""

    def is_in_time() -> bool:
        counts: list[int] = []

        def script(now: int) -> list[Access | Await]:
            counts.append(now + AHEAD)
            return [
                *(*SET_UP, Access(STIMER0_COUNT, now + AHEAD), Access(COUNTER), Access(STIMER0_CONFIG, DIRECT)),
                *(Await(INTERRUPTS, SLOT), Access(COUNTER), Access(STIMER0_CONFIG)),
            ]

        armed, _, told, seen, config = run(script)[len(SET_UP) + 1 :]
        assert told.value in (1, 2)  # an emulated KVM may give an interrupt twice
        assert told.data[:4] == CLEAR
        assert config.value == DIRECT & ~ENABLED
        assert counts[0] <= seen.value
        return seen.value < max(counts[0], armed.value) + LATE_LIMIT

    wait_until(is_in_time)


# Known differences


class Difference(NamedTuple):
    """Accesses, what the last of them gives on either side, and why."""

    accesses: tuple[Access, ...]
    kernel: Seen
    engine: Seen
    why: str


class Seen(NamedTuple):
    """Of an access: does it fault, what is read or was written, and the 32-bit word at its page then."""

    faulted: bool
    value: int
    word: int = 0


SINT_0 = 1
RESERVED = 1 << 20

KNOWN: Final = {
    "SCONTROL at the start": Difference(
        (Access(SCONTROL),),
        Seen(False, 1),
        Seen(False, 0),
        "Linux enables the SynIC with the capability, and QEMU sets it to 0 then, which is the TLFS's initial value",
    ),
    "a timer's reserved bits": Difference(
        (Access(STIMER0_CONFIG, RESERVED),),
        Seen(False, RESERVED),
        Seen(True, RESERVED),
        "Linux stores them; the TLFS reserves them, and VirtualBox refuses them (H-42)",
    ),
    "a timer without a target": Difference(
        (Access(STIMER0_CONFIG, 0), Access(STIMER0_CONFIG, SINT_0), Access(STIMER0_CONFIG)),
        Seen(False, SINT_0),
        Seen(False, 0),
        "SINT 0 takes no messages, so the TLFS disables the timer; Linux does so only if it was enabled before",
    ),
    "the code in the hypercall page": Difference(
        (Access(GUEST_OS_ID, 1), Access(HYPERCALL, OTHER | 1, OTHER)),
        Seen(False, OTHER | 1, 0xC3D9010F),
        Seen(False, OTHER | 1, 0x00C3E4E6),
        "VMMCALL; RET on this AMD CPU.  VMMCALL does not reach user space on KVM, OUT does (docs/interfaces.md)",
    ),
    "the sequence after one that is in the page": Difference(
        (Access(REFERENCE_TSC, 0), Access(REFERENCE_TSC, PAGE | 1, PAGE, b"\xfd\xff\xff\xff")),
        Seen(False, PAGE | 1, 0xFFFFFFFE),
        Seen(False, PAGE | 1, 1),
        "Linux goes on from what it finds in guest memory; the engine trusts nothing there, and counts by itself",
    ),
}


@WITH_KERNEL
@WITH_PAGE
@pytest.mark.row("H-31", "H-42", "H-54")
def test_known_differences() -> None:
    """Each difference that is known is still there, on either side as it is described."""
    accesses = [access for difference in KNOWN.values() for access in difference.accesses]
    last = list(itertools.accumulate(len(difference.accesses) for difference in KNOWN.values()))
    for run, side in ((on_kernel, "kernel"), (on_engine, "engine")):
        traces = run(accesses)
        for name, end in zip(KNOWN, last, strict=True):
            faulted, value, data = traces[end - 1]
            word = int.from_bytes(data[:4], "little") if getattr(KNOWN[name], side).word else 0
            assert Seen(faulted, value, word) == getattr(KNOWN[name], side), f"{side}: {name}: {KNOWN[name].why}"
