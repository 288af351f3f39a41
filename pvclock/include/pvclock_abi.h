/* SPDX-License-Identifier: Apache-2.0
 *
 * What the guest sees: the structures of the pvclock ABI, with Linux's names for them and for their fields.
 * Source: Linux arch/x86/include/asm/pvclock-abi.h, Documentation/virt/kvm/x86/msr.rst.
 */
#ifndef PVCLOCK_ABI_H
#define PVCLOCK_ABI_H

#include <stddef.h>
#include <stdint.h>

/* One vCPU's system time.  The version is odd while the host writes. */
struct pvclock_vcpu_time_info {
	uint32_t version;
	uint32_t pad0;
	uint64_t tsc_timestamp; /* guest TSC ticks */
	uint64_t system_time;   /* ns, at tsc_timestamp */
	uint32_t tsc_to_system_mul;
	int8_t tsc_shift;
	uint8_t flags;
	uint8_t pad[2];
};

/* The VM's wall clock: the time of day, UTC, at which its system time was 0. */
struct pvclock_wall_clock {
	uint32_t version;
	uint32_t sec;
	uint32_t nsec;
};

/* Bits of pvclock_vcpu_time_info.flags. */
#define PVCLOCK_TSC_STABLE_BIT 0x01    /* TSCs are in step on all vCPUs */
#define PVCLOCK_GUEST_STOPPED 0x02     /* set by the host at resume, cleared by the guest */

#ifdef __cplusplus
#define PVCLOCK_STATIC_ASSERT static_assert
#else
#define PVCLOCK_STATIC_ASSERT _Static_assert
#endif
#define PVCLOCK_ASSERT_OFFSET(type, field, offset) \
	PVCLOCK_STATIC_ASSERT(offsetof(struct type, field) == (offset), #type "." #field " is misplaced")

PVCLOCK_STATIC_ASSERT(sizeof(struct pvclock_vcpu_time_info) == 32, "pvclock_vcpu_time_info is 32 bytes");
PVCLOCK_ASSERT_OFFSET(pvclock_vcpu_time_info, tsc_timestamp, 8);
PVCLOCK_ASSERT_OFFSET(pvclock_vcpu_time_info, system_time, 16);
PVCLOCK_ASSERT_OFFSET(pvclock_vcpu_time_info, tsc_to_system_mul, 24);
PVCLOCK_ASSERT_OFFSET(pvclock_vcpu_time_info, tsc_shift, 28);
PVCLOCK_ASSERT_OFFSET(pvclock_vcpu_time_info, flags, 29);

PVCLOCK_STATIC_ASSERT(sizeof(struct pvclock_wall_clock) == 12, "pvclock_wall_clock is 12 bytes");
PVCLOCK_ASSERT_OFFSET(pvclock_wall_clock, sec, 4);
PVCLOCK_ASSERT_OFFSET(pvclock_wall_clock, nsec, 8);

#endif
