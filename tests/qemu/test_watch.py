"""`pvclock watch` beside a real QEMU of which it knows nothing: what it finds, tells, and ends with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from pvclock import HostTsc, Reference, read_tsc
from pvclock.commands import main
from pvclock.errors import PagesNotFound
from pvclock.meter.findings import shown_by, vcpu0_reading
from pvclock.meter.watch.changes import Step
from pvclock.meter.watch.loop import Finding, VmEnded, WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.vm import VmEvent
from pvclock.payloads import probe
from qemu_glue.watch.target import open_vm
from tests.command_line import in_terminal
from tests.qemu.running_qemu import RunningQemu, running_qemu
from tests.qemu.watch_process import watching

pytestmark = [pytest.mark.row("E3"), pytest.mark.kvm, pytest.mark.qemu]

REBOOTS = ("-action", "reboot=reset")
"""Else our QEMU ends when it is reset."""
PAGES = [probe.time_page_address(vcpu) for vcpu in range(2)]
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


def first(findings: Iterator[Finding], wanted: Callable[[Finding], bool]) -> Finding:
    """Wait for a finding."""
    return next(finding for finding in findings if wanted(finding))


def findings_of(loop: WatchLoop) -> Iterator[Finding]:
    """Give all findings, as they are made; each look is made when it is asked for."""
    return (finding for look in loop.looks() for finding in look.findings)


def test_the_step_at_a_pause_is_what_the_guest_saw(running: RunningQemu) -> None:
    """Both pages are found; at stop and cont the step against the TSC is the guest's own, and the other what is left.

    clockprobe's readings of its TSC and clock, before and after, give the step to some ns.  What the guest saw of it lies
    between the pauses that the host's TSC allows.
    """
    with open_vm(qmp=str(running.qmp)) as vm:
        loop = WatchLoop(vm, Reference.RAW, wait=no_wait)
        assert loop.begin().pages == tuple(PAGES)
        findings = findings_of(loop)
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
        steps = [first(findings, lambda it: isinstance(it, Step)) for _ in range(2)]
        tsc_after, ns_after = vcpu0_reading(memory, nullcontext)
    assert [step.vcpu for step in steps] == [0, 1]
    assert shown_by(page, tsc) == ns
    step = steps[0]
    assert abs(step.step_ns - (ns_after - shown_by(page, tsc_after))) <= STEP_FLOORS_NS
    least_ns, most_ns = ((end - begin) * 10**9 // loop.host_tsc_hz for begin, end in ((stopped, continuing), (stopping, continued)))
    assert least_ns <= step.seen_ns - step.step_ns + step.seen_bound_ns
    assert most_ns >= step.seen_ns - step.step_ns - step.seen_bound_ns
    assert [event.kind for event in step.events] == ["stop", "resume"]
