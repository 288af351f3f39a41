/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The clocks that this machine has.
 */
#ifndef PVCLOCK_PROBE_BARE_CLOCKS_H
#define PVCLOCK_PROBE_BARE_CLOCKS_H

#include "bare_acpi.h"
#include "bare_timers.h"
#include "facts.h"
#include "measure.h"

struct bare_clocks {
    unsigned count;
    struct probe_clock clock[PROBE_CLOCKS_MAX]; /* the first is the TSC */
    uint32_t pvclock_msr, hyperv_msr;           /* by which they are enabled; 0: not offered */
    struct narrow_counter pit, pm_timer;
};

/* Have the first CPU's paravirtual clocks. */
void clocks_enable(struct bare_clocks *clocks);

/* Then have those of the whole team, and list all clocks. */
void clocks_open(struct bare_clocks *clocks, struct probe_team *team, const struct acpi_facts *acpi, uint64_t tsc_hz);

/* The pvclock records; how many. */
unsigned clocks_pages(const struct bare_clocks *clocks, struct probe_page pages[PROBE_CPUS_MAX], unsigned cpus);

#endif
