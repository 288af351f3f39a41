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

static bool any_is_refused(const struct probe_team *team)
{
    for (unsigned cpu = 0; cpu < team->cpus; cpu++)
        if (pvclock_is_refused(cpu))
            return true;
    return false;
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
    add(clocks, (struct probe_clock){ .name = "tsc", .hz = tsc_hz, .exchanged = true, .unslewed = true,
                                      .read = read_tsc });
    if (clocks->pvclock_msr && !any_is_refused(team))
        add(clocks, (struct probe_clock){ .name = "pvclock", .hz = PVCLOCK_HZ, .exchanged = true,
                                          .read = pvclock_read });
    if (clocks->hyperv_msr)
        add(clocks, (struct probe_clock){ .name = "hyperv", .hz = HYPERV_HZ, .exchanged = true,
                                          .read = hyperv_read });
    if (pit_open(&clocks->pit, tsc_hz))
        add(clocks, (struct probe_clock){ .name = "pit", .hz = PIT_HZ, .read = narrow_counter_read,
                                          .state = &clocks->pit });
    if (pm_timer_open(&clocks->pm_timer, tsc_hz, acpi))
        add(clocks, (struct probe_clock){ .name = "acpi_pm", .hz = PM_TIMER_HZ, .read = narrow_counter_read,
                                          .state = &clocks->pm_timer });
}

unsigned clocks_pages(const struct bare_clocks *clocks, struct probe_page pages[PROBE_CPUS_MAX], unsigned cpus)
{
    return clocks->pvclock_msr ? pvclock_pages(pages, cpus) : 0;
}
