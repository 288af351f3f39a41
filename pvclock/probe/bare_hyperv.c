/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Source: Hypervisor Top Level Functional Specification, "Partition Reference Time Enlightenment", "Frequency MSRs".
 */
#include "bare_hyperv.h"

#include "../include/hyperv_abi.h"
#include "../include/pvclock_math.h"
#include "bare_cpuid.h"
#include "bare_gate.h"
#include "fenced_tsc.h"

enum {
    LEAF_INTERFACE = 0x40000001,
    INTERFACE = 0x31237648, /* "Hv#1" */
    LEAF_PRIVILEGES = 0x40000003,
    MAY_READ_COUNTER = 1 << 1,
    MAY_USE_PAGE = 1 << 9,
    MAY_READ_FREQUENCY = 1 << 11,
    MSR_GUEST_OS_ID = 0x40000000,
    MSR_TSC_FREQUENCY = 0x40000022,
    ENABLE = 1
};

static const uint64_t GUEST_OS_ID = 1ull << 63 | 1; /* open source, of no known kind: some hosts ask for one first */

_Alignas(HYPERV_PAGE_BYTES) static struct hyperv_tsc_page page;

static uint32_t privileges(void)
{
    if (!has_hypervisor_leaf(LEAF_PRIVILEGES) || cpuid(LEAF_INTERFACE, 0).eax != INTERFACE)
        return 0;
    return cpuid(LEAF_PRIVILEGES, 0).eax;
}

uint32_t hyperv_enable(void)
{
    uint32_t offered = privileges();
    uint64_t count;

    if (!(offered & (MAY_READ_COUNTER | MAY_USE_PAGE)))
        return 0;
    write_msr(MSR_GUEST_OS_ID, GUEST_OS_ID);
    if ((offered & MAY_USE_PAGE) && write_msr(HYPERV_MSR_REFERENCE_TSC, (uintptr_t)&page | ENABLE))
        return HYPERV_MSR_REFERENCE_TSC;
    return (offered & MAY_READ_COUNTER) && read_msr(HYPERV_MSR_TIME_REF_COUNT, &count) ? HYPERV_MSR_TIME_REF_COUNT : 0;
}

uint64_t hyperv_tsc_hz(void)
{
    uint64_t hz;

    return privileges() & MAY_READ_FREQUENCY && read_msr(MSR_TSC_FREQUENCY, &hz) ? hz : 0;
}

int64_t hyperv_read(const struct probe_clock *clock, unsigned cpu)
{
    volatile struct hyperv_tsc_page *now = &page;
    uint64_t time;
    uint32_t sequence;

    (void)clock;
    (void)cpu;
    do {
        sequence = now->sequence;
        if (sequence == HYPERV_SEQUENCE_INVALID || sequence == HYPERV_SEQUENCE_RESERVED) {
            read_msr(HYPERV_MSR_TIME_REF_COUNT, &time);
            return (int64_t)time;
        }
        time = pvclock_mul_shr(fenced_tsc(), now->scale, 64) + (uint64_t)now->offset;
        __asm__ volatile("lfence" : : : "memory");
    } while (sequence != now->sequence);
    return (int64_t)time;
}
