"""What every provider must do, whichever it is: one suite over all of them, with traffic of any kind.

A provider with MSRs or hypercalls that write into guest memory says in `RECORDS` and `HYPERCALL_RECORDS` where it may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvclock import GuestClock, GuestMemory, MsrFault, SimulatedBackend
from pvclock.providers.interface import HypercallRegisters, HypercallResult, Status
from pvclock.providers.registry import PROVIDERS
from pvclock.quantities import Gpa
from pvclock.state.clock_state import ProviderState
from tests import oracle
from tests.unit.stub_clock import GUARD, guards_gone

HZ: Final = 2_596_132_000
SIZE: Final = 1 << 15
VCPUS: Final = 2
U64: Final = 2**64 - 1
AMD: Final = "AuthenticAMD"

EVERY_PROVIDER = pytest.mark.parametrize("provider", PROVIDERS)

PAGE: Final = 4096

KVM_MSRS: Final = (0x11, 0x12, *range(0x4B564D00, 0x4B564D0A))
HYPERV_MSRS: Final = (
    *(*range(0x40000000, 0x40000004), 0x40000020, 0x40000021, 0x40000022, 0x40000023),
    *(*range(0x40000070, 0x40000074), *range(0x40000080, 0x40000085), *range(0x40000090, 0x400000A0)),
    *(*range(0x400000B0, 0x400000B8), *range(0x40000100, 0x40000109), 0x40000118),
)
CLOCK_MSRS: Final = KVM_MSRS + HYPERV_MSRS
TIME_REF_COUNT: Final = 0x40000020
GO_ON: Final = ("reference_units", "reference_sequence")
"""What a reset does not take back, for guests may not see it again: see ReferenceTime."""
FOREIGN_MSRS: Final = (0, 0x1B, 0x4B564CFF, 0x4B564D09, 0x4B564DFF, 0x4B564E00, 0x40000024, 0x400001FF, 2**32 - 1)

# Where a write of a value lets the host write: by MSR, the mask of its address and the record's length.
RECORDS: Final = {
    0x11: (U64, 12),
    0x12: (U64 - 1, 32),
    0x4B564D00: (U64, 12),
    0x4B564D01: (U64 - 1, 32),
    0x4B564D02: (U64 - 0x3F, 64),
    0x4B564D03: (U64 - 0x3F, 64),
    0x4B564D04: (U64 - 1, 4),
    **dict.fromkeys((0x40000001, 0x40000021, 0x40000073, 0x40000082, 0x40000083), (U64 - 0xFFF, PAGE)),
}
HYPERCALL_RECORDS: Final = {9: 64}  # CLOCK_PAIRING, at RBX


class MsrWrite(NamedTuple):
    """WRMSR, and RDMSR of the same."""

    vcpu: int
    msr: int
    value: int


class Call(NamedTuple):
    """A hypercall, as such or by #UD at an address."""

    vcpu: int
    registers: HypercallRegisters
    ud_at: int | None


class Vmm(NamedTuple):
    """What the VMM does in between."""

    operation: str


class WellBehaved:
    """A VMM that does what hypercalls ask for, in no way that shows."""

    def kick(self, apic_id: int) -> None:
        """Nobody is halted."""

    def yield_to(self, apic_id: int) -> None:
        """Nobody runs."""

    def send_ipi(self, apic_ids: list[int], icr: int) -> int:
        """Everybody takes it."""
        return len(apic_ids)


Step = MsrWrite | Call | Vmm

VALUES: Final = st.one_of(
    st.integers(0, SIZE // 16).map(lambda line: line * 16 | 1),
    st.integers(0, SIZE + 64),
    st.integers(SIZE - 70, SIZE + 2),
    st.integers(0, U64),
    st.sampled_from([0, 1, 2**63, U64, U64 - 1, U64 - 63]),
)
REGISTERS: Final = st.builds(
    HypercallRegisters,
    rax=st.integers(0, 13) | VALUES,
    rbx=VALUES,
    rcx=st.integers(0, 3) | VALUES,
    rdx=VALUES,
    rsi=VALUES,
    rdi=VALUES,
    cpl=st.integers(0, 3),
    long_mode=st.booleans(),
    r8=VALUES,
    protected_mode=st.booleans(),
)
CPUS: Final = st.integers(0, VCPUS - 1)
OPERATIONS: Final = ("refresh", "pause", "resume", "skip", "dilate", "reset", "save", "update_paravirt_tsc")
STEPS: Final = st.one_of(
    st.builds(MsrWrite, CPUS, st.sampled_from(CLOCK_MSRS) | st.integers(0, 2**32 - 1), VALUES),
    st.builds(Call, CPUS, REGISTERS, st.none() | st.integers(0, SIZE + 8)),
    st.builds(Vmm, st.sampled_from(OPERATIONS)),
)


def a_clock(provider: str, **options: object) -> GuestClock:
    """A clock over memory full of guard bytes."""
    backend = SimulatedBackend(HZ, 10**6, realtime_ns=10**18)
    memory = GuestMemory(bytearray([GUARD]) * SIZE)
    return GuestClock(memory, VCPUS, provider, backend=backend, vmm=WellBehaved(), **options)  # type: ignore[arg-type]


def a_used_clock(provider: str) -> GuestClock:
    """A clock whose guest has written whatever it can, and asked for pages on both vCPUs."""
    clock = a_clock(provider)
    for vcpu in range(VCPUS):
        for place, index in enumerate(CLOCK_MSRS):
            accept(clock.write_msr, vcpu, index, 0x1000 * vcpu + 64 * place | 1)
    return clock


def accept(access: Callable[..., object], *arguments: int) -> None:
    """Do it, fault or not."""
    with suppress(MsrFault):
        access(*arguments)


def everything_read(clock: GuestClock) -> list[int | None]:
    """What every MSR of the clock, but for time itself, reads on every vCPU; None where it faults."""
    values: list[int | None] = []
    for vcpu in range(VCPUS):
        for index in sorted({*CLOCK_MSRS} - {TIME_REF_COUNT}):
            try:
                values.append(clock.interface.read_msr(vcpu, index))
            except MsrFault:
                values.append(None)
    return values


@EVERY_PROVIDER
@pytest.mark.row("G-08")
def test_it_is_what_it_says(provider: str) -> None:
    """Name, number, version, options and leaves are there, and its options make another one like it."""
    clock = a_clock(provider)
    interface = clock.interface
    assert (interface.name, interface.provider.name) == (provider, provider)
    assert interface.version == 0
    assert interface.number == interface.provider.number
    again = a_clock(provider, **interface.config)
    assert (again.interface.config, again.cpuid_leaves) == (interface.config, clock.cpuid_leaves)
    assert all(0 <= register < 2**32 for leaf in clock.cpuid_leaves.values() for register in leaf)
    assert all(0x40000000 <= leaf < 0x50000000 for leaf in clock.cpuid_leaves)


@EVERY_PROVIDER
@pytest.mark.row("G-09")
@pytest.mark.parametrize("index", FOREIGN_MSRS)
def test_an_msr_that_is_not_its_own_faults(provider: str, index: int) -> None:
    """Read or written, it is #GP with its number, and nothing is changed."""
    clock = a_used_clock(provider)
    before = (everything_read(clock), clock.memory.read(0, SIZE))
    with pytest.raises(MsrFault) as caught:
        clock.read_msr(0, index)
    assert caught.value.index == index
    with pytest.raises(MsrFault) as caught:
        clock.write_msr(1, index, 1)
    assert (caught.value.index, caught.value.value) == (index, 1)
    assert (everything_read(clock), clock.memory.read(0, SIZE)) == before


@EVERY_PROVIDER
@pytest.mark.row("G-09", "G-07", "X-02")
def test_what_it_serves_is_what_comes_to_it_on_kvm(provider: str) -> None:
    """Beside /dev/kvm each MSR that the clock serves is in msr_ranges, and none that the kernel keeps is served."""
    clock = a_clock(provider, vcpu_host="kvm")
    routed = {index for each in clock.msr_ranges for index in range(each.base, each.base + each.length)}
    kept = {index for each in clock.msr_ranges for index in each.kept}
    for index in (*CLOCK_MSRS, *FOREIGN_MSRS):
        with suppress(MsrFault):
            clock.write_msr(0, index, 0)
            assert index in routed - kept


@pytest.mark.row("G-09", "M-03", "X-02")
@pytest.mark.parametrize("provider", ["None", "Minimal"])
def test_the_kernel_serves_no_interface_beside_the_clock(provider: str) -> None:
    """Without KVM's interface its MSRs come to the clock, too, and fault: a guest gets no clock of the kernel's."""
    clock = a_clock(provider, vcpu_host="kvm")
    routed = {index for each in clock.msr_ranges for index in range(each.base, each.base + each.length)}
    for index in (0x11, 0x12, 0x4B564D00, 0x4B564D01, 0x4B564D02, 0x4B564D03):
        assert index in routed
        with pytest.raises(MsrFault):
            clock.write_msr(0, index, 0)


def taken_back(clock: GuestClock) -> ProviderState:
    """What is saved of the provider and may be as of a new one."""
    provider = clock.save().provider
    return provider._replace(msrs={name: each for name, each in provider.msrs.items() if not name.endswith(GO_ON)})


@EVERY_PROVIDER
@pytest.mark.row("V-39", "G-07")
def test_reset_leaves_nothing(provider: str) -> None:
    """After a reset MSRs read and save as on a new clock, no page is published, and statistics go on."""
    clock, new = a_used_clock(provider), a_clock(provider)
    clock.hypercall(0, HypercallRegisters(rax=1))
    statistics = clock.interface.statistics
    clock.reset()
    assert everything_read(clock) == everything_read(new)
    assert taken_back(clock) == taken_back(new)
    assert clock.interface.statistics == statistics
    before = clock.memory.read(0, SIZE)
    for vcpu in range(VCPUS):
        clock.refresh(vcpu)
        assert clock.page(vcpu) is None
    assert clock.memory.read(0, SIZE) == before


@EVERY_PROVIDER
@pytest.mark.row("P-25", "G-18")
def test_save_restore_save(provider: str) -> None:
    """What is saved of a restored clock is what was saved, by either form; MSRs read the same."""
    clock = a_used_clock(provider)
    clock.pause()
    saved, unit = clock.save(), clock.interface.save_unit()
    restored = GuestClock.restore(saved, clock.memory, backend=SimulatedBackend(HZ), vmm=WellBehaved())
    assert restored.save().provider == saved.provider
    assert restored.save().vcpus == saved.vcpus
    assert everything_read(restored) == everything_read(clock)
    assert restored.interface.save_unit() == unit
    restored.interface.load_unit(unit)
    assert restored.interface.save_unit() == unit


@EVERY_PROVIDER
@pytest.mark.row("P-25", "E13")
def test_what_is_not_its_own_is_not_loaded(provider: str) -> None:
    """load() of something that save() did not give is refused, and nothing of it is taken."""
    clock = a_used_clock(provider)
    before = clock.interface.provider.save()
    for msrs in ({"colour": 1}, {**before, "colour": 1}):
        with pytest.raises(ValueError, match="colour"):
            clock.interface.provider.load(msrs)
    assert clock.interface.provider.save() == before


@EVERY_PROVIDER
@pytest.mark.row("E11")
@given(steps=st.lists(st.integers(0, 3 * 10**9), max_size=5), tsc=st.integers(1, 2**40))
def test_refresh_never_steps(provider: str, steps: list[int], tsc: int) -> None:
    """At any instant a refresh shows what was shown, or 1 ns more; what a guest wrote is not touched."""
    clock = a_used_clock(provider)
    backend = clock.backend
    assert isinstance(backend, SimulatedBackend)
    backend.advance(ns=tsc)
    written = everything_read(clock)

    def shown() -> list[int]:
        if "KVM" not in provider:
            return [clock.now()]
        gpas = [clock.read_msr(vcpu, 0x4B564D01) - 1 for vcpu in range(VCPUS)]
        return [oracle.TimeInfo.parse(clock.memory.read(gpa, 32)).read(backend.tsc) for gpa in gpas]

    for ns in (0, *steps):
        backend.advance(ns=ns)
        before = shown()
        clock.refresh()
        assert {after - each for each, after in zip(before, shown(), strict=True)} <= {0, 1}
    assert everything_read(clock) == written


def allowed_places(step: Step) -> Iterator[range]:
    """Where a step lets the host write from then on."""
    if isinstance(step, MsrWrite) and step.msr in RECORDS:
        mask, length = RECORDS[step.msr]
        yield range(step.value & mask, (step.value & mask) + length)
    if isinstance(step, Call):
        registers, width = step.registers, U64 if step.registers.long_mode else 2**32 - 1
        if registers.rax & width in HYPERCALL_RECORDS:
            yield range(registers.rbx & width, (registers.rbx & width) + HYPERCALL_RECORDS[9])
        output = registers.r8 if registers.long_mode else registers.rdi << 32 & U64 | registers.rsi & width
        yield range(output, output + PAGE)  # what a Hyper-V hypercall returns does not leave its page


def take(clock: GuestClock, step: Step) -> HypercallResult | None:
    """Do a step, as a VMM would; only MsrFault may come out of what a guest does."""
    match step:
        case MsrWrite(vcpu, msr, value):
            accept(clock.write_msr, vcpu, msr, value)
            accept(clock.read_msr, vcpu, msr)
        case Call(vcpu, registers, None):
            return clock.hypercall(vcpu, registers)
        case Call(vcpu, registers, int(at)):
            code = bytes([GUARD]) * 3 if at % 2 else b"\x0f\x01\xc1"  # memory has guard bytes: never patched
            done = clock.interface.handle_ud(vcpu, registers, code, Gpa(at), AMD)
            assert not done.patched
        case Vmm(operation):
            operate(clock, operation)
    return None


def operate(clock: GuestClock, operation: str) -> None:
    """One operation of the VMM's, as far as the clock's state has it."""
    if operation == "pause" and not clock.is_paused:
        clock.pause()
    elif operation == "resume" and clock.is_paused:
        clock.resume("advance")
    elif operation == "skip":
        clock.skip(1000)
    elif operation == "dilate":
        clock.dilate(3, 2)
    elif operation == "save":
        clock.interface.load_unit(clock.interface.save_unit())
    elif operation == "update_paravirt_tsc":
        clock.interface.update_paravirt_tsc()
    elif operation in ("refresh", "reset"):
        getattr(clock, operation)()


@EVERY_PROVIDER
@pytest.mark.row("G-09", "G-16", "E9", "K-01")
@settings(max_examples=200)
@given(steps=st.lists(STEPS, max_size=30), enforce=st.booleans())
def test_any_traffic(provider: str, steps: list[Step], enforce: bool) -> None:
    """Guest and VMM do anything, in any order: it faults, has a status or works; no stray write."""
    clock = a_clock(provider, **({"enforce_cpuid": enforce} if "KVM" in provider else {}))
    backend = clock.backend
    assert isinstance(backend, SimulatedBackend)
    allowed = bytearray(SIZE)
    statistics = clock.interface.statistics
    for step in steps:
        for places in allowed_places(step):
            end = min(places.stop, SIZE)
            allowed[places.start : end] = b"\1" * max(0, end - places.start)
        result = take(clock, step)
        if result is not None:
            assert result.status in Status
            assert result.rax is None or 0 <= result.rax <= U64
        backend.advance(ns=777)
        now = clock.interface.statistics
        assert all(new >= old for new, old in zip(now, statistics, strict=True))
        statistics = now
    assert not [at for at in guards_gone(clock.memory, SIZE) if not allowed[at]]
    assert statistics.hypercalls == sum(isinstance(step, Call) and step.ud_at is None for step in steps)


@pytest.mark.row("style")
def test_the_suite_would_find_a_stray_write() -> None:
    """A byte beside a registered page, as a bad provider might write it, is seen by the comparison."""
    clock = a_clock("KVM")
    step = MsrWrite(0, 0x4B564D01, 0x2001)
    take(clock, step)
    (places,) = allowed_places(step)
    assert set(guards_gone(clock.memory, SIZE)) <= set(places)
    clock.memory.write(0x2020, b"\0")
    assert not set(guards_gone(clock.memory, SIZE)) <= set(places)
