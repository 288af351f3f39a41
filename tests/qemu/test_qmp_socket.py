"""A path that may be no QMP socket, or one that another client has: each is one clear line, at once."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from qemu_glue import QmpFailed
from qemu_glue.peer import qmp_socket
from qemu_glue.peer.qmp_socket import connect
from tests.qemu.another_user import as_another_user
from tests.qemu.test_monitor import GREETING, Answer, fine, serve

pytestmark = pytest.mark.row("E3")


@contextmanager
def listener(path: Path, backlog: int = 1) -> Iterator[socket.socket]:
    """A socket at `path` that lets `backlog` + 1 clients wait."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(backlog)
        yield listening


@contextmanager
def server(path: Path, greeting: bytes, *answers: Answer) -> Iterator[None]:
    """Something that serves one client at `path`."""

    def accept() -> None:
        serve(listening.accept()[0], greeting, list(answers))

    with listener(path) as listening:
        thread = threading.Thread(target=accept)
        thread.start()
        yield
        thread.join()


def complaint(path: Path) -> str:
    """What connect() says: one line that names the path."""
    with pytest.raises(QmpFailed, match=f"^QMP connect: {path}: ") as caught:
        connect(str(path))
    assert "\n" not in str(caught.value)
    return caught.value.why.removeprefix(f"{path}: ")


def test_a_session_and_who_listens(tmp_path: Path) -> None:
    """A QMP socket gives a session, and the process that listens there."""
    with server(tmp_path / "qmp", GREETING, fine, fine):
        monitor, pid = connect(str(tmp_path / "qmp"))
        with monitor:
            assert monitor.execute("stop") == {}
        assert pid == os.getpid()


def test_no_such_file(tmp_path: Path) -> None:
    """A path that is not there says what to give."""
    assert complaint(tmp_path / "qmp") == qmp_socket.NO_FILE


def test_not_a_socket(tmp_path: Path) -> None:
    """A plain file is told from a socket that nobody listens at."""
    (tmp_path / "file").write_bytes(b"")
    assert complaint(tmp_path / "file") == qmp_socket.NOT_A_SOCKET


def test_nobody_listens(tmp_path: Path) -> None:
    """A socket whose QEMU has ended."""
    with listener(tmp_path / "qmp"):
        pass
    assert complaint(tmp_path / "qmp") == qmp_socket.NOBODY_LISTENS


def test_not_permitted() -> None:
    """Another user's socket says whose it is, and whom to be."""
    with TemporaryDirectory(dir="/run") as name, listener(Path(name, "qmp")):
        Path(name).chmod(0o755)
        Path(name, "qmp").chmod(0o600)
        with as_another_user():
            said = complaint(Path(name, "qmp"))
    assert said == "permission denied, it belongs to root; be the user who runs QEMU, or root"


def test_another_client_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that takes the connection and never greets is given up after 2 s, with what to do."""
    assert qmp_socket.GREETING_LIMIT_S == 2
    monkeypatch.setattr(qmp_socket, "GREETING_LIMIT_S", 0.1)
    with listener(tmp_path / "qmp"):
        assert complaint(tmp_path / "qmp") == f"no greeting within 0.1 s; {qmp_socket.BUSY}"


def test_many_wait_for_it(tmp_path: Path) -> None:
    """So is one at which so many wait that it takes no more."""
    with listener(tmp_path / "qmp", backlog=0), ExitStack() as clients:
        waiting = clients.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(str(tmp_path / "qmp"))
        assert complaint(tmp_path / "qmp") == f"it takes no more clients; {qmp_socket.BUSY}"


@pytest.mark.parametrize(
    "greeting", [b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) \n", b"\xff\n", b""]
)
def test_not_qmp(tmp_path: Path, greeting: bytes) -> None:
    """What speaks, but not QMP, such as QEMU's monitor for people, or hangs up."""
    with server(tmp_path / "socket", greeting):
        assert complaint(tmp_path / "socket").endswith(qmp_socket.NOT_QMP)


def test_a_path_too_long(tmp_path: Path) -> None:
    """Longer than a socket's path can be: Python's own words, in our error."""
    assert "too long" in complaint(tmp_path / ("x" * 200))
