"""The Hyper-V debugger's MSRs and hypercalls, over a real debug channel, as Linux and as VirtualBox serve them."""

from __future__ import annotations

from struct import pack, unpack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, MsrFault
from pvclock.providers.hyperv.debug import SyntheticDebugger
from pvclock.providers.hyperv.features import Feature, Privilege, Recommendation, with_debug_leaves
from pvclock.providers.hyperv.hypercall_abi import HvStatus
from pvclock.providers.hyperv.hypercalls import Hypercalls
from pvclock.providers.interface import CpuidLeaf, DebugSetup, HypercallRegisters
from pvclock.providers.virtualbox.debug_channel import DebugChannel, DebugTraffic
from tests.unit.hyperv_provider import EVERY_PROFILE, a_provider, is_refused
from tests.unit.stub_clock import GUARD, SIZE, StubClock, written
from tests.unit.test_debug_channel import Wire

CONTROL, STATUS, SEND_BUFFER, RECEIVE_BUFFER, PENDING_BUFFER, OPTIONS = *range(0x400000F1, 0x400000F6), 0x400000FF
SEND, RECEIVE = 1, 2
SEND_SUCCESS, RECEIVE_SUCCESS = 1, 4
USE_HYPERCALLS = 4
POST, RETRIEVE, RESET = 0x69, 0x6A, 0x6B
FAST = 1 << 16
BUFFER, INPUT, OUTPUT, PENDING = 0x1000, 0x2000, 0x3000, 0x4008
U64 = st.integers(0, 2**64 - 1)


class Stub:
    """A guest's debugger stub, and the wire at the other end of its channel."""

    def __init__(
        self,
        incoming: bytes = b"",
        *,
        room: int = 1 << 20,
        as_virtualbox: bool = False,
        suggests_hypercalls: bool = True,
        is_privileged: bool = True,
    ) -> None:
        self.clock = StubClock()
        self.memory = self.clock.memory
        self.debugger = SyntheticDebugger(
            self.clock, suggests_hypercalls=suggests_hypercalls, as_virtualbox=as_virtualbox
        )
        self.channel = DebugChannel(self.debugger.setup)
        self.wire = Wire(incoming, room)
        self.channel.register(self.wire)
        self.hypercalls = Hypercalls(
            self.clock,
            2,
            read_msr=self.read,
            debugger=self.debugger,
            as_virtualbox=as_virtualbox,
        )
        if not is_privileged:
            self.hypercalls.deny_all_but(Privilege(0), Recommendation(0))

    def read(self, _vcpu: int, index: int) -> int:
        """RDMSR."""
        read = self.debugger.msrs[index].read
        if read is None:
            raise MsrFault(index)
        return read(0)

    def write(self, index: int, value: int) -> None:
        """WRMSR."""
        write = self.debugger.msrs[index].write
        if write is None:
            raise MsrFault(index, value)
        write(0, value)

    def status(self) -> int:
        """The status MSR."""
        return self.read(0, STATUS)

    def call(self, control: int, first: int = INPUT, second: int = OUTPUT) -> HvStatus:
        """A hypercall's status."""
        result = self.hypercalls.call(0, HypercallRegisters(0, rcx=control, rdx=first, r8=second))
        assert result.rax is not None
        return HvStatus(result.rax)


# CPUID, and which MSRs there are


@pytest.mark.row("H-17", "H-02")
def test_leaves_of_the_virtualization_service() -> None:
    """Vendor "Microsoft VS", interface "VS#1", and the bit that allows kernel debugging."""
    leaves = {leaf: pack("<4I", *registers) for leaf, registers in with_debug_leaves({0x40000000: CpuidLeaf()}).items()}
    assert leaves == {
        0x40000000: b"\x82\x00\x00\x40" + bytes(12),
        0x40000080: b"\x82\x00\x00\x40Microsoft VS",
        0x40000081: b"VS#1" + bytes(12),
        0x40000082: bytes([2]) + bytes(15),
    }


@pytest.mark.row("H-44", "H-45")
def test_who_may_read_and_write() -> None:
    """Linux serves all six both ways; VirtualBox has only status and options read, and the options not written."""
    linux, virtualbox = Stub().debugger.msrs, Stub(as_virtualbox=True).debugger.msrs
    assert set(linux) == set(virtualbox) == {CONTROL, STATUS, SEND_BUFFER, RECEIVE_BUFFER, PENDING_BUFFER, OPTIONS}
    assert all(msr.privilege is Feature.DEBUG_MSRS for each in (linux, virtualbox) for msr in each.values())
    assert all(msr.read and msr.write for msr in linux.values())
    assert {index for index, msr in virtualbox.items() if msr.read} == {STATUS, OPTIONS}
    assert {index for index, msr in virtualbox.items() if not msr.write} == {STATUS, OPTIONS}


@pytest.mark.row("H-03", "H-45")
@pytest.mark.parametrize("as_virtualbox", [False, True])
def test_options_suggest_hypercalls_if_configured(as_virtualbox: bool) -> None:
    """Bit 2, from the start and after a reset; on Linux the guest may change it."""
    with_calls = Stub(as_virtualbox=as_virtualbox)
    assert with_calls.read(0, OPTIONS) == USE_HYPERCALLS
    stub = Stub(as_virtualbox=as_virtualbox, suggests_hypercalls=False)
    assert stub.read(0, OPTIONS) == 0
    if not as_virtualbox:
        stub.write(OPTIONS, USE_HYPERCALLS)
        assert stub.call(RESET | FAST, 1) is HvStatus.SUCCESS
        stub.debugger.reset()
        assert stub.call(RESET | FAST, 1) is HvStatus.OPERATION_DENIED


# By MSR


@pytest.mark.row("H-44")
@pytest.mark.parametrize("as_virtualbox", [False, True])
@given(data=st.binary(min_size=1, max_size=4095), junk=st.integers(0, 2**12 - 1))
def test_sending(data: bytes, junk: int, as_virtualbox: bool) -> None:
    """The control word's upper half is the count; the device gets the bytes, and the status says so."""
    stub = Stub(as_virtualbox=as_virtualbox)
    stub.memory.write(BUFFER, data)
    stub.write(SEND_BUFFER, BUFFER)
    stub.write(CONTROL, junk << 32 | len(data) << 16 | SEND)
    assert (stub.wire.outgoing, stub.status()) == (data, SEND_SUCCESS)
    assert stub.channel.traffic == DebugTraffic(transmit=1, transmit_bytes=len(data))


@pytest.mark.row("H-44")
def test_a_device_that_does_not_take_all() -> None:
    """The status has no success, and neither without a device."""
    stub = Stub(room=3)
    stub.write(SEND_BUFFER, BUFFER)
    stub.write(STATUS, SEND_SUCCESS)
    stub.write(CONTROL, 4 << 16 | SEND)
    assert (stub.wire.outgoing, stub.status()) == (bytes([GUARD] * 3), 0)
    stub.channel.unregister()
    stub.write(STATUS, SEND_SUCCESS)
    stub.write(CONTROL, 3 << 16 | SEND)
    assert stub.status() == 0


@pytest.mark.row("H-44")
@pytest.mark.parametrize("as_virtualbox", [False, True])
@pytest.mark.parametrize(("gpa", "count"), [(BUFFER, 0), (BUFFER, 4096), (BUFFER, 0xFFFF), (SIZE, 1), (2**64 - 1, 2)])
def test_what_cannot_be_sent_is_ignored(gpa: int, count: int, as_virtualbox: bool) -> None:
    """A count of nothing or of a page and more, a buffer outside memory: the last status stays."""
    stub = Stub(as_virtualbox=as_virtualbox)
    stub.write(SEND_BUFFER, BUFFER)
    stub.write(CONTROL, 1 << 16 | SEND)
    stub.write(SEND_BUFFER, gpa)
    stub.write(CONTROL, count << 16 | SEND)
    assert (len(stub.wire.outgoing), stub.status()) == (1, SEND_SUCCESS)


@pytest.mark.row("H-44")
@pytest.mark.parametrize("as_virtualbox", [False, True])
@given(incoming=st.binary(min_size=1, max_size=5000))
def test_receiving(incoming: bytes, as_virtualbox: bool) -> None:
    """A page at most at a time, with its size in the status; without data there is no success."""
    stub = Stub(incoming, as_virtualbox=as_virtualbox)
    stub.write(RECEIVE_BUFFER, BUFFER)
    received = b""
    for _ in range(1 + len(incoming) // 4096):
        stub.write(CONTROL, RECEIVE)
        size = stub.status() >> 16
        assert stub.status() & 0xFFFF == (RECEIVE_SUCCESS if size else 0)
        received += stub.memory.read(BUFFER, size)
    assert received == incoming
    stub.write(CONTROL, RECEIVE)
    assert stub.status() == 0


@pytest.mark.row("H-44")
@pytest.mark.parametrize("gpa", [SIZE, SIZE - 4095, 2**64 - 1])
def test_a_receive_buffer_outside_memory(gpa: int) -> None:
    """Nothing is taken from the device, and the last status stays."""
    stub = Stub(b"abc")
    stub.write(RECEIVE_BUFFER, gpa)
    stub.write(STATUS, 0x55)
    stub.write(CONTROL, RECEIVE)
    assert (stub.wire.incoming, stub.status(), written(stub.memory)) == (b"abc", 0x55, [])


@pytest.mark.row("H-44")
def test_both_directions_at_once() -> None:
    """VirtualBox faults and does nothing; Linux sends."""
    virtualbox, linux = Stub(b"abc", as_virtualbox=True), Stub(b"abc")
    for stub in (virtualbox, linux):
        stub.write(SEND_BUFFER, BUFFER)
        stub.write(RECEIVE_BUFFER, BUFFER)
    with pytest.raises(MsrFault, match="at once"):
        virtualbox.write(CONTROL, 1 << 16 | SEND | RECEIVE)
    assert (virtualbox.wire.incoming, virtualbox.wire.outgoing) == (b"abc", b"")
    linux.write(CONTROL, 1 << 16 | SEND | RECEIVE)
    assert (linux.wire.incoming, linux.wire.outgoing, linux.status()) == (b"abc", bytes([GUARD]), SEND_SUCCESS)


@pytest.mark.row("H-44")
@pytest.mark.parametrize("gpa", [PENDING, 0, SIZE, 2**64 - 1])
def test_the_pending_byte(gpa: int) -> None:
    """It is 1 once data have arrived, and 0 once the guest has fetched some; without an address there is none."""
    stub = Stub(b"abc")
    stub.channel.data_arrived()
    assert written(stub.memory) == []
    stub.write(PENDING_BUFFER, gpa)
    stub.channel.data_arrived()
    assert written(stub.memory) == ([PENDING] if gpa == PENDING else [])
    stub.write(RECEIVE_BUFFER, BUFFER)
    if gpa == PENDING:
        assert stub.memory.read(PENDING, 2) == bytes([1, GUARD])
        stub.write(CONTROL, RECEIVE)
        assert stub.memory.read(PENDING, 2) == bytes([0, GUARD])
    assert stub.memory.read(0, 1) == bytes([GUARD])


@pytest.mark.row("H-44")
def test_data_that_arrive_for_a_provider_that_does_not_care() -> None:
    """A channel without a provider's end, or without a provider's debug interface, says nothing to anybody."""
    for setup in (None, DebugSetup(4096)):
        channel = DebugChannel(setup)
        channel.data_arrived()
        assert channel.traffic == DebugTraffic()


@pytest.mark.row("H-44", "H-45")
@given(values=st.tuples(U64, U64, U64, U64, U64))
def test_state_is_saved_and_reset(values: tuple[int, ...]) -> None:
    """Every MSR comes back as it was written; a reset clears all."""
    stub = Stub()
    for index, value in zip((STATUS, SEND_BUFFER, RECEIVE_BUFFER, PENDING_BUFFER, OPTIONS), values, strict=True):
        stub.write(index, value)
    saved = stub.debugger.save()
    other = Stub()
    other.debugger.checked(saved)()
    assert other.debugger.save() == saved
    assert [other.read(0, index) for index in (STATUS, SEND_BUFFER, RECEIVE_BUFFER, PENDING_BUFFER, OPTIONS)] == [
        *values
    ]
    other.debugger.reset()
    assert other.debugger.save() == Stub().debugger.save()


@pytest.mark.row("H-44")
@pytest.mark.parametrize("value", [-1, 2**64, True, "0", None, 1.0])
def test_saved_values_that_no_msr_can_have(value: object) -> None:
    """They are refused, and nothing changes."""
    stub = Stub()
    before = stub.debugger.save()
    with pytest.raises(ConfigError, match="'debug_send'"):
        stub.debugger.checked({**before, "debug_status": 5, "debug_send": value})
    assert stub.debugger.save() == before


# By hypercall


@pytest.mark.row("H-66")
@pytest.mark.parametrize("as_virtualbox", [False, True])
@given(data=st.binary(max_size=4088), options=st.integers(0, 2**32 - 1))
def test_posting(data: bytes, options: int, as_virtualbox: bool) -> None:
    """The device gets the bytes after the two words, and none remain pending."""
    stub = Stub(as_virtualbox=as_virtualbox)
    stub.memory.write(INPUT, pack("<II", len(data), options) + data)
    assert stub.call(POST) is HvStatus.SUCCESS
    assert stub.wire.outgoing == data
    assert stub.memory.read(OUTPUT, 9) == bytes(8) + bytes([GUARD])


@pytest.mark.row("H-66", "H-68")
@pytest.mark.parametrize("as_virtualbox", [False, True])
def test_posting_more_than_the_device_takes(as_virtualbox: bool) -> None:
    """What it did not take is pending, and there was not enough room; more than 4088 bytes never are posted."""
    stub = Stub(room=3, as_virtualbox=as_virtualbox)
    stub.memory.write(INPUT, pack("<II", 10, 0))
    assert stub.call(POST) is HvStatus.INSUFFICIENT_BUFFER
    assert unpack("<II", stub.memory.read(OUTPUT, 8)) == (7, 0)
    stub.memory.write(INPUT, pack("<II", 4089, 0))
    assert stub.call(POST) is HvStatus.INVALID_PARAMETER
    assert stub.wire.outgoing == bytes([GUARD] * 3)


@pytest.mark.row("H-66")
@pytest.mark.parametrize("as_virtualbox", [False, True])
@given(incoming=st.binary(min_size=1, max_size=5000), count=st.integers(1, 4088))
def test_retrieving(incoming: bytes, count: int, as_virtualbox: bool) -> None:
    """As many bytes as have arrived and were asked for, then how many are missing; nothing beside them is written."""
    stub = Stub(incoming, as_virtualbox=as_virtualbox)
    stub.memory.write(INPUT, pack("<IIQ", count, 0, 0))
    got = incoming[:count]
    assert stub.call(RETRIEVE) is HvStatus.SUCCESS
    assert unpack("<II", stub.memory.read(OUTPUT, 8)) == (len(got), count - len(got))
    assert stub.memory.read(OUTPUT + 8, len(got) + 1) == got + bytes([GUARD])
    assert stub.wire.incoming == incoming[count:]


@pytest.mark.row("H-66", "H-68")
@pytest.mark.parametrize("as_virtualbox", [False, True])
@pytest.mark.parametrize(
    ("incoming", "count", "options", "status"),
    [(b"", 5, 0, 0x1B), (b"", 0, 0, 0), (b"abc", 5, 2, 0), (b"abc", 0, 0, 0), (b"abc", 4089, 0, 5)],
)
def test_retrieving_nothing(incoming: bytes, count: int, options: int, status: int, as_virtualbox: bool) -> None:
    """No data, none asked for, a test of activity, too many: nothing is taken from the device."""
    stub = Stub(incoming, as_virtualbox=as_virtualbox)
    stub.memory.write(INPUT, pack("<IIQ", count, options, 0))
    assert stub.call(RETRIEVE) == status
    answered = status != HvStatus.INVALID_PARAMETER
    assert stub.memory.read(OUTPUT, 8) == (pack("<II", 0, count) if answered else bytes([GUARD] * 8))
    assert stub.wire.incoming == incoming


@pytest.mark.row("H-66", "H-63")
@pytest.mark.parametrize("as_virtualbox", [False, True])
def test_no_byte_is_lost_to_parameters_that_cannot_be(as_virtualbox: bool) -> None:
    """Output and input are looked at before the device is."""
    stub = Stub(b"abc", as_virtualbox=as_virtualbox)
    not_ram = HvStatus.INVALID_PARAMETER if as_virtualbox else HvStatus.INVALID_HYPERCALL_INPUT
    stub.memory.write(INPUT, pack("<IIQ", 3, 0, 0))
    for code in (POST, RETRIEVE):
        assert stub.call(code, second=OUTPUT + 4) is HvStatus.INVALID_ALIGNMENT
        assert stub.call(code, second=SIZE) is not_ram
        assert stub.call(code, first=SIZE) is not_ram
    assert (stub.wire.incoming, stub.wire.outgoing) == (b"abc", b"")


@pytest.mark.row("H-66", "H-62")
@pytest.mark.parametrize("as_virtualbox", [False, True])
@pytest.mark.parametrize(("options", "status"), [(0, 5), (1, 0), (2, 0), (2**31, 0)])
def test_resetting_the_session(options: int, status: int, as_virtualbox: bool) -> None:
    """Some direction has to be purged; the options come in a register or in memory."""
    stub = Stub(as_virtualbox=as_virtualbox)
    assert stub.call(RESET | FAST, options) == status
    stub.memory.write(INPUT, pack("<I", options))
    assert stub.call(RESET) == status


@pytest.mark.row("H-66", "H-62", "H-68")
def test_when_debug_calls_are_denied() -> None:
    """Without the privilege everywhere; on Linux also as long as the guest's options say MSRs, and fast transfers."""
    for as_virtualbox in (False, True):
        denied = Stub(is_privileged=False, as_virtualbox=as_virtualbox)
        assert [denied.call(code) for code in (POST, RETRIEVE, RESET)] == [HvStatus.ACCESS_DENIED] * 3
    by_msrs = Stub(suggests_hypercalls=False)
    assert [by_msrs.call(code) for code in (POST, RETRIEVE, RESET)] == [HvStatus.OPERATION_DENIED] * 3
    fast = Stub()
    assert [fast.call(code | FAST) for code in (POST, RETRIEVE)] == [HvStatus.INVALID_HYPERCALL_INPUT] * 2
    virtualbox = Stub(b"a", as_virtualbox=True, suggests_hypercalls=False)
    virtualbox.memory.write(INPUT, pack("<IIQ", 1, 0, 0))
    assert virtualbox.call(RETRIEVE | FAST) is HvStatus.SUCCESS


# In the provider


@pytest.mark.row("H-02", "H-03", "H-44", "H-45", "G-23")
@pytest.mark.parametrize(
    ("options", "has_debugger"),
    [
        ({}, False),
        ({"vs_interface": True}, True),
        ({"vs_interface": True, "hypercall_debug": True}, True),
        ({"profile": "virtualbox"}, False),
        ({"profile": "virtualbox", "vendor_id": "Microsoft Hv"}, True),
        ({"profile": "virtualbox", "vendor_id": "Microsoft Hv", "hypercall_debug": True}, True),
    ],
)
def test_when_the_provider_has_a_debugger(options: dict[str, Any], has_debugger: bool) -> None:
    """With the VS interface, or with Microsoft's vendor id on VirtualBox; elsewhere its MSRs fault."""
    provider, clock = a_provider(**options)
    assert (provider.debug_setup is not None) is has_debugger
    assert is_refused(provider, STATUS) is not has_debugger
    assert is_refused(provider, OPTIONS) is not has_debugger
    assert bool(provider.offer.features & Feature.DEBUG_MSRS) is has_debugger
    assert bool(provider.offer.features & Feature.DEBUG) is has_debugger
    assert bool(provider.offer.privileges & Privilege.DEBUGGING) is has_debugger
    if has_debugger:
        assert provider.read_msr(0, OPTIONS) == (USE_HYPERCALLS if options.get("hypercall_debug") else 0)
        channel, wire = DebugChannel(provider.debug_setup), Wire()
        channel.register(wire)
        provider.write_msr(1, SEND_BUFFER, BUFFER)
        provider.write_msr(1, CONTROL, 2 << 16 | SEND)
        assert (wire.outgoing, provider.read_msr(0, STATUS)) == (clock.memory.read(BUFFER, 2), SEND_SUCCESS)


@pytest.mark.row("H-43")
@EVERY_PROFILE
@pytest.mark.parametrize(
    "index",
    [*range(0x400000C1, 0x400000C4), *range(0x400000D1, 0x400000D4), *range(0x400000E0, 0x400000E4), 0x400000F0],
)
def test_power_statistics_and_idling_are_not_there(index: int, profile: str) -> None:
    """Their MSRs fault, whatever is enforced."""
    provider, _ = a_provider(profile=profile, vs_interface=True, enforce_cpuid=False)
    assert is_refused(provider, index)
    assert is_refused(provider, index, 1)
