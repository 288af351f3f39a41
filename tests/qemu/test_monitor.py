"""The monitor's other end may talk nonsense, refuse, keep silent or go away: each is one clear error."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from qemu_glue import QmpFailed
from qemu_glue.peer.monitor import Monitor, QmpEvent
from tests.waiting import HANG_S

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\n'

Answer = Callable[[dict[str, object]], bytes]


def fine(asked: dict[str, object]) -> bytes:
    """What QEMU says to a command that returns nothing."""
    return json.dumps({"return": {}, "id": asked.get("id")}).encode() + b"\n"


def serve(connection: socket.socket, greeting: bytes, answers: list[Answer]) -> None:
    """Greet, then give the answers, one for each command that comes in; then hang up."""
    with connection:
        connection.sendall(greeting)
        for answer in answers:
            command = connection.recv(4096)  # a client waits for each answer, and its commands are short
            if not command:
                return
            connection.sendall(answer(json.loads(command)))


@contextmanager
def server(greeting: bytes, *answers: Answer) -> Iterator[socket.socket]:
    """A connection to something like a QEMU."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs, greeting, list(answers)))
    thread.start()
    with ours:
        yield ours
    thread.join()


@pytest.mark.parametrize(
    ("greeting", "complaint"),
    [
        (b"\xff\xfe\n", "not QMP: .*codec"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not QMP: Did not understand Greeting"),
        (b"{}\n", "not QMP: Did not understand Greeting"),
        (b"[1, 2]\n", "not QMP: Did not understand Greeting"),
        (b"", "the other end hung up"),
        (GREETING, "the other end hung up"),
    ],
)
@pytest.mark.row("E13")
def test_connecting_to_nonsense(greeting: bytes, complaint: str) -> None:
    """Whatever is not QMP from the start is refused in words."""
    with server(greeting) as connection, pytest.raises(QmpFailed, match=f"QMP connect: {complaint}") as caught:
        Monitor(connection)
    assert caught.value.operation == "connect"


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda _: b"%&/()\n", r"not QMP: .*%&/\(\)"),
        (lambda _: b"\xff\xfe\n", "not QMP: .*codec"),
        (lambda _: b'["stop"]\n', "not QMP: "),
        (lambda _: b"[" * 100_000 + b"\n", "not QMP: "),
        (lambda _: b"", "the other end hung up"),
    ],
)
@pytest.mark.row("E13")
def test_nonsense_in_mid_session(answer: Answer, complaint: str) -> None:
    """Nonsense later on ends the session with its own reason; so does every command after it."""
    with server(GREETING, fine, answer) as connection, Monitor(connection) as monitor:
        with pytest.raises(QmpFailed, match=f"QMP stop: {complaint}"):
            monitor.execute("stop")
        with pytest.raises(QmpFailed, match="QMP cont: "):
            monitor.execute("cont")


@pytest.mark.row("E13")
def test_refusal_and_silence() -> None:
    """A refused command says why, and one that is not answered says for how long; the session goes on."""

    def refuse(asked: dict[str, object]) -> bytes:
        error = {"class": "GenericError", "desc": "no such thing"}
        return json.dumps({"error": error, "id": asked["id"]}).encode() + b"\n"

    silent: Answer = lambda _: b""  # noqa: E731  # as the others
    with server(GREETING, fine, refuse, silent, fine) as connection, Monitor(connection) as monitor:
        with pytest.raises(QmpFailed, match="QMP eject: refused: no such thing"):
            monitor.execute("eject", {"device": "none"})
        with pytest.raises(QmpFailed, match=r"QMP stop: no answer within 0\.2 s"):
            monitor.execute("stop", limit_s=0.2)
        assert monitor.execute("cont") == {}


@pytest.mark.row("E13")
def test_silence_from_the_start() -> None:
    """Something that never greets is given up."""
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(QmpFailed, match=r"QMP connect: no answer within 0\.2 s"):
        Monitor(ours, limit_s=0.2)


def event(number: int) -> bytes:
    """An event as QEMU sends it, the number in its stamp."""
    stamp = {"seconds": 7, "microseconds": number}
    return json.dumps({"event": "STOP", "data": {}, "timestamp": stamp}).encode() + b"\n"


def told(numbers: range) -> list[QmpEvent]:
    """The same as take_events() has them."""
    return [QmpEvent("STOP", 7_000_000_000 + 1000 * number, {}) for number in numbers]


@pytest.mark.row("E3")
def test_events_are_taken_in_order_and_none_is_lost() -> None:
    """Those before, between and after a command's answer come with the next look, and each once."""

    def answer(asked: dict[str, object]) -> bytes:
        return event(1) + event(2) + fine(asked) + b"".join(map(event, range(3, 1000)))

    negotiated: Answer = lambda asked: fine(asked) + event(0)  # noqa: E731  # as the others
    with server(GREETING, negotiated, answer, fine) as connection, Monitor(connection) as monitor:
        assert monitor.execute("stop") == {}
        assert await_events(monitor, 1000) == told(range(1000))
        assert monitor.take_events() == []
        assert monitor.execute("cont") == {}


@pytest.mark.row("E3")
def test_events_that_come_with_an_answer() -> None:
    """They are there at the first look, though nothing is in the socket any more."""
    together: Answer = lambda asked: event(0) + fine(asked) + event(1)  # noqa: E731  # as the others
    with server(GREETING, fine, together, together, fine) as connection, Monitor(connection) as monitor:
        for _ in range(2):
            monitor.execute("stop")
            assert monitor.take_events() == told(range(2))
            assert monitor.take_events() == []
        monitor.execute("quit")


@pytest.mark.row("E3")
def test_what_has_arrived_is_taken_at_once() -> None:
    """One look has all that is in the socket; while nothing is, it is no business of the event loop."""
    ours, theirs = socket.socketpair()
    serving = threading.Thread(target=serve, args=(theirs.dup(), GREETING, [fine]))
    with theirs:
        serving.start()
        with Monitor(ours) as monitor:
            serving.join()
            for number in range(100):
                theirs.sendall(event(number) + event(number + 1))
                assert monitor.take_events() == told(range(number, number + 2))
                assert monitor.take_events() == []


@pytest.mark.row("E3")
def test_last_events_before_the_end() -> None:
    """What a QEMU told before it hung up is taken first; then its end is an error, each time."""
    last: Answer = lambda asked: fine(asked) + event(0)  # noqa: E731  # as the others
    with server(GREETING, fine, last) as connection, Monitor(connection) as monitor:
        monitor.execute("quit")
        assert await_events(monitor, 1) == told(range(1))
        for _ in range(2):
            with pytest.raises(QmpFailed, match="QMP events: the other end hung up"):
                await_end(monitor)


@pytest.mark.row("E3")
def test_nonsense_among_events() -> None:
    """Nonsense between calls is told by the next look for events."""
    mad: Answer = lambda asked: fine(asked) + b"%&/()\n"  # noqa: E731  # as the others
    with server(GREETING, fine, mad) as connection, Monitor(connection) as monitor:
        monitor.execute("stop")
        with pytest.raises(QmpFailed, match=r"QMP events: not QMP: .*%&/\(\)"):
            await_end(monitor)


def await_events(monitor: Monitor, count: int) -> list[QmpEvent]:
    """The next events, `count` of them at least."""
    events: list[QmpEvent] = []
    deadline = time.monotonic() + HANG_S
    while len(events) < count and time.monotonic() < deadline:
        events += monitor.take_events()
    return events


def await_end(monitor: Monitor) -> None:
    """Look for events until that is an error."""
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        assert monitor.take_events() == []
