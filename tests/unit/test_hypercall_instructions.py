"""The hypercall instruction: which one is native, what decodes as one, how a wrong one is put right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, Gpa, GuestClock, GuestMemory, RangeError, SimulatedBackend
from pvclock.providers import hypercall_instructions
from pvclock.providers.hypercall_instructions import VMCALL, VMMCALL
from pvclock.providers.registry import PROVIDERS

AMD, INTEL = "AuthenticAMD", "GenuineIntel"


@pytest.mark.row("G-12", "G-08")
@pytest.mark.parametrize(
    ("vendor", "opcode"),
    [
        (AMD, "0f01d9"),
        ("HygonGenuine", "0f01d9"),
        (INTEL, "0f01c1"),
        ("CentaurHauls", "0f01c1"),
        ("  Shanghai  ", "0f01c1"),
    ],
)
def test_each_vendor_has_its_instruction(vendor: str, opcode: str) -> None:
    """AMD's CPUs and their kin know VMMCALL, Intel's and theirs VMCALL; the bytes fit in 3 and spoil no other."""
    assert hypercall_instructions.native_opcode(vendor) == bytes.fromhex(opcode)
    buffer = bytearray(b"\xa5" * 5)
    assert hypercall_instructions.put_native_opcode(vendor, buffer) == 3
    assert buffer == bytes.fromhex(opcode) + b"\xa5\xa5"


@pytest.mark.row("G-12")
def test_other_vendors_and_small_buffers_are_refused() -> None:
    """A CPU without a hypercall, and a buffer that is too small, are errors with their values, and write nothing."""
    for vendor in ("Shanghai", "VIA VIA VIA ", "TransmetaCPU", "", "authenticamd"):
        with pytest.raises(ConfigError, match=f"CPU vendor '{vendor}' has no hypercall"):
            hypercall_instructions.native_opcode(vendor)
    buffer = bytearray(2)
    with pytest.raises(RangeError, match="a buffer of 2 bytes; the hypercall instruction has 3"):
        hypercall_instructions.put_native_opcode(INTEL, buffer)
    assert buffer == bytes(2)


@pytest.mark.row("G-13", "V-34")
@pytest.mark.parametrize(
    ("code", "length", "length_32"),
    [
        ("0f01c1", 3, 3),
        ("0f01d9", 3, 3),
        ("0f01c1909090", 3, 3),
        ("2e0f01c1", 4, 4),
        ("65670f01d9", 5, 5),
        ("480f01c1", 4, None),  # REX.W; DEC EAX in 32 bits
        ("482e0f01c1", 5, None),
        ("f00f01c1", None, None),  # LOCK is #UD
        ("f30f01d9", None, None),  # VMGEXIT
        ("660f01c1", None, None),
        ("0f01c2", None, None),  # VMLAUNCH
        ("0f01f9", None, None),  # RDTSCP
        ("0f05", None, None),
        ("0f01", None, None),
        ("", None, None),
        ("2e" * 12 + "0f01c1", 15, 15),
        ("2e" * 13 + "0f01c1", None, None),
        ("2e" * 15, None, None),
    ],
)
def test_what_decodes_as_a_hypercall(code: str, length: int | None, length_32: int | None) -> None:
    """VMCALL and VMMCALL, with prefixes that do nothing to them, up to 15 bytes; nothing else."""
    assert hypercall_instructions.recognized_length(bytes.fromhex(code), long_mode=True) == length
    assert hypercall_instructions.recognized_length(bytes.fromhex(code), long_mode=False) == length_32


@pytest.mark.row("V-33")
def test_ud_is_trapped_where_linux_tries_vmcall_in_vain() -> None:
    """#UD must come to the VMM for guests of KVM on CPUs that know VMMCALL only; Hyper-V's page has VMCALL, too."""
    for provider in PROVIDERS:
        interface = GuestClock(GuestMemory(bytearray(8192)), 1, provider, backend=SimulatedBackend(10**9)).interface
        has_hypercalls = provider not in ("None", "Minimal")
        for vendor in (*hypercall_instructions.NATIVE_OPCODES, "Unheard"):
            assert interface.should_trap_ud(vendor) is (has_hypercalls and vendor in (AMD, "HygonGenuine"))


@pytest.mark.row("V-34")
def test_a_wrong_instruction_is_made_the_cpus_own() -> None:
    """One byte is written, the one that differs; the native instruction, and one with prefixes, are left alone."""
    memory = GuestMemory(bytearray(b"\xa5" * 8192))
    written: list[tuple[int, int]] = []
    memory.on_dirty = lambda gpa, length: written.append((gpa, length))
    memory.write(0x100, VMCALL)
    assert hypercall_instructions.patch(memory, Gpa(0x100), VMCALL, AMD)
    assert memory.read(0xFF, 5) == b"\xa5" + VMMCALL + b"\xa5"
    assert written == [(0x100, 3), (0x102, 1)]
    assert not hypercall_instructions.patch(memory, Gpa(0x100), VMMCALL, AMD)
    memory.write(0x200, b"\x2e" + VMCALL)
    assert not hypercall_instructions.patch(memory, Gpa(0x200), b"\x2e" + VMCALL, AMD)
    assert memory.read(0x200, 4) == b"\x2e" + VMCALL


@pytest.mark.row("V-34")
@pytest.mark.parametrize("gpa", [0xFFE, 0xFFF, 0x2000, 0x1FFE, 2**64 - 1, 2**64 - 3])
def test_what_crosses_pages_or_is_not_in_memory_is_left_alone(gpa: int) -> None:
    """The second page of an instruction may be anywhere, and an address may have no memory: nothing is written."""
    memory = GuestMemory(bytearray(VMCALL * 2731)[:8192])
    assert not hypercall_instructions.patch(memory, Gpa(gpa), VMCALL, AMD)
    assert memory.read(0, 8192) == (VMCALL * 2731)[:8192]


@pytest.mark.row("V-34")
def test_what_has_changed_since_is_left_alone() -> None:
    """If another vCPU has put something else there, that stays."""
    memory = GuestMemory(bytearray(b"\x90" * 4096))
    assert not hypercall_instructions.patch(memory, Gpa(0), VMCALL, AMD)
    assert memory.read(0, 4096) == b"\x90" * 4096


@pytest.mark.row("G-13", "E9")
@given(
    code=st.binary(max_size=20)
    | st.text("\x0f\x01\xc1\xd9\x2e\x48", max_size=20).map(lambda text: text.encode("latin"))
)
def test_decoding_by_a_slow_model(code: bytes) -> None:
    """A hypercall is any run of idle prefixes, then one of the two opcodes, within 15 bytes."""
    idle = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x67, *range(0x40, 0x50)}
    lengths = [
        n + 3 for n in range(13) if set(code[:n]) <= idle and code[n : n + 3] in (b"\x0f\x01\xc1", b"\x0f\x01\xd9")
    ]
    assert hypercall_instructions.recognized_length(code, long_mode=True) == (lengths[0] if lengths else None)
