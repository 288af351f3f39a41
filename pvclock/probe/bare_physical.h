/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Guest-physical memory by its address: the lowest 4 GiB are mapped to themselves, but for the local APIC's page, which
 * ring 3 may not touch.
 */
#ifndef PVCLOCK_PROBE_BARE_PHYSICAL_H
#define PVCLOCK_PROBE_BARE_PHYSICAL_H

#include <stdbool.h>
#include <stdint.h>

#define MAPPED_END 0x100000000ull
#define LAPIC_PAGE 0xfee00000ull /* of 2 MiB, as all are */
#define LAPIC_PAGE_END 0xff000000ull

static inline bool is_mapped(uint64_t address, uint64_t bytes)
{
    if (address >= MAPPED_END || bytes > MAPPED_END - address)
        return false;
    return address >= LAPIC_PAGE_END || address + bytes <= LAPIC_PAGE;
}

/* Little-endian, at any alignment; volatile, because the compiler knows of no object there. */
static inline uint8_t load8(uint64_t address)
{
    __asm__("" : "+r"(address)); /* gcc would take a low address that it knows for a null pointer's */
    return *(const volatile uint8_t *)(uintptr_t)address;
}

static inline uint64_t load_bytes(uint64_t address, unsigned bytes)
{
    uint64_t value = 0;

    for (unsigned i = 0; i < bytes; i++)
        value |= (uint64_t)load8(address + i) << 8 * i;
    return value;
}

static inline uint16_t load16(uint64_t address)
{
    return (uint16_t)load_bytes(address, 2);
}

static inline uint32_t load32(uint64_t address)
{
    return (uint32_t)load_bytes(address, 4);
}

static inline uint64_t load64(uint64_t address)
{
    return load_bytes(address, 8);
}

#endif
