"""QEMU's kvmclock device: a guest's clock that the host's kernel serves, and what a stream holds of it.

Source: QEMU's hw/i386/kvm/clock.c (kvmclock_vmsd, kvmclock_reliable_get_clock).
"""

from __future__ import annotations

from typing import Final

from pvclock.kvm import Vm
from qemu_glue.face.devices import DEVICE, DeviceClass
from qemu_glue.face.objects import ObjectType
from qemu_glue.face.vmstate import BOOL, UINT64, Field, VmState

__all__ = ["KVMCLOCK", "KVMCLOCK_STATE", "RELIABLE_STATE", "KvmclockModel"]

KVM_CLOCK_TSC_STABLE: Final = 1 << 1
"""KVM_GET_CLOCK's flag: what it returned is what the guest's pages show."""


class KvmclockModel:
    """The kernel's clock of `vm`, as a stream has it.

    clock: guest time in ns, when it was saved.  clock_is_reliable: is it what the guest's pages showed?
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.clock = 0
        self.clock_is_reliable = False

    def read(self) -> None:
        """Take it from KVM; the vCPUs are out of the guest, or it is of a while ago by now."""
        found = self._vm.get_clock()
        self.clock = found["clock"]
        self.clock_is_reliable = bool(found["flags"] & KVM_CLOCK_TSC_STABLE)

    def write(self) -> None:
        """Give it to KVM."""
        self._vm.set_clock(self.clock)


RELIABLE_STATE: Final = VmState("kvmclock/clock_is_reliable", 1, 1, (Field("clock_is_reliable", BOOL),))
KVMCLOCK_STATE: Final = VmState(
    "kvmclock",
    1,
    1,
    (Field("clock", UINT64),),
    (RELIABLE_STATE,),
    pre_save=lambda model: model.read(),
    post_load=lambda model: model.write(),
)
KVMCLOCK: Final = DeviceClass(
    ObjectType("kvmclock", DEVICE, "A guest's clock, served by the host's kernel."), vmstate=KVMCLOCK_STATE
)
