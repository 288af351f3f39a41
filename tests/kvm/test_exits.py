"""Why KVM_RUN returns: real guests, one exit of every kind, and how the guest sees the answer."""

import signal
import threading

import pytest

from pvclock import GuestClock, GuestMemory, SimulatedBackend
from pvclock.boot import EntryState, enter
from pvclock.errors import ConfigError, StateError
from pvclock.kvm import (
    Halt,
    InternalError,
    Interrupted,
    IoIn,
    IoOut,
    Mmio,
    MsrExitReason,
    RdmsrExit,
    Shutdown,
    WrmsrExit,
    exit_on_msrs,
)
from pvclock.kvm._gate import install_kick_signal
from pvclock.kvm.exits import CoalescedWrite
from tests.kvm import guests
from tests.kvm.guests import CODE, COUNT, GP_VECTOR, HLT, RESULT, UNMAPPED, bare_vm

pytestmark = pytest.mark.kvm

SYSTEM_TIME = 0x4B564D01
KICK = signal.SIGRTMIN + 2
MSR_RANGES = GuestClock(GuestMemory(), backend=SimulatedBackend(10**9)).msr_ranges


@pytest.mark.row("E13")
def test_out_and_halt() -> None:
    """OUT comes with port, size and bytes; HLT ends it where no interrupt controller is in the kernel."""
    with bare_vm(guests.out(0x10, 5) + HLT) as bare:
        assert bare.vcpus[0].run() == IoOut(0x10, 1, b"\x05")
        assert bare.vcpus[0].run() == Halt()


@pytest.mark.row("E9")
def test_repeated_out_comes_whole() -> None:
    """REP OUTSL gives all its items, in order, in however many exits."""
    items = bytes(range(256)) * 4
    with bare_vm(guests.rep_outs(0x10, RESULT, len(items) // 4, 4) + HLT) as bare:
        bare.ram[RESULT : RESULT + len(items)] = items
        seen = b""
        while isinstance(reason := bare.vcpus[0].run(), IoOut):
            assert reason.size == 4
            seen += reason.data
        assert (reason, seen) == (Halt(), items)


@pytest.mark.row("E9")
def test_in_is_answered() -> None:
    """IN gets the bytes of complete_io(), and an answer of another length is refused."""
    with bare_vm(bytes.fromhex("e510 a30020") + HLT) as bare:  # in $0x10, %ax; mov %ax, RESULT
        vcpu = bare.vcpus[0]
        assert vcpu.run() == IoIn(0x10, 2, 1)
        with pytest.raises(ConfigError, match="answer of 3 bytes to an IN of 2"):
            vcpu.complete_io(b"abc")
        vcpu.complete_io(b"\x34\x12")
        assert vcpu.run() == Halt()
        assert bare.result() == 0x1234


@pytest.mark.row("E9")
def test_memory_without_a_slot_is_mmio() -> None:
    """A read of it gets the bytes of complete_mmio(), a write shows what was written."""
    # mov $0x2000, %ax; mov %ax, %ds; mov 0, %eax; mov %eax, 4
    with bare_vm(bytes.fromhex("b80020 8ed8 66a10000 66a30400") + HLT) as bare:
        vcpu = bare.vcpus[0]
        assert vcpu.run() == Mmio(UNMAPPED, 4, None)
        with pytest.raises(ConfigError, match="answer of 1 bytes to a read of 4"):
            vcpu.complete_mmio(b"a")
        vcpu.complete_mmio(b"abcd")
        assert vcpu.run() == Mmio(UNMAPPED + 4, 4, b"abcd")
        assert vcpu.run() == Halt()


@pytest.mark.row("E9")
def test_only_the_present_exit_can_be_answered() -> None:
    """An answer to an exit of another kind is refused: kvm_run holds something else then."""
    with bare_vm(guests.out(0x10, 5) + HLT) as bare:
        vcpu = bare.vcpus[0]
        vcpu.run()
        with pytest.raises(StateError, match="complete_mmio"):
            vcpu.complete_mmio(b"a")
        with pytest.raises(StateError, match="complete_msr"):
            vcpu.complete_msr()
        vcpu.run()
        with pytest.raises(StateError, match="complete_io"):
            vcpu.complete_io(b"a")


@pytest.mark.row("E9")
def test_a_triple_fault_is_a_shutdown() -> None:
    """UD2 with an IDT of no entries leaves a guest in protected mode without a way on."""
    with bare_vm(bytes.fromhex("0f0b")) as bare:
        vcpu = bare.vcpus[0]
        vcpu.set_sregs({**vcpu.get_sregs(), "idt": {"base": 0, "limit": 0}})
        enter(vcpu, EntryState("protected", CODE, {}))
        assert vcpu.run() == Shutdown()


@pytest.mark.row("E9")
def test_code_where_no_memory_is_is_an_internal_error() -> None:
    """KVM cannot fetch instructions from where no memory is, and says so with its reasons."""
    with bare_vm(HLT) as bare:
        vcpu = bare.vcpus[0]
        sregs = vcpu.get_sregs()
        sregs["cs"].update(base=UNMAPPED, selector=UNMAPPED >> 4)
        vcpu.set_sregs(sregs)
        vcpu.set_regs({**vcpu.get_regs(), "rip": 0})
        reason = vcpu.run()
        assert isinstance(reason, InternalError)
        assert len(reason.data) <= 16


@pytest.mark.row("E9")
def test_request_before_run_keeps_the_guest_out() -> None:
    """A run() that was asked to exit before it began returns with no instruction done, and only that one."""
    with bare_vm(guests.out(0x10, 5) + HLT) as bare:
        vcpu = bare.vcpus[0]
        vcpu.request_exit()
        assert vcpu.run() == Interrupted()
        assert vcpu.get_regs()["rip"] == CODE
        assert isinstance(vcpu.run(), IoOut)


@pytest.mark.row("E9")
def test_a_kick_gets_a_spinning_guest_out() -> None:
    """A signal from another thread ends run() of a guest that never exits; until then nobody else may use the vCPU."""
    install_kick_signal(KICK)
    with bare_vm(COUNT) as bare:
        vcpu, runs_in = bare.vcpus[0], threading.get_ident()
        refusals: list[BaseException] = []

        def kick() -> None:
            while not bare.count(0):
                pass
            for action in (vcpu.get_regs, vcpu.run, vcpu.close):
                try:
                    action()
                except StateError as refusal:
                    refusals.append(refusal)
            vcpu.request_exit()
            signal.pthread_kill(runs_in, KICK)

        kicker = threading.Thread(target=kick)
        kicker.start()
        assert vcpu.run() == Interrupted()
        kicker.join()
        assert len(refusals) == 3
        assert bare.count(0) > 0


# MSRs


@pytest.mark.row("E13")
def test_a_filtered_read_gets_the_answer() -> None:
    """RDMSR of a filtered MSR comes here, and the guest gets all 64 bits of the answer."""
    with bare_vm(guests.read_msr(SYSTEM_TIME)) as bare:
        exit_on_msrs(bare.vm, MSR_RANGES)
        assert bare.vcpus[0].run() == RdmsrExit(SYSTEM_TIME, MsrExitReason.FILTER)
        bare.vcpus[0].complete_msr(0x1122334455667788)
        assert bare.vcpus[0].run() == Halt()
        assert bare.result(8) == 0x1122334455667788


@pytest.mark.row("E13")
def test_a_filtered_write_shows_the_value_and_passes() -> None:
    """WRMSR of a filtered MSR comes here with its 64 bits, never reaches the kernel, and the guest goes on."""
    code = guests.write_msr(SYSTEM_TIME, 0xABCDEF0123456789) + guests.out(0x10, 1)
    with bare_vm(code) as bare:
        exit_on_msrs(bare.vm, MSR_RANGES)
        assert bare.vcpus[0].run() == WrmsrExit(SYSTEM_TIME, 0xABCDEF0123456789, MsrExitReason.FILTER)
        bare.vcpus[0].complete_msr()
        assert isinstance(bare.vcpus[0].run(), IoOut)
        assert bare.vcpus[0].get_msr(SYSTEM_TIME) == 0


@pytest.mark.row("E13")
@pytest.mark.parametrize("msr", [SYSTEM_TIME, 0x3B, 0x11, 0x12])
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_refused_access_is_gp_in_the_guest(msr: int, access: str) -> None:
    """complete_msr(fault=True) is #GP: the guest's handler for vector 13 runs."""
    code = guests.read_msr(msr) if access == "read" else guests.write_msr(msr, 1) + HLT
    with bare_vm(code) as bare:
        exit_on_msrs(bare.vm, MSR_RANGES)
        assert isinstance(bare.vcpus[0].run(), RdmsrExit if access == "read" else WrmsrExit)
        bare.vcpus[0].complete_msr(fault=True)
        assert bare.vcpus[0].run() == Halt()
        assert bare.result(1) == GP_VECTOR


@pytest.mark.row("E13")
def test_a_filter_alone_is_gp_in_the_guest() -> None:
    """Without user-space exits nobody is asked for a filtered access: why exit_on_msrs() has its order."""
    with bare_vm(guests.read_msr(SYSTEM_TIME)) as bare:
        bare.vm.set_msr_filter([(1, SYSTEM_TIME, 1, b"\0")])
        assert bare.vcpus[0].run() == Halt()
        assert bare.result(1) == GP_VECTOR


@pytest.mark.row("E13")
def test_the_ranges_are_those_of_the_last_call() -> None:
    """What was filtered before, and is not any more, is the kernel's again."""
    with bare_vm(guests.read_msr(SYSTEM_TIME)) as bare:
        exit_on_msrs(bare.vm, MSR_RANGES)
        exit_on_msrs(bare.vm, [each for each in MSR_RANGES if not each.base <= SYSTEM_TIME < each.base + each.length])
        assert bare.vcpus[0].run() == Halt()


@pytest.mark.row("E13")
@pytest.mark.parametrize("access", ["read", "write"])
def test_only_the_accesses_that_are_named_come_here(access: str) -> None:
    """Reads of IA32_TSC stay the kernel's, writes do not; so it is with any range of one kind."""
    code = guests.read_msr(0x10) if access == "read" else guests.write_msr(0x10, 1) + HLT
    with bare_vm(code) as bare:
        exit_on_msrs(bare.vm, MSR_RANGES)
        assert isinstance(bare.vcpus[0].run(), Halt if access == "read" else WrmsrExit)


@pytest.mark.row("E13")
@pytest.mark.parametrize("msr", [0x4B564D04, 0x4B564D05])
def test_what_the_kernel_keeps_does_not_come_here(msr: int) -> None:
    """PV EOI and poll control pass by the filter: the kernel answers or faults by itself."""
    with bare_vm(guests.read_msr(msr)) as bare:
        exit_on_msrs(bare.vm, MSR_RANGES)
        assert bare.vcpus[0].run() == Halt()


# The coalesced ring


@pytest.fixture
def coalesced_ports(kvm_serves_coalesced_ports: bool) -> None:
    """Skip where KVM has no ring for port writes."""
    if not kvm_serves_coalesced_ports:
        pytest.skip("KVM_CAP_COALESCED_PIO is missing: Linux 4.20 has it")


@pytest.mark.row("style")
@pytest.mark.usefixtures("coalesced_ports")
def test_coalesced_writes_are_kept_without_an_exit() -> None:
    """Writes that fit the registered port wait in the ring, in order; a wider one, and any other port's, exits."""
    code = b"".join(guests.out(0xE9, byte) for byte in b"tick") + bytes.fromhex("b400 e7e9") + guests.out(0x10, 1) + HLT
    with bare_vm(code) as bare:
        vcpu = bare.vcpus[0]
        bare.vm.register_coalesced(0xE9, 1, is_port=True)
        assert vcpu.run() == IoOut(0xE9, 2, b"k\0")
        assert vcpu.take_coalesced() == tuple(CoalescedWrite(True, 0xE9, bytes([byte])) for byte in b"tick")
        assert vcpu.run() == IoOut(0x10, 1, b"\x01")
        assert vcpu.take_coalesced() == ()


@pytest.mark.row("style")
def test_coalesced_mmio() -> None:
    """A store to a registered range is in the ring with its address and bytes."""
    # mov $0x2000, %ax; mov %ax, %ds; mov %eax, 4
    with bare_vm(bytes.fromhex("b80020 8ed8 66a30400") + HLT) as bare:
        vcpu = bare.vcpus[0]
        bare.vm.register_coalesced(UNMAPPED, 0x1000, is_port=False)
        assert vcpu.run() == Halt()
        ((is_port, address, data),) = vcpu.take_coalesced()
        assert (is_port, address, data[:2]) == (False, UNMAPPED + 4, b"\x00\x20")


@pytest.mark.row("E9")
@pytest.mark.usefixtures("coalesced_ports")
@pytest.mark.parametrize("code", ["b91010 88c8 e6e9 e2fa", "b91010 bae900 be0020 f36e"], ids=["loop", "rep-outsb"])
def test_a_full_ring_exits(code: str) -> None:
    """The write that finds no room comes as an exit, after those in the ring; nothing is lost or overwritten."""
    # mov $0x1010, %cx; 1: mov %cl, %al; out %al, $0xe9; loop 1b, or rep outsb
    with bare_vm(bytes.fromhex(code) + HLT) as bare:
        expected = bytes(n & 0xFF for n in range(0x1010, 0, -1))
        bare.ram[RESULT : RESULT + len(expected)] = expected
        vcpu = bare.vcpus[0]
        bare.vm.register_coalesced(0xE9, 1, is_port=True)
        seen, exits = b"", 0
        while isinstance(reason := vcpu.run(), IoOut):
            seen += b"".join(write.data for write in vcpu.take_coalesced()) + reason.data
            exits += 1
        seen += b"".join(write.data for write in vcpu.take_coalesced())
        assert (reason, seen) == (Halt(), expected)
        assert 1 <= exits < len(expected) // 100


@pytest.mark.row("E9")
@pytest.mark.usefixtures("coalesced_ports")
def test_what_is_not_registered_any_more_exits() -> None:
    """unregister_coalesced() undoes the other."""
    with bare_vm(guests.out(0xE9, 1) + HLT) as bare:
        bare.vm.register_coalesced(0xE9, 1, is_port=True)
        bare.vm.unregister_coalesced(0xE9, 1, is_port=True)
        assert bare.vcpus[0].run() == IoOut(0xE9, 1, b"\x01")
