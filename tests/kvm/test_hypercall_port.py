"""What a provider is told of a vCPU that makes a hypercall by a port: its registers, its ring and its mode."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any, Final

import pytest

from pvclock import HypercallRegisters, HypercallResult, Status
from pvclock.kvm import Vcpu
from pvclock.kvm._gate import Gate
from pvclock.kvm.exits import IoOut
from pvclock.machine.hypercall_port import HypercallPort
from tests.kvm.guests import CODE, HLT, REGISTERS, bare_vm, out
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("H-60", "H-64")]

PORT: Final = 0x5A
PE, PG, PAE, LME, LMA = 1 << 0, 1 << 31, 1 << 5, 1 << 8, 1 << 10
RFLAGS_VM: Final = 1 << 17
KICK_SIGNAL: Final = signal.SIGRTMIN + 2

PAGING: Final = {"cr0": PE | PG, "cr4": PAE, "efer": LME | LMA}
MODES: Final[dict[str, tuple[dict[str, int], dict[str, int], dict[str, bool | int]]]] = {
    "real mode": ({}, {}, {"cpl": 0, "long_mode": False, "protected_mode": False}),
    "ring 0": ({"cr0": PE}, {}, {"cpl": 0, "long_mode": False, "protected_mode": True}),
    "ring 3": ({"cr0": PE}, {"dpl": 3}, {"cpl": 3, "long_mode": False, "protected_mode": True}),
    "64-bit code": (PAGING, {"l": 1, "db": 0}, {"cpl": 0, "long_mode": True, "protected_mode": True}),
    "compatibility mode": (PAGING, {"l": 0, "db": 1}, {"cpl": 0, "long_mode": False, "protected_mode": True}),
}


def a_port(vcpu: Vcpu) -> HypercallPort:
    """One for that vCPU alone, with a gate that is open."""
    return HypercallPort([vcpu], Gate([vcpu], KICK_SIGNAL))


@pytest.mark.parametrize("mode", MODES)
def test_registers_and_mode(mode: str) -> None:
    """All 64 bits of the registers, and what the segments and control registers say; results change RAX and RDX."""
    control, segment, expected = MODES[mode]
    values = {name: (number + 1) * 0x0101010101010101 for number, name in enumerate(REGISTERS)}
    with bare_vm(out(PORT, 0) + HLT) as bare:
        [vcpu] = bare.vcpus
        assert type(vcpu.run()) is IoOut
        sregs: dict[str, Any] = vcpu.get_sregs()
        for name in ("cs", "ss") if segment else ():
            sregs[name].update(segment)
        vcpu.set_sregs({**sregs, **control})
        given = {**vcpu.get_regs(), **{name: values[name] for name in values if name not in ("rip", "rflags", "rsp")}}
        vcpu.set_regs(given)
        calls: list[HypercallRegisters] = []

        def answer(_: int, registers: HypercallRegisters) -> HypercallResult:
            calls.append(registers)
            return HypercallResult(Status.SUCCESS, 2**64 - 1, rdx=2**63)

        a_port(vcpu).serve(0, answer)
        [call] = calls
        assert call._asdict() == {
            **{name: given[name] for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8")},
            **expected,
        }
        assert vcpu.get_regs() == {**given, "rax": 2**64 - 1, "rdx": 2**63}


def test_virtual_8086_mode() -> None:
    """It is no protected mode, though CR0.PE is set."""
    with bare_vm(out(PORT, 0) + HLT) as bare:
        [vcpu] = bare.vcpus
        assert type(vcpu.run()) is IoOut
        vcpu.set_sregs({**vcpu.get_sregs(), "cr0": PE})
        vcpu.set_regs({**vcpu.get_regs(), "rflags": RFLAGS_VM | 2})
        if not vcpu.get_regs()["rflags"] & RFLAGS_VM:
            pytest.skip("this host's KVM has no virtual-8086 mode; `make test-lab` runs it on one that has")
        calls: list[HypercallRegisters] = []

        def answer(_: int, registers: HypercallRegisters) -> HypercallResult:
            calls.append(registers)
            return HypercallResult(Status.SUCCESS)

        a_port(vcpu).serve(0, answer)
        assert [call.protected_mode for call in calls] == [False]


@pytest.mark.parametrize("status", [Status.NOT_ENABLED, Status.CONTINUING])
def test_the_instruction_is_the_next_one_again(status: Status) -> None:
    """RIP is where the OUT is, before its #UD and for one that continues; and only the former is on its way."""
    with bare_vm(out(PORT, 0) + HLT) as bare:
        [vcpu] = bare.vcpus
        assert type(vcpu.run()) is IoOut
        a_port(vcpu).serve(0, lambda *_: HypercallResult(status))
        assert vcpu.get_regs()["rip"] == CODE + 2
        is_injected, vector = vcpu.get_vcpu_events()[:2]
        assert (is_injected, vector if is_injected else 6) == (status is Status.NOT_ENABLED, 6)


def is_on_the_way(vcpu: Vcpu) -> bool:
    """Is #UD on its way to the guest?"""
    return vcpu.get_vcpu_events()[:2] == bytes((1, 6))


def test_a_paused_vcpu_is_left_alone() -> None:
    """A hypercall that ends during a pause changes RIP and sends its #UD at resume(), and nothing before."""
    with bare_vm(out(PORT, 0) + HLT) as bare:
        [vcpu] = bare.vcpus
        assert type(vcpu.run()) is IoOut
        gate = Gate([vcpu], KICK_SIGNAL)
        port = HypercallPort([vcpu], gate)
        gate.pause()
        before = vcpu.get_regs()
        answer = HypercallResult(Status.NOT_ENABLED)
        serving = threading.Thread(target=port.serve, args=(0, lambda *_: answer), daemon=True)
        serving.start()
        time.sleep(0.1)
        assert serving.is_alive()
        assert (vcpu.get_regs(), is_on_the_way(vcpu)) == (before, False)
        gate.resume()
        serving.join(HANG_S)
        assert vcpu.get_regs()["rip"] == CODE + 2
        assert is_on_the_way(vcpu)
        with gate.hold():  # which waits for who is in
            pass


def test_a_run_that_has_ended() -> None:
    """A hypercall that ends after the run leaves its #UD all the same, for the next run to begin with."""
    with bare_vm(out(PORT, 0) + HLT) as bare:
        [vcpu] = bare.vcpus
        assert type(vcpu.run()) is IoOut
        gate = Gate([vcpu], KICK_SIGNAL)
        gate.end()
        HypercallPort([vcpu], gate).serve(0, lambda *_: HypercallResult(Status.NOT_ENABLED))
        assert vcpu.get_regs()["rip"] == CODE + 2
        assert is_on_the_way(vcpu)
