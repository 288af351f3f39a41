"""The ACPI tables by which a stock kernel finds vCPUs, serial port, power button, power-off and reset: what it needs.

Source: ACPI Specification 6.5, chapter 5.  They are of the hardware-reduced kind, as microVM monitors offer it: no PM
timer, no SCI, no FACS and no legacy PIC, so a kernel does not look for a PIT and takes each interrupt from the
IOAPIC.  Of devices it learns from the DSDT: without COM1 in it a kernel prints, but gets no interrupt, and never reads.
"""

from __future__ import annotations

import struct
from typing import Final

from pvclock.guest_layout import ACPI_TABLES, IOAPIC, LOCAL_APIC
from pvclock.machine import aml
from pvclock.machine.devices.acpi_registers import (
    RESET_PORT,
    RESET_VALUE,
    SLEEP_CONTROL_PORT,
    SLEEP_STATUS_PORT,
    SOFT_OFF,
)
from pvclock.machine.devices.power_button import POWER_BUTTON_BYTES, POWER_BUTTON_GSI, POWER_BUTTON_PORT
from pvclock.machine.devices.pvpanic import PVPANIC_PORT
from pvclock.machine.devices.uart import COM1_GSI, COM1_PORT, PORTS
from pvclock.machine.devices.vcpu_register import VCPU_REGISTER_BYTES, VCPU_REGISTER_GSI, VCPU_REGISTER_PORT

__all__ = ["build_tables"]

OEM: Final = b"PVCLK "
OEM_TABLE: Final = b"PVCLOCK "
CREATOR: Final = b"PVCK"
ALIGNMENT: Final = 16

HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
"""Signature, length, revision, checksum, OEM's id, table id and revision, creator's id and revision."""
CHECKSUM_AT: Final = 9

RSDP: Final = struct.Struct("<8sB6sBIIQB3x")
RSDP_OLD_BYTES: Final = 20
"""Of revision 0, which have a checksum of their own."""
RSDP_CHECKSUM_AT, RSDP_EXTENDED_CHECKSUM_AT = 8, 32

FADT_REVISION: Final = 6
FADT_MINOR_REVISION: Final = 5
"""From 3 on a kernel looks at ONLINE_CAPABLE."""
FADT_BYTES: Final = 276
# Offsets in the FADT.
BOOT_ARCHITECTURE_AT: Final = 109
FLAGS_AT: Final = 112
RESET_REGISTER_AT: Final = 116
RESET_VALUE_AT: Final = 128
MINOR_REVISION_AT: Final = 131
X_DSDT_AT: Final = 140
SLEEP_CONTROL_AT: Final = 244
SLEEP_STATUS_AT: Final = 256

VGA_NOT_PRESENT: Final = 1 << 2
CMOS_RTC_NOT_PRESENT: Final = 1 << 5
"""A kernel that looks for one takes 2.4 s longer in the lab."""
RESET_REG_SUP: Final = 1 << 10
HW_REDUCED_ACPI: Final = 1 << 20

REGISTER: Final = struct.Struct("<BBBBQ")
"""A generic address structure: address space, width and offset in bits, access size, address."""
SYSTEM_IO: Final = 1
BYTE_ACCESS: Final = 1

MADT_REVISION: Final = 5
LAPIC: Final = struct.Struct("<BBBBI")
X2APIC: Final = struct.Struct("<BB2xIII")
IO_APIC: Final = struct.Struct("<BBBxII")
ENABLED: Final = 1
ONLINE_CAPABLE: Final = 1 << 1
"""Not there yet, but it may come."""
XAPIC_IDS_END: Final = 0xFF
"""An id of 8 bits; 0xff is all of them."""


PRESENT_AND_WORKING: Final = 0x0F
"""A device's _STA: present, enabled, shown, functioning."""
PRESSED: Final = 0x80
"""What a button is notified of."""
DEVICE_CHECK: Final = 1
"""What a device is notified of, once it has come."""


def build_tables(vcpus: int, max_vcpus: int) -> bytes:
    """What lies from ACPI_TABLES on, the RSDP first, for a machine with so many vCPUs, whose ids are 0 and up.

    max_vcpus: how many there will be at most; if those are more, the DSDT tells how the guest learns of them.
    """
    dsdt_at = ACPI_TABLES + len(_padded(bytes(RSDP.size)))
    dsdt = _padded(_dsdt(vcpus, max_vcpus))
    fadt_at = dsdt_at + len(dsdt)
    fadt = _padded(_fadt(dsdt_at))
    madt_at = fadt_at + len(fadt)
    madt = _padded(_madt(vcpus, max_vcpus))
    xsdt_at = madt_at + len(madt)
    xsdt = _table(b"XSDT", 1, struct.pack("<2Q", fadt_at, madt_at))
    return _padded(_rsdp(xsdt_at)) + dsdt + fadt + madt + xsdt


def _rsdp(xsdt_at: int) -> bytes:
    pointer = RSDP.pack(b"RSD PTR ", 0, OEM, 2, 0, RSDP.size, xsdt_at, 0)
    pointer = _with_checksum(pointer[:RSDP_OLD_BYTES], RSDP_CHECKSUM_AT) + pointer[RSDP_OLD_BYTES:]
    return _with_checksum(pointer, RSDP_EXTENDED_CHECKSUM_AT)


def _fadt(dsdt_at: int) -> bytes:
    """The fixed description table: how to power off and to reset, and what a PC has and this machine has not."""
    fadt = bytearray(FADT_BYTES)
    struct.pack_into("<H", fadt, BOOT_ARCHITECTURE_AT, VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT)
    struct.pack_into("<I", fadt, FLAGS_AT, HW_REDUCED_ACPI | RESET_REG_SUP)
    _pack_register(fadt, RESET_REGISTER_AT, RESET_PORT)
    fadt[RESET_VALUE_AT] = RESET_VALUE
    fadt[MINOR_REVISION_AT] = FADT_MINOR_REVISION
    struct.pack_into("<Q", fadt, X_DSDT_AT, dsdt_at)
    _pack_register(fadt, SLEEP_CONTROL_AT, SLEEP_CONTROL_PORT)
    _pack_register(fadt, SLEEP_STATUS_AT, SLEEP_STATUS_PORT)
    return _table(b"FACP", FADT_REVISION, bytes(fadt[HEADER.size :]))


def _pack_register(fadt: bytearray, at: int, port: int) -> None:
    REGISTER.pack_into(fadt, at, SYSTEM_IO, 8, 0, BYTE_ACCESS, port)


def _madt(vcpus: int, max_vcpus: int) -> bytes:
    """The interrupt controllers: a local APIC for each vCPU and one IOAPIC, whose inputs are GSI 0 and up.

    There are no overrides: PCAT_COMPAT is not set, so there are no ISA interrupts that could need them.
    """
    entries = b"".join(
        _local_apic(apic_id, ENABLED if apic_id < vcpus else ONLINE_CAPABLE) for apic_id in range(max_vcpus)
    )
    entries += IO_APIC.pack(1, IO_APIC.size, 0, IOAPIC, 0)
    return _table(b"APIC", MADT_REVISION, struct.pack("<II", LOCAL_APIC, 0) + entries)


def _local_apic(apic_id: int, flags: int) -> bytes:
    if apic_id < XAPIC_IDS_END:
        return LAPIC.pack(0, LAPIC.size, apic_id, apic_id, flags)
    return X2APIC.pack(9, X2APIC.size, apic_id, flags, apic_id)


def _dsdt(vcpus: int, max_vcpus: int) -> bytes:
    r"""The devices, and \_S5, soft off: what goes into the sleep control register for it."""
    com1 = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.io_ports(COM1_PORT, PORTS), aml.interrupt(COM1_GSI))),
    )
    panic = aml.device(
        "PEVT",
        aml.name("_HID", aml.text("QEMU0001")),
        aml.name("_CRS", aml.resources(aml.io_ports(PVPANIC_PORT, 1))),
    )
    soft_off = aml.name("_S5", aml.package(aml.integer(SOFT_OFF), *[aml.integer(0)] * 3))
    hot_add = _hot_add(vcpus, max_vcpus) if max_vcpus > vcpus else ()
    return _table(b"DSDT", 2, aml.scope("_SB", com1, panic, *_power_button(), *hot_add) + soft_off)


def _power_button() -> tuple[bytes, ...]:
    r"""The button, and a generic event device, by which the guest learns that it was pressed.

    ACPI Specification 6.5, 4.8.2.2.1.2 and 5.6.9: hardware-reduced ACPI has no fixed button.
    """
    release = aml.store(aml.integer(1), aml.reference("PWBS"))
    return (
        aml.io_region("PWBR", POWER_BUTTON_PORT, POWER_BUTTON_BYTES),
        aml.field("PWBR", "PWBS"),
        aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C"))),
        aml.device(
            "GEDB",
            aml.name("_HID", aml.text("ACPI0013")),
            aml.name("_UID", aml.integer(1)),
            aml.name("_CRS", aml.resources(aml.level_interrupt(POWER_BUTTON_GSI))),
            aml.method("_EVT", 1, release, aml.notify("PWRB", PRESSED)),
        ),
    )


def _hot_add(vcpus: int, max_vcpus: int) -> tuple[bytes, ...]:
    r"""The vCPUs as devices, and a generic event device, by which the guest learns that there are more.

    VCPN is the vCPU register; VCPT is up to which vCPU the guest has been told.  ACPI Specification 6.5, 5.6.9 and 8.4.
    """
    processors = (_processor(apic_id) for apic_id in range(max_vcpus))
    notices = (
        aml.if_then(aml.equal(aml.ARG0, aml.integer(apic_id)), aml.notify(_processor_name(apic_id), DEVICE_CHECK))
        for apic_id in range(vcpus, max_vcpus)
    )
    there, told = aml.reference("VCPN"), aml.reference("VCPT")
    tell_of_each = aml.while_loop(aml.less(told, there), aml.call("VCPF", told), aml.increment(told))
    events = aml.device(
        "GED",
        aml.name("_HID", aml.text("ACPI0013")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(aml.level_interrupt(VCPU_REGISTER_GSI))),
        aml.method("_EVT", 1, tell_of_each, aml.store(told, there)),
    )
    return (
        aml.io_region("VCPR", VCPU_REGISTER_PORT, VCPU_REGISTER_BYTES),
        aml.field("VCPR", "VCPN"),
        aml.name("VCPT", aml.integer(vcpus)),
        *processors,
        aml.method("VCPF", 1, *notices),
        events,
    )


def _processor(apic_id: int) -> bytes:
    """A processor device, which is there once the vCPU register says so."""
    is_there = aml.less(aml.integer(apic_id), aml.reference("VCPN"))
    return aml.device(
        _processor_name(apic_id),
        aml.name("_HID", aml.text("ACPI0007")),
        aml.name("_UID", aml.integer(apic_id)),
        aml.name("_MAT", aml.buffer(_local_apic(apic_id, ENABLED))),
        aml.method(
            "_STA",
            0,
            aml.if_then(is_there, aml.return_value(aml.integer(PRESENT_AND_WORKING))),
            aml.return_value(aml.integer(0)),
        ),
    )


def _processor_name(apic_id: int) -> str:
    return f"C{apic_id:03X}"


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = HEADER.pack(signature, HEADER.size + len(body), revision, 0, OEM, OEM_TABLE, 1, CREATOR, 1)
    return _with_checksum(header + body, CHECKSUM_AT)


def _with_checksum(table: bytes, at: int) -> bytes:
    """A table whose bytes sum to 0, by the one at `at`, which was 0."""
    return table[:at] + bytes([-sum(table) & 0xFF]) + table[at + 1 :]


def _padded(table: bytes) -> bytes:
    return table + bytes(-len(table) % ALIGNMENT)
