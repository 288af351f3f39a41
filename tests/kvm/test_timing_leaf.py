"""Hypervisor CPUID leaves on a real vCPU: what CPUID returns at leaf 0x40000010, and where KVM's leaves begin."""

from __future__ import annotations

from struct import pack, unpack

import pytest

from pvclock.machine import EXIT_PORT, Machine
from tests.kvm import guests
from tests.kvm.guests import out
from tests.waiting import HANG_S

pytestmark = pytest.mark.kvm

LEAVES = (0x40000000, 0x40000001, 0x40000002, 0x40000010)
DATA = 0x5000


def ask(leaf: int, at: int) -> bytes:
    """Real-mode code: CPUID `leaf`, EAX, EBX, ECX and EDX of it to `at`."""
    stores = ((b"\x66\xa3", 0), (b"\x66\x89\x1e", 4), (b"\x66\x89\x0e", 8), (b"\x66\x89\x16", 12))
    code = b"\x66\xb8" + pack("<I", leaf) + b"\x0f\xa2"
    return code + b"".join(store + pack("<H", at + offset) for store, offset in stores)


def told(machine: Machine, number: int) -> tuple[int, int, bytes]:
    """EAX and EBX of a leaf that the guest has asked for, and EBX, ECX and EDX as text."""
    registers = machine.memory.read(DATA + 16 * number, 16)
    return (*unpack("<II", registers[:8]), registers[4:])


@pytest.mark.row("E22", "M-02", "K-38")
@pytest.mark.parametrize("timing_leaf", [False, True])
def test_what_a_guest_finds(timing_leaf: bool) -> None:
    """With the leaf a guest reads its TSC's kHz and the APIC bus beside KVM's signature; without it there is none."""
    code = b"".join(ask(leaf, DATA + 16 * number) for number, leaf in enumerate(LEAVES)) + out(EXIT_PORT, 0)
    with Machine(code, timing_leaf=timing_leaf) as machine:
        assert machine.clock is not None
        machine.start()
        assert machine.wait(HANG_S) == 0
        base, features, between, timing = (told(machine, number) for number in range(4))
        assert (base[0], base[2]) == (0x40000010 if timing_leaf else 0x40000001, b"KVMKVMKVM\0\0\0")
        assert features[0] & 1 << 3
        assert between == (0, 0, bytes(12))
        khz = (machine.clock.tsc_hz + 500) // 1000
        assert timing[:2] == ((khz, 1_000_000) if timing_leaf else (0, 0))


@pytest.mark.row("E22", "E12")
@pytest.mark.parametrize("is_dilated", [False, True])
def test_a_dilation_before_the_start_takes_it_back(is_dilated: bool) -> None:
    """Unasked, a guest finds the leaf where its clock's rate is its TSC's when it boots, and else does not."""
    code = b"".join(ask(leaf, DATA + 16 * number) for number, leaf in enumerate(LEAVES)) + out(EXIT_PORT, 0)
    with Machine(code) as machine:
        clock = machine.clock
        assert clock is not None
        if not clock.backend.tsc_stable:
            pytest.skip("this host's TSC is not trusted, so the leaf is never offered: `make test-lab` runs it")
        if is_dilated:
            clock.dilate(1, 2)
        machine.start()
        assert machine.wait(HANG_S) == 0
        khz = (clock.tsc_hz + 500) // 1000
        assert told(machine, 3)[:2] == ((0, 0) if is_dilated else (khz, 1_000_000))
        assert told(machine, 0)[0] == (0x40000001 if is_dilated else 0x40000010)


@pytest.mark.row("M-01", "M-02", "M-03")
def test_what_a_guest_of_minimal_finds() -> None:
    """A hypervisor without a name, zeros up to leaf 0x40000010, the frequencies there, and #GP for KVM's MSRs."""
    leaves = (0x40000000, *range(0x40000001, 0x40000010), 0x40000010, 1)
    asked = b"".join(ask(leaf, DATA + 16 * number) for number, leaf in enumerate(leaves))
    code = asked + guests.write_msr(0x4B564D01, 0x6001) + out(EXIT_PORT, 0)
    with Machine(code, provider="Minimal", apic_bus_hz=200_000_500) as machine:
        assert machine.clock is not None
        machine.memory.write(4 * guests.GP_VECTOR, pack("<HH", guests.GP_HANDLER, 0))
        machine.memory.write(guests.GP_HANDLER, out(EXIT_PORT, guests.GP_VECTOR))
        machine.start()
        assert machine.wait(HANG_S) == guests.GP_VECTOR
        assert machine.memory.read(0x6000, 32) == bytes(32)
        base, *between, timing, first = (told(machine, number) for number in range(len(leaves)))
        assert (base[0], base[2]) == (0x40000010, bytes(12))
        assert between == [(0, 0, bytes(12))] * 15
        assert timing[:2] == ((machine.clock.tsc_hz + 500) // 1000, 200_001)
        assert int.from_bytes(first[2][4:8], "little") >> 31 == 1


@pytest.mark.row("K-34", "K-38")
@pytest.mark.parametrize("base", [0x40000000, 0x40000100])
def test_a_guest_finds_kvms_leaves_at_their_base(base: int) -> None:
    """CPUID returns signature and features at the base that was configured; the MSRs that they offer are served."""
    registration = b"\x66\xb9" + pack("<I", 0x4B564D01) + b"\x66\xb8" + pack("<I", 0x6001) + b"\x66\x31\xd2\x0f\x30"
    code = ask(base, DATA) + ask(base + 1, DATA + 16) + registration + out(EXIT_PORT, 0)
    with Machine(code, cpuid_base=base, features=1 << 3, timing_leaf=False) as machine:
        assert machine.clock is not None
        machine.start()
        assert machine.wait(HANG_S) == 0
        signature, features = (told(machine, number) for number in range(2))
        assert (signature[0], signature[2]) == (base + 1, b"KVMKVMKVM\0\0\0")
        assert (features[0], features[2]) == (1 << 3, bytes(12))
        page = machine.clock.page(0)
        assert page is not None
        assert page.version >= 2
