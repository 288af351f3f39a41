/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* A search of memory for pvclock pages that nobody told the address of: by what their fields can hold, at every multiple
 * of 4 bytes.  It runs about as fast as memory is read.
 *
 * The memory may change meanwhile; what is found was there a moment ago, and is to be read again.
 */
#ifndef PVCLOCK_SEARCH_H
#define PVCLOCK_SEARCH_H

#include "pvclock_abi.h"
#include "pvclock_math.h"
#include "pvclock_words.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PVCLOCK_PAGE_BYTES sizeof(struct pvclock_vcpu_time_info)
#define PVCLOCK_SEARCH_STEP 4
#define PVCLOCK_BLOCK_PLACES 16 /* that are looked at together */
#define PVCLOCK_PPM 1000000u

/* The shifts that a scale of Linux's can have: pvclock_time_scale(). */
#define PVCLOCK_SHIFT_LEAST (-34)
#define PVCLOCK_SHIFT_MOST 30

/* The page's last word: its shift, and what is 0 in any page. */
#define PVCLOCK_TAIL offsetof(struct pvclock_vcpu_time_info, tsc_shift)
#define PVCLOCK_TAIL_PADS 0xffff0000u
#define PVCLOCK_TAIL_ZEROS (PVCLOCK_TAIL_PADS | (0xffu & ~(PVCLOCK_TSC_STABLE_BIT | PVCLOCK_GUEST_STOPPED)) << 8)

/* What a page must show.  Rates are those of pvclock_scale_rate(). */
struct pvclock_search_terms {
	pvclock_u128 rate_least;
	pvclock_u128 rate_most;
	uint64_t newest_tsc; /* no tsc_timestamp is beyond */
};

/* Offsets of places: how many there are, and the first `room` of them. */
struct pvclock_places {
	uint64_t *offsets;
	size_t room;
	uint64_t count;
};

/* What a search finds.  Each kind of place is one of the kind before it, too.  A place with an odd version, which is not
 * counted as `even`, is in the others: its page is being written.
 */
struct pvclock_search_result {
	uint64_t even;                    /* version even, not 0, and all pads 0 */
	struct pvclock_places other_rate; /* legal flags, mul, shift and tsc_timestamp, and a rate out of bounds */
	struct pvclock_places pages;      /* the same, and a rate within bounds */
};

/* The rate of a scale as one number, in 2^-66 ns a tick; its shift is a legal one. */
static inline pvclock_u128 pvclock_scale_rate(struct pvclock_scale scale)
{
	return (pvclock_u128)scale.mul << (scale.shift - PVCLOCK_SHIFT_LEAST);
}

/* Terms for a TSC of tsc_hz whose scale is within_ppm off at most: exactly, none is lost to rounding.
 * Returns 0, or -1 for a frequency of 0, or 10^6 ppm and more.
 */
static inline int pvclock_search_terms_of(uint64_t tsc_hz, uint32_t within_ppm, uint64_t newest_tsc,
					  struct pvclock_search_terms *ret)
{
	const pvclock_u128 ppm_rate = (pvclock_u128)(PVCLOCK_NS_PER_SEC / PVCLOCK_PPM) << (32 - PVCLOCK_SHIFT_LEAST);

	if (tsc_hz == 0 || within_ppm >= PVCLOCK_PPM)
		return -1;
	ret->rate_least = ((PVCLOCK_PPM - within_ppm) * ppm_rate + tsc_hz - 1) / tsc_hz;
	ret->rate_most = (PVCLOCK_PPM + within_ppm) * ppm_rate / tsc_hz;
	ret->newest_tsc = newest_tsc;
	return 0;
}

/* ---- One place. ---- */

static inline int pvclock_has_legal_scale(struct pvclock_scale scale)
{
	return scale.mul >> 31 && scale.shift >= PVCLOCK_SHIFT_LEAST && scale.shift <= PVCLOCK_SHIFT_MOST;
}

static inline void pvclock_add_place(struct pvclock_places *places, uint64_t offset)
{
	if (places->count < places->room)
		places->offsets[places->count] = offset;
	places->count++;
}

/* Is `page` one by all but its rate?  While the version is odd, tsc_timestamp may be half an old and half a new one. */
static inline int pvclock_is_legal_page(const uint8_t *page, struct pvclock_scale scale, uint64_t newest_tsc)
{
	uint32_t version = pvclock_load32(page);
	uint64_t tsc = pvclock_load64(page + offsetof(struct pvclock_vcpu_time_info, tsc_timestamp));

	return version != 0 && pvclock_load32(page + offsetof(struct pvclock_vcpu_time_info, pad0)) == 0 &&
	       (pvclock_load32(page + PVCLOCK_TAIL) & PVCLOCK_TAIL_ZEROS) == 0 && pvclock_has_legal_scale(scale) &&
	       (version & 1 || (tsc != 0 && tsc <= newest_tsc));
}

static inline void pvclock_search_place(const uint8_t *memory, uint64_t offset, const struct pvclock_search_terms *terms,
					struct pvclock_search_result *result)
{
	const uint8_t *page = memory + offset;
	struct pvclock_scale scale = {
		pvclock_load32(page + offsetof(struct pvclock_vcpu_time_info, tsc_to_system_mul)),
		(int8_t)__atomic_load_n(page + PVCLOCK_TAIL, __ATOMIC_RELAXED),
	};
	pvclock_u128 rate;

	if (!pvclock_is_legal_page(page, scale, terms->newest_tsc))
		return;
	rate = pvclock_scale_rate(scale);
	pvclock_add_place(rate >= terms->rate_least && rate <= terms->rate_most ? &result->pages : &result->other_rate,
			  offset);
}

/* ---- Many. ---- */

/* A word at any address, which a compiler may load together with its neighbours. */
typedef uint32_t __attribute__((__may_alias__, __aligned__(1))) pvclock_plain_word;

static inline uint32_t pvclock_has_version_and_pads(const pvclock_plain_word *word)
{
	return (uint32_t)(word[0] != 0) & (uint32_t)((word[1] | (word[7] & PVCLOCK_TAIL_PADS)) == 0);
}

static inline uint32_t pvclock_may_be_legal(const pvclock_plain_word *word)
{
	return (uint32_t)((word[7] & PVCLOCK_TAIL_ZEROS) == 0) & word[6] >> 31;
}

/* Search a block, all of whose places have their pages' 32 bytes.  What is asked of all places at once a compiler does
 * for several in one instruction; few blocks come to the end.
 */
static inline void pvclock_search_block(const uint8_t *memory, uint64_t offset, const struct pvclock_search_terms *terms,
					struct pvclock_search_result *result)
{
	const pvclock_plain_word *word = (const pvclock_plain_word *)(memory + offset);
	uint32_t any = 0, even = 0;

	for (int i = 0; i < PVCLOCK_BLOCK_PLACES; i++)
		any |= pvclock_has_version_and_pads(word + i);
	if (!any)
		return;
	any = 0;
	for (int i = 0; i < PVCLOCK_BLOCK_PLACES; i++) {
		even += pvclock_has_version_and_pads(word + i) & ~word[i];
		any |= pvclock_has_version_and_pads(word + i) & pvclock_may_be_legal(word + i);
	}
	result->even += even;
	for (int i = 0; any && i < PVCLOCK_BLOCK_PLACES; i++)
		pvclock_search_place(memory, offset + (uint64_t)i * PVCLOCK_SEARCH_STEP, terms, result);
}

/* Search `length` bytes.  The caller has set up the places of `result`; what is found is added to it. */
static inline void pvclock_search(const void *memory, size_t length, const struct pvclock_search_terms *terms,
				  struct pvclock_search_result *result)
{
	const uint8_t *bytes = (const uint8_t *)memory;
	const size_t block = PVCLOCK_BLOCK_PLACES * PVCLOCK_SEARCH_STEP;
	const size_t reach = block - PVCLOCK_SEARCH_STEP + PVCLOCK_PAGE_BYTES;
	size_t at = 0;

	for (; length >= reach && at <= length - reach; at += block)
		pvclock_search_block(bytes, at, terms, result);
	for (; length >= PVCLOCK_PAGE_BYTES && at <= length - PVCLOCK_PAGE_BYTES; at += PVCLOCK_SEARCH_STEP) {
		result->even += pvclock_has_version_and_pads((const pvclock_plain_word *)(bytes + at)) & ~bytes[at];
		pvclock_search_place(bytes, at, terms, result);
	}
}

#ifdef __cplusplus
}
#endif

#endif
