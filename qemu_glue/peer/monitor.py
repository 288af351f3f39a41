"""QEMU's monitor, called synchronously.

qemu.qmp keeps reader and writer tasks on one event loop while it is connected, so a loop per call does not work.  The
loop here runs only within a call, on the caller's thread: so no thread can be left behind, and an error is raised in
the call that waits.  Events that arrive between calls stay in the socket.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from qemu.qmp import ConnectError, ExecuteError, Message, QMPClient, QMPError, StateError
from qemu.qmp.protocol import Runstate

from qemu_glue.errors import QmpFailed

__all__ = ["ANSWER_LIMIT_S", "Monitor", "QmpEvent"]

ANSWER_LIMIT_S: Final = 90.0
"""A QEMU that starts within an emulated machine, on a busy host, was seen to take more than 30 s until it answers."""

ROUNDS_TO_READ: Final = 10
"""Turns of the event loop from a message in the socket to its event in the queue: 2 were seen."""


class QmpEvent(NamedTuple):
    """An event as QEMU sent it.

    name: such as "STOP".  utc_ns: by QEMU's stamp, a whole us of CLOCK_REALTIME.  data: what it says more, if told.
    """

    name: str
    utc_ns: int
    data: Mapping[str, Any] | None = None


# Our errors carry what qemu.qmp logs; without a handler Python would print it to stderr as well.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Monitor:
    """A QMP session over `connection`, which it owns from then on; a context manager.  Not for use in a running loop.

    limit_s: the time limit of an answer.  QmpFailed if the other end does not speak QMP.
    """

    why_no_events: str | None = None
    """Why take_events() has nothing: it has what QEMU tells."""

    def __init__(self, connection: socket.socket, limit_s: float = ANSWER_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._unread = select.poll()
        self._unread.register(connection, select.POLLIN)
        self._may_have_read_more = True
        self._runner = asyncio.Runner()
        self._client = QMPClient()
        try:
            self._run("connect", self._client.connect(connection), limit_s)
        except BaseException:
            self._runner.close()
            connection.close()
            raise

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        limit_s: float | None = None,
        fd: int | None = None,
    ) -> Any:  # noqa: ANN401  # JSON
        """QEMU's answer to `command`; QmpFailed without one within `limit_s` (the session's limit by default).

        fd: a descriptor that goes with it, for add-fd and the like; QEMU gets its own copy.
        """
        self._may_have_read_more = True
        talk = self._execute(command, dict(arguments or {}), fd)
        return self._run(command, talk, self._limit_s if limit_s is None else limit_s)

    def take_events(self) -> list[QmpEvent]:
        """What QEMU told since the last call, oldest first; it is not asked.  QmpFailed once the session has ended."""
        if self.is_connected and not self._may_have_read_more and not self._unread.poll(0):
            return []
        events = self._runner.run(self._arrived())
        self._may_have_read_more = False
        if not events and not self.is_connected:
            raise QmpFailed("events", _in_words(self._runner.run(self._disconnect()) or EOFError()))
        return [_event(message) for message in events]

    @property
    def is_connected(self) -> bool:
        """Was the session open at the end of the last call?"""
        return self._client.runstate == Runstate.RUNNING

    def close(self) -> None:
        """End the session; QEMU keeps running."""
        try:
            self._runner.run(self._disconnect())
        finally:
            self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, operation: str, talk: Coroutine[Any, Any, object], limit_s: float) -> object:
        try:
            return self._runner.run(_within(limit_s, talk))
        except TimeoutError:
            raise QmpFailed(operation, f"no answer within {limit_s:g} s") from None
        except ExecuteError as refusal:
            raise QmpFailed(operation, f"refused: {refusal}", refusal.error_class) from None
        except ConnectError as failure:
            raise QmpFailed(operation, _in_words(failure.exc)) from None
        except QMPError as failure:
            raise QmpFailed(operation, _in_words(self._runner.run(self._disconnect()) or failure)) from None

    async def _execute(self, command: str, arguments: dict[str, object], fd: int | None) -> object:
        if fd is not None:
            self._client.send_fd_scm(fd)
        return await self._client.execute(command, arguments)

    async def _arrived(self) -> list[Message]:
        """The events in the queue, and those still in the socket, which this loop's reader takes from there."""
        arrived: list[Message] = []
        while True:
            for _ in range(ROUNDS_TO_READ):
                await asyncio.sleep(0)
            new = self._client.events.clear()
            if not new:
                return arrived
            arrived += new

    async def _disconnect(self) -> Exception | None:
        """End the session if there is one; the error that had ended it before, or None."""
        if self._client.runstate != Runstate.IDLE:
            try:
                await self._client.disconnect()
            except Exception as cause:  # noqa: BLE001  # raises the error that ended the reader task
                return cause
        return None


async def _within(limit_s: float, talk: Coroutine[Any, Any, object]) -> object:
    async with asyncio.timeout(limit_s):
        return await talk


def _event(message: Mapping[str, Any]) -> QmpEvent:
    stamp = message["timestamp"]
    return QmpEvent(message["event"], (stamp["seconds"] * 10**6 + stamp["microseconds"]) * 1000, message.get("data"))


def _in_words(cause: Exception) -> str:
    if isinstance(cause, (EOFError, ConnectionError)):
        return "the other end hung up"
    if isinstance(cause, StateError):
        return "the session has ended"
    return f"not QMP: {' '.join(str(cause).split()) or type(cause).__name__}"
