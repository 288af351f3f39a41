"""`pvclock watch --json` in a process of its own, as a user runs it beside a VM."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.command_line import ROOT
from tests.waiting import HANG_S, alarm_after

__all__ = ["WatchProcess", "watching"]


class WatchProcess:
    """A watch that has found its pages; `found`: that line.  limit_s: how long what is waited for may take."""

    def __init__(self, process: subprocess.Popen[str], limit_s: int = HANG_S) -> None:
        self._process, self._limit_s = process, limit_s
        self.found = self.line()

    def line(self) -> Any:  # noqa: ANN401  # JSON
        """Wait for the next line."""
        assert self._process.stdout is not None
        with alarm_after(self._limit_s):  # a watch that finds nothing says nothing
            text = self._process.stdout.readline()
        assert text, f"it ended with {self._process.wait(HANG_S)}"
        return json.loads(text)

    def lines_until(self, kind: str, count: int = 1) -> list[Any]:
        """The lines up to the `count`th of this kind."""
        lines: list[Any] = []
        for _ in range(count):
            lines += self.lines_until_one(lambda line: line.get("kind") == kind)
        return lines

    def lines_until_one(self, is_it: Callable[[Any], bool]) -> list[Any]:
        """The lines up to one that is it; AssertionError if there is none, though there are others all the while."""
        lines = [self.line()]
        end_s = time.monotonic() + self._limit_s
        while not is_it(lines[-1]):
            assert time.monotonic() < end_s, lines
            lines.append(self.line())
        return lines

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def end(self) -> tuple[list[Any], Any, int]:
        """The lines that are left, the report at their end, and the exit status."""
        text, _ = self._process.communicate(timeout=HANG_S)
        *lines, report = map(json.loads, text.splitlines())
        return lines, report["result"], self._process.returncode


@contextmanager
def watching(*arguments: str, limit_s: int = HANG_S) -> Iterator[WatchProcess]:
    """Run `pvclock watch --json` with these arguments, from when it has found the pages."""
    # A shell's background job ignores SIGINT, and so would what it starts.
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{begin}; from pvclock.commands import main; raise SystemExit(main())"
    command = [sys.executable, "-c", program, "watch", "--json", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield WatchProcess(process, limit_s)
        finally:
            process.kill()
