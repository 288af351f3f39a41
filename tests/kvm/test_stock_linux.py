"""Debian's kernel, as it is, on our own machine: it boots to a shell, lives on our clock, and powers off.

Only where KVM runs a stock Linux; elsewhere `make test-lab` does it.  The tests of a guest come in the file's order.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Final, NamedTuple

import pytest

from pvclock.boot.source import Protocol
from pvclock.lab.kernel import Kernel
from pvclock.machine import Ending, RunState
from pvclock.machine.devices.power_button import PowerButton
from tests.kvm.guest_clocks import ROUNDING_NS, ClockSampler, Offsets
from tests.kvm.guest_shell import BOOT_LIMIT_S
from tests.kvm.stock_linux import COMPLAINTS, StockLinux
from tests.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.row("E22", "K-02", "K-07")]

SETUPS: Final = {"engine-1": ("engine", 1), "engine-2": ("engine", 2), "kernel-1": ("kernel", 1)}
on_all = pytest.mark.parametrize("guest", SETUPS, indirect=True)
on_one_vcpu = pytest.mark.parametrize("guest", ["engine-1"], indirect=True)
on_two_vcpus = pytest.mark.parametrize("guest", ["engine-2"], indirect=True)

BUSY_S: Final = 60
HUNDREDTHS_NS: Final = 10**7
"""What /proc/uptime counts in."""


@pytest.fixture(scope="module")
def guest(kernel: Kernel, request: pytest.FixtureRequest) -> Iterator[StockLinux]:
    """One that has booted to its shell."""
    clock, vcpus = SETUPS[request.param]
    with StockLinux(kernel, clock=clock, vcpus=vcpus) as running:
        yield running


@on_all
def test_it_boots_on_kvmclock(guest: StockLinux) -> None:
    """By the new MSRs, with a page for each vCPU, and it has chosen that clock over the others."""
    log = guest.run("dmesg | grep -E 'kvm-clock: Using|Switched to'")  # all of it would take a minute in the lab
    assert "kvm-clock: Using msrs 4b564d01 and 4b564d00\n" in log
    assert "clocksource: Switched to clocksource kvm-clock\n" in log
    assert guest.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "kvm-clock\n"
    vcpus = len(guest.machine.vcpus)
    assert guest.run("grep -c ^processor /proc/cpuinfo") == f"{vcpus}\n"
    if (clock := guest.machine.clock) is not None:
        assert all(clock.page(vcpu) for vcpu in range(vcpus))


@on_all
def test_what_is_typed_arrives(guest: StockLinux) -> None:
    """A line that is longer than the serial port's FIFO comes whole, by interrupts of GSI 4."""
    words = " ".join(f"word{number}" for number in range(100))
    assert guest.run(f"echo {words} | wc -c") == f"{len(words) + 1}\n"
    assert re.search(r"\d+:(?: +0)* +[1-9].* IO-APIC +4-edge +ttyS0\n", guest.run("cat /proc/interrupts"))


@on_all
def test_programs_read_the_clock_without_a_system_call(guest: StockLinux) -> None:
    """A million readings from the vDSO, where a clock_gettime system call would have killed the program."""
    assert guest.run("vdso_probe") == "vdso reads 1000000 back 0\n"


class Uptime(NamedTuple):
    """What the guest showed, between two readings of the engine's clock, which are between two of the host's."""

    host_earliest_s: float
    earliest_ns: int
    guest_ns: int
    latest_ns: int
    host_latest_s: float


def uptime(guest: StockLinux) -> Uptime:
    """The guest's CLOCK_BOOTTIME, in hundredths of a second, cut."""
    clock = guest.machine.clock
    assert clock is not None
    host_earliest_s, earliest_ns = time.monotonic(), clock.now()
    shown_ns = int(guest.run("cat /proc/uptime").partition(" ")[0].replace(".", "")) * HUNDREDTHS_NS
    return Uptime(host_earliest_s, earliest_ns, shown_ns, clock.now(), time.monotonic())


def power_events(guest: StockLinux) -> int:
    """How often it has taken the power button's interrupt; a KVM that is nested under emulation may give one twice."""
    found = re.search(
        r"^ *\d+: +(\d+) .*IO-APIC +10-fasteoi +ACPI:Ged$", guest.run("cat /proc/interrupts"), re.MULTILINE
    )
    assert found is not None
    return int(found[1])


@on_one_vcpu
def test_its_power_button_is_heard(guest: StockLinux) -> None:
    """Linux's ACPI takes the event by an interrupt of GSI 10, and releases the button, each time that it is pressed."""
    claims = guest.machine.bus.port_claims
    (button,) = [claim.device for claim in claims if isinstance(claim.device, PowerButton)]
    for _ in range(2):
        before = power_events(guest)
        button.press()
        wait_until(lambda: button.read(0, 2) == b"\0\0")  # by a thread of Linux's, after its interrupt
        assert power_events(guest) > before


@on_two_vcpus
def test_a_minute_of_load(guest: StockLinux) -> None:
    """Both vCPUs are busy for 60 s of guest time, and the guest's clock goes on by as much as the engine's."""
    before = uptime(guest)
    busy = f"timeout {BUSY_S} sh -c 'while :; do :; done'"
    guest.run(f"{busy} & {busy}; wait", limit_s=10 * BUSY_S)
    after = uptime(guest)
    passed_ns = after.guest_ns - before.guest_ns
    assert passed_ns >= BUSY_S * 10**9
    assert after.earliest_ns - before.latest_ns - HUNDREDTHS_NS <= passed_ns
    assert passed_ns <= after.latest_ns - before.earliest_ns + HUNDREDTHS_NS


@on_all
def test_its_kernel_does_not_complain(guest: StockLinux) -> None:
    """No watchdog, no lockup, no clock that is marked unstable, in all of its life."""
    assert guest.run(COMPLAINTS) == ""


@on_all
def test_power_off_ends_the_run(guest: StockLinux) -> None:
    """By ACPI's sleep register: wait() returns 0, and the run state is shutdown."""
    assert (guest.power_off(), guest.machine.ending) == (0, Ending.POWER_OFF)
    assert guest.machine.run_state.current is RunState.SHUTDOWN


@pytest.mark.parametrize("protocol", ["pvh", "linux64"])
def test_it_boots_uncompressed(protocol: Protocol, kernel: Kernel) -> None:
    """The ELF file in the bzImage, by either entry: told of ACPI, command line and initrd it is the same guest."""
    with StockLinux(kernel, protocol=protocol) as guest:
        assert guest.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "kvm-clock\n"
        assert guest.run("uname -r") == f"{kernel.release}\n"
        assert (guest.power_off(), guest.machine.ending) == (0, Ending.POWER_OFF)


@pytest.mark.parametrize(
    ("provider", "clocksource"),
    [("HyperV", "hyperv_clocksource_tsc_page"), ("HyperV+KVM", "kvm-clock")],
)
def test_it_boots_beside_hyperv(provider: str, clocksource: str, kernel: Kernel) -> None:
    """On Hyper-V's reference TSC page, read by the vDSO, too; where it finds both interfaces it takes KVM's."""
    with StockLinux(kernel, provider=provider) as guest:
        assert guest.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == f"{clocksource}\n"
        assert guest.run("vdso_probe") == "vdso reads 1000000 back 0\n"
        assert (guest.power_off(), guest.machine.ending) == (0, Ending.POWER_OFF)


@pytest.mark.row("E12")
def test_a_tenth_of_real_time(kernel: Kernel) -> None:
    """From boot on a second of sleep takes ten of the host's, and so does one of a timerfd."""
    with StockLinux(kernel, rate=Fraction(1, 10)) as guest:
        before = uptime(guest)
        guest.run("sleep 1")
        after = uptime(guest)
        passed_ns = after.guest_ns - before.guest_ns
        assert passed_ns >= 10**9
        assert after.earliest_ns - before.latest_ns - HUNDREDTHS_NS <= passed_ns
        assert passed_ns <= after.latest_ns - before.earliest_ns + HUNDREDTHS_NS
        assert (after.host_latest_s - before.host_earliest_s) * 1e9 >= 10 * (passed_ns - 2 * HUNDREDTHS_NS)
        check_timers(guest, timer_ms=1000, host_ns_per_ns=10)
        assert guest.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "kvm-clock\n"
        assert guest.run(COMPLAINTS) == ""
        assert guest.power_off() == 0


def check_timers(guest: StockLinux, timer_ms: int, host_ns_per_ns: int) -> None:
    """A timerfd expires once it is due, and until then host and guest time pass as they are to each other."""
    clocks = ClockSampler(guest, timer_ms // 10, timer_ms).finish()
    assert guest.machine.clock is not None
    offsets, tsc_hz = Offsets(guest.machine.clock), guest.machine.clock.backend.tsc_hz
    rounding_ns = ROUNDING_NS * host_ns_per_ns
    for name in ("monotonic", "boottime", "realtime"):
        begun, due_ns, expired = clocks[name].points[0], clocks[name].due_ns, clocks[name].expired
        assert due_ns is not None
        assert expired is not None
        assert expired.ns >= due_ns > begun.ns > due_ns - timer_ms * 10**6
        shortest, longest = (
            (offsets.host_tsc(late) - offsets.host_tsc(early)) * 10**9 / tsc_hz
            for late, early in ((expired.before, begun.after), (expired.after, begun.before))
        )
        host_ns = (expired.ns - begun.ns) * host_ns_per_ns
        assert shortest - rounding_ns <= host_ns <= longest + rounding_ns, name


@pytest.mark.parametrize(
    ("command", "why"),
    [("reboot -f", "reboot"), ("echo c >/proc/sysrq-trigger", "panic")],
)
def test_a_reset_ends_the_run(command: str, why: str, kernel: Kernel) -> None:
    """The guest's own, and that of a kernel that panics and was told panic=-1."""
    with StockLinux(kernel) as guest:
        guest.type(f"{command}\n")
        assert (guest.machine.wait(BOOT_LIMIT_S), guest.machine.ending) == (0, Ending.RESET), why
