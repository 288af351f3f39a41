"""Hypervisor CPUID leaves on a real vCPU: what CPUID returns at leaf 0x40000010, and where KVM's leaves begin."""

from __future__ import annotations

from struct import pack, unpack

import pytest

from pvclock.machine import EXIT_PORT, Machine
from tests.kvm.guests import out

pytestmark = pytest.mark.kvm

LEAVES = (0x40000000, 0x40000001, 0x40000002, 0x40000010)
DATA = 0x5000
LIMIT_S = 20.0


def ask(leaf: int, at: int) -> bytes:
    """Real-mode code: CPUID `leaf`, EAX and EBX of it to `at`."""
    mov_eax, store = b"\x66\xb8" + pack("<I", leaf), b"\x66\xa3" + pack("<H", at)
    return mov_eax + b"\x0f\xa2" + store + b"\x66\x89\x1e" + pack("<H", at + 4)


@pytest.mark.row("E22", "M-02", "K-38")
@pytest.mark.parametrize("timing_leaf", [False, True])
def test_what_a_guest_finds(timing_leaf: bool) -> None:
    """With the leaf a guest reads its TSC's kHz and the APIC bus beside KVM's signature; without it there is none."""
    code = b"".join(ask(leaf, DATA + 8 * number) for number, leaf in enumerate(LEAVES)) + out(EXIT_PORT, 0)
    with Machine(code, timing_leaf=timing_leaf) as machine:
        assert machine.clock is not None
        machine.start()
        assert machine.wait(LIMIT_S) == 0
        base, features, between, timing = (unpack("<II", machine.memory.read(DATA + 8 * n, 8)) for n in range(4))
        assert base == (0x40000010 if timing_leaf else 0x40000001, int.from_bytes(b"KVMK", "little"))
        assert features[0] & 1 << 3
        assert between == (0, 0)
        khz = (machine.clock.tsc_hz + 500) // 1000
        assert timing == ((khz, 1_000_000) if timing_leaf else (0, 0))


@pytest.mark.row("K-34", "K-38")
@pytest.mark.parametrize("base", [0x40000000, 0x40000100])
def test_a_guest_finds_kvms_leaves_at_their_base(base: int) -> None:
    """CPUID returns signature and features at the base that was configured; the MSRs that they offer are served."""
    registration = b"\x66\xb9" + pack("<I", 0x4B564D01) + b"\x66\xb8" + pack("<I", 0x6001) + b"\x66\x31\xd2\x0f\x30"
    code = ask(base, DATA) + ask(base + 1, DATA + 8) + registration + out(EXIT_PORT, 0)
    with Machine(code, cpuid_base=base) as machine:
        assert machine.clock is not None
        machine.start()
        assert machine.wait(LIMIT_S) == 0
        leaves = machine.clock.cpuid_leaves
        assert list(leaves) == [base, base + 1]
        found = [unpack("<II", machine.memory.read(DATA + 8 * n, 8)) for n in range(2)]
        assert found == [(leaves[base].eax, leaves[base].ebx), (leaves[base + 1].eax, 0)]
        page = machine.clock.page(0)
        assert page is not None
        assert page.version >= 2
