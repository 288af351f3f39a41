"""The pre-flight of real machines: the facts are theirs, and what is wrong with a machine is named before it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final, Literal

import pytest

from pvclock import ConfigError, Machine, RangeError, StateError, WrongType
from pvclock.commands import main
from pvclock.host.linux import host_clocksource
from pvclock.kvm import TscOffsets, open_kvm
from pvclock.kvm.cpuid_probe import CpuidProbe
from pvclock.machine.cpuid import INVARIANT_TSC, CpuidEntry
from pvclock.machine.preflight import Finding, Severity, guest_facts, judge, preflight, repair_writes
from pvclock.machine.preflight.facts import ASKED_MSRS
from pvclock.providers.kvm.features import KvmFeature
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC
from tests.command_line import run_pvclock
from tests.kvm.guests import out
from tests.kvm.msr_script import Access, run_script
from tests.kvm.pc_guests import WAIT_FOREVER
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E8")]

HALT: Final = b"\xf4"
FEATURES: Final = 0x40000001
TIMING: Final = 0x40000010
SEVERE: Final = (Severity.ERROR, Severity.WARNING)


def changed(leaf: int, **registers: int) -> Callable[[int, list[CpuidEntry]], list[CpuidEntry]]:
    """What gives all vCPUs those registers in a leaf."""

    def change(_vcpu: int, entries: list[CpuidEntry]) -> list[CpuidEntry]:
        others = [entry for entry in entries if entry["function"] != leaf]
        blank = {"function": leaf, "index": 0, "flags": 0, "eax": 0, "ebx": 0, "ecx": 0, "edx": 0}
        before = next((entry for entry in entries if entry["function"] == leaf), blank)
        return [*others, {**before, **registers}]

    return change


INVARIANT: Final = changed(0x80000007, edx=INVARIANT_TSC)


def named(machine: Machine, *severities: Severity) -> list[str]:
    """The codes of what is found, of those severities."""
    return [finding.code for finding in preflight(machine) if finding.severity in severities]


def one(machine: Machine, code: str) -> Finding:
    """The one finding of that code."""
    (finding,) = [each for each in preflight(machine) if each.code == code]
    return finding


def of_host() -> set[str]:
    """What this host lacks, whatever the machine is."""
    return set() if host_clocksource() == "tsc" else {"not-stable", "no-master-clock"}


@pytest.mark.parametrize("clock", ["engine", "kernel"])
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_machine_is_sound(clock: str, vcpus: int) -> None:
    """By default nothing is wrong with it but what the host lacks, and a guest will take KVM's clock."""
    with Machine(HALT, vcpus=vcpus, clock=clock) as machine:  # type: ignore[arg-type]  # a str
        assert set(named(machine, *SEVERE)) <= of_host()
        assert {each["clocksource"] for each in chosen(machine)} == {"kvm-clock"}


def chosen(machine: Machine) -> list[dict[str, str]]:
    """What the guests take, as the finding has it."""
    found = one(machine, "clocksource").values["choices"]
    assert isinstance(found, list)
    return found


def test_the_clock_of_each_provider() -> None:
    """Hyper-V's reference TSC page, where that is all there is; and with nothing, nothing."""
    with Machine(HALT, provider="HyperV") as machine:
        assert {each["clocksource"] for each in chosen(machine)} == {"hyperv_clocksource_tsc_page"}
        assert named(machine, *SEVERE) == []
    with Machine(HALT, provider="HyperV+KVM") as machine:
        assert [each["clocksource"] for each in chosen(machine)][:2] == ["kvm-clock"] * 2
        assert set(named(machine, *SEVERE)) <= {"not-stable"}
    with Machine(HALT, provider="None") as machine:
        assert "no-clocksource" in named(machine, Severity.WARNING)


@pytest.mark.row("E22")
def test_an_invariant_tsc(tsc_offsets: TscOffsets) -> None:
    """Both kinds of Linux will take it, and leave the clock; where the host has no TSC offsets, that is said, too."""
    with Machine(HALT, offer_invariant_tsc=True, cpuid=INVARIANT) as machine:
        assert [each["clocksource"] for each in chosen(machine)] == ["tsc", "tsc"]
        found = named(machine, Severity.WARNING)
        assert "guest-takes-tsc" in found
        assert ("tsc-offset-not-honoured" in found) == (tsc_offsets is TscOffsets.IGNORED)


def test_an_invariant_tsc_that_the_host_lacks() -> None:
    """A machine that is to show one and cannot says so."""
    with Machine(HALT, offer_invariant_tsc=True, cpuid=changed(0x80000007, edx=0)) as machine:
        assert "invariant-tsc-not-supported" in named(machine, Severity.WARNING)


@pytest.mark.parametrize("clock", ["engine", "kernel"])
def test_a_feature_that_nobody_serves(clock: str) -> None:
    """CPUID changed behind the clock's back: the MSRs of what it offers now fault."""
    features = int(KvmFeature.CLOCKSOURCE2 | KvmFeature.CLOCKSOURCE_STABLE)
    everything = changed(FEATURES, eax=features | KvmFeature.CLOCKSOURCE)
    with Machine(HALT, clock=clock, features=features) as machine:  # type: ignore[arg-type]  # a str
        assert not {"clock-msr-not-served", "clock-msr-not-offered"} & set(named(machine, *Severity))
    with Machine(HALT, clock=clock, features=features, cpuid=everything) as machine:  # type: ignore[arg-type]
        found = [each.values["msr"] for each in preflight(machine) if each.code == "clock-msr-not-served"]
        assert found == ([0x11, 0x12] if clock == "engine" else [])  # KVM goes by the CPUID that it has


NEW_ONLY: Final = int(KvmFeature.CLOCKSOURCE2)
SERVED: Final[dict[str, tuple[Literal["engine", "kernel"], dict[str, object]]]] = {
    "engine": ("engine", {}),
    "engine, new MSRs": ("engine", {"features": NEW_ONLY}),
    "engine, not enforced": ("engine", {"features": NEW_ONLY, "enforce_cpuid": False}),
    "Hyper-V": ("engine", {"provider": "HyperV"}),
    "both": ("engine", {"provider": "HyperV+KVM"}),
    "nothing": ("engine", {"provider": "None"}),
    "kernel": ("kernel", {}),
    "kernel, new MSRs": ("kernel", {"features": NEW_ONLY}),
}


@pytest.mark.parametrize("setup", SERVED)
def test_a_guest_finds_served_what_the_facts_say(setup: str) -> None:
    """A real guest's RDMSR of each MSR that is asked for faults, or does not, as was said before it ran."""
    clock, options = SERVED[setup]
    with Machine(HALT, clock=clock, **options) as machine:  # type: ignore[arg-type]  # of several types
        said = guest_facts(machine.vcpus, machine.clock).vcpus[0].served_msrs
    found = run_script([Access(msr) for msr in ASKED_MSRS], clock, **options)
    assert {msr for msr, outcome in zip(ASKED_MSRS, found, strict=True) if not outcome.faulted} == said


def test_what_is_served_without_being_offered() -> None:
    """The engine's provider without enforcement."""
    with Machine(HALT, features=int(KvmFeature.CLOCKSOURCE2), enforce_cpuid=False) as machine:
        found = [each.values["msr"] for each in preflight(machine) if each.code == "clock-msr-not-offered"]
        assert found == [0x11, 0x12]


def test_a_hypervisor_without_its_bit(cpuid: CpuidProbe) -> None:
    """Leaves that no guest looks for; on a host that shows its own leaf 1, the bit is that one's."""
    with Machine(HALT, cpuid=changed(1, ecx=0)) as machine:
        hidden = not cpuid.ignored.get((1, "ecx"), 0) & 1 << 31
        assert ("hypervisor-bit" in named(machine, Severity.ERROR)) == hidden


def test_frequencies_are_held_against_the_tsc() -> None:
    """Leaf 0x40000010 as the provider makes it is right; one of another machine is not."""
    with Machine(HALT, timing_leaf=True) as machine:
        assert not {"frequency-leaf", "maximum-leaf"} & set(named(machine, *SEVERE))
    with Machine(HALT, timing_leaf=False, cpuid=changed(TIMING, eax=1_000_000, ebx=1_000_000)) as machine:
        assert one(machine, "maximum-leaf").values["leaves"] == [TIMING]
        finding = one(machine, "frequency-leaf")
        assert finding.severity is Severity.ERROR
        tsc_hz = machine.vcpus[0].get_tsc_khz() * 1000
        assert finding.values["error_ppm"] == pytest.approx((10**9 / tsc_hz - 1) * 1e6)


def test_a_frequency_that_is_not_served() -> None:
    """Set above the host's: KVM takes it, and where it cannot scale the guest's TSC is not at that rate."""
    with Machine(HALT) as machine, closing(open_kvm()) as kvm:
        machine.vcpus[0].set_tsc_khz(2 * machine.vcpus[0].get_tsc_khz())
        is_scaled = bool(kvm.check_extension("KVM_CAP_TSC_CONTROL"))
        assert ("tsc-frequency-not-served" in named(machine, Severity.ERROR)) != is_scaled


def test_a_rate_takes_the_told_frequency_along() -> None:
    """The leaf that is offered by default goes when guest time has another rate, and the guest will not have it."""
    with Machine(HALT) as machine:
        assert machine.clock is not None
        machine.clock.dilate(1, 10)
        assert set(named(machine, *SEVERE)) <= of_host()
        assert all(entry["function"] != TIMING for entry in machine.vcpus[0].get_cpuid())


def test_a_rate_beside_a_told_frequency() -> None:
    """Guest time at a tenth, and a leaf that was asked for, by which a guest computes its own: an error."""
    with Machine(HALT, timing_leaf=True) as machine:
        assert machine.clock is not None
        machine.clock.dilate(1, 10)
        assert "frequency-leaf-and-rate" in named(machine, Severity.ERROR)


@pytest.mark.row("E5")
@pytest.mark.usefixtures("offsets_are_honoured", "tsc_is_trusted")
def test_tscs_apart_are_named_and_repaired() -> None:
    """10 ms between two vCPUs, by size and vCPU; after repair_tsc() nothing is left of it."""
    with Machine(HALT, vcpus=2, cpuid=INVARIANT, offer_invariant_tsc=True) as machine:
        clock = machine.clock
        assert clock is not None
        host_tsc = clock.backend.counter.read()
        ahead = clock.tsc_hz // 100
        clock.host_write_msr(1, MSR_IA32_TSC, clock.guest_tsc(1, host_tsc) + ahead)  # type: ignore[arg-type]  # a HostTsc
        finding = one(machine, "tsc-disagreement")
        assert (finding.severity, finding.vcpu) == (Severity.ERROR, 1)
        size_ns = finding.values["ahead_ns"]
        assert isinstance(size_ns, int)
        assert size_ns <= -9_000_000 or size_ns >= 9_000_000  # less what passed between the reading and the write
        clock.repair_tsc()
        assert not {"tsc-disagreement", "not-stable"} & set(named(machine, *Severity))


@pytest.mark.row("E5")
@pytest.mark.usefixtures("offsets_are_honoured", "tsc_is_trusted")
@pytest.mark.parametrize("clock", ["engine", "kernel"])
def test_an_offset_set_behind_the_clocks_back(clock: str) -> None:
    """It is named; of the kernel's clock the master clock is gone, and the repair's writes bring all together."""
    with Machine(HALT, vcpus=2, clock=clock) as machine:  # type: ignore[arg-type]  # a str
        before = machine.vcpus[1].get_tsc_offset()
        machine.vcpus[1].set_tsc_offset(before + machine.vcpus[1].get_tsc_khz() * 10)
        assert one(machine, "tsc-disagreement").values["ahead_ns"] == 10_000_000
        if clock == "engine":
            assert one(machine, "tsc-offset-unknown").values["ahead_ns"] == 10_000_000
            machine.vcpus[1].set_tsc_offset(before)
        else:
            assert "no-master-clock" in named(machine, Severity.WARNING)
            for write in repair_writes(guest_facts(machine.vcpus, None)):
                machine.vcpus[write.vcpu].set_tsc_offset(write.offset_after)
        assert named(machine, *SEVERE) == []


def test_a_restored_machine_is_judged_by_what_it_will_have() -> None:
    """Its TSCs are stopped, and get their offsets as it starts: they agree, and no offset is unknown."""
    with Machine(HALT, vcpus=2) as machine:
        machine.pause()
        state = machine.save()
    with Machine(HALT, vcpus=2, restore=state) as machine:
        found = set(named(machine, *Severity))
        assert not {"tsc-disagreement", "tsc-offset-unknown", "deadline-before-tsc", "not-stable"} & found - of_host()
        offsets = guest_facts(machine.vcpus, machine.clock).clock.tsc_offsets
        assert offsets is not None
        assert (len(offsets), len(set(offsets))) == (2, 1)


def test_a_vmm_may_ask_of_its_own_vcpus() -> None:
    """guest_facts() takes the vCPUs and a clock, and judge() gives what preflight() gives of a machine."""
    with Machine(HALT, vcpus=2) as machine:
        facts = guest_facts(machine.vcpus, machine.clock)
        assert len(facts.vcpus) == 2
        assert judge(facts) == preflight(machine)
        assert judge(facts._replace(has_calibration_timer=True))[0].severity is judge(facts)[0].severity


def test_vcpus_that_may_come_later() -> None:
    """A machine that can have more vCPUs is judged by those that it has, and anew when there is another."""
    with Machine(HALT, vcpus=1, max_vcpus=3) as machine:
        assert [each for each in preflight(machine) if each.severity in SEVERE] == []
        machine.add_vcpu()
        assert len(guest_facts(machine.vcpus, machine.clock).vcpus) == 2
        assert [each for each in preflight(machine) if each.severity in SEVERE] == []


def test_only_before_it_runs() -> None:
    """What a guest has seen cannot be taken back: a StateError, once it was started."""
    with Machine(out(0xF4, 0), platform="pc") as machine:
        machine.start()
        machine.wait(HANG_S)
        with pytest.raises(StateError, match=r"before start\(\)"):
            preflight(machine)


def test_what_is_no_vm_is_refused() -> None:
    """A wrong type, vCPUs of another VM's number, and facts of no vCPU."""
    with Machine(HALT, vcpus=2) as machine:
        facts = guest_facts(machine.vcpus, machine.clock)
        with pytest.raises(ConfigError, match="a clock of 2 vCPUs, and 1 vCPUs"):
            guest_facts(machine.vcpus[:1], machine.clock)
        with pytest.raises(WrongType, match="clock is"):
            guest_facts(machine.vcpus, machine)  # type: ignore[arg-type]  # that is the test
        with pytest.raises(RangeError, match="0 vCPUs"):
            judge(facts._replace(vcpus=()))
        with pytest.raises(WrongType, match="machine is"):
            preflight(machine.clock)  # type: ignore[arg-type]  # that is the test


# The command


def test_doctor_shows_the_findings(capsys: pytest.CaptureFixture[str]) -> None:
    """`pvclock doctor --machine` has a row for each; with --json they are in the one shape of all commands."""
    assert main(["doctor", "--machine", "--cpus", "2", "--rate", "1/10"]) == 0
    shown = capsys.readouterr().out
    assert "0 errors" in shown
    assert "kvm-clock for Linux" in shown
    assert main(["doctor", "--machine", "--json", "--provider", "HyperV"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["ok"]) == ("pvclock.doctor/1", True)
    found = {each["code"]: each for each in document["result"]["findings"]}
    assert found["clocksource"]["severity"] == "note"
    assert document["result"]["errors"] == 0


def test_doctor_warns_of_what_it_makes(capsys: pytest.CaptureFixture[str]) -> None:
    """With no clock for the guest a warning, and the exit status is 0: a guest may want none."""
    assert main(["doctor", "--machine", "--json", "--provider", "None"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result["warnings"] >= 1
    assert "no-clocksource" in {each["code"] for each in result["findings"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rate", "2"), "--rate goes with --machine"),
        (("--force-rate",), "--force-rate goes with --machine"),
        (("--machine", "--seconds", "3"), "--seconds goes with --guest"),
        (("--machine", "--guest"), "give one of them"),
        (("--machine", "--cpus", "0,2"), "how many vCPUs it has, 1 to 255"),
        (("--machine", "--cpus", "0"), "how many vCPUs it has, 1 to 255"),
        (("--cpus", "2"), "--cpus goes with --guest and --machine"),
        (("--machine", "--clock", "kernel", "--invtsc"), "--clock kernel: it takes none of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_doctor_refuses(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, before anything is made."""
    assert main(["doctor", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_run_tells_of_it_before_it_boots(tmp_path: Path) -> None:
    """Errors and warnings are lines on standard error; with --json there is nothing but the object."""
    image = tmp_path / "image"
    image.write_bytes(out(0xF4, 0) + WAIT_FOREVER)
    told = run_pvclock("run", str(image), "--provider", "None", redirect="</dev/null").stderr.splitlines()
    assert told[0].startswith("pvclock run: warning: no clock is offered that a Linux can use")
    assert told[1:] == ["pvclock run: the guest's exit code is 0"]
    quiet = run_pvclock("run", "--json", str(image), "--provider", "None", redirect="</dev/null").stderr.splitlines()
    assert quiet == ["pvclock run: the guest's exit code is 0"]
