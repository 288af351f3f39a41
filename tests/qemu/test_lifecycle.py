"""The life-cycle cross-check: what a VMM does to its guest, on the engine, the kernel and a real QEMU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import TypeAlias

import pytest

import pvclock.commands
from pvclock import GuestTsc, StateError
from pvclock.meter.lifecycle.comparison import compare_operation
from pvclock.meter.lifecycle.guest import LifecycleGuest
from pvclock.meter.lifecycle.measures import is_stable, offset_changes, steps_ns
from pvclock.meter.lifecycle.observe import Look, Observed, observe_operation
from pvclock.meter.lifecycle.operations import Operation, operations
from pvclock.meter.machine_guest import MachineGuest
from pvclock.meter.watch.words import duration
from pvclock.payloads import clockprobe
from qemu_glue import QemuExited, QmpFailed, lifecycle
from qemu_glue.guest import qemu_guest
from qemu_glue.peer import lifecycle as peer
from qemu_glue.peer.launch import Qemu

pytestmark = [pytest.mark.qemu, pytest.mark.kvm]

FEATURES = 0x0100_0009
SHORT = operations((0.1,), 10, 0.1)
STOP, OFTEN, BUSY, RESET, LOAD = SHORT
ROWS = [
    "step against the TSC",
    "guest time meanwhile",
    "largest gap between readings",
    "readings that went back",
    "readings wild or torn",
    "GUEST_STOPPED seen",
    "versions",
    "TSC offset moved by",
    "wall clock afterwards",
]

Change: TypeAlias = Callable[[Observed], Observed]


def crosscheck(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`pvclock crosscheck` with `arguments`; its exit status."""
    point = EntryPoint("crosscheck", "qemu_glue.crosscheck", pvclock.commands.GROUP)
    monkeypatch.setattr(pvclock.commands, "_points", lambda: [point])
    return pvclock.commands.main(["crosscheck", *arguments])


def wrong_rows(operation: Operation, *observed: Observed) -> list[str]:
    """The names of the rows that are not as they should be."""
    return [check.name for check in compare_operation(operation.kind, observed, {}) if not check.ok]


@pytest.fixture(scope="module")
def observed() -> dict[str, dict[str, Observed]]:
    """Each operation, by its name, as each server did it to a guest with two vCPUs."""
    makers: dict[str, Callable[[], LifecycleGuest]] = {
        "engine": lambda: MachineGuest("engine", 2),
        "kernel": lambda: MachineGuest("kernel", 2),
        "qemu": lambda: qemu_guest(FEATURES, 2),
    }
    return {
        each.name: {name: observe_operation(make, each) for name, make in makers.items() if can(name, each)}
        for each in SHORT
    }


def can(server: str, operation: Operation) -> bool:
    """Can it do that to a guest?"""
    return (server, operation) != ("kernel", LOAD)


@pytest.mark.row("E3", "E13")
def test_a_short_life_cycle_is_as_it_should_be(observed: dict[str, dict[str, Observed]]) -> None:
    """Stops, many stops, a stop on a busy host, a reset, save and load: each row of each is right, with two vCPUs."""
    for operation in SHORT:
        checks = compare_operation(operation.kind, list(observed[operation.name].values()), {})
        assert [check for check in checks if not check.ok] == []
        assert [check.name for check in checks] == ROWS
        assert all(check.why for check in checks)


@pytest.mark.long
@pytest.mark.row("E3", "E13")
def test_the_whole_life_cycle(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command with all of its operations: exit status 0, and an object for each row of each."""
    assert crosscheck(monkeypatch, "--lifecycle", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["result"]["lifecycle"]
    assert [row for row in rows if not row["ok"]] == []
    assert [row["name"] for row in rows] == ROWS * 7


@pytest.mark.row("E3")
def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON in the cross-check's shape: a list of rows, each of which names its operation; nothing else was compared."""
    monkeypatch.setattr(lifecycle, "operations", lambda: [LOAD])
    status = crosscheck(monkeypatch, "--lifecycle", "--json", "--vcpus", "1")
    report = json.loads(capsys.readouterr().out)
    assert "error" not in report, report["error"]
    result = report["result"]
    assert (status, report["ok"], result["vcpus"]) == (0, True, 1), [
        row for row in result["lifecycle"] if not row["ok"]
    ]
    assert (result["checks"], result["reference_time"], result["why_no_hyperv"]) == ([], [], None)
    assert [row["name"] for row in result["lifecycle"]] == ROWS
    for row in result["lifecycle"]:
        assert set(row) == {"operation", "name", "engine", "kernel", "qemu", "ok", "why"}
        assert row["operation"] == "save, load in a new VM, cont"
        assert row["kernel"]["text"] == "-"
        assert "our machine saves the engine's clock only" in row["why"]


@pytest.mark.row("E3")
def test_a_clock_of_qemu_that_went_back_is_told(
    observed: dict[str, dict[str, Observed]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is as it should be with KVM's clock, so no row is wrong; and the last line is the place where it is read."""
    seen = observed[STOP.name]
    back = record(backward_cross=7, worst_back_ns=1_234_500)(seen["qemu"])
    checks = compare_operation(STOP.kind, [seen["engine"], seen["kernel"], back], {})
    monkeypatch.setattr(lifecycle, "cross_check_lifecycle", lambda *_: [(STOP.name, checks)])
    assert crosscheck(monkeypatch, "--lifecycle") == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "as it should be" in first
    furthest = duration(max(it.worst_back_ns for it in back.after.records))
    assert last == f"All is as it should be; QEMU's guest saw its clock go back by up to {furthest}."


@pytest.mark.row("E3")
def test_a_wrong_clock_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine whose clock goes on while it is stopped, by another policy: exit status 1, and the rows say so."""
    monkeypatch.setattr(lifecycle, "operations", lambda: [STOP])
    monkeypatch.setattr(MachineGuest, "resume", lambda guest: guest.machine.resume("advance"))
    assert crosscheck(monkeypatch, "--lifecycle", "--vcpus", "1") == 1
    said = capsys.readouterr().out
    assert "\nstop, cont after 0.1 s: step against the TSC: new line less old line" in said
    assert "2 of 9 disagree." in said


def after(make: Callable[[Look], Look]) -> Change:
    """A change of how it was afterwards."""
    return lambda it: it._replace(after=make(it.after))


def page(**fields: int) -> Change:
    """Another page of vCPU 1, afterwards."""
    return after(lambda it: it._replace(pages=[it.pages[0], it.pages[1]._replace(**fields)]))  # type: ignore[arg-type]


def stepped(by_ns: int) -> Change:
    """A line of vCPU 1 that is further by `by_ns`, afterwards."""

    def change(it: Observed) -> Observed:
        return page(system_time=it.after.pages[1].system_time + by_ns)(it)

    return change


def record(**fields: int) -> Change:
    """Other findings of vCPU 1, afterwards."""
    return after(lambda it: it._replace(records=[it.records[0], it.records[1]._replace(**fields)]))


def read(later_ns: int) -> Change:
    """A reading that is later by `later_ns`, afterwards, and with it the guest's time of day."""

    def change(it: Look) -> Look:
        reading = it.reading._replace(ns=it.reading.ns + later_ns)  # type: ignore[arg-type]
        return it._replace(reading=reading, wall_clock_error_ns=it.wall_clock_error_ns + later_ns)

    return after(change)


def wall_clock(by_ns: int) -> Change:
    """A wall clock that is later by `by_ns`, afterwards."""
    return after(lambda it: it._replace(wall_clock_error_ns=it.wall_clock_error_ns + by_ns))


def offsets(*moved_by: int) -> Change:
    """TSC offsets moved by so much more."""

    def change(it: Observed) -> Observed:
        old, new = ([offset or 0 for offset in look.tsc_offsets] for look in (it.before, it.after))
        moved = tuple(offset + ticks for offset, ticks in zip(new, moved_by, strict=True))
        return it._replace(
            before=it.before._replace(tsc_offsets=tuple(old)), after=it.after._replace(tsc_offsets=moved)
        )

    return change


def without_offsets(it: Observed) -> Observed:
    """TSC offsets that cannot be read."""
    return offsets_of(it, (None, None), (None, None))


def unreadable(before: bool = True, vcpu_1: bool = True) -> Change:
    """TSC offsets that cannot be read afterwards: before, too?  Of both vCPUs?"""
    return lambda it: offsets_of(it, (None,) * 2 if before else (0, 0), (None if vcpu_1 else 0, None))


def offsets_of(it: Observed, before: tuple[int | None, ...], after: tuple[int | None, ...]) -> Observed:
    """Other TSC offsets."""
    return it._replace(before=it.before._replace(tsc_offsets=before), after=it.after._replace(tsc_offsets=after))


def unknown_and(change: Change) -> Change:
    """TSC offsets that cannot be read, so no step is known; and something else."""
    return lambda it: change(without_offsets(it))


def as_version_before(it: Observed) -> Observed:
    """Pages that were not published again."""
    pages = [new._replace(version=old.version) for old, new in zip(it.before.pages, it.after.pages, strict=True)]
    return it._replace(after=it.after._replace(pages=pages))


STEP, MEANWHILE, GAP, BACK, TORN, STOPPED, VERSIONS, OFFSET, WALL = ROWS
ONE_BACK = record(backward_cross=1, worst_back_ns=1)
WRONG: list[tuple[Operation, str, str, Change]] = [
    (STOP, "engine", STEP, stepped(500_000_000)),
    (STOP, "kernel", STEP, stepped(-1_000_000)),
    (STOP, "qemu", STEP, stepped(-5_000_000_000)),
    (RESET, "engine", STEP, stepped(1000)),
    (RESET, "qemu", STEP, stepped(1_000_000)),
    (LOAD, "engine", STEP, stepped(60_000_000_000)),
    (LOAD, "qemu", STEP, stepped(60_000_000_000)),
    (RESET, "qemu", STEP, unknown_and(stepped(1_000_000))),
    (LOAD, "qemu", STEP, unknown_and(stepped(-60_000_000_000))),
    (STOP, "engine", MEANWHILE, read(5_000_000_000)),
    (STOP, "kernel", MEANWHILE, read(500_000_000)),
    (STOP, "qemu", MEANWHILE, read(5_000_000_000)),
    (STOP, "kernel", GAP, record(largest_gap_ns=50_000_000)),
    (STOP, "engine", GAP, record(largest_gap_ns=60_000_000_000)),
    (STOP, "kernel", GAP, record(largest_gap_ns=60_000_000_000)),
    (STOP, "qemu", GAP, record(largest_gap_ns=60_000_000_000)),
    (LOAD, "qemu", GAP, record(largest_gap_ns=60_000_000_000)),
    (RESET, "engine", GAP, record(first_ns=1)),
    (RESET, "engine", GAP, record(first_ns=60_000_000_000)),
    (RESET, "qemu", GAP, record(first_ns=1)),
    (LOAD, "engine", GAP, record(first_ns=1)),
    (STOP, "engine", BACK, ONE_BACK),
    (STOP, "kernel", BACK, ONE_BACK),
    (STOP, "qemu", BACK, record(backward_cross=1, worst_back_ns=60_000_000_000)),
    (RESET, "qemu", BACK, ONE_BACK),
    (LOAD, "engine", BACK, ONE_BACK),
    (STOP, "qemu", TORN, record(torn=1)),
    (RESET, "engine", TORN, record(wild=1)),
    (STOP, "engine", STOPPED, record(stopped=0)),
    (STOP, "kernel", STOPPED, record(stopped=1)),
    (STOP, "qemu", STOPPED, record(stopped=0)),
    (RESET, "engine", STOPPED, record(stopped=1)),
    (LOAD, "qemu", STOPPED, record(stopped=0)),
    (STOP, "engine", VERSIONS, as_version_before),
    (STOP, "qemu", VERSIONS, as_version_before),
    (RESET, "qemu", VERSIONS, page(version=3)),
    (STOP, "qemu", OFFSET, offsets(1, 1)),
    (RESET, "engine", OFFSET, offsets(0, 1)),
    (STOP, "engine", OFFSET, unreadable()),
    (STOP, "kernel", OFFSET, unreadable()),
    (STOP, "qemu", OFFSET, unreadable(before=False)),
    (STOP, "qemu", OFFSET, unreadable(vcpu_1=False)),
    (RESET, "qemu", OFFSET, unreadable(before=False)),
    (STOP, "engine", WALL, wall_clock(-1_200_000)),
    (STOP, "qemu", WALL, wall_clock(500_000_000)),
    (RESET, "kernel", WALL, wall_clock(-60_000_000)),
    (LOAD, "engine", WALL, wall_clock(1_000_000_000)),
    (LOAD, "qemu", WALL, wall_clock(-60_000_000_000)),
]


@pytest.mark.parametrize(
    ("operation", "server", "row", "change"), WRONG, ids=[f"{it.kind}-{server}-{row}" for it, server, row, _ in WRONG]
)
@pytest.mark.row("E3")
def test_each_row_can_disagree(
    operation: Operation, server: str, row: str, change: Change, observed: dict[str, dict[str, Observed]]
) -> None:
    """One thing seen otherwise, and the row that is about it is the one that disagrees."""
    seen = observed[operation.name][server]
    assert wrong_rows(operation, seen) == []
    judged = row not in (STEP, MEANWHILE) or is_stable(seen)
    assert wrong_rows(operation, change(seen)) == [row] * judged


@pytest.mark.row("E3")
def test_qemu_may_go_back_by_the_stop(observed: dict[str, dict[str, Observed]]) -> None:
    """Where it set the clock, and two vCPUs read it; with one vCPU a single such reading is wrong."""
    seen = observed[STOP.name]["qemu"]
    late = record(backward_own=7, backward_cross=9, worst_back_ns=seen.stopped.least_ns)(seen)
    assert wrong_rows(STOP, late) == []
    alone = late._replace(before=of_vcpu_1(late.before), after=of_vcpu_1(late.after))
    assert wrong_rows(STOP, alone) == [BACK]


def of_vcpu_1(look: Look) -> Look:
    """The same of a guest that has no other vCPU."""
    return look._replace(pages=look.pages[1:], tsc_offsets=look.tsc_offsets[1:], records=look.records[1:])


@pytest.mark.parametrize("ticks", [1, -12_345_678_901, 1 << 62])
@pytest.mark.parametrize("operation", [RESET, LOAD], ids=["reset", "load"])
@pytest.mark.row("E3")
def test_a_tsc_that_was_moved(operation: Operation, ticks: int, observed: dict[str, dict[str, Observed]]) -> None:
    """Its offset is taken out of the step, whatever it is by now: all that is told else is what it was."""
    seen = observed[operation.name]["qemu"]
    pages = [page._replace(tsc_timestamp=GuestTsc(page.tsc_timestamp + ticks)) for page in seen.after.pages]
    known = seen._replace(before=seen.before._replace(tsc_offsets=(5, 5)))
    moved = known._replace(after=seen.after._replace(pages=pages, tsc_offsets=(5 + ticks, 5 + ticks)))
    still = known._replace(after=seen.after._replace(tsc_offsets=(5, 5)))
    assert steps_ns(moved) == steps_ns(still)
    assert offset_changes(moved) == [ticks, ticks]


@pytest.mark.row("E3")
def test_unknown_offsets(observed: dict[str, dict[str, Observed]]) -> None:
    """Where they cannot be read, a step is told after stop and cont, which change none, and unknown otherwise."""
    for operation, said in ((STOP, "ms"), (RESET, "unknown"), (LOAD, "unknown")):
        checks = compare_operation(operation.kind, [without_offsets(observed[operation.name]["qemu"])], {})
        assert [check for check in checks if not check.ok] == []
        figures = {check.name: check.figures["qemu"] for check in checks}
        assert said in figures[STEP].text
        assert figures[OFFSET] == ("not readable", {"tsc_offset_changes": [None, None]})


@pytest.mark.row("E3")
def test_pages_without_stable_are_not_judged_by_the_tsc(observed: dict[str, dict[str, Observed]]) -> None:
    """KVM moves guests' TSCs there, so neither a step nor a reading tells anything."""
    unstable = page(flags=0)(stepped(5_000_000_000)(read(5_000_000_000)(observed[STOP.name]["engine"])))
    assert wrong_rows(STOP, unstable) == []
    assert wrong_rows(STOP, page(flags=1)(unstable)) == [STEP, MEANWHILE] * is_stable(observed[STOP.name]["engine"])


# A QEMU's own part


@pytest.mark.row("E3")
def test_a_stream_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that saving failed, and QEMU is not left behind."""
    with qemu_guest(FEATURES, 1) as guest:
        guest.start()
        guest.pause()
        monkeypatch.setattr(os, "memfd_create", lambda *_: os.open("/dev/full", os.O_WRONLY))
        with pytest.raises(QmpFailed, match="migrate"):
            guest.save_and_load()
        guest.check_running()


@pytest.mark.row("E3")
def test_a_stream_that_is_none() -> None:
    """A QEMU that is given something else ends, and the error has what it said."""
    arguments = ("-incoming", "exec:echo This is no stream.")
    with (
        pytest.raises(QemuExited, match="load of migration failed"),
        Qemu(clockprobe(), features=FEATURES, arguments=arguments) as qemu,
    ):
        peer.wait_until_loaded(qemu)


@pytest.mark.row("E3")
def test_the_kernels_clock_is_not_saved() -> None:
    """By a machine: a StateError that says who could."""
    with pytest.raises(StateError, match="the kernel serves this guest's clock"):
        observe_operation(lambda: MachineGuest("kernel", 1), LOAD)
