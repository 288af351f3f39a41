"""What a machine has beside vCPUs, RAM and a clock: devices on its bus and, as a PC, tables of firmware in RAM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from pvclock._memory import GuestMemory
from pvclock.boot import BootSource, EntryState
from pvclock.boot.information import Firmware
from pvclock.errors import StateError
from pvclock.guest_layout import ACPI_TABLES, FIRMWARE_AREA, IDENTITY_MAP, IOAPIC, LOCAL_APIC, RESET_VECTOR
from pvclock.kvm import Vcpu, Vm
from pvclock.machine.acpi import build_tables
from pvclock.machine.arguments import Platform
from pvclock.machine.bus import Bus, CoalescedRing
from pvclock.machine.devices import CONSOLE_PORT, EXIT_PORT, Console, ExitPort
from pvclock.machine.devices.acpi_registers import ACPI_REGISTERS_PORT, AcpiRegisters
from pvclock.machine.devices.power_button import (
    POWER_BUTTON_BYTES,
    POWER_BUTTON_GSI,
    POWER_BUTTON_PORT,
    PowerButton,
)
from pvclock.machine.devices.pvpanic import PVPANIC_PORT, Pvpanic
from pvclock.machine.devices.reset_ports import (
    KEYBOARD_PORT,
    RESET_CONTROL_PORT,
    SYSTEM_CONTROL_PORT,
    KeyboardController,
    ResetControl,
    SystemControl,
)
from pvclock.machine.devices.uart import COM1_GSI, COM1_PORT, PORTS, Uart
from pvclock.machine.devices.vcpu_register import (
    VCPU_REGISTER_BYTES,
    VCPU_REGISTER_GSI,
    VCPU_REGISTER_PORT,
    VcpuRegister,
)
from pvclock.machine.exits import Ending, Outcome

__all__ = ["Board"]

PIC_PORTS: Final = ((0x20, 2), (0xA0, 2), (0x4D0, 2))
"""KVM answers these: the two PICs and their edge/level registers."""

RESET_CODE: Final = bytes.fromhex("b0fe e664 f4 ebfd")
"""mov $0xfe, %al; out %al, $0x64; 1: hlt; jmp 1b: a firmware's reset.

Linux, where ACPI is hardware-reduced, asks EFI for one and, without it, jumps there, whatever ACPI's reset register."""

KVM_PAGES: Final = (
    (IDENTITY_MAP, 0x4000, "KVM's identity map and TSS"),
    (IOAPIC, 0x1000, "the IOAPIC"),
    (LOCAL_APIC, 0x1000, "the local APIC"),
)


class Board:
    """The devices of `vm`, on `bus`: debug console, exit port and, where it is a PC, those that a stock kernel needs.

    outcome: is told what the guest ends its run by.
    """

    def __init__(self, vm: Vm, vcpus: list[Vcpu], ram_bytes: int, outcome: Outcome) -> None:
        self._vm, self._vcpus, self._outcome = vm, vcpus, outcome
        self.bus = _new_bus(CoalescedRing(vm, vcpus[0]), ram_bytes)
        self.console = Console()
        self.bus.add_ports(CONSOLE_PORT, 1, self.console, coalesced=True)
        self.bus.add_ports(EXIT_PORT, 1, ExitPort(outcome.exit))
        self._serial: Uart | None = None
        self._vcpu_register: VcpuRegister | None = None
        self._max_vcpus = 0  # of a PC, which has tables of them

    def become(self, platform: Platform, serial_output: Callable[[bytes], object] | None, max_vcpus: int) -> None:
        """Add the devices of the platform, and its tables.  serial_output: takes what a PC's guest sends to COM1."""
        if platform == "bare":
            return
        reset = self._ends_by(Ending.RESET)
        self._serial = Uart(serial_output or _ignore, partial(self._set_line, COM1_GSI))
        for first, count, device in (
            (COM1_PORT, PORTS, self._serial),
            (SYSTEM_CONTROL_PORT, 1, SystemControl(reset)),
            (RESET_CONTROL_PORT, 1, ResetControl(reset)),
            (KEYBOARD_PORT, 1, KeyboardController(reset)),
            (ACPI_REGISTERS_PORT, 3, AcpiRegisters(self._ends_by(Ending.POWER_OFF), reset)),
            (PVPANIC_PORT, 1, Pvpanic(self._ends_by(Ending.PANIC))),
            (POWER_BUTTON_PORT, POWER_BUTTON_BYTES, PowerButton(partial(self._set_line, POWER_BUTTON_GSI))),
        ):
            self.bus.add_ports(first, count, device)
        self._max_vcpus = max_vcpus
        if max_vcpus > len(self._vcpus):
            set_line = partial(self._set_line, VCPU_REGISTER_GSI)
            self._vcpu_register = VcpuRegister(self._vcpus.__len__, set_line)
            self.bus.add_ports(VCPU_REGISTER_PORT, VCPU_REGISTER_BYTES, self._vcpu_register)

    def tell_of_vcpus(self) -> None:
        """Tell a PC's guest that there are more of its vCPUs."""
        if self._vcpu_register is not None:
            self._vcpu_register.tell()

    def serial_port(self) -> Uart:
        """COM1; StateError for a machine that is no PC."""
        if self._serial is None:
            raise StateError("serial", "this machine has no serial port", 'make it with platform="pc"')
        return self._serial

    def load(self, source: BootSource, memory: GuestMemory) -> EntryState:
        """Put firmware and image into memory; ImageError if it cannot be."""
        if not self._max_vcpus:
            return source.load(memory)
        entry = source.load(memory, Firmware(ACPI_TABLES, (FIRMWARE_AREA,)))
        memory.write(ACPI_TABLES, build_tables(len(self._vcpus), self._max_vcpus))
        memory.write(RESET_VECTOR, RESET_CODE)
        return entry

    def _ends_by(self, ending: Ending) -> Callable[[], None]:
        return lambda: self._outcome.end(ending)

    def _set_line(self, gsi: int, is_high: bool) -> None:
        self._vm.set_irq_line(gsi, is_high=is_high)


def _ignore(_data: bytes) -> None:
    """Nobody reads the serial port."""


def _new_bus(ring: CoalescedRing, ram_bytes: int) -> Bus:
    """A bus without devices, with what answers by itself."""
    bus = Bus(ring)
    bus.reserve_mmio(0, ram_bytes, "RAM")
    for gpa, length, name in KVM_PAGES:
        bus.reserve_mmio(gpa, length, name)
    for first, count in PIC_PORTS:
        bus.reserve_ports(first, count, "an in-kernel PIC")
    return bus
