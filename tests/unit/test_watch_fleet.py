"""A fleet of VMs that are made by hand: who is let in, who ends and fails beside whom, and what is told of whom."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest

from pvclock.commands import main
from pvclock.commands.screen import Screen
from pvclock.errors import VmEnded
from pvclock.host.this_host import measured_tsc_hz
from pvclock.host.watch import TroubleKind
from pvclock.meter.watch.budgets import Budgets
from pvclock.meter.watch.vm import VmEvent
from qemu_glue import QmpFailed
from qemu_glue.prometheus.exporter import page_maker
from qemu_glue.prometheus.metrics import Metrics, StepCause
from qemu_glue.watch.fleet import Fleet
from qemu_glue.watch.fleet_end import FleetEnd
from qemu_glue.watch.fleet_views import FleetView
from qemu_glue.watch.instants import Instants
from qemu_glue.watch.interrupts import Interrupts
from qemu_glue.watch.names import FileId, VmNames
from qemu_glue.watch.options import WatchOptions
from qemu_glue.watch.poll_share import SharedWait
from qemu_glue.watch.retry import Retry
from qemu_glue.watch.sockets import is_pattern, sockets_now
from tests.unit.test_watch_loop import ARRAY, HandMadeVm, loop_of
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("E10")

STEP_NS = 5_000_000
TURN_S = 0.002
LOOKS = 5


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets are looked for at each turn, what failed is tried again at the next one, and the host is on tsc."""
    monkeypatch.setattr("pvclock.host.linux.host_clocksource", lambda: "tsc")
    for name in ("fleet.LOOK_AGAIN_S", "fleet.IN_PLACE_S", "retry.PAUSE_S"):
        monkeypatch.setattr(f"qemu_glue.watch.{name}", 1e-3)


class HandMadeFleet:
    """VMs by hand behind real sockets, and the fleet that watches them."""

    def __init__(self, place: Path, resources: ExitStack) -> None:
        self.place = place
        self.vms: dict[str, HandMadeVm | Exception] = {}
        self.opened: list[str] = []
        self.looks: Counter[str] = Counter()
        self.end = FleetEnd()
        self.failures: list[OSError] = []
        self.metrics = Metrics()
        self._resources = resources

    @property
    def pattern(self) -> str:
        """What --qmp takes."""
        return f"{self.place}/*.qmp"

    def add(self, name: str, vm: HandMadeVm | Exception | None = None) -> HandMadeVm:
        """One more VM at a socket, or what comes when it is opened."""
        made = vm if isinstance(vm, HandMadeVm) else HandMadeVm()
        if vm is None:
            made.put(ARRAY)
        self.vms[name] = vm or made
        take_events = made.take_events

        def take() -> list[VmEvent]:
            self.looks[name] += 1
            return take_events()

        made.take_events = take  # type: ignore[method-assign]
        listener = self._resources.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(self.place / "new"))
        (self.place / "new").rename(self.place / f"{name}.qmp")  # in the place of one that is there
        return made

    def open_vm(self, qmp: str) -> HandMadeVm:
        """What opens a VM by its socket."""
        name = Path(qmp).stem
        self.opened.append(name)
        vm = self.vms[name]
        if isinstance(vm, Exception):
            raise vm
        return vm

    def end_vm(self, name: str) -> None:
        """A VM ends, and its socket goes with it."""
        (self.place / f"{name}.qmp").unlink()
        vm = self.vms[name]
        assert isinstance(vm, HandMadeVm)
        vm.has_ended, vm.fault = True, VmEnded(1)

    def watch(self, *conditions: Callable[[], object], is_json: bool = False, max_step_ns: int | None = None) -> Fleet:
        """Watch until each condition was true, one after the other."""
        max_step = None if max_step_ns is None else Fraction(max_step_ns)
        screen = Screen(quiet=is_json)
        view = FleetView(screen, Instants(measured_tsc_hz()), self.fail, is_json=is_json)
        fleet = Fleet(
            [self.pattern],
            self.open_vm,
            WatchOptions(budgets=Budgets(max_step), interval_s=0.001),
            view=view,
            end=self.end,
            metrics=self.metrics,
        )
        left = list(conditions)
        deadline = time.monotonic() + HANG_S

        def wait(_seconds: float) -> bool:
            assert time.monotonic() < deadline, left
            time.sleep(TURN_S)
            while left and left[0]():
                left.pop(0)
            return not left

        fleet.run(wait, lambda _fleet: False)
        return fleet

    def fail(self, error: OSError) -> None:
        """Standard output failed."""
        self.failures.append(error)
        self.end.come()

    def looked(self, name: str, looks: int = 2) -> Callable[[], bool]:
        """Was the VM looked at so often, since now?"""
        begin: list[int] = []

        def has_looked() -> bool:
            polls = next((each.polls for each in self.metrics.vms if each.vm == name), 0)
            begin.extend([polls] * (not begin and polls > 0))
            return bool(begin) and polls >= begin[0] + looks

        return has_looked


def doing(act: Callable[[], object]) -> Callable[[], bool]:
    """Do something once the conditions before were true."""

    def condition() -> bool:
        act()
        return True

    return condition


@pytest.fixture
def hand_made(tmp_path: Path) -> Iterator[HandMadeFleet]:
    """A fleet without a VM so far."""
    with ExitStack() as resources:
        yield HandMadeFleet(tmp_path, resources)


def test_findings_have_the_vms_name(hand_made: HandMadeFleet, capsys: pytest.CaptureFixture[str]) -> None:
    """Each VM's lines begin with it; the other VM has none of them."""
    web = hand_made.add("web")
    hand_made.add("db")
    stepped = doing(lambda: web.put(ARRAY, version=4, step_ns=STEP_NS))
    counted = lambda: hand_made.metrics.of("web").vcpus[0].steps[StepCause.OTHER]  # noqa: E731  # one condition
    fleet = hand_made.watch(hand_made.looked("web"), hand_made.looked("db"), stepped, counted)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("web: a VM: watching 1 page at 0x201000")]
    assert [line for line in lines if line.startswith("db: a VM: watching 1 page at 0x201000")]
    (told,) = [line for line in lines if "stepped by" in line]
    assert told.startswith("web: ")
    assert {each.vm: each.cells[2] for each in fleet.watched} == {"web": "1", "db": "0"}
    assert hand_made.metrics.of("db").vcpus[0].steps[StepCause.OTHER] == 0


def test_json_lines_have_vm(hand_made: HandMadeFleet, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line of a VM has its name, and what it is called by its VMM beside it."""
    hand_made.add("web")
    hand_made.add("db", QmpFailed("connect", "busy"))
    hand_made.watch(hand_made.looked("web"), lambda: "db" in hand_made.opened, is_json=True)
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    (found,) = [line for line in lines if line["kind"] == "found"]
    assert (found["vm"], found["description"]) == ("web", "a VM")
    (left,) = [line for line in lines if line["kind"] == "left"]
    assert (left["vm"], left["why"]) == ("db", "QMP connect: busy")
    assert {line["vm"] for line in lines} == {"web", "db"}


def test_one_ends_and_another_comes(hand_made: HandMadeFleet, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are watched on; nothing is left of the one that ended but its row."""
    hand_made.add("web")
    hand_made.add("db")
    gone = lambda: "db" not in {each.vm for each in hand_made.metrics.vms}  # noqa: E731  # one condition
    fleet = hand_made.watch(
        hand_made.looked("web"),
        hand_made.looked("db"),
        doing(lambda: hand_made.end_vm("db")),
        gone,
        doing(lambda: hand_made.add("new")),
        hand_made.looked("new"),
        hand_made.looked("web"),
    )
    assert [each.vm for each in fleet.watched] == ["db", "web", "new"]
    assert [each.ending.result["why_ended"] is not None for each in fleet.watched] == [True, False, False]
    assert fleet.not_watched == {}
    assert "db: " in capsys.readouterr().out
    assert hand_made.opened == ["db", "web", "new"]


def test_a_killed_vm_leaves_its_socket(hand_made: HandMadeFleet) -> None:
    """Its series go; while the socket is there, the VM counts as one that cannot be watched."""
    hand_made.add("web")
    db = hand_made.add("db")

    def kill() -> None:
        hand_made.vms["db"] = QmpFailed("connect", "nobody listens there")
        db.has_ended, db.fault = True, VmEnded(1)

    fleet = hand_made.watch(hand_made.looked("db"), doing(kill), lambda: hand_made.opened.count("db") > 2)
    assert (hand_made.metrics.of("db").vcpus, hand_made.metrics.of("db").is_up) == ((), False)
    assert fleet.not_watched == {"db": "QMP connect: nobody listens there"}


def test_what_cannot_be_watched_is_tried_again(hand_made: HandMadeFleet, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told once, and watched once it can be; the others do not wait for it."""
    hand_made.add("web")
    hand_made.add("db", QmpFailed("connect", "another client has it"))
    fleet = hand_made.watch(
        hand_made.looked("web"),
        lambda: hand_made.opened.count("db") > 2,
        lambda: not hand_made.metrics.of("db").is_up,
        doing(lambda: hand_made.vms.update(db=hand_made.vms["web"])),
        hand_made.looked("db"),
        lambda: hand_made.metrics.of("db").is_up,
    )
    assert capsys.readouterr().out.count(" left: QMP connect: another client has it") == 1
    assert {each.vm for each in fleet.watched} == {"web", "db"}
    assert (fleet.not_watched, fleet.statuses) == ({}, {0})


def test_tries_grow_rarer() -> None:
    """After 4 s, then after 8, and so on, up to a minute; what is told is the last reason."""
    tries = [Retry(None, 4.0, 0.0)]
    for _ in range(5):
        tries.append(tries[-1].next("busy"))
    assert [each.pause_s for each in tries] == [4, 8, 16, 32, 60, 60]
    assert [each.is_due for each in tries[:2]] == [True, False]
    assert (tries[-1].why, Retry.first(None).why) == ("busy", None)


def test_a_mistake_of_ours_beside_one_vm_ends_no_other(hand_made: HandMadeFleet) -> None:
    """Whatever error it is."""
    hand_made.add("web")
    hand_made.add("db", ZeroDivisionError("a mistake"))
    fleet = hand_made.watch(lambda: hand_made.opened.count("db") > 1, hand_made.looked("web"))
    assert fleet.not_watched == {"db": "a mistake"}
    assert fleet.statuses == {0}


def test_an_error_amid_a_watch(hand_made: HandMadeFleet) -> None:
    """What was found until then is kept, and the exit status says that something was wrong."""
    web = hand_made.add("web")
    hand_made.add("db")
    web_fails = doing(lambda: setattr(web, "fault", QmpFailed("query-status", "no answer")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pvclock.meter.watch.loop.END_LIMIT_S", 0.01)
        fleet = hand_made.watch(
            hand_made.looked("web"), web_fails, lambda: hand_made.opened.count("web") > 1, hand_made.looked("db")
        )
    failed = next(each for each in fleet.watched if each.vm == "web")
    assert failed.error == "QMP query-status: no answer"
    assert fleet.statuses == {0, 2}


def test_standard_output_fails(hand_made: HandMadeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """That ends the fleet, in whatever thread it is met, and is no VM's error."""

    def full(_text: str) -> None:
        raise OSError(28, "No space left on device", "standard output")

    monkeypatch.setattr("qemu_glue.watch.json_lines.write", full)
    hand_made.add("web")
    hand_made.watch(lambda: False, is_json=True)
    assert [error.errno for error in hand_made.failures][:1] == [28]


def test_a_vm_that_does_not_answer_at_the_end(hand_made: HandMadeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left, and said to be."""
    monkeypatch.setattr("qemu_glue.watch.fleet.JOIN_S", 0.05)
    web = hand_made.add("web")
    answers, is_asked = FleetEnd(), FleetEnd()

    def hangs() -> tuple[int | None, ...]:
        is_asked.come()
        answers.wait(HANG_S)
        return (None,)

    try:
        hang = doing(lambda: setattr(web, "tsc_offsets", hangs))
        fleet = hand_made.watch(hand_made.looked("web"), hang, lambda: is_asked.came)
    finally:
        answers.come()
        for thread in threading.enumerate():
            if thread.name == "pvclock-watch-web":
                thread.join(HANG_S)
    assert fleet.not_watched == {"web": "it did not answer within 0.05 s, and is left"}


def test_the_hosts_troubles_are_the_hosts(hand_made: HandMadeFleet, capsys: pytest.CaptureFixture[str]) -> None:
    """However many VMs are watched, a trouble is told and counted once, and is no VM's."""
    hand_made.add("web")
    hand_made.add("db")
    with pytest.MonkeyPatch.context() as patch:
        trouble = SimpleNamespace(kind=TroubleKind.CLOCKSOURCE, unstable=True, why="it was tsc and is hpet")
        found: dict[object, list[Any]] = {}

        def check(watch: object) -> list[Any]:  # each VM's watch and the fleet's find it once
            return found.setdefault(watch, [trouble]) and [found[watch].pop()] if found.get(watch, [1]) else []

        patch.setattr("pvclock.host.watch.HostWatch.check", check)
        patch.setattr("pvclock.meter.watch.loop.SAMPLE_S", 0.001)
        fleet = hand_made.watch(
            hand_made.looked("web"), hand_made.looked("db"), lambda: len(found) == 3 and not any(found.values())
        )
    assert len(fleet.troubles) == 1
    assert hand_made.metrics.host.troubles[TroubleKind.CLOCKSOURCE] == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "it was tsc and is hpet" in line]
    assert "web" not in line
    assert "db" not in line


def fleet_command(
    hand_made: HandMadeFleet, monkeypatch: pytest.MonkeyPatch, *words: str, looked: tuple[str, ...] = ()
) -> int:
    """The whole command, over VMs that are made by hand, until these were `looked` at; its exit status."""
    hand_made.looks.clear()

    def wait(_interrupts: Interrupts, _seconds: float) -> bool:
        time.sleep(TURN_S)
        return bool(looked) and all(hand_made.looks[name] > LOOKS for name in looked)

    monkeypatch.setattr(Interrupts, "wait", wait)
    monkeypatch.setattr("qemu_glue.watch.fleet_command.open_vm", hand_made.open_vm)
    return main(["watch", "--qmp", hand_made.pattern, *words])


def steps_as_it_is_found(vm: HandMadeVm, step_ns: int) -> None:
    """Have the VM's clock step at its third look."""
    looks = iter(range(1 << 30))
    take_events = vm.take_events

    def take() -> list[VmEvent]:
        if next(looks) == 2:
            vm.put(ARRAY, version=4, step_ns=step_ns)
        return take_events()

    vm.take_events = take  # type: ignore[method-assign]


def test_the_worst_verdict_is_the_fleets(
    hand_made: HandMadeFleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Budgets hold for each VM: one that is broken is worse than one that is open, and that worse than those kept."""
    budget = ("--max-step", "1ms", "--tsc-unchanged")
    hand_made.add("good")
    assert fleet_command(hand_made, monkeypatch, *budget, looked=("good",)) == 0
    hand_made.add("busy", QmpFailed("connect", "busy"))
    assert fleet_command(hand_made, monkeypatch, *budget, looked=("good",)) == 2
    assert "busy: not watched at the end: QMP connect: busy" in capsys.readouterr().out
    steps_as_it_is_found(hand_made.add("bad"), STEP_NS)
    assert fleet_command(hand_made, monkeypatch, *budget, "--json", looked=("good", "bad")) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    verdicts = {each["vm"]: each["budgets"]["verdict"] for each in report["result"]["vms"]}
    assert verdicts == {"good": "passed", "bad": "broken"}
    assert report["result"]["not_watched"] == [{"vm": "busy", "why": "QMP connect: busy"}]
    assert report["ok"] is False


def test_a_fleet_ends_with_its_last_vm(
    hand_made: HandMadeFleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a limit and without metrics nobody waits for another."""
    web = hand_made.add("web")
    begun = hand_made.open_vm

    def ending(qmp: str) -> HandMadeVm:
        web.ram.read_many = ends(web.ram.read_many, hand_made)  # type: ignore[method-assign]
        return begun(qmp)

    monkeypatch.setattr(hand_made, "open_vm", ending)
    assert fleet_command(hand_made, monkeypatch) == 0
    assert "the VM has ended" in capsys.readouterr().out


def ends(read_many: Callable[..., list[bytes]], hand_made: HandMadeFleet) -> Callable[..., list[bytes]]:
    """Read as before, and have the VM end after some looks."""
    reads = 0

    def read(*arguments: Any) -> list[bytes]:  # noqa: ANN401  # as it was
        nonlocal reads
        reads += 1
        if reads == 30:
            hand_made.end_vm("web")
        return read_many(*arguments)

    return read


def test_no_vm_is_an_error_unless_somebody_waits(
    hand_made: HandMadeFleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --wait for a while, with --prometheus for ever; it says so."""
    assert fleet_command(hand_made, monkeypatch) == 2
    assert "no QMP socket at" in capsys.readouterr().err
    assert fleet_command(hand_made, monkeypatch, "--wait", "0.01") == 0
    assert "no VM yet: waiting for one" in capsys.readouterr().out
    assert fleet_command(hand_made, monkeypatch, "--prometheus", "0", "--seconds", "0.01") == 0
    assert "metrics at http://127.0.0.1:" in capsys.readouterr().out


def test_a_socket_that_was_named_and_never_came(
    hand_made: HandMadeFleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is waited for, and no success without it; one that matches no pattern is nobody's."""
    hand_made.add("web")
    absent = f"{hand_made.place}/absent.qmp"
    assert fleet_command(hand_made, monkeypatch, "--qmp", absent, looked=("web",)) == 2
    assert f"{absent}: not watched at the end: there was no such socket all the while" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--qmp", "a", "--qmp", "b", "--page", "0x1000"], "--page is of one VM; a fleet's pages are searched"),
        (["--pid", "1", "--pid", "2"], "--pid is for one VM; several are watched by their sockets: --qmp 'PATTERN'"),
        (["--libvirt", "a", "--libvirt", "b"], "--libvirt is for one VM; several are watched by their sockets"),
    ],
)
def test_what_is_of_one_vm_only(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, in a sentence."""
    assert main(["watch", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("vms", [1, 10])
def test_looks_of_all_vms_take_a_twentieth_of_a_cpu(vms: int) -> None:
    """A VM's interval is 20 times what its look costs, times how many VMs are watched."""
    cpu_s = 0.0
    loop, _ = loop_of(vm_with_a_page())
    least_s = loop.interval_s
    wait = SharedWait(lambda _seconds: False, lambda: vms, cpu_s=lambda: cpu_s)
    wait.take_charge(loop)
    for _ in range(3):
        wait(0)
        cpu_s += 0.001  # a look
    assert loop.interval_s == pytest.approx(max(0.02 * vms, least_s))


def test_a_search_makes_no_look_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a look searches of the memory beside is no part of a look's cost."""
    monkeypatch.setattr("pvclock.meter.watch.paced_search.PAUSE_S", 0)
    vm, cpu_s = vm_with_a_page(), 0.0
    loop, looks = loop_of(vm)
    wait = SharedWait(lambda _seconds: False, lambda: 20, cpu_s=lambda: cpu_s)
    wait.take_charge(loop)
    vm.wipe(ARRAY)
    cost_s, before = 0.0003, 0
    while loop.finder.searched_pieces < LOOKS:
        wait(0)
        next(looks)
        cpu_s += cost_s + 0.03 * (loop.finder.searched_pieces > before)
        before = loop.finder.searched_pieces
    wait(0)
    assert loop.interval_s == pytest.approx(20 * 20 * cost_s)


def vm_with_a_page() -> HandMadeVm:
    """A VM whose page is found."""
    vm = HandMadeVm()
    vm.put(ARRAY)
    return vm


def test_rare_looks_of_a_fleet_are_no_stalls() -> None:
    """A gap is held against the interval that was wanted when it began."""
    loop, _ = loop_of(vm_with_a_page())
    wait = SharedWait(lambda _seconds: False, lambda: 1000, cpu_s=iter([n / 1000 for n in range(100)]).__next__)
    wait.take_charge(loop)
    for _ in range(4):
        wanted_s = loop.interval_s  # as the sleep that begins now
        wait(0)
        assert loop.watcher.interval_ns == int(wanted_s * 10**9)
    assert loop.interval_s > 1


def test_an_interval_that_the_user_chose_stays() -> None:
    """However many VMs there are."""
    loop, _ = loop_of(vm_with_a_page())
    before_s = loop.interval_s
    wait = SharedWait(lambda _seconds: False, lambda: 1000, is_fixed=True, cpu_s=iter(range(100)).__next__)
    wait.take_charge(loop)
    for _ in range(3):
        wait(0)
    assert loop.interval_s == before_s


def test_names_of_vms() -> None:
    """The socket's file name; the path for those of one name, and for one that comes later; free again once gone."""
    names = VmNames()
    files = [FileId(1, number) for number in range(9)]
    names.name(dict(zip(files, ["/run/a/vm.qmp", "/run/b/vm.sock", "/run/web.qmp.sock", "/run/.qmp"], strict=False)))
    assert list(map(names.of, files[:4])) == ["/run/a/vm.qmp", "/run/b/vm.sock", "web.qmp", ".qmp"]
    names.name({files[4]: "/run/c/web.qmp.sock", files[2]: "/run/link"})
    assert list(map(names.of, files[2:5])) == ["web.qmp", ".qmp", "/run/c/web.qmp.sock"]
    names.name({files[5]: "/run/c/web.qmp.sock"})
    assert names.of(files[5]) == "/run/c/web.qmp.sock (2)"
    names.forget(files[2])
    names.name({files[6]: "/run/d/web.qmp.sock"})
    assert names.of(files[6]) == "web.qmp"


def test_a_name_that_is_no_text(hand_made: HandMadeFleet, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever makes a socket chooses its name: it forges no line, sends a terminal nothing, and is scraped."""
    odd = os.fsdecode(b"x\xff\n\x1b[31mweb")
    hand_made.add(odd)
    hand_made.add(f"{odd}2", QmpFailed("connect", f"{odd}2: busy"))
    named = r"x\xff\n\x1b[31mweb"
    page = page_maker(hand_made.metrics)
    fleet = hand_made.watch(
        lambda: hand_made.looks[odd] > LOOKS, lambda: len(hand_made.opened) > 2, lambda: page("").content
    )
    assert fleet.not_watched.keys() == {f"{named}2"}
    (watched,) = fleet.watched
    assert watched.vm == named
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(named) for line in lines)
    assert any(line.endswith(r" left: QMP connect: x\udcff\n\x1b[31mweb2: busy") for line in lines)


def test_a_link_to_a_vm_that_is_watched(hand_made: HandMadeFleet) -> None:
    """It is that VM, although the link's name comes first."""
    hand_made.add("web")
    link = doing(lambda: (hand_made.place / "a.qmp").symlink_to(hand_made.place / "web.qmp"))
    fleet = hand_made.watch(hand_made.looked("web"), link, hand_made.looked("web", 50))
    assert (hand_made.opened, fleet.not_watched) == (["web"], {})


def test_another_vm_takes_a_sockets_place(hand_made: HandMadeFleet) -> None:
    """While the VM that had it is watched on, it is watched, too; by another name."""
    hand_made.add("web")
    whole = f"{hand_made.place}/web.qmp"
    fleet = hand_made.watch(
        hand_made.looked("web"),
        doing(lambda: hand_made.add("web")),
        hand_made.looked("web", 100),
        lambda: len(hand_made.opened) == 1 or hand_made.metrics.of(whole).is_up,
    )
    assert sorted(each.vm for each in fleet.watched) == [whole, "web"]


def test_a_vm_that_is_started_anew(hand_made: HandMadeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its name again, although its socket is there before the end of the one before is seen."""
    monkeypatch.setattr("qemu_glue.watch.fleet.IN_PLACE_S", HANG_S)
    web = hand_made.add("web")

    def end() -> None:
        web.has_ended, web.fault = True, VmEnded(1)

    fleet = hand_made.watch(
        hand_made.looked("web"),
        doing(lambda: hand_made.add("web")),
        hand_made.looked("web", LOOKS),
        doing(end),
        lambda: len(hand_made.opened) > 1,
        doing(hand_made.looks.clear),
        lambda: hand_made.looks["web"] > LOOKS,
    )
    assert [each.vm for each in fleet.watched] == ["web", "web"]


def test_sockets_of_a_pattern(hand_made: HandMadeFleet) -> None:
    """Sockets alone, each once, by whatever links and patterns; a file whose name looks like a pattern is itself."""
    hand_made.add("web")
    hand_made.add("a[1]")
    (hand_made.place / "log.qmp").touch()
    (hand_made.place / "link.qmp").symlink_to(hand_made.place / "web.qmp")
    odd = str(hand_made.place / "a[1].qmp")
    assert not is_pattern(odd)
    found = sockets_now([odd, hand_made.pattern, hand_made.pattern, str(hand_made.place / "nobody.qmp")])
    assert sorted(map(os.path.basename, found.values())) == ["a[1].qmp", "link.qmp"]


def test_a_budget_of_a_fleet_is_a_number(hand_made: HandMadeFleet) -> None:
    """Fleet and VM go by the same arguments."""
    hand_made.add("web")
    fleet = hand_made.watch(hand_made.looked("web"), max_step_ns=10**9)
    (watched,) = fleet.watched
    assert watched.cells[-1] == "passed"


def test_one_vm_is_served_too(
    hand_made: HandMadeFleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The watch of one VM shows what it always does, and serves its metrics meanwhile, under its socket's name."""
    hand_made.add("web")
    monkeypatch.setattr("qemu_glue.watch.beginning.open_vm", lambda qmp, **_others: hand_made.open_vm(qmp))
    served: list[str] = []

    def wait(_interrupts: Interrupts, _seconds: float) -> bool:
        url = capsys.readouterr().out.partition("metrics at ")[2].partition("\n")[0]
        if not served:
            with urlopen(url, timeout=HANG_S) as page:  # noqa: S310  # our own
                served.append(page.read().decode())
        return hand_made.looks["web"] > LOOKS

    monkeypatch.setattr(Interrupts, "wait", wait)
    assert main(["watch", "--qmp", f"{hand_made.place}/web.qmp", "--prometheus", "0"]) == 0
    assert 'pvclock_watch_up{vm="web"} 1.0' in served[0]
    assert "none: no step" in capsys.readouterr().out
