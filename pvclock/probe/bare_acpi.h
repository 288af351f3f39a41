/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The few facts that ACPI's static tables, or an MP table in their place, have for the probe.
 */
#ifndef PVCLOCK_PROBE_BARE_ACPI_H
#define PVCLOCK_PROBE_BARE_ACPI_H

#include <stdbool.h>
#include <stdint.h>

/* A register in port or memory space; address 0: there is none. */
struct acpi_register {
    bool in_memory;
    uint64_t address;
};

struct acpi_facts {
    unsigned cpus;                        /* enabled, by the MADT; 0: not told */
    unsigned cpus_at_least;               /* by an MP table, where no MADT tells: some list one CPU of each package */
    uint16_t pm_timer_port;               /* 0: none */
    bool pm_timer_has_32_bits;
    struct acpi_register pm1a_control;    /* sleep by it, ... */
    struct acpi_register sleep_control;   /* ... or, on hardware-reduced machines, by this */
    uint8_t sleep_type;                   /* of soft off */
    struct acpi_register reset;
    uint8_t reset_value;
};

/* rsdp: as the loader says, or 0. */
void acpi_find(uint64_t rsdp, struct acpi_facts *facts);

void acpi_write(const struct acpi_register *acpi_register, unsigned bytes, uint32_t value);

#endif
