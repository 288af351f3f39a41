/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "bare_clocks.h"

#include <stddef.h>

#include "bare_hyperv.h"
#include "bare_pvclock.h"
#include "fenced_tsc.h"

enum { PVCLOCK_HZ = 1000000000 };

static int64_t read_tsc(const struct probe_clock *clock, unsigned cpu)
{
    (void)clock;
    (void)cpu;
    return (int64_t)fenced_tsc();
}

static void add(struct bare_clocks *clocks, struct probe_clock clock)
{
    clocks->clock[clocks->count++] = clock;
}

static void enable_record(void *argument, unsigned cpu)
{
    (void)argument;
    pvclock_enable(cpu);
}

void clocks_enable(struct bare_clocks *clocks)
{
    clocks->pvclock_msr = pvclock_find();
    clocks->hyperv_msr = hyperv_enable();
}

void clocks_open(struct bare_clocks *clocks, struct probe_team *team, const struct acpi_facts *acpi, uint64_t tsc_hz)
{
    if (clocks->pvclock_msr)
        team->run(team, UINT64_MAX, enable_record, NULL);
    add(clocks, (struct probe_clock){ "tsc", tsc_hz, true, read_tsc, NULL });
    if (clocks->pvclock_msr)
        add(clocks, (struct probe_clock){ "pvclock", PVCLOCK_HZ, true, pvclock_read, NULL });
    if (clocks->hyperv_msr)
        add(clocks, (struct probe_clock){ "hyperv", HYPERV_HZ, true, hyperv_read, NULL });
    if (pit_open(&clocks->pit, tsc_hz))
        add(clocks, (struct probe_clock){ "pit", PIT_HZ, false, narrow_counter_read, &clocks->pit });
    if (pm_timer_open(&clocks->pm_timer, tsc_hz, acpi))
        add(clocks, (struct probe_clock){ "acpi_pm", PM_TIMER_HZ, false, narrow_counter_read, &clocks->pm_timer });
}

unsigned clocks_pages(const struct bare_clocks *clocks, struct probe_page pages[PROBE_CPUS_MAX], unsigned cpus)
{
    return clocks->pvclock_msr ? pvclock_pages(pages, cpus) : 0;
}
