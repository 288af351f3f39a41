/* SPDX-License-Identifier: Apache-2.0 OR MIT
 *
 * Where bare_boot.S enters C, in ring 3.
 */
#ifndef PVCLOCK_PROBE_BARE_H
#define PVCLOCK_PROBE_BARE_H

#include <stdint.h>

/* Every vCPU, numbered by arrival. */
void bare_enter(unsigned number);

/* The boot processor, from there. */
_Noreturn void bare_main(void);

/* The boot processor, where another vCPU does not end what it was given to do. */
_Noreturn void bare_lost_vcpu(unsigned cpu);

/* The first vCPU that faults where none is expected to. */
_Noreturn void bare_fault(uint64_t vector, uint64_t error_code, uint64_t instruction, uint64_t address);

#endif
