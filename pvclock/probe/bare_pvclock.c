/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Source: Linux Documentation/virt/kvm/x86/{cpuid,msr}.rst, and its reader's order of loads.
 */
#include "bare_pvclock.h"

#include "../include/pvclock_abi.h"
#include "../include/pvclock_math.h"
#include "bare_cpuid.h"
#include "bare_gate.h"
#include "fenced_tsc.h"
#include "record_hz.h"

enum {
    HYPERVISOR_FIRST = 0x40000000,
    HYPERVISOR_END = 0x40010000,
    HYPERVISOR_STEP = 0x100,
    HAS_CLOCKSOURCE = 1 << 0,
    HAS_CLOCKSOURCE2 = 1 << 3,
    MSR_SYSTEM_TIME = 0x12,
    MSR_SYSTEM_TIME_NEW = 0x4b564d01,
    ENABLE = 1,
    TRIES_MAX = 1 << 24 /* a record that stays odd is taken as it is: the reader must end */
};

/* The host writes to the first line, the CPU itself to the second. */
struct record {
    _Alignas(64) struct pvclock_vcpu_time_info info;
    _Alignas(64) unsigned looks;
    unsigned stopped_looks;
};

static struct record records[PROBE_CPUS_MAX];
static uint32_t msr;

static uint32_t offered_msr(void)
{
    uint32_t base = has_hypervisor() ? HYPERVISOR_FIRST : HYPERVISOR_END;

    for (; base < HYPERVISOR_END; base += HYPERVISOR_STEP) {
        struct probe_leaf signature = probe_cpuid(base);
        uint32_t features;

        if (!probe_is_kvm(&signature))
            continue;
        features = cpuid(base + 1, 0).eax;
        return features & HAS_CLOCKSOURCE2 ? MSR_SYSTEM_TIME_NEW : features & HAS_CLOCKSOURCE ? MSR_SYSTEM_TIME : 0;
    }
    return 0;
}

static bool ask_for_record(unsigned cpu)
{
    return write_msr(msr, (uintptr_t)&records[cpu].info | ENABLE);
}

uint32_t pvclock_find(void)
{
    msr = offered_msr();
    if (msr && !ask_for_record(0))
        msr = 0;
    return msr;
}

void pvclock_enable(unsigned cpu)
{
    ask_for_record(cpu); /* if this one is refused its record stays empty, and its clock at 0, which shows */
}

uint64_t pvclock_tsc_hz(void)
{
    return record_hz(records[0].info.tsc_to_system_mul, records[0].info.tsc_shift);
}

int64_t pvclock_read(const struct probe_clock *clock, unsigned cpu)
{
    struct record *record = &records[cpu];
    volatile struct pvclock_vcpu_time_info *info = &record->info;
    uint32_t version;
    uint64_t time;
    unsigned tries = 0;

    (void)clock;
    do {
        struct pvclock_scale scale;
        uint64_t tsc;

        version = info->version;
        tsc = fenced_tsc();
        scale.mul = info->tsc_to_system_mul;
        scale.shift = info->tsc_shift;
        time = info->system_time + pvclock_scale_delta(tsc - info->tsc_timestamp, scale);
        __asm__ volatile("lfence" : : : "memory");
    } while ((version & 1 || version != info->version) && ++tries < TRIES_MAX);
    record->looks++;
    record->stopped_looks += (info->flags & PVCLOCK_GUEST_STOPPED) != 0;
    return (int64_t)time;
}

unsigned pvclock_pages(struct probe_page pages[PROBE_CPUS_MAX], unsigned cpus)
{
    if (!msr)
        return 0;
    for (unsigned cpu = 0; cpu < cpus; cpu++) {
        const struct record *record = &records[cpu];

        pages[cpu] = (struct probe_page){ .cpu = cpu, .looks = record->looks, .stopped_looks = record->stopped_looks };
        probe_look(&pages[cpu], &record->info);
    }
    return cpus;
}
