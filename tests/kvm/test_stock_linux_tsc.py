"""Debian's kernel takes the clock that the pre-flight says, and finds TSCs apart that the pre-flight has named.

Only where KVM runs a stock Linux; elsewhere `make test-lab` does it.  Its CPUID has an invariant TSC, also where the
host's own KVM shows none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

import pytest

from pvclock import GuestClock, Machine
from pvclock.lab.kernel import Kernel
from pvclock.machine.cpuid import INVARIANT_TSC, CpuidEntry
from pvclock.machine.preflight import Finding, Severity, preflight
from pvclock.quantities import NS_PER_S, HostTsc, signed64
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC
from tests.kvm.stock_linux import StockLinux

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.row("E8", "E22"),
    pytest.mark.usefixtures("offsets_are_honoured", "tsc_is_trusted"),
]

CLOCKSOURCE: Final = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
COMPLAINTS: Final = r"TSC warp|TSC ADJUST differs|check_tsc_sync|clocksource.*tsc.*(unstable|skewed)|[Mm]arking TSC"
"""What Linux says of TSCs that are apart: by its test as a CPU comes up, by IA32_TSC_ADJUST, by its watchdog."""

LEAST_NS: Final = 10_000_000
AIMED_AT_NS: Final = 30_000_000
"""Less what passes between the reading of a TSC and the write, some ms on an emulated CPU."""
TRIES: Final = 100


def invariant(_vcpu: int, entries: list[CpuidEntry]) -> list[CpuidEntry]:
    """A CPUID whose TSC is invariant."""
    others = [entry for entry in entries if entry["function"] != 0x80000007]
    leaf = {"function": 0x80000007, "index": 0, "flags": 0, "eax": 0, "ebx": 0, "ecx": 0, "edx": INVARIANT_TSC}
    return [*others, leaf]


def set_apart(machine: Machine) -> None:
    """Put vCPU 1's TSC ahead of vCPU 0's; again if this thread was held up meanwhile."""
    clock = machine.clock
    assert clock is not None
    for _ in range(TRIES):
        now = HostTsc(clock.backend.counter.read())
        clock.host_write_msr(1, MSR_IA32_TSC, clock.guest_tsc(0, now) + AIMED_AT_NS * clock.tsc_hz // NS_PER_S)
        if ahead_ns(clock) >= LEAST_NS:
            return
    raise AssertionError(f"after {TRIES} writes vCPU 1's TSC is {ahead_ns(clock)} ns ahead")


def ahead_ns(clock: GuestClock) -> int:
    """How far vCPU 1's TSC is ahead of vCPU 0's."""
    return signed64(clock.tsc(1).offset - clock.tsc(0).offset) * NS_PER_S // clock.tsc_hz


def set_apart_and_repair(machine: Machine) -> None:
    """The same, and then the repair that the finding advises."""
    set_apart(machine)
    assert machine.clock is not None
    assert machine.clock.repair_tsc() != []


class Looked:
    """A guest whose machine the pre-flight has looked at, once it was changed, and before it started."""

    def __init__(self, kernel: Kernel, change: Callable[[Machine], object], **options: Any) -> None:  # noqa: ANN401  # Machine's
        self.findings: list[Finding] = []

        def look(machine: Machine) -> None:
            change(machine)
            self.findings = preflight(machine)

        self.guest = StockLinux(kernel, before_start=look, cpuid=invariant, **options)

    def predicted(self) -> str:
        """The clock source that a Linux of today will take."""
        (found,) = [each.values["choices"] for each in self.findings if each.code == "clocksource"]
        assert isinstance(found, list)
        return str(found[0]["clocksource"])

    def taken(self) -> str:
        """The one that it has taken, once all of them are there."""
        self.guest.run(f"for i in $(seq 100); do grep -q '{self.predicted()}$' {CLOCKSOURCE} && break; sleep 0.2; done")
        return self.guest.run(f"cat {CLOCKSOURCE}").strip()

    def complaints(self) -> str:
        """What it says of TSCs that are apart."""
        return self.guest.run(f"dmesg | grep -E '{COMPLAINTS}'")


def unchanged(_machine: Machine) -> None:
    """As it was made."""


@pytest.mark.parametrize("options", [{"clock": "kernel"}, {"provider": "HyperV+KVM", "offer_invariant_tsc": True}])
def test_with_an_invariant_tsc_it_takes_that(options: dict[str, Any], kernel: Kernel) -> None:
    """Whoever serves KVM's clock, and with Hyper-V's beside it: as the pre-flight says, which warns of it."""
    looked = Looked(kernel, unchanged, **options)
    with looked.guest:
        assert looked.predicted() == "tsc"
        assert looked.taken() == "tsc"
        assert {each.code for each in looked.findings if each.severity is Severity.WARNING} == {"guest-takes-tsc"}


@pytest.mark.row("E5")
def test_tscs_apart_are_named_whatever_linux_finds(kernel: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    """By size and vCPU, before the second vCPU comes up; Linux believes IA32_TSC_ADJUST, or says what is left of it.

    The warp that it measures is what its own writes of IA32_TSC_ADJUST have left, and no measure of what was set.
    """
    looked = Looked(kernel, set_apart, vcpus=2, offer_invariant_tsc=True)
    with looked.guest:
        (finding,) = [each for each in looked.findings if each.code == "tsc-disagreement"]
        found_ns = finding.values["ahead_ns"]
        assert isinstance(found_ns, int)
        assert (finding.severity, finding.vcpu, found_ns >= LEAST_NS) == (Severity.ERROR, 1, True)
        taken, said = looked.taken(), looked.complaints()
        with capsys.disabled():
            sys.stdout.write(f"\nthe pre-flight: {finding.what}\nLinux takes {taken} and says: {said or 'nothing'}\n")
        assert taken == (looked.predicted() if not said else "kvm-clock")


@pytest.mark.row("E5")
def test_after_the_repair_nobody_finds_anything(kernel: Kernel) -> None:
    """Neither the pre-flight nor Linux, and the TSC is taken, as was said."""
    looked = Looked(kernel, set_apart_and_repair, vcpus=2, offer_invariant_tsc=True)
    with looked.guest:
        assert not {"tsc-disagreement", "not-stable"} & {each.code for each in looked.findings}
        assert looked.complaints() == ""
        assert (looked.predicted(), looked.taken()) == ("tsc", "tsc")
