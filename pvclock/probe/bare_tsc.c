/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "bare_tsc.h"

#include <stddef.h>

#include "bare_cpuid.h"
#include "bare_hyperv.h"
#include "bare_pvclock.h"
#include "bare_timers.h"

enum { CPUID_TIMING = 0x40000010, CPUID_TSC_CRYSTAL = 0x15 };

static uint64_t hz_of_timing_leaf(void)
{
    if (!has_hypervisor_leaf(CPUID_TIMING))
        return 0;
    return (uint64_t)cpuid(CPUID_TIMING, 0).eax * 1000;
}

static uint64_t hz_of_crystal_leaf(void)
{
    struct cpuid_registers leaf;

    if (cpuid(0, 0).eax < CPUID_TSC_CRYSTAL)
        return 0;
    leaf = cpuid(CPUID_TSC_CRYSTAL, 0);
    return leaf.eax ? (uint64_t)leaf.ecx * leaf.ebx / leaf.eax : 0;
}

struct tsc_rate find_tsc_rate(const struct acpi_facts *acpi)
{
    struct tsc_rate rate;

    if ((rate.hz = pvclock_tsc_hz()))
        rate.from = "pvclock";
    else if ((rate.hz = hyperv_tsc_hz()))
        rate.from = "hyperv";
    else if ((rate.hz = hz_of_timing_leaf()))
        rate.from = "cpuid_40000010";
    else if ((rate.hz = hz_of_crystal_leaf()))
        rate.from = "cpuid_15";
    else if ((rate.hz = pit_tsc_hz()))
        rate.from = "pit";
    else if ((rate.hz = pm_timer_tsc_hz(acpi)))
        rate.from = "acpi_pm";
    else
        rate.from = NULL;
    return rate;
}
