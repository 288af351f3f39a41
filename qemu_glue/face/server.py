"""A QMP server at a UNIX socket, on a thread of its own: one client after the other, as QEMU has it.

A client that connects while another is there waits for its greeting until that one has left.  No more is read of a
client than it takes answers for, and one that leaves events lying is hung up on; so none can fill the memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from qemu.qmp.protocol import AsyncProtocol, Runstate

from pvclock import ConfigError
from qemu_glue.errors import QmpRefusal
from qemu_glue.face.dispatch import Commands, command_of, dispatch
from qemu_glue.face.json_stream import JsonStream

__all__ = ["QmpServer"]

# What ends a session is its client's part; without a handler Python would print it to stderr.
T = TypeVar("T")

logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

READ_BYTES: Final = 1 << 16
UNSENT_BYTES_MAX: Final = 4 << 20
"""Of events that a client leaves lying."""
FLUSH_LIMIT_S: Final = 1.0
"""How long a client may take to read the last answers when the server ends."""
CONNECT_LIMIT_S: Final = 1.0
BACKLOG: Final = 8
NEGOTIATION: Final = "qmp_capabilities"


class QmpServer:
    """Serves `commands` at the socket `path`; a context manager, which removes it at the end.

    version: what clients are told in the greeting.  ConfigError if there can be no socket at `path`.

    Commands run on the server's thread, one after the other.  Thread-safety: emit() may be called from any thread.
    """

    def __init__(self, path: str | Path, commands: Commands, version: Mapping[str, object]) -> None:
        self._path, self._commands = Path(path), commands
        self._greeting = {"QMP": {"version": version, "capabilities": []}}
        self._session: _Session | None = None
        self._listener = _listening(self._path)
        self._file = self._path.stat()
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="pvclock-qmp", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._runner.close()
            self._remove()
            raise

    def emit(self, event: str, data: Mapping[str, object] | None = None) -> None:
        """Tell the client, if there is one, of an event that is now; before the answer of the command that runs."""
        microseconds = time.time_ns() // 1000
        seconds, rest = divmod(microseconds, 10**6)
        told: dict[str, object] = {"timestamp": {"seconds": seconds, "microseconds": rest}, "event": event}
        told |= {} if data is None else {"data": data}
        if threading.current_thread() is self._thread:
            self._tell(told)
        else:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._tell, told)

    def close(self) -> None:
        """End it, once the client has what it was answered; may be called twice."""
        with suppress(RuntimeError):  # it is closed already
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Inside, on the thread

    def _run(self) -> None:
        with self._runner:
            self._runner.run(self._serve())

    async def _serve(self) -> None:
        while (connection := await self._unless_stopping(self._loop.sock_accept(self._listener))) is not None:
            session = self._session = _Session(self._greeting, self._commands)
            with suppress(Exception):  # the client has left already
                await session.connect(connection[0])  # its first commands may be done before this returns
            while session.runstate is Runstate.RUNNING:
                if await self._unless_stopping(session.runstate_changed()) is None:
                    break
            self._session = None
            await _end(session)
            connection[0].close()

    async def _unless_stopping(self, event: Coroutine[Any, Any, T]) -> T | None:
        """What is waited for; None once the server is to end."""
        waited, stopping = asyncio.ensure_future(event), asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((waited, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if waited.done():
            return waited.result()
        waited.cancel()
        return None

    def _tell(self, event: Mapping[str, object]) -> None:
        if self._session is not None:
            self._session.tell(event)

    def _remove(self) -> None:
        """Close the socket, and remove its file if it is still that."""
        self._listener.close()
        with suppress(FileNotFoundError):
            if os.path.samestat(self._path.stat(), self._file):
                self._path.unlink()


class _Session(AsyncProtocol[Any]):
    """The talk with one client: requests and refusals come in, answers and events go out."""

    def __init__(self, greeting: Mapping[str, object], commands: Commands) -> None:
        super().__init__()
        self._greeting, self._commands = greeting, commands
        self._stream = JsonStream()
        self._came: deque[object] = deque()
        self._is_negotiated = False
        self._negotiation = command_of(self._negotiate)

    def tell(self, event: Mapping[str, object]) -> None:
        """Send an event, once the client has negotiated."""
        if not self._is_negotiated:
            return
        assert self._writer is not None  # noqa: S101  # the session is established
        if self._writer.transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self.hang_up()
        else:
            self._outgoing.put_nowait(event)

    def hang_up(self) -> None:
        """End it at once, whatever the client has not read."""
        assert self._writer is not None  # noqa: S101  # the session is established
        self._writer.transport.abort()

    async def _establish_session(self) -> None:
        self._do_send(self._greeting)
        await super()._establish_session()

    async def _do_recv(self) -> object:
        assert self._reader is not None  # noqa: S101  # the session is established
        assert self._writer is not None  # noqa: S101
        await self._outgoing.join()  # before each one: short requests may have long answers
        await self._writer.drain()
        while not self._came:
            data = await self._reader.read(READ_BYTES)
            if not data:
                raise EOFError
            self._came.extend(self._stream.feed(data))
        return self._came.popleft()

    def _do_send(self, msg: object) -> None:
        assert self._writer is not None  # noqa: S101  # the session is established
        self._writer.write(_line(msg))

    async def _on_message(self, msg: object) -> None:
        self._outgoing.put_nowait(self._answer(msg))

    def _answer(self, request: object) -> dict[str, object]:
        if not self._is_negotiated and _command(request) != NEGOTIATION:
            answer = dispatch({}, request)
            return _with_advice(answer) if _command(request) else answer
        return dispatch({**self._commands, NEGOTIATION: self._negotiation}, request)

    def _negotiate(self, enable: list[object] | None = None) -> None:
        """The command by which each session begins."""
        if self._is_negotiated:
            raise QmpRefusal("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        if enable:
            raise QmpRefusal(f"Capability '{enable[0]}' is not available")
        self._is_negotiated = True


async def _end(session: _Session) -> None:
    """Let the client read what it was answered, for a while.  What ended the session is the client's part."""
    if session.runstate is Runstate.IDLE:
        return
    try:
        async with asyncio.timeout(FLUSH_LIMIT_S):
            await session.disconnect()
    except TimeoutError:
        session.hang_up()
        with suppress(Exception):
            await session.disconnect()
    except Exception:  # noqa: BLE001, S110
        pass


def _command(request: object) -> str | None:
    """The name of the command that a request asks for, if it does."""
    name = request.get("execute") if isinstance(request, dict) else None
    return name if isinstance(name, str) else None


def _with_advice(answer: dict[str, object]) -> dict[str, object]:
    """The answer to a command that came before the negotiation."""
    if isinstance(error := answer["error"], dict) and error["class"] == "CommandNotFound":
        return {**answer, "error": {**error, "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}}
    return answer


def _line(message: object) -> bytes:
    """A message as it is sent."""
    return json.dumps(message).encode() + b"\r\n"


def _listening(path: Path) -> socket.socket:
    """A socket that listens at `path`, for this user alone.  ConfigError if there can be none."""
    _remove_if_dead(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        path.chmod(0o600)  # before anybody can connect
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"no QMP socket at {path}: {error.strerror or error}; name a file in a folder of yours"
        ) from None
    return listener


def _remove_if_dead(path: Path) -> None:
    """Remove the socket of a server that has ended without doing so.  ConfigError if that is none, or is in use."""
    if not path.is_socket():
        if path.exists():
            raise ConfigError(f"no QMP socket at {path}: it is there, and is no socket; name another file")
        return
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(CONNECT_LIMIT_S)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            return
        else:
            raise ConfigError(f"no QMP socket at {path}: another server listens there; name another file")
