"""The server of the metrics: what it answers, where it listens, and that no client holds it up."""

from __future__ import annotations

import argparse
import gc
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection

import pytest

from pvclock import ConfigError
from pvclock.commands import main
from qemu_glue.prometheus.address import Address, parsed_address
from qemu_glue.prometheus.http_server import CLIENTS_MAX, HttpServer, Page
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("E10")

ANY = Address("127.0.0.1", 0)


@pytest.fixture
def server() -> Iterator[HttpServer]:
    """One whose page tells what was asked for."""
    with HttpServer(ANY, lambda accepted: Page("text/plain", f"accepts {accepted}\n".encode())) as made:
        yield made


def asked(server: HttpServer, path: str = "/metrics", method: str = "GET") -> tuple[int, bytes]:
    """Ask once, as Prometheus does; status and content."""
    connection = HTTPConnection("127.0.0.1", server.address.port, timeout=HANG_S)
    try:
        connection.request(method, path, headers={"Accept": "text/plain"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def connected(server: HttpServer) -> socket.socket:
    """A client that has said nothing so far."""
    return socket.create_connection(("127.0.0.1", server.address.port), timeout=HANG_S)


def has_hung_up(client: socket.socket) -> bool:
    """Has the server?  Waits for it to say something."""
    try:
        return not client.recv(1)
    except ConnectionResetError:
        return True


def test_what_it_answers(server: HttpServer) -> None:
    """The page at /metrics, whatever the query; a link to it; and no other path or method."""
    assert asked(server) == (200, b"accepts text/plain\n")
    assert asked(server, "/metrics?name=up") == (200, b"accepts text/plain\n")
    assert asked(server, method="HEAD") == (200, b"")
    assert b'href="/metrics"' in asked(server, "/")[1]
    assert asked(server, "/etc/passwd")[0] == 404
    assert asked(server, method="POST")[0] == 405


def test_a_page_that_cannot_be_made(capfd: pytest.CaptureFixture[str]) -> None:
    """Each scrape is told so, and whoever runs the server once, in one line."""

    def fail(_accepted: str) -> Page:
        raise TypeError("a\nb")

    with HttpServer(ANY, fail) as server:
        for _ in range(3):
            assert asked(server) == (500, b"500 Internal Server Error\n")
        assert asked(server, "/")[0] == 200
    said = f"pvclock: {server.url} is answered with status 500, and no more is said of it: TypeError('a\\nb')\n"
    assert capfd.readouterr().err == said


def test_clients_that_say_nothing_keep_no_other_out(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred the oldest give way, and a scrape is answered while the others are still there."""
    monkeypatch.setattr("qemu_glue.prometheus.http_server.CLIENT_LIMIT_S", HANG_S)
    with ExitStack() as clients:
        silent = [clients.enter_context(connected(server)) for _ in range(CLIENTS_MAX + 36)]
        assert asked(server)[0] == 200
        silent[0].settimeout(HANG_S / 4)  # to fail before a mutant's time is over
        assert all(map(has_hung_up, silent[:-CLIENTS_MAX]))
        silent[-1].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert silent[-1].recv(15) == b"HTTP/1.1 200 OK"


def test_a_client_has_only_so_long(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that begins a request and does not end it is let go of."""
    monkeypatch.setattr("qemu_glue.prometheus.http_server.CLIENT_LIMIT_S", 0.05)
    with connected(server) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert has_hung_up(client)


def test_a_request_has_only_so_many_bytes(server: HttpServer) -> None:
    """Headers without an end are refused, and cost no memory."""
    with connected(server) as client, pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
        client.sendall(b"X: " + b"x" * (64 << 20))
    assert asked(server)[0] == 200


def test_bytes_that_are_no_request(server: HttpServer) -> None:
    """A port scanner's are answered as any other wrong request."""
    with connected(server) as client:
        client.sendall(bytes(range(128, 256)) + b"\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 405"
    assert asked(server)[0] == 200


def test_a_client_that_does_not_read() -> None:
    """An answer that is longer than what the sockets hold waits for nobody but its client."""
    with HttpServer(ANY, lambda _accepted: Page("text/plain", bytes(1 << 24))) as server, connected(server) as client:
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert asked(server)[0] == 200


def test_it_ends_with_clients_that_wait(capfd: pytest.CaptureFixture[str]) -> None:
    """close() waits for none of them, and leaves none open, however early or late it let them in; nothing is said."""
    gc.disable()  # which closes what is forgotten
    try:
        for turns in range(64):
            with HttpServer(ANY, lambda _accepted: Page("", b"")) as server, connected(server) as client:
                for _ in range(turns % 8):
                    assert asked(server, "/")[0] == 200
                server.close()
                assert has_hung_up(client)
                server.close()
    finally:
        gc.enable()
    assert capfd.readouterr().err == ""


def test_a_port_that_is_in_use(server: HttpServer) -> None:
    """That is said, with what to do."""
    with pytest.raises(ConfigError, match=r"at 127\.0\.0\.1:\d+: the port is in use; give another, or 0"):
        HttpServer(server.address, lambda _accepted: Page("", b""))


def test_an_address_that_is_not_here() -> None:
    """Nor can be: 192.0.2.0/24 is for documents only."""
    with pytest.raises(ConfigError, match=r"at 192\.0\.2\.1:0: this host does not have that address"):
        HttpServer(Address("192.0.2.1", 0), lambda _accepted: Page("", b""))


def test_ipv6_has_brackets() -> None:
    """In the URL, and in what the user types."""
    assert str(Address("::1", 9911)) == "[::1]:9911"
    assert parsed_address("[::1]:9911") == Address("::1", 9911)


@pytest.mark.parametrize(
    ("text", "address"),
    [("9911", ("127.0.0.1", 9911)), ("192.0.2.1:0", ("192.0.2.1", 0)), ("localhost:65535", ("localhost", 65535))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    """A port alone is at this host alone."""
    assert parsed_address(text) == address


@pytest.mark.parametrize("text", ["", ":9911", "65536", "-1", "::1:9911", "[::1]", "host:", "a b:1", "http://a:1", "٣"])
def test_what_is_no_address(text: str) -> None:
    """It is refused with examples of what is one."""
    with pytest.raises(argparse.ArgumentTypeError, match=r"give \[ADDRESS:\]PORT, such as 9911"):
        parsed_address(text)


def test_without_prometheus_client(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says how to get it."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "qemu_glue.prometheus.exporter", raising=False)
    assert main(["watch", "--qmp", "/nowhere/*.qmp", "--prometheus", "0"]) == 2
    said = "pvclock watch: --prometheus needs prometheus_client: pip install 'pvclock[prometheus]'\n"
    assert capsys.readouterr().err == said
