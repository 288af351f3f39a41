"""A counter that goes back or stands still while a publish waits for its break point: the update ends and is told."""

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from pvclock import ClockLine, ClockScale, GuestMemory, GuestNs, HostTsc
from pvclock._core import TimePages, read_time_info
from pvclock._counter import SimulatedCounter
from pvclock._stress import republish_in_turn
from tests.waiting import HANG_S

ROOT = Path(__file__).parents[2]
COMPILE = ("cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'pvclock' / 'include'}")
SCALE = ClockScale.from_hz(10**9)
LINE = ClockLine(HostTsc(0), GuestNs(0), 0, 1, 1)
VCPUS = 2048  # so that a publish takes long beside a step of the counter


@pytest.fixture(scope="module")
def publish_wait(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program tests/native/publish_wait.c."""
    program = tmp_path_factory.mktemp("publish_wait") / "publish_wait"
    subprocess.run([*COMPILE, str(ROOT / "tests" / "native" / "publish_wait.c"), "-o", str(program)], check=True)
    return program


@pytest.mark.row("K-08", "E9")
@pytest.mark.parametrize(
    ("counter", "status", "reads"), [("steady", 0, 5), ("late", 0, 9), ("back", -1, 2), ("stands", -1, 1 + 2**20)]
)
def test_the_wait_for_the_break_point_has_a_bound(publish_wait: Path, counter: str, status: int, reads: int) -> None:
    """Whatever the counter does, versions end even with the new line; only a counter that is late is waited for."""
    done = subprocess.run([publish_wait, counter], check=True, capture_output=True, timeout=HANG_S)
    report: dict[str, Any] = json.loads(done.stdout)
    assert report == {
        "status": status,
        "versions": [2, 2],
        "ticks_to_break": 1000,
        "shown_at_break_ns": 5_000_001_000,
        "reads": reads,
    }


def many_pages(counter: SimulatedCounter) -> tuple[TimePages, GuestMemory]:
    """Pages of VCPUS vCPUs, published."""
    memory = GuestMemory(bytearray(32 * VCPUS))
    pages = TimePages(memory, VCPUS, counter)
    for vcpu in range(VCPUS):
        pages.register(vcpu, 32 * vcpu)
    pages.publish(LINE, SCALE)
    return pages, memory


def versions(memory: GuestMemory) -> set[int]:
    """The versions of all pages, modulo 2."""
    return {read_time_info(memory, 32 * vcpu).version % 2 for vcpu in range(VCPUS)}


@pytest.mark.row("K-08", "E9")
def test_a_counter_that_goes_back_is_told() -> None:
    """A publish in which the counter steps back ends with even pages and says so; the next one takes that back."""
    counter = SimulatedCounter(2**62)
    pages, memory = many_pages(counter)
    assert pages.counter_went_back is False

    def publish() -> None:
        while not pages.counter_went_back:
            pages.publish(LINE, SCALE)

    thread = threading.Thread(target=publish)
    thread.start()
    while thread.is_alive():
        counter.value -= 1
    thread.join()
    assert versions(memory) == {0}
    assert pages.publish(LINE, SCALE) == counter.value
    assert pages.counter_went_back is False


@pytest.mark.row("K-08", "E9")
def test_republishing_ends_where_the_counter_goes_back() -> None:
    """Republishing with a counter that steps back, in a publish or between two, ends with even pages, and says so."""
    counter = SimulatedCounter(2**62)
    pages, memory = many_pages(counter)
    thread = threading.Thread(target=republish_in_turn, args=(pages, LINE, [(1, 1, SCALE)], 2**63))
    thread.start()
    while read_time_info(memory, 0).version == 2:
        pass
    counter.value = 2**61
    thread.join()
    assert pages.counter_went_back is True
    assert versions(memory) == {0}
