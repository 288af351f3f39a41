/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#define _GNU_SOURCE
#include "linux_clocks.h"

#include <time.h>

#include "fenced_tsc.h"
#include "linux_kernel.h"

static const int64_t NS_PER_S = 1000000000;
static const int64_t CALIBRATION_NS = 100000000; /* two readings 50 ns wide then say the rate to 1 ppm */

enum { CALIBRATION_TRIES = 100 };

/* Through the vDSO, which reads the TSC or the pvclock page without a system call. */
static inline int64_t fenced_time(clockid_t id)
{
    struct timespec now;

    __asm__ volatile("lfence" : : : "memory");
    clock_gettime(id, &now);
    __asm__ volatile("lfence" : : : "memory");
    return now.tv_sec * NS_PER_S + now.tv_nsec;
}

static int64_t read_tsc(const struct probe_clock *clock, unsigned cpu)
{
    (void)clock;
    (void)cpu;
    return (int64_t)fenced_tsc();
}

static int64_t read_monotonic(const struct probe_clock *clock, unsigned cpu)
{
    (void)clock;
    (void)cpu;
    return fenced_time(CLOCK_MONOTONIC);
}

static int64_t read_monotonic_raw(const struct probe_clock *clock, unsigned cpu)
{
    (void)clock;
    (void)cpu;
    return fenced_time(CLOCK_MONOTONIC_RAW);
}

/* The tightest of many readings: of the others an interrupt was longer. */
static struct probe_sample tightest_sample(void)
{
    struct probe_sample best = {.tsc_after = UINT64_MAX};

    for (unsigned try = 0; try < CALIBRATION_TRIES; try++) {
        struct probe_sample sample;

        sample.tsc_before = fenced_tsc();
        sample.clock = fenced_time(CLOCK_MONOTONIC_RAW);
        sample.tsc_after = fenced_tsc();
        if (sample.tsc_after - sample.tsc_before < best.tsc_after - best.tsc_before)
            best = sample;
    }
    return best;
}

static uint64_t middle(const struct probe_sample *sample)
{
    return sample->tsc_before + (sample->tsc_after - sample->tsc_before) / 2;
}

static void calibrate(void *argument, unsigned cpu)
{
    uint64_t *hz = argument;
    struct probe_sample begin = tightest_sample(), end;
    struct timespec pause = {.tv_nsec = CALIBRATION_NS};
    int64_t ns;

    (void)cpu;
    nanosleep(&pause, NULL);
    end = tightest_sample();
    ns = end.clock - begin.clock;
    if (ns > 0 && middle(&end) > middle(&begin))
        *hz = (uint64_t)((unsigned __int128)(middle(&end) - middle(&begin)) * (uint64_t)NS_PER_S / (uint64_t)ns);
}

uint64_t tsc_hz_by_monotonic_raw(struct probe_team *team)
{
    uint64_t hz = 0;

    team->run(team, 1, calibrate, &hz);
    return hz;
}

/* How long the kernel's clocks stand still between two counts of their source; 0: 100 ns at most. */
static int64_t clocksource_grain_ns(void)
{
    static const int64_t acpi_pm_ns = 280, pit_ns = 839;
    struct timespec tick;

    if (clocksource_is("acpi_pm"))
        return acpi_pm_ns;
    if (clocksource_is("pit"))
        return pit_ns;
    if (!clocksource_is("jiffies") && !clocksource_is("refined-jiffies"))
        return 0;
    clock_getres(CLOCK_MONOTONIC_COARSE, &tick);
    return tick.tv_sec * NS_PER_S + tick.tv_nsec;
}

void linux_clocks(struct probe_clock clocks[LINUX_CLOCKS], uint64_t tsc_hz)
{
    static const uint64_t ns_hz = 1000000000;
    int64_t grain_ns = clocksource_grain_ns();
    bool raw_is_tsc = clocksource_is("tsc"); /* and not one that a host steers */

    clocks[0] = (struct probe_clock){
        .name = "tsc", .hz = tsc_hz, .exchanged = true, .unslewed = true, .read = read_tsc};
    clocks[1] = (struct probe_clock){.name = "monotonic", .hz = ns_hz, .exchanged = true, .grain = grain_ns,
                                     .read = read_monotonic};
    clocks[2] = (struct probe_clock){
        .name = "monotonic_raw", .hz = ns_hz, .unslewed = raw_is_tsc, .grain = grain_ns, .read = read_monotonic_raw};
}
