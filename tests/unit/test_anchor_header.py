"""pvclock_anchor.h and what publishes and reads its lines, as a VMM in C calls them; the right values are by hand."""

from __future__ import annotations

import pytest

from tests.unit.c_program import printed_by

PROGRAM = r"""
#define _DEFAULT_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "pvclock_own_line.h"

#define BREAK (UINT64_C(1) << 40)
#define NS UINT64_C(10000000000)

/* Just over half a ns a tick, and odd: every fraction of a ns can be had at a break point. */
static const struct pvclock_scale half = { 0x80000001, 0 };

static void inverses(void)
{
	const struct pvclock_scale scales[] = { half, { 0xfffffffd, -3 }, { 0xcccccccc, 0 }, { 0x90000007, 3 } };

	for (int i = 0; i < 4; i++) {
		struct pvclock_anchor_params params = pvclock_anchor_params_of(scales[i]);
		uint32_t granule_ns = scales[i].mul << (scales[i].shift > 0 ? scales[i].shift : 0);

		printf("%d:%d ", (int)params.zeros, (int)((granule_ns >> params.zeros) * params.inverse));
	}
}

/* What a guest sees at the break point and at the next ticks, above NS, if the timeline is at ns + quarters / 4. */
static void taken_over(uint64_t ns, uint64_t quarters)
{
	struct pvclock_line timeline = { BREAK, ns, quarters, 1, 4 };
	struct pvclock_anchor old = { BREAK, NS, half }, new;
	struct pvclock_anchor_params params = pvclock_anchor_params_of(half);

	new = pvclock_reanchor(&timeline, &old, &params, BREAK);
	for (int i = 0; i < 3; i++)
		printf("%" PRIu64 " ", pvclock_anchor_read(&new, BREAK + i) - NS);
}

static void before_the_timestamp(void)
{
	struct pvclock_anchor anchor = { BREAK, NS, half };

	for (int i = -2; i < 3; i++)
		printf("%" PRIu64 " ", pvclock_anchor_read(&anchor, BREAK + i) - NS);
}

static void spare_ticks(void)
{
	struct pvclock_anchor_params params = pvclock_anchor_params_of((struct pvclock_scale){ 0x80000001, -4 });
	struct pvclock_moment lacking[] = { { 0, 0 }, { 0, UINT32_C(1) << 30 }, { 1, 0 }, { UINT64_C(1) << 30, 0 } };

	for (int i = 0; i < 4; i++)
		printf("%" PRIu64 " ", pvclock_spare_ticks(lacking[i], &params));
}

/* A clock of some 2^41 ticks a ns, whose past has more than 2^61 ticks. */
static void slow_clock(uint64_t ns)
{
	struct pvclock_anchor_params params = pvclock_anchor_params_of((struct pvclock_scale){ 0x80000001, -40 });
	struct pvclock_line timeline = { UINT64_C(1) << 63, ns, 0, 1, 4 };
	struct pvclock_anchor old = { 0 }, new;

	new = pvclock_reanchor(&timeline, &old, &params, timeline.tsc);
	printf("%d ", timeline.tsc - new.tsc_timestamp <= UINT64_C(1) << 61);
	printf("%" PRIu64 " ", ns - pvclock_anchor_read(&new, timeline.tsc));
}

static uint64_t read_letter(void *context)
{
	(void)context;
	putchar('c');
	return BREAK;
}

static void touch(struct pvclock_page_set *set) { putchar(set->pages ? 't' : '?'); }
static void mark_busy(struct pvclock_page_set *set) { putchar(set->pages ? 'm' : '?'); }
static void release(struct pvclock_page_set *set) { putchar(set->pages ? 'r' : '?'); }
static void write_line(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	putchar(set->pages && update->break_tsc == BREAK ? 'w' : '?');
}

/* A letter for each call that a publish makes. */
static void calls(void)
{
	static const struct pvclock_page_kind kind = { NULL, touch, mark_busy, NULL, write_line, release };
	struct pvclock_page_set sets[] = { { &kind, sets, 1, 0 }, { &kind, NULL, 0, 0 }, { &kind, sets, 1, 0 } };
	struct pvclock_line timeline = { 0, 0, 0, 1, 2 };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(half);
	struct pvclock_counter counter = { read_letter, NULL, 0 };
	struct pvclock_anchor anchor = { 0 };
	uint64_t break_tsc = 0;

	printf(" %d ", pvclock_publish_at(sets, 3, &timeline, &params, &counter, &anchor, &break_tsc, 0));
}

static uint64_t read_break(void *context)
{
	(void)context;
	return BREAK + 1000;
}

/* Publishes one page alone, and reads it while it is even and while it is odd. */
static void one_page(void)
{
	static _Alignas(32) uint8_t page[32] = { 4 };
	struct pvclock_target target = { page, 0, 0, 0, 0 };
	struct pvclock_line timeline = { BREAK, NS, 0, 1, 2 };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(half);
	struct pvclock_counter counter = { read_break, NULL, 0 };
	struct pvclock_anchor anchor = { 0 };
	struct pvclock_reading reading = { 7, 7, 7, 7 };
	uint64_t break_tsc;

	printf("%d ", pvclock_publish(&target, 1, &timeline, &params, &counter, &anchor, &break_tsc));
	printf("%d ", pvclock_read(page, 0, &counter, 1, &reading));
	printf("%" PRIu64 " %" PRIu32 " ", reading.ns - NS, reading.version);
	page[0]++;
	printf("%d", pvclock_read(page, 0, &counter, 3, &reading));
}

/* Three pages with lines of their own in a set of the first two: which are in memory, and their versions. */
static void own_pages(void)
{
	uint8_t *memory = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct pvclock_own_page own[3];
	struct pvclock_page_set set = { &pvclock_page_kind_own_line, own, 2, 1 };
	unsigned char is_in[3];

	if (memory == MAP_FAILED)
		exit(1);
	for (int i = 0; i < 3; i++)
		own[i] = (struct pvclock_own_page){ memory + 4096 * i, { BREAK, NS, half }, 4, 0, 1 };
	set.kind->touch(&set);
	if (mincore(memory, 3 * 4096, is_in) != 0)
		exit(1);
	printf("%d%d%d ", is_in[0] & 1, is_in[1] & 1, is_in[2] & 1);
	set.kind->mark_busy(&set);
	printf("%d%d%d ", memory[0], memory[4096], memory[2 * 4096]);
	set.kind->release(&set);
	printf("%d%d%d", memory[0], memory[4096], memory[2 * 4096]);
}

static void ordered(void)
{
	int64_t passed = (int64_t)(pvclock_rdtsc_ordered() - __builtin_ia32_rdtsc());

	printf("%d", -(INT64_C(1) << 34) < passed && passed < INT64_C(1) << 34);
}

int main(void)
{
	inverses(), puts("");
	taken_over(NS, 3), puts("");
	taken_over(NS - 2, 3), puts("");
	taken_over(NS + 100, 0), puts("");
	before_the_timestamp(), puts("");
	spare_ticks(), puts("");
	slow_clock(UINT64_C(1) << 21), slow_clock(UINT64_C(1) << 40), puts("");
	calls(), puts("");
	one_page(), puts("");
	own_pages(), puts("");
	ordered(), puts("");
	return 0;
}
"""

TRAPS = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what the program prints; where it would read beyond an object it ends with a signal instead."""
    return printed_by(PROGRAM, tmp_path_factory.mktemp("anchor"), "-O2", *TRAPS)


@pytest.mark.row("E11")
def test_the_odd_part_of_a_granule_has_its_inverse(printed: list[str]) -> None:
    """Their product is 1 modulo 2^32, and what is left out are the zeros at the end."""
    assert printed[0] == "0:1 0:1 2:1 3:1"


@pytest.mark.row("E11")
def test_a_new_line_keeps_the_fraction_of_its_timeline(printed: list[str]) -> None:
    """From three quarters, a tick of half a ns leads to the next.

    A clock ahead of its timeline goes on from a whole ns.  One behind it wins 1 ns, and the fraction that is just short
    of another.
    """
    assert printed[1:4] == ["0 1 1", "0 0 1", "1 2 3"]


@pytest.mark.row("E11")
def test_before_its_timestamp_a_line_stands(printed: list[str]) -> None:
    """One tick before as well as two: where a guest would read centuries."""
    assert printed[4] == "0 0 0 0 1"


@pytest.mark.row("E11")
def test_ticks_that_a_right_shift_cuts_win_back_what_is_lacking(printed: list[str]) -> None:
    """A quarter of a ns takes just under 8 ticks of a 32nd; a whole one, or centuries, all 15 that are cut."""
    assert printed[5] == "0 7 15 15"


@pytest.mark.row("E11")
def test_a_very_slow_clock_is_backdated_by_no_more_than_can_be_told(printed: list[str]) -> None:
    """By 2^61 ticks at most, whether its past has more ticks than that or more than 2^64; it shows its time."""
    assert printed[6] == "1 0 1 0"


@pytest.mark.row("E9")
def test_a_publish_brings_all_pages_in_before_it_marks_the_first(printed: list[str]) -> None:
    """Touch, mark busy, read the counter, write, wait, release: each for all sets with pages before the next."""
    assert printed[7] == "ttmmcwwcrr 0"


@pytest.mark.row("K-08", "E9")
def test_a_page_alone_is_published_and_read(printed: list[str]) -> None:
    """The publish looks at no second set; a reading has the page's version; -1 tells of an update that does not end."""
    assert printed[8] == "0 0 500 6 -1"


@pytest.mark.row("V-20")
def test_pages_with_lines_of_their_own_are_brought_in_and_busy(printed: list[str]) -> None:
    """All of the set, and no other: in memory after the touch, odd while they are written, and even after it."""
    assert printed[9] == "110 330 440"


@pytest.mark.row("E9")
def test_the_counter_is_that_of_the_cpu(printed: list[str]) -> None:
    """Read in order it is what rdtsc gives beside it, within seconds."""
    assert printed[10] == "1"
