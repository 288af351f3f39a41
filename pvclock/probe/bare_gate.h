/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * The way from ring 3, where the C code runs, to the few instructions that need ring 0.
 *
 * On some hosts (kvm-pvm) ring 0 is emulated, a thousand times slower than ring 3, and there neither a software
 * interrupt nor an IOPL of 3 works: so the call is an undefined instruction at an address that the handler knows.
 */
#ifndef PVCLOCK_PROBE_BARE_GATE_H
#define PVCLOCK_PROBE_BARE_GATE_H

#define BARE_SLOTS 64             /* vCPUs: as PROBE_CPUS_MAX */
#define BARE_STACK_BYTES 0x4000   /* of ring 3 */
#define BARE_STACK0_BYTES 0x400   /* of ring 0 */
#define BARE_TRAMPOLINE 0x8000    /* a start-up IPI takes a page below 1 MiB; what a loader left there is read before */
#define BARE_WAKE_VECTOR 0x2f     /* of all interrupts; a spurious one's ends in four ones on old CPUs */

#define BOOT_MULTIBOOT 1
#define BOOT_PVH 2
#define BOOT_LINUX 3

#define GATE_READ_MSR 0
#define GATE_WRITE_MSR 1
#define GATE_READ_PORT 2
#define GATE_WRITE_PORT 3
#define GATE_WRITE_STRING 4
#define GATE_READ_MMIO 5
#define GATE_WRITE_MMIO 6
#define GATE_CPUID 7
#define GATE_SLEEP 8
#define GATE_HALT 9
#define GATE_TRIPLE_FAULT 10

#ifndef __ASSEMBLER__

#include <stdbool.h>
#include <stdint.h>

struct gate_result {
    uint64_t value;
    uint64_t failed; /* the instruction faulted */
};

struct gate_result bare_gate(uint64_t operation, uint64_t first, uint64_t second, uint64_t third);

/* False if there is no such MSR, or it does not take that value. */
static inline bool read_msr(uint32_t msr, uint64_t *value)
{
    struct gate_result result = bare_gate(GATE_READ_MSR, msr, 0, 0);

    *value = result.value;
    return !result.failed;
}

static inline bool write_msr(uint32_t msr, uint64_t value)
{
    return !bare_gate(GATE_WRITE_MSR, msr, value, 0).failed;
}

/* Ports, of 1, 2 or 4 bytes; one that nobody has reads as ones. */
static inline uint32_t read_port(uint16_t port, unsigned bytes)
{
    return (uint32_t)bare_gate(GATE_READ_PORT, port, bytes, 0).value;
}

static inline void write_port(uint16_t port, unsigned bytes, uint32_t value)
{
    bare_gate(GATE_WRITE_PORT, port, bytes, value);
}

static inline void write_port_string(uint16_t port, const char *text, unsigned length)
{
    bare_gate(GATE_WRITE_STRING, (uintptr_t)text, port, length);
}

static inline uint32_t read_mmio(uintptr_t address)
{
    return (uint32_t)bare_gate(GATE_READ_MMIO, address, 0, 0).value;
}

/* Of 1 or 4 bytes. */
static inline void write_mmio(uintptr_t address, unsigned bytes, uint32_t value)
{
    bare_gate(GATE_WRITE_MMIO, address, bytes, value);
}

struct cpuid_registers {
    uint32_t eax, ebx, ecx, edx;
};

/* In ring 0, too: what kvm-pvm runs natively, ring 3, sees the CPUID of the host. */
static inline struct cpuid_registers cpuid(uint32_t leaf, uint32_t subleaf)
{
    struct cpuid_registers found;

    bare_gate(GATE_CPUID, leaf, subleaf, (uintptr_t)&found);
    return found;
}

_Noreturn static inline void halt(void)
{
    for (;;)
        bare_gate(GATE_HALT, 0, 0, 0);
}

#endif
#endif
