/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "bare_cpus.h"

#include <stddef.h>

#include "bare.h"
#include "bare_gate.h"
#include "bare_lapic.h"
#include "bare_memory.h"
#include "bare_wait.h"
#include "fenced_tsc.h"

enum {
    CPUID_TOPOLOGY = 0xb,
    SPINS = 1 << 12, /* a fraction of a millisecond; then an idle vCPU leaves its host CPU to others */
    LOOK_TICKS = 1 << 18, /* 0.1 ms: a look at who has come takes far less, even where the CPU is emulated */
    LATE_S = 10,     /* a vCPU that firmware tells of and that has not come by then is there in its tables only */
    LOST_S = 60      /* later than any host schedules a vCPU that it still has */
};

/* A vCPU by its arrival: the boot processor is number 0. */
struct slot {
    _Alignas(64) void (*work)(void *argument, unsigned cpu);
    void *argument;
    unsigned cpu;   /* its number in the team */
    uint32_t asked; /* how often it was given work, ... */
    uint32_t done;  /* ... and how often it did it */
    uint32_t apic_id;
    uint32_t is_here;
};

extern const char trampoline[], trampoline_end[]; /* of bare_boot.S */
extern unsigned slots_taken;                      /* there, too: by every vCPU that comes */

static struct slot slots[BARE_SLOTS];
static struct slot *members[PROBE_CPUS_MAX];
static int64_t apic_ids[PROBE_CPUS_MAX];
static uint64_t second_ticks;

_Static_assert(BARE_SLOTS == PROBE_CPUS_MAX, "a slot for each vCPU");

static uint32_t own_apic_id(void)
{
    if (cpuid(0, 0).eax >= CPUID_TOPOLOGY && cpuid(CPUID_TOPOLOGY, 0).ebx)
        return cpuid(CPUID_TOPOLOGY, 0).edx;
    return cpuid(1, 0).ebx >> 24;
}

static void await_work(struct slot *slot, uint32_t done)
{
    unsigned spins = 0;

    while (__atomic_load_n(&slot->asked, __ATOMIC_ACQUIRE) == done) {
        if (++spins < SPINS)
            __builtin_ia32_pause();
        else
            lapic_sleep();
    }
}

/* What all but the boot processor do. */
static void serve(struct slot *slot)
{
    uint32_t done = 0;

    lapic_accept();
    __atomic_store_n(&slot->is_here, 1, __ATOMIC_RELEASE);
    for (;;) {
        await_work(slot, done);
        slot->work(slot->argument, slot->cpu);
        __atomic_store_n(&slot->done, ++done, __ATOMIC_RELEASE);
    }
}

void bare_enter(unsigned number)
{
    slots[number].apic_id = own_apic_id();
    if (number == 0)
        bare_main();
    else
        serve(&slots[number]);
}

static void ask(struct slot *slot, void (*work)(void *argument, unsigned cpu), void *argument)
{
    slot->work = work;
    slot->argument = argument;
    __atomic_store_n(&slot->asked, slot->asked + 1, __ATOMIC_RELEASE);
}

static bool is_done(const struct slot *slot)
{
    return __atomic_load_n(&slot->done, __ATOMIC_ACQUIRE) == slot->asked;
}

/* A minute second by second: a TSC that steps forward, as at the VM's resume, cuts one of them short. */
static void await_done(unsigned cpu)
{
    for (unsigned second = 0; second < LOST_S; second++) {
        struct stopwatch rest;

        stopwatch_start(&rest, second_ticks);
        do {
            if (is_done(members[cpu]))
                return;
            __builtin_ia32_pause();
        } while (stopwatch_runs(&rest));
    }
    bare_lost_vcpu(cpu);
}

static void run(struct probe_team *team, uint64_t chosen, void (*work)(void *argument, unsigned cpu), void *argument)
{
    for (unsigned cpu = 1; cpu < team->cpus; cpu++)
        if (chosen >> cpu & 1)
            ask(members[cpu], work, argument);
    if (chosen & ~UINT64_C(1))
        lapic_send_wake();
    if (chosen & 1)
        work(argument, 0);
    for (unsigned cpu = 1; cpu < team->cpus; cpu++)
        await_done(cpu);
}

static unsigned count_arrived(void)
{
    unsigned arrived = 0;

    for (unsigned number = 1; number < BARE_SLOTS; number++)
        arrived += __atomic_load_n(&slots[number].is_here, __ATOMIC_ACQUIRE);
    return arrived;
}

/* Until nobody new has come for `patience` ticks in which this vCPU ran itself, or `enough` have: on a host that has no
 * CPU for it, the others may have none either.
 */
static void await_others(unsigned enough, uint64_t patience)
{
    unsigned arrived = count_arrived();
    uint64_t last_tsc = fenced_tsc(), silence = 0;

    while (arrived < enough && silence < patience) {
        unsigned now = count_arrived();
        uint64_t tsc = fenced_tsc(), passed = tsc - last_tsc;

        silence = now != arrived ? 0 : silence + (passed < LOOK_TICKS ? passed : LOOK_TICKS);
        arrived = now;
        last_tsc = tsc;
        __builtin_ia32_pause();
    }
}

static void call_others(const struct acpi_facts *told, uint64_t tsc_hz)
{
    unsigned most = told->cpus && told->cpus < BARE_SLOTS ? told->cpus : BARE_SLOTS;
    unsigned least = told->cpus ? most : told->cpus_at_least < most ? told->cpus_at_least : most;

    memcpy((void *)(uintptr_t)BARE_TRAMPOLINE, trampoline, (size_t)(trampoline_end - trampoline));
    lapic_send_init();
    wait_ticks(tsc_hz / 100);
    lapic_send_start();
    wait_ticks(tsc_hz / 5000);
    lapic_send_start(); /* who runs already ignores it */
    if (least)
        await_others(least - 1, LATE_S * tsc_hz);
    await_others(most - 1, tsc_hz / 5);
}

/* Those that have come, the boot processor first and then by APIC id; how many. */
static unsigned number_members(void)
{
    unsigned count = 1;

    members[0] = &slots[0];
    for (unsigned number = 1; number < BARE_SLOTS; number++) {
        unsigned at = count;

        if (!__atomic_load_n(&slots[number].is_here, __ATOMIC_ACQUIRE))
            continue;
        for (; at > 1 && members[at - 1]->apic_id > slots[number].apic_id; at--)
            members[at] = members[at - 1];
        members[at] = &slots[number];
        count++;
    }
    return count;
}

void cpus_start(struct probe_team *team, const struct acpi_facts *told, unsigned most, uint64_t tsc_hz)
{
    unsigned count;

    if (told->cpus != 1 && lapic_is_there())
        call_others(told, tsc_hz);
    count = number_members();
    second_ticks = tsc_hz;
    team->cpus = count < most ? count : most;
    team->run = run;
    team->state = NULL;
    for (unsigned cpu = 0; cpu < count; cpu++) {
        members[cpu]->cpu = cpu;
        apic_ids[cpu] = members[cpu]->apic_id;
    }
}

unsigned cpus_present(const struct acpi_facts *told)
{
    unsigned arrived = __atomic_load_n(&slots_taken, __ATOMIC_ACQUIRE); /* more than there are slots, too */

    return told->cpus > arrived ? told->cpus : arrived;
}

const int64_t *cpus_apic_ids(void)
{
    return apic_ids;
}
