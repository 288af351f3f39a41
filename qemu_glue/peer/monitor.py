"""QEMU's monitor, called synchronously.

qemu.qmp keeps reader and writer tasks on one event loop while it is connected, so a loop per call does not work.  The
loop here runs only within a call, on the caller's thread: so no thread can be left behind, and an error is raised in
the call that waits.  Events that arrive between calls stay in the socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, Final, Self

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from qemu_glue.errors import QmpFailed

__all__ = ["ANSWER_LIMIT_S", "Monitor"]

ANSWER_LIMIT_S: Final = 90.0
"""A QEMU that starts within an emulated machine, on a busy host, was seen to take more than 30 s until it answers."""

# Our errors carry what qemu.qmp logs; without a handler Python would print it to stderr as well.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Monitor:
    """A QMP session over `connection`, which it owns from then on; a context manager.  Not for use in a running loop.

    limit_s: the time limit of an answer.  QmpFailed if the other end does not speak QMP.
    """

    def __init__(self, connection: socket.socket, limit_s: float = ANSWER_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._runner = asyncio.Runner()
        self._client = QMPClient()
        try:
            self._run("connect", self._client.connect(connection), limit_s)
        except BaseException:
            self._runner.close()
            connection.close()
            raise

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, limit_s: float | None = None
    ) -> Any:  # noqa: ANN401  # JSON
        """QEMU's answer to `command`; QmpFailed without one within `limit_s` (the session's limit by default)."""
        talk = self._client.execute(command, dict(arguments or {}))
        return self._run(command, talk, self._limit_s if limit_s is None else limit_s)

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
            raise QmpFailed(operation, f"refused: {refusal}") from None
        except ConnectError as failure:
            raise QmpFailed(operation, _in_words(failure.exc)) from None
        except QMPError as failure:
            raise QmpFailed(operation, _in_words(self._runner.run(self._disconnect()) or failure)) from None

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


def _in_words(cause: Exception) -> str:
    if isinstance(cause, (EOFError, ConnectionError)):
        return "the other end hung up"
    return f"not QMP: {' '.join(str(cause).split()) or type(cause).__name__}"
