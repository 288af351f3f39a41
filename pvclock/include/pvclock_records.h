/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* The records that host and guest share beside the time pages: wall clock, steal time, EOI byte.
 *
 * Each function works on one record of a vCPU that may be running.  The caller has checked that the record lies in guest
 * memory.  Linux is the reference for versions (kvm_write_wall_clock(), record_steal_time()).
 */
#ifndef PVCLOCK_RECORDS_H
#define PVCLOCK_RECORDS_H

#include <stddef.h>

#include "pvclock_abi.h"
#include "pvclock_words.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Write the wall clock under its version, with Linux's rule for it (kvm_write_wall_clock()): the time of day, UTC, at
 * which guest time was 0.  Once, when the guest asks for it.
 * record: 12 writable bytes, of any alignment.
 */
static inline void pvclock_publish_wall_clock(void *record, uint32_t sec, uint32_t nsec)
{
	uint8_t *at = (uint8_t *)record;
	uint32_t odd_version = pvclock_version_odd(pvclock_load32(at));

	pvclock_store32(at, odd_version);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	pvclock_store32(at + offsetof(struct pvclock_wall_clock, sec), sec);
	pvclock_store32(at + offsetof(struct pvclock_wall_clock, nsec), nsec);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	pvclock_store32(at, odd_version + 1u);
}

/* Say in a vCPU's steal time that it was scheduled out.  A guest that then wants its TLB flushed says so beside it. */
static inline void pvclock_set_preempted(void *record)
{
	uint8_t *at = (uint8_t *)record + offsetof(struct pvclock_steal_time, preempted);

	__atomic_fetch_or(at, PVCLOCK_VCPU_PREEMPTED, __ATOMIC_SEQ_CST);
}

/* Say that it runs again; returns what was said before.  In one go: a guest asks for a flush by compare-and-exchange,
 * and so knows whether it was in time.
 */
static inline uint8_t pvclock_clear_preempted(void *record)
{
	uint8_t *at = (uint8_t *)record + offsetof(struct pvclock_steal_time, preempted);

	return __atomic_exchange_n(at, 0, __ATOMIC_SEQ_CST);
}

/* Add `ns` to a vCPU's steal time: what is there is the guest's to set, and the sum goes on from it.  `preempted` stays,
 * so this may come while the vCPU is scheduled out, and loses no flush that its guest asks for.
 * record: 64 writable bytes, of any alignment.
 */
static inline void pvclock_add_steal_time(void *record, uint64_t ns)
{
	uint8_t *at = (uint8_t *)record;
	uint8_t *version = at + offsetof(struct pvclock_steal_time, version);
	uint8_t *steal = at + offsetof(struct pvclock_steal_time, steal);
	uint32_t odd_version = pvclock_version_odd(pvclock_load32(version));

	pvclock_store32(version, odd_version);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	pvclock_store64(steal, pvclock_load64(steal) + ns);
	__atomic_thread_fence(__ATOMIC_RELEASE);
	pvclock_store32(version, odd_version + 1u);
}

/* The same on the vCPU's way into the guest, as Linux does (record_steal_time()): it is no longer preempted.
 * Returns the old `preempted` byte.
 */
static inline uint8_t pvclock_publish_steal_time(void *record, uint64_t ns)
{
	uint8_t preempted = pvclock_clear_preempted(record);

	pvclock_add_steal_time(record, ns);
	return preempted;
}

/* Let the guest end its interrupt without an exit: it tests and clears the bit, and exits only if it was clear. */
static inline void pvclock_eoi_offer(uint8_t *flag)
{
	__atomic_fetch_or(flag, PVCLOCK_EOI_ENABLED, __ATOMIC_SEQ_CST);
}

/* Take the offer back.  Returns 1 if the guest has used it: its interrupt has ended.  Either side takes the bit in one
 * go, so just one of them gets it.
 */
static inline int pvclock_eoi_take(uint8_t *flag)
{
	return !(__atomic_fetch_and(flag, (uint8_t)~PVCLOCK_EOI_ENABLED, __ATOMIC_SEQ_CST) & PVCLOCK_EOI_ENABLED);
}

#ifdef __cplusplus
}
#endif

#endif
