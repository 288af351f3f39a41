"""Random operations and faults on a clock, beside an exact model of it: `python -m tests.model.exact_clock --help`.

A life is a clock and a list of moves, plain data, so that a failing one can be cut down and kept as a test.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeAlias

from tests.model.guest_moves import PLACES, STEAL_PLACES, WALL_PLACES, GuestMoves
from tests.model.host_moves import SLEEPS, HostMoves
from tests.model.life_moves import LifeMoves
from tests.model.time_moves import POLICIES, REFERENCES, TimeMoves
from tests.model.twins import Twins

__all__ = ["Life", "Move", "failure", "live", "random_life", "shrunk", "stepped"]

Move: TypeAlias = tuple[str | int, ...]

FREQUENCIES: Final = (10**9, 2_596_132_000, 2_600_000_000, 24_000_000, 3_333_333_333, 1_000_003, 5 * 10**9)
MOVES_MAX: Final = 80


class Life(NamedTuple):
    """A clock, as it begins, and what happens to it."""

    tsc_hz: int
    tsc: int
    vcpus: int
    tsc_offset: int
    moves: tuple[Move, ...]


Draw: TypeAlias = Callable[[random.Random], tuple[int, ...]]


def _ns(most: int) -> Callable[[random.Random], int]:
    """Some ns, of all magnitudes."""
    return lambda source: int(most ** source.random())


_second, _hour = _ns(2 * 10**9), _ns(4 * 10**12)


def _vcpu(source: random.Random) -> int:
    return source.randrange(3)


def _nothing(_: random.Random) -> tuple[int, ...]:
    return ()


def _signed(source: random.Random, value: int) -> int:
    return value if source.random() < 0.5 else -value


def _one_of(count: int, *more: Callable[[random.Random], int]) -> Draw:
    return lambda source: (source.randrange(count), *(draw(source) for draw in more))


def _tsc_value(source: random.Random) -> int:
    return source.choice((_signed(source, source.randrange(2**39)), source.getrandbits(64), 0))


DRAWS: Final[dict[str, tuple[int, Draw]]] = {
    "advance": (40, lambda source: (_second(source),)),
    "refresh": (10, _one_of(3)),
    "tick": (16, _nothing),
    "dilate": (4, lambda source: (int(1000 ** source.random()), int(1000 ** source.random()))),
    "slew": (5, lambda source: (_signed(source, _second(source)), int(10**7 ** source.random()))),
    "skip": (4, lambda source: (_hour(source),)),
    "offset": (2, lambda source: (_signed(source, _hour(source)),)),
    "pause": (9, _nothing),
    "resume": (9, _one_of(len(POLICIES), lambda source: source.randrange(2))),
    "run_for": (4, lambda source: (_second(source), source.randrange(len(POLICIES)), source.randrange(2))),
    "set_policy": (2, _one_of(len(POLICIES), lambda source: source.randrange(len(POLICIES)))),
    "follow": (4, _one_of(len(REFERENCES), lambda source: source.randrange(-200, 200))),
    "disturb_source": (2, _one_of(3)),
    "set_utc": (1, lambda source: (_signed(source, _hour(source)),)),
    "sleep": (4, lambda source: (10**9 + _hour(source), source.randrange(len(SLEEPS)))),
    "step_back": (3, lambda source: (200 * 10**9 + _hour(source),)),
    "come_back": (3, _nothing),
    "read_low": (3, lambda source: (1 + _hour(source),)),
    "cpu_behind": (2, lambda source: (200 * 10**9 + _hour(source),)),
    "cpu_good": (4, _nothing),
    "refuse_offset": (4, lambda source: (_vcpu(source), source.randrange(2))),
    "hold_none": (3, _nothing),
    "raise_dirty": (3, _nothing),
    "write_tsc": (4, lambda source: (_vcpu(source), _tsc_value(source), source.randrange(2))),
    "write_adjust": (3, lambda source: (_vcpu(source), _tsc_value(source), source.randrange(2))),
    "write_aux": (
        1,
        lambda source: (_vcpu(source), source.getrandbits(source.choice((8, 32, 33))), source.randrange(2)),
    ),
    "repair": (1, _nothing),
    "place_page": (8, lambda source: (_vcpu(source), source.randrange(len(PLACES) + 1), source.random() < 0.1)),
    "scribble": (1, lambda source: (_vcpu(source), source.getrandbits(256))),
    "place_steal": (2, lambda source: (_vcpu(source), source.randrange(len(STEAL_PLACES) + 1))),
    "delay": (3, lambda source: (_vcpu(source), _second(source), source.random() < 0.2)),
    "ask_wall_clock": (2, lambda source: (_vcpu(source), source.randrange(len(WALL_PLACES)))),
    "base_wall_clock": (1, lambda source: (_signed(source, _hour(source)), _hour(source) * source.randrange(2))),
    "add_memory": (2, _nothing),
    "remove_memory": (1, _nothing),
    "reset": (1, _nothing),
    "save": (4, _nothing),
    "restore": (
        4,
        lambda source: (source.randrange(4), source.choice((0, *FREQUENCIES)), int(10**15 ** source.random())),
    ),
    "misuse": (1, _one_of(8)),
}


def random_life(seed: int) -> Life:
    """The life of that number."""
    source = random.Random(seed)  # noqa: S311  # no secret
    names, weights = list(DRAWS), [weight for weight, _ in DRAWS.values()]
    count = source.randrange(1, MOVES_MAX)
    moves: list[Move] = [(name, *DRAWS[name][1](source)) for name in source.choices(names, weights, k=count)]
    begun = [("place_page", vcpu, 0, 0) for vcpu in range(3)] if source.random() < 0.7 else []
    offset = source.choice((0, 0, source.randrange(2**62)))
    hz = source.choice(FREQUENCIES)
    tsc = source.choice((int(10**15 ** source.random()), int(hz * 10 ** (6 * source.random()))))
    return Life(hz, tsc, 1 + _vcpu(source), offset, (*begun, *moves))


def live(life: Life) -> None:
    """Do all moves, and compare after each; AssertionError or whatever the clock raises."""
    for _ in stepped(life):
        pass


def stepped(life: Life) -> Iterator[Twins]:
    """As live(), and give the twins after each move."""
    twins = Twins(*life[:-1])
    kinds = (HostMoves(twins), TimeMoves(twins), GuestMoves(twins), LifeMoves(twins))
    known = {name: getattr(kind, name) for kind in kinds for name in DRAWS if hasattr(kind, name)}
    for name, *arguments in life.moves:
        known[str(name)](*arguments)
        twins.check()
        yield twins


def failure(life: Life) -> str | None:
    """What went wrong in it, or None."""
    try:
        live(life)
    except Exception:  # noqa: BLE001  # any is a finding
        return traceback.format_exc()
    return None


def shrunk(life: Life) -> Life:
    """The same with as few moves as still fail."""
    size = len(life.moves)
    while size:
        begin = 0
        while begin < len(life.moves):
            fewer = life._replace(moves=life.moves[:begin] + life.moves[begin + size :])
            if failure(fewer) is None:
                begin += size
            else:
                life = fewer
        size //= 2
    return life


def main() -> int:
    """Live random lives for some minutes; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="the first life's number")
    parser.add_argument("--findings", type=int, default=1, help="stop after so many")
    arguments = parser.parse_args()
    end, seed, found, moves = time.monotonic() + 60 * arguments.minutes, arguments.seed, 0, Counter[str]()
    while time.monotonic() < end and found < arguments.findings:
        life = random_life(seed)
        if failure(life) is not None:
            found += 1
            least = shrunk(life)
            print(f"seed {seed}: {least}\n{failure(least)}", flush=True)  # noqa: T201  # a report
        moves.update(str(name) for name, *_ in life.moves)
        seed += 1
    counts = ", ".join(f"{name} {count}" for name, count in sorted(moves.items()))
    print(f"seeds {arguments.seed} to {seed - 1}: {moves.total()} operations, {found} findings\n{counts}")  # noqa: T201
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
