/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The TSC's frequency, and who says so.
 */
#ifndef PVCLOCK_PROBE_BARE_TSC_H
#define PVCLOCK_PROBE_BARE_TSC_H

#include <stdint.h>

#include "bare_acpi.h"

struct tsc_rate {
    uint64_t hz;
    const char *from; /* docs/probe.md's word */
};

/* Ask the paravirtual clocks, then CPUID, then measure against the PIT or the PM timer; hz is 0 if none knows. */
struct tsc_rate find_tsc_rate(const struct acpi_facts *acpi);

#endif
