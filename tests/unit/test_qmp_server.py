"""The QMP server, by sockets: one client after the other, refusals, events in order, and clients that misbehave."""

from __future__ import annotations

import json
import random
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest

from pvclock import ConfigError, RangeError
from pvclock.machine import RunState
from qemu_glue.errors import QmpFailed
from qemu_glue.face.dispatch import Command, command_of
from qemu_glue.face.server import QmpServer
from qemu_glue.peer.monitor import Monitor
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("E15")

VERSION: Final = {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "pvclock"}
NEGOTIATE: Final = b'{"execute":"qmp_capabilities"}'


class Client:
    """A client that writes bytes and reads lines."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(HANG_S)
        self.socket.connect(str(path))
        self._file = self.socket.makefile("rb")

    def read(self) -> Any:  # noqa: ANN401  # JSON
        """The next message."""
        return json.loads(self._file.readline())

    def ask(self, text: bytes) -> Any:  # noqa: ANN401  # JSON
        """Send it; the next message."""
        self.socket.sendall(text)
        return self.read()

    def greeted(self) -> Self:
        """Read the greeting, and negotiate."""
        assert self.read() == {"QMP": {"version": VERSION, "capabilities": []}}
        assert self.ask(NEGOTIATE) == {"return": {}}
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self.socket.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the socket is to be."""
    return tmp_path / "qmp.sock"


@pytest.fixture
def server(path: Path) -> Iterator[QmpServer]:
    """Return a server with some commands."""
    commands: dict[str, Command] = {}
    with QmpServer(path, commands, VERSION) as made:

        def repeat(text: str, some_count: int = 1, loud: bool = False) -> str:
            return (text.upper() if loud else text) * some_count

        def halve(value: float | None = None) -> object:
            return None if value is None else value / 2

        def fail(how: str) -> None:
            raise RangeError("that is too far") if how == "ours" else KeyError(how)

        def emit() -> str:
            made.emit("STOP")
            made.emit("RESET", {"guest": False})
            return RunState.PAUSED

        commands |= {function.__name__: command_of(function) for function in (repeat, halve, fail, emit)}
        yield made


def test_a_client_of_ours(server: QmpServer, path: Path) -> None:
    """What qemu.qmp sends is understood, and what it is sent it understands."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    with Monitor(connection) as monitor:
        assert monitor.execute("repeat", {"text": "ab", "some-count": 2, "loud": True}) == "ABAB"
        with pytest.raises(QmpFailed, match="The command nope has not been found"):
            monitor.execute("nope")
        assert monitor.execute("emit") == "paused"
        assert [event.name for event in monitor.take_events()] == ["STOP", "RESET"]
    assert server is not None


@pytest.mark.parametrize(
    ("request_", "error_class", "desc"),
    [
        (b"[]", "GenericError", "QMP input must be a JSON object"),
        (b"{}", "GenericError", "QMP input lacks member 'execute'"),
        (b'{"exec":"a"}', "GenericError", "QMP input member 'exec' is unexpected"),
        (b'{"execute":3}', "GenericError", "QMP input member 'execute' must be a string"),
        (b'{"execute":"emit","arguments":[]}', "GenericError", "QMP input member 'arguments' must be an object"),
        (b'{"execute":"emit","arguments":{"a":1}}', "GenericError", "Parameter 'a' is unexpected"),
        (b'{"execute":"repeat"}', "GenericError", "Parameter 'text' is missing"),
        (
            b'{"execute":"repeat","arguments":{"text":1}}',
            "GenericError",
            "Invalid parameter type for 'text', expected: string",
        ),
        (
            b'{"execute":"repeat","arguments":{"text":"a","some-count":true}}',
            "GenericError",
            "Invalid parameter type for 'some-count', expected: integer",
        ),
        (
            b'{"execute":"halve","arguments":{"value":"1"}}',
            "GenericError",
            "Invalid parameter type for 'value', expected: number",
        ),
        (
            b'{"execute":"halve","arguments":{"value":1%s}}' % (b"0" * 400),
            "GenericError",
            "Invalid parameter type for 'value', expected: number",
        ),
        (b'{"execute":"nope"}', "CommandNotFound", "The command nope has not been found"),
        (b'{"execute":"fail","arguments":{"how":"ours"}}', "GenericError", "that is too far"),
        (NEGOTIATE, "CommandNotFound", "Capabilities negotiation is already complete, command ignored"),
        (b"}", "GenericError", "JSON parse error, expecting value"),
    ],
)
@pytest.mark.usefixtures("server")
def test_refusals(path: Path, request_: bytes, error_class: str, desc: str) -> None:
    """QEMU's error class and words; and the session goes on."""
    with Client(path) as client:
        assert client.greeted().ask(request_) == {"error": {"class": error_class, "desc": desc}}
        assert client.ask(b'{"execute":"halve","arguments":{"value":3},"id":[7]}') == {"return": 1.5, "id": [7]}
        assert client.ask(b'{"execute":"halve"}') == {"return": {}}


@pytest.mark.usefixtures("server")
def test_a_fault_of_a_command_is_an_answer(path: Path) -> None:
    """It is told as ours, with the request's id, and ends nothing."""
    with Client(path) as client:
        answer = client.greeted().ask(b'{"execute":"fail","arguments":{"how":"x"},"id":1}')
        assert answer["id"] == 1
        assert answer["error"]["desc"].startswith("an internal error of pvclock")
        assert client.ask(b'{"execute":"halve"}') == {"return": {}}


@pytest.mark.usefixtures("server")
def test_before_the_negotiation(path: Path) -> None:
    """Commands wait for it; broken requests are told as ever; a capability that is not offered is none."""
    with Client(path) as client:
        client.read()
        for request in (b'{"execute":"halve"}', b'{"execute":"nope","id":1}'):
            error = client.ask(request)["error"]
            assert error == {
                "class": "CommandNotFound",
                "desc": "Expecting capabilities negotiation with 'qmp_capabilities'",
            }
        assert client.ask(b"{}")["error"]["desc"] == "QMP input lacks member 'execute'"
        refused = client.ask(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}')
        assert refused["error"]["desc"] == "Capability 'oob' is not available"
        assert client.ask(NEGOTIATE) == {"return": {}}


@pytest.mark.usefixtures("server")
def test_one_client_after_the_other(path: Path) -> None:
    """The second one is greeted once the first has left."""
    with Client(path) as first:
        first.greeted()
        second = Client(path)
        second.socket.settimeout(0.05)
        with pytest.raises(TimeoutError):
            second.socket.recv(1)
        second.socket.settimeout(HANG_S)
    with second:
        assert second.greeted().ask(b'{"execute":"halve"}') == {"return": {}}


def test_events_come_before_the_answer_and_to_nobody_else(server: QmpServer, path: Path) -> None:
    """Those of a command before its answer; those of another thread, too; none before the negotiation."""
    with Client(path) as client:
        client.read()
        server.emit("RESUME")
        assert client.ask(NEGOTIATE) == {"return": {}}
        first = client.ask(b'{"execute":"emit"}')
        assert (first["event"], set(first["timestamp"])) == ("STOP", {"seconds", "microseconds"})
        assert client.read()["data"] == {"guest": False}
        assert client.read() == {"return": "paused"}
        threading.Thread(target=server.emit, args=("POWERDOWN",)).start()
        assert client.read()["event"] == "POWERDOWN"
    server.emit("STOP")


@pytest.mark.usefixtures("server")
def test_a_client_that_does_not_wait_for_the_greeting(path: Path) -> None:
    """It hears of the events of the very first commands, too."""
    first = Client(path)
    first.read()
    for _ in range(5):
        with first:
            second = Client(path)
            second.socket.sendall(NEGOTIATE + b'{"execute":"emit"}')  # there before it is its turn
        told = [second.read()]
        while told[-1] != {"return": "paused"}:
            told.append(second.read())
        assert [each["event"] for each in told if "event" in each] == ["STOP", "RESET"]
        first = second
    first.__exit__(None, None, None)


def test_a_client_that_reads_no_events_is_hung_up_on(server: QmpServer, path: Path) -> None:
    """And the next one is served."""
    with Client(path) as deaf:
        deaf.greeted()
        for _ in range(60_000):
            server.emit("STOP", {"filling": "x" * 500})
        with Client(path) as client:
            assert client.greeted().ask(b'{"execute":"halve"}') == {"return": {}}


@pytest.mark.usefixtures("server")
def test_clients_that_send_anything(path: Path) -> None:
    """Garbage, half a message, ten megabytes without a newline, or nothing: the next client is served."""
    generator = random.Random(7)  # noqa: S311  # any bytes will do
    for data in (
        b"",
        b'{"execute"',
        bytes(generator.randrange(256) for _ in range(5000)),
        b'"' + b"a" * 10_000_000,
        NEGOTIATE + b'{"execute":"emit"}' * 100,
    ):
        with Client(path) as client:
            client.socket.setblocking(False)
            sent = 0
            while sent < len(data):
                try:
                    sent += client.socket.send(data[sent : sent + 65536])
                except BlockingIOError:  # it takes no more than it answers
                    break
    with Client(path) as client:
        assert client.greeted().ask(b'{"execute":"halve"}') == {"return": {}}


def test_the_socket_is_its_user_s_alone_and_goes_with_the_server(path: Path) -> None:
    """Mode 0600; a file that took its place stays; close() may be called twice."""
    server = QmpServer(path, {}, VERSION)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server.close()
    server.close()
    assert not path.exists()
    with QmpServer(path, {}, VERSION):
        path.unlink()
        path.write_text("another's", encoding="ascii")
    assert path.read_text(encoding="ascii") == "another's"


def test_where_no_socket_can_be(path: Path) -> None:
    """Another server's is left alone, and so is a file; that of a server which was killed is taken over."""
    with QmpServer(path, {}, VERSION):
        with pytest.raises(ConfigError, match="another server listens there"):
            QmpServer(path, {}, VERSION)
        with Client(path) as client:
            client.greeted()
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    QmpServer(path, {}, VERSION).close()
    path.write_text("a file", encoding="ascii")
    with pytest.raises(ConfigError, match="it is there, and is no socket"):
        QmpServer(path, {}, VERSION)
    with pytest.raises(ConfigError, match="Not a directory"):
        QmpServer(path / "none" / "x", {}, VERSION)


def test_the_end_of_the_server_is_the_client_s(path: Path) -> None:
    """It has what it was answered, and then the end of the stream; no thread is left."""
    before = threading.active_count()
    server = QmpServer(path, {}, VERSION)
    with Client(path) as client:
        client.greeted()
        server.close()
        assert client.socket.recv(1) == b""
    assert threading.active_count() == before
