"""Memory is searched for pages: at each place as the oracle says, in all of RAM, and while it changes."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvclock import ClockScale, ConfigError, Gpa, GuestMemory, GuestTsc, RangeError, TimeInfo, WrongType
from pvclock._search import Places, search_pages
from pvclock.errors import PagesNotFound
from pvclock.meter.findings import TIME_INFO
from pvclock.meter.watch.page_search import SearchTerms, find_pages, is_legal
from tests import oracle
from tests.guest_ram import MemoryRam, made_of

pytestmark = pytest.mark.row("E3")

HZ, PPM, NEWEST = 2_445_406_000, 300, 10**15
TERMS = SearchTerms(HZ, PPM, GuestTsc(NEWEST))
SCALE = ClockScale.from_hz(HZ)
PAGE = (2, 0, NEWEST // 2, 5 * 10**9, SCALE.mul, SCALE.shift, 1, 0)
VERSION, PAD0, TSC, _, MUL, SHIFT, FLAGS, PAD = range(8)
FIELDS = struct.Struct("<IIQQIbBH")


def page(*changes: tuple[int, int], of: tuple[int, ...] = PAGE) -> bytes:
    """A page's bytes, with some fields changed."""
    fields = list(of)
    for field, value in changes:
        fields[field] = value
    return FIELDS.pack(*fields)


def bounds_of_mul(hz: int, ppm: int, shift: int) -> tuple[int, int]:
    """The least and the greatest mul whose rate is within bounds: exactly."""
    unit = oracle.scale_rate(1, shift) * hz / 10**9 * 10**6
    return -int(-(10**6 - ppm) // unit), int((10**6 + ppm) // unit)


LEAST_MUL, MOST_MUL = bounds_of_mul(HZ, PPM, SCALE.shift)

NEAR_MISSES = {
    "version 0": (VERSION, 0),
    "lowest bit of pad0": (PAD0, 1),
    "highest bit of pad0": (PAD0, 1 << 31),
    "first pad byte": (PAD, 1),
    "last pad byte": (PAD, 0x100),
    "highest bit of the last pad byte": (PAD, 0x8000),
    "flag 2": (FLAGS, 4),
    "flag 7": (FLAGS, 0x80),
    "mul below 2^31": (MUL, (1 << 31) - 1),
    "shift too low": (SHIFT, -35),
    "shift too high": (SHIFT, 31),
    "tsc_timestamp 0": (TSC, 0),
    "tsc_timestamp in the future": (TSC, NEWEST + 1),
}
OTHER_RATES = {
    "mul one too low": (MUL, LEAST_MUL - 1),
    "mul one too high": (MUL, MOST_MUL + 1),
    "shift one too low": (SHIFT, SCALE.shift - 1),
    "shift one too high": (SHIFT, SCALE.shift + 1),
    "the lowest shift there is": (SHIFT, -34),
    "the highest shift there is": (SHIFT, 30),
}
STILL_PAGES = {
    "the greatest version": (VERSION, 0xFFFF_FFFE),
    "no flag": (FLAGS, 0),
    "both flags": (FLAGS, 3),
    "tsc_timestamp 1": (TSC, 1),
    "tsc_timestamp now": (TSC, NEWEST),
    "the least mul": (MUL, LEAST_MUL),
    "the greatest mul": (MUL, MOST_MUL),
    "an odd version": (VERSION, 3),
}


def searched(memory: bytes) -> Places:
    """What a search for HZ finds."""
    return search_pages(memory, HZ, PPM, NEWEST)


@pytest.mark.parametrize("change", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_each_condition_alone_makes_it_no_page(change: tuple[int, int]) -> None:
    """A page that is one short of it, in one field, is neither a page nor one of another rate."""
    found = searched(page(change))
    assert (found.legal, found.pages, found.other_rate) == (0, [], [])
    assert searched(page()).pages == [0]


@pytest.mark.parametrize("change", OTHER_RATES.values(), ids=OTHER_RATES)
def test_another_rate_is_told_apart(change: tuple[int, int]) -> None:
    """One beyond the bound on either side is legal, and of another rate."""
    assert searched(page(change)) == Places(1, 1, 0, [], [0])


@pytest.mark.parametrize("change", STILL_PAGES.values(), ids=STILL_PAGES)
def test_what_a_page_may_be(change: tuple[int, int]) -> None:
    """Each field at the end of what it can be is a page's."""
    found = searched(page(change))
    assert (found.legal, found.right_rate, found.pages, found.other_rate) == (1, 1, [0], [])
    assert found.even_and_zero_pads == (change != STILL_PAGES["an odd version"])


def test_the_bound_is_exact() -> None:
    """For a TSC so fast that bounds are counted in units of a mul, too: a little more than 300 ppm is too much."""
    memory = [page((MUL, mul), (SHIFT, -34)) for mul in (3_998_800_000, 3_998_800_001)]
    found = search_pages(b"".join(memory), 2**64 - 1, PPM)
    assert (found.pages, found.other_rate) == ([32], [0])


@st.composite
def memories(draw: st.DrawFn) -> tuple[bytes, int, int, int]:
    """Memory with pages and near misses among zeros and whatever, and terms that some of them meet."""
    hz = draw(st.sampled_from([HZ, 10**9, 2**30, 2 * 10**9, 3 * 10**9 + 1]) | st.integers(1, 2**64 - 1))
    ppm = draw(st.sampled_from([0, 1, PPM, 10**6 - 1]) | st.integers(0, 10**6 - 1))
    newest = draw(st.sampled_from([0, NEWEST, 2**64 - 1]))
    scale = ClockScale.from_hz(hz)
    muls = {m & 0xFFFF_FFFF for bound in bounds_of_mul(hz, ppm, scale.shift) for m in range(bound - 1, bound + 2)}
    fields = st.tuples(
        st.sampled_from([0, 1, 2, 2**31, 2**32 - 2, 2**32 - 1]),
        st.sampled_from([0, 0, 0, 1, 2**31]),
        st.sampled_from([0, 1, newest, min(newest + 1, 2**64 - 1)]),
        st.just(7),
        st.sampled_from([scale.mul, *muls, 2**31 - 1, 2**31, 2**32 - 1]),
        st.sampled_from([scale.shift, scale.shift - 1, scale.shift + 1, -35, -34, 30, 31, -128, 127]),
        st.sampled_from([0, 1, 2, 3, 4, 255]),
        st.sampled_from([0, 0, 0, 1, 0x8000]),
    )
    pieces = st.builds(lambda each: FIELDS.pack(*each), fields) | st.binary(max_size=40) | st.just(bytes(64))
    return b"".join(draw(st.lists(pieces, max_size=12))), hz, ppm, newest


@settings(max_examples=60)
@given(memories())
def test_a_search_finds_what_the_oracle_does(drawn: tuple[bytes, int, int, int]) -> None:
    """Counts and places, in any memory, for any frequency and bound."""
    memory, *terms = drawn
    expected = oracle.page_places(memory, *terms)
    found = search_pages(memory, *terms)
    assert (found.even_and_zero_pads, found.pages, found.other_rate) == expected
    assert (found.legal, found.right_rate) == (len(expected.pages + expected.other_rate), len(expected.pages))


@pytest.mark.parametrize("length", range(41))
def test_short_buffers(length: int) -> None:
    """A page is found where it is whole, and nothing is read beyond."""
    memory = (page() + page())[:length]
    assert searched(memory).pages == oracle.page_places(memory, HZ, PPM, NEWEST).pages


@pytest.mark.parametrize("gap", range(0, 260, 4))
def test_wherever_a_page_lies(gap: int) -> None:
    """At each place of a block of 64 bytes, in its middle or across its end, and at the end of memory."""
    for rest in (0, 4, 200):
        assert searched(bytes(gap) + page() + bytes(rest)).pages == [gap]


def test_any_buffer_is_searched() -> None:
    """Writable or not, of whatever numbers, at an odd address, too."""
    memory = page()
    assert searched(memoryview(b"?" + memory)[1:]).pages == [0]  # type: ignore[arg-type]  # any buffer
    assert searched(memoryview(bytearray(memory)).cast("Q")).pages == [0]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="contiguous"):
        searched(memoryview(memory)[::2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "what"),
    [
        (("text", HZ, PPM), WrongType, "buffer"),
        ((b"", 1.5, PPM), WrongType, "tsc_hz"),
        ((b"", HZ, "300"), WrongType, "within_ppm"),
        ((b"", HZ, PPM, 1.0), WrongType, "newest_tsc"),
        ((b"", 0, PPM), RangeError, "0 Hz"),
        ((b"", HZ, 10**6), RangeError, "1000000 ppm"),
        ((b"", HZ, 2**32 + 300), RangeError, "ppm"),
        ((b"", HZ, -1), RangeError, "within_ppm"),
        ((b"", 2**64, PPM), RangeError, "tsc_hz"),
        ((b"", HZ, PPM, 2**64), RangeError, "newest_tsc"),
        ((b"", HZ, PPM, None, 2**20 + 1), RangeError, "places_max"),
    ],
)
def test_wrong_arguments_of_a_search(arguments: tuple[object, ...], error: type[Exception], what: str) -> None:
    """Each is named."""
    with pytest.raises(error, match=what):
        search_pages(*arguments)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize("places_max", [0, 1, 3])
def test_more_places_than_there_is_room_for(places_max: int) -> None:
    """All are counted, and the first are told."""
    memory = page() * 3 + page(OTHER_RATES["mul one too high"]) * 4
    found = search_pages(memory, HZ, PPM, NEWEST, places_max)
    assert (found.legal, found.right_rate) == (7, 3)
    assert found.pages == [0, 32, 64][:places_max]
    assert found.other_rate == [96, 128, 160, 192][:places_max]


def test_memory_made_to_deceive() -> None:
    """Words of few kinds, which make pages everywhere, some over others: as the oracle says."""
    source = random.Random(15)  # noqa: S311  # a sample, no secret
    words = [0, 1, 2, SCALE.mul, SCALE.shift & 0xFF, SCALE.shift & 0xFF | 0x100]
    memory = b"".join(struct.pack("<I", source.choice(words)) for _ in range(20_000))
    expected = oracle.page_places(memory, HZ, PPM, 2**64 - 1)
    found = search_pages(memory, HZ, PPM)
    assert len(expected.pages) > 10
    assert (found.even_and_zero_pads, found.pages, found.other_rate) == expected


# Whole RAM

SMALL = 288


@pytest.mark.parametrize("chunk_bytes", [1, 32, 33, 36, 64, 4096])
@settings(max_examples=20)
@given(places=st.sets(st.integers(0, 64).map(lambda word: word * 4), min_size=1, max_size=8))
def test_pages_across_chunks_are_found_once(chunk_bytes: int, places: set[int]) -> None:
    """Whatever the chunks, in each of two ranges, with each byte counted once."""
    memory = GuestMemory(bytearray(SMALL))
    memory.add_slot(1 << 32, bytearray(SMALL))
    for gpa in sorted(places):
        memory.write(gpa + (gpa % 8 << 30), page())
    whole = {gpa: search_pages(memory.read(gpa, SMALL), *TERMS) for gpa, _ in memory.slots}
    expected = {gpa + place for gpa, found in whole.items() for place in found.pages}
    ram = MemoryRam(memory, chunk_bytes)
    done: list[tuple[int, int]] = []
    found = find_pages(ram, 1, TERMS, lambda *each: done.append(each))
    assert {*found.pages, *(each.gpa for each in found.others)} == expected
    assert found.even_and_zero_pads == sum(each.even_and_zero_pads for each in whole.values())
    assert found.legal == sum(each.legal for each in whole.values())
    assert [each for each, _ in done] == sorted({each for each, _ in done})
    assert done[-1] == (found.searched_bytes,) * 2 == (2 * SMALL,) * 2
    assert max(length for _, length in ram.reads) <= max(chunk_bytes, 32)


@pytest.mark.parametrize("looks", [0, 1, 2, 7])
def test_a_page_that_is_being_written_is_not_missed(looks: int) -> None:
    """It is looked at again until its version is even, and until two looks agree."""
    half_a_new_line = page((VERSION, 3), (TSC, NEWEST + 2**32))
    ram = made_of({0x1000: page(), 0x1040: half_a_new_line})
    read_many = ram.read_many

    def look(addresses: list[Gpa], length: int) -> list[bytes]:
        if ram.looks == looks:
            ram.memory.write(0x1040, page((VERSION, 4), (FLAGS, 0)))
        return read_many(addresses, length)

    ram.read_many = look  # type: ignore[assignment,method-assign]
    found = find_pages(ram, 2, TERMS)
    assert found.pages == (0x1000, 0x1040)
    assert found.even_and_zero_pads == 1


class PausedRam(MemoryRam):
    """RAM that counts the pauses."""

    def __init__(self, memory: GuestMemory, chunk_bytes: int) -> None:
        super().__init__(memory, chunk_bytes)
        self.pauses = 0

    @property
    def pause_s(self) -> float:  # type: ignore[override]
        """No pause, counted."""
        self.pauses += 1
        return 0.0


@pytest.mark.parametrize(("ranges", "length", "pauses"), [(1, 1 << 15, 8), (8, 1 << 12, 8), (32, 1 << 10, 8)])
def test_the_vmm_is_left_alone_after_each_chunk(ranges: int, length: int, pauses: int) -> None:
    """As often whether its RAM is in one piece or in many."""
    memory = GuestMemory()
    for number in range(ranges):
        memory.add_slot(number << 20, bytearray(length))
    memory.write(0, page())
    ram = PausedRam(memory, 1 << 12)
    find_pages(ram, 1, TERMS)  # type: ignore[arg-type]  # pause_s can only be read
    assert ram.pauses == pauses


def test_what_is_gone_when_it_is_looked_at_again_is_no_page() -> None:
    """Memory that was reused meanwhile."""
    ram = made_of({0x1000: page(), 0x2000: page()})
    read = ram.read

    def read_and_reuse(gpa: Gpa, length: int) -> bytes:
        data = read(gpa, length)
        ram.memory.write(0x2000, bytes(32))
        return data

    ram.read = read_and_reuse  # type: ignore[method-assign]
    found = find_pages(ram, 1, TERMS)
    assert (found.pages, found.others, found.legal) == ((0x1000,), (), 2)


def test_a_page_that_never_is_whole_is_none() -> None:
    """Its version stays odd: the search ends, and says so."""
    with pytest.raises(PagesNotFound, match="1 places changed all the while"):
        find_pages(made_of({0x1000: page((VERSION, 3))}), 1, TERMS)


def test_a_line_that_is_newer_than_the_search() -> None:
    """newest_tsc was the guest's TSC when the search began: a line published since is one, the far future is none."""
    ram = made_of({0x1000: page((TSC, NEWEST + HZ // 2))})
    assert find_pages(ram, 1, TERMS).pages == (0x1000,)
    with pytest.raises(PagesNotFound):
        find_pages(made_of({0x1000: page((TSC, NEWEST + 10_000 * HZ))}), 1, TERMS)
    unknown = TERMS._replace(newest_tsc=None)
    assert find_pages(made_of({0x1000: page((TSC, 2**64 - 1))}), 1, unknown).pages == (0x1000,)
    assert find_pages(ram, 1, TERMS._replace(newest_tsc=GuestTsc(2**64 - 1))).pages == (0x1000,)


def test_no_page_at_all() -> None:
    """What was searched, what was looked for, and what may be the reason."""
    with pytest.raises(PagesNotFound) as caught:
        find_pages(made_of({}, 1 << 21), 1, TERMS)
    assert caught.value.searched_bytes == 1 << 21
    for said in ("2 MiB", "2445.406 MHz within 300 ppm", "kvmclock", "booted", "frequency"):
        assert said in str(caught.value)
    assert "kHz" not in str(caught.value)
    with pytest.raises(PagesNotFound):
        find_pages(MemoryRam(GuestMemory()), 1, TERMS)


def test_pages_of_another_frequency_are_told() -> None:
    """How many there are, and which frequency they show; not those that no page of a guest's is like."""
    other = ClockScale.from_khz(3_000_000)
    slow = ClockScale.from_khz(99_000)
    pieces = {
        **{gpa: page((MUL, other.mul), (SHIFT, other.shift)) for gpa in (0x1000, 0x1040, 0x2020)},
        0x3000: page((MUL, slow.mul), (SHIFT, slow.shift)),
        0x4004: page((MUL, other.mul), (SHIFT, other.shift)),
    }
    with pytest.raises(PagesNotFound, match=r"3 places could be .* 3000000 kHz \(3\)$"):
        find_pages(made_of(pieces), 1, TERMS)


def test_how_they_were_chosen_is_told() -> None:
    """For people: how they lie, who has none, and what else there is."""
    found = find_pages(made_of({0x1000: page(), 0x1020: page(), 0x8C20: page()}), 3, TERMS)
    assert found.why == (
        "2 pages 32 bytes apart from 0x1000, aligned to 4096 bytes; for 1 of 3 vCPUs there is none; "
        "legal pages in 1 more places, the likeliest of them one page at 0x8c20, aligned to 32 bytes"
    )
    assert [each.gpa for each in found.others] == [0x8C20]
    assert found.sets == ((0x1000, 0x1020), (0x8C20,))


@settings(max_examples=40)
@given(memories())
def test_a_page_is_legal_where_a_search_would_find_it(drawn: tuple[bytes, int, int, int]) -> None:
    """One arithmetic: is_legal() is the search's answer, of a page that is not being written."""
    memory, hz, ppm, newest = drawn
    terms = SearchTerms(hz, ppm, GuestTsc(newest))
    infos = [TIME_INFO.unpack_from(memory, offset) for offset in range(0, len(memory) - 31, 4)]
    pages = [TIME_INFO.pack(*info) for info in infos]  # as TimeInfo has them, without their pads
    expected = [oracle.page_places(each, *drawn[1:]) for each in pages]
    legal = [is_legal(TimeInfo._make(info), terms) for info in infos]
    assert legal == [bool(each.pages) and each.even_and_zero_pads == 1 for each in expected]


@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"\x02\0\0\0"], ids=["zeros", "ones", "versions"])
def test_memory_of_one_pattern_holds_no_page(fill: bytes) -> None:
    """All of it is looked at, and nothing is found."""
    memory = fill * (4096 // len(fill))
    assert searched(memory)[1:] == (0, 0, [], [])
    assert searched(memory).even_and_zero_pads == oracle.page_places(memory, HZ, PPM, NEWEST).even_and_zero_pads


@pytest.mark.parametrize("vcpus", [1, 65])
def test_a_guest_full_of_pages(vcpus: int) -> None:
    """It may hide its own among them, no more: the search ends, with as many pages as there are vCPUs."""
    found = find_pages(made_of({0: page() * 2048}), vcpus, TERMS)
    assert len(found.pages) == vcpus
    assert len({*found.pages, *(each.gpa for each in found.others)}) == 1024
    assert (found.legal, found.why.count("the first 1024 of 2048")) == (2048, 1)
