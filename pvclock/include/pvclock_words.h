/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* Words in guest memory: loads and stores that another CPU may meet, at any address that a guest chooses; and the
 * version under which several of them change.
 */
#ifndef PVCLOCK_WORDS_H
#define PVCLOCK_WORDS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Guests align a page to 4 bytes at best, so it is accessed by 32-bit words, and bytewise where it is not even that:
 * Linux allows it, and such a page has the protocol but not its guarantee.
 */
typedef uint32_t __attribute__((__may_alias__)) pvclock_word;

static inline uint32_t pvclock_load32(const void *at)
{
	const uint8_t *byte = (const uint8_t *)at;
	uint32_t value = 0;

	if (((uintptr_t)at & 3) == 0)
		return __atomic_load_n((const pvclock_word *)at, __ATOMIC_RELAXED);
	for (int i = 3; i >= 0; i--)
		value = value << 8 | __atomic_load_n(byte + i, __ATOMIC_RELAXED);
	return value;
}

static inline void pvclock_store32(void *at, uint32_t value)
{
	uint8_t *byte = (uint8_t *)at;

	if (((uintptr_t)at & 3) == 0) {
		__atomic_store_n((pvclock_word *)at, value, __ATOMIC_RELAXED);
		return;
	}
	for (int i = 0; i < 4; i++)
		__atomic_store_n(byte + i, (uint8_t)(value >> 8 * i), __ATOMIC_RELAXED);
}

static inline uint64_t pvclock_load64(const void *at)
{
	return pvclock_load32(at) | (uint64_t)pvclock_load32((const uint8_t *)at + 4) << 32;
}

static inline void pvclock_store64(void *at, uint64_t value)
{
	pvclock_store32(at, (uint32_t)value);
	pvclock_store32((uint8_t *)at + 4, (uint32_t)(value >> 32));
}

/* The version of an update in progress, from whatever the guest's memory holds.  One more ends the update. */
static inline uint32_t pvclock_version_odd(uint32_t version)
{
	return (version + 1u) | 1u;
}

#ifdef __cplusplus
}
#endif

#endif
