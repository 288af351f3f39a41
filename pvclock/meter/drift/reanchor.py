"""Every way in which a clock comes to a new anchor on a running guest: the kernel's clock, and the engine's."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Final

from pvclock.meter.drift.readings import Reanchor
from pvclock.meter.machine_guest import MachineGuest

__all__ = ["engine_reanchors", "kernel_reanchors"]

KVM_CLOCK_REALTIME: Final = 1 << 2
KVM_PUBLISHES_S: Final = 0.3
"""KVM may publish 100 ms late."""
REFRESHES: Final = 1000
PAUSE_S: Final = 0.1


def kernel_reanchors(guest: MachineGuest, resources: ExitStack) -> list[Reanchor]:
    """The ways to make KVM anchor its clock anew; the first one shows all of the drift.

    resources: closes the vCPU that one of them adds.
    """
    machine, vm, vcpu = guest.machine, guest.machine.vm, guest.machine.vcpus[0]

    def set_clock(*, with_realtime: bool) -> None:
        now = vm.get_clock()
        flags = KVM_CLOCK_REALTIME if with_realtime else 0
        vm.set_clock(now["clock"], flags=flags, realtime=now["realtime"] if with_realtime else 0)

    def refresh_master_clock() -> None:
        with machine.runner.quiesce(None):
            vcpu.set_tsc_offset(vcpu.get_tsc_offset())

    ways = {
        "master clock refreshed (TSC offset set to what it is)": refresh_master_clock,
        "KVM_GET_CLOCK, KVM_SET_CLOCK with KVM_CLOCK_REALTIME": lambda: set_clock(with_realtime=True),
        "KVM_GET_CLOCK, KVM_SET_CLOCK": lambda: set_clock(with_realtime=False),
        "vCPU hot-plugged": lambda: resources.enter_context(vm.create_vcpu(1)),
    }
    return [Reanchor(name, do, KVM_PUBLISHES_S) for name, do in ways.items()]


def engine_reanchors(guest: MachineGuest) -> list[Reanchor]:
    """The same for the engine's clock."""
    clock = guest.engine_clock

    def refresh_often() -> None:
        for _ in range(REFRESHES):
            clock.refresh()

    def pause_and_resume() -> None:
        guest.machine.pause()
        time.sleep(PAUSE_S)
        guest.machine.resume("advance")

    return [
        Reanchor("refresh()", clock.refresh),
        Reanchor(f"{REFRESHES} refresh()", refresh_often),
        Reanchor(f'pause(), resume("advance") after {PAUSE_S:g} s', pause_and_resume),
    ]
