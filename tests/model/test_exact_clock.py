"""A clock beside an exact model of it: random operations and faults, and the sequences that once showed a fault."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest

from pvclock.clock.host_trust import HostTrust
from pvclock.clock.vcpu_tscs import OffsetChange, VcpuTscs
from pvclock.readings import HostStamps
from pvclock.timekeeping.catchup import Advance, CatchUp
from pvclock.timekeeping.timeline import Timeline
from pvclock.tsc.vcpu_tsc import VcpuTsc
from tests.model.exact_clock import Life, failure, random_life, shrunk, stepped

LIVES = 160
"""A few seconds."""

PAGE, PAGES = ("place_page", 0, 0, 0), (("place_page", 0, 0, 0), ("place_page", 1, 0, 0))

FOUND = {
    "on_dirty raises in run_for(), which then never ended": Life(
        1_000_003, 15557766499, 1, 0, (PAGE, ("pause",), ("raise_dirty",), ("run_for", 114355, 8, 1), ("resume", 0, 0))
    ),
    "the TSC comes back and an offset fails: the coming back was forgotten": Life(
        *(10**9, 5437018612725, 2, 0),
        (("step_back", 10**12), ("pause",), ("come_back",), ("refuse_offset", 0, 1), ("tick",), ("tick",)),
    ),
    "the second offset fails after a step: the first was kept": Life(
        *(2_596_132_000, 601020157219, 2, 0),
        (
            *(("advance", 1163), ("step_back", 220 * 10**9), ("tick",), ("refuse_offset", 1, 1), ("come_back",)),
            *(("tick",), ("advance", 991), ("tick",)),
        ),
    ),
    "the host slept and guest time gains that: at() said so of the past, too": Life(
        *(2_600_000_000, 172984185233989, 3, 0),
        (("set_policy", 4, 2), ("advance", 311), ("sleep", 23032468942, 0), ("tick",)),
    ),
    "the vCPUs do not leave the guest when a sleep is settled: it was forgotten": Life(
        *(2_596_132_000, 321988311525059, 1, 0), (("hold_none",), ("sleep", 1000004313, 0), ("save",), ("tick",))
    ),
    "a sleep is slewed in: the slew before it went on at its own rate": Life(
        *(3_333_333_333, 168786409129597, 1, 0),
        (("set_policy", 6, 3), ("slew", 4687430, 16), ("slew", -2065, 28189), ("sleep", 1000000081, 3), ("skip", 9)),
    ),
    "the TSC reads low once as the VMM sets a guest's": Life(
        10**9, 10**12, 2, 0, (("advance", 19550334), ("refresh", 0), ("read_low", 1462), ("write_tsc", 0, 0, 1))
    ),
    "the TSC reads low once as a guest writes its own": Life(
        10**9, 10**12, 2, 0, (*PAGES, ("advance", 19550334), ("read_low", 1462), ("write_tsc", 0, 5, 0), ("refresh", 0))
    ),
    "a guest writes its TSC on a CPU that is behind: all pages went forward by that": Life(
        *(10**9, 10**12, 2, 0),
        (*PAGES, ("cpu_behind", 200 * 10**9), ("write_tsc", 0, 5, 0), ("cpu_good",), ("refresh", 0)),
    ),
    "a guest moves its page on a CPU that is behind": Life(
        *(10**9, 10**12, 2, 0), (*PAGES, ("cpu_behind", 200 * 10**9), ("place_page", 0, 1, 0), ("cpu_good",), ("tick",))
    ),
    "a clock is saved on a CPU that is behind: guest time went back": Life(
        10**9, 10**12, 1, 0, (("advance", 10**9), ("skip", 5), ("cpu_behind", 200 * 10**9), ("save",))
    ),
    "a clock is saved after the TSC stepped back: guest time went back": Life(
        10**9, 10**12, 1, 0, (("advance", 10**9), ("step_back", 200 * 10**9), ("save",))
    ),
    "a slot goes and another comes there before the next publish: its page had no flags": Life(
        *(10**9, 4020, 1, 0),
        (("add_memory",), ("place_page", 0, 3, 0), ("remove_memory",), ("add_memory",), ("tick",)),
    ),
    "a restored clock's second offset fails at resume: the first was kept": Life(
        *(10**9, 10**12, 2, 0),
        (
            *(("write_tsc", 0, 77, 0), ("save",), ("restore", 0, 0, 0), ("advance", 1000), ("refuse_offset", 1, 1)),
            *(("resume", 0, 0), ("refuse_offset", 1, 0), ("resume", 0, 0)),
        ),
    ),
    "a slew goes on at resume at another rate: that was no event": Life(
        2_600_000_000, 49512422572, 1, 0, (("slew", 8533, 7844), ("advance", 78243403), ("pause",), ("resume", 7, 1))
    ),
    "the vCPUs do not leave the guest as a page moves: half of that was done": Life(
        2_596_132_000, 87233370204592, 2, 0, (PAGE, ("hold_none",), ("place_page", 0, 3, 1), ("tick",))
    ),
    "the host sleeps after the TSC stepped back: that it came back was not found": Life(
        *(10**9, 10**12, 1, 0),
        (PAGE, ("step_back", 220 * 10**9), ("tick",), ("sleep", 10**10, 0), ("tick",), ("come_back",), ("tick",)),
    ),
    "the TSC comes back at once after a resume: time ended a tick before it had begun": Life(
        *(2_600_000_000, 37683108451787, 3, 0),
        (
            *(("place_page", 2, 0, 0), ("step_back", 200300822747), ("slew", 2, 656), ("advance", 462)),
            *(("dilate", 186, 4), ("advance", 295), ("advance", 549564174), ("pause",), ("advance", 2991531)),
            *(("read_low", 1618), ("resume", 2, 1), ("come_back",), ("slew", -15263, 806266)),
        ),
    ),
    "the vCPUs do not leave the guest as a page is asked for that cannot be: half of that was done": Life(
        2_600_000_000, 21, 1, 0, (PAGE, ("hold_none",), ("place_page", 0, 5, 1), ("tick",))
    ),
}


@pytest.mark.row("E9", "E11", "E12", "E23")
def test_random_lives_are_as_the_model_says() -> None:
    """Guest time, pages, TSCs, events and saved states are the model's after each of 6,000 operations and faults."""
    lives = [random_life(seed) for seed in range(LIVES)]
    assert sum(len(life.moves) for life in lives) > 6000
    findings = [f"{shrunk(life)}\n{failed}" for life in lives if (failed := failure(life))]
    assert not findings, "\n".join(findings)


@pytest.mark.row("E9", "E11", "E23")
@pytest.mark.parametrize("life", FOUND.values(), ids=FOUND)
def test_what_was_found(life: Life) -> None:
    """Each sequence that once showed a fault goes as the model says, and its faults of the host come."""
    *_, twins = stepped(life)
    armed = [name for name, *_ in life.moves if name in ("refuse_offset", "hold_none", "read_low")]
    assert twins.host.faults == len(armed)
    assert (twins.complaints > 0) == (("raise_dirty",) in life.moves)


def jump_short(timeline: Timeline, ns: Fraction) -> None:
    """A jump that is 1 ns short."""
    timeline._ns += ns - (ns > 0)


def write_tsc_off(tsc: VcpuTsc, value: int, host_tsc: int) -> None:
    """A write of a TSC that is a tick off."""
    tsc.offset = (value + 1 - host_tsc) % 2**64


def gain_all(_policy: Advance, missed_ns: Fraction) -> CatchUp:
    """A policy without its bound."""
    return CatchUp(missed_ns, Fraction(0), Fraction(0))


def see_no_step(_host: HostTrust, stamps: HostStamps, _vcpu: int | None) -> HostStamps:
    """No step of the TSC matters."""
    return stamps


def renumber_none(tscs: VcpuTscs, _before: int, _after: int) -> OffsetChange:
    """Offsets stay where the TSC steps."""
    return OffsetChange(tscs._keeper, tscs, tscs._tscs, {})


def miss_nothing(_timeline: Timeline, _tsc: int) -> Fraction:
    """A pause takes 1 ns."""
    return Fraction(1)


DEFECTS = (
    (Timeline, "jump", jump_short),
    (VcpuTsc, "host_write_tsc", write_tsc_off),
    (Advance, "settle", gain_all),
    (HostTrust, "_recover_from_step_back", see_no_step),
    (VcpuTscs, "plan_renumbering", renumber_none),
    (Timeline, "missed_at", miss_nothing),
)


@pytest.mark.row("E9")
@pytest.mark.parametrize(("target", "name", "broken"), DEFECTS)
def test_a_broken_clock_is_found(
    target: type, name: str, broken: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a defect in the clock some life is not as the model says, and cut down it still is not."""
    monkeypatch.setattr(target, name, broken)
    life = next(life for life in map(random_life, range(LIVES)) if failure(life) is not None)
    for seen in (failure(life), failure(shrunk(life))):
        assert seen is not None
        assert "\nAssertionError" in seen  # and no other error, as of a defect that is out of date
