"""A guest's shell on its serial console: commands are typed into it, and what they print is waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["BOOT_LIMIT_S", "Command", "GuestShell"]

BOOT_LIMIT_S: Final = 300.0
"""With two vCPUs on one emulated CPU of a busy host; 10 s on an idle one."""
TOLD_BYTES: Final = 2000

PROMPT: Final = b"/ # "


class Command:
    """A command that was typed at the shell.  Its lines end as a terminal's do until they are given to the caller."""

    def __init__(self, wait_for: Callable[..., Any], begin: bytes, end: bytes) -> None:
        self._wait_for, self._begin, self._end = wait_for, begin, end

    def wait_for_line(self, line: str, limit_s: float = BOOT_LIMIT_S) -> None:
        """Return once it has printed this one."""
        wanted = line.encode() + b"\r\n"
        self._wait_for(lambda output: wanted in output.partition(self._begin)[2] or None, limit_s)

    def printed(self, limit_s: float = BOOT_LIMIT_S) -> str:
        """All that it has printed, once it has ended."""
        output: bytes = self._wait_for(lambda output: bytes(output) if self._end in output else None, limit_s)
        text = output.partition(self._begin)[2].partition(self._end)[0]
        return text.decode(errors="replace").replace("\r\n", "\n")


class GuestShell:
    """The shell of a guest that takes keys by `send`, and whose output is given to take()."""

    def __init__(self, send: Callable[[bytes], object]) -> None:
        self._send = send
        self._changed = threading.Condition()
        self._output = bytearray()
        self._commands = 0
        self._is_over = False

    def wait_for_prompt(self) -> None:
        """Return once the guest has booted."""
        self._wait_for(lambda output: PROMPT in output or None)

    def run(self, command: str, limit_s: float = BOOT_LIMIT_S) -> str:
        """What a command prints, typed at the shell."""
        return self.begin(command).printed(limit_s)

    def begin(self, command: str) -> Command:
        """Type one at the shell, and do not wait for its end.  Its marks are sums, so that their echo is none."""
        self._commands += 1
        begin, end = 2 * self._commands, 2 * self._commands + 1
        self.type(f'echo "<mark $(({begin}))"; {command}; echo "$(({end})) mark>"\n')
        return Command(self._wait_for, b"<mark %d\r\n" % begin, b"%d mark>\r\n" % end)

    def type(self, text: str) -> None:
        """Type it, without waiting for anything."""
        self._send(text.encode())

    def take(self, data: bytes) -> None:
        """Take what the guest has printed."""
        with self._changed:
            self._output += data
            if b"\n" in data or PROMPT in self._output[-len(PROMPT) - len(data) :]:  # what is waited for ends so
                self._changed.notify_all()

    def end(self) -> None:
        """Nothing more will be printed."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _wait_for(self, look: Callable[[bytearray], Any], limit_s: float = BOOT_LIMIT_S) -> Any:  # noqa: ANN401
        """What look() gives of the output, once it gives something; AssertionError with its end if it never does."""
        deadline = time.monotonic() + limit_s
        with self._changed:
            while (found := look(self._output)) is None:
                has_come = not self._is_over and self._changed.wait(timeout=deadline - time.monotonic())
                assert has_come, bytes(self._output[-TOLD_BYTES:]).decode(errors="replace")
                assert b"Kernel panic" not in self._output, self._output.decode(errors="replace")
        return found
