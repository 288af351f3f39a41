/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Sources: Intel 8254 data sheet; ACPI Specification 6.5, 4.8.3.3.
 */
#include "bare_timers.h"

#include "bare_gate.h"
#include "fenced_tsc.h"

enum {
    PIT_CHANNEL_2 = 0x42,
    PIT_COMMAND = 0x43,
    PIT_RATE_GENERATOR = 0xb4, /* channel 2, low byte then high byte, mode 2, binary */
    PIT_LATCH = 0x80,          /* channel 2 */
    SPEAKER = 0x61,
    SPEAKER_GATE = 1,
    SPEAKER_DATA = 2,
    PM_TIMER_BITS = 24,
    LOOKS = 16, /* at a counter that may stand still: each takes longer than it takes to count one */
    CALIBRATIONS = 4,
    TIGHTEST_TRIES = 4,
    CALIBRATION_HZ = 40 /* each takes 1/40 s: about half of the PIT's period */
};

static const uint64_t CALIBRATION_TICKS_MAX = 1ull << 36; /* a counter that stopped, and no overflow below */

static uint32_t mask_of(const struct narrow_counter *counter)
{
    return counter->bits == 32 ? UINT32_MAX : (1u << counter->bits) - 1;
}

static uint32_t pit_raw(const struct narrow_counter *counter)
{
    uint32_t low, high;

    write_port(PIT_COMMAND, 1, PIT_LATCH);
    low = read_port(counter->port, 1);
    high = read_port(counter->port, 1);
    return -(high << 8 | low); /* it counts down */
}

static uint32_t pm_timer_raw(const struct narrow_counter *counter)
{
    return read_port(counter->port, 4);
}

/* Does it move?  A port that nobody has reads as ones for ever. */
static bool counts(const struct narrow_counter *counter)
{
    uint32_t first = counter->raw(counter);

    for (unsigned looks = 0; looks < LOOKS; looks++)
        if (counter->raw(counter) != first)
            return true;
    return false;
}

bool pit_open(struct narrow_counter *counter, uint64_t tsc_hz)
{
    *counter = (struct narrow_counter){
        .raw = pit_raw, .port = PIT_CHANNEL_2, .bits = 16, .hz = PIT_HZ, .tsc_hz = tsc_hz
    };
    write_port(SPEAKER, 1, (read_port(SPEAKER, 1) & ~(uint32_t)SPEAKER_DATA) | SPEAKER_GATE);
    write_port(PIT_COMMAND, 1, PIT_RATE_GENERATOR);
    write_port(PIT_CHANNEL_2, 1, 0); /* 65536 */
    write_port(PIT_CHANNEL_2, 1, 0);
    return counts(counter);
}

bool pm_timer_open(struct narrow_counter *counter, uint64_t tsc_hz, const struct acpi_facts *acpi)
{
    *counter = (struct narrow_counter){ .raw = pm_timer_raw,
                                        .port = acpi->pm_timer_port,
                                        .bits = acpi->pm_timer_has_32_bits ? 32 : PM_TIMER_BITS,
                                        .hz = PM_TIMER_HZ,
                                        .tsc_hz = tsc_hz };
    return counter->port && counts(counter);
}

/* How many units passed since the last reading: of all numbers that agree with the counter, the one next to what the
 * TSC says. */
static int64_t passed_units(const struct narrow_counter *counter, uint32_t raw, uint64_t tsc)
{
    uint64_t expected = (tsc - counter->tsc) / 1024 * counter->hz / (counter->tsc_hz / 1024);
    int64_t period = (int64_t)mask_of(counter) + 1;
    int64_t difference = (raw - (uint32_t)counter->total - (uint32_t)expected) & mask_of(counter);

    return (int64_t)expected + difference - (difference > period / 2 ? period : 0);
}

int64_t narrow_counter_read(const struct probe_clock *clock, unsigned cpu)
{
    struct narrow_counter *counter = clock->state;
    uint64_t tsc = fenced_tsc();
    uint32_t raw = counter->raw(counter);

    (void)cpu;
    counter->total = counter->tsc ? counter->total + passed_units(counter, raw, tsc) : raw & mask_of(counter);
    counter->tsc = tsc;
    return counter->total;
}

/* The raw count, and the TSC at that instant: the tightest of some, because a vCPU may be descheduled in between. */
static uint32_t raw_at(const struct narrow_counter *counter, uint64_t *tsc)
{
    uint64_t tightest = UINT64_MAX;
    uint32_t found = 0;

    for (unsigned tries = 0; tries < TIGHTEST_TRIES; tries++) {
        uint64_t before = fenced_tsc(), width;
        uint32_t raw = counter->raw(counter);

        width = fenced_tsc() - before;
        if (width < tightest) {
            tightest = width;
            found = raw;
            *tsc = before + width / 2;
        }
    }
    return found;
}

/* The lowest of some: a vCPU that is descheduled for longer than the counter's period counts too many ticks. */
static uint64_t calibrate(const struct narrow_counter *counter)
{
    uint64_t lowest = 0;

    for (unsigned i = 0; i < CALIBRATIONS; i++) {
        uint64_t begin, end, hz;
        uint32_t first = raw_at(counter, &begin), passed;

        do
            passed = (raw_at(counter, &end) - first) & mask_of(counter);
        while (passed < counter->hz / CALIBRATION_HZ && end - begin < CALIBRATION_TICKS_MAX);
        hz = passed ? (end - begin) * counter->hz / passed : 0;
        if (hz && (!lowest || hz < lowest))
            lowest = hz;
    }
    return lowest;
}

uint64_t pit_tsc_hz(void)
{
    struct narrow_counter counter;

    return pit_open(&counter, 0) ? calibrate(&counter) : 0;
}

uint64_t pm_timer_tsc_hz(const struct acpi_facts *acpi)
{
    struct narrow_counter counter;

    return pm_timer_open(&counter, 0, acpi) ? calibrate(&counter) : 0;
}
