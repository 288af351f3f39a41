"""A machine of ours as a tree of objects, where QEMU has them: /machine, its vCPUs, its devices, its clock, its RAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from pvclock import GuestClock
from pvclock.kvm import Vcpu
from pvclock.machine import Machine
from pvclock.machine.bus import Claim
from pvclock.machine.devices import Console, ExitPort
from pvclock.machine.devices.pvpanic import Pvpanic
from pvclock.machine.devices.reset_ports import KeyboardController
from pvclock.machine.devices.uart import Uart
from pvclock.state.clock_state import ClockState
from qemu_glue.errors import QmpRefusal
from qemu_glue.face.devices import DEVICE, Device, DeviceClass
from qemu_glue.face.kvmclock_device import KVMCLOCK, KvmclockModel
from qemu_glue.face.objects import CONTAINER, OBJECT, Object, ObjectType
from qemu_glue.face.properties import BOOL, INT, STRING, UINT32, UINT64, Property, structure
from qemu_glue.face.pvclock_device import PVCLOCK, PvclockModel

__all__ = ["MACHINE_TYPES", "RAM", "MachineTree", "ram_bytes"]

RAM: Final = "pvclock.ram"
"""What the RAM is called as an object, and as a region of memory."""


class Cpu(NamedTuple):
    """A vCPU, and who has it."""

    machine: Machine
    vcpu: Vcpu

    @property
    def tsc_hz(self) -> int:
        """The TSC frequency that the guest was told, in Hz; 0 where KVM does not tell it."""
        if self.machine.clock is not None:
            return self.machine.clock.tsc_hz
        with self.machine.runner.quiesce():
            return self.vcpu.get_tsc_khz() * 1000


def _refuse(_model: Any) -> None:  # noqa: ANN401
    raise QmpRefusal("this device is part of its machine, and goes with it")


def _part(type_: ObjectType) -> DeviceClass:
    """The class of devices that a machine has for good."""
    return DeviceClass(type_, unrealize=_refuse, is_hotpluggable=False)


def ram_bytes(machine: Machine) -> int:
    """How much RAM it has."""
    return sum(length for _, length in machine.memory.slots)


# What there is

MACHINE: Final = ObjectType("machine", OBJECT, "A virtual machine.", is_abstract=True)
PVCLOCK_MACHINE: Final = ObjectType(
    "pvclock-machine",
    MACHINE,
    "A machine of pvclock's.",
    (
        Property(
            "smp",
            structure("SMPConfiguration"),
            "How many vCPUs there are, and can be.",
            lambda machine: {"cpus": len(machine.vcpus), "maxcpus": machine.max_vcpus},
        ),
        Property(
            "memory",
            structure("MemorySizeConfiguration"),
            "Its RAM, in bytes.",
            lambda machine: {"size": ram_bytes(machine)},
        ),
        Property("append", STRING, "The kernel's command line.", lambda machine: machine.boot_source.cmdline),
    ),
)
MEMORY_BACKEND: Final = ObjectType("memory-backend", OBJECT, "Memory of the host's.", is_abstract=True)
MEMFD: Final = ObjectType(
    "memory-backend-memfd",
    MEMORY_BACKEND,
    "The RAM: a memfd.",
    (
        Property("size", INT, "In bytes.", ram_bytes),
        Property("share", BOOL, "Can another process have it, too?", lambda _machine: True),
        Property("prealloc", BOOL, "Are all its pages there from the start?", lambda _machine: False),
    ),
)
CPU: Final = ObjectType("cpu", DEVICE, "A vCPU.", is_abstract=True)
X86_CPU: Final = ObjectType("x86_64-cpu", CPU, "A vCPU of x86-64.", is_abstract=True)
HOST_CPU: Final = _part(
    ObjectType(
        "host-x86_64-cpu",
        X86_CPU,
        "A vCPU with all features of the host's CPU that KVM supports.",
        (
            Property("apic-id", UINT32, "Its APIC's number.", lambda device: device.model.vcpu.vcpu_id),
            Property(
                "tsc-frequency",
                INT,
                "The TSC frequency that the guest was told, in Hz; 0 where KVM does not tell it.",
                lambda device: device.model.tsc_hz,
            ),
        ),
    )
)
ISA_DEVICE: Final = ObjectType(
    "isa-device",
    DEVICE,
    "A device at I/O ports.",
    (
        Property("iobase", UINT32, "Its first port.", lambda device: device.model.base),
        Property("iosize", UINT32, "How many ports it has.", lambda device: device.model.length),
    ),
    is_abstract=True,
)
NAME: Final = Property("name", STRING, "What its machine calls it.", lambda device: device.model.name)
PORT_DEVICE: Final = _part(ObjectType("pvclock-port-device", ISA_DEVICE, "Any other device at I/O ports.", (NAME,)))
MEMORY_DEVICE: Final = _part(
    ObjectType(
        "pvclock-memory-device",
        DEVICE,
        "A device at guest-physical addresses.",
        (
            NAME,
            Property("base", UINT64, "Its first address.", lambda device: device.model.base),
            Property("size", UINT64, "How many bytes it has.", lambda device: device.model.length),
        ),
    )
)
QEMUS: Final[dict[type, DeviceClass]] = {
    Console: _part(ObjectType("isa-debugcon", ISA_DEVICE, "The debug console.")),
    ExitPort: _part(ObjectType("isa-debug-exit", ISA_DEVICE, "A write to it ends the run.")),
    Uart: _part(ObjectType("isa-serial", ISA_DEVICE, "The serial port.")),
    Pvpanic: _part(ObjectType("pvpanic", ISA_DEVICE, "By it a guest's kernel tells that it has panicked.")),
    KeyboardController: _part(ObjectType("i8042", ISA_DEVICE, "The keyboard controller: its reset line alone.")),
}
"""Devices of ours that are as QEMU's of that name, as far as they go."""

MACHINE_TYPES: Final = (
    CONTAINER,
    PVCLOCK_MACHINE,
    MEMFD,
    *(each.type for each in (HOST_CPU, KVMCLOCK, PVCLOCK, PORT_DEVICE, MEMORY_DEVICE, *QEMUS.values())),
)
"""The types of what a machine can have; their parents beside."""


class MachineTree:
    """The objects of `machine`.

    vCPUs that were there from the start are /machine/unattached/device[0] and so on, devices behind them; later ones
    are in /machine/peripheral-anon.  The engine's clock is /machine/peripheral/pvclock.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._root = Object(CONTAINER)
        self._root.add("objects", Object(CONTAINER)).add(RAM, Object(MEMFD, machine))
        top = self._root.add("machine", Object(PVCLOCK_MACHINE, machine))
        self._peripheral = top.add("peripheral", Object(CONTAINER))
        self._anonymous = top.add("peripheral-anon", Object(CONTAINER))
        self._unattached = top.add("unattached", Object(CONTAINER))
        self._cpus: list[Object] = []
        self._claims: list[Claim] = []
        self._add_cpus(self._unattached, is_hotplugged=False)
        self._add_clock()
        self._add_devices()

    def root(self) -> Object:
        """The root, with what has come to the machine by now."""
        self._add_cpus(self._anonymous, is_hotplugged=True)
        self._add_devices()
        return self._root

    def cpu_path(self, place: int) -> str:
        """The path of the vCPU at that place of Machine.vcpus."""
        self.root()
        return self._cpus[place].path

    def _add_cpus(self, where: Object, *, is_hotplugged: bool) -> None:
        for vcpu in self._machine.vcpus[len(self._cpus) :]:
            self._cpus.append(_plug(where, HOST_CPU, Cpu(self._machine, vcpu), is_hotplugged=is_hotplugged))

    def _add_clock(self) -> None:
        machine = self._machine
        if machine.clock is None:
            kvmclock = KVMCLOCK._replace(unrealize=_refuse, is_hotpluggable=False)
            _plug(self._unattached, kvmclock, KvmclockModel(machine.vm))
        else:
            pvclock = PVCLOCK._replace(unrealize=_refuse, is_hotpluggable=False)
            device = Device(pvclock, _clock_model(machine))
            self._peripheral.add("pvclock", device.object)
            device.realize()

    def _add_devices(self) -> None:
        """Those on the bus; its reserved ranges are none."""
        bus = self._machine.bus
        for claims, other in ((bus.port_claims, PORT_DEVICE), (bus.memory_claims, MEMORY_DEVICE)):
            for claim in claims:
                if claim.device is not None and claim not in self._claims:
                    self._claims.append(claim)
                    _plug(self._unattached, QEMUS.get(type(claim.device), other), claim)


def _plug(where: Object, device_class: DeviceClass, model: object, *, is_hotplugged: bool = False) -> Object:
    device = Device(device_class, model, is_hotplugged=is_hotplugged)
    device.realize()
    return where.add("device[*]", device.object)


def _clock_model(machine: Machine) -> PvclockModel:
    """Of its clock, which is another one after a roll_back()."""

    def find() -> GuestClock:
        assert machine.clock is not None  # noqa: S101  # who serves the clock does not change
        return machine.clock

    def restore(state: ClockState) -> Callable[[], GuestClock]:
        machine.roll_back(state)
        return find

    return PvclockModel(lambda _options: find, restore)
