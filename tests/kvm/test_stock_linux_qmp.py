"""QMP's time commands on a running stock Linux: its own readings show what was asked of `pvclock run --qmp`.

Only where KVM runs a stock Linux; elsewhere `make test-lab` does it.  All tests have one guest, in the file's order.

The guest reads its clocks, each time between two readings of its TSC; x-pvclock-query tells how far that is from the
host's, and the host's TSC at its nominal frequency is what its clocks are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Final, NamedTuple

import pytest

from pvclock import HostBackend, Reference
from pvclock.lab.kernel import Kernel
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, signed64
from pvclock.timekeeping.event_timeline import EventTimeline
from pvclock.timekeeping.events import Event, EventKind
from tests.guest_programs import Triple
from tests.kvm.guest_clocks import ROUNDING_NS, ClockSampler, SampledClock, Span, common
from tests.kvm.guest_shell import BOOT_LIMIT_S
from tests.kvm.served_linux import Refused, ServedLinux, served_linux
from tests.kvm.stock_linux import COMPLAINTS
from tests.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.row("E15", "E2")]

CLOCKS: Final = ("monotonic", "boottime", "realtime", "raw")
INTERVAL_MS: Final = 200
SLEWING_INTERVAL_MS: Final = 1000
"""A slew takes some seconds, and each byte that tells of a point a millisecond."""
SKIP_NS: Final = 3 * NS_PER_S
PAUSE_NS: Final = NS_PER_S
SLEW_NS: Final = 300_000_000
SLEW_PPM: Final = 100_000
EXACT_NS: Final = 50
"""Of a change: a few new anchors, each of which takes 0 or 1 ns, and a slew's end, which is within 2."""


@pytest.fixture(scope="module")
def guest(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedLinux]:
    """One that has booted to its shell."""
    with served_linux(kernel, tmp_path_factory.mktemp("run")) as running:
        running.qmp.ask("x-pvclock-set-rate", numerator=1)  # a change, from which its timeline is known
        yield running


class Sampled(NamedTuple):
    """The guest's clocks while something was done.

    before, after: what x-pvclock-query told.  changes: what was told of in between.
    """

    clocks: dict[str, SampledClock]
    before: dict[str, Any]
    after: dict[str, Any]
    changes: list[Event]

    def change(self, kind: EventKind) -> Event:
        """The last one of that kind."""
        return next(each for each in reversed(self.changes) if each.kind is kind)

    def host_tsc(self, guest_tsc: int) -> HostTsc:
        """When the guest read it: by the offset before a pause, or after it."""
        offset = int(self.after["vcpus"][0]["tsc-offset"])
        for paused in (each for each in self.changes if each.kind is EventKind.PAUSE):
            assert paused.host_tsc is not None
            offset_before = int(self.before["vcpus"][0]["tsc-offset"])
            if signed64(guest_tsc - paused.host_tsc - offset_before) <= 0:
                offset = offset_before
        return HostTsc((guest_tsc - offset) & U64_MASK)

    def ahead(self, triple: Triple, at: Callable[[HostTsc], Fraction]) -> Span:
        """How far a reading was ahead of the time that at() tells."""
        latest, earliest = (at(self.host_tsc(tsc)) for tsc in (triple.after, triple.before))
        return Span(triple.ns - latest, triple.ns - earliest)

    def nominal_ns(self, tsc: HostTsc) -> Fraction:
        """The host's TSC as a time."""
        return Fraction(tsc * NS_PER_S, self.after["tsc-hz"])

    def moved(self, name: str, change: Event) -> Span:
        """How far a clock has moved against the host's TSC, from before a change until the end."""
        tscs = change.host_tsc
        assert tscs is not None
        points = self.clocks[name].points
        early = [self.ahead(each, self.nominal_ns) for each in points if self.host_tsc(each.after) < tscs]
        late = self.ahead(points[-1], self.nominal_ns)
        assert self.host_tsc(points[-1].before) > tscs
        was = common(early)
        assert was.low <= was.high + ROUNDING_NS
        return Span(late.low - was.high, late.high - was.low)


def sampled(guest: ServedLinux, act: Callable[[], object], interval_ms: int = INTERVAL_MS) -> Sampled:
    """What the guest's clocks show while that is done: at least one point before it, and one after it."""
    before = guest.qmp.ask("x-pvclock-query")
    sampler = ClockSampler(guest.shell, interval_ms, timer_ms=0)
    act()
    clocks = sampler.finish()
    after = guest.qmp.ask("x-pvclock-query")
    wait_until(lambda: has_told(guest, after["last-event"]))
    changes = [each for each in guest.qmp.changes if before["last-event"] < each.sequence <= after["last-event"]]
    seen = Sampled(clocks, before, after, changes)
    check_distance(seen, EventTimeline(guest.qmp.changes).at)
    return seen


def check_distance(seen: Sampled, at: Callable[[HostTsc], Fraction], within_ns: float = EXACT_NS) -> None:
    """All readings of a clock, those around its largest gap too, are equally far from what at() tells."""
    for name, clock in seen.clocks.items():
        known = common([seen.ahead(each, at) for each in (*clock.points, clock.older, clock.newer)])
        assert known.low <= known.high + within_ns, name
        assert clock.backs == 0, name


def has_told(guest: ServedLinux, last: int) -> bool:
    """Have all changes up to that number come?  An answer brings along what was told before it."""
    guest.qmp.ask("query-status")
    return not guest.qmp.changes or guest.qmp.changes[-1].sequence >= last


def is_within(span: Span, ns: Fraction | int) -> bool:
    """May a quantity be that?"""
    return span.low - EXACT_NS <= ns <= span.high + EXACT_NS


def test_a_skip_is_a_step(guest: ServedLinux) -> None:
    """Each clock has gone on by what was skipped, and by no more."""
    seen = sampled(guest, lambda: guest.qmp.ask("x-pvclock-skip", ns=SKIP_NS))
    skip = seen.change(EventKind.SKIP)
    assert skip.jump_ns == SKIP_NS
    for name in CLOCKS:
        assert is_within(seen.moved(name, skip), SKIP_NS), name


def rates(seen: Sampled) -> dict[str, Span]:
    """Each clock's rate between its first and its last point."""
    found = {}
    for name in CLOCKS:
        first, last = seen.clocks[name].points[0], seen.clocks[name].points[-1]
        shortest, longest = last.before - first.after, last.after - first.before
        ns = (last.ns - first.ns) * Fraction(seen.after["tsc-hz"], NS_PER_S)
        rounding = EXACT_NS * Fraction(seen.after["tsc-hz"], NS_PER_S)
        found[name] = Span((ns - rounding) / longest, (ns + rounding) / shortest)
    return found


def test_a_rate_is_a_rate(guest: ServedLinux) -> None:
    """Half of real time, then all of it again; faster than at boot is refused, for its timers would be late."""
    for numerator, denominator in ((1, 2), (1, 1)):
        guest.qmp.ask("x-pvclock-set-rate", numerator=numerator, denominator=denominator)
        seen = sampled(guest, lambda: None)
        for name, rate in rates(seen).items():
            assert rate.low <= Fraction(numerator, denominator) <= rate.high, name
        assert seen.after["dilation"] == {"numerator": numerator, "denominator": denominator}
    with pytest.raises(Refused, match="booted at 1"):
        guest.qmp.ask("x-pvclock-set-rate", numerator=2)


def wait_for_slew(guest: ServedLinux) -> None:
    """Return once nothing is left to slew."""
    wait_until(lambda: guest.qmp.ask("x-pvclock-query")["skew-ns"] == 0)


def test_a_slew_is_a_rate_for_its_time(guest: ServedLinux) -> None:
    """A tenth faster, by the changes that its readings are held against, and in the end ahead by what was asked."""

    def slew() -> None:
        guest.qmp.ask("x-pvclock-slew", ns=SLEW_NS, max_ppm=SLEW_PPM)
        wait_for_slew(guest)

    seen = sampled(guest, slew, SLEWING_INTERVAL_MS)
    begun, ended = seen.changes[0], seen.change(EventKind.SLEW_END)
    assert begun.kind is EventKind.SLEW
    assert begun.rate_after == 1 + Fraction(SLEW_PPM, 10**6)
    assert ended.rate_after == 1
    for name in CLOCKS:
        assert is_within(seen.moved(name, begun), SLEW_NS), name


@pytest.mark.parametrize("policy", ["freeze", "advance", "slew:max_ppm=500000"])
def test_a_stop_is_what_the_policy_says(policy: str, guest: ServedLinux) -> None:
    """Time stands still for the stop, or has gone on, or catches up: by this process's own measure of the stop."""
    backend = HostBackend()
    guest.qmp.ask("x-pvclock-set-policy", policy=policy)
    tscs: list[int] = []

    def stop() -> None:
        tscs.append(backend.counter.read())
        guest.qmp.ask("stop")
        tscs.append(backend.counter.read())
        end_ns = backend.stamps().raw_ns + PAUSE_NS
        wait_until(lambda: backend.stamps().raw_ns >= end_ns)
        tscs.append(backend.counter.read())
        guest.qmp.ask("cont")
        tscs.append(backend.counter.read())
        wait_for_slew(guest)

    seen = sampled(guest, stop, SLEWING_INTERVAL_MS if policy.startswith("slew") else INTERVAL_MS)
    assert seen.after["policy"] == seen.change(EventKind.RESUME).policy == policy
    shortest_ns, longest_ns = (seen.nominal_ns(HostTsc(tscs[to] - tscs[since])) for since, to in ((1, 2), (0, 3)))
    assert shortest_ns >= PAUSE_NS * Fraction(999, 1000)
    for name in CLOCKS:
        moved = seen.moved(name, seen.change(EventKind.PAUSE))
        if policy == "freeze":
            assert moved.low - EXACT_NS <= -shortest_ns, name
            assert moved.high + EXACT_NS >= -longest_ns, name
        else:
            assert is_within(moved, 0), name
    assert guest.qmp.events[-2:] == ["STOP", "RESUME"]


def test_it_follows_the_hosts_clock(guest: ServedLinux) -> None:
    """Its clocks keep their distance to the host's CLOCK_MONOTONIC, within what the query says of the error."""
    guest.qmp.ask("x-pvclock-follow", reference="monotonic")
    wait_until(lambda: guest.qmp.ask("x-pvclock-query")["steering"] is not None)
    backend = HostBackend()
    first = backend.sample(Reference.MONOTONIC)
    seen = sampled(guest, lambda: None)
    last = backend.sample(Reference.MONOTONIC)

    def host_ns(tsc: HostTsc) -> Fraction:
        return first.ns + Fraction(signed64(tsc - first.tsc) * (last.ns - first.ns), signed64(last.tsc - first.tsc))

    assert seen.after["reference"] == "monotonic"
    steerings = seen.before["steering"], seen.after["steering"]
    error_ns = sum(abs(each["error-ns"]) + each["bound-ns"] for each in steerings) + first.bound_ns + last.bound_ns
    check_distance(seen, host_ns, 2 * error_ns + EXACT_NS)
    guest.qmp.ask("x-pvclock-follow", reference="off")


def test_its_kernel_does_not_complain(guest: ServedLinux) -> None:
    """Of all that: no watchdog, no lockup, no clock that is marked unstable."""
    assert guest.shell.run(COMPLAINTS) == ""


def test_quit_ends_the_command(guest: ServedLinux) -> None:
    """With status 0, and what --events has written then is what was told."""
    assert guest.qmp.ask("quit") == {}
    assert guest.process.wait(BOOT_LIMIT_S) == 0
    assert guest.qmp.events[-1] == "SHUTDOWN"
    logged = [Event.from_json(line) for line in guest.log.read_text().splitlines()]
    told = guest.qmp.changes
    assert [each for each in logged if told[0].sequence <= each.sequence <= told[-1].sequence] == told
