/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * What the loader left for us, whichever of the three protocols it speaks; copied, because it lies in low memory.
 */
#ifndef PVCLOCK_PROBE_BARE_BOOT_INFORMATION_H
#define PVCLOCK_PROBE_BARE_BOOT_INFORMATION_H

#include <stdint.h>

enum { BARE_COMMAND_LINE_MAX = 2048 };

struct boot_facts {
    char command_line[BARE_COMMAND_LINE_MAX]; /* NUL-terminated, cut if longer */
    uint64_t rsdp;                            /* ACPI's root pointer, 0 if the loader does not say */
};

void read_boot_information(struct boot_facts *facts);

#endif
