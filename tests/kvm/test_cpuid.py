"""The CPUID that a guest gets: what this host lets a VMM hide, and the TSC-deadline bit."""

from __future__ import annotations

import pytest

from pvclock import Machine
from pvclock.commands import doctor
from pvclock.errors import WrongType
from pvclock.kvm import Kvm, open_kvm
from pvclock.kvm.cpuid_probe import TSC_ADJUST, CpuidProbe
from pvclock.machine.cpuid import TSC_DEADLINE, KernelClock, guest_cpuid, supported_cpuid
from tests.kvm.guests import out
from tests.waiting import HANG_S

pytestmark = pytest.mark.kvm

RESULT = 0x5000
EXIT = out(0xF4, 0)

# mov $7, %eax; xor %ecx, %ecx; cpuid; mov %ebx, RESULT
STORE_LEAF_7_EBX = bytes.fromhex("66b807000000 6631c9 0fa2 66891e0050")


@pytest.mark.row("J-01")
@pytest.mark.parametrize("offered", [True, False])
def test_a_guest_sees_what_the_probe_says(offered: bool, cpuid: CpuidProbe) -> None:
    """IA32_TSC_ADJUST is in a guest's CPUID if it is offered, or if the probe has found that it cannot be hidden."""
    with Machine(STORE_LEAF_7_EBX + EXIT, offer_tsc_adjust=offered) as machine:
        machine.start()
        assert machine.wait(HANG_S) == 0
        seen = int.from_bytes(machine.memory.read(RESULT, 4), "little") & TSC_ADJUST
    serves_leaf_itself = (7, "ebx") in cpuid.ignored
    assert bool(seen) == (not cpuid.hides_tsc_adjust if serves_leaf_itself else offered)


@pytest.mark.row("E8")
def test_what_a_probe_says() -> None:
    """It names the bits that cannot be hidden, or none."""
    honoured = CpuidProbe({})
    assert honoured.is_honoured
    assert honoured.hides_tsc_adjust
    assert str(honoured) == "a guest sees the CPUID that is set"
    other = CpuidProbe({(7, "ecx"): TSC_ADJUST})
    assert not other.is_honoured
    assert other.hides_tsc_adjust
    assert str(CpuidProbe({(1, "ecx"): 8, (7, "ebx"): 2})).endswith("not to be hidden are 0x1:ECX 0x8, 0x7:EBX 0x2")
    assert not CpuidProbe({(7, "ebx"): 3}).hides_tsc_adjust


@pytest.mark.row("E8")
def test_doctor_says_it(cpuid: CpuidProbe) -> None:
    """`pvclock doctor` has a line for it, with advice if something cannot be hidden."""
    (finding,) = [finding for finding in doctor.examine() if finding.name == "guest CPUID"]
    assert finding.found.text == str(cpuid)
    assert finding.ok == cpuid.is_honoured
    assert bool(finding.advice) == (not finding.ok)
    assert not finding.needed


class Playing:
    """A host with KVM_CAP_TSC_DEADLINE_TIMER or not, whose supported CPUID does not say so: Linux 6.1."""

    def __init__(self, kvm: Kvm, capability: int) -> None:
        self.kvm, self.capability = kvm, capability

    def get_supported_cpuid(self) -> list[dict[str, int]]:
        """The host's, without the bit."""
        entries = self.kvm.get_supported_cpuid()
        (leaf_1,) = [entry for entry in entries if entry["function"] == 1]
        leaf_1["ecx"] &= ~TSC_DEADLINE
        return entries

    def check_extension(self, _capability: str) -> int:
        """As told."""
        return self.capability


@pytest.mark.row("E8")
@pytest.mark.parametrize("capability", [0, 1])
def test_the_tsc_deadline_timer_goes_by_its_capability(capability: int) -> None:
    """CPUID.1:ECX[24] is set where KVM has the timer, also where its supported CPUID is silent."""
    with Kvm() as kvm:
        host = Playing(kvm, capability)
        silent, supported = host.get_supported_cpuid(), supported_cpuid(host)  # type: ignore[arg-type]
    for before, after in zip(silent, supported, strict=True):
        added = TSC_DEADLINE if before["function"] == 1 and capability else 0
        assert after == {**before, "ecx": before["ecx"] | added}


@pytest.fixture(params=["engine", "kernel"])
def told(request: pytest.FixtureRequest) -> dict[int, dict[str, int]]:
    """Return the CPUID entries of a machine's vCPU, whoever serves its clock, by leaf."""
    entries: list[dict[str, int]] = []

    def kept(_vcpu: int, given: list[dict[str, int]]) -> list[dict[str, int]]:
        entries.extend(given)
        return given

    with Machine(EXIT, clock=request.param, cpuid=kept):
        return {entry["function"]: entry for entry in entries}


@pytest.mark.row("E8")
def test_every_guest_has_that_timer(told: dict[int, dict[str, int]]) -> None:
    """A machine's vCPUs are told of the TSC-deadline timer if the host has it."""
    with Kvm() as kvm:
        has_timer = kvm.check_extension("KVM_CAP_TSC_DEADLINE_TIMER") != 0
    assert bool(told[1]["ecx"] & TSC_DEADLINE) == has_timer


@pytest.mark.row("K-34", "X-02")
def test_a_guest_is_offered_what_the_hosts_kernel_serves(told: dict[int, dict[str, int]]) -> None:
    """The clock's features are in the feature leaf, and unhalt and poll control where KVM supports them."""
    with Kvm() as kvm:
        (supported,) = [entry for entry in kvm.get_supported_cpuid() if entry["function"] == 0x40000001]
    clocks = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 24
    assert told[0x40000001]["eax"] == clocks | supported["eax"] & (1 << 7 | 1 << 12)


@pytest.mark.row("E13")
def test_wrong_types_are_refused_by_name() -> None:
    """A CPUID of anything but an open /dev/kvm, a number and a clock is a WrongType that says which it was."""
    with open_kvm() as kvm:
        with pytest.raises(WrongType, match=r"^kvm .*what open_kvm\(\) returns"):
            guest_cpuid(None, 0, KernelClock(0))  # type: ignore[arg-type]  # that is the test
        with pytest.raises(WrongType, match=r"^apic_id "):
            guest_cpuid(kvm, 1.5, KernelClock(0))  # type: ignore[arg-type]  # that is the test
        with pytest.raises(WrongType, match=r"^clock .*a GuestClock or a KernelClock"):
            guest_cpuid(kvm, 0, object())  # type: ignore[arg-type]  # that is the test
