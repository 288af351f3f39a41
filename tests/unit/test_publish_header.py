"""The headers that publish, as a VMM in C uses them: what no clock in Python asks of them, or shows."""

from __future__ import annotations

import pytest

from tests.unit.c_program import printed_by, told

PROGRAM = r"""
#define _GNU_SOURCE
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include "pvclock_own_line.h"

/* ---- Arithmetic. ---- */

static void scales(void)
{
	struct pvclock_scale left = { 1u << 31, 64 }, right = { 1u << 31, -64 }, got = { 7, 7 };
	int slowest = pvclock_time_scale_of_rate(INT32_MAX, 1, 0, &got);

	printf("scales %" PRIu64 " %" PRIu64 " ", pvclock_scale_delta(5, left), pvclock_scale_delta(5, right));
	printf("%d %d ", slowest, got.shift);
	printf("%d\n", pvclock_time_scale_of_rate(UINT64_C(1) << 31, 1, 0, &got));
}

static void ticks_of(uint64_t ns)
{
	struct pvclock_scale one_ns = { 1u << 31, 1 };
	uint64_t ticks = 7;
	int status = pvclock_unscale_delta(ns, one_ns, &ticks);

	printf("ticks %d %" PRIu64 "\n", status, ticks);
}

static void remainder_of_a_line(void)
{
	struct pvclock_line line = { 10, 0, 1, 2, 5 };

	line = pvclock_line_at(line, 14);
	printf("line %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", line.tsc, line.ns, line.rem);
}

/* ---- Anchors. ---- */

#define BREAK_TSC (UINT64_C(1) << 62)

/* The time that a guest computes at the break point, with the fraction that it cuts. */
static void print_at_break(const struct pvclock_anchor *anchor)
{
	pvclock_u128 ticks = BREAK_TSC - anchor->tsc_timestamp, time;

	ticks = anchor->scale.shift < 0 ? ticks >> -anchor->scale.shift : ticks << anchor->scale.shift;
	time = ticks * anchor->scale.mul + ((pvclock_u128)anchor->system_time << 32);
	printf("break %" PRIu64 " %#" PRIx32 "\n", (uint64_t)(time >> 32), (uint32_t)time);
}

static void anchor_with(uint32_t mul, int8_t shift)
{
	struct pvclock_scale scale = { mul, shift };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(scale);
	struct pvclock_moment moment = { UINT64_C(1) << 40, 0x89abcdef };
	struct pvclock_anchor anchor = pvclock_anchor_through(moment, BREAK_TSC, &params, moment.ns);

	print_at_break(&anchor);
}

static void anchor_one_ns_ahead(void)
{
	struct pvclock_scale scale = { INT32_MAX, 0 };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(scale);
	struct pvclock_line timeline = { BREAK_TSC, 5000000000, 1, 2, 4 };
	struct pvclock_anchor old = { BREAK_TSC, 4999999999, scale };
	struct pvclock_anchor anchor = pvclock_reanchor(&timeline, &old, &params, BREAK_TSC);

	print_at_break(&anchor);
}

/* 2^41 ticks a nanosecond: what the clock is old, 2^22 ns, is 2^63 ticks. */
static void anchor_of_many_ticks(void)
{
	struct pvclock_scale scale = { (1u << 31) + 1, -40 };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(scale);
	struct pvclock_moment moment = { UINT64_C(1) << 22, 0x40000001 };
	struct pvclock_anchor anchor = pvclock_anchor_through(moment, BREAK_TSC, &params, moment.ns);

	printf("many %d ", BREAK_TSC - anchor.tsc_timestamp <= PVCLOCK_BACKDATE_TICKS_MAX);
	printf("%" PRIu64 "\n", pvclock_anchor_read(&anchor, BREAK_TSC));
}

/* ---- Counters. ---- */

static uint64_t standing(void *context)
{
	return *(uint64_t *)context;
}

static uint64_t ticking(void *context)
{
	return (*(uint64_t *)context)++;
}

static void waits(void)
{
	uint64_t now = 100;
	struct pvclock_counter stands = { standing, &now, 0 }, ticks = { ticking, &now, 10 };

	printf("waits %d ", pvclock_counter_wait(&stands, 100, 0));
	printf("%d ", pvclock_counter_wait(&stands, 100, 1));
	printf("%d ", pvclock_counter_wait(&stands, 101, 1));
	printf("%d ", pvclock_counter_wait(&ticks, 100, 5));
	printf("%" PRIu64 "\n", now);
}

static void reads(void)
{
	_Alignas(8) uint8_t page[32] = { 1 };
	uint64_t now = 100;
	struct pvclock_counter counter = { standing, &now, 0 };
	struct pvclock_reading reading;

	printf("reads %d ", pvclock_read(page, 0, &counter, 3, &reading));
	page[0] = 2;
	printf("%d ", pvclock_read(page, 0, &counter, 3, &reading));
	printf("%" PRIu32 "\n", reading.version);
}

/* ---- Sets of pages. ---- */

static uint64_t earliest;

static void call(struct pvclock_page_set *set)
{
	++*(int *)set->pages;
}

static uint64_t five_ticks(const struct pvclock_page_set *set, const struct pvclock_update *update, uint64_t tsc)
{
	(void)set;
	(void)update;
	earliest = tsc;
	return 5;
}

static void call_write(struct pvclock_page_set *set, const struct pvclock_update *update)
{
	(void)update;
	call(set);
}

static const struct pvclock_page_kind counted = { NULL, call, call, five_ticks, call_write, call };

static int publish_first(struct pvclock_page_set *sets, uint64_t *break_tsc)
{
	uint64_t now = 1000;
	struct pvclock_counter counter = { ticking, &now, 8 };
	struct pvclock_line timeline = { 0, 0, 0, 1, 1 };
	struct pvclock_scale scale = { 1u << 31, 1 };
	struct pvclock_anchor_params params = pvclock_anchor_params_of(scale);
	struct pvclock_anchor anchor = { 0, 0, { 0, 0 } };

	return pvclock_publish_at(sets, 1, &timeline, &params, &counter, &anchor, break_tsc, 0);
}

static void sets_of_a_vmm(void)
{
	int calls[2] = { 0, 0 };
	struct pvclock_page_set sets[2] = { { &counted, &calls[0], 1, 0 }, { &counted, &calls[1], 1, 1 } };
	uint64_t break_tsc = 0;
	int status = publish_first(sets, &break_tsc);

	printf("sets %d %d %d %" PRIu64 " %" PRIu64 "\n", status, calls[0], calls[1], earliest, break_tsc);
}

static void own_pages(int first_is_due)
{
	_Alignas(8) uint8_t memory[2][32] = { { 0 }, { 0 } };
	struct pvclock_own_page mine = { memory[0], { 0, 0, { 9, 0 } }, 4, 1, first_is_due };
	struct pvclock_own_page pages[2] = { mine, { memory[1], { 0, 0, { 9, 0 } }, 4, 1, 1 } };
	struct pvclock_page_set sets[2] = { { &pvclock_page_kind_own_line, pages, 1, 0 }, { NULL, NULL, 0, 0 } };
	uint64_t break_tsc = 0;
	int status = publish_first(sets, &break_tsc), other = 0;

	for (int i = 0; i < 32; i++)
		other |= memory[1][i];
	printf("own %d %d ", status, sets[0].is_due);
	printf("%d %d %d %d\n", memory[0][0], memory[0][24], other, pages[1].is_due);
}

/* ---- Words, one instruction at a time. ---- */

static _Alignas(8) uint32_t word;
static unsigned long left, torn;

static void set_trap_flag(void)
{
	__asm__ volatile("lea -128(%%rsp), %%rsp\n\tpushfq\n\torq $0x100, (%%rsp)\n\tpopfq\n\t"
			"lea 128(%%rsp), %%rsp" : : : "memory", "cc");
}

static void clear_trap_flag(void)
{
	__asm__ volatile("lea -128(%%rsp), %%rsp\n\tpushfq\n\tandq $~0x100, (%%rsp)\n\tpopfq\n\t"
			"lea 128(%%rsp), %%rsp" : : : "memory", "cc");
}

static void change_in_time(int signal)
{
	(void)signal;
	if (left == 0)
		*(volatile uint32_t *)&word = UINT32_MAX;
	else
		left--;
}

static void look(int signal)
{
	uint32_t seen = *(volatile uint32_t *)&word;

	(void)signal;
	torn += seen != 0 && seen != UINT32_MAX;
}

static void words(void)
{
	unsigned long old = 0, new = 0;

	signal(SIGTRAP, change_in_time);
	for (unsigned long after = 0; after < 300; after++) {
		uint32_t value;

		word = 0;
		left = after;
		set_trap_flag();
		value = pvclock_load32(&word);
		clear_trap_flag();
		old += value == 0;
		new += value == UINT32_MAX;
	}
	signal(SIGTRAP, look);
	word = 0;
	set_trap_flag();
	pvclock_store32(&word, UINT32_MAX);
	clear_trap_flag();
	printf("words %d %lu %lu\n", old != 0 && new != 0, old + new, torn);
}

int main(void)
{
	scales();
	ticks_of(UINT64_C(1) << 62);
	ticks_of(INT64_MAX);
	ticks_of(UINT64_C(1) << 63);
	remainder_of_a_line();
	anchor_with(0x80000001, 0);
	anchor_with(0x80000001, 1);
	anchor_with(0x80000001, 3);
	anchor_with(0x80000010, 0);
	anchor_with(0x80000001, -4);
	anchor_one_ns_ahead();
	anchor_of_many_ticks();
	waits();
	reads();
	sets_of_a_vmm();
	own_pages(1);
	own_pages(0);
	words();
	return 0;
}
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what the program prints."""
    return printed_by(PROGRAM, tmp_path_factory.mktemp("publish"))


@pytest.mark.row("K-14", "K-15")
def test_shifts_at_their_limits(printed: list[str]) -> None:
    """A page's shift of 64 either way gives 0; a rate may take a left shift of 31, and not of 32."""
    assert told(printed, "scales") == ["0 0 0 31 -1"]


@pytest.mark.row("E11")
def test_as_many_ticks_as_the_left_shift_carries(printed: list[str]) -> None:
    """At 1 ns a tick, shifted by 1, all that is below 2^63 ns has its ticks; 2^63 ns has none."""
    assert told(printed, "ticks") == [f"0 {2**62}", f"0 {2**63 - 1}", "-1 7"]


@pytest.mark.row("E11")
def test_a_line_moved_keeps_its_remainder(printed: list[str]) -> None:
    """A fifth and 4 ticks of two fifths are 1 ns and four fifths."""
    assert told(printed, "line") == ["14 1 4"]


@pytest.mark.row("E11")
def test_a_line_passes_through_the_fraction_asked_for(printed: list[str]) -> None:
    """Rounded down to the steps that a granule has: 1, 2, 8 and 16 for the left shifts and an even mul, and 1."""
    fractions = ("0x89abcdef", "0x89abcdee", "0x89abcde8", "0x89abcde0", "0x89abcdef")
    assert told(printed, "break")[:5] == [f"{2**40} {fraction}" for fraction in fractions]


@pytest.mark.row("E11")
def test_a_clock_1_ns_behind_is_put_right_at_once(printed: list[str]) -> None:
    """It may go on by 1 ns, so the new line passes through the timeline's own quarter of a ns, not past it."""
    assert told(printed, "break")[5] == "5000000000 0x40000000"


@pytest.mark.row("E11")
def test_no_timestamp_is_more_than_2_to_the_61_ticks_back(printed: list[str]) -> None:
    """A clock of so many ticks that its age would take more, and that shows its ns at the break all the same."""
    assert told(printed, "many") == [f"1 {2**22}"]


@pytest.mark.row("K-08", "E9")
def test_a_wait_ends_when_the_tick_has_come(printed: list[str]) -> None:
    """Not one read later; -1 for a counter that stands still or went back; 6 reads for 5 ticks."""
    assert told(printed, "waits") == ["0 -1 -1 0 106"]


@pytest.mark.row("K-08")
def test_an_update_that_never_ends_is_no_reading(printed: list[str]) -> None:
    """A page with an odd version, read thrice, and the same page once it is even."""
    assert told(printed, "reads") == ["-1 0 2"]


@pytest.mark.row("E4", "E9")
def test_a_publish_changes_the_sets_that_it_was_given(printed: list[str]) -> None:
    """Four calls for the one, none for its neighbour; a kind puts the break off from A and the margin."""
    assert told(printed, "sets") == ["0 4 0 1008 1013"]


@pytest.mark.row("V-20")
def test_a_publish_changes_the_own_pages_that_it_was_given(printed: list[str]) -> None:
    """The one that is due, and not its neighbour, which is due too; a neighbour alone makes no set due."""
    assert told(printed, "own") == ["0 1 4 9 0 1", "0 0 0 0 0 1"]


@pytest.mark.row("K-08")
def test_an_aligned_word_is_old_or_new_at_every_instruction(printed: list[str]) -> None:
    """Loaded while it changes after the n-th instruction, and looked at after each while it is stored."""
    assert told(printed, "words") == ["1 300 0"]
