"""`pvclock watch` beside a real QEMU of which it knows nothing: what it finds, tells, and ends with."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from pvclock import Reference, read_tsc
from pvclock.commands import main
from pvclock.commands.screen import write
from pvclock.host.vmm_process import running_vms
from pvclock.meter.findings import await_reading, shown_by, vcpu0_reading
from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.changes import Step
from pvclock.meter.watch.loop import Finding, VmEnded, WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.vm import VmEvent
from pvclock.payloads import clockprobe, probe
from pvclock.testing.clock_budget import ClockBudget
from qemu_glue import QmpFailed
from qemu_glue.peer.launch import Qemu
from qemu_glue.watch.interrupts import Interrupts
from qemu_glue.watch.target import QemuVm, open_vm
from tests.command_line import ROOT, in_terminal
from tests.qemu.running_qemu import FEATURES, RunningQemu, running_qemu
from tests.qemu.watch_process import watching
from tests.waiting import HANG_S, alarm_after
from tests.watch_document import documented_keys, keys_of

pytestmark = [pytest.mark.row("E3"), pytest.mark.kvm, pytest.mark.qemu]

TRIES = 10
"""KVM brings pages up to date some time after a vCPU has entered, too: that may be between the same two looks, or in
one, which leaves the step open."""

REBOOTS = ("-action", "reboot=reset")
"""Else our QEMU ends when it is reset."""
PAGES = [probe.time_page_address(vcpu) for vcpu in range(2)]
COUNT_GPA = 0x200000
SHOW_CURSOR = "\x1b[?25h"
STEP_FLOORS_NS = 4
"""clockprobe's two readings, the older line's and the newer one's are each floored."""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunningQemu]:
    """A QEMU whose two vCPUs read their clock."""
    with running_qemu(tmp_path, arguments=REBOOTS) as made:
        yield made


def no_wait(_seconds: float) -> bool:
    """Look again at once, for ever."""
    return False


def at_its_pace(seconds: float) -> bool:
    """Look as often as a watch does, for ever: events may be told some looks late, and not any number of looks."""
    time.sleep(max(seconds, 0))
    return False


def first(findings: Iterator[Finding], wanted: Callable[[Finding], bool]) -> Finding:
    """Wait for a finding."""
    return next(finding for finding in findings if wanted(finding))


def findings_of(loop: WatchLoop) -> Iterator[Finding]:
    """Give all findings, as they are made; the first look is made now, and each other when it is asked for."""
    looks = loop.looks()
    return (finding for look in chain([next(looks)], looks) for finding in look.findings)


def test_the_step_at_a_pause_is_what_the_guest_saw(running: RunningQemu) -> None:
    """Both pages are found; at stop and cont the step against the TSC is the guest's own, and the other what is left.

    clockprobe's readings of its TSC and clock, before and after, give the step to some ns.  What the guest saw of it
    lies between the pauses that the host's TSC allows.
    """
    with open_vm(qmp=str(running.qmp)) as vm:
        loop = WatchLoop(vm, Reference.RAW, wait=at_its_pace)
        assert loop.begin().pages == tuple(PAGES)
        looks = loop.looks()
        next(looks)
        findings = (finding for look in looks for finding in look.findings)
        memory = running.qemu.memory
        page = running.pages()[0]
        tsc, ns = vcpu0_reading(memory, nullcontext)
        stopping = read_tsc()
        running.qemu.pause()
        stopped = read_tsc()
        first(findings, lambda it: isinstance(it, VmEvent))
        continuing = read_tsc()
        running.qemu.resume()
        continued = read_tsc()
        step = first(findings, lambda it: isinstance(it, Step) and it.vcpu == 0)
        tsc_after, ns_after = vcpu0_reading(memory, nullcontext)
    assert shown_by(page, tsc) == ns
    assert isinstance(step, Step)
    assert step.step_ns is not None
    assert step.seen_ns is not None
    assert step.seen_bound_ns is not None
    assert abs(step.step_ns - (ns_after - shown_by(page, tsc_after))) <= STEP_FLOORS_NS
    paused_ns = step.seen_ns - step.step_ns
    assert (continuing - stopped) * 10**9 <= (paused_ns + step.seen_bound_ns) * loop.host_tsc_hz
    assert (continued - stopping) * 10**9 >= (paused_ns - step.seen_bound_ns) * loop.host_tsc_hz
    assert [event.kind for event in step.events] == ["stop", "resume"]


def test_a_budget_of_a_test_for_a_qemu(running: RunningQemu) -> None:
    """Left alone it is kept; a pause is a step against the TSC, and what KVM does at `cont` is known before the end."""
    with open_vm(qmp=str(running.qmp)) as vm:
        with ClockBudget(vm, step="1ms", tsc_unchanged=True) as kept:
            pass
        broken = ClockBudget(vm, step="1ms", tsc_unchanged=True)
        with pytest.raises(AssertionError, match=r"clock stepped by -.*, at stop and resume"), broken:
            stop_and_continue(running)
    assert kept.verdict is not None
    assert kept.verdict.status is VerdictStatus.PASSED


def stop_and_continue(running: RunningQemu) -> None:
    """A pause that is longer than any step that is allowed; ends once KVM has written the page."""
    before = running.pages()[0]
    running.qemu.pause()
    time.sleep(0.02)
    running.qemu.resume()
    with alarm_after(HANG_S):
        while running.pages()[0] == before:
            time.sleep(0.001)


def test_the_pages_are_found_again_after_a_reset(running: RunningQemu) -> None:
    """What lies there from before does not count: the pages that are found have begun anew."""
    for _ in range(2):
        running.qemu.pause()
        running.qemu.resume()
    with open_vm(qmp=str(running.qmp)) as vm:
        loop = WatchLoop(vm, Reference.RAW, wait=no_wait)
        loop.begin()
        findings = findings_of(loop)
        before = running.pages()
        running.qemu.pause()  # else it may have booted by the look that is told of its reset
        running.qemu.execute("system_reset")
        first(findings, lambda it: isinstance(it, VmEvent) and it.kind == "reset")
        assert loop.finder.is_searching
        running.qemu.resume()
        found = first(findings, lambda it: isinstance(it, PagesFound))
        assert isinstance(found, PagesFound)
        assert set(found.pages) <= set(PAGES)
        assert loop.infos[0].version < before[0].version
        assert not loop.finder.is_searching


def test_the_vm_ends(running: RunningQemu) -> None:
    """That ends the watch, and is said; what was found so far is told."""
    with open_vm(qmp=str(running.qmp)) as vm:
        loop = WatchLoop(vm, Reference.RAW, wait=no_wait)
        loop.begin()
        findings = findings_of(loop)
        running.qemu.pause()
        first(findings, lambda it: isinstance(it, VmEvent))
        running.qemu.close()
        *_, last = findings
    assert isinstance(last, VmEnded)
    assert loop.watcher.summary.polls > 0


def test_lines_of_json(running: RunningQemu) -> None:
    """As a user has it: what is found, each event and step as it happens, and after Ctrl-C the report, status 0."""
    with watching("--qmp", str(running.qmp)) as watch:
        assert watch.found["kind"] == "found"
        assert watch.found["pages"] == PAGES
        assert watch.found["vcpus"] == 2
        running.qemu.pause()
        running.qemu.resume()
        lines = watch.lines_until("step", 2)
        watch.interrupt()
        more, result, status = watch.end()
    steps = [line for line in lines if line["kind"] == "step"]
    assert sorted(step["vcpu"] for step in steps) == [0, 1]
    assert [line["what"] for line in lines if line["kind"] == "event"] == ["stop", "resume"]
    for line in (watch.found, *lines, *more):
        assert set(keys_of(line)) <= documented_keys()[line["kind"]] | {"schema", "kind", "at_s", "utc"}
    assert {line["schema"] for line in (watch.found, *lines, *more)} == {"pvclock.watch/1"}
    assert status == 0
    assert result["summary"]["steps"] >= 2
    assert result["summary"]["backward"]["step_ns"] == min(step["step_ns"] for step in steps)
    assert result["budgets"]["verdict"] is None


def script(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]) -> None:
    """Have the watch do these in its waits between two looks, and end after them."""
    left: list[Callable[[], object]] = [*actions, bool]

    def wait(_interrupts: Interrupts, _seconds: float) -> bool:
        left.pop(0)()
        return not left

    monkeypatch.setattr(Interrupts, "wait", wait)


@pytest.mark.parametrize(
    ("budget", "status", "said"),
    [
        ("1ns", 2, "a budget of 1 ns is below what can be measured, 2 ns"),
        ("1us", 1, "'s clock stepped by -"),
        ("100s", 0, "Within its budgets."),
    ],
)
def test_a_budget_for_steps(
    running: RunningQemu,
    budget: str,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A pause is a step: too long for one budget, and not for another; what is below the arithmetic's floor is open."""
    watch = ["watch", "--qmp", str(running.qmp), "--tsc-unchanged", "--max-step", budget]
    for _ in range(TRIES):
        script(monkeypatch, *([] if status == 2 else [lambda: pause_between_looks(running)]))
        found = main([*watch, *(text for gpa in PAGES for text in ("--page", hex(gpa)))])
        told = capsys.readouterr().out
        if found != 2 or status == 2:
            break
    assert found == status, told
    assert said in told
    every_ms = re.search(r"watching 2 pages at 0x201000, 0x201040, every (\d+) ms", told)
    assert every_ms is not None, told
    assert int(every_ms[1]) >= 10  # more where a look takes long


def pause_between_looks(running: RunningQemu) -> None:
    """Let all vCPUs enter again before the next look: KVM chooses which is first, and a look may come between."""
    versions = [page.version for page in running.pages()]
    running.qemu.pause()
    running.qemu.resume()
    await_later(running, versions)


def await_later(running: RunningQemu, versions: list[int]) -> None:
    """Wait until each vCPU's page has a later version than it had."""
    while any(page.version <= version for page, version in zip(running.pages(), versions, strict=True)):
        running.qemu.check_running()


def test_a_budget_for_the_drift(running: RunningQemu, capsys: pytest.CaptureFixture[str]) -> None:
    """What a short watch cannot know is undecided, and what it does is within."""
    watch = ["watch", "--qmp", str(running.qmp), "--seconds", "0.2", "--max-drift"]
    status = main([*watch, "0.001ppb", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["result"]
    verdict, (reason, *_) = result["budgets"]["verdict"], result["budgets"]["reasons"]
    if all(abs(rate["rate_ppb"]) <= rate["bound_ppb"] for rate in result["rates"]):
        assert (status, verdict) == (2, "undecided")
        assert "a longer watch knows it better" in reason
    else:  # a busy host made it a long watch, in which KVM's clock drifts by some ten ppb
        assert (status, verdict) == (1, "broken")
        assert "more than 0.001 ppb" in reason
    assert main([*watch, "300ppm"]) == 0
    assert "Within its budgets." in capsys.readouterr().out


def test_a_guest_without_a_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A guest that has registered no page, for it has not begun: one line says what was looked for, and why not."""
    qmp = tmp_path / "qmp"
    arguments = ("-qmp", f"unix:{qmp},server=on,wait=off", "-S")
    with Qemu(clockprobe(), features=FEATURES, arguments=arguments):
        assert main(["watch", "--qmp", str(qmp)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pvclock watch: no pvclock page in ")
    assert line.endswith("the guest was stopped when the watch began; if it has not booted so far, have it go on")


def test_a_guest_that_is_stopped(running: RunningQemu, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said, and no budget is kept by it."""
    running.qemu.pause()
    watch = ["watch", "--qmp", str(running.qmp), "--seconds", "0.05", "--max-step", "1s"]
    assert main(watch) == 2
    output = capsys.readouterr().out
    assert "The guest is stopped." in output
    assert "  the guest was stopped all the while" in output
    assert main([*watch, "--json"]) == 2
    found, *_, report = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["is_paused"] is report["result"]["is_paused"] is True


def test_what_follows_the_first_line_is_seen(
    running: RunningQemu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line that tells of the pages comes after the first look at them: a step at that moment is one."""
    versions = [page.version for page in running.pages()]
    script(monkeypatch, lambda: await_later(running, versions))

    def pausing(text: str) -> None:
        write(text)
        if '"kind": "found"' in text:
            running.qemu.pause()
            running.qemu.resume()

    monkeypatch.setattr("qemu_glue.watch.json_lines.write", pausing)
    assert main(["watch", "--qmp", str(running.qmp), "--json"]) == 0
    *_, report = map(json.loads, capsys.readouterr().out.splitlines())
    assert report["result"]["summary"]["backward"]["step_ns"] < 0


def test_an_error_amid_a_watch(
    running: RunningQemu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was found so far is told before it, in JSON, too; exit status 2."""
    monkeypatch.setattr("pvclock.meter.watch.loop.END_LIMIT_S", 0.05)

    def fail(_vm: object) -> None:
        raise QmpFailed("query-status", "no answer within 10 s")

    for as_json in ([], ["--json"]):
        with monkeypatch.context() as patch:
            script(patch, partial(patch.setattr, QemuVm, "take_events", fail))
            assert main(["watch", "--qmp", str(running.qmp), *as_json]) == 2
        told = capsys.readouterr()
        if as_json:
            *_, summary, report = map(json.loads, told.out.splitlines())
            assert summary.keys() - {"schema", "kind", "at_s", "utc"} == documented_keys()["summary"]
            assert summary["polls"] == 1
            assert report["error"]["message"] == "QMP query-status: no answer within 10 s"
        else:
            assert "1 look\n" in told.out
            assert told.err == "pvclock watch: QMP query-status: no answer within 10 s\n"


def test_a_watch_may_be_there_first(tmp_path: Path) -> None:
    """With --wait it waits for the socket and for the guest's pages."""
    with ExitStack() as resources, ThreadPoolExecutor(1) as beside:
        begun = beside.submit(lambda: resources.enter_context(running_qemu(tmp_path)))
        assert main(["watch", "--qmp", str(tmp_path / "qmp"), "--wait", f"{HANG_S:g}", "--seconds", "0.05"]) == 0
        begun.result()


def test_ctrl_c_before_the_pages_are_found(
    running: RunningQemu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search ends then, in one sentence."""

    def interrupted(**names: Any) -> QemuVm:  # noqa: ANN401  # as open_vm() has them
        os.kill(os.getpid(), signal.SIGTERM)
        return open_vm(**names)

    monkeypatch.setattr("qemu_glue.watch.beginning.open_vm", interrupted)
    assert main(["watch", "--qmp", str(running.qmp)]) == 130
    assert capsys.readouterr().err == "pvclock watch: interrupted before the guest's pages were found\n"


def test_which_process(
    running: RunningQemu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong one brings the list of those that there are; of only one, no number is needed."""
    ours = f"{running.qemu.pid} (qemu-system-x86, 2 vCPUs)"
    with subprocess.Popen("cat", stdin=subprocess.PIPE) as no_vmm:  # this process may have a guest of another test's
        assert main(["watch", "--pid", str(no_vmm.pid)]) == 2
    assert ours in capsys.readouterr().err
    (vm,) = (vm for vm in running_vms() if vm.pid == running.qemu.pid)
    for vms, status, said in (([vm], 0, "watching 2 pages"), ([vm, vm], 2, f"{ours}, {ours}"), ([], 2, "no process")):
        monkeypatch.setattr("qemu_glue.watch.beginning.running_vms", lambda vms=vms: vms)
        assert main(["watch", "--seconds", "0.05", "--pid"]) == status
        assert said in "".join(capsys.readouterr())


def spinning_image() -> bytes:
    """A multiboot guest that counts in memory at COUNT_GPA, and uses no clock."""
    code = b"\xff\x05" + struct.pack("<I", COUNT_GPA) + b"\xeb\xf8"  # 1: incl COUNT_GPA; jmp 1b
    magic, has_addresses, at, header_bytes = 0x1BADB002, 1 << 16, 0x100000, 32
    end = at + header_bytes + len(code)
    checksum = -(magic + has_addresses) % (1 << 32)
    return struct.pack("<8I", magic, has_addresses, checksum, at, at, end, end, at + header_bytes) + code


def test_a_running_guest_that_has_no_kvmclock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is offered none (-cpu ...,-kvmclock) and runs, also by its process alone: the same line, and at once."""
    qmp = tmp_path / "qmp"
    with Qemu(spinning_image(), features=0, vcpus=2, arguments=("-qmp", f"unix:{qmp},server=on,wait=off")) as qemu:
        assert "-kvmclock" in " ".join(qemu.command)
        deadline = time.monotonic() + HANG_S
        while not any(qemu.memory.read(COUNT_GPA, 4)):
            assert time.monotonic() < deadline
        for way in (["--qmp", str(qmp)], ["--pid", str(qemu.pid)]):
            assert main(["watch", *way]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("pvclock watch: no pvclock page in ")
            assert "the guest has no kvmclock" in line
        qemu.check_running()


def test_what_is_no_page(running: RunningQemu, capsys: pytest.CaptureFixture[str]) -> None:
    """An address at which there is none is refused, as are more pages than vCPUs, and fewer."""
    watch = ["watch", "--qmp", str(running.qmp), "--page"]
    assert main([*watch, "0x200000", "--page", "0x200040"]) == 2
    assert (
        "there is no pvclock page at 0x200000; without --page the guest's memory is searched" in capsys.readouterr().err
    )
    assert main([*watch, "0", "--page", "0", "--page", "0"]) == 2
    assert "3 pages of 2 vCPUs" in capsys.readouterr().err
    assert main([*watch, hex(PAGES[0])]) == 2
    assert "1 page of 2 vCPUs; give each vCPU's, or none" in capsys.readouterr().err


def test_a_page_above_2_gib_by_the_process_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """A guest with more RAM is watched by its process; an address above is refused, with who knows where that is."""
    with Qemu(clockprobe(), features=FEATURES, vcpus=2, cmdline="cpus=2", memory_bytes=3 << 30) as qemu:
        await_reading(qemu.memory, 2, lambda: False, lambda: qemu.console)
        watch = ["watch", "--pid", str(qemu.pid)]
        assert main([*watch, "--page", "0x100000000", "--page", "0x100000040"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("where a process alone does not tell what lies; name its VM by QMP or libvirt")
        assert main([*watch, "--seconds", "0.1"]) == 0
        assert f"watching 2 pages at {PAGES[0]:#x}" in capsys.readouterr().out


OUR_MACHINE = """
import os, sys
from pvclock.meter.machine_guest import MachineGuest
with MachineGuest("engine", 2) as guest:
    guest.start()
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_a_machine_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a VM without a monitor: its process is enough; steps of the engine's clock are 0 or +1 ns."""
    command = [sys.executable, "-c", OUR_MACHINE]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = process.stdout.readline().strip()
        assert main(["watch", "--pid", pid, "--seconds", "0.5", "--json"]) == 0
        process.communicate()
    found, *_, report = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["pages"] == PAGES
    assert found["why_no_events"]
    assert report["result"]["summary"]["polls"] > 1
    assert report["result"]["summary"]["backward"] is None


def test_in_a_terminal(tmp_path: Path) -> None:
    """A table that is redrawn, and the summary in its place; within the terminal's width, and no word cut.

    A terminal that cannot redraw gets lines, as a pipe does.
    """
    with running_qemu(tmp_path, vcpus=1) as running:
        shown = in_terminal("watch", "--qmp", str(running.qmp), "--seconds", "0.6", columns=80, TERM="xterm")
        lines_only = in_terminal("watch", "--qmp", str(running.qmp), "--seconds", "0.1")
    assert "\x1b" not in lines_only
    assert "none: no step" in lines_only
    shown = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    drawn, _, summary = shown.rpartition(SHOW_CURSOR)
    assert "Ctrl-C ends" in drawn
    assert "none: no step" in summary
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", shown).splitlines()
    assert max(map(len, lines)) <= 80
    for word in ("vCPU", "version", "reading", "0x201000", "stable"):
        assert re.search(rf"[│┃] *{word} *[│┃]", drawn)
