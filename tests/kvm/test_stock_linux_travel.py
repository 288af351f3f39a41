"""Debian's kernel, as it is, whose idle time takes no time: it sleeps for a day, and its clocks and timers are right.

Only where KVM runs a stock Linux; elsewhere `make test-lab` does it.  The tests of a guest come in the file's order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import pytest

from pvclock.commands.run_time import GUEST_OPTIONS
from pvclock.lab.kernel import Kernel
from pvclock.machine.time_travel import Arrival
from tests import oracle
from tests.kvm.guest_clocks import ROUNDING_NS, ClockSampler, Offsets, Span, common
from tests.kvm.stock_linux import COMPLAINTS, StockLinux

pytestmark = [pytest.mark.kvm, pytest.mark.row("E17")]

SETUPS: Final = {
    "engine-1": ("engine", 1),
    "engine-2": ("engine", 2),
    "kernel-1": ("kernel", 1),
    "kernel-2": ("kernel", 2),
}
LONG: Final = ("engine-2", "kernel-1")
on_all = pytest.mark.parametrize(
    "guest",
    [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in SETUPS],
    indirect=True,
)

DAY_S: Final = 86400
APART_NS: Final = 2
SYSTEM_TIME_NEW: Final = 0x4B564D01
SYSTEM_TIME: Final = 0x12
SLEEPS_S: Final = (1000, 200, 30, 5, 0.5)
CONSOLE_S: Final = 1000
RATE_ERROR: Final = 1e-3
"""Of guest time against the host's clock, which NTP steers: far less."""
SHELL_LATE_S: Final = 60
"""For what the guest itself does in real time, on however busy a machine."""
UPTIME: Final = "cut -d' ' -f1 /proc/uptime"
"""Within the line whose time it is to tell: a shell that waits for the next line is idle, and its time is skipped."""


@pytest.fixture(scope="module")
def guest(kernel: Kernel, request: pytest.FixtureRequest) -> Iterator[StockLinux]:
    """One that has booted to its shell, and travels in time from there."""
    clock, vcpus = SETUPS[request.param]
    with StockLinux(kernel, clock=clock, vcpus=vcpus, parameters=GUEST_OPTIONS.split()) as running:
        running.machine.time_travel.enable()
        yield running


class Instant(NamedTuple):
    """vCPU 0's TSC, and what its page makes of it, in ns.

    rounding_ns: how far the page's mul, of 32 bits, may have led astray since it was written; KVM writes the page of a
    vCPU that sleeps on through skips only once it runs.
    """

    tsc: int
    page_ns: int
    rounding_ns: int


def instant(guest: StockLinux) -> Instant:
    """One instant of the guest, by its own page."""
    machine = guest.machine
    with machine.runner.quiesce():
        vcpu = machine.vcpus[0]
        clock = machine.clock
        gpa = vcpu.get_msr(SYSTEM_TIME_NEW) if clock is None else clock.read_msr(0, SYSTEM_TIME_NEW)
        tsc = vcpu.get_msr(0x10)
        page = oracle.TimeInfo.parse(machine.memory.read(gpa & ~1, 32))
        next_mul = page._replace(tsc_to_system_mul=page.tsc_to_system_mul + 1)
        return Instant(tsc, page.read(tsc), next_mul.read(tsc) - page.read(tsc))


def hundredths(uptime: str) -> int:
    """What UPTIME prints, in hundredths of a second."""
    return int(uptime.replace(".", ""))


@on_all
def test_a_day(guest: StockLinux, record_property: Callable[[str, object], None]) -> None:
    """`sleep 86400` ends by the guest's clocks when it should; its page and its TSC are still 2 ns apart at most."""
    travel, machine = guest.machine.time_travel, guest.machine
    before, log, began_s = instant(guest), travel.log, time.monotonic()
    begun, ended = map(int, guest.run(f"date +%s; sleep {DAY_S}; date +%s").split())
    after, now, host_s = instant(guest), travel.log, time.monotonic() - began_s
    assert travel.failure is None
    assert DAY_S <= ended - begun <= DAY_S + host_s + 1
    assert now.skipped_ns - log.skipped_ns >= (DAY_S - host_s) * 10**9
    with machine.runner.quiesce():
        khz = machine.vcpus[0].get_tsc_khz()
    apart_ns = abs((after.tsc - before.tsc) * 10**6 // khz - (after.page_ns - before.page_ns))
    assert apart_ns <= APART_NS + 1 + before.rounding_ns + after.rounding_ns
    for name, figure in (
        ("skips", now.skips - log.skips),
        ("host_s", round(host_s, 2)),
        ("kept_out_s", round((now.host_ns - log.host_ns) / 1e9, 2)),
    ):
        record_property(name, figure)


def ahead(guest: StockLinux) -> dict[str, list[Span]]:
    """How far the guest's clocks are ahead of the engine's, sampled in a moment without travel."""
    travel, clock = guest.machine.time_travel, guest.machine.clock
    assert clock is not None
    travel.disable()
    travel.close()
    sampled = ClockSampler(guest, 50, 200).finish()
    offsets = Offsets(clock)
    spans = {name: [offsets.ahead_ns(triple) for triple in each.points] for name, each in sampled.items()}
    travel.enable()
    return spans


@pytest.mark.parametrize("guest", ["engine-1"], indirect=True)
def test_clocks_agree(guest: StockLinux) -> None:
    """MONOTONIC, BOOTTIME, REALTIME and RAW keep their distance to guest time over a day that was skipped."""
    before = ahead(guest)
    guest.run(f"sleep {DAY_S}")
    after = ahead(guest)
    for name in ("monotonic", "boottime", "realtime", "raw"):
        known = common(before[name] + after[name])
        assert known.low <= known.high + ROUNDING_NS, name


@on_all
def test_timers_end_in_order(guest: StockLinux) -> None:
    """Sleeps in the background, the longest begun first, end shortest first and none too early."""
    each = " ".join(f"(sleep {s}; echo {s} $({UPTIME})) &" for s in SLEEPS_S)
    began, *ends = guest.run(f"{UPTIME}; {each} wait").splitlines()
    assert [float(line.split()[0]) for line in ends] == sorted(SLEEPS_S)
    for slept, ended in map(str.split, ends):
        late = hundredths(ended) - hundredths(began) - 100 * float(slept)
        assert 0 <= late <= 100 * SHELL_LATE_S


@on_all
def test_short_and_broken_sleeps(guest: StockLinux) -> None:
    """50 sleeps of 10 ms take half a second or more, and `timeout` ends a sleep of an hour after 100 s."""
    short = "i=0; while [ $i -lt 50 ]; do sleep 0.01; i=$((i+1)); done"
    began, ended = guest.run(f"{UPTIME}; {short}; {UPTIME}").split()
    assert hundredths(ended) - hundredths(began) >= 50
    began, *_, status, ended = guest.run(f"{UPTIME}; timeout 100 sleep 3600; echo $?; {UPTIME}").split()
    assert status == "143"  # the shell may say "Terminated" before it
    assert 100 * 100 <= hundredths(ended) - hundredths(began) <= 100 * (100 + SHELL_LATE_S)


@on_all
def test_timers_of_every_clock(guest: StockLinux) -> None:
    """A timerfd of 5 s on each clock has not expired before its time."""
    clocks = ClockSampler(guest, 1000, 5000).finish()
    assert all(clock.backs == 0 for clock in clocks.values())
    for name in ("monotonic", "boottime", "realtime"):
        due_ns, expired = clocks[name].due_ns, clocks[name].expired
        assert due_ns is not None
        assert expired is not None
        assert expired.ns >= due_ns, name


@on_all
def test_console_input_at_a_guest_time(guest: StockLinux) -> None:
    """A line that is typed at guest time +1000 s arrives then: not before it, and no skip goes over it."""
    machine, travel = guest.machine, guest.machine.time_travel
    typed_ns, arrivals = list[int](), list[Arrival]()

    def type_it() -> None:
        typed_ns.append(machine.clock_service.now_ns())
        arrivals.extend(travel.recent[-1:])
        guest.type("it came\n")

    with travel.hold():  # else its time is skipped before the line is scheduled
        command = guest.begin(f"{UPTIME}; echo waiting; read -r line; echo $line; {UPTIME}")
        command.wait_for_line("waiting")
        due_ns = machine.clock_service.now_ns() + CONSOLE_S * 10**9
        machine.timers.at(due_ns, type_it)
    lines = command.printed().splitlines()
    assert typed_ns[0] >= due_ns
    assert arrivals[0].guest_ns - due_ns <= arrivals[0].host_ns * (1 + RATE_ERROR) + 1000
    assert "it came" in lines
    assert 0 <= hundredths(lines[-1]) - hundredths(lines[0]) - 100 * CONSOLE_S <= 100 * SHELL_LATE_S


@on_all
def test_its_kernel_does_not_complain(guest: StockLinux) -> None:
    """No stall, no lockup, no clock that is marked unstable, and it is still on kvm-clock."""
    assert guest.run(COMPLAINTS) == ""
    assert guest.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "kvm-clock\n"
    assert guest.machine.time_travel.failure is None
