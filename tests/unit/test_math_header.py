"""pvclock_math.h as a VMM in C calls it: what the Python faces refuse before it, or never ask for."""

from __future__ import annotations

import pytest

from tests import oracle
from tests.unit.c_program import printed_by

PROGRAM = """
#include <inttypes.h>
#include <stdio.h>
#include "pvclock_anchor.h"
#include "pvclock_math.h"

static void wide(void)
{
	struct pvclock_scale scale = { 7, 7 };
	struct pvclock_line line = { 1000, (UINT64_C(1) << 40) + 50, 1, 1, 4 };
	pvclock_u128 fixed = pvclock_line_fixed(line, line.tsc + 1, 100);

	printf("%d ", pvclock_time_scale(UINT64_C(1) << 63, PVCLOCK_NS_PER_SEC, &scale));
	printf("%" PRIu32 " %d ", scale.mul, scale.shift);
	printf("%d ", pvclock_time_scale((UINT64_C(1) << 63) - 1, PVCLOCK_NS_PER_SEC, &scale));
	printf("%" PRIu32 " %d\\n", scale.mul, scale.shift);
	printf("%" PRIu64 " %" PRIu64 "\\n", (uint64_t)(fixed >> 64), (uint64_t)fixed);
}

static void distances(struct pvclock_moment moment)
{
	printf("%" PRIu32 " ", pvclock_backdate_distance(5, moment, 10));
	printf("%" PRIu32 " ", pvclock_backdate_distance(1, moment, 10));
	printf("%" PRIu32 "\\n", pvclock_backdate_distance(5, moment, 9));
}

int main(void)
{
	struct pvclock_scale scale = { 7, 7 };
	struct pvclock_line line = { 1000, 5, 1, 1, 3 }, turned;
	uint64_t ratio = 7;

	printf("%d %d ", pvclock_time_scale_of_rate(0, 1, 0, &scale), pvclock_time_scale_of_rate(1, 0, 0, &scale));
	printf("%" PRIu32 " %d ", scale.mul, scale.shift);
	printf("%d ", pvclock_tsc_ratio(1, 0, PVCLOCK_TSC_RATIO_FRAC_BITS_SVM, &ratio));
	printf("%" PRIu64 " ", ratio);
	printf("%d ", pvclock_tsc_ratio(1, UINT32_MAX, PVCLOCK_TSC_RATIO_FRAC_BITS_SVM, &ratio));
	printf("%" PRIu64 "\\n", ratio);

	turned = pvclock_line_turn(line, 3, 5);
	line = pvclock_line_at(turned, line.tsc + 1000);
	printf("%" PRIu64 " %" PRIu64 " %d\\n", line.tsc, line.ns, turned.num / 3 == turned.den / 5 && turned.den >> 63);
	wide();
	distances((struct pvclock_moment){ .ns = 10, .fraction = 3 });
	return 0;
}
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what the program prints."""
    return printed_by(PROGRAM, tmp_path_factory.mktemp("math"))


@pytest.mark.row("K-15", "E11")
def test_what_is_no_rate_and_what_is_a_ratio(printed: list[str]) -> None:
    """A numerator or a denominator of 0 is refused and nothing is written; a ratio of 1 is the least there is."""
    assert printed[0] == "-1 -1 7 7 -1 7 0 1"


@pytest.mark.row("E11")
def test_a_line_that_turns_has_its_new_rate_in_whole_words(printed: list[str]) -> None:
    """Both terms are widened alike: 1000 ticks at 3/5 ns and the third that was left over are 600 ns, and a third."""
    assert printed[1] == "2000 605 1"


@pytest.mark.row("K-15", "E11")
def test_a_frequency_below_2_to_63_has_a_scale(printed: list[str]) -> None:
    """One of 2^63 is refused and nothing is written; the next below has Linux's."""
    scale = oracle.time_scale(2**63 - 1, 10**9)
    assert printed[2] == f"-1 7 7 0 {scale.mul} {scale.shift}"


@pytest.mark.row("E11")
def test_a_line_in_units_has_64_bits_of_fraction(printed: list[str]) -> None:
    """2^40 + 50 ns and a half are so many hundreds of a ns, and a fraction rounded down."""
    whole, fraction = divmod((2 * (2**40 + 50) + 1) * 2**63 // 100, 2**64)
    assert printed[3] == f"{whole} {fraction}"


@pytest.mark.row("E11")
def test_how_far_a_young_clocks_line_is_from_its_moment(printed: list[str]) -> None:
    """Ahead where the ns before may not be shown, else behind, if need be round the ns."""
    assert printed[-1] == f"2 2 {2**32 - 2}"
