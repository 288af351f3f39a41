from pvclock._core import TimePages
from pvclock._scale import ClockScale
from pvclock.readings import ClockLine

def republish_in_turn(
    pages: TimePages,
    line: ClockLine,
    rates: list[tuple[int, int, ClockScale]],
    publishes: int,
    max_ticks: int = ...,
) -> tuple[ClockLine, tuple[int, int, int, int, int]]: ...
