/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The probe as a Linux program: threads for CPUs, the vDSO for the kernel's clock.  It needs no privilege.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "facts.h"
#include "linux_clocks.h"
#include "linux_fail.h"
#include "linux_kernel.h"
#include "linux_options.h"
#include "linux_pages.h"
#include "linux_summary.h"
#include "linux_team.h"
#include "measure.h"
#include "report.h"

/* Large, and of one run each. */
static struct probe_clock_result results[LINUX_CLOCKS];
static struct visible_pages pages;
static bool shows_progress;

static void put(struct json_out *out, char character)
{
    (void)out;
    putchar(character);
}

static void on_progress(unsigned percent)
{
    look_at_visible_pages(&pages);
    if (shows_progress)
        fprintf(stderr, "%u%%\n", percent);
}

static void print_own_keys(struct json_out *out, const struct probe_report *report)
{
    (void)report;
    print_kernel(out);
}

/* The x2APIC leaf has all of a large number; the older one is cut to 8 bits. */
static void read_apic_id(void *argument, unsigned cpu)
{
    int64_t *apic_id = argument;
    unsigned a, b, c, d;

    if (__get_cpuid_count(0xb, 0, &a, &b, &c, &d) && b)
        apic_id[cpu] = d;
    else if (__get_cpuid(1, &a, &b, &c, &d))
        apic_id[cpu] = b >> 24;
    else
        apic_id[cpu] = 0;
}

static void read_apic_ids(struct probe_team *team, int64_t *apic_id)
{
    team->run(team, UINT64_MAX >> (PROBE_CPUS_MAX - team->cpus), read_apic_id, apic_id);
}

static uint64_t tsc_hz_of(struct probe_team *team)
{
    uint64_t hz = tsc_hz_by_monotonic_raw(team);

    if (!hz)
        fail("the TSC or CLOCK_MONOTONIC_RAW stands still");
    return hz;
}

static void print_line(const struct probe_report *report)
{
    struct json_out out = {.put = put};

    probe_print(&out, report);
    putchar('\n');
    if (fflush(stdout) || ferror(stdout))
        fail("standard output: %s", strerror(errno));
}

static void print_all(struct probe_team *team, const struct probe_plan *plan, const struct probe_clock *clocks,
                      const struct cpu_list *cpus)
{
    struct probe_leaf leaves[PROBE_LEAVES_MAX];
    int64_t cpu_number[PROBE_CPUS_MAX], apic_id[PROBE_CPUS_MAX];
    struct probe_report report = {
        .form = "linux",
        .version = PVCLOCK_VERSION,
        .team = team,
        .cpu_number = cpu_number,
        .apic_id = apic_id,
        .plan = plan,
        .tsc_hz_from = "monotonic_raw",
        .leaves = leaves,
        .leaf_count = probe_leaves(leaves),
        .pages = pages.page,
        .page_count = pages.count,
        .clocks = clocks,
        .results = results,
        .clock_count = LINUX_CLOCKS,
        .more = print_own_keys,
    };

    for (unsigned cpu = 0; cpu < cpus->count; cpu++)
        cpu_number[cpu] = cpus->number[cpu];
    read_apic_ids(team, apic_id);
    print_line(&report);
    print_summary(&report);
}

/* The kernel kills this process when the parent ends.  One that had ended before it was told so is nobody's parent
 * any more, and this process has another. */
static void end_with_parent(pid_t parent)
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL))
        fail("--parent: %s", strerror(errno));
    if (getppid() != parent)
        fail("--parent %d: has ended, or did not start this process", (int)parent);
}

int main(int count, char *arguments[])
{
    struct linux_options options = linux_options(count, arguments);
    struct probe_team team = {0};
    struct probe_plan plan = {.milliseconds = options.milliseconds, .progress = on_progress};
    struct probe_clock clocks[LINUX_CLOCKS];

    if (options.parent)
        end_with_parent(options.parent);
    shows_progress = options.progress;
    linux_team_begin(&team, &options.cpus);
    memcpy(team.added_ns, options.added_ns, sizeof(team.added_ns));
    plan.tsc_hz = tsc_hz_of(&team);
    linux_clocks(clocks, plan.tsc_hz);
    find_visible_pages(&pages, &options.cpus, plan.tsc_hz);
    measure(&team, &plan, clocks, LINUX_CLOCKS, results);
    look_at_visible_pages(&pages);
    print_all(&team, &plan, clocks, &options.cpus);
    return EXIT_SUCCESS;
}
