"""The cross-check: it agrees on this host, and each of its rows can disagree."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any, TypeAlias

import pytest

import pvclock.commands
from pvclock import ClockScale, Reference, Sample, StateError
from pvclock.clock.wall_clock import WallClock
from pvclock.host.linux import host_clocksource
from pvclock.kvm import open_kvm
from pvclock.kvm.backend import KvmBackend, SteeredTscBackend
from pvclock.meter import observe
from pvclock.meter.comparison import Check
from pvclock.meter.machine_guest import MachineGuest
from pvclock.meter.observe import AcrossPause, ClockObservation, Following, Pause, Undisturbed, observe_clock
from pvclock.providers.kvm import KvmProvider
from pvclock.timekeeping.timeline import Timeline
from qemu_glue import QemuExited
from qemu_glue.crosscheck import compare_three
from qemu_glue.guest import QmpGuest, qemu_guest
from qemu_glue.peer.launch import Qemu
from tests.waiting import HANG_S

pytestmark = [pytest.mark.qemu, pytest.mark.kvm]

FEATURES = 0x0100_0009

Three: TypeAlias = tuple[ClockObservation, ClockObservation, ClockObservation]
Change: TypeAlias = Callable[[ClockObservation], ClockObservation]


def crosscheck(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`pvclock crosscheck` with `arguments`; its exit status."""
    point = EntryPoint("crosscheck", "qemu_glue.crosscheck", pvclock.commands.GROUP)
    monkeypatch.setattr(pvclock.commands, "_points", lambda: [point])
    return pvclock.commands.main(["crosscheck", *arguments])


def observe_engine() -> ClockObservation:
    """The engine's clock on one vCPU, as it is at this moment."""
    return observe_clock(lambda: MachineGuest("engine", 1), 0.2)


def wrong_rows(checks: list[Check]) -> list[str]:
    """The names of those that disagree."""
    return [check.name for check in checks if not check.ok]


@pytest.fixture(scope="module")
def subjects() -> Three:
    """Engine, kernel and QEMU, each with one vCPU, as they are."""
    engine = observe_engine()
    kernel = observe_clock(lambda: MachineGuest("kernel", 1), 0.2)
    features = engine.undisturbed.records[0].features
    return engine, kernel, observe_clock(lambda: qemu_guest(features, 1), 0.2)


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.row("K-08", "K-11", "K-12", "K-15", "K-16", "K-20", "K-38", "E13")
def test_all_three_agree(vcpus: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On this host engine, kernel and QEMU agree in every row."""
    status = crosscheck(monkeypatch, "--json", "--vcpus", str(vcpus), "--seconds", "0.5")
    report = json.loads(capsys.readouterr().out)
    assert "error" not in report, report["error"]
    checks = report["result"]["checks"]
    assert [check for check in checks if not check["ok"]] == []
    assert (status, report["ok"]) == (0, True)
    assert len(checks) == 22
    assert all(set(check) == {"name", "engine", "kernel", "qemu", "ok", "why"} for check in checks)
    assert all(check[whose]["text"] for check in checks for whose in ("engine", "kernel", "qemu"))
    assert all(values_of(check["qemu"]) for check in checks if not check["name"].startswith("rate by raw"))
    reference_time, why_no_hyperv = report["result"]["reference_time"], report["result"]["why_no_hyperv"]
    assert [check for check in reference_time if not check["ok"]] == []
    assert all(set(check) == {"name", "engine", "qemu", "ok", "why"} for check in reference_time)
    *of_both, of_engine = reference_time
    assert len(of_both) == 6
    assert of_engine["qemu"]["text"] == "-"
    assert {check["qemu"]["text"] == "-" for check in of_both} == {not kvm_has_hyperv()}
    assert (why_no_hyperv is None) is kvm_has_hyperv()


def kvm_has_hyperv() -> bool:
    """Can this host's KVM show a guest Hyper-V's clock?"""
    with open_kvm() as kvm:
        return kvm.check_extension("KVM_CAP_HYPERV_TIME") > 0


def values_of(cell: dict[str, Any]) -> list[object]:
    """The numbers of a cell of the table: numbers, lists or objects of them, and never a text."""
    values = list(cell["values"].values())
    assert not any(isinstance(value, str) for value in values)
    return values


@pytest.mark.row("E13", "E15")
def test_our_machine_is_asked_as_qemu_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine's guest in `pvclock run --qmp`, by the client that QEMU has: all agree, and both read their pages."""
    status = crosscheck(monkeypatch, "--json", "--by-qmp", "--vcpus", "2", "--seconds", "0.5")
    report = json.loads(capsys.readouterr().out)
    assert "error" not in report, report["error"]
    checks = {check["name"]: check for check in report["result"]["checks"]}
    assert [check for check in checks.values() if not check["ok"]] == []
    assert status == 0
    pages = checks["pages by QMP"]
    assert len(pages["engine"]["values"]["pages_by_qmp"]) == 2
    assert [pages[whose]["text"] for whose in ("engine", "kernel", "qemu")] == ["the same", "-", "the same"]


@pytest.mark.row("E13", "E15")
def test_a_life_cycle_by_qmp_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Our machine is not saved by QMP, so that both are refused."""
    assert crosscheck(monkeypatch, "--lifecycle", "--by-qmp") == 2
    assert "--lifecycle, --by-qmp: give one of them" in capsys.readouterr().err


@pytest.mark.row("K-15", "E9", "E13")
def test_wrong_mul_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An engine whose mul is one too many: exit status 1, and the table says which row and why."""
    right = Timeline.scale

    def off_by_one(self: Timeline, *dilation: object) -> ClockScale:
        scale = right(self, *dilation)  # type: ignore[arg-type]
        return ClockScale(scale.mul + 1, scale.shift)

    monkeypatch.setattr(Timeline, "scale", off_by_one)
    assert crosscheck(monkeypatch, "--vcpus", "1", "--seconds", "0.2") == 1
    said = capsys.readouterr().out
    assert "\ntsc_to_system_mul: one rate, one (mul, shift)" in said
    assert "2 of 29 disagree." in said  # here, and in the pages after stop and cont


@pytest.mark.row("K-16", "E9")
def test_wrong_stable_bit_is_named(monkeypatch: pytest.MonkeyPatch, subjects: Three) -> None:
    """An engine that never says STABLE where the kernel does, or always where it does not: the row of the flags."""
    _, kernel, qemu = subjects
    if host_clocksource() == "tsc":
        monkeypatch.setattr(KvmProvider, "allows_stable", False)
    else:
        monkeypatch.setattr(SteeredTscBackend, "tsc_stable", True)
    assert wrong_rows(compare_three(observe_engine(), kernel, qemu)) == ["flags", "stop, cont: pages"]


@pytest.mark.row("K-07", "E9")
def test_wrong_wall_clock_is_named(monkeypatch: pytest.MonkeyPatch, subjects: Three) -> None:
    """An engine whose record is 2 ms late, or whose backend mistakes the time of day: the row of the wall clock."""
    _, kernel, qemu = subjects
    with monkeypatch.context() as patch:
        patch.setattr(WallClock, "write", late_record(WallClock.write))
        assert wrong_rows(compare_three(observe_engine(), kernel, qemu)) == ["wall clock"]
    for backend in (KvmBackend, SteeredTscBackend):
        monkeypatch.setattr(backend, "sample", two_ms_late(backend.sample))
    assert wrong_rows(compare_three(observe_engine(), kernel, qemu)) == ["wall clock"]


def two_ms_late(sample: Callable[..., Sample]) -> Callable[..., Sample]:
    """A backend's sample() that takes it to be later than it is."""

    def late(self: object, reference: Reference) -> Sample:
        true = sample(self, reference)
        return true._replace(ns=true.ns + 2_000_000)

    return late


def late_record(write: Callable[..., None]) -> Callable[..., None]:
    """A wall clock whose record shows an instant 2 ms before the true one."""

    def late(self: object, gpa: int, sample: Sample, taking: Callable[[], object]) -> None:
        write(self, gpa, sample._replace(ns=sample.ns - 2_000_000), taking)

    return late


def alone(make: Callable[[Undisturbed], Undisturbed]) -> Change:
    """A change of what is seen of a clock left alone."""
    return lambda it: it._replace(undisturbed=make(it.undisturbed))


def page(**fields: int) -> Change:
    """A change of vCPU 0's page, left alone."""
    return alone(lambda it: it._replace(pages=[it.pages[0]._replace(**fields)]))  # type: ignore[arg-type]


def record(**fields: int) -> Change:
    """A change of vCPU 0's findings, left alone."""
    return alone(lambda it: it._replace(records=[it.records[0]._replace(**fields)]))


def interrupted(make: Callable[[AcrossPause], AcrossPause]) -> Change:
    """A change of what is seen of an interrupted clock."""
    return lambda it: it._replace(across_pause=make(it.across_pause))


def paused(make: Callable[[Pause], Pause]) -> Change:
    """A change of what is seen of the pause."""
    return interrupted(lambda it: it._replace(pause=make(it.pause)))


def then(**fields: int) -> Change:
    """A change of vCPU 0's findings, interrupted."""
    return interrupted(lambda it: it._replace(records=[it.records[0]._replace(**fields)]))


def after(**fields: int) -> Change:
    """Another page after stop and cont."""
    return interrupted(lambda it: it._replace(after=[it.after[0]._replace(**fields)]))  # type: ignore[arg-type]


ENGINE, KERNEL, QEMU = 0, 1, 2
ROWS: list[tuple[str, int, Change]] = [
    ("TSC frequency, Hz", QEMU, alone(lambda it: it._replace(tsc_hz=it.tsc_hz + 1000))),
    ("tsc_to_system_mul", ENGINE, page(tsc_to_system_mul=0x8000_0000)),
    ("tsc_shift", ENGINE, page(tsc_shift=1)),
    ("flags", ENGINE, page(flags=2)),
    ("versions", ENGINE, page(version=3)),
    ("versions", QEMU, page(version=0)),
    ("pages by QMP", QEMU, paused(lambda it: it._replace(pages_by_server=[it.pages[0]._replace(flags=2)]))),
    ("pages by QMP", QEMU, paused(lambda it: it._replace(pages_by_server=[]))),
    ("CPUID signature", ENGINE, record(signature_leaf=0x40000100)),
    ("CPUID features", QEMU, record(features=FEATURES | 1 << 4)),
    ("system time MSRs", ENGINE, record(msr=0x12)),
    ("wall clock", ENGINE, alone(lambda it: it._replace(wall_clock_error_ns=-1_100_000))),
    ("wall clock", QEMU, interrupted(lambda it: it._replace(wall_clock_error_ns=1_100_000))),
    ("wall clock", KERNEL, alone(lambda it: it._replace(wall_clock_error_ns=-51_000_000))),
    (
        "rate by raw, nominal, steered",
        ENGINE,
        lambda it: it._replace(following=Following(Reference.RAW, nominal_ppb=-66.8, steered_ppb=40.0, bound_ppb=30.0)),
    ),
    ("rate by the TSC", ENGINE, alone(lambda it: it._replace(rate_ppb=it.rate_ppb + 100))),
    ("progress by the host's clock", ENGINE, interrupted(lambda it: it._replace(progress_ns=-30_000_000))),
    ("guest's reads", QEMU, record(reads=0)),
    ("backward, wild or torn", ENGINE, record(torn=1)),
    ("backward, wild or torn", QEMU, record(backward_cross=1)),
    ("stop, cont: time left out", QEMU, interrupted(lambda it: it._replace(left_out_ns=0))),
    ("stop, cont: time left out", ENGINE, interrupted(lambda it: it._replace(left_out_ns=0))),
    ("stop, cont: time left out", KERNEL, interrupted(lambda it: it._replace(left_out_ns=300_000_000))),
    ("stop, cont: largest gap", KERNEL, then(largest_gap_ns=0)),
    ("stop, cont: GUEST_STOPPED", QEMU, then(stopped=0)),
    ("stop, cont: GUEST_STOPPED", ENGINE, then(stopped=0)),
    ("stop, cont: GUEST_STOPPED", KERNEL, then(stopped=1)),
    ("stop, cont: steps back", ENGINE, then(backward_own=1, worst_back_ns=1)),
    ("stop, cont: steps back", QEMU, then(backward_cross=1, worst_back_ns=1)),
    ("stop, cont: wild or torn", QEMU, then(torn=1)),
    ("stop, cont: versions", QEMU, interrupted(lambda it: it._replace(after=it.before))),
    ("stop, cont: versions", ENGINE, after(version=0)),
    ("stop, cont: pages", QEMU, after(flags=2)),
]


@pytest.mark.parametrize(("row", "whose", "change"), ROWS, ids=[f"{name}-{'EKQ'[whose]}" for name, whose, _ in ROWS])
@pytest.mark.row("E9", "E13")
def test_each_row_can_disagree(
    row: str,
    whose: int,
    change: Change,
    subjects: Three,
) -> None:
    """One thing seen otherwise, and the row that is about it is the one that disagrees."""
    observations = list(subjects)
    assert wrong_rows(compare_three(*observations)) == []
    observations[whose] = change(observations[whose])
    judged = not row.startswith("rate by") or host_clocksource() == "tsc"  # else KVM moves guests' TSCs
    assert wrong_rows(compare_three(*observations)) == [row] * judged


@pytest.mark.row("E13")
def test_qemu_killed_in_mid_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A QEMU that is killed while its guest is watched: exit status 2, and an error that says so."""

    def pause_the_dead(qemu: Qemu) -> None:
        os.kill(qemu.pid, signal.SIGKILL)
        Qemu.execute(qemu, "stop")

    monkeypatch.setattr(Qemu, "pause", pause_the_dead)
    assert crosscheck(monkeypatch, "--vcpus", "1", "--seconds", "0.2") == 2
    assert "QEMU ended with SIGKILL" in capsys.readouterr().err


@pytest.mark.row("E13")
def test_qemu_killed_while_its_guest_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the guest's silence shows it, the error is still that QEMU ended."""

    def launch() -> QmpGuest:
        launched.append(qemu_guest(FEATURES, 1))
        return launched[-1]

    def kill_and_lose_patience(*_: object) -> None:
        qemu = launched[-1].vmm
        assert isinstance(qemu, Qemu)
        os.kill(qemu.pid, signal.SIGKILL)
        qemu._process.wait(HANG_S)
        raise StateError("observe", "nobody reads", "-")

    launched: list[QmpGuest] = []
    monkeypatch.setattr(observe, "_wait_for_more_reads", kill_and_lose_patience)
    with pytest.raises(QemuExited, match="SIGKILL"):
        observe_clock(launch, 0.1)


@pytest.mark.row("E9", "E13")
def test_steps_back_at_cont_are_bounded(subjects: Three) -> None:
    """With two vCPUs KVM may step back at cont by the pause, for a page that is late, and by no more."""
    engine, kernel, qemu = subjects
    seen = qemu.across_pause
    for back_ns, wrong in ((seen.pause.least_ns, []), (seen.pause.most_ns + 3 * 10**7, ["stop, cont: steps back"])):
        late = seen.records[0]._replace(backward_own=1, worst_back_ns=back_ns)
        two = qemu._replace(across_pause=seen._replace(records=[seen.records[0], late]))
        assert wrong_rows(compare_three(engine, kernel, two)) == wrong


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seconds", "0"], "more than 0"),
        (["--seconds", "nan"], "more than 0"),
        (["--vcpus", "0"], "from 1 to 16"),
        (["--vcpus", "17"], "from 1 to 16"),
    ],
)
@pytest.mark.row("E13")
def test_what_cannot_be_asked_for(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No time or no vCPUs: exit status 2, before anything is started."""
    assert crosscheck(monkeypatch, *arguments) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.row("E13")
def test_no_qemu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without QEMU on the PATH: exit status 2, and how to get it."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert crosscheck(monkeypatch) == 2
    assert "apt-get install qemu-system-x86" in capsys.readouterr().err
