"""The ioctls that set up a VM and its vCPUs, each on the real device; those that run them are in test_exits.py."""

import errno
import mmap
import re
import signal
from pathlib import Path

import pytest

from pvclock.errors import ConfigError, KvmError, RangeError, StateError
from pvclock.kvm import Kvm
from pvclock.kvm._fd import CAPABILITY_NUMBERS
from pvclock.kvm._gate import install_kick_signal
from pvclock.kvm.exits import (
    Halt,
)
from pvclock.kvm.tsc_offset import TscOffsets
from tests.kvm import guests
from tests.kvm.guests import HLT, REGISTERS, RESULT, bare_vm
from tests.kvm.kvm_calls import refused

pytestmark = pytest.mark.kvm

SYSTEM_TIME = 0x4B564D01
KICK = signal.SIGRTMIN + 2


# The device and the VM


@pytest.mark.row("E13")
def test_kvm_describes_itself() -> None:
    """API 12, CPUID entries with all their fields, and 0 for a capability that nobody has."""
    with Kvm() as kvm:
        assert kvm.get_api_version() == 12
        entries = kvm.get_supported_cpuid()
        assert {"function", "index", "flags", "eax", "ebx", "ecx", "edx"} == entries[0].keys()
        assert {0, 1, 0x40000001} <= {entry["function"] for entry in entries}
        assert kvm.check_extension(10**6) == 0
        assert kvm.check_extension(CAPABILITY_NUMBERS["KVM_CAP_USER_MEMORY"]) == 1


@pytest.mark.row("E13", "H-11", "H-13")
def test_hyperv_leaves() -> None:
    """Where the kernel serves Hyper-V it gives the leaves, with its signature and clocks; elsewhere it refuses."""
    with Kvm() as kvm:
        if not kvm.check_extension("KVM_CAP_SYS_HYPERV_CPUID"):
            assert refused("KVM_GET_SUPPORTED_HV_CPUID", kvm.get_supported_hv_cpuid) == errno.EINVAL
            return
        leaves = {entry["function"]: entry for entry in kvm.get_supported_hv_cpuid()}
        assert leaves[0x40000001]["eax"].to_bytes(4, "little") == b"Hv#1"
        assert {0x40000000, 0x40000002, 0x40000003, 0x40000004, 0x40000005} <= leaves.keys()
        assert leaves[0x40000003]["eax"] & 1 << 9


@pytest.mark.row("E13")
def test_a_capability_has_a_name_and_a_number() -> None:
    """The numbers are Linux'; both ask for the same; a name that is not known is an error that says what to give."""
    header = Path("/usr/include/linux/kvm.h").read_text(encoding="utf-8")
    numbers = {name: int(number) for name, number in re.findall(r"#define (KVM_CAP_\w+)\s+(\d+)\b", header)}
    assert {name: numbers.get(name, ours) for name, ours in CAPABILITY_NUMBERS.items()} == CAPABILITY_NUMBERS
    assert len(numbers.keys() & CAPABILITY_NUMBERS.keys()) >= 15  # an old header lacks the newest
    with Kvm() as kvm, kvm.create_vm() as vm:
        for name, number in CAPABILITY_NUMBERS.items():
            assert kvm.check_extension(name) == kvm.check_extension(number)
        for action in (lambda: kvm.check_extension("KVM_CAP_MADE_UP"), lambda: vm.enable_cap("KVM_CAP_MADE_UP", 1)):
            with pytest.raises(ConfigError, match="'KVM_CAP_MADE_UP' is not known by name; give its number"):
                action()


@pytest.mark.row("E13")
def test_kvm_refuses_what_it_should() -> None:
    """KVM's own refusals come through with their errno."""
    with bare_vm(HLT) as bare:
        assert refused("KVM_CREATE_IRQCHIP", bare.vm.create_irqchip) == errno.EINVAL  # after a vCPU
        assert refused("KVM_SET_TSS_ADDR", lambda: bare.vm.set_tss_addr(0xFFFFE000)) == errno.EINVAL
        assert refused("KVM_SET_IDENTITY_MAP_ADDR", lambda: bare.vm.set_identity_map_addr(0)) == errno.EINVAL
        assert refused("KVM_ENABLE_CAP", lambda: bare.vm.enable_cap(188, 1 << 20)) == errno.EINVAL
        assert refused("KVM_CREATE_VCPU", lambda: bare.vm.create_vcpu(0)) == errno.EEXIST
        misaligned = memoryview(bare.ram)[1:4097]
        region = bare.vm.set_user_memory_region
        assert refused("KVM_SET_USER_MEMORY_REGION", lambda: region(1, 1 << 20, misaligned)) == errno.EINVAL
        misaligned.release()


@pytest.mark.row("E9")
def test_memory_is_held_while_a_guest_could_write_to_it() -> None:
    """Neither the caller nor Vm.close() can take memory away under a vCPU; the last close lets it go."""
    with Kvm() as kvm, mmap.mmap(-1, mmap.PAGESIZE) as ram:
        vm = kvm.create_vm()
        vm.set_user_memory_region(0, 0, ram)
        vcpu = vm.create_vcpu(0)
        vm.close()
        with pytest.raises(BufferError):
            ram.close()
        vcpu.close()


@pytest.mark.row("E9")
def test_a_slot_lets_go_of_what_it_held() -> None:
    """A buffer that replaces another, and one that KVM refuses, leave no buffer held that no guest sees."""
    with Kvm() as kvm, kvm.create_vm() as vm, mmap.mmap(-1, mmap.PAGESIZE) as last:
        first = mmap.mmap(-1, mmap.PAGESIZE)
        vm.set_user_memory_region(0, 0, first)
        refused("KVM_SET_USER_MEMORY_REGION", lambda: vm.set_user_memory_region(1, 1, last))
        with pytest.raises((BufferError, TypeError)):
            vm.set_user_memory_region(2, 1 << 20, b"read-only")
        with pytest.raises(BufferError):
            first.close()
        vm.set_user_memory_region(0, 0, memoryview(last)[:0])
        first.close()


@pytest.mark.row("E9")
def test_filter_ranges_have_limits() -> None:
    """KVM takes 16 ranges; a 17th, or more MSRs than bits, is a ConfigError and no access past an end."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.set_msr_filter([(3, 0x1000 + n, 1, b"\0") for n in range(16)])
        with pytest.raises(ConfigError, match="17 MSR filter ranges"):
            vm.set_msr_filter([(3, 0x1000 + n, 1, b"\0") for n in range(17)])
        with pytest.raises(ConfigError, match=r"0x10\+9: a bitmap of 8 bits"):
            vm.set_msr_filter([(3, 0x10, 9, b"\0")])


@pytest.mark.row("E13")
def test_the_kernels_clock_can_be_read_and_set() -> None:
    """GET_CLOCK gives host TSC and time of day where its flags say so, and SET_CLOCK is where it goes on."""
    with bare_vm(HLT) as bare:
        bare.vm.set_clock(10**12)
        first, second = bare.vm.get_clock(), bare.vm.get_clock()
        assert first.keys() == {"clock", "flags", "realtime", "host_tsc"}
        assert 10**12 <= first["clock"] <= second["clock"] < 10**12 + 10**9
        assert (first["realtime"] > 0) == bool(first["flags"] & 4)
        assert (first["host_tsc"] > 0) == bool(first["flags"] & 8)
        assert refused("KVM_SET_CLOCK", lambda: bare.vm.set_clock(0, flags=1 << 20)) == errno.EINVAL


# State that goes back as it came

CHANGES = {
    "lapic": {0x80: 0x20, 0xA0: 0x20},  # TPR, and PPR by that
    "xsave": {512: 3, 160: 0x5A},  # XSTATE_BV, XMM0
    "xcrs": {16: 3},  # XCR0
    "debugregs": {0: 0x40},  # DR0
    "vcpu_events": {14: 1},  # NMIs are masked
}
IRQCHIP_CHANGES = ({8 + 2: 0xFF}, {8 + 2: 0xFF}, {8 + 24: 0x11})  # the PICs' IMR, the first redirection entry


def changed(state: bytes, changes: dict[int, int]) -> bytes:
    """Other values for some bytes."""
    return bytes(changes.get(at, byte) for at, byte in enumerate(state))


@pytest.mark.row("E9")
def test_state_goes_back_as_bytes() -> None:
    """What each of these gives can be set, changed, and another length is a ConfigError, not a read past the end."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid(kvm.get_supported_cpuid())
            for name, changes in CHANGES.items():
                state = getattr(vcpu, f"get_{name}")()
                other = changed(state, changes)
                assert other != state
                getattr(vcpu, f"set_{name}")(other)
                assert getattr(vcpu, f"get_{name}")() == other
                with pytest.raises(ConfigError, match=f"of {len(state) - 1} bytes; KVM's struct has {len(state)}"):
                    getattr(vcpu, f"set_{name}")(state[1:])
            for chip in range(3):
                state = vm.get_irqchip(chip)
                other = changed(state, IRQCHIP_CHANGES[chip])
                assert other != state
                vm.set_irqchip(other)
                assert vm.get_irqchip(chip) == other
            with pytest.raises(ConfigError, match="irqchip of 3 bytes"):
                vm.set_irqchip(b"abc")
            assert refused("KVM_GET_IRQCHIP", lambda: vm.get_irqchip(3)) == errno.EINVAL


@pytest.mark.row("J-07")
def test_many_msrs_at_once() -> None:
    """They come by index, TSC_ADJUST as any other; of several writes the error names the first that KVM refuses."""
    with bare_vm(HLT) as bare:
        vcpu = bare.vcpus[0]
        vcpu.set_cpuid(bare.kvm.get_supported_cpuid())  # without its bit KVM ignores writes of TSC_ADJUST
        vcpu.set_msrs({0x174: 8, 0x3B: 2**64 - 5, 0xC0000082: 0x1000})
        assert vcpu.get_msrs([0xC0000082, 0x174, 0x3B]) == {0xC0000082: 0x1000, 0x174: 8, 0x3B: 2**64 - 5}
        with pytest.raises(KvmError, match=r"KVM_SET_MSRS 0xdead0000"):
            vcpu.set_msrs({0x174: 9, 0xDEAD0000: 1, 0xC0000082: 2})
        assert vcpu.get_msrs([0x174, 0xC0000082]) == {0x174: 9, 0xC0000082: 0x1000}


@pytest.mark.row("J-07")
def test_of_many_msrs_those_that_there_are() -> None:
    """What KVM does not know is left out on request, wherever it stands; else it is an error with its number."""
    unknown = [0xDEAD0000, 0xDEAD0001, 0xDEAD0002]
    mixed = [unknown[0], 0x174, 0x175, unknown[1], 0xC0000082, unknown[2]]
    with bare_vm(HLT) as bare:
        vcpu = bare.vcpus[0]
        vcpu.set_msrs({0x174: 8, 0x175: 9, 0xC0000082: 0x1000})
        assert vcpu.get_msrs(mixed, skips_unknown=True) == {0x174: 8, 0x175: 9, 0xC0000082: 0x1000}
        assert vcpu.get_msrs(unknown, skips_unknown=True) == {}
        with pytest.raises(KvmError, match=r"KVM_GET_MSRS 0xdead0001"):
            vcpu.get_msrs(mixed[1:])


# Registers


@pytest.mark.row("E9")
def test_msrs_of_the_host_side() -> None:
    """The host reads back what it wrote; an MSR that KVM does not know is an error with its number."""
    with bare_vm(HLT) as bare:
        vcpu = bare.vcpus[0]
        vcpu.set_msr(SYSTEM_TIME, RESULT | 1)
        assert vcpu.get_msr(SYSTEM_TIME) == RESULT | 1
        with pytest.raises(KvmError, match="KVM_GET_MSRS 0xdeadbeef"):
            vcpu.get_msr(0xDEADBEEF)
        with pytest.raises(KvmError, match="KVM_SET_MSRS 0xdeadbeef"):
            vcpu.set_msr(0xDEADBEEF, 0)


@pytest.mark.row("E13")
def test_registers_come_back_as_set() -> None:
    """Every general register keeps its 64 bits, and special registers survive a round trip."""
    with bare_vm(HLT) as bare:
        vcpu = bare.vcpus[0]
        wanted = {name: 0x8000000000000000 + number for number, name in enumerate(REGISTERS)} | {"rflags": 2}
        vcpu.set_regs(wanted)
        assert vcpu.get_regs() == wanted
        sregs = vcpu.get_sregs()
        sregs["gdt"] = {"base": 0x5000, "limit": 0x17}
        sregs["fs"].update(base=0x1230, selector=0x123)
        vcpu.set_sregs(sregs)
        assert vcpu.get_sregs() == sregs


@pytest.mark.row("E13")
def test_registers_are_all_or_nothing() -> None:
    """A register that is missing or does not fit is an error of ours before KVM hears of it."""
    with bare_vm(HLT) as bare:
        before = bare.vcpus[0].get_regs()
        with pytest.raises(ConfigError, match="regs lacks 'rip'"):
            bare.vcpus[0].set_regs({name: 0 for name in REGISTERS if name != "rip"})
        with pytest.raises(RangeError, match=r"regs\['rax'\] is 18446744073709551616"):
            bare.vcpus[0].set_regs({**before, "rax": 1 << 64})
        assert bare.vcpus[0].get_regs() == before


@pytest.mark.row("E13")
def test_cpuid_is_what_the_guest_sees() -> None:
    """The guest's CPUID instruction answers with the entries that were set."""
    # mov $0x40000000, %eax; cpuid; mov %ebx, RESULT
    with bare_vm(bytes.fromhex("66b800000040 0fa2 66891e0020") + HLT) as bare:
        entry = {"function": 0x40000000, "index": 0, "flags": 0, "eax": 0, "ebx": 0x4B4D564B, "ecx": 0, "edx": 0}
        others = [e for e in bare.kvm.get_supported_cpuid() if e["function"] < 0x40000000]
        bare.vcpus[0].set_cpuid([*others, entry])
        assert bare.vcpus[0].run() == Halt()
        assert bare.result() == 0x4B4D564B


@pytest.mark.row("E13")
def test_only_the_boot_vcpu_begins_runnable() -> None:
    """With interrupt controllers in the kernel the others wait for their SIPI; a state can be set."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as boot, vm.create_vcpu(1) as other:
            assert (boot.get_mp_state(), other.get_mp_state()) == (0, 1)
            other.set_mp_state(3)
            assert other.get_mp_state() == 3


# Time


@pytest.mark.row("K-15")
def test_tsc_frequency() -> None:
    """The host's own frequency is taken; half of it only by a host that can scale its guests' TSC."""
    with bare_vm(HLT) as bare:
        vcpu = bare.vcpus[0]
        khz = vcpu.get_tsc_khz()
        assert khz > 0
        vcpu.set_tsc_khz(khz)
        if bare.kvm.check_extension("KVM_CAP_TSC_CONTROL"):
            vcpu.set_tsc_khz(khz // 2)
            assert vcpu.get_tsc_khz() == khz // 2
        else:
            assert refused("KVM_SET_TSC_KHZ", lambda: vcpu.set_tsc_khz(khz // 2)) == errno.EINVAL


@pytest.mark.row("K-15")
def test_a_frequency_above_the_hosts_shows_in_the_page_only_where_tscs_are_scaled() -> None:
    """Without TSC scaling KVM takes a higher frequency, and the guest's page goes on by the host's."""
    with bare_vm(b"".join(guests.out(0x10, n) for n in range(3))) as bare:
        vcpu, page = bare.vcpus[0], slice(RESULT + 24, RESULT + 29)  # mul and shift
        vcpu.set_msr(SYSTEM_TIME, RESULT | 1)
        vcpu.run()
        before = bytes(bare.ram[page])
        vcpu.set_tsc_khz(vcpu.get_tsc_khz() * 3 // 2)
        vcpu.set_msr(SYSTEM_TIME, RESULT | 1)
        vcpu.run()
        scales = bool(bare.kvm.check_extension("KVM_CAP_TSC_CONTROL"))
        assert (bytes(bare.ram[page]) != before) == scales


@pytest.mark.row("J-05")
def test_tsc_offset_attribute(tsc_offsets: TscOffsets) -> None:
    """The attribute is there and takes 64 bits; whether the guest's TSC follows is the host's business."""
    with bare_vm(HLT) as bare:
        vcpu = bare.vcpus[0]
        assert vcpu.has_tsc_offset()
        for offset in (0, 1, (1 << 64) - 1):
            vcpu.set_tsc_offset(offset)
            kept = {TscOffsets.HONOURED: {offset}, TscOffsets.IGNORED: {offset, 0}}
            assert tsc_offsets is TscOffsets.STEERED or vcpu.get_tsc_offset() in kept[tsc_offsets]


@pytest.mark.row("K-16", "K-17")
def test_kvmclock_ctrl_needs_a_registered_clock() -> None:
    """KVM says no while the kernel's clock has no page, and shows GUEST_STOPPED in it from the next run on else."""
    with bare_vm(guests.out(0x10, 1) + HLT) as bare:
        vcpu = bare.vcpus[0]
        assert refused("KVM_KVMCLOCK_CTRL", vcpu.kvmclock_ctrl) == errno.EINVAL
        vcpu.set_msr(SYSTEM_TIME, RESULT | 1)
        vcpu.run()
        vcpu.kvmclock_ctrl()
        vcpu.run()
        assert bare.ram[RESULT + 29] & 2


# The kick signal


@pytest.mark.row("E9")
def test_a_kick_signal_in_use_is_refused() -> None:
    """A signal that has a handler, or is ignored, or does not exist, is not taken; ours may be taken again."""
    signum = signal.SIGRTMIN + 5
    for handler in (lambda *_: None, signal.SIG_IGN):
        before = signal.signal(signum, handler)
        try:
            with pytest.raises(StateError, match="choose another kick signal"):
                install_kick_signal(signum)
        finally:
            signal.signal(signum, before)
    install_kick_signal(KICK)
    install_kick_signal(KICK)
    with pytest.raises(RangeError, match="kick_signal is 1000; it can be 1 to 64"):
        install_kick_signal(1000)
    assert refused("sigaction", lambda: install_kick_signal(signal.SIGKILL)) == errno.EINVAL
