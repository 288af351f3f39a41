"""QEMU's monitor, called synchronously.

qemu.qmp keeps reader and writer tasks on one event loop for as long as it is connected, so a loop per call will not
do.  The loop here runs only within a call, on the caller's thread: no thread of ours can be left behind, and whatever
goes wrong is raised where somebody waits.  Events that come in between stay in the socket.
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

ANSWER_LIMIT_S: Final = 10.0

# What qemu.qmp logs is in our errors, too; without a handler Python would print it to stderr.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Monitor:
    """A QMP session over `connection`, which it takes over; a context manager.  Not to be used within a running loop.

    limit_s: how long an answer may take.  QmpFailed if there is no QMP at the other end.
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
        """QEMU's answer to `command`; QmpFailed if it gives none within `limit_s` (the session's limit by default)."""
        talk = self._client.execute(command, dict(arguments or {}))
        return self._run(command, talk, self._limit_s if limit_s is None else limit_s)

    @property
    def is_connected(self) -> bool:
        """Has the session not been ended, as far as was seen in the last call?"""
        return self._client.runstate == Runstate.RUNNING

    def close(self) -> None:
        """End the session; QEMU goes on."""
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
        """End the session if there is one; what had already ended it, or None."""
        if self._client.runstate != Runstate.IDLE:
            try:
                await self._client.disconnect()
            except Exception as cause:  # noqa: BLE001  # whatever ended the reading task comes out here
                return cause
        return None


async def _within(limit_s: float, talk: Coroutine[Any, Any, object]) -> object:
    async with asyncio.timeout(limit_s):
        return await talk


def _in_words(cause: Exception) -> str:
    if isinstance(cause, (EOFError, ConnectionError)):
        return "the other end hung up"
    return f"not QMP: {' '.join(str(cause).split()) or type(cause).__name__}"
