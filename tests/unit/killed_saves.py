"""A program that saves states for ever in a child, kills the child at a random moment, and looks at what is left.

Run as `python -m tests.unit.killed_saves FOLDER KILLS SEED WRITER`; prints a Report as JSON.  State number n has guest
time n, and its size depends on n.  KILLS are the least: it goes on until a tenth as many have hit a save.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Final, NamedTuple

from pvclock import StateFileError
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState
from tests.saved_states import TYPICAL

Writer = Callable[[Path, ClockState], None]

NAME: Final = "clock.json"
LONGEST_S: Final = 0.02

HITS_PART: Final = 10
"""One kill in so many must find a save half done, else a machine that is busy or slow has made it miss them."""
PATIENCE: Final = 20
"""So many times the kills asked for are the most."""


class Report(NamedTuple):
    """What was found after each kill: the last state that was saved, the one being saved, or neither."""

    kills: int
    old: int
    new: int
    wrong: int
    with_leftover: int
    most_files: int


def state(number: int) -> ClockState:
    """State `number`, of 1 to 97 times two vCPUs."""
    timeline = TYPICAL.timeline._replace(guest_ns=Fraction(number))
    return TYPICAL._replace(timeline=timeline, vcpus=TYPICAL.vcpus * (1 + number * 37 % 97))


def write_in_place(path: Path, saved: ClockState) -> None:
    """The broken writer: it empties the file, and fills it bit by bit."""
    content = clock_state.to_json(saved).encode()
    with path.open("wb", buffering=0) as file:
        for begin in range(0, len(content), 512):
            file.write(content[begin : begin + 512])


WRITERS: Final[dict[str, Writer]] = {"product": clock_state.write, "in_place": write_in_place}


def save_until_killed(write: Writer, path: Path, number: int, told: int) -> None:
    """Tell that it begins, then each number once it is saved."""
    os.write(told, b"begin\n")
    while True:
        number += 1
        write(path, state(number))
        os.write(told, b"%d\n" % number)


def kill_a_save(write: Writer, path: Path, number: int, delay_s: float) -> int:
    """Let a child save from `number` + 1 on, kill it after a while; returns the last number that was saved."""
    hear, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            save_until_killed(write, path, number, tell)
        finally:
            os._exit(1)
    os.close(tell)
    with open(hear, encoding="ascii") as heard:  # noqa: PTH123  # a descriptor
        heard.readline()
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child could not save"
        numbers = heard.read().split()
    return int(numbers[-1]) if numbers else number


def kill_saves(folder: Path, kills: int, seed: int, write: Writer) -> Report:
    """Kill `kills` saves, looking each time at what is in the folder."""
    source = random.Random(seed)  # noqa: S311  # a sample, no secret
    path = folder / NAME
    number = old = new = wrong = with_leftover = most_files = 0
    write(path, state(number))
    done = 0
    while done < kills or (with_leftover + wrong < kills / HITS_PART and done < kills * PATIENCE):
        done += 1
        last = kill_a_save(write, path, number, source.uniform(0, LONGEST_S))
        try:
            number = int(clock_state.read(path).timeline.guest_ns)
            matches = clock_state.read(path) == state(number)
        except StateFileError:
            number, matches = last, False
        old += matches and number == last
        new += matches and number == last + 1
        wrong += not matches or number not in (last, last + 1)
        files = len(list(folder.iterdir()))
        with_leftover += files > 1
        most_files = max(most_files, files)
    write(path, state(number + 1))
    return Report(done, old, new, wrong, with_leftover, most_files)


if __name__ == "__main__":
    _, folder, kills, seed, writer = sys.argv
    print(json.dumps(kill_saves(Path(folder), int(kills), int(seed), WRITERS[writer])._asdict()))  # noqa: T201
