/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* What the guest sees: the structures of the pvclock ABI, with Linux's names for them and for their fields.
 * Source: Linux arch/x86/include/asm/pvclock-abi.h, arch/x86/include/uapi/asm/kvm_para.h,
 * Documentation/virt/kvm/x86/{msr,hypercalls}.rst.
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

/* What Linux declares in asm/kvm_para.h stands here under names of ours, for a VMM may include both. */

/* One vCPU's steal time (struct kvm_steal_time).  The version is odd while the host writes. */
struct pvclock_steal_time {
	uint64_t steal; /* ns runnable and not running */
	uint32_t version;
	uint32_t flags;
	uint8_t preempted;
	uint8_t pad0[3];
	uint32_t pad[11];
};

/* Bits of pvclock_steal_time.preempted. */
#define PVCLOCK_VCPU_PREEMPTED 0x01 /* set by the host: the vCPU was scheduled out */
#define PVCLOCK_VCPU_FLUSH_TLB 0x02 /* set by the guest while that lasts: flush its TLB on the way in */

/* One vCPU's asynchronous page faults (struct kvm_vcpu_pv_apf_data). */
struct pvclock_async_pf {
	uint32_t flags; /* why a page fault was injected; the guest clears it */
	uint32_t token; /* of the page that is ready; the guest clears it */
};

/* Values of pvclock_async_pf.flags.  The second is of the kernels before page-ready interrupts. */
#define PVCLOCK_PAGE_NOT_PRESENT 1
#define PVCLOCK_PAGE_READY 2

/* Bit 0 of a vCPU's EOI byte: an end of interrupt needs no exit. */
#define PVCLOCK_EOI_ENABLED 0x01

/* What the CLOCK_PAIRING hypercall writes (struct kvm_clock_pairing): one instant, as UTC and as guest TSC. */
struct pvclock_clock_pairing {
	int64_t sec;
	int64_t nsec;
	uint64_t tsc; /* guest TSC ticks */
	uint32_t flags;
	uint32_t pad[9];
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

PVCLOCK_STATIC_ASSERT(sizeof(struct pvclock_steal_time) == 64, "pvclock_steal_time is 64 bytes");
PVCLOCK_ASSERT_OFFSET(pvclock_steal_time, version, 8);
PVCLOCK_ASSERT_OFFSET(pvclock_steal_time, flags, 12);
PVCLOCK_ASSERT_OFFSET(pvclock_steal_time, preempted, 16);

PVCLOCK_STATIC_ASSERT(sizeof(struct pvclock_async_pf) == 8, "pvclock_async_pf is 8 bytes");
PVCLOCK_ASSERT_OFFSET(pvclock_async_pf, token, 4);

PVCLOCK_STATIC_ASSERT(sizeof(struct pvclock_clock_pairing) == 64, "pvclock_clock_pairing is 64 bytes");
PVCLOCK_ASSERT_OFFSET(pvclock_clock_pairing, nsec, 8);
PVCLOCK_ASSERT_OFFSET(pvclock_clock_pairing, tsc, 16);
PVCLOCK_ASSERT_OFFSET(pvclock_clock_pairing, flags, 24);

#endif
