/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* What a Hyper-V guest sees of its reference time: the page, and the MSRs beside it.
 * Source: Hypervisor Top Level Functional Specification, "Partition Reference Time Enlightenment"; Linux
 * include/hyperv/hvgdk_mini.h (struct ms_hyperv_tsc_page), under names of ours, for a VMM may include both.
 */
#ifndef HYPERV_ABI_H
#define HYPERV_ABI_H

#include "pvclock_abi.h"

#define HYPERV_PAGE_BYTES 4096

/* The partition's reference TSC page.  Reference time, in units of 100 ns, is ((guest TSC * scale) >> 64) + offset. */
struct hyperv_tsc_page {
	uint32_t sequence; /* changes with the rest; see below */
	uint32_t reserved;
	uint64_t scale; /* units a tick, in 2^-64 */
	int64_t offset; /* units */
	uint64_t reserved2[509];
};

/* Sequences under which nobody may use the page: the guest reads the counter MSR.  Linux asks for the first only. */
#define HYPERV_SEQUENCE_INVALID 0u
#define HYPERV_SEQUENCE_RESERVED 0xffffffffu

#define HYPERV_UNIT_NS 100u

#define HYPERV_MSR_TIME_REF_COUNT 0x40000020u /* the counter: reference time; a write is #GP */
#define HYPERV_MSR_REFERENCE_TSC 0x40000021u  /* the page's guest page number in bits 63:12, enable in bit 0 */

PVCLOCK_STATIC_ASSERT(sizeof(struct hyperv_tsc_page) == HYPERV_PAGE_BYTES, "hyperv_tsc_page is 4096 bytes");
PVCLOCK_ASSERT_OFFSET(hyperv_tsc_page, sequence, 0);
PVCLOCK_ASSERT_OFFSET(hyperv_tsc_page, reserved, 4);
PVCLOCK_ASSERT_OFFSET(hyperv_tsc_page, scale, 8);
PVCLOCK_ASSERT_OFFSET(hyperv_tsc_page, offset, 16);

#endif
