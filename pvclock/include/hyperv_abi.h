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

/* A message slot of the SIM page (struct hv_message): the header, and up to 240 bytes of payload. */
struct hyperv_message_header {
	uint32_t type; /* 0: the slot is free; the host sets it last, the guest clears it when it has read the rest */
	uint8_t payload_size;
	uint8_t flags;
	uint16_t reserved;
	uint64_t sender;
};

#define HYPERV_MESSAGE_BYTES 256
#define HYPERV_MESSAGE_PENDING 0x01 /* a flag: another message waits; the guest writes EOM when it has freed the slot */

#define HYPERV_MSR_TIME_REF_COUNT 0x40000020u /* the counter: reference time; a write is #GP */
#define HYPERV_MSR_REFERENCE_TSC 0x40000021u  /* the page's guest page number in bits 63:12, enable in bit 0 */

PVCLOCK_STATIC_ASSERT(sizeof(struct hyperv_tsc_page) == HYPERV_PAGE_BYTES, "hyperv_tsc_page is 4096 bytes");
PVCLOCK_ASSERT_OFFSET(hyperv_tsc_page, sequence, 0);
PVCLOCK_ASSERT_OFFSET(hyperv_tsc_page, reserved, 4);
PVCLOCK_ASSERT_OFFSET(hyperv_tsc_page, scale, 8);
PVCLOCK_ASSERT_OFFSET(hyperv_tsc_page, offset, 16);

PVCLOCK_STATIC_ASSERT(sizeof(struct hyperv_message_header) == 16, "hyperv_message_header is 16 bytes");
PVCLOCK_ASSERT_OFFSET(hyperv_message_header, flags, 5);
PVCLOCK_ASSERT_OFFSET(hyperv_message_header, sender, 8);

#endif
