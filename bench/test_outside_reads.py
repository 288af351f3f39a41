"""Reading pages of a guest from another process: each means beside copies from memory that this process maps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from mmap import PAGESIZE, PROT_READ, mmap
from timeit import Timer

import pytest

from bench.comparison import Comparison
from pvclock.host.process import Process
from pvclock.meter.watch.process_ram import ProcessRam
from pvclock.meter.watch.ram_blocks import RamBlock
from pvclock.meter.watch.shared_ram import SharedRam, open_pieces
from pvclock.meter.watch.vm import GuestRam
from pvclock.quantities import Gpa
from qemu_glue.peer.qmp_socket import connect
from qemu_glue.watch.monitor_ram import MonitorRam
from tests.qemu.running_qemu import PRIVATE_RAM, running_qemu
from tests.unit.known_memory import LENGTH
from tests.unit.known_process import KnownProcess, known_process

PAGE_BYTES, STRIDE = 32, 64
FIRST = 100 * PAGESIZE
"""Written there."""
READINGS = 200
"""Pages in a round, which is over before a busy host takes the CPU away."""

MEANS: dict[str, Callable[[Process, RamBlock], GuestRam]] = {
    "shared memory": lambda process, block: SharedRam(process, open_pieces(process, [block])),
    "process_vm_readv": lambda process, block: ProcessRam(process, [block]),
}


@pytest.fixture(scope="module")
def known() -> Iterator[KnownProcess]:
    """Return a process with memory to read."""
    with known_process() as process:
        yield process


@pytest.fixture
def view(known: KnownProcess) -> Iterator[mmap]:
    """Return the same memory as this process maps it."""
    fd = os.open(f"/proc/{known.pid}/fd/{known.shared_fd}", os.O_RDONLY)
    with mmap(fd, LENGTH, prot=PROT_READ) as mapped:
        os.close(fd)
        yield mapped


@pytest.fixture(scope="module")
def by_monitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestRam]:
    """Return the RAM of a QEMU, which has two vCPUs at work, by its QMP socket."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("no qemu-system-x86_64 on the PATH; to get it: apt-get install qemu-system-x86")
    with running_qemu(tmp_path_factory.mktemp("qemu"), arguments=PRIVATE_RAM) as running:
        monitor, _ = connect(str(running.qmp))
        with monitor, closing(MonitorRam(monitor)) as ram:
            yield ram


@pytest.mark.parametrize("pages", [1, 100])
@pytest.mark.parametrize("means", MEANS)
def test_pages(comparison: Comparison, known: KnownProcess, view: mmap, means: str, pages: int) -> None:
    """32 bytes of each page, in Linux's array of 64-byte entries."""
    with Process(known.pid) as process:
        measure(comparison, MEANS[means](process, known.block("shared")), view, pages)


@pytest.mark.kvm
@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("pages", [1, 100])
def test_pages_by_monitor(comparison: Comparison, by_monitor: GuestRam, view: mmap, pages: int) -> None:
    """The same by QEMU, which copies while its vCPUs may want its lock."""
    measure(comparison, by_monitor, view, pages)


def measure(comparison: Comparison, ram: GuestRam, view: mmap, pages: int) -> None:
    """Read so many pages of `ram`, in turn with copies of as much of `view`."""
    places = [Gpa(FIRST + STRIDE * page) for page in range(pages)]
    rounds = READINGS // pages
    read = Timer(lambda: ram.read_many(places, PAGE_BYTES))
    copy = Timer(lambda: [view[place : place + PAGE_BYTES] for place in places])
    comparison.measure(
        f"{pages} page{'s' * (pages > 1)} by {ram.means}",
        lambda: read.timeit(rounds),
        ("slices of a mapping", lambda: copy.timeit(rounds)),
        operations=rounds,
        parts=("page", pages),
    )
