"""A provider with one timer, a way to ask for a reset, and hypercalls by a port: what needs services of the VMM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from pvclock.msr_ranges import MsrRange
from pvclock.providers import registry
from pvclock.providers.interface import (
    ClockServices,
    Hooks,
    HypercallRegisters,
    HypercallResult,
    InterruptServices,
    ResetServices,
    Status,
)
from pvclock.quantities import U64_MASK
from tests.unit.listening_provider import Listener

__all__ = ["ALARM_MSR", "PORT", "RESET_MSR", "VECTOR", "Alarm", "register"]

ALARM_MSR: Final = 0x40000200
"""A write is the guest time in ns at which the alarm is due, and 0 disarms it."""
RESET_MSR: Final = 0x40000201
VECTOR: Final = 0x51
PORT: Final = 0x5A


class Alarm(Listener):
    """Interrupts the vCPU that set the alarm, every `period_ns` from then on if that is not 0."""

    name = "Alarm"
    msr_ranges: tuple[MsrRange, ...] = (MsrRange(ALARM_MSR, 2, why="its own"),)
    hypercall_port: int | None = PORT
    warnings = ()

    def __init__(self, clock: ClockServices, vcpus: int, *, period_ns: int = 0) -> None:
        super().__init__(clock, vcpus)
        self.period_ns = period_ns
        self.due_ns: int | None = None
        self.vcpu = 0
        self.expired: list[tuple[int, int]] = []
        """(due, expired), guest times in ns."""
        self.deliver: Callable[[], object] = self._inject
        self.answer = HypercallResult(Status.SUCCESS)
        self.calls: list[HypercallRegisters] = []
        self.hooks = Hooks(
            time_changed=lambda is_paused: self.told.append(("time", is_paused)),
            next_due_ns=lambda: self.due_ns,
            expire=self._expire,
        )

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """Arm the alarm, or ask for a reset."""
        vmm: object = self.clock.vmm
        if index == ALARM_MSR:
            self.vcpu, self.due_ns = vcpu, value or None
            self.clock.timers_changed()
        elif index == RESET_MSR and isinstance(vmm, ResetServices):
            vmm.request_reset()

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """What the test wants; by itself RCX + R8 in RAX, and RDX + 1 in RDX."""
        self.calls.append(registers)
        if self.answer != HypercallResult(Status.SUCCESS):
            return self.answer
        return HypercallResult(
            Status.SUCCESS, registers.rcx + registers.r8 & U64_MASK, rdx=registers.rdx + 1 & U64_MASK
        )

    def reset(self) -> None:
        """Disarm it."""
        super().reset()
        self.due_ns = None

    def _expire(self, now_ns: int) -> Callable[[], object] | None:
        if self.due_ns is None or now_ns < self.due_ns:
            return None
        self.expired.append((self.due_ns, now_ns))
        self.due_ns = self.due_ns + self.period_ns if self.period_ns else None
        return self.deliver

    def _inject(self) -> None:
        vmm: object = self.clock.vmm
        if isinstance(vmm, InterruptServices):
            vmm.inject(self.vcpu, VECTOR)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clocks have it by its name."""
    monkeypatch.setitem(registry.PROVIDERS, Alarm.name, Alarm)
