/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Source: Intel SDM volume 3, 9.4 (multiple-processor initialization), 11 (local APIC).
 */
#include "bare_lapic.h"

#include "bare_gate.h"

enum {
    CPUID_1_EDX_APIC = 1 << 9,
    MSR_APIC_BASE = 0x1b,
    ENABLED = 1 << 11,
    IS_X2 = 1 << 10,
    LAPIC = 0xfee00000, /* where reset has it; nobody moves it */
    MSR_X2APIC = 0x800, /* and the register's offset / 16 */
    END_OF_INTERRUPT = 0xb0,
    SPURIOUS_VECTOR = 0xf0,
    SOFTWARE_ENABLED = 1 << 8,
    COMMAND = 0x300,
    TO_ALL_OTHERS = 0xc4000,
    INIT = 0x500,
    START = 0x600
};

static uint64_t apic_base(void)
{
    uint64_t base;

    return read_msr(MSR_APIC_BASE, &base) ? base : 0;
}

static void write_register(unsigned offset, uint32_t value)
{
    if (apic_base() & IS_X2)
        write_msr(MSR_X2APIC + offset / 16, value);
    else
        write_mmio(LAPIC + offset, 4, value);
}

bool lapic_is_there(void)
{
    return cpuid(1, 0).edx & CPUID_1_EDX_APIC && apic_base() & ENABLED;
}

void lapic_send_init(void)
{
    write_register(COMMAND, TO_ALL_OTHERS | INIT);
}

void lapic_send_start(void)
{
    write_register(COMMAND, TO_ALL_OTHERS | START | BARE_TRAMPOLINE >> 12);
}

void lapic_send_wake(void)
{
    write_register(COMMAND, TO_ALL_OTHERS | BARE_WAKE_VECTOR);
}

void lapic_accept(void)
{
    write_register(SPURIOUS_VECTOR, SOFTWARE_ENABLED | BARE_WAKE_VECTOR);
}

void lapic_sleep(void)
{
    bare_gate(GATE_SLEEP, 0, 0, 0);
    write_register(END_OF_INTERRUPT, 0);
}
