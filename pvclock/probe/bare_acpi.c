/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Sources: ACPI Specification 6.5, 5.2 (tables), 7.4.2 (\_Sx); MultiProcessor Specification 1.4, chapter 4.
 */
#include "bare_acpi.h"

#include <stddef.h>

#include "bare_gate.h"
#include "bare_memory.h"
#include "bare_physical.h"

enum {
    EBDA_SEGMENT = 0x40e,
    EBDA_BYTES = 1024,
    BASE_MEMORY_END = 0xa0000,
    BIOS_AREA = 0xe0000,
    BIOS_AREA_BYTES = 0x20000,
    HEADER_BYTES = 36
};
/* Whoever wrote the tables may mean harm: what is longer than any real one is not read, let alone summed up. */
enum { ROOT_BYTES_MOST = HEADER_BYTES + 256 * 8, TABLE_BYTES_MOST = 1 << 16, DSDT_BYTES_MOST = 1 << 20 };
enum { FADT_DSDT = 40, FADT_PM1A = 64, FADT_PM_TIMER = 76, FADT_PM_TIMER_BYTES = 91, FADT_FLAGS = 112 };
enum { FADT_RESET = 116, FADT_RESET_VALUE = 128, FADT_X_DSDT = 140, FADT_X_PM1A = 172, FADT_X_PM_TIMER = 208 };
enum { FADT_SLEEP_CONTROL = 244, FADT_REGISTER_BYTES = 12 };
enum { HAS_32_BITS = 1 << 8, HAS_RESET = 1 << 10, HARDWARE_REDUCED = 1 << 20 };
enum { SPACE_MEMORY = 0, SPACE_PORT = 1, PORT_END = 0x10000 };
enum { MADT_ENTRIES = 44, MADT_LAPIC = 0, MADT_X2APIC = 9 };
enum { MP_ENTRY_COUNT = 34, MP_ENTRIES = 44, MP_PROCESSOR = 0, MP_PROCESSOR_BYTES = 20 };

/* A whole one in memory; of 0 bytes: there is none. */
struct table {
    uint64_t address;
    uint32_t bytes;
};

static bool sums_to_zero(uint64_t address, uint32_t bytes)
{
    uint8_t sum = 0;

    for (uint32_t i = 0; i < bytes; i++)
        sum += load8(address + i);
    return sum == 0;
}

static bool is_signed(uint64_t address, const char *signature, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        if (load8(address + i) != (uint8_t)signature[i])
            return false;
    return true;
}

/* Where a structure of `bytes` bytes, on a multiple of 16, sums to zero behind its signature; or 0. */
static uint64_t scan(uint64_t from, unsigned length, const char *signature, unsigned signature_bytes, unsigned bytes)
{
    for (uint64_t at = from; at < from + length; at += 16)
        if (is_signed(at, signature, signature_bytes) && sums_to_zero(at, bytes))
            return at;
    return 0;
}

static uint64_t scan_low_memory(const char *signature, unsigned signature_bytes, unsigned bytes)
{
    uint64_t ebda = (uint64_t)load16(EBDA_SEGMENT) << 4;
    uint64_t found = 0;

    if (ebda >= 0x400 && ebda <= BASE_MEMORY_END - EBDA_BYTES)
        found = scan(ebda, EBDA_BYTES, signature, signature_bytes, bytes);
    if (!found)
        found = scan(BASE_MEMORY_END - EBDA_BYTES, EBDA_BYTES, signature, signature_bytes, bytes);
    return found ? found : scan(BIOS_AREA, BIOS_AREA_BYTES, signature, signature_bytes, bytes);
}

/* The table at `address`, if it is whole and of that name.  The name is looked at first: to sum up is a lot of work. */
static struct table table_at(uint64_t address, const char *signature, uint32_t most)
{
    const struct table none = { 0, 0 };
    uint32_t bytes;

    if (!address || !is_mapped(address, HEADER_BYTES) || !is_signed(address, signature, 4))
        return none;
    bytes = load32(address + 4);
    if (bytes < HEADER_BYTES || bytes > most || !is_mapped(address, bytes) || !sums_to_zero(address, bytes))
        return none;
    return (struct table){ address, bytes };
}

static struct table find_table(uint64_t rsdp, const char *signature)
{
    struct table root = table_at(load8(rsdp + 15) >= 2 ? load64(rsdp + 24) : 0, "XSDT", ROOT_BYTES_MOST);
    struct table found = { 0, 0 };
    unsigned pointer_bytes = root.bytes ? 8 : 4;

    if (!root.bytes)
        root = table_at(load32(rsdp + 16), "RSDT", ROOT_BYTES_MOST);
    for (uint32_t at = HEADER_BYTES; !found.bytes && at + pointer_bytes <= root.bytes; at += pointer_bytes)
        found = table_at(load_bytes(root.address + at, pointer_bytes), signature, TABLE_BYTES_MOST);
    return found;
}

static unsigned count_madt(struct table madt)
{
    unsigned cpus = 0;
    uint8_t entry_bytes;

    for (uint32_t at = MADT_ENTRIES; at + 2 <= madt.bytes; at += entry_bytes) {
        uint8_t kind = load8(madt.address + at);

        entry_bytes = load8(madt.address + at + 1);
        if (entry_bytes < 2)
            break;
        if (kind == MADT_LAPIC && at + 8 <= madt.bytes)
            cpus += load32(madt.address + at + 4) & 1;
        if (kind == MADT_X2APIC && at + 16 <= madt.bytes)
            cpus += load32(madt.address + at + 8) & 1;
    }
    return cpus;
}

static struct table find_mp_table(void)
{
    const struct table none = { 0, 0 };
    uint64_t pointer = scan_low_memory("_MP_", 4, 16);
    uint64_t address = pointer ? load32(pointer + 4) : 0;
    uint32_t bytes;

    if (!address || !is_mapped(address, MP_ENTRIES) || !is_signed(address, "PCMP", 4))
        return none;
    bytes = load16(address + 4);
    if (bytes < MP_ENTRIES || !is_mapped(address, bytes) || !sums_to_zero(address, bytes))
        return none;
    return (struct table){ address, bytes };
}

static unsigned count_mp_table(void)
{
    struct table table = find_mp_table();
    unsigned entries = table.bytes ? load16(table.address + MP_ENTRY_COUNT) : 0;
    unsigned cpus = 0;

    for (uint32_t at = MP_ENTRIES; entries-- && at + MP_PROCESSOR_BYTES <= table.bytes; at += MP_PROCESSOR_BYTES) {
        if (load8(table.address + at) != MP_PROCESSOR)
            break; /* the processors come first */
        cpus += load8(table.address + at + 3) & 1;
    }
    return cpus;
}

/* The extended form of a register if the table has it, else the plain port at `port`. */
static struct acpi_register take_register(struct table fadt, unsigned extended, unsigned port)
{
    struct acpi_register found = { false, 0 };

    if (extended + FADT_REGISTER_BYTES <= fadt.bytes && load64(fadt.address + extended + 4)) {
        found.in_memory = load8(fadt.address + extended) == SPACE_MEMORY;
        found.address = load64(fadt.address + extended + 4);
        if (!found.in_memory && load8(fadt.address + extended) != SPACE_PORT)
            found.address = 0;
    } else if (port && port + 4 <= fadt.bytes) {
        found.address = load32(fadt.address + port);
    }
    if (found.in_memory ? !is_mapped(found.address, 4) : found.address >= PORT_END)
        found.address = 0;
    return found;
}

/* \_S5's first number in the DSDT: the name, a package (its length in 1 to 4 bytes, its count), then a number with or
 * without the prefix for bytes.  An interpreter would find it in other forms, too; 5 is what those mostly have. */
static uint8_t find_sleep_type(struct table dsdt)
{
    enum { PACKAGE = 0x12, BYTE_PREFIX = 0x0a, ZERO = 0, ONE = 1, SLEEP_TYPE_DEFAULT = 5 };

    for (uint32_t at = HEADER_BYTES; at + 12 <= dsdt.bytes; at++) {
        uint32_t value = at + 5;

        if (!is_signed(dsdt.address + at, "_S5_", 4) || load8(dsdt.address + at + 4) != PACKAGE)
            continue;
        value += (load8(dsdt.address + value) >> 6) + 2u;
        if (load8(dsdt.address + value) == BYTE_PREFIX)
            return load8(dsdt.address + value + 1);
        return load8(dsdt.address + value) == ONE ? 1 : load8(dsdt.address + value) == ZERO ? 0 : SLEEP_TYPE_DEFAULT;
    }
    return SLEEP_TYPE_DEFAULT;
}

static void read_fadt(struct table fadt, struct acpi_facts *facts)
{
    uint32_t flags;
    uint64_t dsdt;
    struct acpi_register timer;

    if (fadt.bytes < FADT_FLAGS + 4)
        return;
    flags = load32(fadt.address + FADT_FLAGS);
    dsdt = fadt.bytes >= FADT_X_DSDT + 8 ? load64(fadt.address + FADT_X_DSDT) : 0;
    if (!dsdt)
        dsdt = load32(fadt.address + FADT_DSDT);
    facts->sleep_type = find_sleep_type(table_at(dsdt, "DSDT", DSDT_BYTES_MOST));
    if ((flags & HAS_RESET) && fadt.bytes > FADT_RESET_VALUE) {
        facts->reset = take_register(fadt, FADT_RESET, 0);
        facts->reset_value = load8(fadt.address + FADT_RESET_VALUE);
    }
    if (flags & HARDWARE_REDUCED) {
        facts->sleep_control = take_register(fadt, FADT_SLEEP_CONTROL, 0);
        return;
    }
    facts->pm1a_control = take_register(fadt, FADT_X_PM1A, FADT_PM1A);
    timer = take_register(fadt, FADT_X_PM_TIMER, FADT_PM_TIMER);
    if (!timer.in_memory && load8(fadt.address + FADT_PM_TIMER_BYTES) == 4)
        facts->pm_timer_port = (uint16_t)timer.address;
    facts->pm_timer_has_32_bits = flags & HAS_32_BITS;
}

void acpi_find(uint64_t rsdp, struct acpi_facts *facts)
{
    memset(facts, 0, sizeof *facts);
    if (!rsdp || !is_mapped(rsdp, HEADER_BYTES) || !is_signed(rsdp, "RSD PTR ", 8) || !sums_to_zero(rsdp, 20))
        rsdp = scan_low_memory("RSD PTR ", 8, 20);
    if (rsdp) {
        facts->cpus = count_madt(find_table(rsdp, "APIC"));
        read_fadt(find_table(rsdp, "FACP"), facts);
    }
    if (!facts->cpus)
        facts->cpus_at_least = count_mp_table();
}

void acpi_write(const struct acpi_register *acpi_register, unsigned bytes, uint32_t value)
{
    if (!acpi_register->address)
        return;
    if (acpi_register->in_memory)
        write_mmio((uintptr_t)acpi_register->address, bytes, value);
    else
        write_port((uint16_t)acpi_register->address, bytes, value);
}
