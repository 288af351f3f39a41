"""A process that runs pvclock's Machine with clockprobe in it, for tests that look at it from outside.

`python -m tests.kvm.watched_machine engine 2` is that process: each line that it reads is answered by one of JSON.  A
path behind that is where it serves QMP.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from pvclock.meter.machine_guest import MachineGuest
from pvclock.payloads import probe
from qemu_glue.face.served import serve

__all__ = ["WatchedMachine", "watched_machine"]

ROOT = Path(__file__).parents[2]
PAGE_BYTES = 32
SKIP_NS = 5_000_000


class WatchedMachine:
    """That process, whose guest runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def ask(self, what: str) -> Any:  # noqa: ANN401  # JSON
        """Return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@contextmanager
def watched_machine(
    clock: Literal["engine", "kernel"] = "engine", vcpus: int = 2, qmp: Path | None = None
) -> Iterator[WatchedMachine]:
    """Have one, whose guest reads its clock; it is killed at the end.  qmp: where it serves QMP."""
    command = [sys.executable, "-m", "tests.kvm.watched_machine", clock, str(vcpus), *[str(qmp)] * (qmp is not None)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a VMM has: Linux's scheduler may have one share of a CPU for all of a session
    ) as process:
        try:
            watched = WatchedMachine(process)
            assert watched.ask("started") is True
            yield watched
        finally:
            process.kill()


def answer(guest: MachineGuest, question: str) -> object:
    """Return what this process knows of its guest."""
    match question:
        case "started":
            return True
        case "pages":
            memory = guest.machine.memory
            return [memory.read(probe.time_page_address(vcpu), PAGE_BYTES).hex() for vcpu in range(guest.vcpus)]
        case "pause" | "resume":
            {"pause": guest.pause, "resume": guest.resume}[question]()
            return True
        case "offsets":
            with guest.machine.runner.quiesce(None):
                return [vcpu.get_tsc_offset() for vcpu in guest.machine.vcpus]
        case "skip":
            assert guest.machine.clock is not None
            guest.machine.clock.skip(SKIP_NS)
            return SKIP_NS
        case "reads":
            return [record.reads for record in guest.records()]
    raise AssertionError(question)


def main() -> None:
    """Run a guest, and answer until there are no more questions."""
    clock, vcpus, *qmp = sys.argv[1:]
    with MachineGuest(cast("Literal['engine', 'kernel']", clock), int(vcpus)) as guest, ExitStack() as services:
        for path in qmp:
            services.enter_context(serve(guest.machine, path, list))
        guest.start()
        for line in sys.stdin:
            print(json.dumps(answer(guest, line.strip())), flush=True)  # noqa: T201  # to the one that asks


if __name__ == "__main__":
    main()
