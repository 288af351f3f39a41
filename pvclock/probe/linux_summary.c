/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "linux_summary.h"

#include <inttypes.h>
#include <stdio.h>

/* What the summary names of all pairs and warps: sizes are in ns, and never negative. */
struct largest {
    const char *clock;
    int64_t ns;
    unsigned a, b; /* of a warp: who had read more, who read less; of an offset: who is behind, who is ahead */
    bool found;
};

static int64_t ns_of(int64_t units, const struct probe_clock *clock)
{
    return (int64_t)((__int128)units * 1000000000 / (__int128)clock->hz);
}

static void keep_larger(struct largest *largest, const struct probe_clock *clock, int64_t units, unsigned a, unsigned b)
{
    int64_t ns = ns_of(units, clock);

    if (!largest->found || ns > largest->ns)
        *largest = (struct largest){.clock = clock->name, .ns = ns, .a = a, .b = b, .found = true};
}

static struct largest largest_warp(const struct probe_report *report)
{
    struct largest largest = {.found = false};

    for (unsigned i = 0; i < report->clock_count; i++)
        for (unsigned from = 0; from < report->team->cpus; from++)
            for (unsigned to = 0; to < report->team->cpus; to++)
                if (report->results[i].warp[from][to].count)
                    keep_larger(&largest, &report->clocks[i], report->results[i].warp[from][to].largest, from, to);
    return largest;
}

/* The offset that a window without 0 proves; of an empty one, of a clock that moved, either bound proves one. */
static void keep_proven(struct largest *largest, const struct probe_clock *clock, const struct probe_pair *pair)
{
    for (unsigned slice = 0; slice < PROBE_SLICES; slice++) {
        const struct offset_window *window = &pair->slices[slice];

        if (window->rounds && window->low > 0)
            keep_larger(largest, clock, window->low, pair->a, pair->b);
        if (window->rounds && window->high < 0)
            keep_larger(largest, clock, -window->high, pair->b, pair->a);
    }
}

static struct largest largest_offset(const struct probe_report *report)
{
    struct largest largest = {.found = false};

    for (unsigned i = 0; i < report->clock_count; i++)
        for (unsigned p = 0; p < report->results[i].pairs; p++)
            keep_proven(&largest, &report->clocks[i], &report->results[i].pair[p]);
    return largest;
}

/* What a pair's clocks differ by at most, in ns, by the slice that says most; -1 where no round ended. */
static int64_t bound_ns(const struct probe_pair *pair, const struct probe_clock *clock)
{
    int64_t least = -1;

    for (unsigned slice = 0; slice < PROBE_SLICES; slice++) {
        const struct offset_window *window = &pair->slices[slice];
        int64_t bound = window->high > -window->low ? window->high : -window->low;

        if (window->rounds && (least < 0 || bound < least))
            least = bound;
    }
    return least < 0 ? least : ns_of(least, clock);
}

/* The same of all pairs: that of the worst. */
static int64_t worst_bound_ns(const struct probe_report *report)
{
    int64_t worst = 0;

    for (unsigned i = 0; i < report->clock_count; i++)
        for (unsigned p = 0; p < report->results[i].pairs; p++) {
            int64_t bound = bound_ns(&report->results[i].pair[p], &report->clocks[i]);

            worst = bound > worst ? bound : worst;
        }
    return worst;
}

static void print_findings(const struct probe_report *report)
{
    struct largest warp = largest_warp(report), offset = largest_offset(report);
    const int64_t *number = report->cpu_number;

    if (warp.found)
        fprintf(stderr, "%s goes back by up to %" PRId64 " ns from CPU %" PRId64 " to CPU %" PRId64, warp.clock,
                warp.ns, number[warp.a], number[warp.b]);
    if (warp.found && offset.found)
        fputs("; ", stderr);
    if (offset.found)
        fprintf(stderr, "%s of CPU %" PRId64 " is ahead of CPU %" PRId64 "'s by at least %" PRId64 " ns", offset.clock,
                number[offset.b], number[offset.a], offset.ns);
    if (!warp.found && !offset.found)
        fprintf(stderr, "no clock is seen to differ between CPUs, and none does by more than %" PRId64 " ns",
                worst_bound_ns(report));
    fputs(".\n", stderr);
}

void print_summary(const struct probe_report *report)
{
    fprintf(stderr, "pvclock probe: %u CPU%s, %.1f s%s: ", report->team->cpus, report->team->cpus == 1 ? "" : "s",
            (double)report->plan->milliseconds / 1000, probe_fault_was_added(report->team) ? " (with --add)" : "");
    if (report->team->cpus == 1)
        fputs("one CPU has no other to differ from.\n", stderr);
    else
        print_findings(report);
    fputs("Judge the line of JSON, wherever pvclock is installed: pvclock probe --judge FILE\n", stderr);
}
