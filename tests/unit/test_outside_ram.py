"""Guest RAM read from outside, by process_vm_readv and by its file: all of it, and nothing is allocated."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from mmap import PAGESIZE

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pvclock._process_memory import read_process
from pvclock.errors import GuestAddressError, MemoryNotReadable, VmEnded, VmNotObservable
from pvclock.host.process import Mapping, Process
from pvclock.meter.watch.process_ram import ProcessRam
from pvclock.meter.watch.ram_blocks import BlockTable, RamBlock, blocks_of, joined
from pvclock.meter.watch.ram_means import open_ram
from pvclock.meter.watch.shared_ram import SharedRam, open_pieces
from pvclock.meter.watch.vm import GuestRam, RamRange
from pvclock.quantities import Gpa
from tests.unit.known_memory import CONTENT, LENGTH, RUNS
from tests.unit.known_process import KnownProcess, as_nobody, known_process, needs_last_pid, needs_root, with_pid
from tests.waiting import HANG_S, alarm_after

pytestmark = pytest.mark.row("E3")

GPA = Gpa(5 << 30)
HOLE = 2 * PAGESIZE
MEANS = ["private, process_vm_readv", "shared, process_vm_readv", "shared, file", "closed, file"]


def ram_of(process: Process, known: KnownProcess, means: str) -> GuestRam:
    """Return one of its mappings as guest RAM, to be read so."""
    kind, _, how = means.partition(", ")
    block = known.block(kind, GPA)
    return SharedRam(process, open_pieces(process, [block])) if how == "file" else ProcessRam(process, [block])


@pytest.fixture(scope="module")
def known() -> Iterator[KnownProcess]:
    """Return a process with known memory."""
    with known_process() as process:
        yield process


@pytest.fixture(scope="module", params=MEANS)
def ram(known: KnownProcess, request: pytest.FixtureRequest) -> Iterator[GuestRam]:
    """Return each kind of its memory by each means."""
    with Process(known.pid) as process:
        yield ram_of(process, known, request.param)


@st.composite
def written_places(draw: st.DrawFn) -> int:
    """Return a place of which 32 bytes were written."""
    first, count = draw(st.sampled_from(RUNS))
    return first * PAGESIZE + draw(st.integers(0, count * PAGESIZE - 32))


@settings(max_examples=40)
@given(st.lists(written_places(), max_size=20))
def test_reads_are_what_is_there(ram: GuestRam, places: list[int]) -> None:
    """Wherever in the block, in order."""
    found = ram.read_many([Gpa(GPA + place) for place in places], 32)
    assert found == [CONTENT[place : place + 32] for place in places]


def test_ranges_are_what_was_written(ram: GuestRam) -> None:
    """Page by page, and no more; what is read in them is what is there."""
    ranges = ram.ranges()
    assert ranges == [RamRange(Gpa(GPA + first * PAGESIZE), count * PAGESIZE) for first, count in RUNS]
    assert [ram.read(*each) for each in ranges] == [CONTENT[gpa - GPA :][:length] for gpa, length in ranges]


def test_a_search_allocates_nothing(ram: GuestRam, known: KnownProcess) -> None:
    """Neither in the shared file nor in the process, however often all of it is read."""
    before = known.allocated()
    assert min(before) > 0
    for _ in range(3):
        assert sum(len(ram.read(*each)) for each in ram.ranges()) == sum(count for _, count in RUNS) * PAGESIZE
    assert known.allocated() == before


def test_a_hole_that_is_read_is_zero_and_only_some_means_allocate() -> None:
    """The test above can fail: process_vm_readv of a hole in shared memory allocates it, which pread does not."""
    with known_process() as known, Process(known.pid) as process:
        before, _ = known.allocated()
        by_file = ram_of(process, known, "shared, file")
        assert by_file.read(GPA, LENGTH) == CONTENT
        assert known.allocated()[0] == before
        assert read_process(known.pid, [known.shared + HOLE], 32) == [bytes(32)]
        assert known.allocated()[0] == before + PAGESIZE // 512
        assert RamRange(Gpa(GPA + PAGESIZE), 6 * PAGESIZE) in by_file.ranges()


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (GPA - 1, 2),
        (GPA - 8, 8),
        (GPA + LENGTH - 4, 8),
        (GPA + LENGTH, 1),
        (0, 8),
        ((1 << 64) - 8, 8),
        (GPA, LENGTH + 1),
    ],
)
def test_what_is_not_guest_ram_is_not_read(ram: GuestRam, gpa: int, length: int) -> None:
    """One byte too many is too many, whatever lies beside it in the process."""
    for read in (lambda: ram.read(Gpa(gpa), length), lambda: ram.read_many([GPA, Gpa(gpa)], length)):
        with pytest.raises(GuestAddressError, match="is not in one block of the guest's RAM"):
            read()


def test_blocks_are_told_apart(known: KnownProcess) -> None:
    """Two blocks side by side in the guest are two places in the process, and a reading does not go across."""
    later = GPA + LENGTH
    with Process(known.pid) as process:
        blocks = [known.block("shared", later), known.block("closed", GPA)]
        for ram in (SharedRam(process, open_pieces(process, blocks)), ProcessRam(process, blocks)):
            assert ram.read_many([Gpa(GPA + PAGESIZE), Gpa(later + PAGESIZE)], 8) == [CONTENT[PAGESIZE:][:8]] * 2
            assert [each.gpa // LENGTH - GPA // LENGTH for each in ram.ranges()] == [0] * len(RUNS) + [1] * len(RUNS)
            with pytest.raises(GuestAddressError):
                ram.read(Gpa(later - 4), 8)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), max_size=8), st.integers(0, 600), st.integers(0, 60))
@example([(0, 1)], 1, 0)  # nothing, at the end of a block: that address is in none
def test_a_block_is_found_by_address(gaps: list[tuple[int, int]], gpa: int, length: int) -> None:
    """The one that holds all of the range, if one does; against a walk over all of them."""
    blocks: list[RamBlock] = []
    for gap, size in gaps:
        begin = (blocks[-1].gpa + blocks[-1].length if blocks else 0) + gap
        blocks.append(RamBlock(Gpa(begin), size, 7 * begin))
    owner = [
        each for each in blocks if each.gpa <= gpa < each.gpa + each.length and gpa + length <= each.gpa + each.length
    ]
    table = BlockTable(random.Random(gpa).sample(blocks, len(blocks)))  # noqa: S311  # any order will do
    if owner:
        index, offset = table.find(Gpa(gpa), length)
        assert (table.blocks[index], offset) == (owner[0], gpa - owner[0].gpa)
    else:
        with pytest.raises(GuestAddressError):
            table.find(Gpa(gpa), length)


def reads_of(ram: GuestRam) -> list[Callable[[], object]]:
    """Return all that can be asked of it."""
    page = Gpa(GPA + PAGESIZE)
    return [lambda: ram.read_many([page], 32), lambda: ram.read(page, 32), ram.ranges]


@pytest.mark.parametrize("means", MEANS)
def test_a_process_that_has_ended_has_no_ram(means: str) -> None:
    """That is the answer to each question, though the shared file outlives the process."""
    with known_process() as known, Process(known.pid) as process:
        reads = reads_of(ram_of(process, known, means))
        known.process.kill()
        known.process.wait()
        for read in reads:
            with pytest.raises(VmEnded, match=f"process {known.pid}: the process has ended"):
                read()
        assert len(reads) == 3


@pytest.mark.parametrize("means", MEANS)
def test_a_process_that_ends_while_its_ram_is_read(means: str) -> None:
    """At whatever moment: that it has ended, and no other error."""
    with known_process() as known, Process(known.pid) as process, alarm_after(HANG_S):
        reads = reads_of(ram_of(process, known, means))
        known.process.kill()
        with pytest.raises(VmEnded):
            read_for_ever(reads)


def read_for_ever(reads: list[Callable[[], object]]) -> None:
    """Go on until one raises something."""
    while True:
        for read in reads:
            read()


@needs_root
@needs_last_pid
def test_another_process_that_gets_the_pid_is_not_read() -> None:
    """process_vm_readv goes by the pid: what it finds there then is nobody's RAM."""
    with known_process() as known, Process(known.pid) as process:
        ram = ram_of(process, known, "private, process_vm_readv")
        known.process.kill()
        known.process.wait()
        with with_pid(known.pid), pytest.raises(VmEnded):
            ram.read(Gpa(GPA + PAGESIZE), 32)


# Which means


@pytest.mark.parametrize(
    ("kinds", "means"),
    [
        (("private",), "process_vm_readv"),
        (("shared",), "shared memory"),
        (("closed",), "shared memory"),
        (("shared", "closed"), "shared memory"),
        (("private", "shared"), "process_vm_readv"),
    ],
)
def test_the_file_is_taken_if_there_is_one(known: KnownProcess, kinds: tuple[str, ...], means: str) -> None:
    """Private RAM has none; and what is part shared, part private is read by the means that reads both."""
    with Process(known.pid) as process:
        blocks = [known.block(kind, place * LENGTH) for place, kind in enumerate(kinds)]
        ram = open_ram(process, blocks)
        assert ram.means == means
        assert ram.read_many([Gpa(block.gpa + PAGESIZE) for block in blocks], 8) == [CONTENT[PAGESIZE:][:8]] * len(
            kinds
        )


def test_private_video_memory_beside_shared_ram_is_left_out(known: KnownProcess) -> None:
    """A block that is smaller than the shared one."""
    with Process(known.pid) as process:
        ram = open_ram(process, [known.block("shared"), known.block("private", LENGTH)._replace(length=LENGTH // 2)])
        assert ram.means == "shared memory"
        with pytest.raises(GuestAddressError):
            ram.read(Gpa(LENGTH + PAGESIZE), 8)


def test_a_piece_of_a_mapping_is_read_at_its_place(known: KnownProcess) -> None:
    """A block that begins within the mapping begins there in the file, too."""
    block = known.block("shared")
    part = RamBlock(GPA, 4 * PAGESIZE, block.host_address + 3 * PAGESIZE)
    with Process(known.pid) as process:
        for ram in (SharedRam(process, open_pieces(process, [part])), ProcessRam(process, [part])):
            assert ram.ranges() == [RamRange(GPA, 4 * PAGESIZE)]
            assert ram.read(GPA, 4 * PAGESIZE) == CONTENT[3 * PAGESIZE : 7 * PAGESIZE]


@needs_root
def test_another_user_is_told_what_helps(known: KnownProcess) -> None:
    """Nothing is opened; and a reader that has lost its rights since is told by each reading."""
    with Process(known.pid) as process:
        with pytest.raises(VmNotObservable, match=r"maps may not be looked at; do it as root"):
            as_nobody(lambda: open_ram(process, [known.block("shared")]))
        with pytest.raises(MemoryNotReadable, match=r"pagemap may not be looked at; do it as root"):
            as_nobody(lambda: ProcessRam(process, [known.block("private")]))
        ram = ram_of(process, known, "private, process_vm_readv")
        with pytest.raises(MemoryNotReadable, match=r"process_vm_readv is not permitted; run as root"):
            as_nobody(lambda: ram.read(GPA, 8))


# Which mappings


def mapping(start: int, length: int, **more: object) -> Mapping:
    """Return a private anonymous mapping, or what `more` makes of it."""
    return Mapping(start, length, True, True, False, 0, 0, 0, "")._replace(**more)  # type: ignore[arg-type]


MIB = 1 << 20
RAM = mapping(0x7F00_0000_0000, 512 * MIB)
MEMFD = RAM._replace(is_shared=True, inode=83, device=1, path="/memfd:ram")


class OtherProcess:
    """A process with these mappings."""

    pid = 12

    def __init__(self, *mappings: Mapping) -> None:
        self.mappings = lambda: list(mappings)


@pytest.mark.parametrize(
    "ram", [RAM, MEMFD, RAM._replace(inode=5, path="/var/ram"), MEMFD._replace(path="/dev/hugepages/ram")]
)
@pytest.mark.parametrize(
    "larger",
    [
        mapping(1 << 30, 1 << 40, is_readable=False, is_writable=False),
        mapping(1 << 30, 1 << 40, is_writable=False, path="/usr/lib/locale/locale-archive", inode=4),
        mapping(1 << 30, 1 << 40, path="[heap]"),
        mapping(1 << 30, 1 << 40, path="anon_inode:[vfio-device]", inode=4, is_shared=True),
        mapping(1 << 30, 1 << 40, path="/dev/nvidia0", inode=4, is_shared=True),
    ],
)
def test_ram_is_told_from_what_is_none(ram: Mapping, larger: Mapping) -> None:
    """A reservation, a file that is only read, a heap and a device's registers are no RAM, however big they are."""
    stack = mapping(0x7F10_0000_0000, 8 * MIB)
    assert blocks_of(OtherProcess(larger, ram, stack)) == [RamBlock(Gpa(0), ram.length, ram.start)]  # type: ignore[arg-type]


def test_ram_in_several_pieces() -> None:
    """The nodes of a NUMA guest are blocks, the biggest at 0 and the others at what are no addresses; video is none."""
    nodes = [mapping(0x7F20_0000_0000, 1024 * MIB), mapping(0x7F30_0000_0000, 64 * MIB)]
    video = mapping(0x7F40_0000_0000, 16 * MIB)
    assert blocks_of(OtherProcess(video, RAM, *nodes)) == [  # type: ignore[arg-type]
        RamBlock(Gpa(0), 1024 * MIB, nodes[0].start),
        RamBlock(Gpa((1 << 52) + 1024 * MIB), 512 * MIB, RAM.start),
        RamBlock(Gpa((1 << 52) + 1536 * MIB), 64 * MIB, nodes[1].start),
    ]


@pytest.mark.parametrize("bytes_above", [0, PAGESIZE, 4 << 30])
def test_ram_above_the_hole_for_devices(bytes_above: int) -> None:
    """Of 6 GiB those above 2 GiB may be at 2 GiB, or above 4 GiB: offsets, that nobody can take for addresses."""
    (low, *above) = blocks_of(OtherProcess(RAM._replace(length=(2 << 30) + bytes_above)))  # type: ignore[arg-type]
    assert low == RamBlock(Gpa(0), 2 << 30, RAM.start)
    assert above == [RamBlock(Gpa((1 << 52) + (2 << 30)), bytes_above, RAM.start + (2 << 30))] * bool(bytes_above)


@pytest.mark.parametrize("gpa", [2 << 30, 0xC000_0000, 0x1_4000_0000, (1 << 52) - 64])
def test_an_address_above_the_hole_for_devices_is_refused(gpa: int) -> None:
    """q35 has 0x140000000 at offset 0xC0000000: nothing is read there, and the error says who knows the place."""
    table = BlockTable(blocks_of(OtherProcess(RAM._replace(length=6 << 30))))  # type: ignore[arg-type]
    with pytest.raises(GuestAddressError, match=r"at 2 GiB or above, where a process alone .* by QMP or libvirt"):
        table.find(Gpa(gpa), 32)
    assert table.find(Gpa((1 << 52) + 0xC000_0000), 32) == (1, 1 << 30)
    with pytest.raises(GuestAddressError, match="is not in one block of the guest's RAM"):
        table.find(Gpa((1 << 52) + (6 << 30)), 32)


def test_a_process_without_ram() -> None:
    """Says so."""
    with pytest.raises(MemoryNotReadable, match="process 12: no mapping of it looks like a guest's RAM"):
        blocks_of(OtherProcess(mapping(0, PAGESIZE, path="[stack]")))  # type: ignore[arg-type]


def test_the_pieces_of_a_file_are_one() -> None:
    """If they go on in memory and in the file, with the same rights; private memory without a file is not joined."""
    second = MEMFD._replace(start=MEMFD.start + MEMFD.length, offset=MEMFD.length)
    assert joined([MEMFD, second]) == [MEMFD._replace(length=2 * MEMFD.length)]
    apart = [
        second._replace(offset=0),
        second._replace(start=second.start + PAGESIZE),
        second._replace(inode=84),
        second._replace(is_shared=False),
        second._replace(is_writable=False),
    ]
    assert [joined([MEMFD, each]) for each in apart] == [[MEMFD, each] for each in apart]
    anonymous = RAM._replace(start=RAM.start + RAM.length)
    assert joined([RAM, anonymous]) == [RAM, anonymous]
