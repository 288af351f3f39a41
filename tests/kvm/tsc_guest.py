"""Real-mode guests whose vCPUs each go through a list of steps with their TSC, and can be stopped in between."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

from pvclock import Machine
from pvclock.boot import EntryState, enter
from pvclock.kvm import open_kvm
from tests.kvm.guests import write_msr
from tests.waiting import HANG_S

TSC: Final = 0x10
TSC_ADJUST: Final = 0x3B

CODE: Final = 0x8000
LOG: Final = 0x2000
BYTES_EACH: Final = 0x400
MAY_PASS: Final = 0x1800
HAS_REACHED: Final = 0x1810
STARTED_AT: Final = 0x10000
MP_STATE_RUNNABLE: Final = 0

APIC_BASE: Final = 0x1B
APIC_BASE_X2APIC: Final = 0xFEE00D00
"""Enabled as an x2APIC, the boot vCPU's."""
X2APIC_ICR: Final = 0x830
ICR_INIT: Final = 0x4500
ICR_SIPI: Final = 0x4600


class Step(NamedTuple):
    """RDTSC, RDMSR or WRMSR, or wait until the host lets the guest pass mark `value`."""

    what: Literal["rdtsc", "rdmsr", "wrmsr", "wait"]
    msr: int = 0
    value: int = 0


TO_X2APIC: Final = Step("wrmsr", APIC_BASE, APIC_BASE_X2APIC)
"""Of the boot vCPU, whose APIC has MSRs from then on; a step of its own, because it makes KVM find new APICs."""


class TscGuest(NamedTuple):
    """A running machine whose vCPUs go through their steps."""

    machine: Machine
    steps: Sequence[Sequence[Step]]

    def wait_until_all_reach(self, mark: int) -> None:
        """Return once every vCPU waits at `mark`."""
        deadline = time.monotonic() + HANG_S
        while any(self.machine.memory.read(HAS_REACHED + vcpu, 1)[0] < mark for vcpu in range(len(self.steps))):
            assert time.monotonic() < deadline, f"not all vCPUs came to mark {mark}"
            assert not self.machine.runner.join(0.001), self.machine.wait()

    def let_pass(self, mark: int) -> None:
        """Let every vCPU go on from `mark`."""
        for vcpu in range(len(self.steps)):
            self.machine.memory.write(MAY_PASS + vcpu, bytes([mark]))

    def results(self, vcpu: int) -> list[int]:
        """What RDTSC and RDMSR gave so far, in the order of the steps; 0 for what is still to come."""
        log = self.machine.memory.read(LOG + vcpu * BYTES_EACH, 8 * _reads(self.steps[vcpu]))
        return [int.from_bytes(log[at : at + 8], "little") for at in range(0, len(log), 8)]


@contextmanager
def tsc_guest(
    clock: Literal["engine", "kernel"], *steps: Sequence[Step], present: int | None = None, **options: object
) -> Iterator[TscGuest]:
    """A machine with one vCPU for each list of steps, running; each ends at a last mark, 255.

    present: how many of them there are; another begins its steps once it was added and another has gone through
    sipi_steps().
    offer_tsc_adjust=False hides IA32_TSC_ADJUST, whoever serves the clock.
    """
    hidden = clock == "kernel" and not options.pop("offer_tsc_adjust", True)
    image = b"\xf4"  # HLT; every vCPU, the first one too, is entered elsewhere
    vcpus = present or len(steps)
    with Machine(image, vcpus=vcpus, max_vcpus=len(steps), memory_bytes=1 << 20, clock=clock, **options) as machine:  # type: ignore[arg-type]
        for vcpu, each in enumerate(steps):
            code = CODE + vcpu * BYTES_EACH
            machine.memory.write(code, _program(vcpu, [*each, Step("wait", value=255)]))
            machine.memory.write(_started_at(vcpu), b"\xea" + _u16(code) + _u16(0))  # ljmp $0, $code
        for vcpu in range(vcpus):
            code = CODE + vcpu * BYTES_EACH
            if hidden:
                _hide_tsc_adjust(machine, vcpu)
            enter(machine.vcpus[vcpu], EntryState("real", code, {}))
            machine.vcpus[vcpu].set_mp_state(MP_STATE_RUNNABLE)
        machine.start()
        yield TscGuest(machine, steps)


def sipi_steps(vcpu: int) -> list[Step]:
    """Start vCPU by INIT and SIPI to its APIC id, after TO_X2APIC."""
    to = vcpu << 32
    return [
        Step("wrmsr", X2APIC_ICR, to | ICR_INIT),
        Step("wrmsr", X2APIC_ICR, to | ICR_SIPI | _started_at(vcpu) >> 12),
    ]


def _started_at(vcpu: int) -> int:
    """Where vCPU begins after a SIPI: a page of its own."""
    return STARTED_AT + vcpu * 0x1000


def _hide_tsc_adjust(machine: Machine, vcpu: int) -> None:
    with open_kvm() as kvm:
        entries = [entry for entry in kvm.get_supported_cpuid() if entry["function"] >> 28 != 4]  # none of KVM's
    for entry in entries:
        if (entry["function"], entry["index"]) == (7, 0):
            entry["ebx"] &= ~2
    machine.vcpus[vcpu].set_cpuid(entries)


def _reads(steps: Sequence[Step]) -> int:
    return sum(step.what in ("rdtsc", "rdmsr") for step in steps)


def _program(vcpu: int, steps: Sequence[Step]) -> bytes:
    code, log = b"", LOG + vcpu * BYTES_EACH
    for step in steps:
        if step.what == "wait":
            code += b"\xc6\x06" + _u16(HAS_REACHED + vcpu) + bytes([step.value])  # movb $mark, HAS_REACHED
            code += b"\x80\x3e" + _u16(MAY_PASS + vcpu) + bytes([step.value]) + b"\x72\xf9"  # 1: cmpb; jb 1b
        elif step.what == "wrmsr":
            code += write_msr(step.msr, step.value)
        else:
            code += b"\x0f\x31" if step.what == "rdtsc" else b"\x66\xb9" + step.msr.to_bytes(4, "little") + b"\x0f\x32"
            code += b"\x66\xa3" + _u16(log) + b"\x66\x89\x16" + _u16(log + 4)
            log += 8
    assert len(code) <= BYTES_EACH
    return code


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "little")
