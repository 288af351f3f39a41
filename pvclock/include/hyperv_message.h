/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* Message slots of a synthetic interrupt controller: how a host posts a message to a guest that is running.
 * Source: TLFS, "Message Buffers" and "SIMP Page"; Linux drivers/hv (vmbus_signal_eom()) is the guest's side.
 */
#ifndef HYPERV_MESSAGE_H
#define HYPERV_MESSAGE_H

#include "hyperv_abi.h"
#include "pvclock_words.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Post a message if the slot is free.  Returns 1 if it is posted; 0 if the slot holds another one, which stays.
 *
 * waits: the caller tries again at the guest's EOM.  A full slot then gets the pending flag, at which the guest writes
 * EOM.  The guest frees the slot first and reads the flag after; here the flag is first.  So if both overlap, either the
 * guest sees the flag, or the slot is found free here.
 *
 * slot: HYPERV_MESSAGE_BYTES writable bytes, of any alignment; a guest may write anything there at any time.
 * message: header and payload, `bytes` long, a multiple of 4.
 */
static inline int hyperv_message_post(void *slot, const void *message, size_t bytes, int waits)
{
	uint8_t *at = (uint8_t *)slot;
	const uint8_t *from = (const uint8_t *)message;

	if (pvclock_load32(at) != 0) {
		if (!waits)
			return 0;
		__atomic_fetch_or(at + offsetof(struct hyperv_message_header, flags), HYPERV_MESSAGE_PENDING, __ATOMIC_SEQ_CST);
		if (pvclock_load32(at) != 0)
			return 0;
	}
	__atomic_thread_fence(__ATOMIC_ACQ_REL); /* the guest has read the last message before it freed the slot */
	for (size_t i = 4; i < bytes; i += 4)
		pvclock_store32(at + i, pvclock_load32(from + i));
	__atomic_thread_fence(__ATOMIC_RELEASE);
	pvclock_store32(at, pvclock_load32(from));
	return 1;
}

#ifdef __cplusplus
}
#endif

#endif
