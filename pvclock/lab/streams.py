"""The lab's output: the command's two streams, the script's report, and the console's last lines."""

from __future__ import annotations

import os
import re
import selectors
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, Self

__all__ = ["Streams"]

CHUNK = 1 << 16
CONSOLE_KEPT = 1 << 14
TAIL_LINES = 15

UNREADABLE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1bc|[^\n\t -~]")
"""Terminal escapes (the firmware clears the screen), and all that is not printable ASCII."""


class Output:
    """One output of the command: goes to `sink` as it comes, up to the mark `end`."""

    def __init__(self, sink: BinaryIO, end: bytes) -> None:
        self._sink = sink
        self._end = end
        self._pending = b""
        self.complete = False

    def feed(self, data: bytes) -> None:
        """Pass data on, except a tail that may be the beginning of the mark."""
        text, mark, _ = (self._pending + data).partition(self._end)
        self.complete = self.complete or bool(mark)
        beginnings = (length for length in range(len(self._end) - 1, 0, -1) if text.endswith(self._end[:length]))
        pending = 0 if mark else next(beginnings, 0)
        self._pending = text[len(text) - pending :]
        try:
            self._sink.write(text[: len(text) - pending])
            self._sink.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, "the command's output") from None


class Streams:
    """The pipes between the lab and us.  `ports` and `console` are the ends that QEMU writes."""

    def __init__(self, stdout: BinaryIO, stderr: BinaryIO, *, end: str) -> None:
        self.end = end
        self._outputs = [Output(stdout, end.encode()), Output(stderr, end.encode())]
        self._report = b""
        self._console = b""
        self._selector = selectors.DefaultSelector()
        takers: list[Callable[[bytes], None]] = [output.feed for output in self._outputs]
        *ports, self.console = [self._pipe(taker) for taker in (*takers, self._take_report, self._take_console)]
        self.ports = tuple(ports)
        self._writers = (*ports, self.console)

    def _pipe(self, taker: Callable[[bytes], None]) -> int:
        reader, writer = os.pipe()
        self._selector.register(reader, selectors.EVENT_READ, taker)
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_writers()
        for key in list(self._selector.get_map().values()):
            self._drop(key.fd)
        self._selector.close()

    def close_writers(self) -> None:
        """Close our copies of the writing ends, so that reading ends when QEMU does."""
        for writer in self._writers:
            os.close(writer)
        self._writers = ()

    def _drop(self, reader: int) -> None:
        self._selector.unregister(reader)
        os.close(reader)

    def pump(self, timeout_s: float) -> bool:
        """Wait for output and take it; False at the end of all streams."""
        for key, _ in self._selector.select(timeout_s):
            if data := os.read(key.fd, CHUNK):
                key.data(data)
            else:
                self._drop(key.fd)
        return bool(self._selector.get_map())

    def _take_report(self, data: bytes) -> None:
        self._report += data

    def _take_console(self, data: bytes) -> None:
        self._console = (self._console + data)[-CONSOLE_KEPT:]

    def _reported(self, word: str) -> str | None:
        lines = self._report.decode("ascii", "replace").splitlines(keepends=True)
        said = (line[len(word) :].strip() for line in lines if line.startswith(word) and line.endswith("\n"))
        return next(said, None)

    @property
    def ready(self) -> bool:
        """Has the command been started?"""
        return self._reported("ready") is not None

    @property
    def failure(self) -> str | None:
        """Why the command cannot be started."""
        return self._reported("failed")

    @property
    def complete(self) -> bool:
        """Has the command ended, and all that it wrote arrived?"""
        return self._reported("exit") is not None and all(output.complete for output in self._outputs)

    @property
    def status(self) -> int:
        """The command's exit status, once it has ended."""
        return int(self._reported("exit") or 0)

    @property
    def console_tail(self) -> str:
        """The console's last lines, readable."""
        text = UNREADABLE.sub("", self._console.decode("utf-8", "replace").replace("\r", "\n"))
        lines = [line.rstrip() for line in text.split("\n") if line.strip()]
        return "\n".join(lines[-TAIL_LINES:])
