/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The pvclock records that any process of a Linux guest can see: those that the vDSO reads, if it reads them.
 */
#ifndef PVCLOCK_PROBE_LINUX_PAGES_H
#define PVCLOCK_PROBE_LINUX_PAGES_H

#include "facts.h"
#include "linux_team.h"

struct visible_pages {
    unsigned count;
    struct probe_page page[PROBE_CPUS_MAX];
    const volatile struct pvclock_vcpu_time_info *record[PROBE_CPUS_MAX];
};

/* Find the records of these CPUs.  The kernel shows them while its clocksource is kvm-clock and the host calls it
 * stable. */
void find_visible_pages(struct visible_pages *pages, const struct cpu_list *cpus, uint64_t tsc_hz);

/* Look at each once more. */
void look_at_visible_pages(struct visible_pages *pages);

#endif
