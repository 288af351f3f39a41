/* SPDX-License-Identifier: Apache-2.0 OR MIT */

/* The arithmetic of guest clocks: pure functions of integers, no state, no clock.
 *
 * Everything that turns ticks into nanoseconds or moves a TSC stands here once; Cython, C and C++ users share it.
 * All sums are modulo 2^64 unless a comment says otherwise.  C11 and C++17.
 */
#ifndef PVCLOCK_MATH_H
#define PVCLOCK_MATH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

__extension__ typedef unsigned __int128 pvclock_u128;

#define PVCLOCK_NS_PER_SEC 1000000000ull

/* ticks -> ns as every pvclock guest computes it: ((ticks << shift) * mul) >> 32; a negative shift goes right. */
struct pvclock_scale {
	uint32_t mul;
	int8_t shift;
};

/* (a * b) >> bits, with the full 128-bit product; bits < 128. */
static inline uint64_t pvclock_mul_shr(uint64_t a, uint64_t b, unsigned int bits)
{
	return (uint64_t)(((pvclock_u128)a * b) >> bits);
}

static inline int pvclock_needs_high_word(uint64_t value)
{
	return value >> 32 != 0;
}

/* The pair that converts base_hz ticks into scaled_hz ticks, bit for bit that of Linux's kvm_get_time_scale().
 *
 * Returns 0, or -1 where Linux would not end or wrap: a frequency of 0, or scaled_hz >= 2^63.  For base_hz > 0 and
 * scaled_hz = 10^9, mul is in [2^31, 2^32) and shift in [-34, 30].
 */
static inline int pvclock_time_scale(uint64_t scaled_hz, uint64_t base_hz, struct pvclock_scale *ret)
{
	uint64_t scaled = scaled_hz;
	uint64_t base = base_hz;
	int shift = 0;

	if (scaled_hz == 0 || base_hz == 0 || scaled_hz >> 63)
		return -1;

	/* Linux drops the low bits of an odd base here; the loss (at most 0.5 ppb) is part of the contract. */
	while (base > 2 * scaled || pvclock_needs_high_word(base)) {
		base >>= 1;
		shift--;
	}
	while (base <= scaled || pvclock_needs_high_word(scaled)) {
		if (pvclock_needs_high_word(scaled) || base >> 31)
			scaled >>= 1;
		else
			base <<= 1;
		shift++;
	}

	/* Fits: scaled < base, so the quotient is below 2^32. */
	ret->mul = (uint32_t)((scaled << 32) / base);
	ret->shift = (int8_t)shift;
	return 0;
}

/* The pair for num/den ns a tick, free of Linux's truncation of the base: rounded down, never fast, at most 2^-31
 * (0.466 ppb) slow; or, with `nearest`, at most 2^-32 off either way.  Rounded down it is Linux's pair for every
 * frequency that Linux uses (whole kHz, below 16 GHz).
 * Returns 0, or -1 for a rate of 0, or one that takes a left shift of 32 or more.
 */
static inline int pvclock_time_scale_of_rate(uint64_t num, uint64_t den, int nearest, struct pvclock_scale *ret)
{
	pvclock_u128 dividend = (pvclock_u128)num << 32;
	pvclock_u128 divisor = den;
	pvclock_u128 mul;
	int shift = 0;

	if (num == 0 || den == 0)
		return -1;

	/* Bring dividend / divisor into [2^31, 2^32).  Fits: the dividend ends below 2^96, the divisor too. */
	while (dividend < divisor << 31) {
		dividend <<= 1;
		shift--;
	}
	while (dividend >= divisor << 32) {
		divisor <<= 1;
		shift++;
	}

	mul = (dividend + (nearest ? divisor / 2 : 0)) / divisor;
	if (mul >> 32) { /* Rounded up to 2^32: the same value, one binade on. */
		mul >>= 1;
		shift++;
	}
	if (shift >= 32)
		return -1;
	ret->mul = (uint32_t)mul;
	ret->shift = (int8_t)shift;
	return 0;
}

/* What the guest computes for `delta` ticks, in ns (pvclock_scale_delta() of Linux).
 *
 * Bits that a left shift pushes out are lost, as in the guest.  A shift of 64 or more either way, undefined in C and
 * found only in a page that somebody else wrote, gives 0.
 */
static inline uint64_t pvclock_scale_delta(uint64_t delta, struct pvclock_scale scale)
{
	if (scale.shift <= -64 || scale.shift >= 64)
		return 0;
	if (scale.shift < 0)
		delta >>= -scale.shift;
	else
		delta <<= scale.shift;
	return pvclock_mul_shr(delta, scale.mul, 32);
}

/* The inverse: the fewest ticks for which pvclock_scale_delta() reaches `ns`.
 * Returns 0, or -1 if that takes 2^64 ticks or more, or more than the left shift can carry.
 * Precondition: mul > 0, -64 < shift < 64.
 */
static inline int pvclock_unscale_delta(uint64_t ns, struct pvclock_scale scale, uint64_t *ret)
{
	/* Shifted ticks: ceil(ns * 2^32 / mul).  Fits: the product is below 2^96. */
	pvclock_u128 shifted = (((pvclock_u128)ns << 32) + scale.mul - 1) / scale.mul;
	pvclock_u128 ticks;

	if (shifted >> 64)
		return -1;
	if (scale.shift < 0)
		ticks = shifted << -scale.shift;
	else
		ticks = (shifted + (((pvclock_u128)1 << scale.shift) - 1)) >> scale.shift;
	if (ticks >> 64 || (scale.shift > 0 && (ticks << scale.shift) >> 64))
		return -1;
	*ret = (uint64_t)ticks;
	return 0;
}

/* Hardware TSC scaling: VMX has 48 fraction bits, SVM 32.  A ratio of 1 << frac_bits is 1.0. */
#define PVCLOCK_TSC_RATIO_FRAC_BITS_VMX 48
#define PVCLOCK_TSC_RATIO_FRAC_BITS_SVM 32

/* floor(2^frac_bits * guest_khz / host_khz), as Linux programs it.
 * Returns 0, or -1 if host_khz is 0 or the ratio is 0 or does not fit the hardware's field (64 bits VMX, 40 SVM).
 */
static inline int pvclock_tsc_ratio(uint32_t guest_khz, uint32_t host_khz, unsigned int frac_bits, uint64_t *ret)
{
	unsigned int field_bits = frac_bits == PVCLOCK_TSC_RATIO_FRAC_BITS_SVM ? 40 : 64;
	pvclock_u128 ratio;

	if (host_khz == 0)
		return -1;
	ratio = ((pvclock_u128)guest_khz << frac_bits) / host_khz;
	/* Linux refuses the field's all-ones value too. */
	if (ratio == 0 || ratio >= ((pvclock_u128)1 << field_bits) - 1)
		return -1;
	*ret = (uint64_t)ratio;
	return 0;
}

/* The guest's TSC: guest = scaled(host) + offset. */
static inline uint64_t pvclock_guest_tsc(uint64_t host_tsc, uint64_t ratio, unsigned int frac_bits, uint64_t offset)
{
	return pvclock_mul_shr(host_tsc, ratio, frac_bits) + offset;
}

/* A straight piece of guest time with an exact remainder: at `tsc` the value is ns + rem/den nanoseconds, and each
 * tick adds num/den more.  rem < den, den > 0.
 */
struct pvclock_line {
	uint64_t tsc;
	uint64_t ns;
	uint64_t rem;
	uint64_t num;
	uint64_t den;
};

/* Move the line's anchor to `tsc` without moving the line.  A tick before the anchor is taken for the anchor: a
 * counter that stepped back stops the clock and never turns it.
 */
static inline struct pvclock_line pvclock_line_at(struct pvclock_line line, uint64_t tsc)
{
	uint64_t delta = tsc - line.tsc;
	pvclock_u128 sum;

	line.tsc = tsc;
	if ((int64_t)delta <= 0)
		return line;
	/* Fits: (2^64 - 1)^2 + 2^64 - 1 < 2^128. */
	sum = (pvclock_u128)delta * line.num + line.rem;
	line.ns += (uint64_t)(sum / line.den);
	line.rem = (uint64_t)(sum % line.den);
	return line;
}

/* The line that goes on from `line`'s anchor at num/den ns a tick, both at least 1.
 *
 * The remainder is carried over to the new denominator, rounded down: less than 1/den ns is lost, so both terms are
 * widened first until one fills its word.
 */
static inline struct pvclock_line pvclock_line_turn(struct pvclock_line line, uint64_t num, uint64_t den)
{
	int spare_bits = __builtin_clzll(num | den);

	num <<= spare_bits;
	den <<= spare_bits;
	line.rem = (uint64_t)((pvclock_u128)line.rem * den / line.den);
	line.num = num;
	line.den = den;
	return line;
}

/* ---- Units of more than a nanosecond, in 64.64 fixed point. ---- */

/* num/den ns a tick as units of unit_ns ns a tick, rounded to the nearest: at most 2^-65 units a tick off.
 * Precondition: den > 0, 0 < unit_ns < 2^63.
 */
static inline pvclock_u128 pvclock_fixed_rate(uint64_t num, uint64_t den, uint64_t unit_ns)
{
	pvclock_u128 dividend = (pvclock_u128)num << 64;
	pvclock_u128 divisor = (pvclock_u128)den * unit_ns;
	pvclock_u128 rest = dividend % divisor;

	return dividend / divisor + (rest >= divisor - rest);
}

/* The line's value at `tsc` in units of unit_ns ns, rounded down. */
static inline pvclock_u128 pvclock_line_fixed(struct pvclock_line line, uint64_t tsc, uint64_t unit_ns)
{
	struct pvclock_line at = pvclock_line_at(line, tsc);
	uint64_t fraction = (uint64_t)(((pvclock_u128)at.rem << 64) / at.den);

	return (((pvclock_u128)at.ns << 64) | fraction) / unit_ns;
}

#ifdef __cplusplus
}
#endif

#endif
