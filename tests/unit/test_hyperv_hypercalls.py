"""Hyper-V's hypercalls: registers, the control word, who may call, parameters, repetitions, and each call's answers."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack, unpack

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pvclock import ConfigError, MsrFault
from pvclock.providers.hyperv.features import Privilege, Recommendation
from pvclock.providers.hyperv.hypercall_abi import (
    HvStatus,
    Request,
    read_request,
)
from pvclock.providers.hyperv.hypercalls import Hypercalls
from pvclock.providers.interface import HypercallRegisters, HypercallResult, Status
from tests.unit.hyperv_provider import EVERY_PROFILE, KickingVmm, a_provider
from tests.unit.hyperv_provider import OS_ID as OS_NAME
from tests.unit.stub_clock import GUARD, SIZE, NotedVmm, StubClock, written

SPIN_WAIT, SEND_IPI, SEND_IPI_EX, GET_REGISTERS, POST_MESSAGE = 0x08, 0x0B, 0x15, 0x50, 0x5C
POST_DEBUG, RETRIEVE_DEBUG, RESET_DEBUG = 0x69, 0x6A, 0x6B
CAPABILITIES, ZEROED_MEMORY = 0x8001, 0x8002
SERVED = (SPIN_WAIT, SEND_IPI, SEND_IPI_EX, GET_REGISTERS, POST_MESSAGE, CAPABILITIES)
FAST = 1 << 16
EVERYTHING = Privilege(sum(Privilege))
ALL_RECOMMENDED = Recommendation(sum(Recommendation))
CLUSTER_IPI, EX_MASKS = Recommendation.CLUSTER_IPI, Recommendation.EX_PROCESSOR_MASKS
SIMP, SINT2 = 0x40000083, 0x40000092
INPUT, OUTPUT = 0x2000, 0x3000
U64 = st.integers(0, 2**64 - 1)
RESERVED_BITS = (*range(27, 31), *range(44, 48), *range(60, 64))
REFERENCE_COUNT, REFERENCE_TSC, VP_INDEX, OS_ID = 0x90004, 0x90017, 0x90003, 0x90002
VCPUS = 130


def read_msr(vcpu: int, index: int) -> int:
    """A value that says which vCPU's and which MSR it is; the synthetic timers are not offered."""
    if 0x400000B0 <= index <= 0x400000B7:
        raise MsrFault(index)
    return vcpu << 32 | index


class Guest:
    """A VM of 130 vCPUs, its notes and its calls.  privileges: None to serve all calls, whatever is offered."""

    def __init__(
        self,
        *,
        privileges: Privilege | None = None,
        recommendations: Recommendation = ALL_RECOMMENDED,
        as_virtualbox: bool = False,
        vs_interface: bool = False,
        read: Callable[[int, int], int] = read_msr,
        vmm: object = None,
    ) -> None:
        self.vmm = NotedVmm()
        self.clock = StubClock(VCPUS, vmm=self.vmm if vmm is None else vmm)  # type: ignore[arg-type]
        self.memory = self.clock.memory
        self.hypercalls = Hypercalls(
            self.clock,
            VCPUS,
            read_msr=read,
            as_virtualbox=as_virtualbox,
            vs_interface=vs_interface,
        )
        if privileges is not None:
            self.hypercalls.deny_all_but(privileges, recommendations)

    def raw(self, control: int, first: int = INPUT, second: int = OUTPUT, vcpu: int = 0) -> HypercallResult:
        """A call from 64-bit code."""
        return self.hypercalls.call(vcpu, HypercallRegisters(0xDEAD, rcx=control, rdx=first, r8=second))

    def call(self, control: int, first: int = INPUT, second: int = OUTPUT, vcpu: int = 0) -> tuple[HvStatus, int]:
        """Status and repetitions of such a call."""
        result = self.raw(control, first, second, vcpu)
        assert result.status is Status.SUCCESS
        assert result.rax is not None
        assert result.rdx is None
        return HvStatus(result.rax & 0xFFFF), result.rax >> 32


# Registers and the control word


@pytest.mark.row("H-60", "H-61")
@given(values=st.tuples(U64, U64, U64, U64, U64, U64, U64), long_mode=st.booleans())
def test_registers_are_decoded(values: tuple[int, ...], long_mode: bool) -> None:
    """RCX, RDX and R8 in 64-bit code; EDX:EAX, EBX:ECX and EDI:ESI in 32-bit code, upper halves ignored."""
    rax, rbx, rcx, rdx, rsi, rdi, r8 = values
    low = [value % 2**32 for value in values]
    in_32_bits = (low[3] * 2**32 + low[0], low[1] * 2**32 + low[2], low[5] * 2**32 + low[4])
    control, first, second = (rcx, rdx, r8) if long_mode else in_32_bits
    registers = HypercallRegisters(rax, rbx, rcx, rdx, rsi, rdi, long_mode=long_mode, r8=r8)
    bits = f"{control:064b}"[::-1]

    def field(low: int, high: int) -> int:
        return int(bits[low : high + 1][::-1], 2)

    assert read_request(3, registers) == Request(
        vcpu=3,
        code=field(0, 15),
        fast=bits[16] == "1",
        header_words=field(17, 26),
        rep_count=field(32, 43),
        rep_start=field(48, 59),
        reserved=sum(1 << bit for bit in RESERVED_BITS if bits[bit] == "1"),
        input=first,
        output=second,
    )


@pytest.mark.row("H-60", "H-68")
def test_the_result_of_32_bit_code_is_in_two_registers() -> None:
    """Status in EAX and completed repetitions in EDX; in 64-bit code both in RAX."""
    guest = Guest()
    guest.memory.write(INPUT, pack("<QIIII", 2**64 - 1, 0, 0, VP_INDEX, OS_ID))
    in_64_bits = HypercallRegisters(0, rcx=GET_REGISTERS | 2 << 32, rdx=INPUT, r8=OUTPUT)
    in_32_bits = HypercallRegisters(GET_REGISTERS, rdx=2, rbx=0, rcx=INPUT, rdi=0, rsi=OUTPUT, long_mode=False)
    assert guest.hypercalls.call(0, in_64_bits) == HypercallResult(Status.SUCCESS, 2 << 32, None)
    assert guest.hypercalls.call(0, in_32_bits) == HypercallResult(Status.SUCCESS, 0, 2)
    refused = in_32_bits._replace(rsi=OUTPUT + 1)
    assert guest.hypercalls.call(0, refused) == HypercallResult(Status.SUCCESS, HvStatus.INVALID_ALIGNMENT, 0)


@pytest.mark.row("H-68")
def test_result_codes_are_the_specifications() -> None:
    """The numbers of HV_STATUS_*."""
    assert {status.name: status.value for status in HvStatus} == {
        "SUCCESS": 0,
        "INVALID_HYPERCALL_CODE": 2,
        "INVALID_HYPERCALL_INPUT": 3,
        "INVALID_ALIGNMENT": 4,
        "INVALID_PARAMETER": 5,
        "ACCESS_DENIED": 6,
        "OPERATION_DENIED": 8,
        "INVALID_PARTITION_ID": 13,
        "INVALID_VP_INDEX": 14,
        "INVALID_CONNECTION_ID": 18,
        "NOT_ACKNOWLEDGED": 20,
        "NO_DATA": 27,
        "INSUFFICIENT_BUFFER": 51,
    }


@pytest.mark.row("H-61")
@pytest.mark.parametrize("bit", RESERVED_BITS)
@pytest.mark.parametrize("code", [SPIN_WAIT, SEND_IPI_EX, 0x7FFF])
def test_reserved_bits(bit: int, code: int) -> None:
    """Each of them makes the input invalid, of unknown calls too."""
    assert Guest().call(code | 1 << bit) == (HvStatus.INVALID_HYPERCALL_INPUT, 0)


@pytest.mark.row("H-61")
def test_a_call_for_the_hypervisor_below_is_served_here() -> None:
    """Bit 31 is not reserved."""
    assert Guest().call(SPIN_WAIT | 1 << 31) == (HvStatus.SUCCESS, 0)


@pytest.mark.row("H-61", "H-62")
@given(upper=st.integers(0, 2**47 - 1))
def test_virtualbox_looks_at_the_call_code_alone(upper: int) -> None:
    """Its test of reserved bits shifts to the wrong side and never fires; nor does it mind the form of a call."""
    guest = Guest(as_virtualbox=True)
    assert guest.call(CAPABILITIES | upper << 17) == (HvStatus.SUCCESS, 0)
    assert guest.call(SPIN_WAIT | upper << 17) == (HvStatus.INVALID_HYPERCALL_CODE, 0)


@pytest.mark.row("H-62")
@pytest.mark.parametrize("as_virtualbox", [False, True])
def test_unknown_calls(as_virtualbox: bool) -> None:
    """Every other code is invalid, and nothing is done."""
    known = {POST_MESSAGE, CAPABILITIES}
    known |= {POST_DEBUG, RETRIEVE_DEBUG, RESET_DEBUG, ZEROED_MEMORY} if as_virtualbox else set(SERVED)
    guest = Guest(as_virtualbox=as_virtualbox)
    for code in set(range(1 << 16)) - known:
        assert guest.call(code) == (HvStatus.INVALID_HYPERCALL_CODE, 0)
    assert (written(guest.memory), guest.vmm.notes) == ([], [])
    for code in known:
        status, reps = guest.call(code)
        assert status is not HvStatus.INVALID_HYPERCALL_CODE
        assert reps == 0


FORMS = {
    SPIN_WAIT: "fast",
    SEND_IPI: "fast",
    SEND_IPI_EX: "header",
    GET_REGISTERS: "reps",
    POST_MESSAGE: "",
    CAPABILITIES: "",
}


BITS_OF_FORM = [("fast", FAST), ("header", 1 << 17), ("reps", 1 << 32), ("reps", 1 << 48)]
REFUSED_FORMS = [code | bits for code, form in FORMS.items() for kind, bits in BITS_OF_FORM if kind != form]


@pytest.mark.row("H-62")
@pytest.mark.parametrize("control", REFUSED_FORMS)
def test_forms_that_a_call_cannot_have(control: int) -> None:
    """Fast, with a variable header, with repetitions: where a call has no such form, its input is invalid."""
    guest = Guest()
    guest.memory.write(INPUT, bytes(64))
    assert guest.call(control) == (HvStatus.INVALID_HYPERCALL_INPUT, 0)
    assert guest.vmm.notes == []


@pytest.mark.row("H-62")
def test_forms_that_a_call_can_have() -> None:
    """One call of each form succeeds, so that the form was what the others were refused for."""
    guest = Guest()
    assert guest.call(SPIN_WAIT | FAST) == (HvStatus.SUCCESS, 0)
    assert guest.call(SEND_IPI | FAST, 0x20, 1) == (HvStatus.SUCCESS, 0)
    guest.memory.write(INPUT, pack("<IIQQQ", 0x20, 0, 0, 1, 1))
    assert guest.call(SEND_IPI_EX | 1 << 17) == (HvStatus.SUCCESS, 0)
    guest.memory.write(INPUT, pack("<QIII", 2**64 - 1, 0, 0, VP_INDEX))
    assert guest.call(GET_REGISTERS | 1 << 32) == (HvStatus.SUCCESS, 1)
    assert guest.call(CAPABILITIES) == (HvStatus.SUCCESS, 0)


# Who may call


@pytest.mark.row("H-64")
@pytest.mark.parametrize("as_virtualbox", [False, True])
@pytest.mark.parametrize("code", [*SERVED, 0x7FFF])
@pytest.mark.parametrize(("cpl", "protected_mode"), [(1, True), (2, True), (3, True), (0, False), (3, False)])
def test_outside_ring_0_of_protected_mode(cpl: int, protected_mode: bool, code: int, as_virtualbox: bool) -> None:
    """Every call, unknown ones too, is #UD: denied, without a register changed and with nothing done."""
    guest = Guest(as_virtualbox=as_virtualbox)
    registers = HypercallRegisters(0, rcx=code | FAST, rdx=0x20, r8=1, cpl=cpl, protected_mode=protected_mode)
    for each in (registers, registers._replace(long_mode=False, rax=code | FAST)):
        assert guest.hypercalls.call(0, each) == HypercallResult(Status.ACCESS_DENIED, None, None)
    assert (written(guest.memory), guest.vmm.notes) == ([], [])


@pytest.mark.row("H-68")
@pytest.mark.parametrize(
    ("code", "privilege"),
    [
        (GET_REGISTERS, Privilege.ACCESS_VP_REGISTERS),
        (POST_MESSAGE, Privilege.POST_MESSAGES),
        (CAPABILITIES, Privilege.EXTENDED_HYPERCALLS),
    ],
)
def test_calls_without_their_privilege(code: int, privilege: Privilege) -> None:
    """They are denied, before anything else is looked at."""
    without = Guest(privileges=Privilege(int(EVERYTHING) - int(privilege)))
    assert without.call(code) == without.call(code | 1 << 60) == (HvStatus.ACCESS_DENIED, 0)
    assert Guest(privileges=privilege).call(code)[0] is not HvStatus.ACCESS_DENIED


@pytest.mark.row("H-62", "H-68", "H-22")
@pytest.mark.parametrize("recommended", [Recommendation(0), CLUSTER_IPI, EX_MASKS, CLUSTER_IPI | EX_MASKS])
def test_calls_that_are_not_recommended(recommended: Recommendation) -> None:
    """IPIs need bit 10 of leaf 0x40000004, those to many vCPUs also bit 11; nobody is told to tell of long spins."""
    without = ALL_RECOMMENDED & ~(CLUSTER_IPI | EX_MASKS)
    guest = Guest(privileges=EVERYTHING, recommendations=without | recommended)
    send, send_ex = guest.call(SEND_IPI | FAST, 0x20, 1)[0], guest.call(SEND_IPI_EX)[0]
    assert (send is HvStatus.ACCESS_DENIED) is (CLUSTER_IPI not in recommended)
    assert (send_ex is HvStatus.ACCESS_DENIED) is (recommended != CLUSTER_IPI | EX_MASKS)
    assert guest.vmm.notes == [("inject", 0, 0x20)] * (CLUSTER_IPI in recommended)
    assert guest.call(SPIN_WAIT | FAST) == (HvStatus.ACCESS_DENIED, 0)


@pytest.mark.row("H-62", "H-68")
@pytest.mark.parametrize("enforce_cpuid", [True, False])
def test_the_provider_enforces_cpuid_for_hypercalls(enforce_cpuid: bool) -> None:
    """As KVM with KVM_CAP_HYPERV_ENFORCE_CPUID: otherwise what is not recommended is served all the same."""
    provider, clock = a_provider(enforce_cpuid=enforce_cpuid)
    provider.write_msr(0, 0x40000000, OS_NAME)
    answers = [
        provider.hypercall(0, HypercallRegisters(0, rcx=code | FAST, rdx=0x20, r8=1)) for code in (SPIN_WAIT, SEND_IPI)
    ]
    status = HvStatus.ACCESS_DENIED if enforce_cpuid else HvStatus.SUCCESS
    assert answers == [HypercallResult(Status.SUCCESS, status)] * 2
    assert isinstance(clock.vmm, NotedVmm)
    assert clock.vmm.notes == [("inject", 0, 0x20)] * (not enforce_cpuid)


@pytest.mark.row("H-68", "H-67")
@pytest.mark.parametrize("code", [CAPABILITIES, ZEROED_MEMORY])
def test_virtualbox_denies_extended_calls_that_are_not_offered(code: int) -> None:
    """As Linux does."""
    assert Guest(as_virtualbox=True, privileges=Privilege(0)).call(code) == (HvStatus.ACCESS_DENIED, 0)


# Parameters in memory


@pytest.mark.row("H-63")
@pytest.mark.parametrize("as_virtualbox", [False, True])
@pytest.mark.parametrize("offset", range(1, 8))
def test_parameters_are_aligned(offset: int, as_virtualbox: bool) -> None:
    """An address that is no multiple of 8 is refused, wherever it is, and nothing is written."""
    guest = Guest(as_virtualbox=as_virtualbox)
    for gpa in (OUTPUT, SIZE, 2**64 - 8):
        assert guest.call(CAPABILITIES, second=gpa + offset) == (HvStatus.INVALID_ALIGNMENT, 0)
    assert written(guest.memory) == []


@pytest.mark.row("H-63")
@pytest.mark.parametrize("as_virtualbox", [False, True])
@pytest.mark.parametrize("gpa", [SIZE, SIZE + 0x1000, 2**52, 2**64 - 0x1000])
def test_parameters_are_in_ram(gpa: int, as_virtualbox: bool) -> None:
    """Where there is no memory the input is invalid; VirtualBox calls it the parameter."""
    guest = Guest(as_virtualbox=as_virtualbox)
    refused = HvStatus.INVALID_PARAMETER if as_virtualbox else HvStatus.INVALID_HYPERCALL_INPUT
    assert guest.call(CAPABILITIES, second=gpa) == (refused, 0)
    assert guest.call(CAPABILITIES, second=SIZE - 8) == (HvStatus.SUCCESS, 0)
    if not as_virtualbox:
        assert guest.call(SEND_IPI, first=gpa) == guest.call(GET_REGISTERS | 1 << 32, first=gpa) == (refused, 0)


@pytest.mark.row("H-63")
@pytest.mark.parametrize("room", range(8, 48, 8))
def test_parameters_do_not_cross_a_page(room: int) -> None:
    """Input and output of a call end in the page in which they begin."""
    guest = Guest()
    first = INPUT - room
    guest.memory.write(first, pack("<QIIIIII", 2**64 - 1, 0, 0, VP_INDEX, VP_INDEX, VP_INDEX, VP_INDEX))
    expected = (HvStatus.SUCCESS, 4) if room >= 32 else (HvStatus.INVALID_ALIGNMENT, 0)
    assert guest.call(GET_REGISTERS | 4 << 32, first) == expected
    guest.memory.write(INPUT, pack("<QIII", 2**64 - 1, 0, 0, VP_INDEX))
    expected = (HvStatus.SUCCESS, 1) if room >= 16 else (HvStatus.INVALID_ALIGNMENT, 0)
    assert guest.call(GET_REGISTERS | 1 << 32, INPUT, OUTPUT - room) == expected


@pytest.mark.row("H-63", "H-67")
def test_virtualbox_lets_parameters_cross_a_page() -> None:
    """Its answer of 16 bytes begins in one page and ends in the next."""
    guest = Guest(as_virtualbox=True)
    assert guest.call(ZEROED_MEMORY, second=OUTPUT - 8) == (HvStatus.SUCCESS, 0)
    assert guest.memory.read(OUTPUT - 8, 16) == bytes(16)


@pytest.mark.row("H-63", "E8")
@pytest.mark.parametrize("as_virtualbox", [False, True])
@given(control=U64, first=U64, second=U64, vcpu=st.integers(0, VCPUS - 1))
def test_no_call_does_harm(control: int, first: int, second: int, vcpu: int, as_virtualbox: bool) -> None:
    """Whatever a guest chooses, it gets a status, and interrupts are fixed ones to vCPUs that there are."""
    guest = Guest(as_virtualbox=as_virtualbox)
    for code in (*SERVED, POST_DEBUG, RETRIEVE_DEBUG, RESET_DEBUG, ZEROED_MEMORY):
        status, reps = guest.call(control >> 16 << 16 | code, first, second, vcpu)
        assert status in HvStatus
        assert reps <= control >> 32 & 0xFFF
    for name, target, vector in guest.vmm.notes:
        assert name == "inject"
        assert 0 <= int(str(target)) < VCPUS
        assert 0x10 <= int(str(vector)) <= 0xFF


# Interrupts


@pytest.mark.row("H-62")
@given(vector=st.integers(0, 2**32 - 1), mask=U64, fast=st.booleans(), reserved=st.integers(0, 1))
def test_interrupts_to_the_first_64(vector: int, mask: int, fast: bool, reserved: int) -> None:
    """Each vCPU in the mask gets the vector, from registers or from memory; vectors are 16 to 255."""
    guest = Guest()
    if fast:
        outcome = guest.call(SEND_IPI | FAST, reserved << 32 | vector, mask)
    else:
        guest.memory.write(INPUT, pack("<IIQ", vector, reserved, mask))
        outcome = guest.call(SEND_IPI)
    if reserved or not 16 <= vector <= 255:
        assert (outcome, guest.vmm.notes) == ((HvStatus.INVALID_HYPERCALL_INPUT, 0), [])
    else:
        assert outcome == (HvStatus.SUCCESS, 0)
        assert guest.vmm.notes == [("inject", vcpu, vector) for vcpu in range(64) if mask & 2**vcpu]


@pytest.mark.row("H-62")
@given(banks=st.dictionaries(st.integers(0, 63), U64, max_size=8), extra=st.integers(-1, 1), vector=st.integers(0, 300))
def test_interrupts_to_a_sparse_set(banks: dict[int, int], extra: int, vector: int) -> None:
    """A mask of 64 vCPUs for each valid bank, in order; numbers that no vCPU has are ignored."""
    guest = Guest()
    masks = [mask for _, mask in sorted(banks.items())]
    valid = sum(1 << bank for bank in banks)
    guest.memory.write(INPUT, pack(f"<IIQQ{len(masks)}Q", vector, 0, 0, valid, *masks))
    words = max(len(masks) + extra, 0)
    outcome = guest.call(SEND_IPI_EX | words << 17)
    if words != len(masks) or (banks and not 16 <= vector <= 255):
        assert (outcome, guest.vmm.notes) == ((HvStatus.INVALID_HYPERCALL_INPUT, 0), [])
        return
    targets = [vcpu for vcpu in range(VCPUS) if banks.get(vcpu // 64, 0) & 2 ** (vcpu % 64)]
    assert outcome == (HvStatus.SUCCESS, 0)
    assert guest.vmm.notes == [("inject", vcpu, vector) for vcpu in targets]


@pytest.mark.row("H-62")
@pytest.mark.parametrize(("vector", "status"), [(0xF, 3), (0x10, 0), (0xFF, 0), (0x100, 3)])
def test_interrupts_to_all(vector: int, status: int) -> None:
    """Format 1 is every vCPU, without a bank."""
    guest = Guest()
    guest.memory.write(INPUT, pack("<IIQQ", vector, 0, 1, 0))
    assert guest.call(SEND_IPI_EX) == (HvStatus(status), 0)
    assert guest.vmm.notes == ([] if status else [("inject", vcpu, vector) for vcpu in range(VCPUS)])


@pytest.mark.row("H-62")
def test_without_a_vmm_that_raises_interrupts() -> None:
    """The two calls are unknown then."""

    class Deaf:
        """Does nothing that hypercalls may ask."""

    guest = Guest(vmm=Deaf())
    assert guest.call(SEND_IPI | FAST, 0x20, 1) == guest.call(SEND_IPI_EX) == (HvStatus.INVALID_HYPERCALL_CODE, 0)


# Registers, the call with repetitions

NAMES = (OS_ID, VP_INDEX, REFERENCE_COUNT, REFERENCE_TSC)
MSRS = {OS_ID: 0x40000000, VP_INDEX: 0x40000002, REFERENCE_COUNT: 0x40000020, REFERENCE_TSC: 0x40000021}


@pytest.mark.row("H-62", "H-61")
@given(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=256), start=st.integers(0, 300))
@example(names=[OS_ID, VP_INDEX], start=1)
@example(names=[OS_ID, VP_INDEX], start=2)
def test_repetitions_begin_where_the_guest_says(names: list[int], start: int) -> None:
    """Values are written from the start index on, and all that are done count, those before it included."""
    guest = Guest()
    guest.memory.write(INPUT, pack(f"<QII{len(names)}I", 2**64 - 1, 7, 0, *names))
    outcome = guest.call(GET_REGISTERS | len(names) << 32 | start << 48)
    if start >= len(names):
        assert (outcome, guest.memory.read(OUTPUT, 4096)) == (
            (HvStatus.INVALID_HYPERCALL_INPUT, 0),
            bytes([GUARD] * 4096),
        )
        return
    assert outcome == (HvStatus.SUCCESS, len(names))
    expected = [value for name in names[start:] for value in (7 << 32 | MSRS[name], 0)]
    assert list(unpack(f"<{2 * len(names)}Q", guest.memory.read(OUTPUT, 16 * len(names))))[2 * start :] == expected
    rest = guest.memory.read(OUTPUT, 4096)
    assert set(rest[: 16 * start] + rest[16 * len(names) :]) <= {GUARD}


@pytest.mark.row("H-62", "H-68")
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize(("name", "status"), [(0x20000, 5), (0xB0000, 6), (0xB0007, 6), (0xB0008, 5)])
def test_repetitions_end_at_the_first_that_fails(position: int, name: int, status: int) -> None:
    """Those before it are done and counted: an unknown register is invalid, one that is not offered is denied."""
    guest = Guest()
    names = [REFERENCE_COUNT] * 4
    names[position] = name
    guest.memory.write(INPUT, pack("<QII4I", 2**64 - 1, 0, 0, *names))
    assert guest.call(GET_REGISTERS | 4 << 32) == (HvStatus(status), position)
    values = unpack("<4Q", b"".join(guest.memory.read(OUTPUT + 16 * each, 8) for each in range(4)))
    guard = int.from_bytes(bytes([GUARD] * 8), "little")
    assert list(values) == [0x40000020] * position + [guard] * (4 - position)


@pytest.mark.row("H-62", "H-68")
@pytest.mark.parametrize(
    ("partition", "index", "trust_level", "status"),
    [
        (2**64 - 1, 2**32 - 2, 0, 0),
        (2**64 - 1, VCPUS - 1, 0, 0),
        (2**64 - 1, VCPUS, 0, 0xE),
        (2**64 - 1, 2**32 - 1, 0, 0xE),
        (1, 0, 0, 0xD),
        (2**64 - 1, 0, 1, 5),
    ],
)
def test_whose_registers(partition: int, index: int, trust_level: int, status: int) -> None:
    """A vCPU of this VM by number, or the caller itself; no other partition and no other trust level."""
    guest = Guest()
    guest.memory.write(INPUT, pack("<QIII", partition, index, trust_level, VP_INDEX))
    assert guest.call(GET_REGISTERS | 1 << 32, vcpu=5) == (HvStatus(status), 0 if status else 1)
    if not status:
        vcpu = 5 if index == 2**32 - 2 else index
        assert guest.memory.read(OUTPUT, 16) == pack("<QQ", vcpu << 32 | 0x40000002, 0)


@pytest.mark.row("H-62")
def test_more_repetitions_than_a_page_holds() -> None:
    """256 values fill the output; 257 cross its page, and nothing is done."""
    guest = Guest()
    guest.memory.write(INPUT, pack("<QII257I", 2**64 - 1, 0, 0, *[VP_INDEX] * 257))
    assert guest.call(GET_REGISTERS | 257 << 32) == (HvStatus.INVALID_ALIGNMENT, 0)
    assert set(guest.memory.read(OUTPUT, 8192)) == {GUARD}
    assert guest.call(GET_REGISTERS | 256 << 32) == (HvStatus.SUCCESS, 256)


# Messages


@pytest.mark.row("H-65")
def test_a_message_has_nobody_to_go_to() -> None:
    """No connection is there, on Linux without a VMBus; what is posted is checked all the same."""
    guest = Guest()
    guest.memory.write(INPUT, pack("<IIII", 1, 0, 1, 240))
    assert guest.call(POST_MESSAGE) == (HvStatus.INVALID_CONNECTION_ID, 0)
    guest.memory.write(INPUT, pack("<IIII", 1, 0, 1, 241))
    assert guest.call(POST_MESSAGE) == (HvStatus.INVALID_PARAMETER, 0)
    guest.memory.write(INPUT - 16, pack("<IIII", 1, 0, 1, 240))
    assert guest.call(POST_MESSAGE, INPUT - 16) == (HvStatus.INVALID_ALIGNMENT, 0)
    assert guest.vmm.notes == []


ANSWER = bytes([1, 0, 0, 0, 0xF]) + bytes(11) + bytes([0xF]) + bytes(239)


@pytest.mark.row("H-65")
@pytest.mark.parametrize(("connection", "kind"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(
    ("simp", "sint", "expects"),
    [
        (0x5001, 0x33, True),
        (0x5000, 0x33, False),
        (0x5001, 0x10033, False),
        (SIZE | 1, 0x33, False),
        (2**64 - 0x1000 | 1, 0x33, False),
        (None, 0x33, False),
        (0x5001, None, False),
    ],
)
def test_virtualbox_imitates_vmbus(
    simp: int | None, sint: int | None, expects: bool, connection: int, kind: int
) -> None:
    """With the VS interface the slot of SINT2 gets a fixed answer, if it is to get any; no call is acknowledged."""

    def read(vcpu: int, index: int) -> int:
        value = {SIMP: simp, SINT2: sint}[index]
        if vcpu != 3 or value is None:
            raise MsrFault(index)
        return value

    guest = Guest(as_virtualbox=True, vs_interface=True, read=read)
    guest.memory.write(INPUT, pack("<IIII", connection, 0, kind, 0))
    assert guest.call(POST_MESSAGE, vcpu=3) == (HvStatus.NOT_ACKNOWLEDGED, 0)
    answered = expects and (connection, kind) == (1, 1)
    assert written(guest.memory)[1:] == ([0x5200] if answered else [])
    assert guest.memory.read(0x5200, 257) == (ANSWER if answered else bytes([GUARD] * 256)) + bytes([GUARD])


@pytest.mark.row("H-65")
def test_virtualbox_denies_messages_without_the_vs_interface() -> None:
    """And with it, an input that cannot be read is an invalid parameter, an unaligned one too."""
    assert Guest(as_virtualbox=True).call(POST_MESSAGE) == (HvStatus.ACCESS_DENIED, 0)
    guest = Guest(as_virtualbox=True, vs_interface=True)
    assert guest.call(POST_MESSAGE, INPUT + 1) == (HvStatus.INVALID_PARAMETER, 0)
    assert guest.call(POST_MESSAGE, SIZE) == (HvStatus.INVALID_PARAMETER, 0)
    assert written(guest.memory) == []


# Extended calls


@pytest.mark.row("H-67")
@pytest.mark.parametrize(("as_virtualbox", "capabilities"), [(False, 0), (True, 1)])
def test_extended_capabilities(as_virtualbox: bool, capabilities: int) -> None:
    """Linux has none; VirtualBox says that it reports memory that is zero since boot."""
    guest = Guest(as_virtualbox=as_virtualbox)
    assert guest.call(CAPABILITIES) == (HvStatus.SUCCESS, 0)
    assert guest.memory.read(OUTPUT, 9) == pack("<QB", capabilities, GUARD)


@pytest.mark.row("H-67")
def test_zeroed_memory() -> None:
    """Its report is that of no page, in either form that VirtualBox has had; elsewhere there is no such call."""
    guest = Guest(as_virtualbox=True)
    assert guest.call(ZEROED_MEMORY) == (HvStatus.SUCCESS, 0)
    assert guest.memory.read(OUTPUT, 17) == bytes(16) + bytes([GUARD])
    assert Guest().call(ZEROED_MEMORY) == (HvStatus.INVALID_HYPERCALL_CODE, 0)


@pytest.mark.row("H-66")
@pytest.mark.parametrize("code", [POST_DEBUG, RETRIEVE_DEBUG, RESET_DEBUG])
def test_debug_calls_without_a_debugger(code: int) -> None:
    """Linux does not know them then; VirtualBox denies them."""
    assert Guest().call(code) == (HvStatus.INVALID_HYPERCALL_CODE, 0)
    assert Guest(as_virtualbox=True).call(code) == (HvStatus.ACCESS_DENIED, 0)


# In the provider


@pytest.mark.row("H-64", "H-60", "H-68", "G-11")
@EVERY_PROFILE
def test_the_provider_serves_them_once_the_guest_has_said_its_os_id(profile: str) -> None:
    """Before that they are not enabled; then they are served by the profile's rules and the offer's privileges."""
    provider, clock = a_provider(profile=profile, privileges=0x60)
    call = HypercallRegisters(0, rcx=CAPABILITIES, r8=OUTPUT)
    assert provider.hypercall(0, call) == HypercallResult(Status.NOT_ENABLED)
    provider.write_msr(0, 0x40000000, OS_NAME)
    provider.write_msr(0, 0x40000001, 0x5001)
    assert provider.hypercall(0, call) == HypercallResult(Status.SUCCESS, HvStatus.ACCESS_DENIED)
    assert provider.hypercall(0, call._replace(cpl=3)) == HypercallResult(Status.ACCESS_DENIED)
    reserved = call._replace(rcx=0x7FFF | 1 << 60)
    unknown = HvStatus.INVALID_HYPERCALL_CODE if profile == "virtualbox" else HvStatus.INVALID_HYPERCALL_INPUT
    assert provider.hypercall(0, reserved) == HypercallResult(Status.SUCCESS, unknown)
    assert set(clock.memory.read(OUTPUT, 8)) == {GUARD}
    generous, _ = a_provider(profile=profile, privileges=0x60, enforce_cpuid=False)
    generous.write_msr(0, 0x40000000, OS_NAME)
    generous.write_msr(0, 0x40000001, 0x5001)
    assert generous.hypercall(0, call) == HypercallResult(Status.SUCCESS, HvStatus.SUCCESS)


@pytest.mark.row("H-62")
def test_the_provider_reads_its_registers_by_hypercall() -> None:
    """With the privilege, the reference counter is what its MSR reads; it is not offered unasked."""
    everything = 0x60 | 1 << 1 | 1 << 49
    provider, clock = a_provider(privileges=everything)
    provider.write_msr(0, 0x40000000, OS_NAME)
    clock.memory.write(INPUT, pack("<QIIII", 2**64 - 1, 2**32 - 2, 0, REFERENCE_COUNT, OS_ID))
    call = HypercallRegisters(0, rcx=GET_REGISTERS | 2 << 32, rdx=INPUT, r8=OUTPUT)
    assert provider.hypercall(1, call) == HypercallResult(Status.SUCCESS, 2 << 32)
    assert unpack("<4Q", clock.memory.read(OUTPUT, 32)) == (provider.read_msr(1, 0x40000020), 0, OS_NAME, 0)
    assert not a_provider()[0].offer.privileges & Privilege.ACCESS_VP_REGISTERS


@pytest.mark.row("H-62", "H-22")
def test_interrupts_by_hypercall_are_recommended_on_request() -> None:
    """Bits 10 and 11 of leaf 0x40000004, where the VMM raises interrupts; not unasked, and not on VirtualBox."""
    wanted = Recommendation.CLUSTER_IPI | Recommendation.EX_PROCESSOR_MASKS
    provider, _ = a_provider(recommendations=int(wanted))
    assert provider.cpuid_leaves[0x40000004].eax == 1 << 10 | 1 << 11
    assert not a_provider()[0].offer.recommendations & wanted
    for options in ({"vmm": KickingVmm()}, {"profile": "virtualbox"}):
        with pytest.raises(ConfigError, match=r"recommendations CLUSTER_IPI\|EX_PROCESSOR_MASKS cannot be served"):
            a_provider(recommendations=int(wanted), **options)


@pytest.mark.row("H-65")
def test_the_provider_imitates_vmbus_by_its_own_synic() -> None:
    """Where VirtualBox's guest may use the SynIC, which CPUID does not offer it, its SINT2 gets the answer."""
    provider, clock = a_provider(profile="virtualbox", vs_interface=True, enforce_cpuid=False)
    for index, value in ((0x40000000, OS_NAME), (SIMP, 0x7001), (SINT2, 0x33)):
        provider.write_msr(1, index, value)
    clock.memory.write(INPUT, pack("<IIII", 1, 0, 1, 0))
    call = HypercallRegisters(0, rcx=POST_MESSAGE, rdx=INPUT)
    for vcpu, answer in ((0, bytes(256)), (1, ANSWER)):
        assert provider.hypercall(vcpu, call) == HypercallResult(Status.SUCCESS, HvStatus.NOT_ACKNOWLEDGED)
        assert clock.memory.read(0x7200, 256) == answer
