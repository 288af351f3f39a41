"""A QMP socket by its path: connected to, or why that is not possible and what to do; and who listens there."""

from __future__ import annotations

import select
import socket
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from qemu_glue.errors import QmpFailed
from qemu_glue.peer.monitor import ANSWER_LIMIT_S, Monitor

__all__ = ["GREETING_LIMIT_S", "connect"]

GREETING_LIMIT_S: Final = 2.0
"""QEMU greets at once, unless it talks to another client: it serves one at a time."""

BUSY: Final = (
    "another client may have it, for QEMU serves one at a time: start QEMU with a second -qmp, or use --pid, "
    "which needs no monitor; a guest of libvirt: --libvirt"
)
NO_FILE: Final = (
    "there is no such file; it is the PATH of QEMU's -qmp unix:PATH,server=on,wait=off, for only UNIX sockets are taken"
)
NOBODY_LISTENS: Final = "nobody listens there: the QEMU that made it has ended"
NOT_A_SOCKET: Final = "it is not a socket; give the PATH of QEMU's -qmp unix:PATH,server=on,wait=off"
NOT_QMP: Final = "it is no QMP socket; -monitor makes one for people, -qmp one for programs"

PEER: Final = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""


def connect(path: str, *, limit_s: float | None = None, if_busy: str = BUSY) -> tuple[Monitor, int | None]:
    """A session at the QMP socket `path`, and the process that listens there (None: of another PID namespace).

    limit_s: how long the other end has for its greeting, and for each answer, in place of the usual limits.  if_busy:
    what to do where it does not greet.  QmpFailed says in one line why there is no session.
    """
    greeting_s, answer_s = (usual if limit_s is None else limit_s for usual in (GREETING_LIMIT_S, ANSWER_LIMIT_S))
    with ExitStack() as resources:
        connection = resources.enter_context(_opened(path, greeting_s, if_busy))
        if not _has_greeting(connection, greeting_s):
            raise _failed(path, f"no greeting within {greeting_s:g} s; {if_busy}")
        try:
            monitor = Monitor(connection, answer_s)
        except QmpFailed as failure:
            raise _failed(path, f"{failure.why}; {NOT_QMP}") from None
        resources.pop_all()
        return monitor, _listener(connection)


def _opened(path: str, limit_s: float, if_busy: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(limit_s)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise _failed(path, _why_not_opened(path, error, if_busy)) from None
    return connection


def _has_greeting(connection: socket.socket, limit_s: float) -> bool:
    greeting = select.poll()
    greeting.register(connection, select.POLLIN)
    return bool(greeting.poll(limit_s * 1000))


def _why_not_opened(path: str, error: OSError, if_busy: str) -> str:
    match error:
        case FileNotFoundError():
            return NO_FILE
        case ConnectionRefusedError():
            return NOBODY_LISTENS if Path(path).is_socket() else NOT_A_SOCKET
        case PermissionError():
            return f"permission denied{_owner(path)}; be the user who runs QEMU, or root"
        case BlockingIOError() | TimeoutError():  # as many wait as it lets wait
            return f"it takes no more clients; {if_busy}"
    return error.strerror or str(error)


def _owner(path: str) -> str:
    try:
        return f", it belongs to {Path(path).owner()}"
    except (OSError, KeyError):
        return ""


def _listener(connection: socket.socket) -> int | None:
    pid, _, _ = PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    return pid or None


def _failed(path: str, why: str) -> QmpFailed:
    return QmpFailed("connect", f"{path}: {why}")
