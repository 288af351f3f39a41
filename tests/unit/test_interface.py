"""What a guest interface does for guest and VMM: hypercalls and their #UDs, statistics, reset, the clock's services."""

from __future__ import annotations

import os
import signal
import threading
from struct import pack

import pytest

from pvclock import ConfigError, CpuidLeaf, GuestClock, GuestMemory, MsrFault, RangeError, SimulatedBackend
from pvclock.providers.guest_interface import PROFILES, Executed, GuestInterface
from pvclock.providers.hypercall_instructions import VMCALL, VMMCALL
from pvclock.providers.interface import HypercallRegisters, HypercallResult, Status, VcpuHost
from pvclock.providers.kvm.features import KvmFeature
from pvclock.quantities import Gpa
from pvclock.timekeeping.events import EventKind
from tests.unit.stub_clock import NotedVmm
from tests.unit.test_debug_channel import Wire
from tests.waiting import HANG_S

HZ = 2_596_132_000
SIZE = 1 << 16
SYSTEM_TIME, WALL_CLOCK = 0x4B564D01, 0x4B564D00
POLL_IRQ = HypercallRegisters(rax=1)
UNKNOWN = HypercallRegisters(rax=77)
ENOSYS, EPERM = 2**64 - 1000, 2**64 - 1
FAILED = (Status.OPERATION_FAILED, None)
AMD = "AuthenticAMD"


def a_clock(provider: str = "KVM", **options: object) -> GuestClock:
    """A clock of two vCPUs on a simulated host."""
    memory = GuestMemory(bytearray(SIZE))
    return GuestClock(memory, 2, provider, backend=SimulatedBackend(HZ, 10**6), **options)  # type: ignore[arg-type]


@pytest.mark.row("G-11", "G-15", "G-08", "V-35", "V-29", "V-32")
@pytest.mark.parametrize(
    ("provider", "registers", "result"),
    [
        ("None", POLL_IRQ, HypercallResult(Status.NOT_ENABLED)),
        ("Minimal", POLL_IRQ, HypercallResult(Status.NOT_AVAILABLE)),
        ("KVM", POLL_IRQ, HypercallResult(Status.SUCCESS, 0)),
        ("KVM", UNKNOWN, HypercallResult(Status.NOT_SUPPORTED, ENOSYS)),
        ("KVM", UNKNOWN._replace(cpl=3), HypercallResult(Status.ACCESS_DENIED, EPERM)),
        ("KVM", POLL_IRQ._replace(cpl=1), HypercallResult(Status.ACCESS_DENIED, EPERM)),
        ("KVM", POLL_IRQ._replace(cpl=2), HypercallResult(Status.ACCESS_DENIED, EPERM)),
        ("KVM", UNKNOWN._replace(cpl=3, long_mode=False), HypercallResult(Status.ACCESS_DENIED, 2**32 - 1)),
    ],
)
def test_why_there_is_no_answer(provider: str, registers: HypercallRegisters, result: HypercallResult) -> None:
    """No interface, no hypercalls, the wrong ring and an unknown number are told apart, on every vCPU."""
    clock = a_clock(provider)
    assert clock.interface.are_hypercalls_enabled is (provider == "KVM")
    for vcpu in range(2):
        assert clock.hypercall(vcpu, registers) == result


@pytest.mark.row("V-35")
@pytest.mark.parametrize("profile", ["linux", "document", "virtualbox"])
def test_hypercalls_are_served_from_the_start_on_every_vcpu(profile: str) -> None:
    """No MSR need be written and no feature be offered: the first thing that each vCPU does may be a hypercall."""
    clock = a_clock(profile=profile, features=0)
    assert clock.interface.are_hypercalls_enabled
    for vcpu in (1, 0):
        assert clock.interface.execute(vcpu, POLL_IRQ, VMCALL) == Executed(Status.SUCCESS, 0, 3)
    clock.reset()
    assert [clock.hypercall(vcpu, POLL_IRQ).rax for vcpu in (0, 1)] == [0, 0]


@pytest.mark.row("G-11", "E13")
@pytest.mark.parametrize(
    ("vcpu", "registers"),
    [
        (2, POLL_IRQ),
        (-1, POLL_IRQ),
        (0, HypercallRegisters(rax=2**64)),
        (0, HypercallRegisters(rax=1, rdi=-1)),
        (0, HypercallRegisters(rax=1, r8=2**64)),
        (0, HypercallRegisters(rax=1, cpl=4)),
    ],
)
def test_what_no_guest_can_do_is_the_callers_mistake(vcpu: int, registers: HypercallRegisters) -> None:
    """A vCPU or a register that cannot be is a RangeError, and counts as no hypercall."""
    interface = a_clock().interface
    with pytest.raises(RangeError):
        interface.hypercall(vcpu, registers)
    with pytest.raises(RangeError):
        interface.handle_ud(vcpu, registers, VMCALL, Gpa(0), AMD)
    assert sum(interface.statistics) == 0


@pytest.mark.row("G-13", "G-08")
def test_an_instruction_is_executed_by_its_bytes() -> None:
    """The length says where RIP goes on; what is no hypercall does nothing, and what is refused leaves RIP."""
    interface = a_clock().interface
    assert interface.execute(0, POLL_IRQ, VMCALL) == Executed(Status.SUCCESS, 0, 3)
    assert interface.execute(0, UNKNOWN, b"\x2e" + VMMCALL + b"\x90") == Executed(Status.NOT_SUPPORTED, ENOSYS, 4)
    assert interface.execute(0, POLL_IRQ, b"\x48" + VMCALL) == Executed(Status.SUCCESS, 0, 4)
    in_32_bits = POLL_IRQ._replace(long_mode=False)
    assert interface.execute(0, in_32_bits, b"\x48" + VMCALL) == Executed(Status.INVALID_INSTRUCTION)  # DEC EAX
    assert interface.execute(0, POLL_IRQ, b"\x0f\x0b\x90") == Executed(Status.INVALID_INSTRUCTION)
    assert a_clock("None").interface.execute(0, POLL_IRQ, VMCALL) == Executed(Status.NOT_ENABLED)
    assert interface.statistics.hypercalls == 3


@pytest.mark.row("V-34", "V-33", "G-08")
def test_ud_is_served_and_put_right() -> None:
    """VMCALL on AMD's CPU is done as a hypercall, the guest's code becomes VMMCALL, and RIP goes on by 3."""
    clock = a_clock()
    clock.memory.write(0x5000, VMCALL + b"\x90")
    assert clock.interface.should_trap_ud(AMD)
    done = clock.interface.handle_ud(1, POLL_IRQ, VMCALL, Gpa(0x5000), AMD)
    assert done == Executed(Status.SUCCESS, 0, 3, patched=True)
    assert clock.memory.read(0x5000, 4) == VMMCALL + b"\x90"
    again = clock.interface.handle_ud(1, POLL_IRQ, VMMCALL, Gpa(0x5000), AMD)
    assert again == Executed(Status.SUCCESS, 0, 3, patched=False)


@pytest.mark.row("V-34")
@pytest.mark.parametrize("prefixes", [b"\x2e", b"\x48", b"\x64\x65"])
def test_an_instruction_of_another_length_is_served_and_stays(prefixes: bytes) -> None:
    """A hypercall with prefixes is done and RIP goes on behind it; native bytes, being 3, do not replace it."""
    clock = a_clock(profile="virtualbox")
    code = prefixes + VMCALL + b"\x90"
    clock.memory.write(0x5000, code)
    done = clock.interface.handle_ud(0, UNKNOWN, code, Gpa(0x5000), AMD)
    assert done == Executed(Status.NOT_SUPPORTED, ENOSYS, len(prefixes) + 3, patched=False)
    assert clock.memory.read(0x5000, len(code)) == code


@pytest.mark.row("V-34")
def test_code_is_left_alone_where_it_should_be() -> None:
    """Without `fix`, outside of ring 0, without hypercalls and for other instructions guests' code stays."""
    clock, silent = a_clock(), a_clock("Minimal")
    user = POLL_IRQ._replace(cpl=3)
    for each in (clock, silent):
        each.memory.write(0x5000, VMCALL)
    assert clock.interface.handle_ud(0, POLL_IRQ, VMCALL, Gpa(0x5000), AMD, fix=False).length == 3
    denied = clock.interface.handle_ud(0, user, VMCALL, Gpa(0x5000), AMD)
    assert denied == Executed(Status.ACCESS_DENIED, EPERM, 3)
    assert clock.interface.handle_ud(0, POLL_IRQ, b"\x0f\x0b", Gpa(0x5000), AMD).status is Status.INVALID_INSTRUCTION
    assert silent.interface.handle_ud(0, POLL_IRQ, VMCALL, Gpa(0x5000), AMD) == Executed(Status.NOT_AVAILABLE)
    with pytest.raises(ConfigError, match="CPU vendor"):
        clock.interface.handle_ud(0, POLL_IRQ, VMCALL, Gpa(0x5000), "Unheard")
    assert clock.memory.read(0x5000, 3) == silent.memory.read(0x5000, 3) == VMCALL


@pytest.mark.row("G-16", "G-17")
@pytest.mark.parametrize(("profile", "by_ud"), [("linux", 2), ("document", 2), ("virtualbox", 0)])
def test_both_ways_are_counted(profile: str, by_ud: int) -> None:
    """Hypercalls and those by #UD have a counter each; VirtualBox counts the direct ones only (trap G-17)."""
    interface = a_clock(profile=profile).interface
    interface.hypercall(0, POLL_IRQ)
    interface.hypercall(1, UNKNOWN)
    interface.execute(0, POLL_IRQ, VMCALL)
    for _ in range(2):
        interface.handle_ud(0, POLL_IRQ, VMCALL, Gpa(0), AMD)
    assert interface.statistics[:2] == (3, by_ud)


@pytest.mark.row("G-16", "E15")
def test_no_count_is_lost_between_threads() -> None:
    """Hypercalls of several vCPUs at once are all counted, and the statistics never go back."""
    interface = a_clock().interface
    seen: tuple[list[int], list[int]] = ([], [])

    def guest(vcpu: int) -> None:
        for _ in range(2000):
            interface.hypercall(vcpu, POLL_IRQ)
            seen[vcpu].append(interface.statistics.hypercalls)

    threads = [threading.Thread(target=guest, args=(vcpu,)) for vcpu in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(each) for each in seen] == [2000, 2000]
    assert all(each == sorted(each) for each in seen)
    assert interface.statistics.hypercalls == max(seen[0] + seen[1]) == 4000


@pytest.mark.row("G-08", "E13")
def test_a_hypercall_may_wait_for_who_needs_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service of the VMM that waits for its other thread does not lock it out of the clock."""
    clock = a_clock()

    def serve(*_call: object) -> HypercallResult:
        other = threading.Thread(target=clock.refresh, daemon=True)
        other.start()
        other.join(timeout=HANG_S)
        return HypercallResult(Status.SUCCESS, int(other.is_alive()))

    monkeypatch.setattr(clock.interface.provider, "hypercall", serve)
    assert clock.hypercall(0, POLL_IRQ) == HypercallResult(Status.SUCCESS, 0)
    assert clock.interface.handle_ud(0, POLL_IRQ, VMCALL, Gpa(0), AMD, fix=False).rax == 0


@pytest.mark.row("G-10", "G-14", "G-08")
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("provider", "enabled", "update"),
    [
        ("None", False, Status.NOT_ENABLED),
        ("Minimal", True, Status.NOT_AVAILABLE),
        ("KVM", True, Status.SUCCESS),
    ],
)
def test_paravirtual_tsc(provider: str, enabled: bool, update: Status, profile: str) -> None:
    """An update writes nothing, and KVM's succeeds; not even a guest of KVM with pages has a paravirtual TSC."""
    memory, backend = GuestMemory(bytearray(SIZE)), SimulatedBackend(HZ, 10**6)
    clock = GuestClock(memory, 2, provider, backend=backend, profile=profile)
    if provider == "KVM":
        for vcpu in range(2):
            clock.write_msr(vcpu, SYSTEM_TIME, 0x2001 + 0x1000 * vcpu)
            assert clock.memory.read(0x2000 + 0x1000 * vcpu, 32) != bytes(32)
    before = clock.memory.read(0, SIZE)
    backend.advance(ns=10**9)
    assert clock.interface.is_enabled is enabled
    assert clock.interface.is_paravirt_tsc_enabled is False
    assert clock.interface.update_paravirt_tsc() is update
    assert clock.memory.read(0, SIZE) == before


@pytest.mark.row("M-01", "M-02", "M-03")
@pytest.mark.parametrize(
    ("hz", "khz"), [(HZ, 2_596_132), (1_499, 1), (1_500, 2), (499, 0), (4_294_967_295_499, 2**32 - 1)]
)
def test_minimal_says_the_frequencies(hz: int, khz: int) -> None:
    """Leaf 0x40000010 has TSC and APIC bus in kHz, rounded; the leaves below are zero, without a signature."""
    clock = GuestClock(GuestMemory(), 1, "Minimal", backend=SimulatedBackend(hz), apic_bus_hz=200_000_500)
    assert clock.cpuid(0x40000000) == CpuidLeaf(eax=0x40000010)
    assert all(clock.cpuid(leaf) == CpuidLeaf() for leaf in range(0x40000001, 0x40000010))
    assert clock.cpuid(0x40000010) == CpuidLeaf(eax=khz, ebx=200_001)
    assert clock.cpuid(0x40000011) is None
    assert clock.patch_cpuid(1, 0, CpuidLeaf()).ecx == 1 << 31
    with pytest.raises(MsrFault):
        clock.write_msr(0, SYSTEM_TIME, 0x2001)
    assert clock.save().provider.msrs == {}


@pytest.mark.row("M-03")
def test_minimal_has_leaves_and_nothing_else() -> None:
    """Each MSR faults, read and written, no hypercall is served, and there is nothing to save or to load."""
    clock = a_clock("Minimal")
    for index in (0x11, 0x12, *range(0x4B564D00, 0x4B564D09), *range(0x40000000, 0x40000020)):
        with pytest.raises(MsrFault):
            clock.read_msr(1, index)
        with pytest.raises(MsrFault):
            clock.write_msr(1, index, 0)
    for number in range(16):
        assert clock.hypercall(1, HypercallRegisters(rax=number)) == HypercallResult(Status.NOT_AVAILABLE)
    provider = clock.interface.provider
    assert provider.save() == {}
    provider.load({})
    with pytest.raises(ConfigError, match="saves no MSRs"):
        provider.load({"system_time": (0, 0)})
    assert clock.interface.save_unit()[8:] == b""


@pytest.mark.row("G-15")
def test_the_words_of_the_vocabulary() -> None:
    """Each outcome of VirtualBox's has one word of its own; words are what VMMs store and compare."""
    assert list(Status) == [
        *("success", "deferred", "continuing", "access denied", "not enabled", "not available"),
        *("memory read failed", "memory write failed", "invalid hypercall instruction", "not supported"),
        *("operation failed", "device not registered", "no debug connection", "no data"),
    ]


@pytest.mark.row("G-15")
@pytest.mark.parametrize(("profile", "no_vcpu"), [("linux", (Status.SUCCESS, 0)), ("virtualbox", FAILED)])
def test_the_outcomes_that_a_guest_meets(profile: str, no_vcpu: tuple[Status, int | None]) -> None:
    """A call served, denied, unknown or failed and no call at all have an outcome each, by #UD and directly."""
    interface = a_clock(vmm=NotedVmm(), profile=profile, features=KvmFeature.PV_UNHALT).interface
    expected: list[tuple[HypercallRegisters, bytes, tuple[Status, int | None]]] = [
        (POLL_IRQ, VMCALL, (Status.SUCCESS, 0)),
        (POLL_IRQ._replace(cpl=1), VMCALL, (Status.ACCESS_DENIED, EPERM)),
        (UNKNOWN, VMMCALL, (Status.NOT_SUPPORTED, ENOSYS)),
        (HypercallRegisters(rax=5, rcx=1), VMCALL, (Status.SUCCESS, 0)),
        (HypercallRegisters(rax=5, rcx=2), VMCALL, no_vcpu),
        (POLL_IRQ, b"\x0f\x01\xf9", (Status.INVALID_INSTRUCTION, None)),
    ]
    for registers, code, outcome in expected:
        assert interface.execute(0, registers, code)[:2] == outcome
        assert interface.handle_ud(0, registers, code, Gpa(0), AMD, fix=False)[:2] == outcome


@pytest.mark.row("G-15", "G-13")
@pytest.mark.parametrize("status", Status)
def test_where_rip_goes_on_after_each_outcome(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    """RIP stays on an instruction that was none here, and on one to be repeated; after all others it goes on."""
    interface = a_clock().interface
    monkeypatch.setattr(interface.provider, "hypercall", lambda *_: HypercallResult(status, 5))
    stays = status in (Status.NOT_ENABLED, Status.NOT_AVAILABLE, Status.CONTINUING)
    expected = Executed(status, 5, 0 if stays else 3)
    assert interface.execute(0, POLL_IRQ, VMCALL) == expected
    assert interface.handle_ud(0, POLL_IRQ, VMCALL, Gpa(0), AMD, fix=False) == expected


@pytest.mark.row("H-64", "H-60", "G-13", "G-15")
def test_an_access_that_is_denied_without_a_word_is_the_guests_ud(monkeypatch: pytest.MonkeyPatch) -> None:
    """RIP stays, and no register changes; both registers of an answer come through."""
    interface = a_clock().interface
    for result, length in [
        (HypercallResult(Status.ACCESS_DENIED), 0),
        (HypercallResult(Status.ACCESS_DENIED, 5), 3),
        (HypercallResult(Status.SUCCESS, 5, 6), 3),
    ]:
        monkeypatch.setattr(interface.provider, "hypercall", lambda *_, result=result: result)
        expected = Executed(result.status, result.rax, length, rdx=result.rdx)
        assert interface.execute(0, POLL_IRQ, VMCALL) == expected
        assert interface.handle_ud(0, POLL_IRQ, VMCALL, Gpa(0), AMD, fix=False) == expected


@pytest.mark.row("M-02", "E13")
def test_minimal_refuses_what_its_leaf_cannot_hold() -> None:
    """A frequency of more than 2^32-1 kHz is refused when the clock is made."""
    with pytest.raises(ConfigError, match="TSC is 4294967295500 Hz"):
        GuestClock(GuestMemory(), 1, "Minimal", backend=SimulatedBackend(4_294_967_295_500))


@pytest.mark.row("V-39", "J-02", "G-07")
def test_reset() -> None:
    """MSRs are as at the start and pages are taken back, with an event; guest time and TSC go on."""
    backend = SimulatedBackend(HZ, 10**6)
    clock = GuestClock(GuestMemory(bytearray(SIZE)), 2, backend=backend)
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    clock.write_msr(1, SYSTEM_TIME, 0x3001)
    clock.write_msr(0, WALL_CLOCK, 0x4000)
    clock.write_msr(1, 0x3B, 500)
    backend.advance(ns=5 * 10**9)
    tsc, ns = clock.read_msr(1, 0x10), 5 * 10**9
    clock.reset()
    assert [clock.read_msr(vcpu, index) for vcpu in (0, 1) for index in (SYSTEM_TIME, WALL_CLOCK, 0x3B)] == [0] * 6
    assert (clock.page(0), clock.page(1), clock.save().wall_clock_gpa) == (None, None, None)
    assert (clock.read_msr(1, 0x10), clock.now()) == (tsc, ns)
    *_, last = clock.events.read().events
    assert last.kind is EventKind.RESET
    assert last.jump_ns == 0
    before = clock.memory.read(0, SIZE)
    clock.refresh()
    assert clock.memory.read(0, SIZE) == before


@pytest.mark.row("V-39", "J-02")
def test_reset_while_paused_holds_after_resume() -> None:
    """A VM that is reset before it goes on, be it after a restore, has no page, and no ADJUST of before."""
    clock = a_clock()
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    clock.write_msr(0, 0x3B, 500)
    clock.pause()
    state = clock.save()
    for each in (clock, GuestClock.restore(state, GuestMemory(bytearray(1 << 16)), backend=SimulatedBackend(HZ, 5))):
        each.reset()
        each.resume()
        assert (each.read_msr(0, 0x3B), each.page(0), each.read_msr(0, SYSTEM_TIME)) == (0, None, 0)


@pytest.mark.row("V-40", "G-22", "G-07")
def test_term_resets_and_lets_the_debug_device_go() -> None:
    """At the end of a VM nothing is left that could be published, and another device may come; twice is once."""
    clock = a_clock()
    for _ in range(2):
        clock.write_msr(0, SYSTEM_TIME, 0x2001)
        clock.write_msr(0, WALL_CLOCK, 0x4000)
        clock.interface.debug.register(Wire())
        clock.interface.term()
        clock.interface.term()
        assert (clock.read_msr(0, SYSTEM_TIME), clock.read_msr(1, WALL_CLOCK), clock.page(0)) == (0, 0, None)
        before = clock.memory.read(0, SIZE)
        clock.refresh()
        assert clock.memory.read(0, SIZE) == before


@pytest.mark.row("G-09")
@pytest.mark.parametrize("provider", ["None", "Minimal"])
def test_no_provider_no_msr(provider: str) -> None:
    """Without MSRs each access faults."""
    interface: GuestInterface = a_clock(provider).interface
    for index in (0x11, 0x12, WALL_CLOCK, SYSTEM_TIME, 0x40000020, 2**32 - 1):
        with pytest.raises(MsrFault):
            interface.read_msr(0, index)
        with pytest.raises(MsrFault):
            interface.write_msr(0, index, 0)


@pytest.mark.row("K-37", "E4")
def test_pairing_is_one_instant_or_none() -> None:
    """UTC and the calling vCPU's TSC of one host instant; none where the host's TSC is not to be trusted."""
    backend = SimulatedBackend(HZ, 1000, realtime_ns=10**18 + 5)
    clock = GuestClock(GuestMemory(bytearray(1 << 12)), 2, backend=backend, vcpu_host="kvm")
    clock.write_msr(1, 0x10, 5_000_000)
    call = HypercallRegisters(rax=9, rbx=0x100)
    for vcpu, tsc in ((0, 1000), (1, 5_000_000)):
        assert clock.pairing(vcpu) == (10**18 + 5, tsc)
        assert clock.hypercall(vcpu, call) == HypercallResult(Status.SUCCESS, 0)
        assert clock.memory.read(0x100, 64) == pack("<qqQ40x", 10**9, 5, tsc)
    assert (clock.tsc_hz, clock.vcpu_host, clock.vmm) == (HZ, VcpuHost.KVM, None)
    clock.memory.write(0x100, bytes(64))
    clock.apply_host_findings([], tsc_trusted=False)
    assert (clock.pairing(0), clock.hypercall(0, call)) == (None, HypercallResult(Status.SUCCESS, 2**64 - 95))
    clock.apply_host_findings([], tsc_trusted=True)
    backend.tsc_stable = False
    assert (clock.pairing(0), clock.hypercall(0, call)) == (None, HypercallResult(Status.SUCCESS, 2**64 - 95))
    assert clock.memory.read(0x100, 64) == bytes(64)


@pytest.mark.row("E9")
def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    """Forked while others count a hypercall and are in the debug device, a child does both."""
    interface = a_clock().interface
    locks = interface._counts_lock, interface.debug._lock
    for lock in locks:
        lock.acquire()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(HANG_S)  # a wait for ever ends the child, not the test
            interface.hypercall(0, HypercallRegisters(1))
            interface.term()
            status = 0 if interface.statistics.hypercalls == 1 else 2
        finally:
            os._exit(status)
    for lock in locks:
        lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
